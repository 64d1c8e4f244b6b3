"""The public functions, and the operators that torch.compile and torch.export see.

An eager call goes straight to a backend.  Whenever something else follows the call (:mod:`moealign.modes`), it becomes
one of the operators ``torch.ops.moealign.*``, whose fakes are :func:`capacity` and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, modes
from .checks import check_align, check_align_batched, check_out
from .errors import InvalidInput
from .layout import EXTRAS, OUTPUTS, REQUIRED, BlockLayout, Capacity, Problem

__all__ = [
    "align",
    "align_batched",
    "batched_moe_align_block_size",
    "explain",
    "moe_align_block_size",
    "new_error_word",
    "raise_for_errors",
]

_watched, _followed, _strided = modes.watched, modes.followed, torch.strided
_SCATTER = ("scatter_idx",)
_NONE: tuple[str, ...] = ()
_ERRORS = {
    1: "topk_ids held an id outside {-1} | [0, num_experts); its route was dropped",
    2: "expert_map held a value outside {-1} | [0, num_experts); it counted as -1",
    4: "num_valid_tokens was outside [0, number of tokens]; it was clamped",
    8: "expert_num_tokens held a count outside [0, max_tokens_per_batch]; it was clamped",
}


def moe_align_block_size(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    return_scatter_idx: bool = False,
    *,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """vLLM 0.33's ``moe_align_block_size``, argument for argument: :func:`align` with its results in a tuple.

    Returns ``(sorted_token_ids [L], expert_ids [cdiv(L, B)], num_tokens_post_padded [1])``, all int32, and with
    `return_scatter_idx` ``scatter_idx [n, 1]`` as a fourth.  Arguments, values and errors are those of :func:`align`.
    """
    usual = type(topk_ids) is Tensor and expert_map is None and not return_scatter_idx
    if usual and type(block_size) is type(num_experts) is int and not _followed() and topk_ids.layout is _strided:
        # The usual call, seen before: what _align does, without its other cases.
        try:
            plan = _plans.get((topk_ids.shape, topk_ids.dtype, topk_ids.device, block_size, num_experts, pad_sorted_ids,
                               ignore_invalid_experts, _NONE, backend))  # fmt: skip
        except (RuntimeError, TypeError):  # no shape, or not hashable: refused below
            plan = None
        if plan is not None:
            if plan.fill_three is not None:
                rows, blocks, total = _pieces(plan)
                plan.fill_three(plan.problem, topk_ids, rows, blocks, total)
                return rows, blocks, total
            made = _allocate(plan)
            plan.backend.align(plan.problem, topk_ids, None, None, None, made)
            return made.sorted_token_ids, made.expert_ids, made.num_tokens_post_padded
    layout = _align(
        topk_ids,
        block_size,
        num_experts,
        expert_map,
        pad_sorted_ids,
        ignore_invalid_experts,
        None,
        None,
        _SCATTER if return_scatter_idx else _NONE,
        None,
        backend,
    )
    if return_scatter_idx:
        assert layout.scatter_idx is not None
        return layout.sorted_token_ids, layout.expert_ids, layout.num_tokens_post_padded, layout.scatter_idx
    return layout.sorted_token_ids, layout.expert_ids, layout.num_tokens_post_padded


def batched_moe_align_block_size(
    max_tokens_per_batch: int, block_size: int, expert_num_tokens: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """vLLM's ``batched_moe_align_block_size``: :func:`align_batched` with its results in a tuple.

    Returns ``(sorted_token_ids [nb * cdiv(M, B) * B], expert_ids [nb * cdiv(M, B)], num_tokens_post_padded [1])``.
    """
    layout = _align_batched(expert_num_tokens, max_tokens_per_batch, block_size, None, _NONE, None, backend)
    return layout.sorted_token_ids, layout.expert_ids, layout.num_tokens_post_padded


def align(
    topk_ids: Tensor,
    *,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    num_valid_tokens: Tensor | None = None,
    expert_counts: bool = False,
    expert_offsets: bool = False,
    group_ends: bool = False,
    positions: bool = False,
    block_rows: bool = False,
    scatter_idx: bool = False,
    error_word: Tensor | None = None,
    out: BlockLayout | Mapping[str, Tensor] | None = None,
    backend: str | None = None,
) -> BlockLayout:
    """Sort the router's choices by expert, in blocks of `block_size` rows; see :class:`BlockLayout` for every value.

    Args:
        topk_ids: ``[tokens, top_k]`` expert of each route; any integer dtype, shape and strides.  A route whose id
            is outside ``[0, num_experts)`` is dropped, ``-1`` being the usual way to say so.
        block_size: rows of a block, ``B >= 1``; not only powers of two.
        num_experts: number of (global) experts, ``E >= 1``.
        expert_map: ``[E]`` local expert of each global one, ``-1`` for "not on this rank"; any integer dtype.
            By default all experts are binned and only ``expert_ids`` is translated.
        pad_sorted_ids: round the length of ``sorted_token_ids`` up to a multiple of `block_size`.
        ignore_invalid_experts: bins are local experts; routes that `expert_map` sends to ``-1`` are dropped.
        num_valid_tokens: int32, one element, on the same device: rows of `topk_ids` from there on are dropped.
        expert_counts, expert_offsets, group_ends, positions, block_rows, scatter_idx: also return this field,
            from the same pass.
        error_word: int32 ``[1]`` from :func:`new_error_word`; bits are set in it for values that were dropped or
            clamped, and :func:`raise_for_errors` reads it later.  Nothing waits for the device.
        out: buffers to fill instead of new ones, int32, contiguous, of :func:`capacity`'s sizes, one for each field.
        backend: a name of :func:`backends`; by default the device of `topk_ids` chooses.

    Raises:
        InvalidInput (a ValueError): an impossible size, shape or device.
        InvalidType (a TypeError): a dtype that is not an integer one, or an argument of another type.
        BackendUnavailable (a ValueError): the backend named cannot take this call.
    """
    wanted = _wanted(expert_counts, expert_offsets, group_ends, positions, block_rows, scatter_idx)
    return _align(
        topk_ids,
        block_size,
        num_experts,
        expert_map,
        pad_sorted_ids,
        ignore_invalid_experts,
        num_valid_tokens,
        error_word,
        wanted,
        out,
        backend,
    )


def align_batched(
    expert_num_tokens: Tensor,
    *,
    max_tokens_per_batch: int,
    block_size: int,
    expert_counts: bool = False,
    expert_offsets: bool = False,
    group_ends: bool = False,
    positions: bool = False,
    block_rows: bool = False,
    error_word: Tensor | None = None,
    out: BlockLayout | Mapping[str, Tensor] | None = None,
    backend: str | None = None,
) -> BlockLayout:
    """The layout of batches that were dispatched to experts: batch ``b`` holds rows ``b*M .. b*M + c_b - 1``.

    Args:
        expert_num_tokens: ``[num_batches]`` filled rows of each batch, any integer dtype, clamped to ``[0, M]``.
        max_tokens_per_batch: ``M``, rows of a batch, filled or not.
        block_size: rows of a block, ``B >= 1``.
        expert_counts, expert_offsets, group_ends, block_rows: as in :func:`align`, a bin being a batch.
        positions: ``[num_batches * M]`` row of each slot ``b*M + j`` in ``sorted_token_ids``, ``-1`` if not filled.
        error_word, out, backend: as in :func:`align`; sizes by :func:`capacity_batched`.

    Raises:
        InvalidInput, InvalidType, BackendUnavailable: as :func:`align`.
    """
    wanted = _wanted(expert_counts, expert_offsets, group_ends, positions, block_rows, False)
    return _align_batched(expert_num_tokens, max_tokens_per_batch, block_size, error_word, wanted, out, backend)


def explain(
    tensor: Tensor,
    *,
    block_size: int,
    num_experts: int | None = None,
    max_tokens_per_batch: int | None = None,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    num_valid_tokens: Tensor | None = None,
    expert_counts: bool = False,
    expert_offsets: bool = False,
    group_ends: bool = False,
    positions: bool = False,
    block_rows: bool = False,
    scatter_idx: bool = False,
    error_word: Tensor | None = None,
    backend: str | None = None,
) -> dispatch.Explanation:
    """Which backend a call with these arguments would take, and why each other one refuses.  Computes nothing.

    With `num_experts` the call is :func:`align` of ``topk_ids``; with `max_tokens_per_batch` it is
    :func:`align_batched` of ``expert_num_tokens``.  Print the result.

    Raises:
        InvalidInput, InvalidType: where the call itself would refuse its arguments.
        BackendUnavailable: `backend` is not the name of one.
    """
    wanted = _wanted(expert_counts, expert_offsets, group_ends, positions, block_rows, scatter_idx)
    if (num_experts is None) == (max_tokens_per_batch is None):
        raise InvalidInput(
            "num_experts, max_tokens_per_batch: expected one of them, got "
            f"{num_experts} and {max_tokens_per_batch}; the first asks about align, the second about align_batched"
        )
    if num_experts is None:
        assert max_tokens_per_batch is not None
        problem, _ = check_align_batched(tensor, max_tokens_per_batch, block_size, error_word, wanted)
    else:
        problem, _ = check_align(
            tensor,
            block_size,
            num_experts,
            expert_map,
            pad_sorted_ids,
            ignore_invalid_experts,
            num_valid_tokens,
            error_word,
            wanted,
        )
    return dispatch.explain_problem(problem, backend)


def new_error_word(device: torch.device | str) -> Tensor:
    """An int32 ``[1]`` of zeros for the `error_word` of :func:`align`: the opt-in validation mode.

    Backends set bits in it and never clear any, so one word can watch many calls, also those of a CUDA graph.
    """
    return torch.zeros(1, dtype=torch.int32, device=device)


def raise_for_errors(error_word: Tensor) -> None:
    """Read the word (this waits for the device), zero it, and raise InvalidInput if a call had set a bit."""
    seen = int(error_word.item())
    if seen:
        error_word.zero_()
        raise InvalidInput("; ".join(text for bit, text in _ERRORS.items() if seen & bit))


class _Plan(NamedTuple):
    """What was decided for one combination of shapes, dtypes and arguments; the next such call starts here."""

    problem: Problem
    sizes: Capacity
    backend: ModuleType
    allocate: Callable[[int], Tensor]
    elements: int  # of the one allocation that holds every output
    cuts: list[int]  # elements of each output
    apart: bool  # each output is an allocation of its own
    fill_three: Callable[..., None] | None  # the backend's shorter way to the first three outputs


_MOST_PLANS = 4096
_plans: dict[Any, _Plan] = {}


def _facts(tensor: Tensor | None) -> tuple[object, ...] | None:
    """All that a check may look at."""
    return (tensor.shape, tensor.dtype, tensor.device) if isinstance(tensor, Tensor) else None if tensor is None else ()


def _remember(key: tuple[object, ...] | None, problem: Problem, sizes: Capacity, backend: ModuleType) -> _Plan:
    cuts = [getattr(sizes, name) for name in REQUIRED + problem.extras]
    # new_empty of a tensor that holds nothing: a quarter cheaper than torch.empty with its dtype and device.
    allocate = torch.empty(0, dtype=torch.int32, device=problem.device).new_empty
    short = getattr(backend, "align_three", None)
    plan = _Plan(problem, sizes, backend, allocate, sum(cuts), cuts, problem.device.type == "cpu", short)
    if key is not None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


_WANTED: dict[tuple[bool, ...], tuple[str, ...]] = {(False,) * len(EXTRAS): ()}


def _wanted(*flags: bool) -> tuple[str, ...]:
    wanted = _WANTED.get(flags)
    if wanted is None:
        wanted = tuple(name for name, flag in zip(EXTRAS, flags, strict=True) if flag)
        _WANTED[tuple(map(bool, flags))] = wanted
    return wanted


def _align(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None,
    pad_sorted_ids: bool,
    ignore_invalid_experts: bool,
    num_valid_tokens: Tensor | None,
    error_word: Tensor | None,
    extras: tuple[str, ...],
    out: BlockLayout | Mapping[str, Tensor] | None,
    backend: str | None,
    fill: Callable[..., None] | None = None,
    eager: bool = False,
) -> BlockLayout:
    """One layout for every public function.

    `fill` takes the place of the backend's own function; `eager` says that nothing follows the call but its values.
    """
    if not eager and _watched(topk_ids, expert_map, num_valid_tokens, error_word):
        flags = (pad_sorted_ids, ignore_invalid_experts)
        checked = modes.checked(
            _check_watched, check_align, (topk_ids, expert_map, num_valid_tokens), error_word, out, extras, backend,
            topk_ids, block_size, num_experts, expert_map, *flags, num_valid_tokens, error_word, extras,
        )  # fmt: skip
        if isinstance(checked, modes.Refusal):
            return _refused(checked, extras)
        problem, room = checked
        sizes = (problem.block_size, problem.num_experts)
        if out is None and error_word is not None:  # an operator that changes an argument returns nothing
            out = _fresh(room, extras, topk_ids)
        if out is None:
            results = modes.call(
                torch.ops.moealign.align,
                topk_ids, *sizes, expert_map, *flags, num_valid_tokens, ",".join(extras), backend,
            )  # fmt: skip
            filled = dict(zip(REQUIRED + extras, results, strict=True))
        else:
            filled = _named(out, extras)
            modes.call(
                torch.ops.moealign.align.out,
                topk_ids, *sizes, expert_map, *flags, num_valid_tokens, error_word, backend, **filled,
            )  # fmt: skip
        return BlockLayout(**filled, block_size=sizes[0], num_experts=sizes[1], num_routes=problem.routes)
    key: tuple[object, ...] | None = None
    if type(block_size) is int and type(num_experts) is int and isinstance(topk_ids, Tensor):
        ids, flags = (topk_ids.shape, topk_ids.dtype, topk_ids.device), (pad_sorted_ids, ignore_invalid_experts)
        key = (*ids, block_size, num_experts, *flags, extras, backend)
        if expert_map is not None or num_valid_tokens is not None or error_word is not None:
            key = (*key, _facts(expert_map), _facts(num_valid_tokens), _facts(error_word))
    try:
        plan = _plans.get(key)
    except TypeError:  # not hashable: refused below
        plan = None
    if plan is None:
        problem, room = check_align(
            topk_ids,
            block_size,
            num_experts,
            expert_map,
            pad_sorted_ids,
            ignore_invalid_experts,
            num_valid_tokens,
            error_word,
            extras,
        )
        plan = _remember(key, problem, room, dispatch.choose(problem, backend))
    if out is None:
        layout = _allocate(plan)
    else:
        layout = _given(plan, out, (topk_ids, expert_map, num_valid_tokens, error_word))
    (fill or plan.backend.align)(plan.problem, topk_ids, expert_map, num_valid_tokens, error_word, layout)
    return layout


def _align_batched(
    expert_num_tokens: Tensor,
    max_tokens_per_batch: int,
    block_size: int,
    error_word: Tensor | None,
    extras: tuple[str, ...],
    out: BlockLayout | Mapping[str, Tensor] | None,
    backend: str | None,
) -> BlockLayout:
    if _watched(expert_num_tokens, error_word):
        checked = modes.checked(
            _check_watched, check_align_batched, (expert_num_tokens,), error_word, out, extras, backend,
            expert_num_tokens, max_tokens_per_batch, block_size, error_word, extras,
        )  # fmt: skip
        if isinstance(checked, modes.Refusal):
            return _refused(checked, extras)
        problem, room = checked
        sizes = (problem.top_k, problem.block_size)
        if out is None and error_word is not None:
            out = _fresh(room, extras, expert_num_tokens)
        if out is None:
            results = modes.call(torch.ops.moealign.align_batched, expert_num_tokens, *sizes, ",".join(extras), backend)
            filled = dict(zip(REQUIRED + extras, results, strict=True))
        else:
            filled = _named(out, extras)
            modes.call(torch.ops.moealign.align_batched.out, expert_num_tokens, *sizes, error_word, backend, **filled)
        return BlockLayout(**filled, block_size=sizes[1], num_experts=problem.num_experts, num_routes=problem.routes)
    key = None
    if type(block_size) is int and type(max_tokens_per_batch) is int:
        key = (_facts(expert_num_tokens), max_tokens_per_batch, block_size, _facts(error_word), extras, backend)
    try:
        plan = _plans.get(key)
    except TypeError:  # not hashable: refused below
        plan = None
    if plan is None:
        problem, room = check_align_batched(expert_num_tokens, max_tokens_per_batch, block_size, error_word, extras)
        plan = _remember(key, problem, room, dispatch.choose(problem, backend))
    if out is None:
        layout = _allocate(plan)
    else:
        layout = _given(plan, out, (expert_num_tokens, error_word))
    plan.backend.align_batched(plan.problem, expert_num_tokens, error_word, layout)
    return layout


def _check_watched(
    check: Callable[..., tuple[Problem, Capacity]],
    inputs: tuple[Tensor | None, ...],
    error_word: Tensor | None,
    out: BlockLayout | Mapping[str, Tensor] | None,
    extras: tuple[str, ...],
    backend: str | None,
    *args: Any,
) -> tuple[Problem, Capacity]:
    """What an eager call checks, but for where buffers lie in memory: that the operator checks when it runs."""
    problem, room = check(*args)
    dispatch.check_name(backend)
    if out is not None:
        check_out(out, room, extras, (*inputs, error_word), where=False)
    if modes.transformed() and (out is not None or error_word is not None):
        raise InvalidInput(
            "out, error_word: expected none inside torch.func transforms, got one; nothing can be written there"
        )
    return problem, room


def _refused(refusal: modes.Refusal, extras: tuple[str, ...]) -> BlockLayout:
    names = REQUIRED + extras
    outputs: dict[str, Any] = dict(zip(names, modes.refuse(refusal, len(names)), strict=True))
    return BlockLayout(**outputs)


def _named(out: BlockLayout | Mapping[str, Tensor], extras: tuple[str, ...]) -> dict[str, Tensor]:
    """The buffers of `out` by name."""
    if isinstance(out, BlockLayout):
        return {name: getattr(out, name) for name in REQUIRED + extras}
    return {name: out[name] for name in REQUIRED + extras}


_checked: dict[object, None] = {}


def _given(plan: _Plan, out: BlockLayout | Mapping[str, Tensor], inputs: tuple[Tensor | None, ...]) -> BlockLayout:
    """The caller's buffers as a layout, once they were checked where they lie beside these inputs."""
    problem = plan.problem
    if type(out) is not BlockLayout:
        return _layout(problem, check_out(out, plan.sizes, problem.extras, inputs))
    buffers = [getattr(out, name) for name in OUTPUTS]
    key = (plan.sizes, problem.extras, *map(_place, buffers), *map(_place, inputs))
    if key not in _checked:
        check_out(out, plan.sizes, problem.extras, inputs)
        if len(_checked) >= _MOST_PLANS:
            _checked.clear()
        _checked[key] = None
    return _layout(problem, {name: getattr(out, name) for name in REQUIRED + problem.extras})


