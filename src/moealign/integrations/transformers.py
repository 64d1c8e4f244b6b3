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
import inspect
import sys
import types
import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable, how_to_install
from ..experts.layer import fused_moe
from .router_forms import RouterForm, UnsupportedRouter, recognise

__all__ = ["NAME", "Replaced", "experts_forward", "install", "replace_routers", "restore_routers", "uninstall"]

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


def install() -> None:
    """Register ``experts_implementation="moealign"`` with Transformers.  Idempotent.

    Select it when loading a model, ``from_pretrained(..., experts_implementation="moealign")``, or later with
    ``model.set_experts_implementation("moealign")``.  Models that share one config object share the selection.

    Quantised experts (FP8, FP4 and the like) need another implementation: their first forward with this one raises
    BackendUnavailable, which names the implementations to use.

    Raises:
        BackendUnavailable: Transformers is not installed, or has no experts implementations (before 5.0).
    """
    global _plain_gate
    _registry().register(NAME, experts_forward)
    for registry in _quantised_registries():
        registry.register(NAME, _quantised_forward)
    _plain_gate = getattr(sys.modules["transformers.integrations.moe"], "_default_apply_gate", None)


def uninstall() -> None:
    """Remove the implementation.  Transformers refuses the next call of models that still select it."""
    registry = _registry()
    others = [each._global_mapping for each in _quantised_registries()]
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
        if _is_wrapper(weight):
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
    )
    return result.to(hidden_states.dtype)


def _activation(module: Any, gated: bool) -> Any:
    """The name of the activation if the module computes exactly that, else the module's own function on rows."""
    function = getattr(module, "act_fn", None)
    name = _ACTIVATIONS.get(type(function).__name__) if isinstance(function, torch.nn.Module) else None
    if name == "gelu" and getattr(function, "act", None) not in (None, torch.nn.functional.gelu):
        name = None
    if name == "silu" and getattr(function, "inplace", False):
        name = None
    if not gated:
        return name or function
    return name if name and _is_plain_gate(module) else module._apply_gate


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


# ---- routers ---------------------------------------------------------------------------------------------------------


class Replaced(int):
    """How many routers :func:`replace_routers` replaced, and why it kept the others."""

    reasons: dict[str, str]  #: name of each router that was kept -> why

    def __new__(cls, count: int, reasons: dict[str, str] | None = None) -> Replaced:
        self = super().__new__(cls, count)
        self.reasons = {} if reasons is None else reasons
        return self


def replace_routers(model: torch.nn.Module) -> Replaced:
    """Replace the routers of `model` by the kernel of :func:`moealign.route`.

    One kernel then computes what Transformers computes with a softmax, a top-k, a sum, a division or more.  A router of
    any class is replaced if the operations of its own ``forward`` match one of the forms of :func:`moealign.route`, and
    if both choose the same experts for random rows (:mod:`moealign.integrations.router_forms`).  It returns logits
    ``[T, E]``, weights ``[T, k]`` and ids ``[T, k]`` in the dtypes of its own ``forward``, ids best first.

    Every call checks what the router's ``forward`` reads (``top_k``, ``norm_topk_prob``, a scale, a bias,
    ``training``); after a change, the router is recognised again.  The router's own ``forward`` runs if that fails;
    under autocast, on the meta device, for DTensors, in transforms of torch.func and with forward-mode gradients; and
    inside torch.compile if something changed since its last call outside.  A replaced router may be copied, pickled,
    moved, converted, and wrapped by accelerate's hooks or by FSDP2.  Replace routers before Transformers distributes a
    model.

    Returns:
        The number of replaced routers, an int, whose ``reasons`` name every router that was kept and why.  If none was
        replaced, a warning says so too.
    """
    count, reasons, forms = 0, {}, {}  # type: ignore[var-annotated]
    for name, module in model.named_modules():
        if not _is_router(module):
            continue
        attribute = "_old_forward" if "_old_forward" in vars(module) else "forward"  # accelerate calls the former
        present = vars(module).get(attribute)
        if isinstance(present, _Router):
            reasons[name] = "it is replaced already"
            continue
        own = getattr(present, "__func__", None) is type(module).forward
        if present is not None and not own:
            reasons[name] = "its forward is another library's; replace routers before it is wrapped"
            continue
        try:
            setattr(module, attribute, _Router(module, _form_of(module, forms)))
        except UnsupportedRouter as error:
            reasons[name] = str(error)
        else:
            count += 1
    if count == 0 and "it is replaced already" not in reasons.values():
        kept = "; ".join(f"{name or type(model).__name__}: {reason}" for name, reason in reasons.items())
        warnings.warn(
            f"replace_routers: expected a router that moealign.route can stand for in {type(model).__name__}, got "
            f"{kept or 'no module that routes by itself'}; the model is as it was",
            stacklevel=2,
        )
    return Replaced(count, reasons)


