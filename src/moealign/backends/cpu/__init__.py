"""Counting sort on the CPU, compiled by numba at the first call and cached on disk.

Passes: count, scan, scatter, in one compiled call; from `PARALLEL_ROUTES` on several threads run it together.
Bytes: ids are read twice, every output is written once; scratch is one int32 counter a bin and chunk of routes,
with at most `CHUNKS_A_THREAD` chunks a thread, and three tables.

Ids of any integer dtype and of any strides that collapse to two dimensions are read in place; only other
strides are copied.  Nothing imports numba before somebody asks whether this backend runs here.

No call leaves anything behind for another: what a kernel reads and writes is held by the call that runs it, and an
exception or a call from inside a call, wherever it comes, finds every table whole.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from moealign.errors import MoealignError
from moealign.layout import BlockLayout, Problem

from .. import reference
from . import compiled
from .routing import route
from .threads import check_num_threads, helpers, num_threads

__all__ = ["align", "align_batched", "align_three", "note", "num_threads", "refuses", "route", "unavailable"]

PARALLEL_ROUTES = 393_216  # fewer routes than this stay on one thread
MIN_ROUTES_A_THREAD = 98_304  # and no thread gets fewer
MIN_ROUTES_AN_EXPERT = 2  # a thread's counters must not cost more than its routes
CHUNKS_A_THREAD = 8
CHUNK_ROUTES_AN_EXPERT = 64  # four cache lines of rows: the first and the last are shared with other chunks
HUGE_BYTES = 32 * 2**20  # glibc maps such buffers anew for every call, and each page is touched for the first time
_HUGE_PAGE = 2 * 2**20

# Width in bytes, negative if unsigned.
_CODES = {
    torch.int8: 1, torch.int16: 2, torch.int32: 4, torch.int64: 8,
    torch.uint8: -1, torch.uint16: -2, torch.uint32: -4, torch.uint64: -8,
}  # fmt: skip

_SHARED = struct.Struct("29q").pack
_IDS, _OUTPUTS = struct.Struct("q").pack_into, struct.Struct("3q").pack_into
_OUTPUTS_AT = 18 * 8  # of the arguments of `serial`
_NOTHING = (None, None, None)
_MOST_USUAL = 256


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why numba cannot run here."""
    return compiled.failure()


def refuses(problem: Problem) -> str | None:
    """Takes every problem whose tensors are in host memory."""
    if problem.device.type != "cpu":
        return f"expected CPU tensors, got tensors on {problem.device}; it sorts in host memory only"
    return None


def note(problem: Problem) -> str:
    """What the first call in this process waits for, or what every call is refused for."""
    try:
        check_num_threads()
    except MoealignError as error:
        return f"but calls are refused: {error}"
    width = abs(_CODES[problem.dtype])
    first, *others = [("batched_scan", 0)] if problem.op == "align_batched" else [("serial", width), ("shared", width)]
    if unavailable() is not None or not compiled.loaded or any(compiled.is_ready(*each) for each in (first, *others)):
        return ""
    folder = compiled.loaded["kernels"].kept_in()
    if folder is None:
        return "the first call compiles with numba, about 3 s, in every process: see the warning about the cache folder"
    if compiled.is_kept("kernels", *first):
        return f"compiled by numba before, cached in {folder}: the first call loads it, about 0.5 s"
    return f"the first call compiles with numba, about 3 s, then it is cached in {folder}"


def _walk(ids: torch.Tensor, routes: int) -> tuple[torch.Tensor, int, int, int]:
    """Route i lies at (i // cols) * row_stride + (i % cols) * col_stride; a copy if no such three numbers exist."""
    axes: list[tuple[int, int]] = []  # (size, stride), outermost first, mergeable neighbours merged
    for size, stride in zip(ids.shape, ids.stride(), strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == stride * size:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) == 1:
        return ids, axes[0][0], 0, axes[0][1]
    if len(axes) == 2:
        return ids, axes[1][0], axes[0][1], axes[1][1]
    return ids.contiguous(), routes, 0, 1


class _Rows:
    """Three rows of counters."""

    def __init__(self, ints: int) -> None:
        self.ints = ints
        self.memory = torch.empty(3 * ints, dtype=torch.int32)
        self.address = self.memory.data_ptr()


class _Arguments:
    """Room for the arguments of one call: `pack(buffer, 0, ...)` writes them, `address` is what the kernel gets.
    `rows` are those that the arguments name: they live as long."""

    def __init__(self, count: int) -> None:
        self.buffer = ctypes.create_string_buffer(8 * count)
        self.address = ctypes.addressof(self.buffer)
        self.pack = struct.Struct(f"{count}q").pack_into
        self.rows: _Rows | None = None


