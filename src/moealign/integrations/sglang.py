"""moealign under SGLang 0.5: MOEALIGN_SGLANG=1, or install() by hand; docs/integrations.md says what is covered.

SGLang calls :func:`plugin` in each of its processes, through the entry point in ``sglang.srt.plugins``, and applies the
hooks that were registered.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
from typing import Any

import torch
from torch import Tensor

from ..align import align
from ..errors import InvalidInput
from .patching import Patch, Replacement

__all__ = ["install", "plugin", "status", "uninstall"]

SWITCH = "MOEALIGN_SGLANG"
#: Where the function lives, by release; the first that can be imported counts.
HOMES = (
    "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size",
    "sglang.srt.layers.moe.fused_moe_triton.moe_align_block_size",
)
NAME = "moe_align_block_size"

_log = logging.getLogger("moealign")
_lock = threading.Lock()
_patch: Patch | None = None


def plugin() -> None:
    """What SGLang calls in every process: registers a hook if MOEALIGN_SGLANG=1, otherwise does nothing."""
    if os.environ.get(SWITCH) != "1":
        return
    global _patch
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    with _lock:
        if _patch is not None:
            return
        _patch = patch = Patch("sglang")

    def around(theirs: Any, *args: Any, **kwargs: Any) -> Any:
        return Replacement(patch, NAME, _align_for_sglang, theirs)(*args, **kwargs)

    target = f"{_home().__name__}.{NAME}"
    registry.HookRegistry.register(target, around, registry.HookType.AROUND)
    patch.places.append(target)
    _log.info("moealign answers SGLang's alignment calls, by a hook around %s", target)


def install() -> None:
    """Replace SGLang's function at once, wherever it has been or will be imported.  Twice is once.

    Raises:
        ImportError: SGLang is not installed, or has no module that is known here.
    """
    global _patch
    with _lock:
        if _patch is not None:
            return
        theirs = getattr(_home(), NAME)
        patch = Patch("sglang")

        @functools.wraps(theirs)
        def ours(*args: Any, **kwargs: Any) -> Any:
            return Replacement(patch, NAME, _align_for_sglang, theirs)(*args, **kwargs)

        patch.replace(theirs, ours)
        _patch = patch
        _log.info("moealign answers SGLang's alignment calls, in %s", ", ".join(sorted(patch.places)))


def uninstall() -> None:
    """Put SGLang's own function back, where :func:`install` replaced it.  A hook of :func:`plugin` stays applied."""
    global _patch
    with _lock:
        if _patch is not None and _patch.pairs:
            _patch.restore()
            _patch = None


def status() -> Patch | None:
    """What is replaced and how many calls were taken and passed on; None if nothing is."""
    return _patch


def _home() -> Any:
    for name in HOMES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as missing:
            if missing.name is None or not name.startswith(missing.name):
                raise
    raise ImportError(f"SGLang: expected one of the modules {', '.join(HOMES)}; is this release supported?")


_all_names: dict[tuple[int, torch.device], Tensor] = {}


def _names(num_experts: int, device: torch.device) -> Tensor:
    """Expert of each of SGLang's ``num_experts + 1`` bins: the first is that of -1."""
    names = _all_names.get((num_experts, device))
    if names is None:
        names = torch.arange(-1, num_experts, dtype=torch.int32, device=device)
        # What a capture makes holds no values until the graph is replayed, and its memory is the graph's: not kept.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _all_names[num_experts, device] = names
    return names


def _align_for_sglang(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    ignore_invalid_expert: bool = False,
    *,
    return_inactive_prefix_count: bool = False,
    pad_expert_ids: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """SGLang's own conventions: ``num_experts + 1`` bins, that of id ``-1`` first, with expert ``-1``.

    With `ignore_invalid_expert` routes of id -1 stand in no block.  ``sorted_token_ids`` is as long as SGLang makes it:
    the bound for one more expert, rounded up to a multiple of four.
    """
    if return_inactive_prefix_count or pad_expert_ids:
        raise InvalidInput("return_inactive_prefix_count, pad_expert_ids: expected False, got True")
    if type(block_size) is not int or block_size % 4:
        raise InvalidInput(f"block_size: expected a multiple of 4, as SGLang rounds its buffers, got {block_size}")
    common: dict[str, Any] = {"block_size": block_size, "num_experts": num_experts + 1, "pad_sorted_ids": True}
    if ignore_invalid_expert:
        layout = align(topk_ids, **common)
    else:
        layout = align(topk_ids + 1, **common, expert_map=_names(num_experts, topk_ids.device))
    routes = topk_ids.numel()
    length = routes * block_size if routes < num_experts + 1 else routes + (num_experts + 1) * (block_size - 1)
    rows = layout.sorted_token_ids[: -(-length // 4) * 4]
    return rows, layout.expert_ids, layout.num_tokens_post_padded
