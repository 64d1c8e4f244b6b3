"""The layout and the router in Triton, on every GPU that it supports: NVIDIA, AMD, Intel.  Only a first call imports
Triton."""

from __future__ import annotations

import os
from functools import partial

from ...problem import AlignProblem, RouteProblem
from .. import Prepared, PreparedRoute
from .align import align as _align
from .align import align_batched as _align_batched
from .launch import interpreted, unavailable
from .route import refuses as _refuses_route
from .route import route as _route

__all__ = ["FUSES_OPTIONS", "note", "prepare", "prepare_route", "refuses", "unavailable"]

FUSES_OPTIONS = False

MAX_BINS = 2**30


def refuses(problem: AlignProblem | RouteProblem) -> str | None:
    reason = unavailable()
    if reason is not None:
        return reason
    if problem.device.type not in ("cuda", "xpu") and not (interpreted() and problem.device.type == "cpu"):
        return f"expected tensors on a GPU, got tensors on {problem.device}"
    if isinstance(problem, RouteProblem):
        return _refuses_route(problem)
    if problem.num_experts > MAX_BINS:
        return f"expected at most {MAX_BINS} experts, got {problem.num_experts}; the reference backend takes them"
    return None


def note(problem: AlignProblem) -> str:
    if interpreted():
        return "Triton's interpreter, milliseconds per program: for tests"
    folder = os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")
    return f"the first call for a dtype and block size compiles for a second or two, then it is cached in {folder}"


def prepare(problem: AlignProblem) -> Prepared:
    return Prepared(partial(_align_batched if problem.op == "align_batched" else _align, problem))


def prepare_route(route: RouteProblem, layout: AlignProblem | None = None) -> PreparedRoute:
    return PreparedRoute(partial(_route, route))
