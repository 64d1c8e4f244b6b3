"""Run a router's own ``forward`` on stand-ins and record what it reads and computes.

:func:`stand_in` copies a module with random tensors on the CPU and records every attribute that its ``forward`` reads.
:class:`ExpressionRecorder` records for every tensor the expression that made it: nested tuples, whose first element
names the operation.
"""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "Expression",
    "ExpressionRecorder",
    "Path",
    "UnsupportedRouter",
    "normal",
    "read_attribute",
    "same_value",
    "stand_in",
    "unknown_operation",
]

Expression = tuple[Any, ...]
Path = tuple[str, ...]  #: names of attributes, from the module down

_MISSING = "<no such attribute>"
_COMPARABLE = (bool, int, float, str, type(None), torch.dtype, list, tuple, dict)


class UnsupportedRouter(Exception):
    """The router computes something that :func:`moealign.route` does not; the message says what."""


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal float32 values on the CPU, whatever the default device."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


# ---- what the forward reads ------------------------------------------------------------------------------------------


def read_attribute(module: Any, path: Path) -> Any:
    """The value at `path`, or a marker if there is none."""
    for part in path:
        module = getattr(module, part, _MISSING)
    return module


def same_value(now: Any, before: Any) -> bool:
    """Whether a recorded value is unchanged: the same object, or an equal plain value of the same type."""
    return now is before or (isinstance(before, _COMPARABLE) and type(now) is type(before) and now == before)


class _RecordedObject:
    """An object other than a module or a tensor, for example a config, whose reads are recorded."""

    def __init__(self, value: Any, path: Path, reads: dict[Path, Any]) -> None:
        self.__dict__.update(_value=value, _path=path, _reads=reads)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._value, name, _MISSING)
        result = _recorded(value, (*self._path, name), self._reads)
        if value is _MISSING:
            raise AttributeError(name)
        return result


def _recorded(value: Any, path: Path, reads: dict[Path, Any]) -> Any:
    if isinstance(value, (*_COMPARABLE, type)) or callable(value):
        reads[path] = value
        return value
    return _RecordedObject(value, path, reads)


_OF_EVERY_MODULE = set(vars(nn.Module())) - {"training"}
_WRAPPERS = ("forward", "_old_forward", "_hf_hook")


