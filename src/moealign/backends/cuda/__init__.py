"""NVIDIA GPUs from sm_80 on: kernels of our own, compiled at first use with NVRTC and kept on disk.  One launch a call.

Importing this module imports no cuda.core and makes no CUDA context.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from ...layout import Problem
from .align import align, align_three
from .batched import align_batched
from .compile import cache_folder, compiler_version
from .route import refuses_route, route, route_align

__all__ = [
    "align", "align_batched", "align_three", "note", "refuses", "refuses_route", "route", "route_align", "unavailable",
]  # fmt: skip

_OLDEST = (8, 0)  # the oldest compute capability that the tests compile for


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
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
        return "cuda.core is not installed: pip install 'moealign[cuda]'"
    try:
        compiler_version()
    except Exception as error:  # whatever keeps NVRTC from loading is the reason
        return f"NVRTC cannot be loaded ({error}): pip install 'moealign[cuda]'"
    return None


@functools.cache
def _too_old(device: torch.device) -> str | None:
    found = torch.cuda.get_device_capability(device)
    if found >= _OLDEST:
        return None
    return f"needs compute capability {_OLDEST[0]}.{_OLDEST[1]}, {device} has {found[0]}.{found[1]}"


def refuses(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return f"runs on cuda tensors, these are on {problem.device}"
    return _too_old(problem.device)


def note(problem: Problem) -> str:
    folder = cache_folder()
    kept = f"kept in {folder}" if folder else "kept for this process only, see the warning about the cache folder"
    return f"a first call with these sizes compiles for about 0.1 s, {kept}"
