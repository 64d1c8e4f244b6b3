"""A stable counting sort of routes into padded bins, compiled by numba.  One file because the kernels for one thread,
for several threads and for batches are made of the same passes.

They fill every output of :class:`moealign.layout.BlockLayout`, to the last element, in three passes: count the routes
of each bin; scan the bins (offsets, blocks, padding); scatter the routes.  `serial` runs all three in one call.  In
`shared`, several threads take chunks of the routes; each chunk has its own counters, so the result depends neither on
the number of threads nor on who took which chunk.  Bytes: ids are read twice, every element of an output is written
once; scratch is a counter per bin and chunk, and three tables.

Ids are read as unsigned integers of their width, and a signed dtype only lowers `bound`: an id that is not below it is
dropped, so four specialisations serve eight dtypes.  Dropped routes go to bin E behind the last one, which needs no
branch: the rows there are always allocated, and get the sentinel.
"""

from __future__ import annotations

import numpy as np

from ... import layout
from ...layout import BAD_COUNT, BAD_ID, BAD_MAP, BAD_NUM_VALID
from .intrinsics import (
    ID_WIDTHS,
    atomic_add,
    atomic_load,
    i32_ptr,
    i64_ptr,
    ids_ptr,
    joins,
    kernel,
    load_int,
    prefetch,
    subroutine,
    wait_for,
)

__all__ = [
    "CONTROL_BYTES",
    "PAIRS_MAX_EXPERTS",
    "SERIAL_ARGUMENTS",
    "SHARED_ARGUMENTS",
    "batched_fill",
    "batched_scan",
    "prepare",
    "serial",
    "shared",
]

# Up to so many experts the count uses two tables of counters side by side.
PAIRS_MAX_EXPERTS = 2048
# The scatter prefetches the cache line behind the one it writes: the hardware follows only a few bins by itself.
LINE_BYTES = 64
NEXT_LINE_MAX_EXPERTS = 3071
# With more experts most bins end before their next line: then it prefetches for the route AHEAD routes later, from so
# many routes on.  With fewer, the rows are in a cache anyway.
AHEAD = 24
AHEAD_MIN_ROUTES = 196_608
# Up to so many routes per bin all rows are filled at once, before the scatter, unless they are too many for a cache.
FILL_FIRST = 32
FILL_FIRST_MAX_ROWS = 524_288
# int64 that `serial` reads.
SERIAL_ARGUMENTS = 29
# int64 that `shared` reads, behind the counters of its threads.
SHARED_ARGUMENTS = 29
# Counters that the threads of a call share: eight int64, each in a cache line of its own.
CONTROL_BYTES = 512

_kernel = kernel(globals(), vars(layout))


@subroutine
def _fill(address, start, stop, value):
    """`value` to the int32 elements [start, stop)."""
    target = i32_ptr(address)
    for i in range(start, stop):
        target[i] = np.int32(value)


@subroutine
def _valid_routes(num_valid, error, routes, top_k):
    """Routes within num_valid_tokens, which is clamped to the number of tokens."""
    if num_valid == 0:
        return routes
    rows = routes // top_k if top_k > 0 else np.int64(0)
    value = np.int64(i32_ptr(num_valid)[0])
    if (value < 0 or value > rows) and error != 0:
        i32_ptr(error)[0] |= np.int32(BAD_NUM_VALID)
    return min(max(value, np.int64(0)), rows) * top_k


@subroutine
def _load_map(map_address, map_code, map_stride, error, experts, fill, table):
    """Check the map; with `fill`, table[id] = the bin of an id, E if it has none."""
    bad = False
    for e in range(experts):
        value = load_int(map_address, e * map_stride, map_code)
        inside = value >= 0 and value < experts
        bad |= not inside and value != -1
        if fill:
            table[e] = np.int32(value if inside else experts)
    if fill:
        table[experts] = np.int32(experts)
    if bad and error != 0:
        i32_ptr(error)[0] |= np.int32(BAD_MAP)


@subroutine
def _minus_one(signed, width):
    """The bit pattern of -1; 0 for an unsigned dtype, where it excludes nothing: 0 is always an id."""
    return np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - 8 * width) if signed != 0 else np.uint64(0)


