# mypy: disable-error-code="no-untyped-def"
"""Triton kernels that move rows between ranks' buffers and tokens.  Imported at the first launch.

`pack_wire`        rows and slots of routes into the buffer of an exchange, a fixed number of rows for each rank.
`pack_wire_fp8`    the same with rows in e4m3 and a scale for each 128 columns behind them.
`unpack_wire_fp8`  rows and slots of such a buffer that has arrived.
`first_of_ranks`   which routes are the first of their token to a rank.
`pack_tokens`      rows, weights and slots of tokens into the buffer of an exchange with one row for a token and rank.
`unpack_tokens`    the same of such a buffer that has arrived, with rows in e4m3.
`combine_wire`     the weighted sum of each token's rows from the buffer that came back, over ``top_k`` in order.

A *wire* of routes is ``[ranks * span, words]`` with ``span = capacity + header``: of each rank `capacity` rows, then
`header` rows that hold the slot of every row as int16, -1 where there is no route.  A wire of tokens has no header:
each row ends with its weights and slots.

With `peers`, int64 ``[num_ranks]``, the part of a rank lies in that rank's own memory, so many times ALIGN bytes from
the wire; then rows without a route are not written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quantized_kernels import quantize, scale_of, widen

__all__ = [
    "combine_wire",
    "first_of_ranks",
    "pack_tokens",
    "pack_wire",
    "pack_wire_fp8",
    "unpack_tokens",
    "unpack_wire_fp8",
]

PAST_CAPACITY = tl.constexpr(16)  # the bit of an error word
WIDTH = tl.constexpr(128)  # columns that share a scale


@triton.jit
def span_of(offsets, rank, num_routes):
    """Where the routes to a rank start in their order, and where they end."""
    return tl.maximum(tl.load(offsets + rank), 0), tl.minimum(tl.load(offsets + rank + 1), num_routes)


@triton.jit
def route_of(order, at, end, num_routes):
    """The route that `order` lists at `at`, and whether there is one before `end`."""
    route = tl.load(order + at, mask=at < end, other=num_routes)
    return route, (route >= 0) & (route < num_routes)


@triton.jit
def part_of(memory, peers, rank, span, pitch, ALIGN: tl.constexpr):
    """Where the part of `rank` starts: parts have `span` rows of `pitch` elements, or lie where `peers` says."""
    if peers is None:
        return memory + (rank * span).to(tl.int64) * pitch
    else:  # no addresses as integers, of which the compiler would forget that they are aligned
        return memory + tl.load(peers + rank) * (ALIGN * 8 // memory.dtype.element_ty.primitive_bitwidth)


@triton.jit
def copy_row(row, out, filled, words, SPARSE: tl.constexpr, BLOCK: tl.constexpr):
    """A row of int16 words; if it is not `filled`, zeros, or nothing if SPARSE."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < words
    there = inside & filled
    tl.store(out + columns, tl.load(row + columns, mask=there, other=0), mask=there if SPARSE else inside)


@triton.jit
def narrow_row(row, data, scales, filled, hidden, SPARSE: tl.constexpr, GROUPS: tl.constexpr):
    """A row in e4m3, and its scales behind it; if it is not `filled`, of zeros, or nothing if SPARSE."""
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    x = tl.load(row + columns, mask=filled & (columns < hidden), other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(x), 1))
    scale = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), scale)
    stored = filled | (not SPARSE)
    tl.store(data + columns, e4m3_bytes(x, scale[:, None]), mask=stored & (columns < hidden))
    tl.store(scales + tl.cdiv(hidden, 4) + group, scale, mask=stored & (group * WIDTH < hidden))


@triton.jit
def widen_row(data, scales, out, hidden, GROUPS: tl.constexpr):
    """What :func:`narrow_row` stored, in the dtype of `out`."""
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    scale = tl.load(scales + tl.cdiv(hidden, 4) + group, mask=group * WIDTH < hidden, other=0.0)
    values = widen(tl.load(data + columns, mask=columns < hidden, other=0)).to(tl.float32)
    tl.store(out + columns, (values * scale[:, None]).to(out.dtype.element_ty), mask=columns < hidden)


@triton.jit
def store_slots(
    out, columns, of, ids, slots, order, start, end, num_routes, num_slots, capacity, words
):  # fmt: skip
    """Words of a header: the slots of the rows `of` of a rank, -1 where there is no route."""
    told, there = route_of(order, start + of, tl.where(of < capacity, end, 0), num_routes)
    expert = tl.load(ids + tl.where(there, told, 0), mask=there, other=-1).to(tl.int64)
    known = (expert >= 0) & (expert < num_slots)
    slot = tl.load(slots + tl.where(known, expert, 0), mask=known, other=-1)
    tl.store(out, slot.to(tl.int16), mask=columns < words)


