# mypy: disable-error-code="no-untyped-def"
"""Triton kernels that move rows between ranks' buffers and tokens.  Imported at the first launch.

`pack_wire`        rows and slots of routes into the buffer of an exchange, a fixed number of rows for each rank.
`pack_wire_fp8`    the same with rows in e4m3 and a scale for each 128 columns behind them.
`unpack_wire_fp8`  rows and slots of such a buffer that has arrived.
`combine_wire`     the weighted sum of each token's rows from the buffer that came back, over ``top_k`` in order.

A *wire* is ``[ranks * span, words]`` with ``span = capacity + header``: of each rank `capacity` rows, then `header`
rows that hold the slot of every row as int16, -1 where there is no route.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quantized_kernels import quantize, scale_of, widen

__all__ = ["combine_wire", "pack_wire", "pack_wire_fp8", "unpack_wire_fp8"]

PAST_CAPACITY = tl.constexpr(16)  # the bit of an error word
WIDTH = tl.constexpr(128)  # columns that share a scale


@triton.jit
def route_of(order, at, end, num_routes):
    """The route that `order` lists at `at`, and whether there is one before `end`."""
    route = tl.load(order + at, mask=at < end, other=num_routes)
    return route, (route >= 0) & (route < num_routes)


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
    rows, ids, slots, order, positions, offsets, wire, routes, places, error_word,
    num_routes, top_k, words, stride, num_slots, capacity, span, num_ranks,
    BLOCK: tl.constexpr, RANKS: tl.constexpr, PLACES: tl.constexpr,
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
        start = tl.maximum(tl.load(offsets + rank), 0)
        end = tl.minimum(tl.load(offsets + rank + 1), num_routes)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        out = wire + row.to(tl.int64) * words + columns
        if j < capacity:
            route, filled = route_of(order, start + j, end, num_routes)
            token = tl.where(filled, route // top_k, 0).to(tl.int64)
            values = tl.load(rows + token * stride + columns, mask=filled & (columns < words), other=0)
            tl.store(out, values, mask=columns < words)
            if tl.program_id(1) == 0:
                tl.store(routes + row, tl.where(filled, route, num_routes))
                if j == 0:
                    note_overflow(error_word, end - start, capacity)
        else:
            of = (j - capacity) * words + columns
            store_slots(out, columns, of, ids, slots, order, start, end, num_routes, num_slots, capacity, words)
            if tl.program_id(1) == 0:
                tl.store(routes + row, num_routes)
    elif tl.program_id(1) == 0:
        block = row - num_ranks * span
        store_places(positions, offsets, places, block, num_routes, num_ranks, capacity, span, RANKS, PLACES)


@triton.jit
def pack_wire_fp8(
    rows, ids, slots, order, positions, offsets, wire, data, scales, routes, places, error_word,
    num_routes, top_k, hidden, words, stride, num_slots, capacity, span, num_ranks,
    GROUPS: tl.constexpr, RANKS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """:func:`pack_wire` with rows in e4m3: of each row `hidden` bytes, then float32 scales from a multiple of 4 on.

    inputs      rows [tokens, hidden] of `stride` elements, and those of pack_wire
    outputs     wire, data and scales are one memory: rows of `words` int16, twice as many bytes, half as many floats
    tunable     GROUPS of WIDTH columns per program
    """
    row = tl.program_id(0)
    if row < num_ranks * span:
        rank, j = row // span, row % span
        start = tl.maximum(tl.load(offsets + rank), 0)
        end = tl.minimum(tl.load(offsets + rank + 1), num_routes)
        first = row.to(tl.int64) * words
        if j < capacity:
            route, filled = route_of(order, start + j, end, num_routes)
            token = tl.where(filled, route // top_k, 0).to(tl.int64)
            group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
            columns = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
            x = tl.load(rows + token * stride + columns, mask=filled & (columns < hidden), other=0.0).to(tl.float32)
            scale = scale_of(tl.max(tl.abs(x), 1))
            scale = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), scale)
            tl.store(data + first * 2 + columns, e4m3_bytes(x, scale[:, None]), mask=columns < hidden)
            tl.store(scales + first // 2 + tl.cdiv(hidden, 4) + group, scale, mask=group * WIDTH < hidden)
            if tl.program_id(1) == 0:
                tl.store(routes + row, tl.where(filled, route, num_routes))
                if j == 0:
                    note_overflow(error_word, end - start, capacity)
        else:
            word = tl.program_id(1) * GROUPS * WIDTH + tl.arange(0, GROUPS * WIDTH)
            of = (j - capacity) * words + word
            store_slots(
                wire + first + word, word, of, ids, slots, order, start, end, num_routes, num_slots, capacity, words
            )
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
        group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        columns = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        scale = tl.load(
            scales + row * (words // 2) + tl.cdiv(hidden, 4) + group, mask=group * WIDTH < hidden, other=0.0
        )
        values = widen(tl.load(data + row * words * 2 + columns, mask=columns < hidden, other=0)).to(tl.float32)
        tl.store(
            out + row * hidden + columns, (values * scale[:, None]).to(out.dtype.element_ty), mask=columns < hidden
        )


@triton.jit
def combine_wire(
    wire, places, weights, out,
    width, wire_rows, weight_stride, weight_step,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[t] = sum_j weights[t, j] * wire[places[t * TOP_K + j]]``, over j in order.

    Launched over (tokens, blocks of columns).

    inputs      wire [wire_rows, width]; places [tokens * TOP_K]: a route is dropped, and neither its row nor its weight
                read, unless 0 <= place < wire_rows; weights [tokens, TOP_K] of two strides
    output      out [tokens, width]
    tunable     BLOCK columns per program
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        at = tl.load(places + token * TOP_K + j).to(tl.int64)
        kept = (at >= 0) & (at < wire_rows)
        weight = tl.load(weights + token * weight_stride + j * weight_step, mask=kept, other=0.0).to(tl.float32)
        values = tl.load(wire + at * width + columns, mask=kept & (columns < width), other=0.0)
        total += values.to(tl.float32) * weight
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=columns < width)
