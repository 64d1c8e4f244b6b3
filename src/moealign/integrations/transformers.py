"""Transformers' Mixture-of-Experts models through :func:`moealign.fused_moe`: one line, ``install()``.

    import moealign.integrations.transformers as integration
    integration.install()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moealign")

An experts implementation of Transformers is a function of the experts' module and of what the router chose.  This one
reads the module's own description of its weights and never guesses: whatever gate or norm it has is called, unless it
is exactly Transformers' plain one, in which case it is computed inside the product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from ..fused_moe import fused_moe

__all__ = ["NAME", "experts_forward", "install", "uninstall"]

#: What ``experts_implementation`` is called.
NAME = "moealign"

#: Activation modules of Transformers and torch that have a name in :func:`moealign.fused_moe`.
_NAMED = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}


def install() -> None:
    """Register ``experts_implementation="moealign"`` with Transformers.  Twice is as good as once.

    A model takes it at loading, ``from_pretrained(..., experts_implementation="moealign")``, or later by
    ``model.set_experts_implementation("moealign")``.  Models that share one config object share the choice.

    Raises:
        BackendUnavailable: Transformers is not installed, or has no experts implementations (before 5.0).
    """
    _registry().register(NAME, experts_forward)


def uninstall() -> None:
    """Take it back.  Models that still ask for it will be refused by Transformers at their next call."""
    registry = _registry()
    for place in (type(registry)._global_mapping, getattr(registry, "_local_mapping", {})):
        place.pop(NAME, None)


def _registry() -> Any:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise BackendUnavailable(
            f"transformers: expected release 5.16 or later, got none that can be imported ({error}); "
            "pip install 'moealign[transformers]' brings it"
        ) from None
    return ALL_EXPERTS_FUNCTIONS


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``[T, H]`` from ``[T, H]`` and the router's ``[T, k]`` ids and weights, by the experts of `module`.

    Ids equal to the number of local experts are what Transformers' expert parallelism writes for an expert of another
    rank; they are dropped, as any id out of range is.
    """
    gated = getattr(module, "has_gate", True)
    biased = getattr(module, "has_bias", False)
    first = module.gate_up_proj if gated else module.up_proj
    dtype = first.dtype
    bias = module.gate_up_proj_bias if gated and biased else module.up_proj_bias if biased else None
    result = fused_moe(
        hidden_states.to(dtype),  # under autocast rows may come in float32 beside weights that do not
        first,
        module.down_proj,
        top_k_weights,
        top_k_index,
        activation=_activation(module, gated),
        gate_up_bias=bias,
        down_bias=module.down_proj_bias if biased else None,
        transposed=getattr(module, "is_transposed", False),
        output_rows=_post_norm(module),
    )
    return result.to(hidden_states.dtype)


def _activation(module: Any, gated: bool) -> Any:
    """A name where the module provably computes just that, else its own function on rows."""
    function = getattr(module, "act_fn", None)
    name = _NAMED.get(type(function).__name__) if isinstance(function, torch.nn.Module) else None
    if name == "gelu" and getattr(function, "act", None) not in (None, torch.nn.functional.gelu):
        name = None
    if name == "silu" and getattr(function, "inplace", False):
        name = None
    if not gated:
        return name or function
    return name if name and _is_plain_gate(module) else module._apply_gate


def _is_plain_gate(module: Any) -> bool:
    """Whether ``_apply_gate`` is Transformers' own, on halves one behind the other."""
    from transformers.integrations import moe

    plain = getattr(moe, "_default_apply_gate", None)
    own = getattr(type(module), "_apply_gate", None)
    overridden = "_apply_gate" in vars(module)
    return plain is not None and own is plain and not overridden and getattr(module, "is_concatenated", True)


def _post_norm(module: Any) -> Any:
    """The norm of the experts' outputs, before the routing weight, in the few models that have one."""
    if not getattr(module, "has_post_expert_norm", False):
        return None
    return getattr(module, "_apply_post_norm", None) or module.post_expert_norm
