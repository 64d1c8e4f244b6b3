"""The layout in vectorised torch, on any device: the version to read.

Five steps: find the bin of each route; stable-sort the routes by bin; scan the padded counts; scatter the sorted
routes to their rows; look the expert of each block up in the scan.  No value is read back to the host, so it works
under CUDA graphs as well; it costs some twenty launches and two sorts' worth of traffic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import BAD_COUNT, BAD_ID, BAD_MAP, BAD_NUM_VALID, BlockLayout
from ...problem import AlignProblem

__all__ = ["align", "align_batched"]


def _signed(values: Tensor) -> Tensor:
    """`values` as int64.  A uint64 of 2**63 or more turns negative, and is out of every range both ways."""
    return values.view(torch.int64) if values.dtype is torch.uint64 else values.to(torch.int64)


def _report(error_word: Tensor | None, bit: int, wrong: Tensor) -> None:
    if error_word is not None:
        error_word.bitwise_or_((wrong.any().to(torch.int32) * bit).reshape(error_word.shape))


def align(
    problem: AlignProblem,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    num_valid_tokens: Tensor | None,
    error_word: Tensor | None,
    out: BlockLayout,
) -> None:
    n, num_bins = problem.routes, problem.num_experts
    device = problem.device
    ids = _signed(topk_ids.reshape(-1))
    routes = torch.arange(n, device=device)

    # The bin of each route; num_bins if it is dropped.
    here = (ids >= 0) & (ids < num_bins)
    if num_valid_tokens is not None:
        rows = n // problem.row_length if n else 0
        valid = num_valid_tokens.reshape(()).to(torch.int64)
        live = routes < valid * problem.row_length
        here = here & live
        _report(error_word, BAD_NUM_VALID, (valid < 0) | (valid > rows))
        _report(error_word, BAD_ID, live & ((ids < -1) | (ids >= num_bins) | _past_int64(topk_ids)))
    else:
        _report(error_word, BAD_ID, (ids < -1) | (ids >= num_bins) | _past_int64(topk_ids))
    bins = torch.where(here, ids, num_bins)
    local = None
    if expert_map is not None:
        local = _signed(expert_map)
        _report(error_word, BAD_MAP, (local < -1) | (local >= num_bins) | _past_int64(expert_map))
        local = torch.where((local >= 0) & (local < num_bins), local, -1)
        if problem.ignore_invalid_experts:
            mapped = local[bins.clamp(max=num_bins - 1)]
            bins = torch.where(here & (mapped >= 0), mapped, num_bins)

    # Stable order by bin: dropped routes sort to the end.
    sorted_bins, order = torch.sort(bins, stable=True)
    counts = torch.zeros(num_bins + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(0, bins, torch.ones_like(bins))
    counts = counts[:num_bins]
    offsets, ends = _scan(counts, problem.block_size)

    # The row of the r-th sorted route: the first row of its bin, plus its rank in the bin.
    first = torch.cat([ends - counts, ends[-1:]])[sorted_bins]
    row = offsets[sorted_bins] + routes - first
    kept = sorted_bins < num_bins
    # Dropped routes go to an extra row past the end.
    length = out.sorted_token_ids.numel()
    padded = torch.full((length + 1,), n, dtype=torch.int32, device=device)
    padded.scatter_(0, torch.where(kept, row, length), order.to(torch.int32))
    out.sorted_token_ids.copy_(padded[:length])

    labels = local if local is not None and not problem.ignore_invalid_experts else None
    _fill_blocks(out, counts, offsets, ends, problem.block_size, labels)
    if out.positions is not None:
        positions = torch.full((n,), -1, dtype=torch.int64, device=device)
        positions.scatter_(0, order, torch.where(kept, row, -1))
        out.positions.copy_(positions)
    if out.scatter_idx is not None:
        out.scatter_idx.copy_(torch.where(bins < num_bins, routes, -1).reshape(n, 1))


def align_batched(
    problem: AlignProblem, expert_num_tokens: Tensor, error_word: Tensor | None, out: BlockLayout
) -> None:
    batches, max_tokens = problem.num_experts, problem.row_length
    device = problem.device
    counts = _signed(expert_num_tokens)
    huge = _past_int64(expert_num_tokens)
    _report(error_word, BAD_COUNT, (counts < 0) | (counts > max_tokens) | huge)
    counts = torch.where(huge, max_tokens, counts.clamp(0, max_tokens))
    offsets, ends = _scan(counts, problem.block_size)

    sentinel = problem.routes
    length = out.sorted_token_ids.numel()
    rows = torch.arange(length, device=device)
    if length:
        batch = torch.searchsorted(offsets, rows, right=True) - 1
        used = batch < batches
        batch = batch.clamp(max=batches - 1)
        slot = rows - offsets[batch]
        out.sorted_token_ids.copy_(torch.where(used & (slot < counts[batch]), batch * max_tokens + slot, sentinel))
    _fill_blocks(out, counts, offsets, ends, problem.block_size, None)
    if out.positions is not None and sentinel:
        slots = torch.arange(max_tokens, device=device)
        grid = torch.where(slots < counts[:, None], offsets[:-1, None] + slots, -1)
        out.positions.copy_(grid.reshape(-1))


def _past_int64(values: Tensor) -> Tensor:
    """True where a uint64 has its highest bit set, which the int64 view shows as negative."""
    if values.dtype is not torch.uint64:
        return torch.zeros((), dtype=torch.bool, device=values.device)
    return values.reshape(-1).view(torch.int64) < 0


def _scan(counts: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """First rows of the bins, then the total `[E + 1]`; and cumulative counts `[E]`."""
    padded = (counts + block_size - 1) // block_size * block_size
    offsets = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(padded, 0, out=offsets[1:])
    return offsets, torch.cumsum(counts, 0)


def _fill_blocks(
    out: BlockLayout, counts: Tensor, offsets: Tensor, ends: Tensor, block_size: int, labels: Tensor | None
) -> None:
    """Fill the outputs that depend on the counts alone."""
    num_bins = counts.numel()
    out.num_tokens_post_padded.copy_(offsets[-1:])
    first_rows = torch.arange(out.expert_ids.numel(), device=counts.device) * block_size
    bins = torch.searchsorted(offsets, first_rows, right=True) - 1
    used = bins < num_bins
    if num_bins:
        bins = bins.clamp(max=num_bins - 1)
        named = bins if labels is None else labels[bins]
        out.expert_ids.copy_(torch.where(used, named, -1))
        if out.block_rows is not None:
            rows = (counts[bins] - (first_rows - offsets[bins])).clamp(0, block_size)
            out.block_rows.copy_(torch.where(used, rows, 0))
    if out.expert_counts is not None:
        out.expert_counts.copy_(counts)
    if out.expert_offsets is not None:
        out.expert_offsets.copy_(offsets)
    if out.group_ends is not None:
        out.group_ends.copy_(ends)
