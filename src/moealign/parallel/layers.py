"""A layer of experts over several ranks, in two modes: replicated tokens, and dispatched routes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import modes
from ..alignment import align
from ..errors import InvalidInput
from ..experts.layer import fused_moe
from ..layout import cdiv
from .collectives import Copy, Exchange, Group, Reduce, collective, member, refuse_tracing
from .exchange import ExpertExchange
from .experts import ExpertPlacement

__all__ = ["dispatched_moe", "replicated_moe"]


@torch.compiler.disable(reason="collectives of moealign run eagerly")
def replicated_moe(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    placement: ExpertPlacement,
    *,
    group: Group = None,
    **options: Any,
) -> Tensor:
    """:func:`fused_moe` if every rank has all tokens and its own experts; every rank gets the same result.

    Each rank aligns with its expert map, which drops the routes of other ranks in the kernel, and computes its own
    routes; one all-reduce adds up the results.  It does not wait for the device.

    Args:
        hidden_states, topk_weights, topk_ids: ``[T, H]``, ``[T, k]``, ``[T, k]`` with global ids, equal on every rank.
        gate_up_proj, down_proj: this rank's experts, ``[slots, ...]``, from :meth:`ExpertPlacement.shard`.
        placement: the placement, for as many ranks as `group` has.
        group: a process group or a one-dimensional DeviceMesh; by default all ranks.
        options: further arguments of :func:`fused_moe`.

    Returns:
        ``[T, H]``.  Every rank gets the gradients of the whole layer: in full for the inputs, and for its own experts'
        weights.  The collective decides the order of the sum over ranks, so results are equal up to rounding.

    Raises:
        InvalidInput: sizes that do not match.
        RankFailed: a collective failed or timed out; the state of the other ranks is unknown.
    """
    refuse_tracing("replicated_moe", hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids)
    group, rank = member(placement, group, gate_up_proj)
    hidden = Copy.apply(hidden_states, group)
    weights = Copy.apply(topk_weights, group)
    if placement.replicated:
        bins = placement.bins(topk_ids)
        here = (bins >= rank * placement.slots) & (bins < (rank + 1) * placement.slots)
        local = torch.where(here, bins - rank * placement.slots, -1)
        options.setdefault("expected_routes", cdiv(topk_ids.numel(), placement.ranks))
        out = fused_moe(hidden, gate_up_proj, down_proj, weights, local, **options)
    else:
        local_map = placement.expert_map(rank, topk_ids.device)
        out = fused_moe(hidden, gate_up_proj, down_proj, weights, topk_ids, expert_map=local_map, **options)
    return Reduce.apply(out, group)  # type: ignore[no-any-return]


@torch.compiler.disable(reason="collectives of moealign run eagerly")
def dispatched_moe(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    placement: ExpertPlacement,
    *,
    group: Group = None,
    chunks: int = 1,
    capacity: int | None = None,
    error_word: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """:func:`fused_moe` if every rank has its own tokens: routes travel to the ranks of their experts and back.

    One alignment sorts the routes by rank and expert and counts them.  The ranks exchange counts, then rows, compute
    the rows that arrive, and send them back to be summed over ``k`` in order.  It waits for the device once, for the
    counts, which the collective needs as numbers.  With a `capacity`, it is a call of an :class:`ExpertExchange`, which
    waits for nothing.

    Args:
        hidden_states, topk_weights, topk_ids: this rank's tokens, ``[T, H]``, ``[T, k]``, ``[T, k]`` with global ids;
            ``T`` may differ from rank to rank, and be 0.
        gate_up_proj, down_proj: this rank's experts, ``[slots, ...]``.
        placement, group: as in :func:`replicated_moe`.
        chunks: number of parts that travel separately, so that one is computed while the next is in transit.  The same
            on every rank.  With gradients, the parts run one after the other.
        capacity: rows from one rank to another, the same on every rank; further routes are dropped.
        error_word: with `capacity`, as of :class:`ExpertExchange`.
        options: further arguments of :func:`fused_moe`, except those about ids.

    Returns:
        ``[T, H]``.  Differentiable; the same tensors must require gradients on every rank: backward communicates too.

    Raises:
        InvalidInput: sizes that do not match.
        RankFailed: a collective failed or timed out.
    """
    refuse_tracing("dispatched_moe", hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids)
    group, _ = member(placement, group, gate_up_proj)
    if type(chunks) is not int or chunks < 1:
        raise InvalidInput(f"chunks: expected an int of at least 1, got {chunks!r}")
    if capacity is not None:
        if chunks != 1:
            raise InvalidInput(f"chunks: expected 1 with a capacity, got {chunks}")
        exchange = ExpertExchange.of(placement, capacity, group, hidden_states.device)
        inputs = (hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids)
        return exchange(*inputs, error_word=error_word, **options)
    if error_word is not None:
        raise InvalidInput("error_word: expected one only with a capacity; without it, no route is dropped")
    tokens, top_k = topk_ids.shape
    parts = [(tokens * c // chunks, tokens * (c + 1) // chunks) for c in range(chunks)]
    bins = placement.bins(topk_ids)
    layouts = [
        align(
            bins[a:b].contiguous(),
            block_size=1,
            num_experts=placement.ranks * placement.slots,
            expert_counts=True,
            positions=True,
        )
        for a, b in parts
    ]
    # One exchange for all parts, and the only wait: [ranks, chunks, slots] both ways.
    shape = (chunks, placement.ranks, placement.slots)
    sent = torch.cat([layout.expert_counts for layout in layouts]).view(shape)  # type: ignore[misc]
    sent = sent.transpose(0, 1).contiguous()
    came = torch.empty_like(sent)
    # wait() raises under TORCH_NCCL_BLOCKING_WAIT, where the synchronous call would not.
    collective(group, lambda: dist.all_to_all_single(came, sent, group=group, async_op=True).wait())
    both = torch.stack((sent, came)).cpu()
    sends, comes = both.sum(3).tolist()

    gradients = modes.wants_gradient(hidden_states, gate_up_proj, down_proj, topk_weights, *options.values())
    slots = torch.arange(placement.slots, dtype=torch.int32, device=bins.device)
    state: list[Any] = []
    for c, (a, b) in enumerate(parts):
        outward = [sends[r][c] for r in range(placement.ranks)]
        inward = [comes[r][c] for r in range(placement.ranks)]
        order = layouts[c].sorted_token_ids[: sum(outward)].to(torch.int64)
        rows = hidden_states[a:b].index_select(0, order // max(top_k, 1))
        state.append((outward, inward, Exchange.start(rows, inward, outward, group, gradients)))
    back = []
    for c, (outward, inward, exchange) in enumerate(state):
        rows = exchange.finish()
        counts = came[:, c].reshape(-1)
        ids = slots.repeat(placement.ranks).repeat_interleave(counts, output_size=sum(inward))
        ones = topk_weights.new_ones(len(ids), 1)
        # Also without rows a function of all inputs, so that the backward of every rank makes the same exchanges.
        result = fused_moe(rows, gate_up_proj, down_proj, ones, ids.unsqueeze(1), **options)
        back.append(Exchange.start(result, outward, inward, group, gradients))
    out = []
    for c, (a, b) in enumerate(parts):
        returned = back[c].finish()
        positions = layouts[c].positions
        assert positions is not None
        kept = (positions >= 0).view(b - a, top_k, 1)
        padded = torch.cat((returned, returned.new_zeros(1, hidden_states.shape[1])))
        of_route = padded.index_select(0, torch.where(positions >= 0, positions, len(returned)).to(torch.int64))
        of_route = of_route.view(b - a, top_k, hidden_states.shape[1])
        weighted = of_route * topk_weights[a:b].unsqueeze(-1).masked_fill(~kept, 0)
        total = weighted.sum(1, dtype=torch.promote_types(weighted.dtype, torch.float32))
        out.append(total.to(hidden_states.dtype))
    return torch.cat(out)
