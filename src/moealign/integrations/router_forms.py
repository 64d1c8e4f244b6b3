"""Which form of :func:`moealign.route` a router computes, from the operations of its ``forward``, not from its class.

:func:`recognise` traces the router's own ``forward`` on stand-ins (:mod:`~moealign.integrations.router_tracing`).  If
logits, weights and ids are made as :func:`moealign.route` makes them, the result is a :class:`RouterForm`; otherwise
:class:`UnsupportedRouter` says what differs.  The form holds every number, flag and function that the ``forward`` read,
so that :meth:`RouterForm.fits` detects a later change of any of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MoealignError
from ..operators import replay
from ..problem import SCORINGS
from .router_tracing import (
    Expression,
    ExpressionRecorder,
    Path,
    UnsupportedRouter,
    normal,
    read_attribute,
    same_value,
    stand_in,
    unknown_operation,
)

__all__ = ["RouterForm", "UnsupportedRouter", "recognise"]

ROWS = 64
SCALES = (0.05, 1.0, 4.0)  # of the rows: flat, ordinary and peaked scores
MAX_EPSILON = 1e-12  # that may keep a sum from zero
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class RouterForm:
    """A router as arguments of ``torch.ops.moealign.route``, and what that was concluded from."""

    reads: tuple[tuple[Path, Any], ...]  #: attributes that its forward reads, with their values
    dtypes: tuple[tuple[str, torch.dtype], ...]  #: of the tensors it uses
    dims: int  #: of the hidden states
    weight: str  #: name of the tensor
    linear_bias: str | None
    linear_dtypes: tuple[torch.dtype, torch.dtype]  #: of the hidden states, and of their product with the weight
    correction: str | int | None  #: name of the tensor, or position of the argument
    zero_bias: bool  #: in its place, a bias of zeros, with which groups are chosen by the sum of their two best
    top_k: int
    scoring: str
    renormalize: bool
    num_groups: int
    topk_groups: int
    scale: float
    out_dtypes: tuple[torch.dtype, ...]  #: of logits, weights and ids
    order: tuple[int, ...]  #: in which the router returns logits (0), weights (1) and ids (2)

    def fits(self, module: nn.Module, hidden_states: Tensor) -> bool:
        """Whether everything that the form was concluded from is unchanged."""
        if hidden_states.dtype != self.linear_dtypes[0] or hidden_states.dim() != self.dims:
            return False
        for name, dtype in self.dtypes:
            if tensor_at(module, name).dtype != dtype:
                return False
        return all(same_value(read_attribute(module, path), value) for path, value in self.reads)

    def in_order(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, weights and ids from the router's outputs."""
        logits, weights, ids = (outputs[self.order.index(role)] for role in range(3))
        return logits, weights, ids

    def run(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        more: tuple[Any, ...] = (),
        choices: Callable[[int], Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """The router's outputs, in its own order and dtypes.

        Args:
            more: the arguments after the hidden states.
            choices: the ids ``[tokens, top_k]`` of so many tokens, instead of those that the router would choose.
        """
        dtype = self.linear_dtypes[1]
        rows = hidden_states.reshape(-1, hidden_states.shape[-1]).to(dtype)
        bias = None if self.linear_bias is None else tensor_at(module, self.linear_bias).to(dtype)
        logits = torch.nn.functional.linear(rows, tensor_at(module, self.weight).to(dtype), bias)
        if choices is None:
            correction = None
            if self.correction is not None:
                key = self.correction
                correction = (more[key] if isinstance(key, int) else tensor_at(module, key)).reshape(-1)
            elif self.zero_bias:
                correction = torch.zeros(logits.shape[-1], dtype=torch.float32, device=logits.device)
            weights, ids, _ = torch.ops.moealign.route(
                logits, self.top_k, self.scoring, self.renormalize, correction, self.num_groups, self.topk_groups,
                self.scale, None, False, None,
            )  # fmt: skip
        else:
            how = (self.scoring, self.renormalize, self.scale)
            weights, ids, _ = replay(logits, choices(rows.shape[0]).to(logits.device), how, None, False)
        of_logits, of_weights, of_ids = self.out_dtypes
        outputs = (logits.to(of_logits), weights.to(of_weights), ids.to(of_ids))
        return tuple([outputs[role] for role in self.order])


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """The tensor with the dotted `name` below `module`."""
    value = module
    for part in name.split("."):
        value = getattr(value, part)
    return value  # type: ignore[return-value]


def recognise(module: nn.Module, hidden_states: Tensor | None = None, more: tuple[Any, ...] = ()) -> RouterForm:
    """The form of `module` for arguments like `hidden_states` and `more`; by default, for likely ones.

    Raises:
        UnsupportedRouter: it is none of the forms of :func:`moealign.route`.
    """
    floats = [each for each in (*module.parameters(), *module.buffers()) if each.dtype.is_floating_point]
    weights = [each for each in floats if each.dim() == 2]
    if not weights:
        raise UnsupportedRouter("expected a weight of two dimensions, got none")
    experts, width = weights[0].shape
    dtype = weights[0].dtype if hidden_states is None else hidden_states.dtype
    names = ""
    if hidden_states is None:
        required = [
            each for each in list(inspect.signature(type(module).forward).parameters.values())[2:]
            if each.default is each.empty and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        ]  # fmt: skip
        more = tuple(torch.zeros(experts, device="cpu") for _ in required)
        names = ", ".join(each.name for each in required)
    shapes = [(ROWS, width), (2, ROWS // 2, width)]
    if hidden_states is not None:
        shapes = [shapes[hidden_states.dim() == 3]]
    errors: list[Exception] = []
    for shape in shapes:
        try:
            with torch.inference_mode(False), torch.no_grad():
                noise = torch.Generator("cpu").manual_seed(7)
                rows = normal(shape, noise).to(dtype)
                return _recognise(module, rows, tuple(_random_argument(each, noise) for each in more))
        except UnsupportedRouter as error:
            errors.append(error)
        except MoealignError as error:  # a refusal by route
            errors.append(UnsupportedRouter(f"{type(error).__name__}: {error}"))
        except Exception as error:  # raised by the router's forward
            given = f"random rows and a bias as its {names}" if names else "random rows"
            said = (str(error) or type(error).__name__).splitlines()[0]
            errors.append(UnsupportedRouter(f"its forward did not run with {given} ({said})"))
    raise errors[0]


def _random_argument(value: Any, generator: torch.Generator) -> Any:
    return (normal(value.shape, generator) * 0.1).to(value.dtype) if isinstance(value, Tensor) else value


def _recognise(module: nn.Module, rows: Tensor, more: tuple[Any, ...]) -> RouterForm:
    reads: dict[Path, Any] = {}
    tensors: dict[str, Tensor] = {}
    copy = stand_in(module, (), reads, tensors)
    inputs: list[tuple[Tensor, Expression]] = [(rows, ("rows",))]
    inputs += [(each, ("tensor", name)) for name, each in tensors.items()]
    inputs += [(each, ("argument", i)) for i, each in enumerate(more) if isinstance(each, Tensor)]
    forward: Callable[..., Any] = type(module).forward
    with ExpressionRecorder(inputs) as recorder, torch.autocast("cpu", enabled=False):
        result = forward(copy, rows, *more)
        if not isinstance(result, tuple) or len(result) != 3 or not all(isinstance(each, Tensor) for each in result):
            raise UnsupportedRouter("expected logits, weights and ids from its forward, got something else")
        expressions = [recorder.of(each) for each in result]
    order = _output_order(result, expressions)
    form = _match(
        [expressions[i] for i in order],
        [result[i] for i in order],
        order,
        rows,
        tensors,
        more,
        tuple(reads.items()),
    )
    for scale in SCALES:
        _check_outputs(form, forward, copy, rows * scale, more)
    _check_gradients(form, forward, copy, rows, more)
    return form


# ---- matching expressions --------------------------------------------------------------------------------------------


def _output_order(result: tuple[Tensor, ...], expressions: list[Any]) -> list[int]:
    """Positions of logits (a product of the rows), weights (made from it) and ids (integers)."""
    integers = [i for i, each in enumerate(result) if not each.is_floating_point()]
    products = [i for i, each in enumerate(expressions) if _without_float32(each)[0] == "linear"]
    if len(integers) == len(products) == 1:
        return [products[0], 3 - products[0] - integers[0], integers[0]]
    return [0, 1, 2]


def _match(
    expressions: list[Any], result: list[Tensor], order: list[int], rows: Tensor, tensors: dict[str, Tensor],
    more: tuple[Any, ...], reads: tuple[Any, ...],
) -> RouterForm:  # fmt: skip
    """The form of a router, from the `expressions` of its logits, weights and ids (the tensors in `result`)."""
    logits, weights, ids = expressions
    for expression in (ids, weights, logits):
        unknown = unknown_operation(expression)
        if unknown is not None:
            raise UnsupportedRouter(f"expected the operations of moealign.route, got {unknown}")
    if logits[0] == "cast":
        logits = logits[1]
    weight, bias, product_dtype = _match_product(logits, rows.dtype)
    scale, renormalize, scoring, chosen = _match_weights(weights, logits)
    match ids:
        case ("top_ids", score, top_k):
            pass
        case _:
            raise UnsupportedRouter("expected ids of the highest scores, got something else")
    if chosen not in (("values", score, top_k), ("gathered", ids)):
        raise UnsupportedRouter("expected the weights of the chosen experts, got others")
    groups, topk_groups, correction, fill, rule = 1, 1, None, 0.0, "best"
    match score:
        case ("fill_others", inner, ("top_ids", group_scores, topk_groups), fill):
            score = inner
            rule, grouped, groups = _match_group_scores(group_scores, inner)
            if grouped != inner:
                raise UnsupportedRouter("expected groups by the scores that choose, got others")
    match score:
        case ("add", base, ("tensor" | "argument", key)) | ("add", base, ("cast", ("tensor" | "argument", key), _)):
            score, correction = base, key
    if correction is not None:
        size = (tensors[correction] if isinstance(correction, str) else more[correction]).numel()
        if size != result[0].shape[-1]:
            raise UnsupportedRouter(f"expected a bias of each of {result[0].shape[-1]} experts, got {size} elements")
    zero_bias = groups > 1 and correction is None and rule == "sum of two"
    if groups > 1:
        if correction is not None and rule != "sum of two":
            raise UnsupportedRouter(f"expected groups by the sum of two of their scores, got the {rule}")
        if fill != -math.inf and (correction is not None or score[0] not in SCORINGS):
            raise UnsupportedRouter(f"expected scores of other groups to be -inf, got {fill}")
    if score[0] in SCORINGS:
        if score[2] != torch.float32:
            raise UnsupportedRouter(f"expected scores in float32, got {score[2]}")
        if (correction is not None or zero_bias) and score[0] != scoring:
            raise UnsupportedRouter(f"expected a choice by {scoring} scores, like the weights, got one by {score[0]}")
        score = score[1]
    elif correction is not None or zero_bias:
        raise UnsupportedRouter(f"expected a choice by {scoring} scores, got one by logits")
    if _without_float32(score) != logits:
        raise UnsupportedRouter("expected a choice by the logits, got one by something made of them")
    return RouterForm(
        reads=reads,
        dtypes=tuple((name, each.dtype) for name, each in tensors.items() if name in (weight, bias, correction)),
        dims=rows.dim(),
        weight=weight,
        linear_bias=bias,
        linear_dtypes=(rows.dtype, product_dtype),
        correction=correction,
        zero_bias=zero_bias,
        top_k=top_k,
        scoring=scoring,
        renormalize=renormalize,
        num_groups=groups,
        topk_groups=topk_groups,
        scale=scale,
        out_dtypes=tuple(each.dtype for each in result),
        order=tuple(order.index(i) for i in range(3)),
    )


def _match_product(logits: Any, dtype: torch.dtype) -> tuple[str, str | None, torch.dtype]:
    """Names of weight and bias, and the dtype of the product, for rows of `dtype`."""
    message = "expected a product of rows and weight as logits, got something else"
    match logits:
        case ("linear", rows, ("t", weight), bias):
            pass
        case ("linear", rows, ("cast", ("t", weight), to), bias):
            weight = ("cast", weight, to)
        case _:
            raise UnsupportedRouter(message)
    names: list[str | None] = []
    for each in (rows, weight, bias):
        match each:
            case ("cast", inner, to):
                each, dtype = inner, to
        match each:
            case ("rows",) | None:
                names.append(None)
            case ("tensor", name):
                names.append(name)
            case _:
                raise UnsupportedRouter(message)
    assert names[1] is not None
    return names[1], names[2], dtype


def _without_float32(expression: Any) -> Any:
    """Without a final conversion to float32, which :func:`moealign.route` computes in anyway."""
    match expression:
        case ("cast", inner, torch.float32):
            return inner
    return expression


def _match_weights(weights: Any, logits: Any) -> tuple[float, bool, str, Any]:
    """Scale, whether the weights are divided by their sum, the scoring, and how they were chosen."""
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
            case ("div", inner, ("add" | "clamp_min", ("sum", total), float() as epsilon)) if (
                inner == total and 0 <= epsilon <= MAX_EPSILON
            ):
                weights, renormalize = inner, True
            case _:
                break
    match weights:
        case ("softmax", ("top_values", x, k), _) | ("softmax", ("cast", ("top_values", x, k), _), _) if (
            _without_float32(x) == logits
        ):
            return scale, True, "softmax", ("values", x, k)
        case ("softmax", ("gather", x, ids), _) if _without_float32(x) == logits:
            return scale, True, "softmax", ("gathered", ids)
        case ("sigmoid" | "sqrtsoftplus" as scoring, ("top_values", x, k) | ("cast", ("top_values", x, k), _), _) if (
            _without_float32(x) == logits
        ):
            return scale, renormalize, scoring, ("values", x, k)
        case ("top_values", (str() as scoring, x, _) as score, k) | (
            "top_values",
            ("fill_others", (str() as scoring, x, _), _, _) as score,
            k,
        ) if scoring in SCORINGS and _without_float32(x) == logits:
            return scale, renormalize, scoring, ("values", score, k)
        case ("gather", (str() as scoring, x, _), ids) if scoring in SCORINGS and _without_float32(x) == logits:
            return scale, renormalize, scoring, ("gathered", ids)
    raise UnsupportedRouter(f"expected one of {', '.join(SCORINGS)} of the logits as weights, got something else")


def _match_group_scores(expression: Any, scores: Any) -> tuple[str, Any, int]:
    """The rule by which groups are chosen, the scores it uses, and the number of groups."""
    match expression:
        case ("sum", ("top_values", single, 2)) | ("top_values", single, 1) if single == scores:
            return "best", scores, 1  # a single group
        case ("sum", ("top_values", ("groups", score, groups), 2)):
            return "sum of two", score, groups
        case ("top_values", ("groups", score, groups), 1):
            return "best", score, groups
    raise UnsupportedRouter("expected groups by their best or two best scores, got another rule")


# ---- checks on random rows -------------------------------------------------------------------------------------------


def _check_outputs(form: RouterForm, forward: Any, copy: Any, rows: Tensor, more: tuple[Any, ...]) -> None:
    """The form and the router's own forward agree on logits, weights and, where there are no ties, ids."""
    theirs, ours = forward(copy, rows, *more), form.run(copy, rows, more)
    for one, other in zip(theirs, ours, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            raise UnsupportedRouter(
                f"expected {list(other.shape)} of {other.dtype}, got {list(one.shape)} of {one.dtype}"
            )
    (logits, weights, ids), (our_logits, our_weights, our_ids) = form.in_order(theirs), form.in_order(ours)
    tolerance = TOLERANCE.get(weights.dtype, 1e-5) * max(1e-6, float(weights.abs().max()))
    difference = (weights.float().sort(1).values - our_weights.float().sort(1).values).abs().max()
    ascending = logits.float().sort(1).values
    untied = (ascending[:, 1:] - ascending[:, :-1] > 1e-6 * ascending.abs().max()).all(1)
    same_ids = (ids.sort(1).values == our_ids.sort(1).values).all(1)
    close = bool(difference <= tolerance)  # False for NaN
    if not close or not bool(same_ids[untied].all()) or not torch.equal(logits, our_logits):
        raise UnsupportedRouter("expected moealign.route's choice on random rows, got another")


def _check_gradients(form: RouterForm, forward: Any, copy: Any, rows: Tensor, more: tuple[Any, ...]) -> None:
    """Logits and weights pass the same gradients to the rows, the weight and its bias."""
    leaves = [rows.clone(), *(tensor_at(copy, each) for each in (form.weight, form.linear_bias) if each)]
    noise = torch.Generator("cpu").manual_seed(9)
    with torch.enable_grad():
        for each in leaves:
            each.requires_grad_()
        x = leaves[0] * 1.0  # not a leaf, like the rows in a model
        theirs, ours = form.in_order(forward(copy, x, *more)), form.in_order(form.run(copy, x, more))
        orders = [ids.argsort(1) for _, _, ids in (theirs, ours)]
        untied = (theirs[2].gather(1, orders[0]) == ours[2].gather(1, orders[1])).all(1, keepdim=True)
        for role in range(2):
            factor = normal(theirs[role].shape, noise) * untied
            one, other = (
                _gradients(outputs[role] if role == 0 else outputs[role].gather(1, order), factor, leaves)
                for outputs, order in zip((theirs, ours), orders, strict=True)
            )
            for their_gradient, our_gradient in zip(one, other, strict=True):
                if (their_gradient is None) != (our_gradient is None):
                    got = "none" if their_gradient is None else "one"
                    raise UnsupportedRouter(f"expected its forward to pass a gradient on, got {got}")
                if their_gradient is None or our_gradient is None:
                    continue
                tolerance = 4 * TOLERANCE.get(rows.dtype, 1e-5) * float(their_gradient.norm())
                if float((their_gradient - our_gradient).norm()) > tolerance:
                    raise UnsupportedRouter("expected the gradient of moealign.route, got another")
    for each in leaves:
        each.requires_grad_(False)


def _gradients(output: Tensor, factor: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    if not output.requires_grad:
        return [None] * len(leaves)
    gradients = torch.autograd.grad((output.float() * factor).sum(), leaves, retain_graph=True, allow_unused=True)
    return [None if each is None else each.float() for each in gradients]
