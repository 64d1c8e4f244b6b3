# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the block-aligned layout.  One file because all of them read ids and fill blocks by the same
functions.  Only a first call imports it.

Few routes: `align_small`, one program that compares all pairs of routes, whatever the number of experts.
More: `align_few`, whose programs each count all routes, then place a few of them and fill a few blocks.
Otherwise three launches, for n routes in C chunks and E bins:

1. `rank_chunks`   a program per chunk: the rank of each route among its chunk's routes of the same bin, and counts.
                   Reads n ids, writes n ranks and C*E counts.
2. `scan_bins`     a program per few bins: prefix sums of the counts over chunks; the last program to finish turns the
                   totals into offsets.  Reads and writes C*E counts.
3. `place_routes`  routes to their rows, then everything else: padding, tail, entries of blocks.
                   Reads n ids and ranks, writes every output row once.

Batched: `scan_counts` (one program), then `fill_batches`.

A pairwise tile is reduced over its first axis, so that the partners of a route lie in one thread's registers.
Integer atomics accumulate only flags and arrivals, so results do not depend on the order of execution.

Arguments have the same names in every kernel.  Inputs, of which any but `ids` may be None: `ids`, `expert_map`,
`num_valid` and `error_word`, or `batch_counts`.  Outputs: the fields of :class:`moealign.layout.BlockLayout`, with
`total` for num_tokens_post_padded; extras may be None.  Scratch, int32: `table` [C, E], `ranks` [n], `totals` [E],
`offsets` [E + 1], `arrived` [1].  Constants: CONTIGUOUS, whether route i is at ids[i], else at row i // `cols` and
column i % `cols` of the strides; UNSIGNED and MAP_UNSIGNED, whether ids and the map are unsigned integers passed as
signed; IGNORE, whether the map turns ids into bins; NAMED, whether it turns bins into entries of expert_ids.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...layout import BAD_COUNT, BAD_ID, BAD_MAP, BAD_NUM_VALID

__all__ = ["align_few", "align_small", "fill_batches", "place_routes", "rank_chunks", "scan_bins", "scan_counts"]

_BAD_ID, _BAD_MAP, _BAD_NUM_VALID, _BAD_COUNT = map(tl.constexpr, (BAD_ID, BAD_MAP, BAD_NUM_VALID, BAD_COUNT))
_RANK_SHIFT = tl.constexpr(16)  # a rank above a count in one word: one reduction sums both
_RANK_AND_COUNT = tl.constexpr((1 << 16) + 1)
_COUNT_MASK = tl.constexpr((1 << 16) - 1)

# Sizes change from call to call, with them addresses if outputs share an allocation: neither may recompile a kernel.
_SIZES = (
    "num_routes", "limit_rows", "top_k", "cols", "row_stride", "col_stride", "map_stride", "num_bins", "num_chunks",
    "length", "num_blocks", "num_placing", "num_filling", "max_tokens", "count_stride",
)  # fmt: skip
_POINTERS = (
    "ids", "expert_map", "num_valid", "error_word", "table", "ranks", "arrived", "totals", "offsets", "sorted_ids",
    "expert_ids", "total", "expert_counts", "expert_offsets", "group_ends", "positions", "block_rows", "scatter_idx",
    "batch_counts",
)  # fmt: skip


def _kernel(function):  # type: ignore[no-untyped-def]
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(
        function,
        do_not_specialize=[name for name in _SIZES if name in names],
        do_not_specialize_on_alignment=[name for name in _POINTERS if name in names],
    )


# ---- Shared by the kernels ----------------------------------------------------------------------------------------


@triton.jit
def _widened(values, UNSIGNED: tl.constexpr):
    """`values` as int32, or int64 if they are.  Unsigned ones, passed as signed of the same width, that do not fit the
    result are negative, and so out of range as well."""
    wide = values
    if values.dtype != tl.int64:
        wide = values.to(tl.int32)
    if UNSIGNED and values.dtype == tl.int8:
        wide = wide & 0xFF
    if UNSIGNED and values.dtype == tl.int16:
        wide = wide & 0xFFFF
    return wide


