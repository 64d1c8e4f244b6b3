"""A stable counting sort of routes into padded bins, compiled by numba.  Plain integers in, nothing out.

What it computes: every output of :class:`moealign.layout.BlockLayout`, to the last element.
Passes: count the routes of each bin; scan the bins (offsets, blocks, padding); scatter the routes.  One thread does
them in one call, `serial`.  Several run `shared` and take chunks of the routes, which have counters of their own: the
bits depend neither on the number of threads nor on who took which chunk.
Bytes: ids are read twice, every element of an output is written once; scratch is one counter a bin and chunk and
three tables.

Arguments are addresses and sizes, not arrays: an array costs numba 0.3 us to unbox and torch 0.5 us to make.  An
address of 0 means "not wanted".  Ids are read as unsigned integers of their width, and a signed dtype only lowers
`bound`: whatever is not below it is dropped, so that four specialisations serve eight dtypes.  Dropped routes go to bin
E, which lies behind the last one and is filled with the sentinel: there is always room for it, and no branch.
"""

from __future__ import annotations

import os
import pickle
import sys

import llvmlite
import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.extending import intrinsic

from ..cache import cache_folder, key_of, read, write

__all__ = [
    "CONTROL_BYTES",
    "PAIRS_MAX_EXPERTS",
    "SERIAL_ARGUMENTS",
    "SHARED_ARGUMENTS",
    "batched_fill",
    "batched_scan",
    "joins",
    "kept_in",
    "kernel",
    "prepare",
    "serial",
    "shared",
    "text_of",
]

# Up to here the count uses two tables of counters side by side.
PAIRS_MAX_EXPERTS = 2048
# The scatter asks for the cache line behind the one it writes: the hardware follows only a few bins by itself...
LINE_BYTES = 64
# ...or, where so many bins end before their next line, for the line of a route this many routes before it writes there.
AHEAD = 24
AHEAD_MIN_EXPERTS = 3072
# Up to so many routes a bin all rows are filled at once, before the scatter.
FILL_FIRST = 32
# int64 that `serial` reads.
SERIAL_ARGUMENTS = 29
# int64 that `shared` reads, behind what its threads tell each other.
SHARED_ARGUMENTS = 29
# What threads of a call tell each other: eight int64, each in a cache line of its own.
CONTROL_BYTES = 512
# A helper that is there before the leader looks for it so often, offering the processor in between: some milliseconds.
PATIENCE = 4096

