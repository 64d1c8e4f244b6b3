"""What a router computes: read from the operations of its own ``forward``, not from the name of its class.

:func:`recognise` runs the router's own ``forward`` on stand-ins (random rows, random weights of the same shapes and
dtypes, on the CPU) and writes down, for every tensor, the expression that made it.  If logits, weights and ids come out
as :func:`moealign.route` would make them, the result is a :class:`Plan`; otherwise :class:`Unlike` says what is
different.  Every number, flag and function that the ``forward`` reads on the way is part of the plan, so that
:meth:`Plan.fits` sees a later change of any of them.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Plan", "Unlike", "recognise"]

ROWS = 64
SCALES = (0.05, 1.0, 4.0)  # of the rows: flat, ordinary and peaked scores
TINY = 1e-12  # what a sum may be kept from zero by
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

Expression = tuple[Any, ...]


class Unlike(Exception):
    """The router computes something that :func:`moealign.route` does not; the message says what."""


@dataclass(frozen=True)
class Plan:
    """A router as arguments of ``torch.ops.moealign.route``, and what that was concluded from."""

    facts: tuple[tuple[tuple[str, ...], Any], ...]  #: paths below the module and the values that were read there
    dtypes: tuple[tuple[str, torch.dtype], ...]  #: of the tensors below the module that are used
    dims: int  #: of the hidden states
    weight: str  #: path of the tensor
    linear_bias: str | None
    linear_dtypes: tuple[torch.dtype, torch.dtype]  #: what rows come in and what they are multiplied in
    correction: str | int | None  #: path of the tensor, or position of the argument
    top_k: int
    scoring: str
    renormalize: bool
    num_groups: int
    topk_groups: int
    scale: float
    out_dtypes: tuple[torch.dtype, ...]  #: of logits, weights and ids
    order: tuple[int, ...]  #: which of logits, weights and ids comes first, second, third

    def fits(self, module: nn.Module, hidden_states: Tensor) -> bool:
        """Whether everything that the plan was concluded from is as it was."""
        if hidden_states.dtype != self.linear_dtypes[0] or hidden_states.dim() != self.dims:
            return False
        for name, dtype in self.dtypes:
            if tensor_at(module, name).dtype != dtype:
                return False
        return all(_same(_at(module, path), value) for path, value in self.facts)

    def roles(self, made: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, weights and ids of what the router returns."""
        logits, weights, ids = (made[self.order.index(role)] for role in range(3))
        return logits, weights, ids

    def run(self, module: nn.Module, hidden_states: Tensor, more: tuple[Any, ...] = ()) -> tuple[Tensor, ...]:
        """Logits, weights and ids, in the order and the dtypes of the router's own."""
        dtype = self.linear_dtypes[1]
        rows = hidden_states.reshape(-1, hidden_states.shape[-1]).to(dtype)
        bias = None if self.linear_bias is None else tensor_at(module, self.linear_bias).to(dtype)
        logits = torch.nn.functional.linear(rows, tensor_at(module, self.weight).to(dtype), bias)
        correction = None
        if self.correction is not None:
            place = self.correction
            correction = (more[place] if isinstance(place, int) else tensor_at(module, place)).reshape(-1)
        weights, ids, _ = torch.ops.moealign.route(
            logits, self.top_k, self.scoring, self.renormalize, correction, self.num_groups, self.topk_groups,
            self.scale, None, False, None,
        )  # fmt: skip
        of_logits, of_weights, of_ids = self.out_dtypes
        made = (logits.to(of_logits), weights.to(of_weights), ids.to(of_ids))
        return tuple([made[role] for role in self.order])


_MISSING = "<no such attribute>"
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def tensor_at(module: nn.Module, name: str) -> Tensor:
    found = module
    for part in name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[return-value]


def _at(module: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        module = getattr(module, part, _MISSING)
    return module


def _same(now: Any, then: Any) -> bool:
    return now is then or (isinstance(then, (*_PLAIN, list, tuple, dict)) and type(now) is type(then) and now == then)


# ---- what the forward reads ------------------------------------------------------------------------------------------


class _Reads:
    """An object other than a module or a tensor, say a config: what is read from it is written down."""

    def __init__(self, value: Any, path: tuple[str, ...], facts: dict[tuple[str, ...], Any]) -> None:
        self.__dict__.update(_value=value, _path=path, _facts=facts)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._value, name, _MISSING)
        result = _written(value, (*self._path, name), self._facts)
        if value is _MISSING:
            raise AttributeError(name)
        return result


