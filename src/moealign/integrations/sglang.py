"""The drop-in for SGLang, whose hook registry wraps its ``moe_align_block_size`` in our function.

SGLang's convention: a route to expert ``e`` goes to bin ``e + 1`` of ``E + 1``, an id of -1 to bin 0, which comes
first and whose blocks are marked -1; ``sorted_token_ids`` has a multiple of four elements.  Calls that moealign refuses
go to SGLang's own function and are counted.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..alignment import align
from ..errors import InvalidInput, MoealignError
from ..layout import capacity
from . import engines
from .engines import call_counts, enabled, rebind
from .vllm_ops import require_kernels, separate_outputs

__all__ = ["calls", "install", "installed", "plugin", "uninstall"]

#: Modules that define the function, newest release first.
_HOMES = (
    "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size",
    "sglang.srt.layers.moe.fused_moe_triton.moe_align_block_size",
)
_NAME = "moe_align_block_size"

logger = logging.getLogger(__name__)
_installed: list[str] = []  # the target, if any
_expert_maps: dict[tuple[int, torch.device, bool], Tensor] = {}


def _expert_map(num_experts: int, device: torch.device, ignore: bool) -> Tensor:
    """int32 ``[num_experts + 1]``: the expert of each bin, -1 for bin 0; if `ignore`, ids are bins without a shift."""
    key = (num_experts, device, ignore)
    experts = _expert_maps.get(key)
    if experts is None:
        experts = torch.arange(-1, num_experts, dtype=torch.int32, device=device)
        experts = experts.roll(-1) if ignore else experts
        # A tensor made during capture belongs to the CUDA graph and has no values before the first replay.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _expert_maps[key] = experts
    return experts


def _align(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    ignore_invalid_expert: bool = False,
    *,
    return_inactive_prefix_count: bool = False,
    pad_expert_ids: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """SGLang 0.5.23's function, argument for argument; `ignore_invalid_expert` drops ids of -1."""
    if engines.recorder is not None and not torch.compiler.is_compiling():
        engines.recorder.add(topk_ids, num_experts, False)
    if return_inactive_prefix_count or pad_expert_ids:
        option = "return_inactive_prefix_count" if return_inactive_prefix_count else "pad_expert_ids"
        raise InvalidInput(f"{option}: expected False, got True; SGLang's own kernel does that")
    if type(block_size) is not int or block_size < 1 or block_size % 4:
        raise InvalidInput(f"block_size: expected a multiple of 4, got {block_size}")
    if type(num_experts) is not int or num_experts < 1:
        raise InvalidInput(f"num_experts: expected an int of at least 1, got {num_experts}")
    require_kernels(topk_ids)
    bins = num_experts + 1
    rows = capacity(topk_ids.numel(), block_size=block_size, num_experts=bins).sorted_token_ids
    sorted_ids, expert_ids, total = align(
        topk_ids if ignore_invalid_expert else topk_ids + 1,
        block_size=block_size,
        num_experts=bins,
        expert_map=_expert_map(num_experts, topk_ids.device, bool(ignore_invalid_expert)),
        pad_sorted_ids=True,  # a multiple of the block size is at least SGLang's length
        ignore_invalid_experts=bool(ignore_invalid_expert),
        out=separate_outputs(topk_ids, block_size, bins, True, False),
    )
    return sorted_ids[: -(-rows // 4) * 4], expert_ids, total


def _binds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call fits our parameters; another release may have more."""
    try:
        inspect.signature(_align).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _around(theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The hook: our function, falling back to `theirs` for calls that ours refuses; counts both."""
    try:
        result = _align(*args, **kwargs)
    except (MoealignError, TypeError) as refusal:
        if not isinstance(refusal, MoealignError) and _binds(args, kwargs):
            raise
        if not call_counts["sglang", _NAME, "sglang"]:
            logger.warning("moealign leaves a call of %s to SGLang (logged once): %s", _NAME, refusal)
        call_counts["sglang", _NAME, "sglang"] += 1
        return theirs(*args, **kwargs)
    call_counts["sglang", _NAME, "moealign"] += 1
    return result


def _registry() -> Any:
    return importlib.import_module("sglang.srt.plugins.hook_registry")


def _home() -> str:
    for home in _HOMES:
        try:
            if home in sys.modules or importlib.util.find_spec(home) is not None:
                return home
        except ModuleNotFoundError:
            continue
    raise ImportError(f"moealign: this SGLang has none of {', '.join(_HOMES)}")


def install(*, apply: bool = True) -> list[str]:
    """Register our function with SGLang's hook registry and, by default, apply the hooks; returns the target.

    SGLang itself applies hooks after it has called its plug-ins, and rebinds every name that was imported before.
    Starts the recording of a trace if ``MOEALIGN_TRACE`` is set.  Returns ``[]`` if moealign is already installed.

    Raises:
        ImportError: SGLang is not installed, or defines its function elsewhere.
        InvalidInput: a variable ``MOEALIGN_TRACE_*`` has an invalid value.
    """
    if _installed:
        return []
    engines.start_trace("sglang")
    registry = _registry()
    target = f"{_home()}.{_NAME}"
    registry.HookRegistry.register(target, _around, registry.HookType.AROUND)
    _installed.append(target)
    if apply:
        registry.HookRegistry.apply_hooks()
    logger.info("moealign replaces %s", target)
    return [target]


def uninstall() -> list[str]:
    """Remove our hook, but no others, and restore SGLang's function wherever it was bound; returns the target."""
    if not _installed:
        return []
    registry = _registry().HookRegistry
    target = _installed.pop()
    registry._hooks[target] = [entry for entry in registry._hooks[target] if entry[1] is not _around]
    if target in registry._patched:
        registry._patched.discard(target)
        hooked = getattr(sys.modules[target.rpartition(".")[0]], _NAME)
        theirs = hooked
        while hasattr(theirs, "__wrapped__"):
            theirs = theirs.__wrapped__
        rebind(hooked, theirs)
    if registry._hooks[target]:
        registry.apply_hooks()
    else:
        del registry._hooks[target]
    logger.info("moealign restored %s", target)
    return [target]


def installed() -> bool:
    """Whether our hook is registered in this process."""
    return bool(_installed)


def calls() -> dict[str, dict[str, int]]:
    """Calls in this process: how many moealign computed, and how many it left to SGLang."""
    return {_NAME: {who: call_counts["sglang", _NAME, who] for who in ("moealign", "sglang")}}


def plugin() -> None:
    """The entry point, which SGLang calls in every process.  Does nothing unless MOEALIGN_SGLANG is 1."""
    if enabled("sglang"):
        install(apply=False)