_JIT = {"nogil": True, "error_model": "numpy"}
_PART = {**_JIT, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # called from other kernels only
_UNSIGNED = {1: types.uint8, 2: types.uint16, 4: types.uint32, 8: types.uint64}


def text_of(module):  # type: ignore[no-untyped-def]
    """The source of a module, as the one who imported it reads it."""
    return module["__loader__"].get_data(module["__file__"])


class Kept(NullCache):
    """Keeps what numba compiled in :func:`kept_in`, under a key of all that the machine code depends on."""

    def __init__(self, function, *texts):  # type: ignore[no-untyped-def]
        cells = [str(cell.cell_contents) for cell in function.__closure__ or ()]
        versions = (numba.__version__, llvmlite.__version__, str(sys.implementation.cache_tag))
        self.ingredients = (*texts, function.__module__, function.__qualname__, *cells, *versions)

    def place(self, signature, codegen):  # type: ignore[no-untyped-def]
        """Path and key of an entry, None if nothing is kept; `codegen` knows the processor."""
        folder = kept_in()
        if folder is None:
            return None
        key = key_of(*self.ingredients, str(signature), str(codegen.magic_tuple()))
        return folder / f"{key}.numba", key

    def load_overload(self, signature, target_context):  # type: ignore[no-untyped-def]
        target_context.refresh()
        place = self.place(signature, target_context.codegen())
        code = place and read(*place)
        return code and CompileResult._rebuild(target_context, *pickle.loads(code))

    def save_overload(self, signature, result):  # type: ignore[no-untyped-def]
        place = self.place(signature, result.codegen)
        if place is not None:
            write(*place, dumps(result._reduce()))


def kept_in():  # type: ignore[no-untyped-def]
    """The folder of compiled kernels, None if nothing is kept.  The user's NUMBA_CACHE_DIR holds it unless
    MOEALIGN_CACHE_DIR is set."""
    return cache_folder(os.environ.get("NUMBA_CACHE_DIR"))


def kernel(*texts):  # type: ignore[no-untyped-def]
    """The decorator of what Python calls; `texts` are the sources that it is made of."""

    def decorate(function):  # type: ignore[no-untyped-def]
        dispatcher = njit(**_JIT)(function)
        dispatcher._cache = Kept(function, *texts)
        return dispatcher

    return decorate


_kernel = kernel(text_of(globals()))


@intrinsic(prefer_literal=True)
def _ids_pointer(typingctx, address, width):  # type: ignore[no-untyped-def]
    """`address` as a pointer to unsigned integers of `width` bytes; `width` is a constant."""
    result = types.CPointer(_UNSIGNED[width.literal_value])

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(address, width), codegen


def _pointer_to(dtype):  # type: ignore[no-untyped-def]
    result = types.CPointer(dtype)

    @intrinsic
    def pointer(typingctx, address):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return builder.inttoptr(args[0], context.get_value_type(result))

        return result(address), codegen

    return pointer


@intrinsic
def _prefetch(typingctx, address):  # type: ignore[no-untyped-def]
    """A hint that the cache line at `address` is about to be written."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        builder.call(function, [builder.inttoptr(args[0], byte), word(1), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(address), codegen


@intrinsic
def _add(typingctx, address, value):  # type: ignore[no-untyped-def]
    """Adds to the int64 at `address`, atomically and in sequence; returns what was there."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _read(typingctx, address):  # type: ignore[no-untyped-def]
    """The int64 at `address`, read anew; what was written before it was changed is seen after."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load_atomic(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _yield(typingctx):  # type: ignore[no-untyped-def]
    """Offers the processor to whoever else wants it, where the system has sched_yield."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if hasattr(os, "sched_yield"):
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


_i8, _i16, _i32, _i64 = (_pointer_to(t) for t in (types.int8, types.int16, types.int32, types.int64))
_u8, _u16, _u32 = (_pointer_to(t) for t in (types.uint8, types.uint16, types.uint32))


@njit(**_PART)
def _wait(address, least):  # type: ignore[no-untyped-def]
    """Until the int64 at `address` has grown to `least`."""
    turns = 0
    while _read(address) < least:
        turns += 1
        if turns % 64 == 0:
            _yield()


@njit(**_PART)
def joins(begun, leader):  # type: ignore[no-untyped-def]
    """Whether this thread takes part in a call.  A helper does only once the leader is inside, where no exception can
    reach it: whoever takes a chunk is waited for.  Where the leader does not come, its helpers touch nothing."""
    if leader != 0:
        _add(begun, 1)
        return True
    for turn in range(64 * PATIENCE):
        if _read(begun) > 0:
            return True
        if turn % 64 == 63:
            _yield()
    return False


@njit(**_PART)
def _load(address, index, code):  # type: ignore[no-untyped-def]
    """One integer of any dtype, saturated to int64; `code` is its width in bytes, negative if unsigned."""
    if code == 8:
        return np.int64(_i64(address)[index])
    if code == 4:
        return np.int64(_i32(address)[index])
    if code == 2:
        return np.int64(_i16(address)[index])
    if code == 1:
        return np.int64(_i8(address)[index])
    if code == -4:
        return np.int64(_u32(address)[index])
    if code == -2:
        return np.int64(_u16(address)[index])
    if code == -1:
        return np.int64(_u8(address)[index])
    value = np.int64(_i64(address)[index])
    return value if value >= 0 else np.int64(0x7FFFFFFFFFFFFFFF)


@njit(**_PART)
def _fill(address, start, stop, value):  # type: ignore[no-untyped-def]
    target = _i32(address)
    for i in range(start, stop):
        target[i] = np.int32(value)


@njit(**_PART)
def _valid_routes(num_valid, error, routes, top_k):  # type: ignore[no-untyped-def]
    """Routes that count under num_valid_tokens; error bit 4 if that lies outside the rows there are."""
    if num_valid == 0:
        return routes
    rows = routes // top_k if top_k > 0 else np.int64(0)
    value = np.int64(_i32(num_valid)[0])
    if (value < 0 or value > rows) and error != 0:
        _i32(error)[0] |= np.int32(4)
    return min(max(value, np.int64(0)), rows) * top_k


@njit(**_PART)
def _load_map(map_address, map_code, map_stride, error, experts, wanted, table):  # type: ignore[no-untyped-def]
    """table[id] = its bin, E if it has none; error bit 2 for a value that is neither -1 nor a bin."""
    bad = False
    for e in range(experts):
        value = _load(map_address, e * map_stride, map_code)
        inside = value >= 0 and value < experts
        bad |= not inside and value != -1
        if wanted:
            table[e] = np.int32(value if inside else experts)
    if wanted:
        table[experts] = np.int32(experts)
    if bad and error != 0:
        _i32(error)[0] |= np.int32(2)


@njit(**_PART)
def _missing(signed, width):  # type: ignore[no-untyped-def]
    """The bit pattern of -1; for an unsigned dtype 0, which is always an id."""
    return np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - 8 * width) if signed != 0 else np.uint64(0)


