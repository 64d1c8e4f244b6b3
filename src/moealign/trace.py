"""Routing traces: the choices of a real router, in a file.

A trace is a ``.safetensors`` file with one tensor, ``topk_ids`` ``[layers, tokens, top_k]`` in the smallest integer
dtype that fits, and one metadata entry, ``moealign``, which holds a JSON object.  ``-1`` is a route without an expert;
the dtype is then signed.  The keys of the object:

``experts``                  number of experts of a layer, at most 65,536; required
``k``                        routes of a token, the last size of ``topk_ids``; required
``model``                    whose routers chose; required
``source``                   what the model read; required
``revision``                 the version of both; required
``calls``                    tokens of each call of the model, in order: the batches; optional
``hidden``, ``intermediate``  columns of the hidden states and of ``down_proj``: the sizes of one expert; optional
``device``                   where the model ran, as in "NVIDIA H200"; optional

Any further keys are kept as details.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import TraceError, how_to_install

__all__ = ["Trace", "example_trace", "load_trace", "save_trace"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_REQUIRED: dict[str, type] = {"experts": int, "k": int, "model": str, "source": str, "revision": str}
_OPTIONAL: dict[str, type] = {"hidden": int, "intermediate": int, "device": str}
MAX_EXPERTS = 2**16  #: tables of loads have a column for each expert, used or not
_MAX_WIDTH = 2**24  # of an expert


@dataclass(frozen=True)
class Trace:
    """The choices of one model's routers for one text."""

    topk_ids: Tensor  #: [layers, tokens, top_k], an integer dtype
    num_experts: int
    model: str  #: whose routers chose
    source: str  #: the text it read
    revision: str  #: the version of both
    details: Mapping[str, Any] = field(default_factory=dict)  #: the rest of the metadata, JSON values

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
        """The number of tokens in each call of the model, in order; () if the trace does not say."""
        return tuple(self.details.get("calls", ()))

    @property
    def hidden(self) -> int | None:
        """Columns of the hidden states; None if the trace does not say."""
        return self.details.get("hidden")

    @property
    def intermediate(self) -> int | None:
        """Columns of an expert's ``down_proj``; None if the trace does not say."""
        return self.details.get("intermediate")

    @property
    def device(self) -> str:
        """Where the model ran; "" if the trace does not say."""
        return str(self.details.get("device", ""))


def example_trace() -> Path:
    """The shipped trace, made by ``examples/make_trace.py``; its metadata names model and text."""
    return Path(__file__).parent / "data" / "stdlib-moe.safetensors"


def save_trace(path: str | Path, trace: Trace) -> None:
    """Write `trace`, with its ids in the smallest dtype that fits.

    Raises:
        TraceError: the trace is invalid (see :func:`load_trace`), the path cannot be written, or safetensors is not
            installed.
    """
    safetensors, save_file = _safetensors(), _safetensors("torch").save_file
    topk_ids = trace.topk_ids
    if not isinstance(topk_ids, Tensor):
        raise TraceError(f"{path}: expected topk_ids to be a tensor, got {type(topk_ids).__name__}")
    metadata = {
        "experts": trace.num_experts,
        "k": topk_ids.shape[-1] if topk_ids.dim() else 0,
        "model": trace.model,
        "source": trace.source,
        "revision": trace.revision,
    }
    _check_shape(path, topk_ids)
    _check_metadata(path, metadata)
    _check_ids(path, topk_ids, trace.num_experts)
    metadata |= _checked_details(path, trace.details, trace.tokens)
    signed = bool((topk_ids < 0).any())
    fitting = [torch.int8, torch.int16, torch.int32] if signed else [torch.uint8, torch.int16, torch.int32]
    dtype = next(dtype for dtype in fitting if trace.num_experts - 1 <= torch.iinfo(dtype).max)
    ids = topk_ids.to(dtype).contiguous()
    try:
        save_file({"topk_ids": ids}, str(path), metadata={"moealign": json.dumps(metadata)})
    except (OSError, safetensors.SafetensorError) as error:
        raise TraceError(f"{path}: expected a path that can be written, got {error}") from None


