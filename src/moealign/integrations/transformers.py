"""Transformers' Mixture-of-Experts models through :func:`moealign.fused_moe`: one line, ``install()``.

    import moealign.integrations.transformers as integration
    integration.install()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moealign")

An experts implementation of Transformers is a function of the experts' module and of what the router chose.  This one
reads the module's own description of its weights and never guesses: whatever gate or norm it has is called, unless it
is exactly Transformers' plain one, in which case it is computed inside the product.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import types
import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from ..experts.layer import fused_moe
from .router_forms import Plan, Unlike, recognise

__all__ = ["NAME", "Replaced", "experts_forward", "install", "replace_routers", "restore_routers", "uninstall"]

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

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

#: Transformers' own ``_apply_gate``, from :func:`install` on: torch.compile follows no import out of its lazy modules.
_plain_gate: Any = None


def install() -> None:
    """Register ``experts_implementation="moealign"`` with Transformers.  Twice is as good as once.

    A model takes it at loading, ``from_pretrained(..., experts_implementation="moealign")``, or later by
    ``model.set_experts_implementation("moealign")``.  Models that share one config object share the choice.

    Quantised experts (FP8, FP4 and the like) take another implementation: a model of them that asks for this one gets
    a BackendUnavailable in its first forward, which names those that it may ask for.

    Raises:
        BackendUnavailable: Transformers is not installed, or has no experts implementations (before 5.0).
    """
    global _plain_gate
    _registry().register(NAME, experts_forward)
    for registry in _quantised_registries():
        registry.register(NAME, _quantised_forward)
    _plain_gate = getattr(sys.modules["transformers.integrations.moe"], "_default_apply_gate", None)


def uninstall() -> None:
    """Take it back.  Models that still ask for it will be refused by Transformers at their next call."""
    registry = _registry()
    others = [each._global_mapping for each in _quantised_registries()]
    for place in (type(registry)._global_mapping, getattr(registry, "_local_mapping", {}), *others):
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


def _quantised_registries() -> list[Any]:
    """Transformers' registries for experts of other formats, each with implementations of its own."""
    with contextlib.suppress(ImportError):
        importlib.import_module("transformers.integrations.finegrained_fp8")
    found = list(type(_registry()).__subclasses__())
    for each in found:
        found.extend(each.__subclasses__())
    return [each for each in found if "_global_mapping" in vars(each)]


def _quantised_forward(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    raise _refusal(module, "weights in bfloat16, float16, float32 or float64", "quantised ones")


def _refusal(module: Any, expected: str, got: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"experts_implementation={NAME!r}: expected {expected} in {type(module).__name__}, got {got}; set another by "
        "model.set_experts_implementation('grouped_mm'), 'batched_mm' or 'eager', or load the model dequantised"
    )


def _weights_of(module: Any, *names: str) -> list[Tensor]:
    """The parameters that an experts module must have, of dtypes and a kind that can be multiplied, or a refusal."""
    found = []
    for name in names:
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor):
            raise _refusal(module, f"a parameter {name}", "none")
        if weight.dtype not in _DTYPES:
            raise _refusal(module, f"{name} in bfloat16, float16, float32 or float64", str(weight.dtype))
        if _is_wrapper(weight):
            raise _refusal(module, f"{name} to be an ordinary tensor", type(weight).__name__)
        found.append(weight)
    return found


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``[T, H]`` from ``[T, H]`` and the router's ``[T, k]`` ids and weights, by the experts of `module`.

    Ids equal to the number of local experts are what Transformers' expert parallelism writes for an expert of another
    rank; they are dropped, as any id out of range is.

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
        hidden_states.to(dtype),  # under autocast rows may come in float32 beside weights that do not
        first,
        second,
        top_k_weights,
        top_k_index,
        activation=_activation(module, gated),
        gate_up_bias=first_bias,
        down_bias=second_bias,
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


class Replaced(int):
    """How many routers :func:`replace_routers` replaced, and why it left the others alone."""

    reasons: dict[str, str]  #: name of a router that was left alone -> why

    def __new__(cls, count: int, reasons: dict[str, str] | None = None) -> Replaced:
        self = super().__new__(cls, count)
        self.reasons = {} if reasons is None else reasons
        return self


