"""Counting sort on the CPU: the launcher of ``align_kernels.py``.

One compiled call counts, scans and scatters; from `PARALLEL_ROUTES` routes on several threads share it, in at most
`CHUNKS_PER_THREAD` chunks each.  Ids of any integer dtype are read in place if their strides collapse to two
dimensions, and are copied otherwise.

Calls share nothing: a kernel reads and writes memory of its own call.  So an exception or a call from inside a call,
wherever it comes, leaves every table intact.
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
from torch import Tensor

from ...layout import BlockLayout
from ...problem import AlignProblem
from .. import Prepared
from ..reference import align as reference
from . import compiled
from .threads import check_num_threads, helpers, num_threads

__all__ = ["CODES", "align_batched", "prepare"]

PARALLEL_ROUTES = 393_216  # fewer routes than this stay on one thread
MIN_ROUTES_PER_THREAD = 98_304  # no thread gets fewer
MIN_ROUTES_PER_EXPERT = 2  # a thread's counters must not cost more than its routes
CHUNKS_PER_THREAD = 8
CHUNK_ROUTES_PER_EXPERT = 64  # four cache lines of rows: a chunk shares its first and last with others
HUGE_BYTES = 32 * 2**20  # glibc maps buffers of this size anew for every call, so each page faults
_HUGE_PAGE = 2 * 2**20

#: Width of an integer dtype in bytes, negative if unsigned.
CODES = {
    torch.int8: 1, torch.int16: 2, torch.int32: 4, torch.int64: 8,
    torch.uint8: -1, torch.uint16: -2, torch.uint32: -4, torch.uint64: -8,
}  # fmt: skip

_pack_shared_args = struct.Struct("29q").pack
_pack_address, _pack_outputs = struct.Struct("q").pack_into, struct.Struct("3q").pack_into
_OUTPUTS_AT = 18 * 8  # bytes into the arguments of `serial`


def _walk(ids: Tensor, routes: int) -> tuple[Tensor, int, int, int]:
    """(ids, cols, row_stride, col_stride): route i is at (i // cols) * row_stride + (i % cols) * col_stride.  Copies
    ids that have no such numbers."""
    axes: list[tuple[int, int]] = []  # (size, stride), outermost first; neighbours that can be one axis are merged
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


class _Counters:
    """Three rows of counters, one per bin.  Each thread reuses its own: a malloc costs more than a call of few routes.

    Calls inside each other may share them: a kernel expects nothing in them, and no Python runs during a kernel."""

    def __init__(self, ints: int) -> None:
        self.ints = ints
        self.memory = torch.empty(3 * ints, dtype=torch.int32)
        self.address = self.memory.data_ptr()


_thread = threading.local()


def _counters(ints: int) -> _Counters:
    counters: _Counters | None = getattr(_thread, "counters", None)
    if counters is None or counters.ints < ints:
        counters = _thread.counters = _Counters(ints)
    return counters


class _Arguments:
    """The arguments of one call of `serial`, at `address`."""

    def __init__(self, count: int) -> None:
        self.buffer = ctypes.create_string_buffer(8 * count)
        self.address = ctypes.addressof(self.buffer)
        self.pack = struct.Struct(f"{count}q").pack_into
        self.kernel: Callable[[int], Any]
        self.counters: _Counters  # their address is among the arguments


def _spare() -> list[_Arguments]:
    """Arguments that no call of this thread uses.  A call takes one out and puts it back at its end: a call inside it
    uses another, and after an exception the garbage collector takes it."""
    try:
        return _thread.spare  # type: ignore[no-any-return]
    except AttributeError:
        spare: list[_Arguments] = []
        _thread.spare = spare
        return spare


@lru_cache(maxsize=1)
def _madvise() -> Callable[[int, int], None]:
    """A function that advises huge pages in [start, stop), as numpy does for its arrays; a no-op without madvise."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return lambda start, stop: None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda start, stop: function(start, stop - start, advice)


def _ask_for_huge_pages(rows: Tensor) -> bool:
    """Advise huge pages for large `rows`: one page fault per 2 MiB instead of 512.  Touches no page.  Returns whether
    `rows` are large."""
    if 4 * rows.numel() < HUGE_BYTES:
        return False
    start = -(-rows.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    stop = (rows.data_ptr() + 4 * rows.numel()) // _HUGE_PAGE * _HUGE_PAGE
    if start < stop:
        _madvise()(start, stop)
    return True


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Alignment:
    """One prepared call.

    `_local.packed` has the arguments of earlier calls of this thread with contiguous ids, three outputs and no options:
    from one such call to the next only four addresses change.
    """

    def __init__(self, problem: AlignProblem) -> None:
        self._problem = problem
        options = problem.map_dtype, problem.has_num_valid_tokens, problem.has_error_word, problem.extras
        self._plain = not any(options) and problem.routes < PARALLEL_ROUTES
        self._local = threading.local()

    def run(
        self,
        topk_ids: Tensor,
        expert_map: Tensor | None,
        num_valid_tokens: Tensor | None,
        error_word: Tensor | None,
        out: BlockLayout,
    ) -> None:
        """Fill `out`."""
        if not self._plain or not self._repeat(
            topk_ids, out.sorted_token_ids, out.expert_ids, out.num_tokens_post_padded
        ):
            self._run(topk_ids, expert_map, num_valid_tokens, error_word, out)

    def required(self, topk_ids: Tensor, rows: Tensor, blocks: Tensor, total: Tensor) -> None:
        """:meth:`run` without options into the three required outputs."""
        if not self._repeat(topk_ids, rows, blocks, total):
            self._run(topk_ids, None, None, None, BlockLayout(rows, blocks, total))

    def _repeat(self, topk_ids: Tensor, rows: Tensor, blocks: Tensor, total: Tensor) -> bool:
        """Run with the arguments of an earlier call; False without a matching one."""
        try:
            packed: list[_Arguments] = self._local.packed
            arguments = packed.pop()
        except (AttributeError, IndexError):  # this thread's first call, or a call inside a call
            return False
        if not topk_ids.is_contiguous():
            packed.append(arguments)
            return False
        check_num_threads()
        _pack_address(arguments.buffer, 0, topk_ids.data_ptr())
        _pack_outputs(arguments.buffer, _OUTPUTS_AT, rows.data_ptr(), blocks.data_ptr(), total.data_ptr())
        arguments.kernel(arguments.address)
        packed.append(arguments)
        return True

    def _run(
        self,
        topk_ids: Tensor,
        expert_map: Tensor | None,
        num_valid_tokens: Tensor | None,
        error_word: Tensor | None,
        out: BlockLayout,
    ) -> None:
        problem = self._problem
        check_num_threads()
        routes, experts, block_size = problem.routes, problem.num_experts, problem.block_size
        code = CODES[problem.dtype]
        width = abs(code)
        if routes >= PARALLEL_ROUTES:
            threads = min(num_threads(), int(routes // max(MIN_ROUTES_PER_THREAD, experts * MIN_ROUTES_PER_EXPERT)))
        else:
            threads = 1
        kernel = compiled.find("align_kernels", "shared" if threads > 1 else "serial", width)
        prepare = compiled.find("align_kernels", "prepare") if threads > 1 else None
        if kernel is None or (prepare is None and threads > 1):
            reference.align(problem, topk_ids, expert_map, num_valid_tokens, error_word, out)
            return
        kernels = compiled.loaded["align_kernels"]
        signed = 1 if code > 0 else 0
        bound = min(experts, 128 if width == 1 else 32768) if signed and width < 4 else experts
        if topk_ids.is_contiguous():
            ids, cols, row_stride, col_stride = topk_ids, routes or 1, 0, 1
        else:
            ids, cols, row_stride, col_stride = _walk(topk_ids, routes)
        if expert_map is None:
            map_address = map_code = map_stride = ignore = 0
        else:
            map_address, map_code, map_stride = expert_map.data_ptr(), CODES[expert_map.dtype], expert_map.stride(0)
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
        row_ints = (experts + 1 + 63) // 64 * 64  # pairs of cache lines, which processors prefetch: threads share none
        if prepare is None:
            counters = _counters(row_ints)
            spare = _spare()
            arguments = spare.pop() if spare else _Arguments(kernels.SERIAL_ARGUMENTS)
            arguments.kernel, arguments.counters = kernel, counters
            arguments.pack(
                arguments.buffer, 0,
                ids.data_ptr(), cols, row_stride, col_stride, bound, signed,
                map_address, map_code, map_stride, ignore, num_valid, error,
                routes, problem.row_length, experts, block_size, length, expert_ids.numel(),
                sorted_ids.data_ptr(), expert_ids.data_ptr(), out.num_tokens_post_padded.data_ptr(),
                counts, offsets, ends, positions, block_rows, scatter_idx, counters.address, row_ints,
            )  # fmt: skip
            kernel(arguments.address)
            if self._plain and not huge and topk_ids.is_contiguous():
                self._store(arguments)
            else:
                spare.append(arguments)
            return

        # More chunks than threads: a helper that wakes up late still finds some, and the wait at the end is short.
        chunks = max(threads, min(CHUNKS_PER_THREAD * threads, int(routes // (experts * CHUNK_ROUTES_PER_EXPERT))))
        rows = 3 + chunks
        head = (kernels.CONTROL_BYTES + 8 * kernels.SHARED_ARGUMENTS + 255) // 256 * 256
        memory = torch.empty((head + 256) // 4 + rows * row_ints, dtype=torch.int32)
        control = (memory.data_ptr() + 255) // 256 * 256
        scratch = control + head
        valid = prepare(
            map_address, map_code, map_stride, ignore, num_valid, error, routes, problem.row_length, experts, scratch
        )
        shared = bytes(kernels.CONTROL_BYTES) + _pack_shared_args(
            chunks, valid, scratch, row_ints,
            ids.data_ptr(), cols, row_stride, col_stride, bound, signed,
            map_address, map_code, map_stride, ignore, error,
            routes, experts, block_size, length, expert_ids.numel(),
            sorted_ids.data_ptr(), expert_ids.data_ptr(), out.num_tokens_post_padded.data_ptr(),
            counts, offsets, ends, positions, block_rows, scatter_idx,
        )  # fmt: skip
        ctypes.memmove(control, shared, len(shared))
        helpers.ask(threads - 1, kernel, (0, control), memory)
        kernel(1, control)

    def _store(self, arguments: _Arguments) -> None:
        try:
            self._local.packed.append(arguments)
        except AttributeError:
            self._local.packed = [arguments]


def prepare(problem: AlignProblem) -> Prepared:
    alignment = _Alignment(problem)
    return Prepared(alignment.run, alignment.required)


def align_batched(
    problem: AlignProblem,
    expert_num_tokens: Tensor,
    error_word: Tensor | None,
    out: BlockLayout,
) -> None:
    """Fill `out` from the counts of the batches."""
    check_num_threads()
    scan, fill = compiled.find("align_kernels", "batched_scan"), compiled.find("align_kernels", "batched_fill")
    if scan is None or fill is None:
        reference.align_batched(problem, expert_num_tokens, error_word, out)
        return
    kernels = compiled.loaded["align_kernels"]
    batches, slots = problem.num_experts, problem.row_length
    sorted_ids, expert_ids = out.sorted_token_ids, out.expert_ids
    control_ints = kernels.CONTROL_BYTES // 4
    memory = torch.empty(control_ints + 2 * batches + 2, dtype=torch.int32)
    memory[:control_ints] = 0
    control = memory.data_ptr()
    scratch = control + kernels.CONTROL_BYTES
    scan(
        expert_num_tokens.data_ptr(), CODES[problem.dtype], expert_num_tokens.stride(0), slots, batches,
        problem.block_size, _address(error_word), scratch,
        out.num_tokens_post_padded.data_ptr(), _address(out.expert_counts), _address(out.expert_offsets),
        _address(out.group_ends),
    )  # fmt: skip
    length = sorted_ids.numel()
    _ask_for_huge_pages(sorted_ids)
    threads = 1
    if length >= PARALLEL_ROUTES:
        threads = max(min(num_threads(), length // MIN_ROUTES_PER_THREAD, batches), 1)
    arguments = (
        control, CHUNKS_PER_THREAD * threads if threads > 1 else 1, slots, batches, problem.block_size, length,
        expert_ids.numel(), scratch,
        sorted_ids.data_ptr(), expert_ids.data_ptr(), _address(out.positions), _address(out.block_rows),
    )  # fmt: skip
    if threads > 1:
        helpers.ask(threads - 1, fill, (0, *arguments), memory)
    fill(1, *arguments)
