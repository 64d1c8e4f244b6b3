"""Shared by all launchers of Triton kernels: whether Triton runs here, and the current device of a launch.

Under TRITON_INTERPRET=1 kernels take CPU tensors, for tests.  Nothing here imports Triton.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch

__all__ = ["interpreted", "on_device", "unavailable"]

_UNCHANGED: AbstractContextManager[None] = nullcontext()


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why Triton cannot run here; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (GPU builds of torch bring it)"
    if interpreted() or torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return None
    return "no GPU that Triton supports; for tests, TRITON_INTERPRET=1 in the environment runs it on the CPU, slowly"


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A context in which `device` is current: Triton launches on the current device."""
    if device.type == "cuda" and device.index is not None and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return _UNCHANGED
