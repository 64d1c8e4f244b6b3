"""The drop-in for SGLang, whose hook registry wraps its functions in ours.

SGLang's convention: a route to expert ``e`` goes to bin ``e + 1`` of ``E + 1``, an id of -1 to bin 0, which comes
first and whose blocks are marked -1; ``sorted_token_ids`` has a multiple of four elements.  Calls that moealign refuses
go to SGLang's own function and are counted.  :mod:`~moealign.integrations.sglang_layer` runs whole layers.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..alignment import align
from ..errors import InvalidInput, InvalidType, MoealignError
from ..layout import capacity
from . import engines, sglang_layer
from .engines import call_counts, rebind
from .vllm_ops import require_kernels, separate_outputs, uses_triton

__all__ = ["calls", "install", "installed", "layers", "metrics", "plugin", "uninstall"]

#: Modules that define the function, newest release first.
_HOMES = (
    "sglang.srt.layers.moe.moe_runner.triton_utils.moe_align_block_size",
    "sglang.srt.layers.moe.fused_moe_triton.moe_align_block_size",
)
_NAME = "moe_align_block_size"
#: The function for one token, which the Marlin layer calls past the first from 0.5.23 on.
_SINGLE_HOME = "sglang.kernels.ops.moe.moe_align_single_token"
_SINGLE = "moe_align_single_token"

logger = logging.getLogger(__name__)
_installed: dict[str, Callable[..., Any]] = {}  # our hook by target
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
    if pad_expert_ids:
        raise InvalidInput("pad_expert_ids: expected False, got True; SGLang's own kernel does that")
    if return_inactive_prefix_count and ignore_invalid_expert:
        raise InvalidInput("ignore_invalid_expert: expected False with return_inactive_prefix_count, got True")
    if type(block_size) is not int or block_size < 1 or block_size % 4:
        raise InvalidInput(f"block_size: expected a multiple of 4, got {block_size}")
    if type(num_experts) is not int or num_experts < 1:
        raise InvalidInput(f"num_experts: expected an int of at least 1, got {num_experts}")
    require_kernels(topk_ids)
    bins = num_experts + 1
    rows = capacity(topk_ids.numel(), block_size=block_size, num_experts=bins).sorted_token_ids
    out: Any = separate_outputs(topk_ids, block_size, bins, True, False)
    totals = None
    if return_inactive_prefix_count and out is not None:
        totals, offsets = out.expert_ids.new_empty(2), out.expert_ids.new_empty(bins + 1)
        names = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", "expert_offsets")
        out = dict(zip(names, (out.sorted_token_ids, out.expert_ids, totals[:1], offsets), strict=True))
    layout = align(
        topk_ids if ignore_invalid_expert else topk_ids + 1,
        block_size=block_size,
        num_experts=bins,
        expert_map=_expert_map(num_experts, topk_ids.device, bool(ignore_invalid_expert)),
        pad_sorted_ids=True,  # a multiple of the block size is at least SGLang's length
        ignore_invalid_experts=bool(ignore_invalid_expert),
        expert_offsets=return_inactive_prefix_count,
        out=out,
    )
    sorted_ids, expert_ids, total = layout
    if return_inactive_prefix_count:  # how many blocks of bin 0 come first
        assert layout.expert_offsets is not None
        ends = layout.expert_offsets[1:2]
        if totals is None:
            total = torch.cat((total, ends // block_size))
        else:
            torch.floor_divide(ends, block_size, out=totals[1:])
            total = totals
    return sorted_ids[: -(-rows // 4) * 4], expert_ids, total


def _align_single(
    topk_ids: Tensor, block_size: int, *, return_inactive_prefix_count: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """SGLang 0.5.23's function for one token, argument for argument: a block for each route, by ascending id.

    An id of -1 has a block like any other, the first ones; ids are not compared with a number of experts.
    """
    if topk_ids.dim() != 2 or topk_ids.shape[0] != 1 or not topk_ids.is_contiguous():
        raise InvalidInput(f"topk_ids: expected one contiguous row, got {list(topk_ids.shape)}")
    if topk_ids.dtype is not torch.int32:
        raise InvalidType(f"topk_ids: expected int32, got {topk_ids.dtype}")
    if type(block_size) is not int or block_size < 1:
        raise InvalidInput(f"block_size: expected an int of at least 1, got {block_size}")
    require_kernels(topk_ids)
    top_k = topk_ids.shape[1]
    rows, experts = topk_ids.new_empty(top_k * block_size), topk_ids.new_empty(top_k)
    totals = topk_ids.new_empty(2 if return_inactive_prefix_count else 1)
    if uses_triton(topk_ids):
        importlib.import_module(f"{__package__}.sglang_kernels").single_token(
            topk_ids, rows, experts, totals, block_size
        )
    else:
        ordered, choices = topk_ids.flatten().sort(stable=True)
        experts.copy_(ordered)
        rows.fill_(top_k)[::block_size] = choices.int()
        totals[0] = top_k * block_size
        if return_inactive_prefix_count:
            totals[1] = (topk_ids < 0).sum()
    return rows, experts, totals


def _binds(ours: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call fits our parameters; another release may have more."""
    try:
        inspect.signature(ours).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _around(name: str, ours: Callable[..., Any], theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The hook: `ours`, falling back to `theirs` for calls that ours refuses; counts both."""
    try:
        result = ours(*args, **kwargs)
    except (MoealignError, TypeError) as refusal:
        if not isinstance(refusal, MoealignError) and _binds(ours, args, kwargs):
            raise
        engines.leave("sglang", name, str(refusal))
        return theirs(*args, **kwargs)
    call_counts["sglang", name, "moealign"] += 1
    return result


def _registry() -> Any:
    return importlib.import_module("sglang.srt.plugins.hook_registry")


def _exists(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _hooks(layers: bool) -> dict[str, Callable[..., Any]]:
    """Our hook for each function of this SGLang that we replace.

    Raises:
        ImportError: this SGLang defines its function elsewhere.
    """
    home = next((home for home in _HOMES if _exists(home)), None)
    if home is None:
        raise ImportError(f"moealign: this SGLang has none of {', '.join(_HOMES)}")
    hooks: dict[str, Callable[..., Any]] = {f"{home}.{_NAME}": functools.partial(_around, _NAME, _align)}
    if _exists(_SINGLE_HOME):
        hooks[f"{_SINGLE_HOME}.{_SINGLE}"] = functools.partial(_around, _SINGLE, _align_single)
    reason = engines.whole_layers("sglang") if layers else None
    if reason is not None:
        logger.warning("moealign leaves whole layers to SGLang: %s", reason)
    elif layers:
        hooks[sglang_layer.TARGET] = functools.partial(_around, sglang_layer.FUNCTION, sglang_layer.run)
    return hooks


def install(*, apply: bool = True, layers: bool = False) -> list[str]:
    """Register our functions with SGLang's hook registry and, by default, apply the hooks; returns the targets.

    SGLang itself applies hooks after it has called its plug-ins, and rebinds every name that was imported before.
    Starts the recording of a trace if ``MOEALIGN_TRACE`` is set.  Returns ``[]`` if moealign is already installed.

    Args:
        layers: run whole layers too.  A release of SGLang whose layers are not known keeps them, with a warning.

    Raises:
        ImportError: SGLang is not installed, or defines its function elsewhere.
        InvalidInput: a variable ``MOEALIGN_TRACE_*`` has an invalid value.
    """
    if _installed:
        return []
    engines.start_trace("sglang")
    registry = _registry()
    for target, hook in _hooks(layers).items():
        registry.HookRegistry.register(target, hook, registry.HookType.AROUND)
        _installed[target] = hook
    if apply:
        registry.HookRegistry.apply_hooks()
    logger.info("moealign replaces %s", ", ".join(_installed))
    return list(_installed)


def uninstall() -> list[str]:
    """Remove our hooks, but no others, and restore SGLang's functions wherever they were bound; returns the targets."""
    targets = list(_installed)
    if not targets:
        return []
    registry = _registry().HookRegistry
    for target in targets:
        hook = _installed.pop(target)
        registry._hooks[target] = [entry for entry in registry._hooks[target] if entry[1] is not hook]
        if target in registry._patched:
            registry._patched.discard(target)
            _unwrap(target)
        if not registry._hooks[target]:
            del registry._hooks[target]
    if any(target in registry._hooks for target in targets):
        registry.apply_hooks()  # those of others
    sglang_layer.forget()
    logger.info("moealign restored %s", ", ".join(targets))
    return targets


def _unwrap(target: str) -> None:
    """Bind SGLang's own function or method again."""
    path, _, name = target.rpartition(".")
    owner: Any = sys.modules.get(path)
    if owner is None:  # a class of a module
        module, _, of = path.rpartition(".")
        owner = getattr(sys.modules[module], of)
    hooked = theirs = vars(owner)[name]
    while hasattr(theirs, "__wrapped__"):
        theirs = theirs.__wrapped__
    if isinstance(owner, ModuleType):
        rebind(hooked, theirs)
    else:
        setattr(owner, name, theirs)


def installed() -> bool:
    """Whether our hooks are registered in this process."""
    return bool(_installed)


def calls() -> dict[str, dict[str, int]]:
    """Calls in this process by function: how many moealign computed, and how many it left to SGLang."""
    counted = {_NAME} | {name for engine, name, _ in call_counts if engine == "sglang"}
    return {name: {who: call_counts["sglang", name, who] for who in ("moealign", "sglang")} for name in sorted(counted)}


def layers() -> dict[str, Any]:
    """Layers that have been called in this process: how many moealign runs, and how many SGLang, by reason."""
    return engines.layers("sglang")


def metrics() -> str:
    """The counts of :func:`calls` and :func:`layers` in Prometheus's text format."""
    return engines.metrics("sglang")


def plugin() -> None:
    """The entry point, which SGLang calls in every process.  Does nothing unless MOEALIGN_SGLANG is 1 or layer."""
    mode = engines.mode("sglang")
    if mode is not None:
        engines.follow_log("sglang")
        install(apply=False, layers=mode == "layer")
