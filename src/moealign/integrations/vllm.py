"""The drop-in for vLLM 0.33 and the releases around it that keep the same calls.

The two functions of ``vllm.model_executor.layers.fused_moe.moe_align_block_size`` are replaced wherever they are
bound, and so are the in-place forms in ``vllm._custom_ops``.  What moealign refuses goes to vLLM's own function, and is
counted.
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
from . import vllm_ops
from .engines import call_counts, enabled, rebind
from .vllm_ops import require_kernels

__all__ = ["calls", "install", "installed", "plugin", "uninstall"]

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
    require_kernels(topk_ids)
    layout = align(
        topk_ids,
        block_size=block_size,
        num_experts=num_experts,
        expert_map=expert_map,
        pad_sorted_ids=pad_sorted_ids,
        ignore_invalid_experts=ignore_invalid_experts,
        scatter_idx=return_scatter_idx,
        out=vllm_ops.apart(topk_ids, block_size, num_experts, pad_sorted_ids, return_scatter_idx),
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


#: (module, name, ours): every function that is replaced.
_TARGETS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    (_LAYERS, "moe_align_block_size", _align),
    (_LAYERS, "batched_moe_align_block_size", _align_batched),
    (_OPS, "moe_align_block_size", vllm_ops.align),
    (_OPS, "batched_moe_align_block_size", vllm_ops.align_batched),
    (_OPS, "moe_lora_align_block_size", vllm_ops.align_lora),
    (_OPS, "fused_globalize_align_block_size", vllm_ops.globalize_align),
)

_installed: dict[tuple[str, str], tuple[Callable[..., Any], Callable[..., Any]]] = {}  # target: (vLLM's, in its place)


def _another_call(theirs: Callable[..., Any], ours: Callable[..., Any]) -> str | None:
    """How the call of this vLLM differs from the one we stand in for, None if it does not.

    An older vLLM may know fewer parameters at the end; ours have vLLM's defaults.
    """
    found, known = (list(inspect.signature(each).parameters) for each in (theirs, ours))
    return None if found == known[: len(found)] else f"it takes ({', '.join(found)}), not ({', '.join(known)})"


def _stand_in(name: str, theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    taken, left = ("vllm", name, "moealign"), ("vllm", name, "vllm")

    @functools.wraps(theirs)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        try:
            result = ours(*args, **kwargs)
        except MoealignError as refusal:
            if not call_counts[left]:
                logger.warning("moealign leaves a call of %s to vLLM (said once): %s", name, refusal)
            call_counts[left] += 1
            return theirs(*args, **kwargs)
        if not torch.compiler.is_compiling():
            call_counts[taken] += 1
        return result

    return stand_in


def install() -> list[str]:
    """Put moealign's functions in the place of vLLM's, wherever they are bound by now or will be imported later.

    Returns ``module.name`` of every binding that was replaced, none if moealign is installed already.

    Raises:
        ImportError: vLLM is not there.
    """
    places: list[str] = []
    for module_name, name, ours in _TARGETS:
        label = name if module_name == _LAYERS else f"_custom_ops.{name}"
        theirs = getattr(importlib.import_module(module_name), name, None)
        if (module_name, name) in _installed:
            # A binding made since by a module that was half imported the first time.
            places += rebind(*_installed[module_name, name])
        elif theirs is None:
            logger.info("moealign: this vLLM has no %s", label)
        elif difference := _another_call(theirs, ours):
            logger.warning("moealign: vLLM keeps its own %s: %s", label, difference)
        else:
            in_place = _stand_in(label, theirs, ours)
            _installed[module_name, name] = theirs, in_place
            places += rebind(theirs, in_place)
    if places:
        logger.info("moealign takes the place of %s", ", ".join(places))
    return places


def uninstall() -> list[str]:
    """Put vLLM's functions back wherever ours are bound; ``module.name`` of every binding, none if none was."""
    places: list[str] = []
    for theirs, in_place in _installed.values():
        places += rebind(in_place, theirs)
    _installed.clear()
    if places:
        logger.info("moealign gave back %s", ", ".join(places))
    return places


def installed() -> bool:
    """Whether moealign stands in for vLLM's functions in this process."""
    return bool(_installed)


def calls() -> dict[str, dict[str, int]]:
    """Calls in this process by function: how many moealign took, and how many it left to vLLM."""
    found: dict[str, dict[str, int]] = {}
    for (engine, name, who), count in sorted(call_counts.items()):
        if engine == "vllm":
            found.setdefault(name, {"moealign": 0, "vllm": 0})[who] = count
    return found


def plugin() -> None:
    """The entry point: vLLM calls it in every process.  Does nothing unless MOEALIGN_VLLM is 1."""
    if enabled("vllm"):
        install()
