"""Transformers' Mixture-of-Experts models through :func:`moealign.fused_moe`: one line, ``install()``.

    import moealign.integrations.transformers as integration
    integration.install()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moealign")

An experts implementation of Transformers is a function of the experts' module and of what the router chose.  This one
reads the module's own description of its weights and never guesses: whatever gate or norm it has is called, unless it
is exactly Transformers' plain one, in which case it is computed inside the product.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from ..fused_moe import fused_moe

__all__ = ["NAME", "experts_forward", "install", "replace_routers", "restore_routers", "uninstall"]

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


#: Transformers' own ``_apply_gate``, from :func:`install` on: torch.compile follows no import out of its lazy modules.
_plain_gate: Any = None


def install() -> None:
    """Register ``experts_implementation="moealign"`` with Transformers.  Twice is as good as once.

    A model takes it at loading, ``from_pretrained(..., experts_implementation="moealign")``, or later by
    ``model.set_experts_implementation("moealign")``.  Models that share one config object share the choice.

    Raises:
        BackendUnavailable: Transformers is not installed, or has no experts implementations (before 5.0).
    """
    global _plain_gate
    _registry().register(NAME, experts_forward)
    _plain_gate = getattr(sys.modules["transformers.integrations.moe"], "_default_apply_gate", None)


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
    own = getattr(type(module), "_apply_gate", None)
    overridden = "_apply_gate" in vars(module)
    return own is not None and own is _plain_gate and not overridden and getattr(module, "is_concatenated", True)


def _post_norm(module: Any) -> Any:
    """The norm of the experts' outputs, before the routing weight, in the few models that have one."""
    if not getattr(module, "has_post_expert_norm", False):
        return None
    return getattr(module, "_apply_post_norm", None) or module.post_expert_norm


# ---- routers ---------------------------------------------------------------------------------------------------------

#: How Transformers' routers choose, by the name of their class.  Each still has to show that it does.
_SOFTMAX = {"scoring": "softmax"}
_SIGMOID = {"scoring": "sigmoid"}
_ROUTERS = {
    "MixtralTopKRouter": _SOFTMAX,
    "Qwen2MoeTopKRouter": _SOFTMAX,
    "Qwen3MoeTopKRouter": _SOFTMAX,
    "OlmoeTopKRouter": _SOFTMAX,
    "GptOssTopKRouter": _SOFTMAX,
    "DeepseekV3TopkRouter": _SIGMOID,
    "Glm4MoeTopkRouter": _SIGMOID,
}
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def replace_routers(model: torch.nn.Module) -> int:
    """Let routers of `model` that this library knows choose by :func:`moealign.route`'s kernel; how many did.

    One kernel then stands where Transformers has a softmax, a top-k, a sum and a division or more.  A router is
    replaced only if, on random rows, it chooses as its own ``forward`` does.  Weights stay in float32.  The ids are
    int32, which the experts of this library take: set ``experts_implementation="moealign"`` as well.
    """
    replaced = 0
    for module in model.modules():
        how = _ROUTERS.get(type(module).__name__)
        if how is None or "forward" in vars(module):
            continue
        facts = _facts(module, how)
        if facts is None or not _agree(module, facts):
            continue
        module.forward = _Router(module, facts)
        replaced += 1
    return replaced


def restore_routers(model: torch.nn.Module) -> int:
    """Give the routers of `model` their own ``forward`` back; how many had lost it."""
    replaced = [module for module in model.modules() if isinstance(vars(module).get("forward"), _Router)]
    for module in replaced:
        del module.forward
    return len(replaced)


def _facts(module: Any, how: dict[str, str]) -> tuple[Any, ...] | None:
    """What the operator takes behind the logits, up to the bias; None where something is missing."""
    try:
        if how is _SOFTMAX:
            renormalize = bool(getattr(module, "norm_topk_prob", True))
            return (module.top_k, "softmax", renormalize, 1, 1, 1.0)
        return (
            module.top_k, "sigmoid", bool(module.norm_topk_prob), module.num_group, module.topk_group,
            float(module.routed_scaling_factor),
        )  # fmt: skip
    except AttributeError:
        return None


class _Router:
    """A router's ``forward``: logits as its own, weights and ids from one kernel."""

    def __init__(self, module: Any, facts: tuple[Any, ...]) -> None:
        self.module, self.facts = module, facts

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module = self.module
        top_k, scoring, renormalize, groups, topk_groups, scale = self.facts
        hidden_states = hidden_states.reshape(-1, module.hidden_dim)
        weight, bias = module.weight, None
        if scoring == "sigmoid":
            hidden_states, weight = hidden_states.to(torch.float32), weight.to(torch.float32)
            bias = module.e_score_correction_bias
        logits = torch.nn.functional.linear(hidden_states, weight, getattr(module, "bias", None))
        weights, ids, _ = torch.ops.moealign.route(
            logits, top_k, scoring, renormalize, bias, groups, topk_groups, scale, None, False, None
        )
        return logits, weights, ids

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        import copy

        return _Router(copy.deepcopy(self.module, memo), self.facts)


def _agree(module: Any, facts: tuple[Any, ...]) -> bool:
    """Whether both choose the same experts with the same weights for 64 random rows."""
    weight = module.weight
    if weight.device.type == "meta":
        return False
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, module.hidden_dim, generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            (_, theirs, which), (_, ours, ids) = type(module).forward(module, rows), _Router(module, facts)(rows)
        except Exception:
            return False
    if which.shape != ids.shape or theirs.shape != ours.shape:
        return False
    # Of equal scores, which a router of zeros has everywhere, theirs may choose others: weights alone then agree.
    most = _TOLERANCE.get(weight.dtype, 1e-5) * max(1.0, float(ours.abs().max()))
    close = (theirs.float().sort(1).values - ours.sort(1).values).abs().max() <= most
    alike = (which.long().sort(1).values == ids.long().sort(1).values).all(1).float().mean()
    return bool(close) and (float(alike) > 0.9 or not bool(weight.any()))
