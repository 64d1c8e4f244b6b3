"""The public functions of the alignment: vLLM's two, :func:`align` and :func:`align_batched`.

An eager call runs a prepared call (:mod:`moealign.calls.prepared`).  A call that a compiler, tracer, transform or mode
follows (:mod:`moealign.modes`) becomes one of the operators ``torch.ops.moealign.*`` (:mod:`moealign.operators`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, overload

import torch
from torch import Tensor

from . import modes, operators
from .calls import dispatch, prepared
from .calls.checks import check_align, check_align_batched
from .errors import InvalidInput
from .layout import ERROR_BITS, EXTRAS, BlockLayout

__all__ = [
    "align",
    "align_batched",
    "batched_moe_align_block_size",
    "explain",
    "moe_align_block_size",
    "new_error_word",
    "raise_for_errors",
]

# Names of this module: looking them up in others would cost the shortest call a tenth of a microsecond each.
_followed, _watched, _cached, _strided = modes.followed, modes.watched, prepared.cached, torch.strided
_new_tensors, _new_layout = prepared.new_tensors, prepared.new_layout
_NO_EXTRAS: tuple[str, ...] = ()


@overload
def moe_align_block_size(
    topk_ids: Tensor, block_size: int, num_experts: int, expert_map: Tensor | None = ..., pad_sorted_ids: bool = ...,
    ignore_invalid_experts: bool = ..., return_scatter_idx: Literal[False] = ..., *, backend: str | None = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


@overload
def moe_align_block_size(
    topk_ids: Tensor, block_size: int, num_experts: int, expert_map: Tensor | None = ..., pad_sorted_ids: bool = ...,
    ignore_invalid_experts: bool = ..., *, return_scatter_idx: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...  # fmt: skip


@overload
def moe_align_block_size(
    topk_ids: Tensor, block_size: int, num_experts: int, expert_map: Tensor | None = ..., pad_sorted_ids: bool = ...,
    ignore_invalid_experts: bool = ..., return_scatter_idx: bool = ..., *, backend: str | None = ...,
) -> tuple[Tensor, ...]: ...  # fmt: skip


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
    plain = type(topk_ids) is Tensor and expert_map is None and not return_scatter_idx
    if plain and type(block_size) is type(num_experts) is int and not _followed() and topk_ids.layout is _strided:
        # A common call whose signature is prepared: what prepared.align does, without its other cases.
        try:
            call = _cached.get((topk_ids.shape, topk_ids.dtype, topk_ids.device, block_size, num_experts,
                                pad_sorted_ids, ignore_invalid_experts, _NO_EXTRAS, backend))  # fmt: skip
        except (RuntimeError, TypeError):  # no shape, or not hashable: refused below
            call = None
        if call is not None:
            if call.required is not None:
                rows, blocks, total = _new_tensors(call)
                call.required(topk_ids, rows, blocks, total)
                return rows, blocks, total
            layout = _new_layout(call)
            call.run(topk_ids, None, None, None, layout)
            return layout.sorted_token_ids, layout.expert_ids, layout.num_tokens_post_padded
    run = operators.align if _watched(topk_ids, expert_map) else prepared.align
    layout = run(
        topk_ids, block_size, num_experts, expert_map, pad_sorted_ids, ignore_invalid_experts, None, None,
        ("scatter_idx",) if return_scatter_idx else _NO_EXTRAS, None, backend,
    )  # fmt: skip
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
    run = operators.align_batched if _watched(expert_num_tokens) else prepared.align_batched
    layout = run(expert_num_tokens, max_tokens_per_batch, block_size, None, _NO_EXTRAS, None, backend)
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
            is outside ``[0, num_experts)`` is dropped; ``-1`` is the customary one.
        block_size: rows of a block, ``B >= 1``; any integer, not only powers of two.
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
        BackendUnavailable (a ValueError): the requested backend cannot take this call.
    """
    extras = extras_of(expert_counts, expert_offsets, group_ends, positions, block_rows, scatter_idx)
    run = operators.align if _watched(topk_ids, expert_map, num_valid_tokens, error_word) else prepared.align
    return run(
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
    extras = extras_of(expert_counts, expert_offsets, group_ends, positions, block_rows, False)
    run = operators.align_batched if _watched(expert_num_tokens, error_word) else prepared.align_batched
    return run(expert_num_tokens, max_tokens_per_batch, block_size, error_word, extras, out, backend)


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
    """Which backend would take a call with these arguments, and why the others would not.  Computes nothing.

    With `num_experts` the call is :func:`align` of ``topk_ids``; with `max_tokens_per_batch` it is
    :func:`align_batched` of ``expert_num_tokens``.  Print the result.

    Raises:
        InvalidInput, InvalidType: where the call itself would refuse its arguments.
        BackendUnavailable: `backend` is not the name of one.
    """
    extras = extras_of(expert_counts, expert_offsets, group_ends, positions, block_rows, scatter_idx)
    if (num_experts is None) == (max_tokens_per_batch is None):
        raise InvalidInput(
            "num_experts, max_tokens_per_batch: expected one of them, got "
            f"{num_experts} and {max_tokens_per_batch}; the first asks about align, the second about align_batched"
        )
    if num_experts is None:
        assert max_tokens_per_batch is not None
        problem, _ = check_align_batched(tensor, max_tokens_per_batch, block_size, error_word, extras)
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
            extras,
        )
    return dispatch.explain_problem(problem, backend)


def new_error_word(device: torch.device | str) -> Tensor:
    """An int32 ``[1]`` of zeros for the `error_word` of :func:`align`: the opt-in validation mode.

    Backends set bits and never clear them, so one word can cover many calls, including those of a CUDA graph.
    """
    return torch.zeros(1, dtype=torch.int32, device=device)


def raise_for_errors(error_word: Tensor) -> None:
    """Read the word (this waits for the device), zero it, and raise InvalidInput if a call had set a bit."""
    seen = int(error_word.item())
    if seen:
        error_word.zero_()
        raise InvalidInput("; ".join(text for bit, text in ERROR_BITS.items() if seen & bit))


_names_of_flags: dict[tuple[bool, ...], tuple[str, ...]] = {(False,) * len(EXTRAS): _NO_EXTRAS}


def extras_of(*flags: bool) -> tuple[str, ...]:
    """Names of the optional outputs whose flags are set."""
    names = _names_of_flags.get(flags)
    if names is None:
        names = tuple(name for name, flag in zip(EXTRAS, flags, strict=True) if flag)
        _names_of_flags[tuple(map(bool, flags))] = names
    return names