@triton.jit
def store_places(
    positions, offsets, places, block, num_routes, num_ranks, capacity, span, RANKS: tl.constexpr, PLACES: tl.constexpr
):
    """The row of each of PLACES routes in the wire, -1 for a dropped one."""
    numbers = block * PLACES + tl.arange(0, PLACES)
    inside = numbers < num_routes
    at = tl.load(positions + numbers, mask=inside, other=-1)
    ranks = tl.arange(0, RANKS)
    ends = tl.load(offsets + 1 + ranks, mask=ranks < num_ranks, other=2147483647)
    owner = tl.sum((ends[None, :] <= at[:, None]).to(tl.int32), axis=1)
    kept = (at >= 0) & (owner < num_ranks)
    within = at - tl.load(offsets + owner, mask=kept, other=0)
    kept = kept & (within >= 0) & (within < capacity)
    tl.store(places + numbers, tl.where(kept, owner * span + within, -1), mask=inside)


@triton.jit
def note_overflow(error_word, wanted, capacity):
    if error_word is not None:  # noqa: SIM102  (known when compiled, unlike the next)
        if wanted > capacity:
            tl.atomic_or(error_word, PAST_CAPACITY)


@triton.jit
def pack_wire(
    rows, ids, slots, order, positions, offsets, wire, peers, routes, places, error_word,
    num_routes, top_k, words, stride, num_slots, capacity, span, num_ranks,
    BLOCK: tl.constexpr, RANKS: tl.constexpr, PLACES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Launched over (rows of the wire, then blocks of PLACES routes; blocks of columns).

    inputs      rows [tokens, words] int16, of `stride` words; ids [num_routes]; slots [num_slots] int16, of each id;
                order, positions [num_routes], offsets [num_ranks + 1]: the routes by rank, a layout with blocks of one
    outputs     wire [num_ranks * span, words] int16, zero where there is no route; routes [num_ranks * span], the route
                of each row or num_routes; places [num_routes], the row of each route or -1; a bit of error_word, which
                may be None, if a rank has more routes than `capacity`
    tunable     BLOCK columns, PLACES routes per program; RANKS >= num_ranks
    """
    row = tl.program_id(0)
    if row < num_ranks * span:
        rank, j = row // span, row % span
        start, end = span_of(offsets, rank, num_routes)
        out = part_of(wire, peers, rank, span, words, ALIGN) + j.to(tl.int64) * words
        if j < capacity:
            route, filled = route_of(order, start + j, end, num_routes)
            token = tl.where(filled, route // top_k, 0).to(tl.int64)
            copy_row(rows + token * stride, out, filled, words, peers is not None, BLOCK)
            if tl.program_id(1) == 0:
                tl.store(routes + row, tl.where(filled, route, num_routes))
                if j == 0:
                    note_overflow(error_word, end - start, capacity)
        else:
            columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            of = (j - capacity) * words + columns
            store_slots(
                out + columns, columns, of, ids, slots, order, start, end, num_routes, num_slots, capacity, words
            )
            if tl.program_id(1) == 0:
                tl.store(routes + row, num_routes)
    elif tl.program_id(1) == 0:
        block = row - num_ranks * span
        store_places(positions, offsets, places, block, num_routes, num_ranks, capacity, span, RANKS, PLACES)


@triton.jit
def pack_wire_fp8(
    rows, ids, slots, order, positions, offsets, wire, data, scales, peers, routes, places, error_word,
    num_routes, top_k, hidden, words, stride, num_slots, capacity, span, num_ranks,
    GROUPS: tl.constexpr, RANKS: tl.constexpr, PLACES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """:func:`pack_wire` with rows in e4m3: of each row `hidden` bytes, then float32 scales from a multiple of 4 on.

    inputs      rows [tokens, hidden] of `stride` elements, and those of pack_wire
    outputs     wire, data and scales are one memory: rows of `words` int16, twice as many bytes, half as many floats
    tunable     GROUPS of WIDTH columns per program
    """
    row = tl.program_id(0)
    if row < num_ranks * span:
        rank, j = row // span, row % span
        start, end = span_of(offsets, rank, num_routes)
        first = j.to(tl.int64) * words
        if j < capacity:
            route, filled = route_of(order, start + j, end, num_routes)
            token = tl.where(filled, route // top_k, 0).to(tl.int64)
            bytes_ = part_of(data, peers, rank, span, words * 2, ALIGN) + first * 2
            floats = part_of(scales, peers, rank, span, words // 2, ALIGN) + first // 2
            narrow_row(rows + token * stride, bytes_, floats, filled, hidden, peers is not None, GROUPS)
            if tl.program_id(1) == 0:
                tl.store(routes + row, tl.where(filled, route, num_routes))
                if j == 0:
                    note_overflow(error_word, end - start, capacity)
        else:
            word = tl.program_id(1) * GROUPS * WIDTH + tl.arange(0, GROUPS * WIDTH)
            of = (j - capacity) * words + word
            out = part_of(wire, peers, rank, span, words, ALIGN) + first + word
            store_slots(out, word, of, ids, slots, order, start, end, num_routes, num_slots, capacity, words)
            if tl.program_id(1) == 0:
                tl.store(routes + row, num_routes)
    elif tl.program_id(1) == 0:
        block = row - num_ranks * span
        store_places(positions, offsets, places, block, num_routes, num_ranks, capacity, span, RANKS, PLACES)


@triton.jit
def e4m3_bytes(x, scale):
    """``x / scale`` in e4m3, as bytes; without the GPU's own conversion, which not all have."""
    small = quantize(x, scale, False) * 0.00390625  # a 256th in float16: the exponent of e4m3 under that of float16
    bits = (small.to(tl.int16, bitcast=True) & 0x7FFF) >> 7
    bits = tl.where(x == x, bits, 0x7F) | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)  # and the sign of a zero
    return bits.to(tl.uint8)


