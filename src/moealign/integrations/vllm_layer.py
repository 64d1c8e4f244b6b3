"""Whole layers of vLLM 0.31 to 0.33: unquantised and FP8 experts by :func:`moealign.fused_moe`.

The seam is vLLM's for plug-ins: a class given to ``PluggableLayer.register_oot`` is built wherever vLLM builds a layer
of that name.  Ours, for ``RoutedExperts``, builds vLLM's and then names our experts in the layer's method, which makes
its kernel of them.  They take the place of ``TritonExperts`` alone, whose weights are the checkpoint's, ``[E, 2I, H]``
and ``[E, H, I]``, and are read where they lie.  Loading, routers, all-to-all, shared experts and reductions stay
vLLM's.
``UnquantizedFusedMoEMethod`` can be replaced in the same way, but quantised layers never reach it, and it does not know
its layer, so that neither could be named.

Rows of FP8 layers come to our experts as the model has them: ``expects_unquantized_inputs`` asks vLLM for that, and
``TritonExperts`` then quantises in the calls that are left to it.
Routers are none of this seam.  vLLM makes them by ``create_fused_moe_router``, of classes that no registry replaces
(only ``GroupedTopk`` is a ``CustomOp``), and they run before the layer.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput, InvalidType, MoealignError
from ..experts.activations import Gate
from ..experts.layer import fused_moe
from . import engines, fp8

__all__ = ["gate_of", "install", "installed", "refuses_layer", "run", "uninstall"]

_LAYERS = "vllm.model_executor.layers.fused_moe"
_NAME = "RoutedExperts"  # in vLLM's registry
_FUNCTION = "experts"  # in counts
DTYPES = (torch.bfloat16, torch.float16)
#: vLLM's methods of layers with FP8 weights that are read as they were loaded.
_FP8_METHODS = ("Fp8MoEMethod", "CompressedTensorsW8A8Fp8MoEMethod")

logger = logging.getLogger(__name__)
_installed: list[type] = []  # our layer, if it is registered


def refuses_layer(layer: Any, method: Any, experts: type) -> str | None:
    """Why vLLM keeps `layer`, a ``RoutedExperts``; None if we run it.

    Args:
        method, experts: vLLM's ``UnquantizedFusedMoEMethod`` and ``TritonExperts``.  Besides the first, methods of FP8
            are served; of experts, the second alone.
    """
    config, chosen = layer.moe_config, layer.quant_method
    quantised = type(chosen).__name__ in _FP8_METHODS
    if type(chosen) is not method and not quantised:
        return f"expected unquantised or FP8 experts, got {type(chosen).__name__}"
    if config.is_lora_enabled:
        return "expected no LoRA, got is_lora_enabled"
    if chosen.experts_cls is not experts:
        return f"expected {experts.__name__} of vLLM, got {getattr(chosen.experts_cls, '__name__', None)}"
    for dtype in (config.in_dtype, layer.params_dtype):
        if dtype not in DTYPES:
            return f"expected bfloat16 or float16, got {dtype}"
    if layer.apply_router_weight_on_input:
        return "expected routing weights after the experts, got apply_router_weight_on_input"
    if not quantised:
        return None
    if config.moe_parallel_config.use_all2all_kernels:
        return "expected no all-to-all of FP8 rows, got use_all2all_kernels"  # it would carry twice the bytes for us
    block_shape = getattr(chosen, "moe_block_shape", None) or chosen.weight_block_size
    if type(chosen).__name__ == _FP8_METHODS[0]:
        by_row = getattr(chosen, "per_act_token_quant", False)  # since 0.33
        return fp8.refuses_scheme(block_shape, by_row, chosen.quant_config.activation_scheme == "static")
    return fp8.refuses_scheme(block_shape, chosen.input_quant.strategy == "token", chosen.static_input_scales)


def gate_of(name: str, config: Any) -> str | Gate:
    """Our activation for vLLM's `name` with the constants of `config`, an ``ApplyMoEActivationConfig``.

    Raises:
        InvalidInput: we have none with the same values.
    """
    limit = config.clamp_limit
    if name == "silu" and limit is not None:
        return Gate(limit=limit)
    if name == "swigluoai":  # vLLM's operator is called with its defaults
        return Gate(limit=7.0, alpha=1.702, offset=1.0, interleaved=True)
    if name == "swigluoai_uninterleave" and limit is not None:
        return Gate(limit=limit, alpha=config.alpha, offset=config.beta)
    if name == "swiglustep":
        return Gate(limit=7.0, limit_after=True)
    if name == "situ" and config.activation_situ_beta is not None:
        return Gate("situ", beta=config.activation_situ_beta, linear_beta=config.activation_situ_linear_beta)
    plain = {"silu", "gelu", "gelu_tanh", "silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul", "relu2_no_mul"}
    if name in plain:
        return name.removesuffix("_no_mul")
    raise InvalidInput(f"activation: expected one that fused_moe has, got {name!r} with limit {limit}")


def run(
    experts: Any,
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: Any,
    global_num_experts: int,
    expert_map: Tensor | None,
    on_input: bool,
    batch_invariant: bool,
) -> None:
    """What vLLM's ``TritonExperts.apply`` does: fill `output` ``[T, H]`` with the weighted sum over the experts.

    Args:
        experts: vLLM's object, for its scales and biases, the constants of its activation, and what it is asked to do.
        activation: a ``MoEActivation``.
        expert_map: ``[global_num_experts]``, the row of `w1` and `w2` of each global expert or -1.
        on_input: whether the routing weights are in `hidden_states` already.

    Raises:
        InvalidInput, InvalidType, BackendUnavailable: vLLM must do it; nothing has been written.
    """
    if getattr(experts, "post_gemm2_hook", None) is not None:
        raise InvalidInput("post_gemm2_hook: expected none, got one; it takes the rows before their sum")
    if getattr(experts, "_lora_context", None) is not None:
        raise InvalidInput("LoRA: expected no adapters, got a context")
    if on_input:
        raise InvalidInput("apply_router_weight_on_input: expected False, got True")
    if any(getattr(each, "_vllm_is_uva_offloaded", False) for each in (w1, w2)):
        raise InvalidInput("weights: expected them on the device, got some that are offloaded to the host")
    if hidden_states.dtype not in DTYPES:
        raise InvalidType(f"hidden_states: expected bfloat16 or float16, got {hidden_states.dtype}")
    if expert_map is not None and expert_map.numel() != global_num_experts:
        raise InvalidInput(f"expert_map: expected [{global_num_experts}], got {list(expert_map.shape)}")
    gate = gate_of(activation.value, experts.activation_config)
    weights: tuple[Any, Any] = (w1, w2)
    if experts.quant_dtype is not None:
        shape, by_row = experts.block_shape, experts.per_act_token_quant
        weights = (
            fp8.weights_of(w1, experts.w1_scale, experts.a1_scale, shape, by_row),
            fp8.weights_of(w2, experts.w2_scale, experts.a2_scale, shape, by_row),
        )
    if engines.recorder is not None and not torch.compiler.is_compiling():
        number = w1.shape[0] if expert_map is None else global_num_experts
        engines.recorder.add(topk_ids, number, expert_map is not None)
    fused_moe(
        hidden_states,
        *weights,
        topk_weights,
        topk_ids,
        expert_map=expert_map,
        activation=gate,
        gate_up_bias=experts.w1_bias,
        down_bias=experts.w2_bias,
        batch_invariant=batch_invariant,
        out=output,
        backend=None if hidden_states.device.type == "cpu" else "triton",
    )


@functools.cache
def _classes() -> tuple[Any, type]:
    """vLLM's registry of plug-in classes, and our layer.  Both of our classes derive from vLLM's, so vLLM is needed."""
    triton: Any = importlib.import_module(f"{_LAYERS}.experts.triton_moe")
    method: Any = importlib.import_module(f"{_LAYERS}.unquantized_fused_moe_method")
    routed: Any = importlib.import_module(f"{_LAYERS}.routed_experts")
    envs: Any = importlib.import_module("vllm.envs")

    class MoealignExperts(triton.TritonExperts):  # type: ignore[misc]
        """vLLM's Triton experts, computed by us where we can.

        It reserves no workspace: ours comes from torch's allocator, and a call that is left to vLLM brings its own.
        """

        @property
        def expects_unquantized_inputs(self) -> bool:
            return self.quant_dtype is not None or bool(super().expects_unquantized_inputs)

        def workspace_shapes(self, M: int, N: int, K: int, *rest: Any) -> tuple[tuple[int, ...], ...]:
            return (0,), (0,), (M, K)

        def apply(
            self,
            output: Tensor,
            hidden_states: Tensor,
            w1: Tensor,
            w2: Tensor,
            topk_weights: Tensor,
            topk_ids: Tensor,
            activation: Any,
            global_num_experts: int,
            expert_map: Tensor | None,
            a1q_scale: Tensor | None,
            a2_scale: Tensor | None,
            workspace13: Tensor,
            workspace2: Tensor,
            expert_tokens_meta: Any,
            apply_router_weight_on_input: bool,
        ) -> Any:
            inputs = (hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map)
            if installed():
                try:
                    run(self, output, *inputs, apply_router_weight_on_input, bool(envs.VLLM_BATCH_INVARIANT))
                except MoealignError as refusal:
                    engines.leave("vllm", _FUNCTION, str(refusal))
                else:
                    if not torch.compiler.is_compiling():
                        engines.call_counts["vllm", _FUNCTION, "moealign"] += 1
                    return None
            local, tokens, columns, hidden, top_k = self.moe_problem_size(hidden_states, w1, w2, topk_ids)
            sizes = (tokens, columns, hidden, top_k, global_num_experts, local, expert_tokens_meta, activation)
            first, second, _ = super().workspace_shapes(*sizes)
            kind = self.workspace_dtype(output.dtype)
            workspaces = [output.new_empty(math.prod(shape), dtype=kind) for shape in (first, second)]
            options = (*workspaces, expert_tokens_meta, apply_router_weight_on_input)
            return super().apply(output, *inputs, a1q_scale, a2_scale, *options)

    class MoealignRoutedExperts(routed.RoutedExperts):  # type: ignore[misc]
        """vLLM's layer of routed experts, with our experts where we can compute them."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            reason = refuses_layer(self, method.UnquantizedFusedMoEMethod, triton.TritonExperts)
            if reason is None:
                self.quant_method.experts_cls = MoealignExperts
            engines.count_layer("vllm", self.layer_name, reason)

    return importlib.import_module("vllm.model_executor.custom_op"), MoealignRoutedExperts