def restore_routers(model: torch.nn.Module) -> int:
    """Give the replaced routers of `model` their own ``forward`` back; returns how many."""
    count = 0
    for module in model.modules():
        for attribute in ("forward", "_old_forward"):
            if isinstance(vars(module).get(attribute), _Router):
                delattr(module, attribute)
                if attribute == "_old_forward":
                    setattr(module, attribute, types.MethodType(type(module).forward, module))
                count += 1
    return count


def _is_router(module: torch.nn.Module) -> bool:
    """Whether `module` may be a router; only then is its forward traced."""
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


def _form_of(module: torch.nn.Module, forms: dict[Any, list[RouterForm]]) -> RouterForm:
    """The form of `module`; `forms` caches those of similar layers."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    classes = tuple(type(each) for each in module.modules())
    similar = forms.setdefault((classes, tuple((name, each.shape) for name, each in tensors)), [])
    for form in similar:
        rows = torch.empty((0,) * form.dims, dtype=form.linear_dtypes[0])
        if form.fits(module, rows):
            return form
    similar.append(recognise(module))
    return similar[-1]


class _Router:
    """A router's ``forward``: :func:`moealign.route` while its form fits, else the router's own."""

    def __init__(self, module: torch.nn.Module, form: RouterForm | None) -> None:
        self.module, self.form = module, form
        self.failed: Any = None  #: the state of the router when it was last not recognised

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        special = kwargs or hidden_states.is_meta or _is_wrapper(hidden_states) or _is_transformed(hidden_states)
        if special or torch.is_autocast_enabled(hidden_states.device.type):
            return type(module).forward(module, hidden_states, *args, **kwargs)
        form = self.form
        if form is None or not form.fits(module, hidden_states):
            form = None if torch.compiler.is_compiling() else self._recognise(hidden_states, args)
        if form is None:
            return type(module).forward(module, hidden_states, *args)
        return form.run(module, hidden_states, args)

    def _recognise(self, hidden_states: Tensor, args: tuple[Any, ...]) -> RouterForm | None:
        module = self.module
        tensors = (*module.parameters(), *module.buffers(), hidden_states)
        plain = {name: each for name, each in vars(module).items() if isinstance(each, (bool, int, float, str))}
        state = (plain, [each.dtype for each in tensors], hidden_states.dim())
        if self.failed == state:
            return None
        try:
            self.form, self.failed = recognise(module, hidden_states, args), None
        except UnsupportedRouter:
            self.form, self.failed = None, state
        return self.form

    def __reduce__(self) -> Any:
        return _Router, (self.module, self.form)


def _is_wrapper(tensor: Tensor) -> bool:
    """Whether `tensor` is a subclass that wraps others, like DTensor or quantised tensors, but not a compiler's."""
    kind = type(tensor)
    if kind is Tensor or kind is torch.nn.Parameter or kind.__module__.startswith("torch._subclasses"):
        return False
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def _is_transformed(tensor: Tensor) -> bool:
    """Whether `tensor` is inside a transform of torch.func or carries a forward-mode gradient."""
    if torch.compiler.is_compiling():
        return False
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