@triton.jit
def unpack_wire_fp8(
    wire, data, scales, out, slots,
    hidden, words, capacity, span, GROUPS: tl.constexpr,
):  # fmt: skip
    """Launched over (rows of the wire, blocks of GROUPS * WIDTH columns).

    inputs      wire, data, scales: the memory that pack_wire_fp8 filled, on the rank where it arrived
    outputs     out [rows, hidden], undefined where there is no route; slots [rows] int16, -1 there
    tunable     GROUPS of WIDTH columns per program
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(wire + (row // span * span + capacity) * words + row % span)
    if tl.program_id(1) == 0:
        tl.store(slots + row, slot)
    if slot >= 0:
        widen_row(data + row * words * 2, scales + row * (words // 2), out + row * hidden, hidden, GROUPS)


@triton.jit
def rank_at(ids, rank_of, at, inside, num_ids):
    """The rank of the expert of the routes `at`, -1 for none; and whether its id is -1 or known."""
    expert = tl.load(ids + at, mask=inside, other=-1).to(tl.int64)
    known = (expert >= 0) & (expert < num_ids)
    return tl.load(rank_of + tl.where(known, expert, 0), mask=known, other=-1), known | (expert == -1)


@triton.jit
def first_of_ranks(
    ids, rank_of, out,
    tokens, top_k, num_ids, CHOICES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Launched over blocks of TOKENS tokens.

    inputs      ids [tokens, top_k]; rank_of [num_ids] int32, the rank of each id or -1
    output      out [tokens, top_k] int32, the rank of a route if no earlier one of its token has it, else -1; -2 where
                the id is neither -1 nor below num_ids
    tunable     TOKENS per program; CHOICES >= top_k
    """
    token, choice = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, CHOICES)
    start = token.to(tl.int64) * top_k
    at = start[:, None] + choice[None, :]
    inside = (token < tokens)[:, None] & (choice < top_k)[None, :]
    rank, valid = rank_at(ids, rank_of, at, inside, num_ids)
    first = rank >= 0
    for j in range(top_k):
        earlier, _ = rank_at(ids, rank_of, start + j, token < tokens, num_ids)
        first = first & ((earlier[:, None] != rank) | (choice <= j)[None, :])
    tl.store(out + at, tl.where(valid, tl.where(first, rank, -1), -2), mask=inside)