@subroutine
def _check_ids(ids, lo, hi, cols, row_stride, col_stride, bound, minus_one):
    """Whether an id of the routes [lo, hi) is neither below `bound` nor -1."""
    bad = False
    i = lo
    while i < hi:
        row = i // cols
        col = i - row * cols
        stop = min(hi, i + cols - col)
        at = row * row_stride + col * col_stride
        for _ in range(stop - i):
            value = np.uint64(ids[at])
            bad |= (value >= bound) & (value != minus_one)
            at += col_stride
        i = stop
    return bad


@subroutine
def _count(ids, lo, hi, cols, row_stride, col_stride, bound, experts, mapped, table, counters):
    """Add the routes [lo, hi) to counters[0 .. E]; bin E collects the dropped ones."""
    drop_bin = np.uint64(experts)
    i = lo
    while i < hi:
        row = i // cols
        col = i - row * cols
        stop = min(hi, i + cols - col)
        at = row * row_stride + col * col_stride
        if mapped:
            for _ in range(stop - i):
                value = np.uint64(ids[at])
                counters[np.uint64(table[value if value < bound else drop_bin])] += np.int32(1)
                at += col_stride
        else:
            for _ in range(stop - i):
                value = np.uint64(ids[at])
                counters[value if value < bound else drop_bin] += np.int32(1)
                at += col_stride
        i = stop