def install() -> list[str]:
    """Register our layer with vLLM, for the layers that are built from now on; returns what it stands in for.

    Returns ``[]``, with a warning, for a release of vLLM whose layers we do not know, and where another plug-in has
    registered its own layer.

    Raises:
        ImportError: vLLM is not installed.
    """
    if _installed:
        return []
    reason = engines.whole_layers("vllm")
    if reason is not None:
        logger.warning("moealign leaves whole layers to vLLM: %s", reason)
        return []
    registry, ours = _classes()
    other = registry.op_registry_oot.get(_NAME)
    if other is not None:
        logger.warning("moealign leaves whole layers to vLLM: %s of another plug-in is registered", other.__qualname__)
        return []
    registry.PluggableLayer.register_oot(ours, name=_NAME)
    _installed.append(ours)
    return [f"{_LAYERS}.routed_experts.{_NAME}"]


def uninstall() -> list[str]:
    """Take our layer out of vLLM's registry; layers that were built with it compute as vLLM's."""
    if not _installed:
        return []
    registry, _ = _classes()
    if registry.op_registry_oot.get(_NAME) is _installed.pop():
        del registry.op_registry_oot[_NAME]
    return [f"{_LAYERS}.routed_experts.{_NAME}"]


def installed() -> bool:
    """Whether our layer is registered in this process."""
    return bool(_installed)
