"""NVIDIA GPUs from sm_80 on: CUDA kernels, compiled with NVRTC at first use and kept on disk.  One launch per call.

Importing this package neither imports cuda.core nor creates a CUDA context.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from ...errors import how_to_install
from ...problem import AlignProblem, RouteProblem
from .. import Prepared, PreparedRoute
from ..cache import cache_folder
from .align import Alignment
from .batched import BatchedAlignment
from .compile import architectures, compiler_version
from .launch import driver_refuses
from .route import Router
from .route import refuses as _refuses_route

__all__ = ["FUSES_OPTIONS", "note", "prepare", "prepare_route", "refuses", "unavailable"]

FUSES_OPTIONS = True

_MIN_CAPABILITY = (8, 0)  # the lowest compute capability that the tests compile for
_MAX_EXPERTS = 2**28  # the kernels count eight times as many in 32 bits


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


@functools.cache
def unavailable() -> str | None:
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs: backend 'triton' runs there"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU that torch can use" + (
            "" if torch.version.cuda else " (this torch is built without CUDA)"
        )
    if not (_installed("cuda.core") and _installed("cuda.bindings.nvrtc")):
        return f"cuda.core is not installed: {how_to_install('cuda')}"
    try:
        compiler_version()
        architectures()
    except Exception as error:  # any error while loading NVRTC is the reason
        return f"NVRTC cannot be loaded ({error}): {how_to_install('cuda', upgrade=True)}"
    return driver_refuses()


@functools.cache
def _unsupported(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _MIN_CAPABILITY:
        minimum = f"{_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]}"
        return f"needs compute capability {minimum} or later, {device} has {major}.{minor}: use backend 'triton'"
    if f"sm_{major}{minor}" not in architectures():
        return (
            f"NVRTC {compiler_version()} does not know sm_{major}{minor}, which {device} is: "
            f"{how_to_install('cuda', upgrade=True)}, or use backend 'triton'"
        )
    return None


def refuses(problem: AlignProblem | RouteProblem) -> str | None:
    if problem.device.type != "cuda":
        return f"expected tensors on a CUDA device, got tensors on {problem.device}"
    if isinstance(problem, RouteProblem):
        return _refuses_route(problem) or _unsupported(problem.device)
    if problem.num_experts > _MAX_EXPERTS:
        return f"expected at most {_MAX_EXPERTS} experts or batches, got {problem.num_experts}: use backend 'triton'"
    return _unsupported(problem.device)


def note(problem: AlignProblem) -> str:
    folder = cache_folder()
    kept = f"kept in {folder}" if folder else "kept for this process only, see the warning about the cache folder"
    return f"a first call with these sizes compiles for about 0.1 s, {kept}"


def prepare(problem: AlignProblem) -> Prepared:
    if problem.op == "align_batched":
        return Prepared(BatchedAlignment(problem).run)
    alignment = Alignment(problem)
    return Prepared(alignment.run, alignment.required)


def prepare_route(route: RouteProblem, layout: AlignProblem | None = None) -> PreparedRoute:
    router = Router(route, layout)
    return PreparedRoute(router.run, None if layout is None else router.run_with_layout)