@triton.jit
def pack_tokens(
    rows, factors, ids, rank_of, slots, order, positions, offsets, wire, data, floats, peers, routes, places,
    error_word, num_routes, top_k, width, words, stride, factor_stride, factor_step, num_ids, capacity, num_ranks,
    factors_at, slots_at,
    FP8: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr, RANKS: tl.constexpr, PLACES: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Launched over (rows of the wire, then blocks of PLACES routes; blocks of columns).

    inputs      rows [tokens, width] of `stride` elements, int16 words unless FP8; factors [tokens, top_k] of two
                strides; ids [num_routes]; rank_of [num_ids] int32 and slots [num_ids] int16, of each id; order,
                positions [num_routes], offsets [num_ranks + 1]: the first routes of tokens by rank, a layout with
                blocks of one
    outputs     wire, data and floats are one memory [num_ranks * capacity]: rows of `words` int16, twice as many bytes,
                half as many floats; in each the row of a token (FP8: in e4m3, with scales), from the float `factors_at`
                on its factors, from the word `slots_at` on its slots, -1 of a choice that is not on the rank; routes
                [num_ranks * capacity], the first route of each row or num_routes; places, error_word: of pack_wire
    tunable     BLOCK columns, PLACES routes per program; RANKS >= num_ranks; CHOICES >= top_k
    """
    row = tl.program_id(0)
    if row < num_ranks * capacity:
        rank, j = row // capacity, row % capacity
        start, end = span_of(offsets, rank, num_routes)
        route, filled = route_of(order, start + j, end, num_routes)
        token = tl.where(filled, route // top_k, 0).to(tl.int64)
        first = j.to(tl.int64) * words
        out = part_of(wire, peers, rank, capacity, words, ALIGN) + first
        tail = part_of(floats, peers, rank, capacity, words // 2, ALIGN) + first // 2
        if FP8:
            bytes_ = part_of(data, peers, rank, capacity, words * 2, ALIGN) + first * 2
            narrow_row(rows + token * stride, bytes_, tail, filled, width, peers is not None, BLOCK // WIDTH)
        else:
            copy_row(rows + token * stride, out, filled, width, peers is not None, BLOCK)
        if tl.program_id(1) == 0:
            choice = tl.arange(0, CHOICES)
            inside = choice < top_k
            expert = tl.load(ids + token * top_k + choice, mask=filled & inside, other=-1).to(tl.int64)
            here = (expert >= 0) & (expert < num_ids)
            expert = tl.where(here, expert, 0)
            here = here & (tl.load(rank_of + expert, mask=here, other=-1) == rank)
            slot = tl.load(slots + expert, mask=here, other=-1)
            factor = tl.load(factors + token * factor_stride + choice * factor_step, mask=here, other=0.0)
            tl.store(tail + factors_at + choice, factor.to(tl.float32), mask=inside)
            tl.store(out + slots_at + choice, slot.to(tl.int16), mask=inside)
            tl.store(routes + row, tl.where(filled, route, num_routes))
            if j == 0:
                note_overflow(error_word, end - start, capacity)
    elif tl.program_id(1) == 0:
        block = row - num_ranks * capacity
        store_places(positions, offsets, places, block, num_routes, num_ranks, capacity, capacity, RANKS, PLACES)


@triton.jit
def unpack_tokens(
    wire, data, floats, out, factors, slots,
    hidden, words, top_k, factors_at, slots_at, GROUPS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """Launched over (rows of the wire, blocks of GROUPS * WIDTH columns).

    inputs      wire, data, floats: the memory that pack_tokens filled in FP8, on the rank where it arrived
    outputs     out [rows, hidden], undefined where there is no token; factors [rows, top_k] float32; slots
                [rows, top_k] int16, -1 of a choice that is not on this rank
    tunable     GROUPS of WIDTH columns per program; CHOICES >= top_k
    """
    row = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, CHOICES)
    inside = choice < top_k
    slot = tl.load(wire + row * words + slots_at + choice, mask=inside, other=-1)
    if tl.program_id(1) == 0:
        factor = tl.load(floats + row * (words // 2) + factors_at + choice, mask=inside, other=0.0)
        tl.store(factors + row * top_k + choice, factor, mask=inside)
        tl.store(slots + row * top_k + choice, slot, mask=inside)
    if tl.max(slot.to(tl.int32), 0) >= 0:
        widen_row(data + row * words * 2, floats + row * (words // 2), out + row * hidden, hidden, GROUPS)


@triton.jit
def combine_wire(
    wire, peers, places, weights, out,
    width, span, wire_rows, weight_stride, weight_step,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``out[t] = sum_j weights[t, j] * wire[places[t * TOP_K + j]]``, over j in order.

    Launched over (tokens, blocks of columns).

    inputs      wire [wire_rows, width], `span` rows a rank; places [tokens * TOP_K]: a route is dropped, and neither
                its row nor its weight read, unless 0 <= place < wire_rows; weights [tokens, TOP_K] of two strides
    output      out [tokens, width]
    tunable     BLOCK columns per program
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        at = tl.load(places + token * TOP_K + j)
        kept = (at >= 0) & (at < wire_rows)
        weight = tl.load(weights + token * weight_stride + j * weight_step, mask=kept, other=0.0).to(tl.float32)
        if peers is None:
            row = wire + at.to(tl.int64) * width
        else:
            at = tl.where(kept, at, 0)
            row = part_of(wire, peers, at // span, span, width, ALIGN) + (at % span).to(tl.int64) * width
        values = tl.load(row + columns, mask=kept & (columns < width), other=0.0)
        total += values.to(tl.float32) * weight
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=columns < width)
