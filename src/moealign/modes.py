"""What PyTorch does around a call: tracing, transforming or observing it.

An eager call on plain tensors goes straight to a backend.  Every other call is one of the operators
``torch.ops.moealign.*``, which compilers, tracers, transforms and modes can follow:

==============================================  ====================================================================
``torch.compile``, ``torch.export``,            one operator in the graph; sizes by its fake
``make_fx``, FakeTensor, the meta device
``torch.jit.trace``                             one operator in the graph
autograd                                        the operator's own backward, itself made of operators
``torch.func`` (``grad``, ``vjp``, ``jvp``),    the operator's formula in torch's own operations
forward-mode AD
``torch.vmap``                                  one call a sample
FLOP counters                                   the products of the operator
==============================================  ====================================================================

Whether an operator records a gradient is decided when it runs (by its kernel for the Autograd key), not when it is
traced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import errors

__all__ = [
    "Refusal",
    "batched",
    "call",
    "checked",
    "differentiable",
    "flops",
    "followed",
    "forward_mode",
    "has_own_dispatch",
    "in_autocast_dtype",
    "is_batched_gradient",
    "readable",
    "refuse",
    "size",
    "traced",
    "transformed",
    "wants_gradient",
    "watched",
]

_is_compiling = torch.compiler.is_compiling
_is_dynamo = torch.compiler.is_dynamo_compiling  # other compilers bring a mode
_is_tracing = torch._C._is_tracing
_modes = torch._C._len_torch_dispatch_stack
_strided = torch.strided
_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", "privateuseone")
_AUTOCAST = frozenset(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))
_level = torch._C._functorch.maybe_current_level  # of torch.func and vmap


def followed() -> bool:
    """Whether a compiler, a tracer, a transform or a mode follows every call made now."""
    return _is_dynamo() or _modes() > 0 or _level() is not None or _is_tracing()


def watched(*tensors: Any) -> bool:
    """Whether a call must go through an operator: something follows it, or `tensors` are not plain memory."""
    if followed():
        return True
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) is not Tensor:
            if not isinstance(tensor, Tensor):
                continue
            if has_own_dispatch(tensor):
                return True
        if tensor.is_meta or tensor.layout is not _strided or tensor.is_nested or tensor.is_neg():
            return True
    return False


def has_own_dispatch(tensor: Any) -> bool:
    """Whether `tensor` is of a subclass that intercepts operators; a Parameter is not."""
    if type(tensor) is Tensor or not isinstance(tensor, Tensor):
        return False
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def forward_mode() -> bool:
    """Whether tensors may carry tangents: inside ``forward_ad.dual_level`` or ``torch.func.jvp``."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether ``torch.func``, ``vmap`` or forward-mode AD is active."""
    return _level() is not None or forward_mode()


def traced() -> bool:
    """Whether operations are recorded, or run without data: ``torch.jit.trace``, ``make_fx``, fake tensors."""
    if _is_dynamo():
        return False
    keys = torch._C._TorchDispatchModeKey
    return _is_tracing() or any(torch._C._get_dispatch_mode(key) is not None for key in (keys.PROXY, keys.FAKE))


def readable(tensor: Tensor) -> bool:
    """Whether the host can read the values of `tensor`, also inside transforms."""
    if _is_compiling() or _is_tracing() or _modes():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    return not (has_own_dispatch(tensor) or tensor.is_meta)


#: Whether a tensor is a batch of gradients of ``torch.autograd.grad(..., is_grads_batched=True)``.
is_batched_gradient = torch._C._functorch.is_legacy_batchedtensor


def wants_gradient(*tensors: Any) -> bool:
    """Whether autograd records operations on one of `tensors`."""
    if torch.is_grad_enabled():
        for each in tensors:
            if isinstance(each, Tensor) and each.requires_grad:
                return True
    return False