def replace_routers(model: torch.nn.Module) -> Replaced:
    """Let the routers of `model` choose by :func:`moealign.route`'s kernel; how many do from now on.

    One kernel then stands where Transformers has a softmax, a top-k, a sum and a division or more.  A router of any
    class is replaced if the operations of its own ``forward`` amount to one of the forms of :func:`moealign.route`, and
    if on random rows it chooses the same (:mod:`moealign.integrations.router_forms`).  It returns logits ``[T, E]``,
    weights ``[T, k]`` and ids ``[T, k]`` in the dtypes of its own ``forward``, ids best first.

    What the router's ``forward`` reads (``top_k``, ``norm_topk_prob``, a scale, a bias, ``training``) is looked at in
    every call: after a change the router is recognised again.  Its own ``forward`` runs where that fails; under
    autocast, on the meta device, for DTensors, in transforms of torch.func and with forward-mode gradients; and inside
    torch.compile if something changed since its last call outside.  It may be copied, pickled, moved, converted, and
    be wrapped by accelerate's hooks or by FSDP2.  Before Transformers distributes a model is the time to replace its
    routers.

    Returns:
        The count, an int, whose ``reasons`` name every router that was left alone and why.  Where there is none to
        replace, a warning says so too.
    """
    count, reasons, plans = 0, {}, {}  # type: ignore[var-annotated]
    for name, module in model.named_modules():
        if not _is_router(module):
            continue
        place = "_old_forward" if "_old_forward" in vars(module) else "forward"  # accelerate calls the former
        present = vars(module).get(place)
        if isinstance(present, _Router):
            reasons[name] = "it is replaced already"
            continue
        own = getattr(present, "__func__", None) is type(module).forward
        if present is not None and not own:
            reasons[name] = "its forward is another library's; replace routers before it is wrapped"
            continue
        try:
            setattr(module, place, _Router(module, _plan(module, plans)))
        except Unlike as error:
            reasons[name] = str(error)
        else:
            count += 1
    if count == 0 and "it is replaced already" not in reasons.values():
        said = "; ".join(f"{name or type(model).__name__}: {reason}" for name, reason in reasons.items())
        warnings.warn(
            f"replace_routers: expected a router that moealign.route can stand for in {type(model).__name__}, got "
            f"{said or 'no module that routes by itself'}; the model is as it was",
            stacklevel=2,
        )
    return Replaced(count, reasons)


def restore_routers(model: torch.nn.Module) -> int:
    """Give the routers of `model` their own ``forward`` back; how many had lost it."""
    count = 0
    for module in model.modules():
        for place in ("forward", "_old_forward"):
            if isinstance(vars(module).get(place), _Router):
                delattr(module, place)
                if place == "_old_forward":
                    setattr(module, place, types.MethodType(type(module).forward, module))
                count += 1
    return count


def _is_router(module: torch.nn.Module) -> bool:
    """Whether `module` looks as if it chose experts; its forward is read only then."""
    kind = type(module)
    if kind.__module__.startswith("torch.nn.") or any(each.dim() > 2 for each in module.parameters()):
        return False
    if "router" in kind.__name__.lower():
        return True
    needed = [each for each in inspect.signature(kind.forward).parameters.values() if each.default is each.empty]
    if len(needed) > 3 or any(True for child in module.children() for _ in child.children()):
        return False
    functions = (inspect.unwrap(each) for base in kind.__mro__ for each in vars(base).values() if callable(each))
    return any("topk" in each.__code__.co_names for each in functions if isinstance(each, types.FunctionType))


def _plan(module: torch.nn.Module, plans: dict[Any, list[Plan]]) -> Plan:
    """The plan of `module`, perhaps that of a layer like it."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    kinds = tuple(type(each) for each in module.modules())
    like = plans.setdefault((kinds, tuple((name, each.shape) for name, each in tensors)), [])
    for plan in like:
        rows = torch.empty((0,) * plan.dims, dtype=plan.linear_dtypes[0])
        if plan.fits(module, rows):
            return plan
    like.append(recognise(module))
    return like[-1]


class _Router:
    """A router's ``forward``: by its plan while that fits, else by its own."""

    def __init__(self, module: torch.nn.Module, plan: Plan | None) -> None:
        self.module, self.plan = module, plan
        self.failed: Any = None  #: what it was like when it could not be recognised

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        others = kwargs or hidden_states.is_meta or _is_wrapper(hidden_states) or _is_transformed(hidden_states)
        if others or torch.is_autocast_enabled(hidden_states.device.type):
            return type(module).forward(module, hidden_states, *args, **kwargs)
        plan = self.plan
        if plan is None or not plan.fits(module, hidden_states):
            plan = None if torch.compiler.is_compiling() else self._again(hidden_states, args)
        if plan is None:
            return type(module).forward(module, hidden_states, *args)
        return plan.run(module, hidden_states, args)

    def _again(self, hidden_states: Tensor, args: tuple[Any, ...]) -> Plan | None:
        module = self.module
        tensors = (*module.parameters(), *module.buffers(), hidden_states)
        seen = {name: each for name, each in vars(module).items() if isinstance(each, (bool, int, float, str))}
        state = (seen, [each.dtype for each in tensors], hidden_states.dim())
        if self.failed == state:
            return None
        try:
            self.plan, self.failed = recognise(module, hidden_states, args), None
        except Unlike:
            self.plan, self.failed = None, state
        return self.plan

    def __reduce__(self) -> Any:
        return _Router, (self.module, self.plan)


def _is_wrapper(tensor: Tensor) -> bool:
    """Whether `tensor` is of a subclass that stands for others, as DTensor and quantised ones, but not a compiler's."""
    kind = type(tensor)
    if kind is Tensor or kind is torch.nn.Parameter or kind.__module__.startswith("torch._subclasses"):
        return False
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def _is_transformed(tensor: Tensor) -> bool:
    """Whether `tensor` is in one of torch.func's transforms or carries a forward-mode gradient."""
    if torch.compiler.is_compiling():
        return False
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