def _place(tensor: Tensor | None) -> object:
    """All that the check of buffers looks at."""
    if not isinstance(tensor, Tensor):
        return None if tensor is None else type(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _layout(problem: Problem, tensors: Mapping[str, Tensor]) -> BlockLayout:
    wanted = {name: tensors[name] for name in REQUIRED + problem.extras}
    sizes = {"block_size": problem.block_size, "num_experts": problem.num_experts, "num_routes": problem.routes}
    return BlockLayout(**wanted, **sizes)  # type: ignore[arg-type]


def _pieces(plan: _Plan) -> Sequence[Tensor]:
    """New outputs.  On a GPU one allocation, cut up, is half the price of one each; on a CPU one each is cheaper."""
    if plan.apart:
        return list(map(plan.allocate, plan.cuts))
    # sorted_token_ids comes first, aligned
    return plan.allocate(plan.elements).unsafe_split_with_sizes(plan.cuts)  # type: ignore[no-any-return]


def _allocate(plan: _Plan) -> BlockLayout:
    problem, pieces = plan.problem, _pieces(plan)
    sizes = (problem.block_size, problem.num_experts, problem.routes)
    layout = BlockLayout(pieces[0], pieces[1], pieces[2], None, None, None, None, None, None, *sizes)
    if problem.extras:
        for name, piece in zip(problem.extras, pieces[3:], strict=True):
            setattr(layout, name, piece.view(-1, 1) if name == "scatter_idx" else piece)
    return layout


# The operators.  Library.define and impl rather than custom_op: a quarter of the cost a call.

_EXTRA_BUFFERS = ", ".join(f"Tensor({letter}!)? {name}=None" for letter, name in zip("efghij", EXTRAS, strict=True))
_BUFFERS = f"Tensor(b!) sorted_token_ids, Tensor(c!) expert_ids, Tensor(d!) num_tokens_post_padded, {_EXTRA_BUFFERS}"
_ALIGN = (
    "Tensor topk_ids, int block_size, int num_experts, Tensor? expert_map=None, bool pad_sorted_ids=False, "
    "bool ignore_invalid_experts=False, Tensor? num_valid_tokens=None"
)
_BATCHED = "Tensor expert_num_tokens, int max_tokens_per_batch, int block_size"
_ERROR = "Tensor(a!)? error_word=None"

_library = torch.library.Library("moealign", "FRAGMENT")
_library.define(f"align({_ALIGN}, str extras='', str? backend=None) -> Tensor[]")
_library.define(f"align.out({_ALIGN}, {_ERROR}, str? backend=None, *, {_BUFFERS}) -> ()")
_library.define(f"align_batched({_BATCHED}, str extras='', str? backend=None) -> Tensor[]")
_library.define(f"align_batched.out({_BATCHED}, {_ERROR}, str? backend=None, *, {_BUFFERS}) -> ()")


def _op_align(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    num_valid_tokens: Tensor | None = None,
    extras: str = "",
    backend: str | None = None,
) -> list[Tensor]:
    flags = (pad_sorted_ids, ignore_invalid_experts)
    names = _split(extras)
    _, sizes = check_align(topk_ids, block_size, num_experts, expert_map, *flags, num_valid_tokens, None, names)
    buffers = _fresh(sizes, names, topk_ids)
    _op_align_out(
        topk_ids,
        block_size,
        num_experts,
        expert_map,
        pad_sorted_ids,
        ignore_invalid_experts,
        num_valid_tokens,
        None,
        backend,
        **buffers,
    )
    return list(buffers.values())


def _op_align_out(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    num_valid_tokens: Tensor | None = None,
    error_word: Tensor | None = None,
    backend: str | None = None,
    **buffers: Tensor | None,
) -> None:
    out = {name: tensor for name, tensor in buffers.items() if tensor is not None}
    extras = tuple(name for name in EXTRAS if name in out)
    _align(
        topk_ids,
        block_size,
        num_experts,
        expert_map,
        pad_sorted_ids,
        ignore_invalid_experts,
        num_valid_tokens,
        error_word,
        extras,
        out,
        backend,
    )


def _op_align_batched(
    expert_num_tokens: Tensor,
    max_tokens_per_batch: int,
    block_size: int,
    extras: str = "",
    backend: str | None = None,
) -> list[Tensor]:
    names = _split(extras)
    _, sizes = check_align_batched(expert_num_tokens, max_tokens_per_batch, block_size, None, names)
    buffers = _fresh(sizes, names, expert_num_tokens)
    _op_align_batched_out(expert_num_tokens, max_tokens_per_batch, block_size, None, backend, **buffers)
    return list(buffers.values())


def _op_align_batched_out(
    expert_num_tokens: Tensor,
    max_tokens_per_batch: int,
    block_size: int,
    error_word: Tensor | None = None,
    backend: str | None = None,
    **buffers: Tensor | None,
) -> None:
    out = {name: tensor for name, tensor in buffers.items() if tensor is not None}
    extras = tuple(name for name in EXTRAS if name in out)
    _align_batched(expert_num_tokens, max_tokens_per_batch, block_size, error_word, extras, out, backend)


def _split(extras: str) -> tuple[str, ...]:
    """Names joined by commas, as the operators take them (their schemas have no lists of strings), in order."""
    names = extras.split(",") if extras else []
    for name in names:
        if name not in EXTRAS:
            raise InvalidInput(f"extras: expected names among {', '.join(EXTRAS)} joined by commas, got {name!r}")
    return tuple(name for name in EXTRAS if name in names)


def _fresh(sizes: Capacity, extras: tuple[str, ...], like: Tensor) -> dict[str, Tensor]:
    """Buffers of their own for every output: what an operator returns may not share memory."""
    shapes = {name: (getattr(sizes, name),) for name in (*REQUIRED, *extras)}
    if "scatter_idx" in shapes:
        shapes["scatter_idx"] = (sizes.scatter_idx, 1)  # type: ignore[assignment]
    return {name: like.new_empty(shape, dtype=torch.int32) for name, shape in shapes.items()}


def _fake_align(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    num_valid_tokens: Tensor | None = None,
    extras: str = "",
    backend: str | None = None,
) -> list[Tensor]:
    flags = (pad_sorted_ids, ignore_invalid_experts)
    names = _split(extras)
    _, sizes = check_align(topk_ids, block_size, num_experts, expert_map, *flags, num_valid_tokens, None, names)
    return list(_fresh(sizes, names, topk_ids).values())


def _fake_align_batched(
    expert_num_tokens: Tensor,
    max_tokens_per_batch: int,
    block_size: int,
    extras: str = "",
    backend: str | None = None,
) -> list[Tensor]:
    names = _split(extras)
    _, sizes = check_align_batched(expert_num_tokens, max_tokens_per_batch, block_size, None, names)
    return list(_fresh(sizes, names, expert_num_tokens).values())


def _fake_out(*args: object, **buffers: object) -> None:
    return None


for _name, _real, _fake in (
    ("align", _op_align, _fake_align),
    ("align.out", _op_align_out, _fake_out),
    ("align_batched", _op_align_batched, _fake_align_batched),
    ("align_batched.out", _op_align_batched_out, _fake_out),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moealign::{_name}", _fake, lib=_library)
modes.batched(_library, "align")
modes.batched(_library, "align_batched")
