"""Traces from what serving engines record themselves: vLLM's routed experts and SGLang's expert distribution."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import TraceError
from .trace import Trace

__all__ = ["from_sglang", "from_vllm"]


def from_vllm(outputs: Any, *, num_experts: int, model: str = "", source: str = "", revision: str = "") -> Trace:
    """A trace from the routed experts that vLLM returns with ``enable_return_routed_experts=True``.

    ``Trace.details["requests"]`` is the number of tokens of each array, in order.  vLLM reports requests and not
    batches, so ``Trace.calls`` is ``()``.  Layers whose ids are all equal (dense layers) are omitted;
    ``details["layers"]`` names the others.

    Args:
        outputs: one or several of these: a ``RequestOutput`` of ``LLM.generate``; the JSON of an HTTP response, as a
            dict; an array ``[tokens, layers, top_k]``.
        num_experts: experts of one layer, which vLLM does not return.
        model, source, revision: as in :class:`~moealign.trace.Trace`.

    Raises:
        TraceError: no routed experts, or arrays of other or different shapes.
    """
    several = isinstance(outputs, Iterable) and not isinstance(outputs, (Tensor, np.ndarray, Mapping, str))
    arrays = [array for output in (outputs if several else [outputs]) for array in _routed_experts(output)]
    if not arrays:
        raise TraceError(
            "expected routed experts in vLLM's outputs, got none; start vLLM with enable_return_routed_experts=True, "
            "or vllm serve with --enable-return-routed-experts"
        )
    for array in arrays:
        if array.dim() != 3 or array.dtype.is_floating_point or array.shape[1:] != arrays[0].shape[1:]:
            raise TraceError(
                f"expected integer arrays [tokens, layers, top_k] of the same layers and top_k, got {array.dtype} "
                f"{list(array.shape)} beside {list(arrays[0].shape)}"
            )
    ids = torch.cat(arrays).permute(1, 0, 2)
    if ids.shape[2] > 1:
        kept = [i for i, layer in enumerate(ids) if bool((layer != layer[:1, :1]).any())]
    else:
        kept = list(range(len(ids)))
    details = {
        "engine": "vllm",
        "layers": [f"layer {i}" for i in kept],
        "requests": [len(array) for array in arrays if len(array)],
    }
    return _trace(ids[kept].clamp(min=-1), num_experts, model, source, revision, details)


def _routed_experts(output: Any) -> list[Tensor]:
    """The arrays of one request: first the prompt's, if vLLM separates it, then one per completion."""
    if isinstance(output, (Tensor, np.ndarray, str)):
        return [_decoded(output)]
    completions = _field(output, "choices") or _field(output, "outputs") or []
    values = [_field(output, "prompt_routed_experts"), *(_field(each, "routed_experts") for each in completions)]
    return [_decoded(value) for value in values if value is not None]


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _decoded(value: Any) -> Tensor:
    """A tensor from an array, nested lists, or a NumPy file in base64, as vLLM's HTTP server encodes it."""
    try:
        if isinstance(value, str):
            value = np.load(io.BytesIO(base64.b64decode(value, validate=True)), allow_pickle=False)
        return torch.as_tensor(value).cpu().to(torch.int64, copy=True) if _integral(value) else torch.as_tensor(value)
    except (binascii.Error, EOFError, ValueError, TypeError, RuntimeError) as error:
        raise TraceError(f"expected an array of routed experts, got {type(value).__name__} ({error})") from None


def _integral(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.dtype.is_floating_point
    return bool(np.issubdtype(np.asarray(value).dtype, np.integer))


def from_sglang(
    recording: Any, *, num_experts: int | None = None, model: str = "", source: str = "", revision: str = ""
) -> Trace:
    """A trace from a file of SGLang's expert distribution recorder in the mode ``per_token``.

    ``Trace.calls`` are SGLang's forward passes.  Physical experts are mapped back to logical ones by the map in the
    file, which is the last one: do not rebalance experts while recording.  Layers without a router and unused columns
    are omitted; ``details["layers"]`` names the others.  SGLang writes one file per rank; ranks of tensor parallelism
    hold the same tokens.

    Args:
        recording: path of ``expert_distribution_recorder_*.pt``, or what ``torch.load`` returns for it.
        num_experts: experts of one layer; by default, from the file.
        model, source, revision: as in :class:`~moealign.trace.Trace`.

    Raises:
        TraceError: not such a file, another mode, or ids beyond the experts (disable the fusion of shared experts).
    """
    where = "recording"
    if isinstance(recording, (str, Path)):
        where = str(recording)
        try:
            recording = torch.load(recording, map_location="cpu", weights_only=True)
        except OSError as error:
            raise TraceError(f"{where}: expected a file of SGLang's recorder, got {error.strerror or error}") from None
        except Exception as error:  # torch documents no set of errors, and its messages advise to trust the file
            raise TraceError(f"{where}: expected a file of SGLang's recorder, got something else") from error
    records = recording.get("records") if isinstance(recording, Mapping) else None
    passes = [each.get("topk_ids_of_layer") for each in records or []]
    if not passes or not all(isinstance(each, Tensor) and each.dim() == 3 for each in passes):
        raise TraceError(
            f"{where}: expected records with topk_ids_of_layer [layers, tokens, top_k], got none; start SGLang with "
            "--expert-distribution-recorder-mode per_token"
        )
    passes = [each for each in passes if each.shape[1]]
    if not passes:
        raise TraceError(f"{where}: expected at least one token, got {len(records or [])} forward passes without any")
    ids = torch.cat(passes, 1).to(torch.int64)
    kept = [i for i, layer in enumerate(ids) if bool((layer >= 0).any())]
    columns = int((ids >= 0).flatten(0, 1).any(0).sum())
    ids = ids[kept][:, :, :columns]
    if ids.numel() == 0:
        raise TraceError(f"{where}: expected at least one route to an expert, got -1 only")
    physical = recording.get("last_physical_to_logical_map")
    if isinstance(physical, Tensor):
        physical = physical.to(torch.int64)
        if int(ids.max()) >= physical.shape[1]:
            raise TraceError(
                f"{where}: expected ids below {physical.shape[1]}, the number of physical experts, got "
                f"{int(ids.max())}; record with --disable-shared-experts-fusion"
            )
        num_experts = num_experts or int(physical.max()) + 1
        logical = physical[kept].gather(1, ids.clamp(min=0).flatten(1)).view_as(ids)
        ids = torch.where(ids >= 0, logical, -1)
    if num_experts is None:
        raise TraceError(f"{where}: expected a map of physical experts in the file, got none; pass num_experts")
    details = {"engine": "sglang", "layers": [f"layer {i}" for i in kept], "calls": [each.shape[1] for each in passes]}
    return _trace(ids, num_experts, model, source, revision, details)


def _trace(ids: Tensor, num_experts: int, model: str, source: str, revision: str, details: dict[str, Any]) -> Trace:
    if ids.numel() == 0:
        raise TraceError(f"expected at least one layer, token and choice, got {list(ids.shape)}")
    if int(ids.max()) >= num_experts:
        raise TraceError(f"expected ids below num_experts = {num_experts}, got {int(ids.max())}")
    return Trace(ids.contiguous(), num_experts, model, source, revision, details)