def stand_in(module: nn.Module, path: Path, reads: dict[Path, Any], tensors: dict[str, Tensor]) -> Any:
    """A copy of `module` with random tensors.

    Args:
        module: the module.
        path: where it is below the router.
        reads: receives path and value of every attribute that is read from the copy.
        tensors: receives the random tensors by their dotted names.

    Raises:
        UnsupportedRouter: a module below the router has hooks.
    """

    def getattribute(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("__") or name in _OF_EVERY_MODULE:
            return value
        if isinstance(value, (types.MethodType, Tensor)):
            return value
        return _recorded(value, (*path, name), reads)

    def getattr_(self: Any, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            missing = (*path, name)
            reads[missing] = _MISSING
            raise

    if path and (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)):
        raise UnsupportedRouter(f"expected {'.'.join(path)} to run its own forward without hooks, got hooks")
    methods = {"__getattribute__": getattribute, "__getattr__": getattr_}
    copy: Any = object.__new__(type(type(module).__name__, (type(module),), methods))
    attributes = {name: value for name, value in vars(module).items() if name not in _WRAPPERS}
    for group in ("_parameters", "_buffers"):
        attributes[group] = {
            name: _random_like(value, (*path, name), tensors) for name, value in attributes[group].items()
        }
    for name, value in list(attributes.items()):
        if isinstance(value, Tensor):
            attributes[name] = _random_like(value, (*path, name), tensors)
    attributes["_modules"] = {
        name: child if child is None else stand_in(child, (*path, name), reads, tensors)
        for name, child in attributes["_modules"].items()
    }
    object.__getattribute__(copy, "__dict__").update(attributes)
    return copy


def _random_like(value: Tensor | None, path: Path, tensors: dict[str, Tensor]) -> Tensor | None:
    if value is None:
        return None
    if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
        made = torch.zeros(value.shape, dtype=value.dtype, device="cpu")
    else:
        generator = torch.Generator("cpu").manual_seed(len(tensors))
        spread = 1 / math.sqrt(max(1, value.shape[-1])) if value.dim() == 2 else 0.1
        made = (normal(value.shape, generator) * spread).to(value.dtype)
    tensors[".".join(path)] = made
    return made


# ---- what the forward computes ---------------------------------------------------------------------------------------


class ExpressionRecorder(TorchDispatchMode):
    """While active, records the expression of every tensor; an operation it does not know is ``("unknown", name)``."""

    def __init__(self, inputs: list[tuple[Tensor, Expression]]) -> None:
        super().__init__()
        self.recorded = {id(tensor): (tensor, expression) for tensor, expression in inputs}

    def of(self, value: Any) -> Any:
        """The expression of a tensor; any other value is its own."""
        if not isinstance(value, Tensor):
            return value
        return self.recorded.get(id(value), (None, ("unknown", "a tensor that is not its own")))[1]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            raise UnsupportedRouter("its forward depends on values of tensors")
        inputs = [self.of(each) for each in args]
        aliases = self._aliases(args[0]) if name.endswith("_") and isinstance(args[0], Tensor) else []
        if any(each.shape != args[0].shape or each.stride() != args[0].stride() for each in aliases):
            expression: Any = ("unknown", name)  # changes a part of another tensor
        else:
            expression = _expression(name.rstrip("_"), args, inputs, kwargs or {}, result)
        results = result if isinstance(result, tuple) else (result,)
        for i, each in enumerate((*results, *aliases)):
            if isinstance(each, Tensor):
                if isinstance(expression, list):
                    self.recorded[id(each)] = (each, expression[i])
                else:
                    self.recorded[id(each)] = (each, expression if len(results) == 1 else ("unknown", name))
        return result

    def _aliases(self, target: Tensor) -> list[Tensor]:
        """The recorded tensors that share the memory of `target`."""
        start = target.untyped_storage().data_ptr()
        return [each for each, _ in self.recorded.values() if each.untyped_storage().data_ptr() == start]


_SAME = {"clone", "detach", "alias", "contiguous", "lift_fresh"}
_VIEWS = {"view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand"}


def _expression(name: str, args: Any, x: list[Any], options: dict[str, Any], result: Any) -> Any:
    """The expression of `result`, a list for several; `x` are the expressions of `args`."""
    if name in _SAME:
        return x[0]
    if name in _VIEWS:
        if x[0][0] == "selected" or result.shape[-1:] == args[0].shape[-1:]:
            return x[0]
        grouped = result.dim() == 3 and args[0].dim() == 2 and len(args[0]) == len(result)
        return ("groups", x[0], result.shape[1]) if grouped else ("unknown", name)
    if name in ("t", "transpose", "permute") and args[0].dim() == 2 and result.shape == args[0].shape[::-1]:
        return ("t", x[0])
    if name == "linear":
        return ("linear", x[0], ("t", x[1]), x[2] if len(x) > 2 else None)
    if name == "mm":
        return ("linear", x[0], x[1], None)
    if name == "addmm" and not options:
        return ("linear", x[1], x[2], x[0])
    if name == "_to_copy":
        if x[0][0] == "selected" or result.dtype == args[0].dtype:
            return x[0]
        return ("cast", x[0], result.dtype)
    last = args[0].dim() - 1 if args and isinstance(args[0], Tensor) else -1
    dim = args[1] if len(args) > 1 and isinstance(args[1], int) else -1
    if name == "_softmax" and dim in (-1, last):
        return ("softmax", x[0], result.dtype)
    if name == "sigmoid":
        return ("sigmoid", x[0], result.dtype)
    if name == "softplus" and len(args) == 1 and not options:
        return ("softplus", x[0], result.dtype)
    if name == "sqrt" and x[0][0] == "softplus":
        return ("sqrtsoftplus", *x[0][1:])
    if name == "topk":
        arguments = dict(zip(("k", "dim", "largest", "sorted"), args[1:], strict=False)) | options
        if arguments.get("dim", -1) in (-1, last) and arguments.get("largest", True):
            return [("top_values", x[0], arguments["k"]), ("top_ids", x[0], arguments["k"])]
    if name == "max" and isinstance(result, tuple) and dim in (-1, last):
        return [("top_values", x[0], 1), ("top_ids", x[0], 1)]
    if name == "amax" and args[1:2] in (([-1],), ([last],)):
        return ("top_values", x[0], 1)
    if name == "gather" and dim in (-1, last):
        return ("gather", x[0], x[2])
    if name == "sum" and len(args) > 1 and list(args[1]) in ([-1], [last]):
        return ("sum", x[0])
    if name in ("add", "mul", "div") and not options and len(args) == 2:
        return (name, x[0], x[1])
    if name in ("clamp", "clamp_min") and len(args) + len(options) == 2:
        return ("clamp_min", x[0], options.get("min", x[-1]))
    if name in ("zeros_like", "new_zeros", "zeros"):
        return ("zeros",)
    if name == "scatter" and x[0] == ("zeros",) and dim in (-1, last) and args[3] == 1:
        return ("selected", x[2])
    if name in ("bitwise_not", "logical_not") and x[0][0] == "selected":
        return ("not_selected", x[0][1])
    if name == "masked_fill" and x[1][:1] == ("not_selected",):
        return ("fill_others", x[0], x[1][1], float(args[2]))
    return ("unknown", name)


def unknown_operation(expression: Any) -> str | None:
    """The first operation in `expression` that is not known."""
    if not isinstance(expression, tuple):
        return None
    if expression[:1] == ("unknown",):
        return str(expression[1])
    return next((name for each in expression if (name := unknown_operation(each)) is not None), None)