def load_trace(path: str | Path) -> Trace:
    """Read a trace and check everything in it.

    Raises:
        TraceError: the file is missing, damaged or not a trace; one line says what was expected and what it holds.
    """
    safetensors = _safetensors()
    if Path(path).is_dir():
        raise TraceError(f"{path}: expected a .safetensors file, got a folder")
    if not Path(path).is_file():
        what = "something else" if Path(path).exists() else "no such file"
        raise TraceError(f"{path}: expected a .safetensors file, got {what}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            names, entries = list(file.keys()), file.metadata() or {}
            if "topk_ids" not in names:
                raise TraceError(f"{path}: expected a tensor named topk_ids, got {', '.join(names) or 'none'}")
            topk_ids = file.get_tensor("topk_ids")
    except safetensors.SafetensorError as error:
        raise TraceError(f"{path}: expected a .safetensors file, got something else ({error})") from None
    metadata = _metadata(path, entries)
    _check_shape(path, topk_ids)
    if topk_ids.shape[2] != metadata["k"]:
        raise TraceError(
            f"{path}: expected k = {metadata['k']} ids per token as its metadata says, got {topk_ids.shape[2]}"
        )
    _check_ids(path, topk_ids, metadata["experts"])
    details = {name: value for name, value in metadata.items() if name not in _REQUIRED}
    _checked_details(path, details, topk_ids.shape[1])
    return Trace(topk_ids, metadata["experts"], metadata["model"], metadata["source"], metadata["revision"], details)


def _metadata(path: str | Path, entries: Mapping[str, str]) -> dict[str, Any]:
    if "moealign" not in entries:
        raise TraceError(f"{path}: expected JSON metadata under the name moealign, got {', '.join(entries) or 'none'}")
    try:
        metadata = json.loads(entries["moealign"])
    except (json.JSONDecodeError, RecursionError) as error:  # RecursionError: nested too deeply
        raise TraceError(f"{path}: expected JSON metadata, got text that is not JSON ({error})") from None
    if not isinstance(metadata, dict):
        raise TraceError(f"{path}: expected a JSON object as metadata, got {type(metadata).__name__}")
    _check_metadata(path, metadata)
    return metadata


def _check_metadata(path: str | Path, metadata: Mapping[str, Any]) -> None:
    for name, kind in _REQUIRED.items():
        if name not in metadata:
            raise TraceError(f"{path}: expected {name} in its metadata, got {', '.join(metadata) or 'nothing'}")
        if not isinstance(metadata[name], kind) or isinstance(metadata[name], bool):
            raise TraceError(
                f"{path}: expected {name} to be of type {kind.__name__} in its metadata, got {metadata[name]!r}"
            )
    if metadata["experts"] > MAX_EXPERTS:
        raise TraceError(
            f"{path}: expected at most {MAX_EXPERTS:,} experts in its metadata, got {metadata['experts']:,}"
        )
    if metadata["experts"] < 1 or metadata["k"] < 1:
        raise TraceError(f"{path}: expected experts and k of at least 1, got {metadata['experts']} and {metadata['k']}")


def _checked_details(path: str | Path, details: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """`details` as a dict; refuses what JSON cannot hold, reserved names, and invalid values of known keys."""
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
    for name, kind in _OPTIONAL.items():
        value = details.get(name, "" if kind is str else 1)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TraceError(f"{path}: expected {name} to be of type {kind.__name__} in its metadata, got {value!r}")
        if isinstance(value, int) and not 1 <= value <= _MAX_WIDTH:
            raise TraceError(f"{path}: expected {name} between 1 and {_MAX_WIDTH:,} in its metadata, got {value:,}")
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
        raise TraceError(
            f"{path}: expected topk_ids of an integer dtype (uint8, int8, int16, int32, int64), got {topk_ids.dtype}"
        )
    low, high = int(topk_ids.min()), int(topk_ids.max())
    if low < -1 or high >= num_experts:
        raise TraceError(f"{path}: expected ids in [-1, {num_experts}), got {low} to {high}")


def _safetensors(module: str = "") -> Any:
    import importlib

    try:
        return importlib.import_module(f"safetensors.{module}" if module else "safetensors")
    except ImportError:
        raise TraceError(f"safetensors is not installed: {how_to_install('report')}") from None
