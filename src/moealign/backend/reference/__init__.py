"""The layout and the router in vectorised torch, on any device: the backend to read first."""

from __future__ import annotations

from functools import partial

from ...problem import AlignProblem, RouteProblem
from .. import Prepared, PreparedRoute
from .align import align as _align
from .align import align_batched as _align_batched
from .route import route as _route

__all__ = ["FUSES_OPTIONS", "note", "prepare", "prepare_route", "refuses", "unavailable"]

FUSES_OPTIONS = False


def unavailable() -> str | None:
    return None


def refuses(problem: AlignProblem | RouteProblem) -> str | None:
    if problem.device.type == "meta":
        return "tensors on the meta device hold no values; torch.ops.moealign.align gives the shapes"
    return None


def note(problem: AlignProblem) -> str:
    return "plain torch, nothing to compile; the slowest of the backends"


def prepare(problem: AlignProblem) -> Prepared:
    return Prepared(partial(_align_batched if problem.op == "align_batched" else _align, problem))


def prepare_route(route: RouteProblem, layout: AlignProblem | None = None) -> PreparedRoute:
    return PreparedRoute(partial(_route, route))