@njit(**_PART)
def _check_ids(ids, lo, hi, cols, row_stride, col_stride, bound, missing):  # type: ignore[no-untyped-def]
    """Whether a route in [lo, hi) is neither below `bound` nor the bit pattern `missing` (-1, signed dtypes only)."""
    bad = False
    i = lo
    while i < hi:
        row = i // cols
        col = i - row * cols
        stop = min(hi, i + cols - col)
        at = row * row_stride + col * col_stride
        for _ in range(stop - i):
            value = np.uint64(ids[at])
            bad |= (value >= bound) & (value != missing)
            at += col_stride
        i = stop
    return bad


@njit(**_PART)
def _count(ids, lo, hi, cols, row_stride, col_stride, bound, experts, mapped, table, counters):  # type: ignore[no-untyped-def]
    """Adds the routes [lo, hi) to counters[0 .. E]; bin E collects the dropped ones."""
    nowhere = np.uint64(experts)
    i = lo
    while i < hi:
        row = i // cols
        col = i - row * cols
        stop = min(hi, i + cols - col)
        at = row * row_stride + col * col_stride
        if mapped:
            for _ in range(stop - i):
                value = np.uint64(ids[at])
                counters[np.uint64(table[value if value < bound else nowhere])] += np.int32(1)
                at += col_stride
        else:
            for _ in range(stop - i):
                value = np.uint64(ids[at])
                counters[value if value < bound else nowhere] += np.int32(1)
                at += col_stride
        i = stop


@njit(**_PART)
def _count_pairs(ids, lo, hi, stride, bound, experts, counters, second):  # type: ignore[no-untyped-def]
    """_count for one long row without a map: two tables in turn, since a run of equal ids waits for its own stores;
    four ids a step, with one branch.  The sum ends in `counters`."""
    nowhere = np.uint64(experts)
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
            counters[a if a < bound else nowhere] += np.int32(1)
            second[b if b < bound else nowhere] += np.int32(1)
            counters[c if c < bound else nowhere] += np.int32(1)
            second[d if d < bound else nowhere] += np.int32(1)
        at += 4 * stride
    for _ in range((hi - lo) % 4):
        a = np.uint64(ids[at])
        counters[a if a < bound else nowhere] += np.int32(1)
        at += stride
    for e in range(experts + 1):
        counters[e] += second[e]


@njit(**_PART)
def _count_best(ids, lo, hi, cols, row_stride, col_stride, bound, experts, mapped, table, counters, second):  # type: ignore[no-untyped-def]
    for e in range(experts + 1):
        counters[e] = 0
    if not mapped and row_stride == 0 and cols >= hi and experts <= PAIRS_MAX_EXPERTS and hi - lo >= 4 * experts:
        _count_pairs(ids, lo, hi, col_stride, bound, experts, counters, second)
    else:
        _count(ids, lo, hi, cols, row_stride, col_stride, bound, experts, mapped, table, counters)


@njit(**_PART)
def _take(value, cursor):  # type: ignore[no-untyped-def]
    """The next free row of bin `value`."""
    place = cursor[value]
    cursor[value] = place + np.int32(1)
    return np.int64(place)