def in_autocast_dtype(*tensors: Any) -> tuple[Any, ...]:
    """`tensors` as autocast passes them to a matrix product: in its dtype, except for float64, FP8 and non-tensors."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    kind = tensors[0].device.type
    if kind not in _AUTOCAST or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        each.to(dtype)
        if isinstance(each, Tensor) and each.is_floating_point() and each.dtype.itemsize in (2, 4)
        else each
        for each in tensors
    )


# ---- refusals --------------------------------------------------------------------------------------------------------


class Refusal(NamedTuple):
    """An error found while a graph was traced; the graph raises it when it runs."""

    kind: str
    message: str


def checked(check: Callable[..., Any], *args: Any) -> Any:
    """``check(*args)`` under any tracer.  Under Dynamo its error is returned as a :class:`Refusal`; under
    ``torch.jit.trace`` sizes are numbers, not traced tensors."""
    if _is_compiling():
        try:
            return check(*args)
        except errors.MoealignError as error:
            return Refusal(type(error).__name__, error.args[0])
    if not _is_tracing():
        return check(*args)
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return check(*args)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def size(tensor: Tensor, axis: int) -> int:
    """``tensor.shape[axis]``, a number under ``torch.jit.trace`` too."""
    if _is_compiling() or not _is_tracing():
        return tensor.shape[axis]
    number: int = checked(tensor.size, axis)
    return number


def refuse(refusal: Refusal, outputs: int = 1) -> list[Tensor]:
    """Call the operator that raises `refusal`; it stands for one with `outputs` results."""
    result: list[Tensor] = torch.ops.moealign.refuse(refusal.kind, refusal.message, outputs)
    return result


def call(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``operator(*args, **kwargs)``; a tensor subclass without a rule for it is refused by name."""
    if _is_compiling():
        return operator(*args, **kwargs)
    if _modes():
        _register_with_flop_counters()
    try:
        return operator(*args, **kwargs)
    except (NotImplementedError, TypeError) as error:
        values = [part for each in (*args, *kwargs.values()) for part in (each if isinstance(each, tuple) else (each,))]
        kinds = sorted({type(each).__name__ for each in values if has_own_dispatch(each)})
        if not kinds or isinstance(error, errors.MoealignError):
            raise
        raise errors.InvalidType(
            f"expected plain tensors, got {', '.join(kinds)}, which has no rule for moealign's operators ({error}); "
            "convert it first: dequantize it, or take its local or inner tensor"
        ) from error


# ---- operators -------------------------------------------------------------------------------------------------------

_library = torch.library.Library("moealign", "DEF")
_library.define("refuse(str kind, str message, int outputs) -> Tensor[]")


def _refuse(kind: str, message: str, outputs: int) -> list[Tensor]:
    raise getattr(errors, kind)(message)


def _fake_refuse(kind: str, message: str, outputs: int) -> list[Tensor]:
    return [torch.empty(0) for _ in range(outputs)]


_library.impl("refuse", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake("moealign::refuse", _fake_refuse, lib=_library)


def differentiable(
    library: torch.library.Library,
    name: str,
    formula: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    *,
    forward: Callable[..., Any] | None = None,
    takes: Callable[..., bool] | None = None,
) -> None:
    """Register the derivatives of operator `name`.

    Args:
        formula: computes the operator from differentiable operations.  It replaces the operator inside transforms and,
            if there is no `backward`, wherever a gradient is needed.
        save: ``(ctx, inputs, output)``, stores what the backward needs.
        backward: ``(ctx, *gradients of the outputs)``, a gradient or None for each input, by differentiable operations.
        forward: computes the result, first, and what `save` needs beside it; by default the operator itself does.
        takes: whether `forward` and `backward` take these inputs; by default always.  Otherwise `formula` does.
    """
    operator = getattr(torch.ops.moealign, name).default

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                result = (forward or operator)(*args)
            assert save is not None
            save(ctx, args, result)
            return result if forward is None else result[0]

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            assert backward is not None
            return backward(ctx, *gradients)

    Recorded.__name__ = Recorded.__qualname__ = f"moealign_{name}"

    def kernel(*args: Any) -> Any:
        if transformed():
            return formula(*args)
        if wants_gradient(*args):
            if backward is None or not (takes is None or takes(*args)):
                return formula(*args)
            return Recorded.apply(*args)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    library.impl(name, kernel, "Autograd")


def batched(library: torch.library.Library, name: str) -> None:
    """Let ``vmap`` call operator `name` once per sample."""
    operator = getattr(torch.ops.moealign, name).default

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        pairs = list(zip(args, in_dims, strict=True))  # of a list of numbers, the second is a list of None
        results = [
            operator(*(each if type(dim) is not int else each.select(dim, i) for each, dim in pairs))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(list(each)) for each in zip(*results, strict=True)]
        return (stacked, [0] * len(stacked)) if isinstance(results[0], list) else (tuple(stacked), (0,) * len(stacked))

    torch.library.register_vmap(f"moealign::{name}", rule, lib=library)


_FLOPS: dict[Any, Callable[..., int]] = {}


def flops(name: str, formula: Callable[..., int]) -> None:
    """Let FLOP counters count operator `name`; `formula` takes shapes in place of tensors."""
    _FLOPS[getattr(torch.ops.moealign, name)] = formula
    module = sys.modules.get(_COUNTER)
    if module is not None:
        module.register_flop_formula(getattr(torch.ops.moealign, name))(formula)


_COUNTER = "torch.utils.flop_counter"  # importing it imports Triton, so it is used only if already imported


def _register_with_flop_counters() -> None:
    """Add our formulas to the active FLOP counters."""
    module = sys.modules.get(_COUNTER)
    if module is None:
        return
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):
            for operator, formula in _FLOPS.items():
                counter.flop_registry.setdefault(operator, module.shape_wrapper(formula))