def _written(value: Any, path: tuple[str, ...], facts: dict[tuple[str, ...], Any]) -> Any:
    if isinstance(value, (*_PLAIN, list, tuple, dict, type)) or callable(value):
        facts[path] = value
        return value
    return _Reads(value, path, facts)


_OF_EVERY_MODULE = set(vars(nn.Module())) - {"training"}
_WRAPPERS = ("forward", "_old_forward", "_hf_hook")


def _stand_in(module: nn.Module, path: tuple[str, ...], facts: dict[Any, Any], tensors: dict[str, Tensor]) -> Any:
    """The module without its tensors: of random values instead, and telling `facts` what is read from it."""

    def read(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("__") or name in _OF_EVERY_MODULE:
            return value
        if isinstance(value, (types.MethodType, Tensor)):
            return value
        return _written(value, (*path, name), facts)

    def find(self: Any, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            missing = (*path, name)
            facts[missing] = _MISSING
            raise

    if path and (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)):
        raise Unlike(f"expected {'.'.join(path)} to run its own forward without hooks, got hooks")
    copy: Any = object.__new__(
        type(type(module).__name__, (type(module),), {"__getattribute__": read, "__getattr__": find})
    )
    kept = {name: value for name, value in vars(module).items() if name not in _WRAPPERS}
    for group in ("_parameters", "_buffers"):
        kept[group] = {name: _random(value, (*path, name), tensors) for name, value in kept[group].items()}
    for name, value in list(kept.items()):
        if isinstance(value, Tensor):
            kept[name] = _random(value, (*path, name), tensors)
    kept["_modules"] = {
        name: child if child is None else _stand_in(child, (*path, name), facts, tensors)
        for name, child in kept["_modules"].items()
    }
    object.__getattribute__(copy, "__dict__").update(kept)
    return copy


def _random(value: Tensor | None, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Tensor | None:
    if value is None:
        return None
    if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
        made = torch.zeros(value.shape, dtype=value.dtype, device="cpu")
    else:
        generator = torch.Generator("cpu").manual_seed(len(tensors))
        spread = 1 / math.sqrt(max(1, value.shape[-1])) if value.dim() == 2 else 0.1
        made = (_normal(value.shape, generator) * spread).to(value.dtype)
    tensors[".".join(path)] = made
    return made


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


# ---- what the forward computes ---------------------------------------------------------------------------------------


class _Written(TorchDispatchMode):
    """Every tensor's expression.  What is not understood is ``("?", the operation)``."""

    def __init__(self, known: list[tuple[Tensor, Expression]]) -> None:
        super().__init__()
        self.known = {id(tensor): (tensor, expression) for tensor, expression in known}

    def of(self, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        return self.known.get(id(tensor), (None, ("?", "a tensor that is not its own")))[1]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            raise Unlike("its forward depends on values of tensors")
        inputs = [self.of(each) for each in args]
        aliases = self._aliases(args[0]) if name.endswith("_") and isinstance(args[0], Tensor) else []
        if any(each.shape != args[0].shape or each.stride() != args[0].stride() for each in aliases):
            made: Any = ("?", name)  # a part of another tensor changes
        else:
            made = _expression(name.rstrip("_"), args, inputs, kwargs or {}, result)
        several = result if isinstance(result, tuple) else (result,)
        for place, each in enumerate((*several, *aliases)):
            if isinstance(each, Tensor):
                told = made[place] if isinstance(made, list) else made if len(several) == 1 else ("?", name)
                self.known[id(each)] = (each, told)
        return result

    def _aliases(self, target: Tensor) -> list[Tensor]:
        """The tensors that change with this one."""
        start = target.untyped_storage().data_ptr()
        return [each for each, _ in self.known.values() if each.untyped_storage().data_ptr() == start]


_SAME = {"clone", "detach", "alias", "contiguous", "lift_fresh"}
_VIEWS = {"view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand"}


def _expression(name: str, args: Any, x: list[Any], options: dict[str, Any], result: Any) -> Any:
    """The expression of `result`; a list where there are several."""
    if name in _SAME:
        return x[0]
    if name in _VIEWS:
        if x[0][0] == "hit" or result.shape[-1:] == args[0].shape[-1:]:
            return x[0]
        grouped = result.dim() == 3 and args[0].dim() == 2 and len(args[0]) == len(result)
        return ("groups", x[0], result.shape[1]) if grouped else ("?", name)
    if name in ("t", "transpose", "permute") and args[0].dim() == 2 and result.shape == args[0].shape[::-1]:
        return ("t", x[0])
    if name == "linear":
        return ("linear", x[0], ("t", x[1]), x[2] if len(x) > 2 else None)
    if name == "mm":
        return ("linear", x[0], x[1], None)
    if name == "addmm" and not options:
        return ("linear", x[1], x[2], x[0])
    if name == "_to_copy":
        if x[0][0] == "hit" or result.dtype == args[0].dtype:
            return x[0]
        return ("cast", x[0], result.dtype)
    last = args[0].dim() - 1 if args and isinstance(args[0], Tensor) else -1
    dim = args[1] if len(args) > 1 and isinstance(args[1], int) else -1
    if name == "_softmax" and dim in (-1, last):
        return ("softmax", x[0], result.dtype)
    if name == "sigmoid":
        return ("sigmoid", x[0], result.dtype)
    if name == "topk":
        given = dict(zip(("k", "dim", "largest", "sorted"), args[1:], strict=False)) | options
        if given.get("dim", -1) in (-1, last) and given.get("largest", True):
            return [("top", x[0], given["k"]), ("which", x[0], given["k"])]
    if name == "max" and isinstance(result, tuple) and dim in (-1, last):
        return [("top", x[0], 1), ("which", x[0], 1)]
    if name == "amax" and args[1:2] in (([-1],), ([last],)):
        return ("top", x[0], 1)
    if name == "gather" and dim in (-1, last):
        return ("gather", x[0], x[2])
    if name == "sum" and len(args) > 1 and list(args[1]) in ([-1], [last]):
        return ("sum", x[0])
    if name in ("add", "mul", "div") and not options and len(args) == 2:
        return (name, x[0], x[1])
    if name in ("clamp", "clamp_min") and len(args) + len(options) == 2:
        return ("at least", x[0], options.get("min", x[-1]))
    if name in ("zeros_like", "new_zeros", "zeros"):
        return ("zeros",)
    if name == "scatter" and x[0] == ("zeros",) and dim in (-1, last) and args[3] == 1:
        return ("hit", x[2])
    if name in ("bitwise_not", "logical_not") and x[0][0] == "hit":
        return ("not", x[0])
    if name == "masked_fill" and x[1][:1] == ("not",):
        return ("keep", x[0], x[1][1][1], float(args[2]))
    return ("?", name)


def _unknown(expression: Any) -> str | None:
    """The first operation in `expression` that is not understood."""
    if not isinstance(expression, tuple):
        return None
    if expression[:1] == ("?",):
        return str(expression[1])
    return next((found for each in expression if (found := _unknown(each)) is not None), None)


# ---- which of route's forms it is ------------------------------------------------------------------------------------


def recognise(module: nn.Module, hidden_states: Tensor | None = None, more: tuple[Any, ...] = ()) -> Plan:
    """The plan of `module` for hidden states and further arguments like these; by default, for what it will get.

    Raises:
        Unlike: it is none of the forms of :func:`moealign.route`.
    """
    weights = [each for each in _floats(module) if each.dim() == 2]
    if not weights:
        raise Unlike("expected a weight of two dimensions, got none")
    experts, width = weights[0].shape
    dtype = weights[0].dtype if hidden_states is None else hidden_states.dtype
    forward = type(module).forward
    if hidden_states is None:
        wanted = [
            each for each in list(inspect.signature(forward).parameters.values())[2:]
            if each.default is each.empty and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        ]  # fmt: skip
        more = tuple(torch.zeros(experts, device="cpu") for _ in wanted)
    shapes = [(ROWS, width), (2, ROWS // 2, width)]
    if hidden_states is not None:
        shapes = [shapes[hidden_states.dim() == 3]]
    said: list[Exception] = []
    for shape in shapes:
        try:
            with torch.inference_mode(False), torch.no_grad():
                noise = torch.Generator("cpu").manual_seed(7)
                rows = _normal(shape, noise).to(dtype)
                return _recognise(module, rows, tuple(_like(each, noise) for each in more))
        except Unlike as error:
            said.append(error)
        except Exception as error:  # of the router's own forward, or a refusal by route
            said.append(Unlike(f"{type(error).__name__}: {error}".splitlines()[0]))
    raise said[0]


def _like(given: Any, generator: torch.Generator) -> Any:
    """A stand-in for a further argument."""
    return (_normal(given.shape, generator) * 0.1).to(given.dtype) if isinstance(given, Tensor) else given


def _floats(module: nn.Module) -> list[Tensor]:
    return [each for each in (*module.parameters(), *module.buffers()) if each.dtype.is_floating_point]


def _recognise(module: nn.Module, rows: Tensor, more: tuple[Any, ...]) -> Plan:
    facts: dict[tuple[str, ...], Any] = {}
    tensors: dict[str, Tensor] = {}
    stand_in = _stand_in(module, (), facts, tensors)
    known: list[tuple[Tensor, Expression]] = [(each, ("tensor", name)) for name, each in tensors.items()]
    known += [(each, ("argument", place)) for place, each in enumerate(more) if isinstance(each, Tensor)]
    forward: Callable[..., Any] = type(module).forward
    with _Written([(rows, ("rows",)), *known]) as written, torch.autocast("cpu", enabled=False):
        result = forward(stand_in, rows, *more)
        if not isinstance(result, tuple) or len(result) != 3 or not all(isinstance(each, Tensor) for each in result):
            raise Unlike("expected logits, weights and ids from its forward, got something else")
        expressions = [written.of(each) for each in result]
    order = _order(result, expressions)
    plan = _plan(
        [expressions[place] for place in order],
        [result[place] for place in order],
        order,
        rows,
        tensors,
        more,
        tuple(facts.items()),
    )
    for scale in SCALES:
        _check(plan, forward, stand_in, rows * scale, more)
    _check_gradients(plan, forward, stand_in, rows, more)
    return plan


def _order(result: tuple[Tensor, ...], expressions: list[Any]) -> list[int]:
    """Where logits, weights and ids are: a product of the rows, something made of it, and integers."""
    integers = [place for place, each in enumerate(result) if not each.is_floating_point()]
    products = [place for place, each in enumerate(expressions) if _raised(each)[0] == "linear"]
    if len(integers) == len(products) == 1:
        return [products[0], 3 - products[0] - integers[0], integers[0]]
    return [0, 1, 2]


def _plan(
    expressions: list[Any], result: list[Tensor], order: list[int], rows: Tensor, tensors: dict[str, Tensor],
    more: tuple[Any, ...], facts: tuple[Any, ...],
) -> Plan:  # fmt: skip
    logits, weights, ids = expressions
    for expression in (ids, weights, logits):
        unknown = _unknown(expression)
        if unknown is not None:
            raise Unlike(f"expected the operations of moealign.route, got {unknown}")
    if logits[0] == "cast":
        logits = logits[1]
    match logits:
        case ("linear", x, ("t", w), b):
            pass
        case ("linear", x, ("cast", ("t", w), dtype), b):
            w = ("cast", w, dtype)
        case _:
            raise Unlike("expected a product of rows and weight as logits, got something else")
    within = rows.dtype
    names: list[str | None] = []
    for each in (x, w, b):
        match each:
            case ("cast", inner, dtype):
                within = dtype
                each = inner
        match each:
            case ("rows",) | None:
                names.append(None)
            case ("tensor", name):
                names.append(name)
            case _:
                raise Unlike("expected a product of rows and weight as logits, got something else")
    scale, renormalize, scoring, chosen = _weights(weights, logits)
    groups, topk_groups, correction, top_k = 1, 1, None, 0
    match ids:
        case ("which", score, k):
            top_k = k
        case _:
            raise Unlike("expected ids of the highest scores, got something else")
    if chosen not in (("values", score, k), ("gathered", ids)):
        raise Unlike("expected the weights of the chosen experts, got others")
    fill = 0.0
    match score:
        case ("keep", inner, ("which", of_groups, t), fill):
            score, topk_groups = inner, t
            kind, grouped, groups = _group_scores(of_groups, inner)
            if grouped != inner:
                raise Unlike("expected groups by the scores that choose, got others")
    match score:
        case ("add", base, ("tensor" | "argument", place)) | ("add", base, ("cast", ("tensor" | "argument", place), _)):
            score, correction = base, place
    if correction is not None:
        if scoring != "sigmoid":
            raise Unlike(f"expected a bias on sigmoid scores, got one on {scoring} scores")
        size = (tensors[correction] if isinstance(correction, str) else more[correction]).numel()
        if size != result[0].shape[-1]:
            raise Unlike(f"expected a bias of each of {result[0].shape[-1]} experts, got {size} elements")
    if groups > 1:
        rule = "best" if correction is None else "sum of two"
        if kind != rule:
            raise Unlike(f"expected groups by the {rule} of their scores, got the {kind}")
        if fill != -math.inf and (correction is not None or score[0] not in ("softmax", "sigmoid")):
            raise Unlike(f"expected scores of other groups to be -inf, got {fill}")
    if score[0] in ("softmax", "sigmoid"):
        if score[2] != torch.float32:
            raise Unlike(f"expected scores in float32, got {score[2]}")
        if correction is not None and score[0] != scoring:
            raise Unlike(f"expected a bias on {scoring} scores, got one on {score[0]} scores")
        score = score[1]
    elif correction is not None:
        raise Unlike("expected a bias on sigmoid scores, got one on logits")
    if _raised(score) != logits:
        raise Unlike("expected a choice by the logits, got one by something made of them")
    used = tuple((name, each.dtype) for name, each in tensors.items() if name in (*names, correction))
    roles = tuple(order.index(place) for place in range(3))
    weight, bias = names[1], names[2]
    assert weight is not None
    return Plan(
        facts, used, rows.dim(), weight, bias, (rows.dtype, within), correction, top_k, scoring, renormalize, groups,
        topk_groups, scale, tuple(each.dtype for each in result), roles,
    )  # fmt: skip


def _raised(expression: Any) -> Any:
    """Without a conversion to float32, in which the router computes anyway."""
    match expression:
        case ("cast", inner, torch.float32):
            return inner
    return expression


def _weights(weights: Any, logits: Any) -> tuple[float, bool, str, Any]:
    """Scale, whether they are divided by their sum, which scores they are, and how they were chosen."""
    scale, renormalize = 1.0, False
    while True:
        match weights:
            case ("cast", inner, _):
                weights = inner
            case ("mul", inner, int() | float() as factor) if not renormalize:
                weights, scale = inner, scale * factor
            case ("div", inner, int() | float() as factor) if not renormalize:
                weights, scale = inner, scale / factor
            case ("div", inner, ("sum", total)) | ("div", inner, ("cast", ("sum", total), _)) if inner == total:
                weights, renormalize = inner, True
            case ("div", inner, ("add" | "at least", ("sum", total), float() as least)) if (
                inner == total and 0 <= least <= TINY
            ):
                weights, renormalize = inner, True
            case _:
                break
    match weights:
        case ("softmax", ("top", x, k), _) | ("softmax", ("cast", ("top", x, k), _), _) if _raised(x) == logits:
            return scale, True, "softmax", ("values", x, k)
        case ("softmax", ("gather", x, ids), _) if _raised(x) == logits:
            return scale, True, "softmax", ("gathered", ids)
        case ("sigmoid", ("top", x, k), _) | ("sigmoid", ("cast", ("top", x, k), _), _) if _raised(x) == logits:
            return scale, renormalize, "sigmoid", ("values", x, k)
        case ("top", ("softmax" | "sigmoid" as scoring, x, _) as score, k) if _raised(x) == logits:
            return scale, renormalize, scoring, ("values", score, k)
        case ("top", ("keep", ("softmax" | "sigmoid" as scoring, x, _), _, _) as score, k) if _raised(x) == logits:
            return scale, renormalize, scoring, ("values", score, k)
        case ("gather", ("softmax" | "sigmoid" as scoring, x, _), ids) if _raised(x) == logits:
            return scale, renormalize, scoring, ("gathered", ids)
    raise Unlike("expected a softmax or a sigmoid of the logits as weights, got something else")


def _group_scores(expression: Any, scores: Any) -> tuple[str, Any, int]:
    match expression:
        case ("sum", ("top", single, 2)) | ("top", single, 1) if single == scores:
            return "best", scores, 1  # one group is all
        case ("sum", ("top", ("groups", score, groups), 2)):
            return "sum of two", score, groups
        case ("top", ("groups", score, groups), 1):
            return "best", score, groups
    raise Unlike("expected groups by their best or two best scores, got another rule")


def _check(plan: Plan, forward: Any, stand_in: Any, rows: Tensor, more: tuple[Any, ...]) -> None:
    """The plan and the router's own forward on the same rows: the same logits, weights and, without ties, ids."""
    own, got = forward(stand_in, rows, *more), plan.run(stand_in, rows, more)
    for one, other in zip(own, got, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            raise Unlike(f"expected {list(other.shape)} of {other.dtype}, got {list(one.shape)} of {one.dtype}")
    (logits, theirs, which), (again, ours, ids) = plan.roles(own), plan.roles(got)
    most = TOLERANCE.get(theirs.dtype, 1e-5) * max(1e-6, float(theirs.abs().max()))
    sorted_theirs, sorted_ours = theirs.float().sort(1).values, ours.float().sort(1).values
    close = bool((sorted_theirs - sorted_ours).abs().max() <= most)
    ordered = logits.float().sort(1).values
    apart = (ordered[:, 1:] - ordered[:, :-1] > 1e-6 * ordered.abs().max()).all(1)
    alike = (which.sort(1).values == ids.sort(1).values).all(1)
    if not close or not bool(alike[apart].all()) or not bool(torch.equal(logits, again)):
        raise Unlike("expected moealign.route's choice on random rows, got another")


def _check_gradients(plan: Plan, forward: Any, stand_in: Any, rows: Tensor, more: tuple[Any, ...]) -> None:
    """Logits and weights pass the same gradients on to the rows, the weight and its bias."""
    leaves = [rows.clone(), *(tensor_at(stand_in, each) for each in (plan.weight, plan.linear_bias) if each)]
    noise = torch.Generator("cpu").manual_seed(9)
    with torch.enable_grad():
        for each in leaves:
            each.requires_grad_()
        x = leaves[0] * 1.0  # no leaf, as a model's rows are none
        own, got = plan.roles(forward(stand_in, x, *more)), plan.roles(plan.run(stand_in, x, more))
        orders = [ids.argsort(1) for _, _, ids in (own, got)]
        alike = (own[2].gather(1, orders[0]) == got[2].gather(1, orders[1])).all(1, keepdim=True)  # no ties
        for role in range(2):
            factor = _normal(own[role].shape, noise) * alike
            one, other = (
                _gradients(made[role] if role == 0 else made[role].gather(1, order), factor, leaves)
                for made, order in zip((own, got), orders, strict=True)
            )
            for theirs, ours in zip(one, other, strict=True):
                if (theirs is None) != (ours is None):
                    raise Unlike(
                        f"expected its forward to pass a gradient on, got {'none' if theirs is None else 'one'}"
                    )
                most = 4 * TOLERANCE.get(rows.dtype, 1e-5)
                if theirs is None or ours is None:
                    continue
                if float((theirs - ours).norm()) > most * float(theirs.norm()):
                    raise Unlike("expected the gradient of moealign.route, got another")
    for each in leaves:
        each.requires_grad_(False)


def _gradients(made: Tensor, factor: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    if not made.requires_grad:
        return [None] * len(leaves)
    found = torch.autograd.grad((made.float() * factor).sum(), leaves, retain_graph=True, allow_unused=True)
    return [None if each is None else each.float() for each in found]