@njit(**_PART)
def _scatter(  # type: ignore[no-untyped-def]
    ids, lo, hi, cols, row_stride, col_stride, bound, experts, mapped, table, cursor,
    sorted_ids, positions, scatter_idx, routes, dropped,
):  # fmt: skip
    """Routes [lo, hi) to their rows; cursor[bin] is the next free one.  Where none is dropped a branch is never wrong,
    and cheaper than two selections."""
    nowhere = np.uint64(experts)
    target = _i32(sorted_ids)
    simple = not mapped and positions == 0 and scatter_idx == 0
    many = experts >= AHEAD_MIN_EXPERTS
    next_line = sorted_ids + LINE_BYTES
    if not many and hi - lo >= 4 * experts:
        for e in range(experts):
            _prefetch(sorted_ids + 4 * np.int64(cursor[e]))
    i = lo
    while i < hi:
        row = i // cols
        col = i - row * cols
        stop = min(hi, i + cols - col)
        at = row * row_stride + col * col_stride
        if simple and not dropped:
            for route in range(i, stop):
                if many:
                    value = np.uint64(ids[at + col_stride * min(stop - 1 - route, AHEAD)])
                    if value < bound:
                        _prefetch(sorted_ids + 4 * np.int64(cursor[value]))
                value = np.uint64(ids[at])
                if value < bound:
                    place = _take(value, cursor)
                    target[np.uint64(place)] = np.int32(route)
                    if not many:
                        _prefetch(next_line + 4 * place)
                at += col_stride
        elif simple:
            for route in range(i, stop):
                if many:
                    value = np.uint64(ids[at + col_stride * min(stop - 1 - route, AHEAD)])
                    _prefetch(sorted_ids + 4 * np.int64(cursor[value if value < bound else nowhere]))
                value = np.uint64(ids[at])
                kept = value < bound
                place = _take(value if kept else nowhere, cursor)
                target[np.uint64(place)] = np.int32(route if kept else routes)
                if not many:
                    _prefetch(next_line + 4 * place)
                at += col_stride
        else:
            for route in range(i, stop):
                if many:
                    value = np.uint64(ids[at + col_stride * min(stop - 1 - route, AHEAD)])
                    value = value if value < bound else nowhere
                    if mapped:
                        value = np.uint64(table[value])
                    _prefetch(sorted_ids + 4 * np.int64(cursor[value]))
                value = np.uint64(ids[at])
                value = value if value < bound else nowhere
                if mapped:
                    value = np.uint64(table[value])
                kept = value != nowhere
                place = _take(value, cursor)
                target[np.uint64(place)] = np.int32(route if kept else routes)
                if not many:
                    _prefetch(next_line + 4 * place)
                if positions != 0:
                    _i32(positions)[route] = np.int32(place if kept else -1)
                if scatter_idx != 0:
                    _i32(scatter_idx)[route] = np.int32(route if kept else -1)
                at += col_stride
        i = stop


@njit(**_PART)
def _fill_bin(  # type: ignore[no-untyped-def]
    e, count, first, blocks, block_size, routes, map_address, map_code, map_stride, experts,
    sorted_ids, expert_ids, block_rows,
):  # fmt: skip
    """The padding (unless sorted_ids is 0) and the blocks of a bin that has `count` > 0 routes from row `first` on."""
    block = first // block_size
    name = e
    if map_address != 0:
        name = _load(map_address, e * map_stride, map_code)
        if name < 0 or name >= experts:
            name = np.int64(-1)
    _i32(expert_ids)[block] = np.int32(name)
    if blocks > 1:
        _fill(expert_ids, block + 1, block + blocks, name)
    if block_rows != 0:
        _fill(block_rows, block, block + blocks - 1, block_size)
        _i32(block_rows)[block + blocks - 1] = np.int32(count - (blocks - 1) * block_size)
    if sorted_ids != 0:
        _fill(sorted_ids, first + count, first + blocks * block_size, routes)