@subroutine
def _count_pairs(ids, lo, hi, stride, bound, experts, counters, second):
    """_count for one long row without a map, four ids per step with one branch.  Two tables alternate, since a run of
    equal ids would wait for its own stores; their sum ends in `counters`."""
    drop_bin = np.uint64(experts)
    for e in range(experts + 1):
        second[e] = 0
    at = lo * stride
    for _ in range((hi - lo) // 4):
        a = np.uint64(ids[at])
        b = np.uint64(ids[at + stride])
        c = np.uint64(ids[at + 2 * stride])
        d = np.uint64(ids[at + 3 * stride])
        if (a < bound) & (b < bound) & (c < bound) & (d < bound):
            counters[a] += np.int32(1)
            second[b] += np.int32(1)
            counters[c] += np.int32(1)
            second[d] += np.int32(1)
        else:
            counters[a if a < bound else drop_bin] += np.int32(1)
            second[b if b < bound else drop_bin] += np.int32(1)
            counters[c if c < bound else drop_bin] += np.int32(1)
            second[d if d < bound else drop_bin] += np.int32(1)
        at += 4 * stride
    for _ in range((hi - lo) % 4):
        a = np.uint64(ids[at])
        counters[a if a < bound else drop_bin] += np.int32(1)
        at += stride
    for e in range(experts + 1):
        counters[e] += second[e]


@subroutine
def _count_chunk(ids, lo, hi, cols, row_stride, col_stride, bound, experts, mapped, table, counters, second):
    """counters[0 .. E] = routes [lo, hi) of each bin, by the faster of two ways."""
    for e in range(experts + 1):
        counters[e] = 0
    if not mapped and row_stride == 0 and cols >= hi and experts <= PAIRS_MAX_EXPERTS and hi - lo >= 4 * experts:
        _count_pairs(ids, lo, hi, col_stride, bound, experts, counters, second)
    else:
        _count(ids, lo, hi, cols, row_stride, col_stride, bound, experts, mapped, table, counters)


@subroutine
def _take(value, cursor):
    """The next free row of bin `value`."""
    place = cursor[value]
    cursor[value] = place + np.int32(1)
    return np.int64(place)


@subroutine
def _scatter(
    ids, lo, hi, cols, row_stride, col_stride, bound, experts, mapped, table, cursor,
    sorted_ids, positions, scatter_idx, routes, dropped,
):  # fmt: skip
    """Write the routes [lo, hi) to their rows; cursor[bin] is the next free one.  If none is dropped, the branch on
    `bound` is always predicted and cheaper than two selections."""
    drop_bin = np.uint64(experts)
    target = i32_ptr(sorted_ids)
    simple = not mapped and positions == 0 and scatter_idx == 0
    follow = experts <= NEXT_LINE_MAX_EXPERTS
    ahead = not follow and routes >= AHEAD_MIN_ROUTES
    next_line = sorted_ids + LINE_BYTES
    if follow and hi - lo >= 4 * experts:
        for e in range(experts):
            prefetch(sorted_ids + 4 * np.int64(cursor[e]))
    i = lo
    while i < hi:
        row = i // cols
        col = i - row * cols
        stop = min(hi, i + cols - col)
        at = row * row_stride + col * col_stride
        if simple and not dropped:
            for route in range(i, stop):
                if ahead:
                    value = np.uint64(ids[at + col_stride * min(stop - 1 - route, AHEAD)])
                    if value < bound:
                        prefetch(sorted_ids + 4 * np.int64(cursor[value]))
                value = np.uint64(ids[at])
                if value < bound:
                    place = _take(value, cursor)
                    target[np.uint64(place)] = np.int32(route)
                    if follow:
                        prefetch(next_line + 4 * place)
                at += col_stride
        elif simple:
            for route in range(i, stop):
                if ahead:
                    value = np.uint64(ids[at + col_stride * min(stop - 1 - route, AHEAD)])
                    prefetch(sorted_ids + 4 * np.int64(cursor[value if value < bound else drop_bin]))
                value = np.uint64(ids[at])
                kept = value < bound
                place = _take(value if kept else drop_bin, cursor)
                target[np.uint64(place)] = np.int32(route if kept else routes)
                if follow:
                    prefetch(next_line + 4 * place)
                at += col_stride
        else:
            for route in range(i, stop):
                if ahead:
                    value = np.uint64(ids[at + col_stride * min(stop - 1 - route, AHEAD)])
                    value = value if value < bound else drop_bin
                    if mapped:
                        value = np.uint64(table[value])
                    prefetch(sorted_ids + 4 * np.int64(cursor[value]))
                value = np.uint64(ids[at])
                value = value if value < bound else drop_bin
                if mapped:
                    value = np.uint64(table[value])
                kept = value != drop_bin
                place = _take(value, cursor)
                target[np.uint64(place)] = np.int32(route if kept else routes)
                if follow:
                    prefetch(next_line + 4 * place)
                if positions != 0:
                    i32_ptr(positions)[route] = np.int32(place if kept else -1)
                if scatter_idx != 0:
                    i32_ptr(scatter_idx)[route] = np.int32(route if kept else -1)
                at += col_stride
        i = stop


@subroutine
def _fill_bin(
    e, count, block, blocks, block_size, routes, map_address, map_code, map_stride, experts,
    sorted_ids, expert_ids, block_rows,
):  # fmt: skip
    """The blocks, and unless sorted_ids is 0 the padding, of a bin with `count` > 0 routes from `block` on."""
    name = e
    if map_address != 0:
        name = load_int(map_address, e * map_stride, map_code)
        if name < 0 or name >= experts:
            name = np.int64(-1)
    i32_ptr(expert_ids)[block] = np.int32(name)
    if blocks > 1:
        _fill(expert_ids, block + 1, block + blocks, name)
    if block_rows != 0:
        _fill(block_rows, block, block + blocks - 1, block_size)
        i32_ptr(block_rows)[block + blocks - 1] = np.int32(count - (blocks - 1) * block_size)
    if sorted_ids != 0:
        _fill(sorted_ids, block * block_size + count, (block + blocks) * block_size, routes)


@subroutine
def _blocks(count, block_size):
    """cdiv(count, block_size), by a 32-bit division."""
    if count <= block_size:
        return np.int64(count > 0)
    return np.int64((np.uint32(count) - np.uint32(1)) // np.uint32(block_size)) + 1


@subroutine
def _fill_rest(start, stop, value, part, parts, address):
    """`value` to part `part` of `parts` of the elements [start, stop)."""
    size = max(stop - start, np.int64(0))
    _fill(address, start + size * part // parts, start + size * (part + 1) // parts, value)


@subroutine
def _drop_invalid(positions, scatter_idx, valid, routes):
    """-1 for the routes past num_valid_tokens."""
    if positions != 0:
        _fill(positions, valid, routes, -1)
    if scatter_idx != 0:
        _fill(scatter_idx, valid, routes, -1)


def _make_serial(width):
    @_kernel
    def serial(arguments):
        """One alignment on this thread.  `arguments` is the address of SERIAL_ARGUMENTS int64: passed one by one, each
        costs numba 75 ns."""
        args = i64_ptr(arguments)
        ids_address, cols, row_stride, col_stride, bound_, signed = (
            args[0], args[1], args[2], args[3], args[4], args[5],
        )  # fmt: skip
        map_address, map_code, map_stride, ignore, num_valid, error = (
            args[6], args[7], args[8], args[9], args[10], args[11],
        )  # fmt: skip
        routes, top_k, experts, block_size, length, num_blocks = (
            args[12], args[13], args[14], args[15], args[16], args[17],
        )  # fmt: skip
        sorted_ids, expert_ids, total_out = args[18], args[19], args[20]
        counts_out, offsets_out, ends_out = args[21], args[22], args[23]
        positions, block_rows, scatter_idx = args[24], args[25], args[26]
        scratch, row_ints = args[27], args[28]
        ids = ids_ptr(ids_address, width)
        bound, minus_one = np.uint64(bound_), _minus_one(signed, width)
        valid = _valid_routes(num_valid, error, routes, top_k)
        mapped = map_address != 0 and ignore != 0
        counters = i32_ptr(scratch)
        table = i32_ptr(scratch + 4 * row_ints)
        work = scratch + 8 * row_ints
        if map_address != 0 and (mapped or error != 0):
            _load_map(map_address, map_code, map_stride, error, experts, mapped, table)
        if error != 0 and _check_ids(ids, 0, valid, cols, row_stride, col_stride, bound, minus_one):
            i32_ptr(error)[0] |= np.int32(BAD_ID)

        _count_chunk(
            ids, 0, valid, cols, row_stride, col_stride, bound, experts, mapped, table, counters, i32_ptr(work)
        )

        names = np.int64(0) if mapped else map_address
        dropped = counters[experts] > 0
        first = np.int64(0)
        block = np.int64(0)  # counted, for a division costs as much as ten routes
        end = np.int64(0)
        # With few routes per bin, one long fill of everything is cheaper than a short one behind each bin.
        filled = valid <= FILL_FIRST * min(experts, valid) and length <= FILL_FIRST_MAX_ROWS
        if filled:
            _fill(sorted_ids, 0, length, routes)
        for e in range(experts):
            count = np.int64(counters[e])
            if counts_out != 0:
                i32_ptr(counts_out)[e] = np.int32(count)
            if offsets_out != 0:
                i32_ptr(offsets_out)[e] = np.int32(first)
            end += count
            if ends_out != 0:
                i32_ptr(ends_out)[e] = np.int32(end)
            if count > 0:
                counters[e] = np.int32(first)
                blocks = _blocks(count, block_size)
                _fill_bin(
                    np.int64(e), count, block, blocks, block_size, routes, names, map_code, map_stride, experts,
                    np.int64(0) if filled else sorted_ids, expert_ids, block_rows,
                )  # fmt: skip
                block += blocks
                first = block * block_size
        counters[experts] = np.int32(first)
        if offsets_out != 0:
            i32_ptr(offsets_out)[experts] = np.int32(first)
        i32_ptr(total_out)[0] = np.int32(first)
        if not filled:
            _fill(sorted_ids, first, length, routes)
        _fill(expert_ids, block, num_blocks, -1)
        if block_rows != 0:
            _fill(block_rows, block, num_blocks, 0)

        _scatter(
            ids, 0, valid, cols, row_stride, col_stride, bound, experts, mapped, table, counters,
            sorted_ids, positions, scatter_idx, routes, dropped,
        )  # fmt: skip
        _drop_invalid(positions, scatter_idx, valid, routes)

    return serial


@subroutine
def _scan(
    chunks, experts, row_ints, block_size, counters, counts, offsets, total_out, counts_out, offsets_out, ends_out
):
    """Turn the counters of each chunk into its cursors; write counts and offsets of the bins for the scatter."""
    first = np.int64(0)
    end = np.int64(0)
    for e in range(experts + 1):
        place = first
        for chunk in range(chunks):
            count = np.int64(counters[chunk * row_ints + e])
            counters[chunk * row_ints + e] = np.int32(place)
            place += count
        count = place - first
        counts[e] = np.int32(count)
        offsets[e] = np.int32(first)
        if e < experts:
            end += count
            if counts_out != 0:
                i32_ptr(counts_out)[e] = np.int32(count)
            if ends_out != 0:
                i32_ptr(ends_out)[e] = np.int32(end)
            if offsets_out != 0:
                i32_ptr(offsets_out)[e] = np.int32(first)
            first += _blocks(count, block_size) * block_size
    if offsets_out != 0:
        i32_ptr(offsets_out)[experts] = np.int32(first)
    i32_ptr(total_out)[0] = np.int32(first)


@_kernel
def prepare(map_address, map_code, map_stride, ignore, num_valid, error, routes, top_k, experts, table):
    """Run before `shared`: write the map as a table of bins; returns the number of valid routes."""
    if map_address != 0:
        _load_map(map_address, map_code, map_stride, error, experts, ignore != 0, i32_ptr(table))
    return _valid_routes(num_valid, error, routes, top_k)


def _make_shared(width):
    @_kernel
    def shared(leader, control):
        """One alignment on several threads, each of which runs this and takes chunks until none is left.

        At `control` are the counters, and from CONTROL_BYTES on SHARED_ARGUMENTS int64.  The leader can do all the work
        alone: no thread waits for one that has not taken a chunk, and a helper that starts late finds none left.
        """
        if not joins(control + 448, leader):
            return
        args = i64_ptr(control + CONTROL_BYTES)
        chunks, valid, scratch, row_ints = args[0], args[1], args[2], args[3]
        ids_address, cols, row_stride, col_stride, bound_, signed = (
            args[4], args[5], args[6], args[7], args[8], args[9],
        )  # fmt: skip
        map_address, map_code, map_stride, ignore, error = args[10], args[11], args[12], args[13], args[14]
        routes, experts, block_size, length, num_blocks = args[15], args[16], args[17], args[18], args[19]
        sorted_ids, expert_ids, total_out = args[20], args[21], args[22]
        counts_out, offsets_out, ends_out = args[23], args[24], args[25]
        positions, block_rows, scatter_idx = args[26], args[27], args[28]
        count_next, count_done, scanned = control, control + 64, control + 128
        fill_next, fill_done, bad_ids, threads_joined = control + 192, control + 256, control + 320, control + 384
        ids = ids_ptr(ids_address, width)
        bound, minus_one = np.uint64(bound_), _minus_one(signed, width)
        mapped = ignore != 0
        names = np.int64(0) if mapped else map_address
        step = 4 * row_ints
        table, counts, offsets = i32_ptr(scratch), i32_ptr(scratch + step), i32_ptr(scratch + 2 * step)
        counters = scratch + 3 * step
        # No row is written before all chunks are counted: until then that memory holds each thread's second table.
        own_second = i32_ptr(sorted_ids + step * atomic_add(threads_joined, 1))

        chunk = atomic_add(count_next, 1)
        while chunk < chunks:
            lo, hi = valid * chunk // chunks, valid * (chunk + 1) // chunks
            own = i32_ptr(counters + chunk * step)
            _count_chunk(ids, lo, hi, cols, row_stride, col_stride, bound, experts, mapped, table, own, own_second)
            if error != 0 and _check_ids(ids, lo, hi, cols, row_stride, col_stride, bound, minus_one):
                atomic_add(bad_ids, 1)
            atomic_add(count_done, 1)
            chunk = atomic_add(count_next, 1)

        if leader != 0:
            wait_for(count_done, chunks)
            if atomic_load(bad_ids) > 0:
                i32_ptr(error)[0] |= np.int32(BAD_ID)
            _scan(
                chunks, experts, row_ints, block_size, i32_ptr(counters), counts, offsets,
                total_out, counts_out, offsets_out, ends_out,
            )  # fmt: skip
            atomic_add(scanned, 1)
        else:
            wait_for(scanned, 1)

        chunk = atomic_add(fill_next, 1)
        while chunk < chunks:
            lo, hi = valid * chunk // chunks, valid * (chunk + 1) // chunks
            for e in range(experts * chunk // chunks, experts * (chunk + 1) // chunks):
                count = np.int64(counts[e])
                if count > 0:
                    _fill_bin(
                        np.int64(e), count, np.int64(offsets[e]) // block_size, _blocks(count, block_size), block_size,
                        routes, names, map_code, map_stride, experts, sorted_ids, expert_ids, block_rows,
                    )  # fmt: skip
            total = np.int64(offsets[experts])
            _fill_rest(total, length, routes, chunk, chunks, sorted_ids)
            _fill_rest(total // block_size, num_blocks, -1, chunk, chunks, expert_ids)
            if block_rows != 0:
                _fill_rest(total // block_size, num_blocks, 0, chunk, chunks, block_rows)
            _scatter(
                ids, lo, hi, cols, row_stride, col_stride, bound, experts, mapped, table,
                i32_ptr(counters + chunk * step), sorted_ids, positions, scatter_idx, routes, counts[experts] > 0,
            )  # fmt: skip
            atomic_add(fill_done, 1)
            chunk = atomic_add(fill_next, 1)

        if leader != 0:
            _drop_invalid(positions, scatter_idx, valid, routes)
            wait_for(fill_done, chunks)

    return shared


@_kernel
def batched_scan(
    counts_in, code, stride, slots, batches, block_size, error, scratch,
    total_out, counts_out, offsets_out, ends_out,
):  # fmt: skip
    """Batched, pass 1: scratch[b] = count, clamped to [0, slots]; scratch[batches + 1 + b] = first row."""
    table = i32_ptr(scratch)
    first = np.int64(0)
    end = np.int64(0)
    bad = False
    for b in range(batches):
        value = load_int(counts_in, b * stride, code)
        bad |= value < 0 or value > slots
        count = min(max(value, np.int64(0)), slots)
        table[b] = np.int32(count)
        table[batches + 1 + b] = np.int32(first)
        end += count
        if counts_out != 0:
            i32_ptr(counts_out)[b] = np.int32(count)
        if offsets_out != 0:
            i32_ptr(offsets_out)[b] = np.int32(first)
        if ends_out != 0:
            i32_ptr(ends_out)[b] = np.int32(end)
        first += _blocks(count, block_size) * block_size
    table[2 * batches + 1] = np.int32(first)
    if offsets_out != 0:
        i32_ptr(offsets_out)[batches] = np.int32(first)
    i32_ptr(total_out)[0] = np.int32(first)
    if bad and error != 0:
        i32_ptr(error)[0] |= np.int32(BAD_COUNT)


@_kernel
def batched_fill(
    leader, control, parts, slots, batches, block_size, length, num_blocks, scratch,
    sorted_ids, expert_ids, positions, block_rows,
):  # fmt: skip
    """Batched, pass 2, run by every thread: take a part of the batches and of the tails until none is left."""
    if not joins(control + 128, leader):
        return
    table = i32_ptr(scratch)
    target = i32_ptr(sorted_ids)
    routes = batches * slots
    part = atomic_add(control, 1)
    while part < parts:
        for b in range(batches * part // parts, batches * (part + 1) // parts):
            count = np.int64(table[b])
            first = np.int64(table[batches + 1 + b])
            for j in range(count):
                target[first + j] = np.int32(b * slots + j)
            if positions != 0:
                rows = i32_ptr(positions)
                for j in range(count):
                    rows[b * slots + j] = np.int32(first + j)
                _fill(positions, b * slots + count, (b + 1) * slots, -1)
            if count > 0:
                none = np.int64(0)
                _fill_bin(
                    np.int64(b), count, first // block_size, _blocks(count, block_size), block_size, routes,
                    none, none, none,
                    batches, sorted_ids, expert_ids, block_rows,
                )  # fmt: skip
        total = np.int64(table[2 * batches + 1])
        _fill_rest(total, length, routes, part, parts, sorted_ids)
        _fill_rest(total // block_size, num_blocks, -1, part, parts, expert_ids)
        if block_rows != 0:
            _fill_rest(total // block_size, num_blocks, 0, part, parts, block_rows)
        atomic_add(control + 64, 1)
        part = atomic_add(control, 1)
    if leader != 0:
        wait_for(control + 64, parts)


# By the width of an id in bytes; each compiles at its first call.
serial = {width: _make_serial(width) for width in ID_WIDTHS}
shared = {width: _make_shared(width) for width in ID_WIDTHS}