class _Scratch:
    """Kept for each thread from call to call, since a call of a few routes is shorter than a malloc: rows of counters,
    and room for arguments.  `usual` has the arguments of calls with three outputs from contiguous ids and nothing else,
    in which only four addresses change.

    A call takes its arguments out and puts them back at its end, so that a call inside it has others, and one that
    ends by an exception leaves them behind.  The rows may be shared: a kernel expects nothing in them, and inside it
    nothing else runs on this thread."""

    def __init__(self) -> None:
        self.rows = _Rows(0)
        self.free: list[_Arguments] = []
        self.usual: dict[int, tuple[Problem, _Arguments, Any]] = {}

    def rows_of(self, ints: int) -> _Rows:
        rows = self.rows
        if rows.ints < ints:
            rows = self.rows = _Rows(ints)
            self.usual.clear()  # which would keep the smaller ones alive
        return rows

    def arguments(self, count: int) -> _Arguments:
        try:
            return self.free.pop()
        except IndexError:
            return _Arguments(count)


_threads_own = threading.local()


def _scratch() -> _Scratch:
    try:
        return _threads_own.scratch  # type: ignore[no-any-return]
    except AttributeError:
        made = _threads_own.scratch = _Scratch()
        return made


@lru_cache(maxsize=1)
def _madvise() -> Callable[[int, int], None]:
    """Asks for huge pages in [start, stop), where the system has them; like numpy does for its own arrays."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return lambda start, stop: None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda start, stop: function(start, stop - start, advice)


def _ask_for_huge_pages(rows: torch.Tensor) -> bool:
    """Ask if `rows` are large, and say whether: one fault for 2 MiB instead of 512.  It is advice: where it is not
    taken nothing changes, and no page is touched."""
    if 4 * rows.numel() < HUGE_BYTES:
        return False
    start = -(-rows.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    stop = (rows.data_ptr() + 4 * rows.numel()) // _HUGE_PAGE * _HUGE_PAGE
    if start < stop:
        _madvise()(start, stop)
    return True


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def align(
    problem: Problem,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_valid_tokens: torch.Tensor | None,
    error_word: torch.Tensor | None,
    out: BlockLayout,
) -> None:
    """Fill `out`; see the package's text for how."""
    if _as_before(problem, topk_ids, out.sorted_token_ids, out.expert_ids, out.num_tokens_post_padded):
        return
    check_num_threads()
    routes, experts, block_size = problem.routes, problem.num_experts, problem.block_size
    code = _CODES[problem.dtype]
    width = abs(code)
    if routes >= PARALLEL_ROUTES:
        threads = min(num_threads(), int(routes // max(MIN_ROUTES_A_THREAD, experts * MIN_ROUTES_AN_EXPERT)))
    else:
        threads = 1
    kernel = compiled.find("kernels", "shared" if threads > 1 else "serial", width)
    prepare = compiled.find("kernels", "prepare") if threads > 1 else None
    if kernel is None or (prepare is None and threads > 1):
        reference.align(problem, topk_ids, expert_map, num_valid_tokens, error_word, out)
        return
    kernels = compiled.loaded["kernels"]
    signed = 1 if code > 0 else 0
    bound = min(experts, 128 if width == 1 else 32768) if signed and width < 4 else experts
    if topk_ids.is_contiguous():
        ids, cols, row_stride, col_stride = topk_ids, routes or 1, 0, 1
    else:
        ids, cols, row_stride, col_stride = _walk(topk_ids, routes)
    if expert_map is None:
        map_address = map_code = map_stride = ignore = 0
    else:
        map_address, map_code, map_stride = expert_map.data_ptr(), _CODES[expert_map.dtype], expert_map.stride(0)
        ignore = 1 if problem.ignore_invalid_experts else 0
    sorted_ids, expert_ids = out.sorted_token_ids, out.expert_ids
    num_valid = 0 if num_valid_tokens is None else num_valid_tokens.data_ptr()
    error = 0 if error_word is None else error_word.data_ptr()
    if problem.extras:
        counts, offsets, ends = _address(out.expert_counts), _address(out.expert_offsets), _address(out.group_ends)
        positions, block_rows = _address(out.positions), _address(out.block_rows)
        scatter_idx = _address(out.scatter_idx)
    else:
        counts = offsets = ends = positions = block_rows = scatter_idx = 0

    length = sorted_ids.numel()
    huge = _ask_for_huge_pages(sorted_ids)
    row_ints = (experts + 1 + 63) // 64 * 64  # two pairs of cache lines: threads must share none, nor its neighbour
    if prepare is None:
        own = _scratch()
        table = own.rows_of(row_ints)
        arguments = own.arguments(kernels.SERIAL_ARGUMENTS)
        arguments.rows = table
        arguments.pack(
            arguments.buffer, 0,
            ids.data_ptr(), cols, row_stride, col_stride, bound, signed,
            map_address, map_code, map_stride, ignore, num_valid, error,
            routes, problem.top_k, experts, block_size, length, expert_ids.numel(),
            sorted_ids.data_ptr(), expert_ids.data_ptr(), out.num_tokens_post_padded.data_ptr(),
            counts, offsets, ends, positions, block_rows, scatter_idx, table.address, row_ints,
        )  # fmt: skip
        kernel(arguments.address)
        small = routes < PARALLEL_ROUTES and not huge
        given = (expert_map, num_valid_tokens, error_word)
        if small and not problem.extras and given == _NOTHING and topk_ids.is_contiguous():
            if len(own.usual) >= _MOST_USUAL:
                own.usual.clear()
            # `problem` lives as long, since its id is the key; one of another length is another object
            own.usual[id(problem)] = (problem, arguments, kernel)
        else:
            own.free.append(arguments)
        return

    # More chunks than threads: a helper that wakes up late still finds some, and nobody waits long at the end.
    chunks = max(threads, min(CHUNKS_A_THREAD * threads, int(routes // (experts * CHUNK_ROUTES_AN_EXPERT))))
    rows = 3 + chunks
    head = (kernels.CONTROL_BYTES + 8 * kernels.SHARED_ARGUMENTS + 255) // 256 * 256
    memory = torch.empty((head + 256) // 4 + rows * row_ints, dtype=torch.int32)
    control = (memory.data_ptr() + 255) // 256 * 256
    scratch = control + head
    valid = prepare(
        map_address, map_code, map_stride, ignore, num_valid, error, routes, problem.top_k, experts, scratch
    )
    told = bytes(kernels.CONTROL_BYTES) + _SHARED(
        chunks, valid, scratch, row_ints,
        ids.data_ptr(), cols, row_stride, col_stride, bound, signed,
        map_address, map_code, map_stride, ignore, error,
        routes, experts, block_size, length, expert_ids.numel(),
        sorted_ids.data_ptr(), expert_ids.data_ptr(), out.num_tokens_post_padded.data_ptr(),
        counts, offsets, ends, positions, block_rows, scatter_idx,
    )  # fmt: skip
    ctypes.memmove(control, told, len(told))
    helpers.ask(threads - 1, kernel, (0, control), memory)
    kernel(1, control)


def _as_before(
    problem: Problem, topk_ids: torch.Tensor, rows: torch.Tensor, blocks: torch.Tensor, total: torch.Tensor
) -> bool:
    """Whether a call like this one was made before, with three outputs and no options: then it is made again."""
    try:
        own = _threads_own.scratch
    except AttributeError:  # this thread's first call
        return False
    usual = own.usual.pop(id(problem), None)  # a call inside this one finds none
    if usual is None:
        return False
    if not topk_ids.is_contiguous():
        own.free.append(usual[1])
        return False
    check_num_threads()
    arguments = usual[1]
    _IDS(arguments.buffer, 0, topk_ids.data_ptr())
    _OUTPUTS(arguments.buffer, _OUTPUTS_AT, rows.data_ptr(), blocks.data_ptr(), total.data_ptr())
    usual[2](arguments.address)
    own.usual[id(problem)] = usual
    return True


def align_three(
    problem: Problem, topk_ids: torch.Tensor, rows: torch.Tensor, blocks: torch.Tensor, total: torch.Tensor
) -> None:
    """:func:`align` without options into the first three outputs."""
    if not _as_before(problem, topk_ids, rows, blocks, total):
        align(problem, topk_ids, None, None, None, BlockLayout(rows, blocks, total))


def align_batched(
    problem: Problem,
    expert_num_tokens: torch.Tensor,
    error_word: torch.Tensor | None,
    out: BlockLayout,
) -> None:
    """Fill `out` from counts."""
    check_num_threads()
    scan, fill = compiled.find("kernels", "batched_scan"), compiled.find("kernels", "batched_fill")
    if scan is None or fill is None:
        reference.align_batched(problem, expert_num_tokens, error_word, out)
        return
    kernels = compiled.loaded["kernels"]
    batches, most = problem.num_experts, problem.top_k
    sorted_ids, expert_ids = out.sorted_token_ids, out.expert_ids
    control_ints = kernels.CONTROL_BYTES // 4
    memory = torch.empty(control_ints + 2 * batches + 2, dtype=torch.int32)
    memory[:control_ints] = 0
    control = memory.data_ptr()
    scratch = control + kernels.CONTROL_BYTES
    scan(
        expert_num_tokens.data_ptr(), _CODES[problem.dtype], expert_num_tokens.stride(0), most, batches,
        problem.block_size, _address(error_word), scratch,
        out.num_tokens_post_padded.data_ptr(), _address(out.expert_counts), _address(out.expert_offsets),
        _address(out.group_ends),
    )  # fmt: skip
    length = sorted_ids.numel()
    _ask_for_huge_pages(sorted_ids)
    threads = 1
    if length >= PARALLEL_ROUTES:
        threads = max(min(num_threads(), length // MIN_ROUTES_A_THREAD, batches), 1)
    arguments = (
        control, CHUNKS_A_THREAD * threads if threads > 1 else 1, most, batches, problem.block_size, length,
        expert_ids.numel(), scratch,
        sorted_ids.data_ptr(), expert_ids.data_ptr(), _address(out.positions), _address(out.block_rows),
    )  # fmt: skip
    if threads > 1:
        helpers.ask(threads - 1, fill, (0, *arguments), memory)
    fill(1, *arguments)
