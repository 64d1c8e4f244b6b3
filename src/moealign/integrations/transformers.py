"""Run Transformers' Mixture-of-Experts models through :func:`moealign.fused_moe`.

    import moealign.integrations.transformers as integration
    integration.install()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moealign")

An experts implementation of Transformers is a function of the experts module and of the router's choice.  This one
reads the module's own description of its weights and calls whatever gate or norm the module has.  Only a gate that is
exactly Transformers' default is computed inside the product instead.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable, how_to_install
from ..experts.activations import Gate
from ..experts.layer import fused_moe
from ..experts.quantized import GROUP, QuantizedWeights, scales_shape
from . import expert_parallel
from .gate_forms import fused_gate
from .routers import Replaced, is_wrapper, replace_routers, replay, restore_routers

__all__ = [
    "NAME",
    "Replaced",
    "experts_forward",
    "explain",
    "fp8_experts_forward",
    "install",
    "replace_routers",
    "replay",
    "restore_routers",
    "uninstall",
]

#: The value of ``experts_implementation``.
NAME = "moealign"

#: Activation modules of Transformers and torch, with their names in :func:`moealign.fused_moe`.
_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

#: Transformers' default ``_apply_gate``, set by :func:`install`: torch.compile cannot trace imports of lazy modules.
_plain_gate: Any = None

_batch_invariant = False


def install(*, batch_invariant: bool = False) -> None:
    """Register ``experts_implementation="moealign"`` with Transformers.  Idempotent; the last call's options hold.

    From release 5.24 on, also register ``DistributedConfig(ep_implementation="moealign")``, an exchange between ranks
    that waits for nothing (docs/parallel.md).

    Select it when loading a model, ``from_pretrained(..., experts_implementation="moealign")``, or later with
    ``model.set_experts_implementation("moealign")``.  Models that share one config object share the selection.

    ``FP8Experts`` in blocks of 128 x 128, whose rows are quantised dynamically, are computed in FP8, without gradients.
    Other quantised experts need another implementation: their first forward with this one raises BackendUnavailable,
    which names the implementations to use.

    Args:
        batch_invariant: the bits of a token's output in the experts do not depend on the other tokens of the batch
            (:func:`moealign.fused_moe`).

    Raises:
        BackendUnavailable: Transformers is not installed, or has no experts implementations (before 5.0).
    """
    global _plain_gate, _batch_invariant
    _batch_invariant = batch_invariant
    _registry().register(NAME, experts_forward)
    if (parallel := expert_parallel.implementations()) is not None:
        parallel.register(NAME, expert_parallel.exchange_class())
    for registry in _quantised_registries():
        fp8 = registry.__name__ == "FP8ExpertsInterface"
        registry.register(NAME, fp8_experts_forward if fp8 else _quantised_forward)
    _plain_gate = getattr(sys.modules["transformers.integrations.moe"], "_default_apply_gate", None)


def uninstall() -> None:
    """Remove the implementation.  Transformers refuses the next call of models that still select it."""
    registry = _registry()
    others = [each._global_mapping for each in _quantised_registries()]
    if (parallel := expert_parallel.implementations()) is not None:
        others.append(parallel._global_mapping)
    for mapping in (type(registry)._global_mapping, getattr(registry, "_local_mapping", {}), *others):
        mapping.pop(NAME, None)


def _registry() -> Any:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise BackendUnavailable(
            f"transformers: expected release 5.16 or later, got none that can be imported ({error}): "
            f"{how_to_install('transformers', upgrade=True)}"
        ) from None
    return ALL_EXPERTS_FUNCTIONS


def _quantised_registries() -> list[Any]:
    """Transformers' registries for quantised experts, each with its own implementations."""
    with contextlib.suppress(ImportError):
        importlib.import_module("transformers.integrations.finegrained_fp8")
    classes = list(type(_registry()).__subclasses__())
    for each in classes:
        classes.extend(each.__subclasses__())
    return [each for each in classes if "_global_mapping" in vars(each)]