@triton.jit
def _local_bins(expert_map, map_stride, experts, mask, num_bins, MAP_UNSIGNED: tl.constexpr):
    """The map's value for each expert, -1 if it is no bin; and whether it is neither a bin nor -1."""
    value = _widened(tl.load(expert_map + experts.to(tl.int64) * map_stride, mask=mask, other=0), MAP_UNSIGNED)
    inside = (value >= 0) & (value < num_bins)
    wrong = ~inside & mask
    if not MAP_UNSIGNED:
        wrong = wrong & (value != -1)
    return tl.where(inside, value, -1).to(tl.int32), wrong


@triton.jit
def _bins(
    route, live, ids, cols, row_stride, col_stride, expert_map, map_stride, num_bins,
    CONTIGUOUS: tl.constexpr, UNSIGNED: tl.constexpr, MAP_UNSIGNED: tl.constexpr, IGNORE: tl.constexpr,
):  # fmt: skip
    """The bin of each route, num_bins for a dropped one; and whether its id is neither an expert nor -1."""
    if CONTIGUOUS:
        at = route
    else:
        at = (route // cols) * row_stride + (route % cols) * col_stride
    expert = _widened(tl.load(ids + at, mask=live, other=0), UNSIGNED)
    kept = live & (expert >= 0) & (expert < num_bins)
    wrong = live & ~kept
    if not UNSIGNED:
        wrong = wrong & (expert != -1)
    bins = tl.where(kept, expert, num_bins).to(tl.int32)
    if IGNORE:
        local, _ = _local_bins(expert_map, map_stride, bins, kept, num_bins, MAP_UNSIGNED)
        bins = tl.where(kept & (local >= 0), local, num_bins)
    return bins, wrong


@triton.jit
def _limit(num_valid, num_routes, limit_rows, top_k):
    """The first route past the valid tokens; and whether num_valid is out of range."""
    limit = num_routes.to(tl.int64)
    wrong = num_routes < 0
    if num_valid is not None:
        valid = tl.load(num_valid)
        limit = tl.minimum(tl.maximum(valid, 0), limit_rows).to(tl.int64) * top_k
        wrong = (valid < 0) | (valid > limit_rows)
    return limit, wrong


@triton.jit
def _report(error_word, bits):
    if bits != 0:
        tl.atomic_or(error_word, bits)


@triton.jit
def _ranks(bins, SIZE: tl.constexpr):
    """For each of SIZE routes: the number of earlier ones, and of all, in its bin."""
    lane = tl.arange(0, SIZE)
    weight = tl.where(lane[:, None] < lane[None, :], _RANK_AND_COUNT, 1)
    both = tl.sum(tl.where(bins[:, None] == bins[None, :], weight, 0), axis=0)
    return both >> _RANK_SHIFT, both & _COUNT_MASK


@triton.jit
def _write_blocks(
    block, bin_, used, skipped, rows, expert_map, sorted_ids, expert_ids, block_rows,
    num_routes, num_bins, length, num_blocks, map_stride, max_tokens,
    BLOCK_SIZE: tl.constexpr, MAP_UNSIGNED: tl.constexpr, NAMED: tl.constexpr, BATCHED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Entries of blocks with `rows` routes of bin_, which are behind its first `skipped` ones; and the padding rows.
    With BATCHED also the rows of routes."""
    live = block < num_blocks
    name = bin_
    if NAMED:
        name, _ = _local_bins(expert_map, map_stride, bin_, used, num_bins, MAP_UNSIGNED)
    tl.store(expert_ids + block, tl.where(used, name, -1), mask=live)
    if block_rows is not None:
        tl.store(block_rows + block, rows, mask=live)
    for first in range(0, BLOCK_SIZE, ROWS):
        inner = first + tl.arange(0, ROWS)
        at = (block * BLOCK_SIZE)[:, None] + inner[None, :]
        inside = live[:, None] & (inner < BLOCK_SIZE)[None, :] & (at < length)
        padding = inner[None, :] >= rows[:, None]
        if BATCHED:
            slot = (bin_ * max_tokens + skipped)[:, None] + inner[None, :]
            tl.store(sorted_ids + at, tl.where(padding, num_routes, slot), mask=inside)
        else:
            tl.store(sorted_ids + at, num_routes, mask=inside & padding)


# ---- Few routes: one program -----------------------------------------------------------------------------------


@_kernel
def align_small(
    ids, expert_map, num_valid, error_word,
    sorted_ids, expert_ids, total, expert_counts, expert_offsets, group_ends, positions, block_rows, scatter_idx,
    num_routes, limit_rows, top_k, cols, row_stride, col_stride, map_stride, num_bins, length, num_blocks,
    BLOCK_SIZE: tl.constexpr, CONTIGUOUS: tl.constexpr, UNSIGNED: tl.constexpr, MAP_UNSIGNED: tl.constexpr,
    IGNORE: tl.constexpr, SIZE: tl.constexpr, FILL: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """The whole alignment of at most SIZE routes.  Launch: one program.

    SIZE is a power of two; FILL elements are stored, and BINS bins scanned, per step.
    """
    limit, wrong_limit = _limit(num_valid, num_routes, limit_rows, top_k)
    lane = tl.arange(0, SIZE)
    route = lane.to(tl.int64)
    bins, wrong = _bins(
        route, route < limit, ids, cols, row_stride, col_stride, expert_map, map_stride, num_bins,
        CONTIGUOUS, UNSIGNED, MAP_UNSIGNED, IGNORE,
    )  # fmt: skip

    # Store sentinels everywhere while the ids are being loaded; after the barrier, routes overwrite them.
    fill = tl.arange(0, FILL)
    for first in range(0, length, FILL):
        tl.store(sorted_ids + first + fill, num_routes, mask=fill < length - first)
    for first in range(0, num_blocks, FILL):
        tl.store(expert_ids + first + fill, -1, mask=fill < num_blocks - first)
        if block_rows is not None:
            tl.store(block_rows + first + fill, 0, mask=fill < num_blocks - first)
    if expert_counts is not None:
        for first in range(0, num_bins, FILL):
            tl.store(expert_counts + first + fill, 0, mask=fill < num_bins - first)

    kept = bins < num_bins
    rank, count = _ranks(bins, SIZE)
    blocks = tl.where(kept & (rank == 0), (count + (BLOCK_SIZE - 1)) // BLOCK_SIZE, 0)
    first_block = tl.sum(tl.where(bins[:, None] < bins[None, :], blocks[:, None], 0), axis=0)
    row = first_block * BLOCK_SIZE + rank
    tl.store(total, tl.sum(blocks, axis=0) * BLOCK_SIZE)
    if positions is not None:
        tl.store(positions + lane, tl.where(kept, row, -1), mask=lane < num_routes)
    if scatter_idx is not None:
        tl.store(scatter_idx + lane, tl.where(kept, lane, -1), mask=lane < num_routes)

    name = bins
    if expert_map is not None and not IGNORE:
        name, _wrong_name = _local_bins(expert_map, map_stride, bins, kept, num_bins, MAP_UNSIGNED)
    opens = kept & (rank % BLOCK_SIZE == 0)
    block = first_block + rank // BLOCK_SIZE
    tl.debug_barrier()
    tl.store(sorted_ids + row, lane, mask=kept)
    tl.store(expert_ids + block, name, mask=opens)
    if block_rows is not None:
        tl.store(block_rows + block, tl.minimum(count - rank, BLOCK_SIZE), mask=opens)
    if expert_counts is not None:
        tl.store(expert_counts + bins, count, mask=kept & (rank == 0))

    if expert_offsets is not None or group_ends is not None:
        some = tl.arange(0, BINS)
        for first in range(0, num_bins + 1, BINS):
            bin_ = first + some
            below = bins[:, None] < bin_[None, :]
            if expert_offsets is not None:
                start = tl.sum(tl.where(below, blocks[:, None], 0), axis=0) * BLOCK_SIZE
                tl.store(expert_offsets + bin_, start, mask=bin_ <= num_bins)
            if group_ends is not None:
                ended = tl.sum(tl.where(below & kept[:, None], 1, 0), axis=0)
                tl.store(group_ends + bin_ - 1, ended, mask=(bin_ <= num_bins) & (bin_ > 0))

    if error_word is not None:
        bits = tl.max(wrong.to(tl.int32), axis=0) * _BAD_ID + wrong_limit.to(tl.int32) * _BAD_NUM_VALID
        if expert_map is not None:
            seen = tl.zeros([FILL], tl.int32)
            for first in range(0, num_bins, FILL):
                _value, wrong_map = _local_bins(
                    expert_map, map_stride, first + fill, fill < num_bins - first, num_bins, MAP_UNSIGNED
                )
                seen = seen | wrong_map.to(tl.int32)
            bits = bits | (tl.max(seen, axis=0) * _BAD_MAP)
        _report(error_word, bits)


# ---- More routes: independent programs --------------------------------------------------------------------------


@_kernel
def align_few(
    ids, expert_map, num_valid, error_word,
    sorted_ids, expert_ids, total, expert_counts, expert_offsets, group_ends, positions, block_rows, scatter_idx,
    num_routes, limit_rows, top_k, cols, row_stride, col_stride, map_stride, num_bins, length, num_blocks,
    BLOCK_SIZE: tl.constexpr, CONTIGUOUS: tl.constexpr, UNSIGNED: tl.constexpr, MAP_UNSIGNED: tl.constexpr,
    IGNORE: tl.constexpr, NAMED: tl.constexpr, SIZE: tl.constexpr, BINS: tl.constexpr,
    OWN: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The whole alignment by independent programs.  Launch: max(cdiv(n, OWN), cdiv(number of blocks, BLOCKS)) programs.

    Each counts all of at most SIZE routes in at most BINS bins, both powers of two, then places OWN routes and fills
    BLOCKS blocks, ROWS rows of each per step.  Program 0 also writes the outputs of bins and checks the inputs.
    """
    part = tl.program_id(0)
    limit, wrong_limit = _limit(num_valid, num_routes, limit_rows, top_k)
    lane = tl.arange(0, SIZE)
    route = lane.to(tl.int64)
    bins, wrong = _bins(
        route, route < limit, ids, cols, row_stride, col_stride, expert_map, map_stride, num_bins,
        CONTIGUOUS, UNSIGNED, MAP_UNSIGNED, IGNORE,
    )  # fmt: skip
    kept = bins < num_bins
    counts = tl.histogram(tl.where(kept, bins, 0), BINS, mask=kept)
    blocks = (counts + (BLOCK_SIZE - 1)) // BLOCK_SIZE
    ends = tl.cumsum(blocks, 0)
    begins = ends - blocks

    if part * OWN < num_routes:
        mine = part * OWN + tl.arange(0, OWN)
        own, _ = _bins(
            mine.to(tl.int64), mine < limit, ids, cols, row_stride, col_stride, expert_map, map_stride, num_bins,
            CONTIGUOUS, UNSIGNED, MAP_UNSIGNED, IGNORE,
        )  # fmt: skip
        placed = own < num_bins
        before = (bins[:, None] == own[None, :]) & (lane[:, None] < mine[None, :])
        rank = tl.sum(before.to(tl.int32), axis=0)
        row = tl.gather(begins, tl.minimum(own, BINS - 1), 0) * BLOCK_SIZE + rank
        tl.store(sorted_ids + row, mine, mask=placed)
        if positions is not None:
            tl.store(positions + mine, tl.where(placed, row, -1), mask=mine < num_routes)
        if scatter_idx is not None:
            tl.store(scatter_idx + mine, tl.where(placed, mine, -1), mask=mine < num_routes)

    if part * BLOCKS < num_blocks:
        block = part * BLOCKS + tl.arange(0, BLOCKS)
        bin_ = tl.sum((ends[:, None] <= block[None, :]).to(tl.int32), axis=0)  # the number of bins that end before it
        used = bin_ < BINS
        bin_ = tl.minimum(bin_, BINS - 1)
        skipped = (block - tl.gather(begins, bin_, 0)) * BLOCK_SIZE
        rows = tl.where(used, tl.minimum(tl.gather(counts, bin_, 0) - skipped, BLOCK_SIZE), 0)
        _write_blocks(
            block, bin_, used, skipped, rows, expert_map, sorted_ids, expert_ids, block_rows,
            num_routes, num_bins, length, num_blocks, map_stride, 0,
            BLOCK_SIZE, MAP_UNSIGNED, NAMED, False, ROWS,
        )  # fmt: skip

    if part == 0:
        tl.store(total, tl.sum(blocks, axis=0) * BLOCK_SIZE)
        bin_ = tl.arange(0, BINS)
        if expert_counts is not None:
            tl.store(expert_counts + bin_, counts, mask=bin_ < num_bins)
        if expert_offsets is not None:
            tl.store(expert_offsets + bin_, begins * BLOCK_SIZE, mask=bin_ < num_bins)
            tl.store(expert_offsets + num_bins, tl.sum(blocks, axis=0) * BLOCK_SIZE)
        if group_ends is not None:
            tl.store(group_ends + bin_, tl.cumsum(counts, 0), mask=bin_ < num_bins)
        if error_word is not None:
            bits = tl.max(wrong.to(tl.int32), axis=0) * _BAD_ID + wrong_limit.to(tl.int32) * _BAD_NUM_VALID
            if expert_map is not None:
                _, wrong_map = _local_bins(expert_map, map_stride, bin_, bin_ < num_bins, num_bins, MAP_UNSIGNED)
                bits = bits | (tl.max(wrong_map.to(tl.int32), axis=0) * _BAD_MAP)
            _report(error_word, bits)


# ---- Launch 1 of 3: ranks inside a chunk --------------------------------------------------------------------------


@_kernel
def rank_chunks(
    ids, expert_map, num_valid, error_word,
    table, ranks, arrived,
    num_routes, limit_rows, top_k, cols, row_stride, col_stride, map_stride, num_bins,
    CONTIGUOUS: tl.constexpr, UNSIGNED: tl.constexpr, MAP_UNSIGNED: tl.constexpr, IGNORE: tl.constexpr,
    CHUNK: tl.constexpr, SIZE: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Ranks of each chunk's routes, -1 for dropped ones, and counts of its bins.  Launch: a program per CHUNK routes.

    Writes `ranks`, `table` and arrived = 0.  SIZE routes are compared, and FILL counts zeroed, per step.
    """
    chunk = tl.program_id(0).to(tl.int64)
    counts = table + chunk * num_bins  # private to this program until the next launch
    fill = tl.arange(0, FILL)
    for first in range(0, num_bins, FILL):
        tl.store(counts + first + fill, 0, mask=fill < num_bins - first)
    if chunk == 0:
        tl.store(arrived, 0)
    limit, wrong_limit = _limit(num_valid, num_routes, limit_rows, top_k)
    seen = tl.zeros([SIZE], tl.int32)
    tl.debug_barrier()

    for first in range(0, CHUNK, SIZE):
        route = chunk * CHUNK + first + tl.arange(0, SIZE)
        bins, wrong = _bins(
            route, route < limit, ids, cols, row_stride, col_stride, expert_map, map_stride, num_bins,
            CONTIGUOUS, UNSIGNED, MAP_UNSIGNED, IGNORE,
        )  # fmt: skip
        seen = seen | wrong.to(tl.int32)
        kept = bins < num_bins
        before = tl.load(counts + bins, mask=kept, other=0)
        rank, count = _ranks(bins, SIZE)
        tl.store(ranks + route, tl.where(kept, before + rank, -1), mask=route < num_routes)
        tl.debug_barrier()  # every thread has loaded `before`
        tl.store(counts + bins, before + count, mask=kept & (rank == 0))
        tl.debug_barrier()

    if error_word is not None:
        bits = tl.max(seen, axis=0) * _BAD_ID
        if chunk == 0:
            bits = bits | (wrong_limit.to(tl.int32) * _BAD_NUM_VALID)
        _report(error_word, bits)


# ---- Launch 2 of 3: first rows of chunks and bins ------------------------------------------------------------------


@triton.jit
def _begin_bins(
    bin_, counts, begin, ended, num_bins, offsets, expert_counts, expert_offsets, group_ends, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """Write the outputs of bins that follow `begin` rows and `ended` routes; returns both sums behind these bins."""
    live = bin_ < num_bins
    padded = (counts + (BLOCK_SIZE - 1)) // BLOCK_SIZE * BLOCK_SIZE
    first_row = begin + tl.cumsum(padded, 0) - padded
    tl.store(offsets + bin_, first_row, mask=live)
    if expert_counts is not None:
        tl.store(expert_counts + bin_, counts, mask=live)
    if expert_offsets is not None:
        tl.store(expert_offsets + bin_, first_row, mask=live)
    if group_ends is not None:
        tl.store(group_ends + bin_, ended + tl.cumsum(counts, 0), mask=live)
        ended += tl.sum(counts, axis=0)
    return begin + tl.sum(padded, axis=0), ended


@_kernel
def scan_bins(
    expert_map, error_word,
    table, totals, offsets, arrived,
    total, expert_counts, expert_offsets, group_ends,
    num_chunks, num_bins, map_stride,
    BLOCK_SIZE: tl.constexpr, MAP_UNSIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Prefix sums over chunks, then over bins.  Launch: a program per COLUMNS bins.

    Turns the counts in `table` into the number of routes in earlier chunks, ROWS chunks per step.  The last program to
    arrive scans `totals`, SCAN bins per step, and writes `offsets` and the outputs of bins.
    """
    mine = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = mine < num_bins
    before = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, num_chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)
        at = table + chunk[:, None].to(tl.int64) * num_bins + mine[None, :]
        inside = (chunk < num_chunks)[:, None] & live[None, :]
        counts = tl.load(at, mask=inside, other=0)
        tl.store(at, before[None, :] + tl.cumsum(counts, 0) - counts, mask=inside)
        before += tl.sum(counts, axis=0)
    tl.store(totals + mine, before, mask=live)
    if error_word is not None and expert_map is not None:
        _, wrong_map = _local_bins(expert_map, map_stride, mine, live, num_bins, MAP_UNSIGNED)
        _report(error_word, tl.max(wrong_map.to(tl.int32), axis=0) * _BAD_MAP)

    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.debug_barrier()
        begin = 0
        ended = 0
        for first in range(0, num_bins, SCAN):
            bin_ = first + tl.arange(0, SCAN)
            counts = tl.load(totals + bin_, mask=bin_ < num_bins, other=0, cache_modifier=".cg")
            begin, ended = _begin_bins(
                bin_, counts, begin, ended, num_bins, offsets, expert_counts, expert_offsets, group_ends, BLOCK_SIZE
            )
        tl.store(offsets + num_bins, begin)
        tl.store(total, begin)
        if expert_offsets is not None:
            tl.store(expert_offsets + num_bins, begin)


# ---- Launch 3 of 3: every row of the outputs ----------------------------------------------------------------------


@triton.jit
def _bin_at(row, offsets, num_bins, STEPS: tl.constexpr):
    """The last bin that begins at or before each row; num_bins for a row past all bins."""
    bin_ = tl.zeros_like(row).to(tl.int32)
    for step in tl.static_range(STEPS):
        probe = bin_ + (1 << (STEPS - 1 - step))
        inside = probe <= num_bins
        begins = tl.load(offsets + probe, mask=inside, other=0)
        bin_ = tl.where(inside & (begins <= row), probe, bin_)
    return bin_


@triton.jit
def _fill_blocks(
    part, totals, offsets, expert_map, sorted_ids, expert_ids, block_rows,
    num_routes, num_bins, length, num_blocks, map_stride, max_tokens,
    BLOCK_SIZE: tl.constexpr, MAP_UNSIGNED: tl.constexpr, NAMED: tl.constexpr, BATCHED: tl.constexpr,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Part `part` of all blocks, BLOCKS of them; a search in `offsets` gives their bins."""
    block = part.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row = block * BLOCK_SIZE
    bin_ = _bin_at(row, offsets, num_bins, STEPS)
    used = (block < num_blocks) & (bin_ < num_bins)
    skipped = (row - tl.load(offsets + bin_, mask=used, other=0)).to(tl.int32)
    rows = tl.load(totals + bin_, mask=used, other=0) - skipped
    rows = tl.where(used, tl.minimum(tl.maximum(rows, 0), BLOCK_SIZE), 0)
    _write_blocks(
        block, bin_, used, skipped, rows, expert_map, sorted_ids, expert_ids, block_rows,
        num_routes, num_bins, length, num_blocks, map_stride, max_tokens,
        BLOCK_SIZE, MAP_UNSIGNED, NAMED, BATCHED, ROWS,
    )  # fmt: skip


@_kernel
def place_routes(
    ids, expert_map,
    table, ranks, totals, offsets,
    sorted_ids, expert_ids, positions, block_rows, scatter_idx,
    num_routes, cols, row_stride, col_stride, map_stride, num_bins, length, num_blocks, num_placing,
    BLOCK_SIZE: tl.constexpr, CONTIGUOUS: tl.constexpr, UNSIGNED: tl.constexpr, MAP_UNSIGNED: tl.constexpr,
    IGNORE: tl.constexpr, NAMED: tl.constexpr, CHUNK: tl.constexpr, PLACE: tl.constexpr,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Every row of the outputs.  Launch: `num_placing` programs of PLACE routes, then one per BLOCKS blocks.

    CHUNK is that of `rank_chunks`.  The search for a block's bin takes STEPS steps, the bits of the number of bins.
    """
    part = tl.program_id(0)
    if part < num_placing:
        route = part.to(tl.int64) * PLACE + tl.arange(0, PLACE)
        live = route < num_routes
        rank = tl.load(ranks + route, mask=live, other=-1)
        kept = rank >= 0
        bins, _ = _bins(
            route, live, ids, cols, row_stride, col_stride, expert_map, map_stride, num_bins,
            CONTIGUOUS, UNSIGNED, MAP_UNSIGNED, IGNORE,
        )  # fmt: skip
        begin = tl.load(offsets + bins, mask=kept, other=0)
        before = tl.load(table + (route // CHUNK) * num_bins + bins, mask=kept, other=0)
        row = begin + before + rank
        tl.store(sorted_ids + row, route.to(tl.int32), mask=kept)
        if positions is not None:
            tl.store(positions + route, tl.where(kept, row, -1), mask=live)
        if scatter_idx is not None:
            tl.store(scatter_idx + route, tl.where(kept, route, -1).to(tl.int32), mask=live)
    else:
        _fill_blocks(
            part - num_placing, totals, offsets, expert_map, sorted_ids, expert_ids, block_rows,
            num_routes, num_bins, length, num_blocks, map_stride, 0,
            BLOCK_SIZE, MAP_UNSIGNED, NAMED, False, BLOCKS, ROWS, STEPS,
        )  # fmt: skip


# ---- Batched ------------------------------------------------------------------------------------------------------


@_kernel
def scan_counts(
    batch_counts, error_word,
    totals, offsets,
    total, expert_counts, expert_offsets, group_ends,
    num_bins, max_tokens, count_stride,
    BLOCK_SIZE: tl.constexpr, UNSIGNED: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Clamped counts of batches to `totals`, their first rows to `offsets`, and the outputs of bins.  Launch: one
    program, which scans SCAN batches per step."""
    begin = 0
    ended = 0
    seen = tl.zeros([SCAN], tl.int32)
    for first in range(0, num_bins, SCAN):
        bin_ = first + tl.arange(0, SCAN)
        live = bin_ < num_bins
        raw = _widened(tl.load(batch_counts + bin_.to(tl.int64) * count_stride, mask=live, other=0), UNSIGNED)
        counts = tl.minimum(tl.maximum(raw, 0), max_tokens).to(tl.int32)
        if UNSIGNED:
            counts = tl.where(raw < 0, max_tokens, counts)
        seen = seen | ((raw < 0) | (raw > max_tokens)).to(tl.int32)
        tl.store(totals + bin_, counts, mask=live)
        begin, ended = _begin_bins(
            bin_, counts, begin, ended, num_bins, offsets, expert_counts, expert_offsets, group_ends, BLOCK_SIZE
        )
    tl.store(offsets + num_bins, begin)
    tl.store(total, begin)
    if expert_offsets is not None:
        tl.store(expert_offsets + num_bins, begin)
    if error_word is not None:
        _report(error_word, tl.max(seen, axis=0) * _BAD_COUNT)


@_kernel
def fill_batches(
    totals, offsets,
    sorted_ids, expert_ids, positions, block_rows,
    num_routes, num_bins, length, num_blocks, max_tokens, num_filling,
    BLOCK_SIZE: tl.constexpr, PLACE: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Every row of the outputs.  Launch: `num_filling` programs of BLOCKS blocks, then, for `positions`, one per PLACE
    routes."""
    part = tl.program_id(0)
    if part < num_filling:
        _fill_blocks(
            part, totals, offsets, None, sorted_ids, expert_ids, block_rows,
            num_routes, num_bins, length, num_blocks, 0, max_tokens,
            BLOCK_SIZE, False, False, True, BLOCKS, ROWS, STEPS,
        )  # fmt: skip
    elif positions is not None:
        route = (part - num_filling).to(tl.int64) * PLACE + tl.arange(0, PLACE)
        live = route < num_routes
        bin_ = route // max_tokens
        slot = (route % max_tokens).to(tl.int32)
        kept = live & (slot < tl.load(totals + bin_, mask=live, other=0))
        begin = tl.load(offsets + bin_, mask=kept, other=0)
        tl.store(positions + route, tl.where(kept, begin + slot, -1), mask=live)
