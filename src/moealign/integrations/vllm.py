"""moealign under vLLM 0.33: MOEALIGN_VLLM=1, or install() by hand; docs/integrations.md says what is covered.

vLLM calls :func:`plugin` in each of its processes, through the entry point in ``vllm.general_plugins``.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import threading
from typing import Any

from torch import Tensor

from ..align import align, align_batched, batched_moe_align_block_size, moe_align_block_size
from ..errors import InvalidInput
from ..layout import capacity, capacity_batched
from .patching import Patch, replacement

__all__ = ["install", "plugin", "status", "uninstall"]

SWITCH = "MOEALIGN_VLLM"
HOME = "vllm.model_executor.layers.fused_moe.moe_align_block_size"
OPS = "vllm._custom_ops"

_log = logging.getLogger("moealign")
_lock = threading.Lock()
_patch: Patch | None = None


def plugin() -> None:
    """What vLLM calls in every process: :func:`install` if MOEALIGN_VLLM=1, otherwise nothing."""
    if os.environ.get(SWITCH) == "1":
        install()


def install() -> None:
    """Replace vLLM's alignment functions, wherever they have been or will be imported.  Twice is once.

    Raises:
        ImportError: vLLM is not installed, or has no function of that name.
        RuntimeError: the functions of this vLLM take other arguments than those of 0.33; nothing was replaced.
    """
    global _patch
    with _lock:
        if _patch is not None:
            return
        home, ops = importlib.import_module(HOME), importlib.import_module(OPS)
        pairs: list[tuple[Any, Any]] = [
            (home.moe_align_block_size, moe_align_block_size),
            (home.batched_moe_align_block_size, batched_moe_align_block_size),
            (ops.moe_align_block_size, _in_place),
            (ops.batched_moe_align_block_size, _batched_in_place),
        ]
        for theirs, ours in pairs:
            _same_arguments(theirs, ours)
        patch = Patch("vllm")
        for theirs, ours in pairs:
            patch.replace(theirs, replacement(patch, ours, theirs))
        _patch = patch
        _log.info("moealign answers vLLM's alignment calls, in %s", ", ".join(sorted(patch.places)))


def uninstall() -> None:
    """Put vLLM's own functions back, everywhere."""
    global _patch
    with _lock:
        if _patch is not None:
            _patch.restore()
            _patch = None


def status() -> Patch | None:
    """What is replaced and how many calls were taken and passed on; None if nothing is."""
    return _patch


def _same_arguments(theirs: Any, ours: Any) -> None:
    """vLLM's own arguments must be ours too, in that order."""
    expected = list(inspect.signature(ours).parameters)
    found = list(inspect.signature(theirs).parameters)
    if expected[: len(found)] != found:
        raise RuntimeError(
            f"{theirs.__module__}.{theirs.__name__}: expected vLLM 0.33's arguments {expected[: len(found)]}, "
            f"got {found}; nothing was replaced"
        )


def _in_place(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    expert_map: Tensor | None = None,
    scatter_idx: Tensor | None = None,
) -> None:
    """``vllm._custom_ops.moe_align_block_size``: a map chooses bins here.  Longer buffers are filled to their end."""
    routes = topk_ids.numel()
    sizes: dict[str, Any] = {"block_size": block_size, "num_experts": num_experts}
    room = capacity(routes, **sizes)
    padded = sorted_token_ids.numel() >= capacity(routes, **sizes, pad_sorted_ids=True).sorted_token_ids
    if padded:
        room = capacity(routes, **sizes, pad_sorted_ids=True)
    if sorted_token_ids.numel() < room.sorted_token_ids or experts_ids.numel() < room.expert_ids:
        raise InvalidInput(
            f"sorted_token_ids, experts_ids: expected at least {room.sorted_token_ids} and {room.expert_ids} elements, "
            f"got {sorted_token_ids.numel()} and {experts_ids.numel()}"
        )
    out = {
        "sorted_token_ids": sorted_token_ids[: room.sorted_token_ids],
        "expert_ids": experts_ids[: room.expert_ids],
        "num_tokens_post_padded": num_tokens_post_pad,
    }
    if scatter_idx is not None:
        out["scatter_idx"] = scatter_idx.view(-1, 1)
    align(
        topk_ids,
        **sizes,
        expert_map=expert_map,
        ignore_invalid_experts=expert_map is not None,
        pad_sorted_ids=padded,
        scatter_idx=scatter_idx is not None,
        out=out,
    )
    if sorted_token_ids.numel() > room.sorted_token_ids:
        sorted_token_ids[room.sorted_token_ids :].fill_(routes)
    if experts_ids.numel() > room.expert_ids:
        experts_ids[room.expert_ids :].fill_(-1)


def _batched_in_place(
    max_tokens_per_batch: int,
    block_size: int,
    expert_num_tokens: Tensor,
    sorted_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_pad: Tensor,
) -> None:
    """``vllm._custom_ops.batched_moe_align_block_size``, into buffers of exactly the sizes its wrapper makes."""
    room = capacity_batched(max_tokens_per_batch, block_size=block_size, num_batches=expert_num_tokens.numel())
    if (sorted_ids.numel(), expert_ids.numel()) != (room.sorted_token_ids, room.expert_ids):
        raise InvalidInput(
            f"sorted_ids, expert_ids: expected {room.sorted_token_ids} and {room.expert_ids} elements, "
            f"got {sorted_ids.numel()} and {expert_ids.numel()}"
        )
    out = {"sorted_token_ids": sorted_ids, "expert_ids": expert_ids, "num_tokens_post_padded": num_tokens_post_pad}
    align_batched(expert_num_tokens, max_tokens_per_batch=max_tokens_per_batch, block_size=block_size, out=out)
