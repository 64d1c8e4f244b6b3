"""Replace a model's routers by :func:`moealign.route`, and let them repeat recorded choices."""

from __future__ import annotations

import contextlib
import inspect
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput, InvalidType
from .router_forms import RouterForm, UnsupportedRouter, recognise

__all__ = ["Replaced", "is_wrapper", "replace_routers", "replay", "restore_routers"]

_REPLACED = "it is replaced already"


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
            reasons[name] = _REPLACED
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
    if count == 0 and _REPLACED not in reasons.values():
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


@contextlib.contextmanager
def replay(model: torch.nn.Module, topk_ids: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, the routers of `model` choose `topk_ids`, in order, instead of what their logits say.

    The weights are those that the model's own logits give to these choices, and so are the gradients.  This is routing
    replay for reinforcement learning: an engine generates with one precision, the trainer repeats its choices::

        with moealign.capture(generator, padding="keep") as recording:
            ...
        with replay(model, recording.topk_ids):
            loss = model(...)
            loss.backward()

    A router takes the next tokens at each call; during a backward pass (gradient checkpointing) it takes those of its
    last call again.  Routers that are not replaced yet are replaced for the time of the block.

    Args:
        topk_ids: ids ``[tokens, k]`` by layer, such as ``Capture.topk_ids``; a layer is a router or experts beside it.

    Raises:
        InvalidInput: a layer has no router that :func:`replace_routers` takes; another k; other numbers of tokens than
            the model was called with.
        InvalidType: ids are not integers.
    """
    replaced = [name for name, router in _routers_of(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reasons = replace_routers(model).reasons
    routers = dict(_routers_of(model))
    try:
        given = {}
        for layer, ids in topk_ids.items():
            name = layer if layer in routers else _sibling(layer, routers)
            if name is None or name in given:
                others = (each for each in reasons.items() if each[1] != _REPLACED)
                why = "; ".join(": ".join(each) for each in others) or "none beside it"
                raise InvalidInput(f"replay: expected a router for {layer}, got {why}")
            given[name] = _Choices(layer, ids, routers[name])
        missing = sorted(set(routers) - set(given))
        if missing:
            raise InvalidInput(f"replay: expected ids for every router, got none for {', '.join(missing)}")
        for name, choices in given.items():
            routers[name].choices = choices
        yield
        for choices in given.values():
            choices.finish()
    finally:
        for name, router in routers.items():
            router.choices = None
            if name not in replaced:
                restore_routers(model.get_submodule(name))


def _routers_of(model: torch.nn.Module) -> list[tuple[str, _Router]]:
    """The replaced routers by name."""
    found = []
    for name, module in model.named_modules():
        for attribute in ("forward", "_old_forward"):
            router = vars(module).get(attribute)
            if isinstance(router, _Router):
                found.append((name, router))
    return found


def _sibling(layer: str, routers: Mapping[str, _Router]) -> str | None:
    """The only router below the parent of `layer`."""
    parent = layer.rpartition(".")[0]
    near = [name for name in routers if name.rpartition(".")[0] == parent]
    return near[0] if len(near) == 1 else None


class _Choices:
    """The recorded ids of one layer, handed out in order."""

    def __init__(self, layer: str, ids: Any, router: _Router) -> None:
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype is torch.bool:
            got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise InvalidType(f"replay: expected integers as ids of {layer}, got {got}")
        top_k = router.form.top_k if router.form is not None else None
        if ids.dim() != 2 or ids.shape[1] != top_k:
            raise InvalidInput(f"replay: expected ids [tokens, {top_k}] of {layer}, got {list(ids.shape)}")
        self.layer, self.ids = layer, ids
        self.start = self.end = 0  #: the tokens of the last call

    @torch.compiler.disable
    def __call__(self, tokens: int) -> Tensor:
        if torch._C._current_graph_task_id() == -1:  # not inside a backward pass, which repeats the last call
            self.start, self.end = self.end, self.end + tokens
        if self.end > len(self.ids) or self.end - self.start != tokens:
            raise InvalidInput(
                f"replay: expected at most {len(self.ids)} tokens for {self.layer}, as were recorded, got "
                f"{self.start + tokens}; record with padding='keep' if the model is called with padding"
            )
        return self.ids[self.start : self.end]

    def finish(self) -> None:
        if self.end != len(self.ids):
            raise InvalidInput(
                f"replay: expected {len(self.ids)} tokens for {self.layer}, as were recorded, got {self.end}"
            )


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
        self.choices: _Choices | None = None  #: what to replay

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        special = kwargs or hidden_states.is_meta or is_wrapper(hidden_states) or _is_transformed(hidden_states)
        if special or (self.choices is None and torch.is_autocast_enabled(hidden_states.device.type)):
            form = None
        else:
            form = self.form
            if form is None or not form.fits(module, hidden_states):
                form = None if torch.compiler.is_compiling() else self._recognise(hidden_states, args)
        if form is not None:
            return form.run(module, hidden_states, args, self.choices)
        if self.choices is not None:
            raise InvalidInput(
                f"replay: expected a call of {type(module).__name__} that moealign.route can stand for, got one with "
                "keywords, a subclass of Tensor, a transform of torch.func, or settings that it does not know"
            )
        return type(module).forward(module, hidden_states, *args, **kwargs)

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


def is_wrapper(tensor: Tensor) -> bool:
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