def _quantised_forward(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    raise _refusal(module, "weights in bfloat16, float16, float32 or float64", "quantised ones")


def fp8_experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """:func:`experts_forward` for Transformers' ``FP8Experts``, in FP8.

    Raises:
        BackendUnavailable: the weights are not e4m3 in blocks of 128 x 128 with float32 scales, or rows are not
            quantised by groups of 128 columns.
        InvalidInput: gradients are needed.
    """
    block, scheme = getattr(module, "block_size", None), getattr(module, "activation_scheme", None)
    if block is None or tuple(block) != (GROUP, GROUP) or scheme != "dynamic":
        blocks = f"blocks of {GROUP} x {GROUP} and activation_scheme='dynamic'"
        raise _refusal(module, blocks, f"block_size={block} and activation_scheme={scheme!r}")
    if args or kwargs:
        raise _refusal(module, "hidden states, ids and weights", f"{len(args) + len(kwargs)} arguments more")
    gated = getattr(module, "has_gate", True)
    both = []
    for name in ("gate_up_proj" if gated else "up_proj", "down_proj"):
        data, scales = getattr(module, name, None), getattr(module, f"{name}_scale_inv", None)
        for what, tensor, dtype in ((name, data, torch.float8_e4m3fn), (f"{name}_scale_inv", scales, torch.float32)):
            if not isinstance(tensor, Tensor) or is_wrapper(tensor) or tensor.dtype is not dtype:
                got = getattr(tensor, "dtype", None) or "none"
                raise _refusal(module, f"{what} to be an ordinary tensor of {dtype}", str(got))
        assert isinstance(data, Tensor)
        assert isinstance(scales, Tensor)
        if list(scales.shape) != scales_shape(data, (GROUP, GROUP)):
            raise _refusal(module, f"{name}_scale_inv {scales_shape(data, (GROUP, GROUP))}", str(list(scales.shape)))
        both.append(QuantizedWeights(data, scales))
    return fused_moe(
        hidden_states,
        both[0],
        both[1],
        top_k_weights,
        top_k_index,
        activation=_activation(module, gated),
        batch_invariant=_batch_invariant,
    )


def _refusal(module: Any, expected: str, got: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"experts_implementation={NAME!r}: expected {expected} in {type(module).__name__}, got {got}; set another by "
        "model.set_experts_implementation('grouped_mm'), 'batched_mm' or 'eager', or load the model dequantised"
    )


def _weights_of(module: Any, *names: str) -> list[Tensor]:
    """The parameters `names` of an experts module; refuses missing, quantised and wrapped ones."""
    weights = []
    for name in names:
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor):
            raise _refusal(module, f"a parameter {name}", "none")
        if weight.dtype not in _DTYPES:
            raise _refusal(module, f"{name} in bfloat16, float16, float32 or float64", str(weight.dtype))
        if is_wrapper(weight):
            raise _refusal(module, f"{name} to be an ordinary tensor", type(weight).__name__)
        weights.append(weight)
    return weights


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of `module` on ``[T, H]`` hidden states, with the router's ``[T, k]`` ids and weights; ``[T, H]``.

    Transformers' expert parallelism marks routes to other ranks with the number of local experts; like any id out of
    range, they are dropped.

    Raises:
        BackendUnavailable: the module's weights are missing, quantised, or not ordinary tensors.
    """
    gated = getattr(module, "has_gate", True)
    biased = getattr(module, "has_bias", False)
    name = "gate_up_proj" if gated else "up_proj"
    first, second = _weights_of(module, name, "down_proj")
    first_bias, second_bias = _weights_of(module, f"{name}_bias", "down_proj_bias") if biased else (None, None)
    dtype = first.dtype
    result = fused_moe(
        hidden_states.to(dtype),  # under autocast, rows may be float32 while weights are not
        first,
        second,
        top_k_weights,
        top_k_index,
        activation=_activation(module, gated),
        gate_up_bias=first_bias,
        down_bias=second_bias,
        transposed=getattr(module, "is_transposed", False),
        output_rows=_post_norm(module),
        batch_invariant=_batch_invariant,
    )
    return result.to(hidden_states.dtype)


def _activation(module: Any, gated: bool) -> Any:
    """What the kernels take for the activation: a name, a gate, or the module's own function on rows."""
    function = getattr(module, "act_fn", None)
    name = _ACTIVATIONS.get(type(function).__name__) if isinstance(function, torch.nn.Module) else None
    if name == "gelu" and getattr(function, "act", None) not in (None, torch.nn.functional.gelu):
        name = None
    if name == "silu" and getattr(function, "inplace", False):
        name = None
    if not gated:
        return name or function
    if name and _is_plain_gate(module):
        return name
    return fused_gate(module, name) or module._apply_gate


def explain(model: torch.nn.Module) -> dict[str, str]:
    """For every experts module of `model`, by name, whether its gate is fused into the first product, or why not."""
    reports = {}
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "down_proj", None), torch.nn.Parameter) or not hasattr(module, "num_experts"):
            continue
        activation = _activation(module, getattr(module, "has_gate", True))
        if isinstance(activation, (str, Gate)):
            report = f"fused: {activation}"
        elif getattr(module, "has_gate", True):
            report = f"not fused: the _apply_gate of {type(module).__name__} is no moealign.Gate, so it is called"
        else:
            report = f"not fused: {type(module.act_fn).__name__} is no activation of fused_moe, so it is called"
        if _post_norm(module) is not None:
            report += "; a norm follows the second product, so gradients are torch's"
        reports[name] = report
    return reports


def _is_plain_gate(module: Any) -> bool:
    """Whether ``_apply_gate`` is Transformers' default, on concatenated halves."""
    own = getattr(type(module), "_apply_gate", None)
    overridden = "_apply_gate" in vars(module)
    return own is not None and own is _plain_gate and not overridden and getattr(module, "is_concatenated", True)


def _post_norm(module: Any) -> Any:
    """The norm of the experts' outputs before the routing weights, which few models have; else None."""
    if not getattr(module, "has_post_expert_norm", False):
        return None
    return getattr(module, "_apply_post_norm", None) or module.post_expert_norm
