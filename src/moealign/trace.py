"""Routing traces: what a real router chose, in a file.

A trace is a ``.safetensors`` file with one tensor, ``topk_ids`` ``[layers, tokens, top_k]`` in the smallest integer
dtype that fits, and one metadata entry, ``moealign``, holding JSON: ``experts``, ``k``, ``model``, ``source``,
``revision``, perhaps ``calls``, the number of tokens of each call of the model, and whatever else its maker wants to
say.  ``-1`` is a route without an expert (then the dtype is signed).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import TraceError

__all__ = ["Trace", "example_trace", "load_trace", "save_trace"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_REQUIRED: dict[str, type] = {"experts": int, "k": int, "model": str, "source": str, "revision": str}


@dataclass(frozen=True)
class Trace:
    """The choices of one model's routers over one text."""

    topk_ids: Tensor  #: [layers, tokens, top_k], an integer dtype
    num_experts: int
    model: str  #: what routed
    source: str  #: what it read
    revision: str  #: which version of both
    details: Mapping[str, Any] = field(default_factory=dict)  #: the rest of the metadata, as JSON has it

    @property
    def layers(self) -> int:
        return self.topk_ids.shape[0]

    @property
    def tokens(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[2]

    @property
    def calls(self) -> tuple[int, ...]:
        """How many tokens came in each call of the model, in order; () where the trace does not say."""
        return tuple(self.details.get("calls", ()))


def example_trace() -> Path:
    """The trace that ships; ``examples/make_trace.py`` made it and its metadata says from what."""
    return Path(__file__).parent / "data" / "stdlib-moe.safetensors"


def save_trace(path: str | Path, trace: Trace) -> None:
    """Write `trace`, its ids in the smallest dtype that fits.

    Raises:
        TraceError: the trace is not one (see :func:`load_trace`), or safetensors is not installed.
    """
    save_file = _safetensors("torch").save_file
    topk_ids = trace.topk_ids
    if not isinstance(topk_ids, Tensor):
        raise TraceError(f"{path}: expected topk_ids to be a tensor, got {type(topk_ids).__name__}")
    about = {
        "experts": trace.num_experts,
        "k": topk_ids.shape[-1] if topk_ids.dim() else 0,
        "model": trace.model,
        "source": trace.source,
        "revision": trace.revision,
    }
    _check_shape(path, topk_ids)
    _check_about(path, about)
    _check_ids(path, topk_ids, trace.num_experts)
    about |= _checked_details(path, trace.details, trace.tokens)
    signed = bool((topk_ids < 0).any())
    fitting = [torch.int8, torch.int16, torch.int32] if signed else [torch.uint8, torch.int16, torch.int32]
    dtype = next(dtype for dtype in fitting if trace.num_experts - 1 <= torch.iinfo(dtype).max)
    ids = topk_ids.to(dtype).contiguous()
    save_file({"topk_ids": ids}, str(path), metadata={"moealign": json.dumps(about)})


def load_trace(path: str | Path) -> Trace:
    """Read a trace and check all of it.

    Raises:
        TraceError: in one line, what the file should have held and what it holds.
    """
    safetensors = _safetensors()
    if not Path(path).is_file():
        raise TraceError(f"{path}: expected a .safetensors file, got no such file")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            if "topk_ids" not in names:
                raise TraceError(f"{path}: expected a tensor named topk_ids, got {', '.join(names) or 'none'}")
            topk_ids = file.get_tensor("topk_ids")
    except safetensors.SafetensorError as error:
        raise TraceError(f"{path}: expected a .safetensors file, got something else ({error})") from None
    about = _metadata(path, metadata)
    _check_shape(path, topk_ids)
    if topk_ids.shape[2] != about["k"]:
        raise TraceError(f"{path}: expected k = {about['k']} ids a token as its metadata says, got {topk_ids.shape[2]}")
    _check_ids(path, topk_ids, about["experts"])
    details = {name: value for name, value in about.items() if name not in _REQUIRED}
    _checked_details(path, details, topk_ids.shape[1])
    return Trace(topk_ids, about["experts"], about["model"], about["source"], about["revision"], details)


def _metadata(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "moealign" not in metadata:
        raise TraceError(f"{path}: expected JSON metadata under the name moealign, got {', '.join(metadata) or 'none'}")
    try:
        about = json.loads(metadata["moealign"])
    except json.JSONDecodeError as error:
        raise TraceError(f"{path}: expected JSON metadata, got text that is not JSON ({error})") from None
    if not isinstance(about, dict):
        raise TraceError(f"{path}: expected a JSON object as metadata, got {type(about).__name__}")
    _check_about(path, about)
    return about


def _check_about(path: str | Path, about: Mapping[str, Any]) -> None:
    for name, kind in _REQUIRED.items():
        if name not in about:
            raise TraceError(f"{path}: expected {name} in its metadata, got {', '.join(about) or 'nothing'}")
        if not isinstance(about[name], kind) or isinstance(about[name], bool):
            raise TraceError(
                f"{path}: expected {name} to be of type {kind.__name__} in its metadata, got {about[name]!r}"
            )
    if about["experts"] < 1 or about["k"] < 1:
        raise TraceError(f"{path}: expected experts and k of at least 1, got {about['experts']} and {about['k']}")


def _checked_details(path: str | Path, details: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The details as JSON has them, or a refusal."""
    if not isinstance(details, Mapping):
        raise TraceError(f"{path}: expected details to be a mapping of names to values, got {type(details).__name__}")
    for name in details:
        if not isinstance(name, str):
            raise TraceError(f"{path}: expected names of details to be strings, got {name!r}")
        if name in _REQUIRED:
            raise TraceError(f"{path}: expected other details than {', '.join(_REQUIRED)}, got {name}; set the field")
    for name, value in details.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise TraceError(
                f"{path}: expected details that JSON can hold, got {name} = {type(value).__name__} ({error})"
            ) from None
    calls = details.get("calls")
    if "calls" in details:
        whole = isinstance(calls, (list, tuple)) and all(type(each) is int and each > 0 for each in calls)
        if not whole or sum(calls) != tokens:  # type: ignore[arg-type]
            raise TraceError(
                f"{path}: expected calls to be the tokens of each call, at least 1 and {tokens} in all, got {calls!r}"
            )
    return dict(details)


def _check_shape(path: str | Path, topk_ids: Tensor) -> None:
    if topk_ids.dim() != 3:
        raise TraceError(f"{path}: expected topk_ids of shape [layers, tokens, k], got {list(topk_ids.shape)}")
    if topk_ids.numel() == 0:
        raise TraceError(f"{path}: expected at least one layer, token and choice, got {list(topk_ids.shape)}")


def _check_ids(path: str | Path, topk_ids: Tensor, num_experts: int) -> None:
    if topk_ids.dtype not in _INTEGERS:
        raise TraceError(f"{path}: expected topk_ids of an integer dtype, got {topk_ids.dtype}")
    low, high = int(topk_ids.min()), int(topk_ids.max())
    if low < -1 or high >= num_experts:
        raise TraceError(f"{path}: expected ids in [-1, {num_experts}), got {low} to {high}")


def _safetensors(module: str = "") -> Any:
    import importlib

    try:
        return importlib.import_module(f"safetensors.{module}" if module else "safetensors")
    except ImportError:
        raise TraceError("safetensors is not installed; pip install 'moealign[report]' brings it") from None
