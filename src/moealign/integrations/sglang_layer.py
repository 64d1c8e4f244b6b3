"""Whole layers of SGLang 0.5.23: unquantised and FP8 experts by :func:`moealign.fused_moe`.

The hook is around ``MoeRunner.run``, through which every layer computes its experts.  SGLang also has extension points
for runners, which unquantised layers do not reach: ``register_moe_runner_core`` takes the name ``triton``, but a runner
asks its fused function first, and there is one for ``triton`` without an all-to-all; a name of our own would be chosen
by ``--moe-runner-backend``, which the unquantised method reads only for names that it knows.  Weights are the
checkpoint's, ``[E, 2I, H]`` and ``[E, H, I]``, and are read where they lie.  Routers, dispatch, shared experts and
reductions stay SGLang's.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..experts.activations import Gate
from ..experts.layer import fused_moe
from ..layout import cdiv
from . import engines, fp8

__all__ = ["FUNCTION", "TARGET", "forget", "gate_of", "refuses_layer", "run"]

_MOE = "sglang.srt.layers.moe"
TARGET = f"{_MOE}.moe_runner.runner.MoeRunner.run"  #: for SGLang's hook registry
FUNCTION = "experts"  #: in counts
DTYPES = (torch.bfloat16, torch.float16)
#: What of a TritonMoeQuantInfo says that weights are in a format of SGLang's alone.
_FORMATS = ("use_mxfp8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16")

_reasons: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  #: of each runner that was called, "" for ours


def forget() -> None:
    """Decide anew which layers we run."""
    _reasons.clear()


def refuses_layer(runner: Any, quant_info: Any) -> str | None:
    """Why SGLang keeps the layer of `runner`, a ``MoeRunner``; None if we run it."""
    kind, config = type(quant_info).__name__, runner.config
    if kind != "TritonMoeQuantInfo":
        return f"expected unquantised or FP8 experts of the Triton runner, got {kind}"
    formats = [name for name in _FORMATS if getattr(quant_info, name)]
    if formats:
        return f"expected unquantised or FP8 experts, got {', '.join(formats)}"
    if quant_info.use_fp8_w8a8:
        static = quant_info.a13_scale is not None and quant_info.a2_scale is not None
        reason = fp8.refuses_scheme(quant_info.block_shape, quant_info.per_channel_quant, static)
        if reason is not None:
            return reason
    if runner.lora_enabled:
        return "expected no LoRA, got lora_enabled"
    for option in ("apply_router_weight_on_input", "no_combine"):
        if getattr(config, option):
            return f"{option}: expected False, got True"
    dtypes = (torch.float8_e4m3fn,) if quant_info.use_fp8_w8a8 else DTYPES
    for weight in (quant_info.w13_weight, quant_info.w2_weight):
        if weight.dtype not in dtypes:
            names = " or ".join(str(each).removeprefix("torch.") for each in dtypes)
            return f"expected {names}, got {weight.dtype}"
    if importlib.import_module("sglang.srt.runtime_context").get_exec().moe.enable_fused_moe_sum_all_reduce:
        return "enable_fused_moe_sum_all_reduce: expected False, got True"
    try:
        gate_of(config, quant_info.fuse_swiglu_interleaved)
    except InvalidInput as refusal:
        return str(refusal)
    return None


def gate_of(config: Any, interleaved: bool) -> str | Gate:
    """Our activation for a ``MoeRunnerConfig``.

    Args:
        interleaved: SGLang has interleaved the rows of gate and up of a plain ``silu``.

    Raises:
        InvalidInput: we have none with the same values.
    """
    name, alpha, limit = config.activation, config.gemm1_alpha, config.gemm1_clamp_limit
    if not config.is_gated and name in ("silu", "gelu", "relu2"):
        return str(name)
    if config.is_gated and name == "silu":
        if alpha is not None and limit is not None:
            return Gate(limit=limit, alpha=alpha, offset=1.0, interleaved=bool(config.gate_up_interleaved))
        if alpha is None and limit is not None:
            return Gate(limit=limit, limit_after=True)
        if alpha is None and config.swiglu_limit is not None:
            return Gate(limit=config.swiglu_limit)
        if alpha is None:
            return Gate(interleaved=True) if interleaved else "silu"
    if config.is_gated and name == "situ":
        return Gate("situ", beta=4.0 if alpha is None else alpha, linear_beta=limit)
    if config.is_gated and name in ("gelu", "gelu_tanh") and alpha is None and limit is None:
        return str(name)
    raise InvalidInput(f"activation: expected one that fused_moe has, got {name!r} with alpha {alpha}, limit {limit}")


def run(runner: Any, dispatch_output: Any, quant_info: Any, lora_info: Any = None) -> Any:
    """What SGLang's ``MoeRunner.run`` does for its Triton runner: a ``StandardCombineInput``.

    Args:
        dispatch_output: a ``StandardDispatchOutput``, whose ids are local and -1 for the experts of other ranks.
        quant_info: a ``TritonMoeQuantInfo`` with the weights of this rank and perhaps biases.

    Raises:
        InvalidInput, InvalidType, BackendUnavailable: SGLang must do it; nothing has been written.
    """
    reason = _reasons.get(runner)
    if reason is None:
        refusal = refuses_layer(runner, quant_info)
        engines.count_layer("sglang", f"layer {runner.config.layer_id}", refusal)
        reason = _reasons[runner] = refusal or ""
    if reason:
        raise InvalidInput(reason)
    config, rows = runner.config, dispatch_output.hidden_states
    if lora_info is not None:
        raise InvalidInput("lora_info: expected none, got one")
    if type(dispatch_output).__name__ != "StandardDispatchOutput":
        raise InvalidInput(f"dispatch_output: expected the standard one, got {type(dispatch_output).__name__}")
    if dispatch_output.hidden_states_scale is not None or dispatch_output.hidden_states_pre_quant is not None:
        raise InvalidInput("hidden_states: expected plain rows, got quantised ones")
    choice = dispatch_output.topk_output
    if not type(choice).__name__.startswith("StandardTopKOutput"):
        raise InvalidInput(f"topk_output: expected ids and weights, got {type(choice).__name__}")
    if engines.recorder is not None and not torch.compiler.is_compiling():
        engines.recorder.add(choice.topk_ids, quant_info.w13_weight.shape[0], False)
    fused = importlib.import_module(f"{_MOE}.moe_runner.triton_utils.fused_moe")
    experts: tuple[Any, Any] = (quant_info.w13_weight, quant_info.w2_weight)
    if quant_info.use_fp8_w8a8:
        shape, by_row = quant_info.block_shape, bool(quant_info.per_channel_quant)
        experts = (
            fp8.weights_of(experts[0], quant_info.w13_scale, quant_info.a13_scale, shape, by_row),
            fp8.weights_of(experts[1], quant_info.w2_scale, quant_info.a2_scale, shape, by_row),
        )
    scale, weights = config.routed_scaling_factor, choice.topk_weights
    out = fused_moe(
        rows,
        *experts,
        weights if scale in (None, 1.0) else weights * scale,
        choice.topk_ids,
        activation=gate_of(config, quant_info.fuse_swiglu_interleaved),
        gate_up_bias=quant_info.b13,
        down_bias=quant_info.b2,
        batch_invariant=bool(fused.is_batch_invariant_mode_enabled()),
        expected_routes=_expected_routes(config, choice.topk_ids),
        out=rows if config.inplace else _output(fused, rows),
        backend=None if rows.device.type == "cpu" else "triton",
    )
    return importlib.import_module(f"{_MOE}.token_dispatcher.standard").StandardCombineInput(hidden_states=out)


def _expected_routes(config: Any, ids: Tensor) -> int | None:
    """How many ids are likely to be of this rank's experts; None if all are."""
    everywhere, here = (getattr(config, name, None) or 0 for name in ("num_experts", "num_local_experts"))
    return cdiv(ids.numel() * here, everywhere) if 0 < here < everywhere else None


def _output(fused: Any, rows: Tensor) -> Tensor:
    """A buffer like `rows`, where SGLang's next reduction wants it."""
    with contextlib.ExitStack() as stack:
        if fused.is_allocation_symmetric():
            stack.enter_context(fused.use_symmetric_memory(fused.get_parallel().tp_group))
        return torch.empty_like(rows)
