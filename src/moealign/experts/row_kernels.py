# mypy: disable-error-code="no-untyped-def"
"""Triton kernels that move rows between ranks' buffers and tokens.  Imported at the first launch.

`pack_wire`     rows and slots of routes into the buffer of an exchange, a fixed number of rows for each rank.
`combine_wire`  the weighted sum of each token's rows from such a buffer, over ``top_k`` in order.

A *wire* is ``[ranks * span, words]`` with ``span = capacity + header``: of each rank `capacity` rows, then `header`
rows that hold the slot of every row as int16, -1 where there is no route.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["combine_wire", "pack_wire"]


@triton.jit
def pack_wire(
    rows, ids, slots, order, positions, offsets, wire, routes, places,
    num_routes, top_k, words, stride, num_slots, capacity, span, num_ranks,
    BLOCK: tl.constexpr, RANKS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Launched over (rows of the wire, then blocks of PLACES routes; blocks of columns).

    inputs      rows [tokens, words] int16, of `stride` words; ids [num_routes]; slots [num_slots] int16, of each id;
                order, positions [num_routes], offsets [num_ranks + 1]: the routes by rank, a layout with blocks of one
    outputs     wire [num_ranks * span, words] int16, zero where there is no route; routes [num_ranks * span], the route
                of each row or num_routes; places [num_routes], the row of each route or -1
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
            route = tl.load(order + start + j, mask=start + j < end, other=num_routes)
            filled = (route >= 0) & (route < num_routes)
            token = tl.where(filled, route // top_k, 0).to(tl.int64)
            values = tl.load(rows + token * stride + columns, mask=filled & (columns < words), other=0)
            tl.store(out, values, mask=columns < words)
            if tl.program_id(1) == 0:
                tl.store(routes + row, tl.where(filled, route, num_routes))
        else:
            of = (j - capacity) * words + columns  # the row that a word of the header tells about
            told = tl.load(order + start + of, mask=(of < capacity) & (start + of < end), other=num_routes)
            there = (told >= 0) & (told < num_routes)
            expert = tl.load(ids + tl.where(there, told, 0), mask=there, other=-1).to(tl.int64)
            known = (expert >= 0) & (expert < num_slots)
            slot = tl.load(slots + tl.where(known, expert, 0), mask=known, other=-1)
            tl.store(out, slot.to(tl.int16), mask=columns < words)
            if tl.program_id(1) == 0:
                tl.store(routes + row, num_routes)
    elif tl.program_id(1) == 0:
        numbers = (row - num_ranks * span) * PLACES + tl.arange(0, PLACES)
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