@njit(**_PART)
def _blocks(count, block_size):  # type: ignore[no-untyped-def]
    if count <= block_size:
        return np.int64(count > 0)
    return np.int64((np.uint32(count) - np.uint32(1)) // np.uint32(block_size)) + 1


@njit(**_PART)
def _fill_rest(start, stop, value, part, parts, address):  # type: ignore[no-untyped-def]
    """Part `part` of `parts` of the elements [start, stop)."""
    size = max(stop - start, np.int64(0))
    _fill(address, start + size * part // parts, start + size * (part + 1) // parts, value)


@njit(**_PART)
def _unwanted(positions, scatter_idx, valid, routes):  # type: ignore[no-untyped-def]
    """-1 for the routes past num_valid_tokens."""
    if positions != 0:
        _fill(positions, valid, routes, -1)
    if scatter_idx != 0:
        _fill(scatter_idx, valid, routes, -1)


def _make_serial(width):  # type: ignore[no-untyped-def]
    @_kernel
    def serial(arguments):  # type: ignore[no-untyped-def]
        """All of it on this thread.  `arguments`: address of SERIAL_ARGUMENTS int64, as numba takes 75 ns for each."""
        given = _i64(arguments)
        ids_address, cols, row_stride, col_stride, bound_, signed = (
            given[0], given[1], given[2], given[3], given[4], given[5],
        )  # fmt: skip
        map_address, map_code, map_stride, ignore, num_valid, error = (
            given[6], given[7], given[8], given[9], given[10], given[11],
        )  # fmt: skip
        routes, top_k, experts, block_size, length, num_blocks = (
            given[12], given[13], given[14], given[15], given[16], given[17],
        )  # fmt: skip
        sorted_ids, expert_ids, total_out = given[18], given[19], given[20]
        counts_out, offsets_out, ends_out = given[21], given[22], given[23]
        positions, block_rows, scatter_idx = given[24], given[25], given[26]
        scratch, row_ints = given[27], given[28]
        ids = _ids_pointer(ids_address, width)
        bound, missing = np.uint64(bound_), _missing(signed, width)
        valid = _valid_routes(num_valid, error, routes, top_k)
        mapped = map_address != 0 and ignore != 0
        counters = _i32(scratch)
        table = _i32(scratch + 4 * row_ints)
        work = scratch + 8 * row_ints
        if map_address != 0 and (mapped or error != 0):
            _load_map(map_address, map_code, map_stride, error, experts, mapped, table)
        if error != 0 and _check_ids(ids, 0, valid, cols, row_stride, col_stride, bound, missing):
            _i32(error)[0] |= np.int32(1)

        _count_best(ids, 0, valid, cols, row_stride, col_stride, bound, experts, mapped, table, counters, _i32(work))

        names = np.int64(0) if mapped else map_address
        dropped = counters[experts] > 0
        first = np.int64(0)
        end = np.int64(0)
        # Few routes a bin: one long fill of everything is cheaper than a short one behind each bin.
        filled = valid <= FILL_FIRST * min(experts, valid)
        if filled:
            _fill(sorted_ids, 0, length, routes)
        for e in range(experts):
            count = np.int64(counters[e])
            if counts_out != 0:
                _i32(counts_out)[e] = np.int32(count)
            if offsets_out != 0:
                _i32(offsets_out)[e] = np.int32(first)
            end += count
            if ends_out != 0:
                _i32(ends_out)[e] = np.int32(end)
            if count > 0:
                counters[e] = np.int32(first)
                blocks = _blocks(count, block_size)
                _fill_bin(
                    np.int64(e), count, first, blocks, block_size, routes, names, map_code, map_stride, experts,
                    np.int64(0) if filled else sorted_ids, expert_ids, block_rows,
                )  # fmt: skip
                first += blocks * block_size
        counters[experts] = np.int32(first)
        if offsets_out != 0:
            _i32(offsets_out)[experts] = np.int32(first)
        _i32(total_out)[0] = np.int32(first)
        if not filled:
            _fill(sorted_ids, first, length, routes)
        used = first // block_size
        _fill(expert_ids, used, num_blocks, -1)
        if block_rows != 0:
            _fill(block_rows, used, num_blocks, 0)

        _scatter(
            ids, 0, valid, cols, row_stride, col_stride, bound, experts, mapped, table, counters,
            sorted_ids, positions, scatter_idx, routes, dropped,
        )  # fmt: skip
        _unwanted(positions, scatter_idx, valid, routes)

    return serial


@njit(**_PART)
def _scan(  # type: ignore[no-untyped-def]
    chunks, experts, row_ints, block_size, counters, counts, offsets, total_out, counts_out, offsets_out, ends_out
):
    """Counters of each chunk become its cursors; counts and offsets of the bins are kept for the scatter."""
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
                _i32(counts_out)[e] = np.int32(count)
            if ends_out != 0:
                _i32(ends_out)[e] = np.int32(end)
            if offsets_out != 0:
                _i32(offsets_out)[e] = np.int32(first)
            first += _blocks(count, block_size) * block_size
    if offsets_out != 0:
        _i32(offsets_out)[experts] = np.int32(first)
    _i32(total_out)[0] = np.int32(first)


@_kernel
def prepare(map_address, map_code, map_stride, ignore, num_valid, error, routes, top_k, experts, table):  # type: ignore[no-untyped-def]
    """Before `shared`: the map as a table of bins.  Returns how many routes count."""
    if map_address != 0:
        _load_map(map_address, map_code, map_stride, error, experts, ignore != 0, _i32(table))
    return _valid_routes(num_valid, error, routes, top_k)


def _make_shared(width):  # type: ignore[no-untyped-def]
    @_kernel
    def shared(leader, control):  # type: ignore[no-untyped-def]
        """What every thread of a call runs: chunks are taken from counters at `control` until none is left.

        Behind the counters, from CONTROL_BYTES on, stand SHARED_ARGUMENTS int64.  The leader can do all the work alone,
        and nobody waits for a thread that has not taken a chunk.  A helper that comes too late finds none left: it
        reads `control` and leaves.
        """
        if not joins(control + 448, leader):
            return
        given = _i64(control + CONTROL_BYTES)
        chunks, valid, scratch, row_ints = given[0], given[1], given[2], given[3]
        ids_address, cols, row_stride, col_stride, bound_, signed = (
            given[4], given[5], given[6], given[7], given[8], given[9],
        )  # fmt: skip
        map_address, map_code, map_stride, ignore, error = given[10], given[11], given[12], given[13], given[14]
        routes, experts, block_size, length, num_blocks = given[15], given[16], given[17], given[18], given[19]
        sorted_ids, expert_ids, total_out = given[20], given[21], given[22]
        counts_out, offsets_out, ends_out = given[23], given[24], given[25]
        positions, block_rows, scatter_idx = given[26], given[27], given[28]
        count_next, count_done, scanned = control, control + 64, control + 128
        fill_next, fill_done, bad_ids, threads_here = control + 192, control + 256, control + 320, control + 384
        ids = _ids_pointer(ids_address, width)
        bound, missing = np.uint64(bound_), _missing(signed, width)
        mapped = ignore != 0
        names = np.int64(0) if mapped else map_address
        step = 4 * row_ints
        table, counts, offsets = _i32(scratch), _i32(scratch + step), _i32(scratch + 2 * step)
        counters = scratch + 3 * step
        # Nobody writes rows before all have counted: until then that memory holds each thread's further counters.
        own_second = _i32(sorted_ids + step * _add(threads_here, 1))

        chunk = _add(count_next, 1)
        while chunk < chunks:
            lo, hi = valid * chunk // chunks, valid * (chunk + 1) // chunks
            own = _i32(counters + chunk * step)
            _count_best(ids, lo, hi, cols, row_stride, col_stride, bound, experts, mapped, table, own, own_second)
            if error != 0 and _check_ids(ids, lo, hi, cols, row_stride, col_stride, bound, missing):
                _add(bad_ids, 1)
            _add(count_done, 1)
            chunk = _add(count_next, 1)

        if leader != 0:
            _wait(count_done, chunks)
            if _read(bad_ids) > 0:
                _i32(error)[0] |= np.int32(1)
            _scan(
                chunks, experts, row_ints, block_size, _i32(counters), counts, offsets,
                total_out, counts_out, offsets_out, ends_out,
            )  # fmt: skip
            _add(scanned, 1)
        else:
            _wait(scanned, 1)

        chunk = _add(fill_next, 1)
        while chunk < chunks:
            lo, hi = valid * chunk // chunks, valid * (chunk + 1) // chunks
            for e in range(experts * chunk // chunks, experts * (chunk + 1) // chunks):
                count = np.int64(counts[e])
                if count > 0:
                    _fill_bin(
                        np.int64(e), count, np.int64(offsets[e]), _blocks(count, block_size), block_size, routes,
                        names, map_code, map_stride, experts, sorted_ids, expert_ids, block_rows,
                    )  # fmt: skip
            total = np.int64(offsets[experts])
            _fill_rest(total, length, routes, chunk, chunks, sorted_ids)
            _fill_rest(total // block_size, num_blocks, -1, chunk, chunks, expert_ids)
            if block_rows != 0:
                _fill_rest(total // block_size, num_blocks, 0, chunk, chunks, block_rows)
            _scatter(
                ids, lo, hi, cols, row_stride, col_stride, bound, experts, mapped, table, _i32(counters + chunk * step),
                sorted_ids, positions, scatter_idx, routes, counts[experts] > 0,
            )  # fmt: skip
            _add(fill_done, 1)
            chunk = _add(fill_next, 1)

        if leader != 0:
            _unwanted(positions, scatter_idx, valid, routes)
            _wait(fill_done, chunks)

    return shared


@_kernel
def batched_scan(  # type: ignore[no-untyped-def]
    counts_in, code, stride, most, batches, block_size, error, scratch,
    total_out, counts_out, offsets_out, ends_out,
):  # fmt: skip
    """Batched, pass 1: scratch[b] = clamped count, scratch[batches + 1 + b] = first row."""
    kept = _i32(scratch)
    first = np.int64(0)
    end = np.int64(0)
    bad = False
    for b in range(batches):
        value = _load(counts_in, b * stride, code)
        bad |= value < 0 or value > most
        count = min(max(value, np.int64(0)), most)
        kept[b] = np.int32(count)
        kept[batches + 1 + b] = np.int32(first)
        end += count
        if counts_out != 0:
            _i32(counts_out)[b] = np.int32(count)
        if offsets_out != 0:
            _i32(offsets_out)[b] = np.int32(first)
        if ends_out != 0:
            _i32(ends_out)[b] = np.int32(end)
        first += _blocks(count, block_size) * block_size
    kept[2 * batches + 1] = np.int32(first)
    if offsets_out != 0:
        _i32(offsets_out)[batches] = np.int32(first)
    _i32(total_out)[0] = np.int32(first)
    if bad and error != 0:
        _i32(error)[0] |= np.int32(8)


@_kernel
def batched_fill(  # type: ignore[no-untyped-def]
    leader, control, parts, most, batches, block_size, length, num_blocks, scratch,
    sorted_ids, expert_ids, positions, block_rows,
):  # fmt: skip
    """Batched, pass 2, what every thread runs: a share of the batches and of the tails, until none is left."""
    if not joins(control + 128, leader):
        return
    kept = _i32(scratch)
    target = _i32(sorted_ids)
    routes = batches * most
    part = _add(control, 1)
    while part < parts:
        for b in range(batches * part // parts, batches * (part + 1) // parts):
            count = np.int64(kept[b])
            first = np.int64(kept[batches + 1 + b])
            for j in range(count):
                target[first + j] = np.int32(b * most + j)
            if positions != 0:
                rows = _i32(positions)
                for j in range(count):
                    rows[b * most + j] = np.int32(first + j)
                _fill(positions, b * most + count, (b + 1) * most, -1)
            if count > 0:
                none = np.int64(0)
                _fill_bin(
                    np.int64(b), count, first, _blocks(count, block_size), block_size, routes, none, none, none,
                    batches, sorted_ids, expert_ids, block_rows,
                )  # fmt: skip
        total = np.int64(kept[2 * batches + 1])
        _fill_rest(total, length, routes, part, parts, sorted_ids)
        _fill_rest(total // block_size, num_blocks, -1, part, parts, expert_ids)
        if block_rows != 0:
            _fill_rest(total // block_size, num_blocks, 0, part, parts, block_rows)
        _add(control + 64, 1)
        part = _add(control, 1)
    if leader != 0:
        _wait(control + 64, parts)


# By the width of an id in bytes; each compiles at its first call.
serial = {width: _make_serial(width) for width in _UNSIGNED}
shared = {width: _make_shared(width) for width in _UNSIGNED}
