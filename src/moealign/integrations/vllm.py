"""The drop-in for vLLM 0.33 and the releases around it that keep the same calls.

It replaces the two functions of ``vllm.model_executor.layers.fused_moe.moe_align_block_size`` and the in-place forms in
``vllm._custom_ops`` wherever they are bound.  Calls that moealign refuses go to vLLM's own functions and are counted.
:mod:`~moealign.integrations.vllm_layer` runs whole layers.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..alignment import align, batched_moe_align_block_size
from ..errors import MoealignError
from . import engines, vllm_layer, vllm_ops
from .engines import call_counts, rebind
from .vllm_ops import require_kernels

__all__ = ["calls", "install", "installed", "layers", "metrics", "plugin", "uninstall"]

_LAYERS = "vllm.model_executor.layers.fused_moe.moe_align_block_size"
_OPS = "vllm._custom_ops"

logger = logging.getLogger(__name__)


# Parameters are vLLM's, name for name: vLLM calls by keyword.


def _align(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    return_scatter_idx: bool = False,
) -> tuple[Tensor, ...]:
    if engines.recorder is not None and not torch.compiler.is_compiling():
        engines.recorder.add(topk_ids, num_experts, expert_map is not None)
    require_kernels(topk_ids)
    layout = align(
        topk_ids,
        block_size=block_size,
        num_experts=num_experts,
        expert_map=expert_map,
        pad_sorted_ids=pad_sorted_ids,
        ignore_invalid_experts=ignore_invalid_experts,
        scatter_idx=return_scatter_idx,
        out=vllm_ops.separate_outputs(topk_ids, block_size, num_experts, pad_sorted_ids, return_scatter_idx),
    )
    if return_scatter_idx:
        assert layout.scatter_idx is not None
        return *layout, layout.scatter_idx
    return tuple(layout)


def _align_batched(
    max_tokens_per_batch: int, block_size: int, expert_num_tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    require_kernels(expert_num_tokens)
    return batched_moe_align_block_size(max_tokens_per_batch, block_size, expert_num_tokens)


#: (module, name, ours) of every function that is replaced.
_TARGETS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    (_LAYERS, "moe_align_block_size", _align),
    (_LAYERS, "batched_moe_align_block_size", _align_batched),
    (_OPS, "moe_align_block_size", vllm_ops.align),
    (_OPS, "batched_moe_align_block_size", vllm_ops.align_batched),
    (_OPS, "moe_lora_align_block_size", vllm_ops.align_lora),
    (_OPS, "fused_globalize_align_block_size", vllm_ops.globalize_align),
)

_installed: dict[
    tuple[str, str], tuple[Callable[..., Any], Callable[..., Any]]
] = {}  # (module, name): (vLLM's, replacement)


def _signature_change(theirs: Callable[..., Any], ours: Callable[..., Any]) -> str | None:
    """How the parameters of this vLLM's function differ from ours, None if they do not.

    An older vLLM may lack the last parameters; ours have vLLM's defaults.
    """
    names, known = (list(inspect.signature(each).parameters) for each in (theirs, ours))
    return None if names == known[: len(names)] else f"it takes ({', '.join(names)}), not ({', '.join(known)})"


def _with_fallback(name: str, theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """`ours`, falling back to `theirs` for calls that ours refuses; counts both."""

    @functools.wraps(theirs)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        try:
            result = ours(*args, **kwargs)
        except MoealignError as refusal:
            engines.leave("vllm", name, str(refusal))
            return theirs(*args, **kwargs)
        if not torch.compiler.is_compiling():
            call_counts["vllm", name, "moealign"] += 1
        return result

    return replacement


def install(*, layers: bool = False) -> list[str]:
    """Replace vLLM's functions by moealign's, wherever they are bound now or will be imported later.

    Starts the recording of a trace if ``MOEALIGN_TRACE`` is set.

    Args:
        layers: run whole layers too, those that are built from now on (:func:`moealign.integrations.vllm.layers`
            counts them).  A release of vLLM whose layers are not known keeps them, with a warning.

    Returns ``module.name`` of everything that was replaced, ``[]`` if moealign is already installed.

    Raises:
        ImportError: vLLM is not installed.
        InvalidInput: a variable ``MOEALIGN_TRACE_*`` has an invalid value.
    """
    engines.start_trace("vllm")
    names: list[str] = []
    for module_name, name, ours in _TARGETS:
        label = name if module_name == _LAYERS else f"_custom_ops.{name}"
        theirs = getattr(importlib.import_module(module_name), name, None)
        if (module_name, name) in _installed:
            # For bindings made since, by a module that was still being imported the first time.
            names += rebind(*_installed[module_name, name])
        elif theirs is None:
            logger.info("moealign: this vLLM has no %s", label)
        elif difference := _signature_change(theirs, ours):
            logger.warning("moealign: vLLM keeps its own %s: %s", label, difference)
        else:
            replacement = _with_fallback(label, theirs, ours)
            _installed[module_name, name] = theirs, replacement
            names += rebind(theirs, replacement)
    if layers:
        names += vllm_layer.install()
    if names:
        logger.info("moealign replaces %s", ", ".join(names))
    return names


def uninstall() -> list[str]:
    """Restore vLLM's functions wherever ours are bound; returns ``module.name`` of everything restored.

    Layers that were built since :func:`install` compute with vLLM's kernels again.  A CUDA graph that was captured
    before keeps what it captured.
    """
    names = vllm_layer.uninstall()
    for theirs, replacement in _installed.values():
        names += rebind(replacement, theirs)
    _installed.clear()
    if names:
        logger.info("moealign restored %s", ", ".join(names))
    return names


def installed() -> bool:
    """Whether moealign replaces vLLM's functions in this process."""
    return bool(_installed)


def calls() -> dict[str, dict[str, int]]:
    """Calls in this process by function: how many moealign computed, and how many it left to vLLM."""
    by_function: dict[str, dict[str, int]] = {}
    for (engine, name, who), count in sorted(call_counts.items()):
        if engine == "vllm":
            by_function.setdefault(name, {"moealign": 0, "vllm": 0})[who] = count
    return by_function


def layers() -> dict[str, Any]:
    """Layers built in this process: how many moealign runs, and how many vLLM, by reason."""
    return engines.layers("vllm")


def metrics() -> str:
    """The counts of :func:`calls` and :func:`layers` in Prometheus's text format."""
    return engines.metrics("vllm")


def plugin() -> None:
    """The entry point, which vLLM calls in every process.  Does nothing unless MOEALIGN_VLLM is 1 or layer."""
    mode = engines.mode("vllm")
    if mode is not None:
        engines.follow_log("vllm")
        install(layers=mode == "layer")
