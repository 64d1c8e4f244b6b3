"""Counting sort on the CPU, compiled by numba at the first call and cached on disk.

Passes: count, scan, scatter, in one compiled call; from `PARALLEL_ROUTES` on several threads run it together.
Bytes: ids are read twice, every output is written once; scratch is one int32 counter a bin and chunk of routes,
with at most `CHUNKS_A_THREAD` chunks a thread, and three tables.

Ids of any integer dtype and of any strides that collapse to two dimensions are read in place; only other
strides are copied.  Nothing here imports numba before the first call.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import mmap
import os
import struct
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from moealign.layout import BlockLayout, Problem

from .routing import route
from .threads import helpers, num_threads

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

_kernels: Any = None


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why numba cannot run here."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; pip install 'moealign[cpu]'"
    return None


def refuses(problem: Problem) -> str | None:
    """Takes every problem whose tensors are in host memory."""
    if problem.device.type != "cpu":
        return f"expected CPU tensors, got tensors on {problem.device}; it sorts in host memory only"
    return None


def note(problem: Problem) -> str:
    """What the first call in this process waits for."""
    width = abs(_CODES[problem.dtype])
    if _kernels is not None:
        first = _kernels.batched_scan if problem.op == "align_batched" else _kernels.serial[width]
        if first.signatures or (problem.op == "align" and _kernels.shared[width].signatures):
            return ""
    folder, cached = _cache()
    if cached:
        return f"compiled by numba before, cached in {folder}: the first call loads it, about 0.5 s"
    return f"the first call compiles with numba, about 3 s, then it is cached in {folder}"


def _cache() -> tuple[str, bool]:
    """Where numba keeps what it compiled from kernels.py, and whether there is something."""
    here = os.path.dirname(os.path.abspath(__file__))
    pycache = os.path.join(here, "__pycache__")
    home = os.path.expanduser("~")
    if sys.platform == "darwin":
        user = os.path.join(home, "Library", "Caches", "numba")
    elif sys.platform == "win32":
        user = os.path.join(os.environ.get("LOCALAPPDATA", home), "numba", "numba", "Cache")
    else:
        user = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache"), "numba")
    given = os.environ.get("NUMBA_CACHE_DIR")
    writable = os.access(pycache if os.path.isdir(pycache) else here, os.W_OK)
    folder = given or (pycache if writable else user)
    # Under a folder of its own numba keeps one sub-folder a source folder, named <parent>_<hash>.
    places = [folder] if folder == pycache else sorted(glob.glob(os.path.join(glob.escape(folder), "cpu_*")))
    return folder, any(glob.glob(os.path.join(glob.escape(place), "kernels.*.nbi")) for place in places)


def _load() -> Any:
    global _kernels
    if _kernels is None:
        from moealign.backends.cpu import kernels

        _kernels = kernels
    return _kernels


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


class _Arguments:
    """Room for the arguments of one call: `pack(buffer, 0, ...)` writes them, `address` is what the kernel gets."""

    def __init__(self, count: int) -> None:
        self.buffer = ctypes.create_string_buffer(8 * count)
        self.address = ctypes.addressof(self.buffer)
        self.pack = struct.Struct(f"{count}q").pack_into


class _Scratch(threading.local):
    """Kept for each thread from call to call, since a call of a few routes is shorter than a malloc: three rows of
    counters, and room for arguments (a list, so that a call inside a call takes another).  `usual` has the arguments of
    calls with three outputs from contiguous ids and nothing else, in which only four addresses change."""

    def __init__(self) -> None:
        self.row_ints = self.address = 0
        self.rows: torch.Tensor | None = None
        self.free: list[_Arguments] = []
        self.usual: dict[int, tuple[Problem, _Arguments, Any]] = {}

    def grow(self, row_ints: int) -> None:
        self.rows = torch.empty(3 * row_ints, dtype=torch.int32)
        self.address, self.row_ints = self.rows.data_ptr(), row_ints
        self.usual.clear()


_own = _Scratch()


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
    own = _own
    if _as_before(problem, topk_ids, out.sorted_token_ids, out.expert_ids, out.num_tokens_post_padded):
        return
    kernels = _kernels or _load()
    routes, experts, block_size = problem.routes, problem.num_experts, problem.block_size
    code = _CODES[problem.dtype]
    width = abs(code)
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
    if routes >= PARALLEL_ROUTES:
        threads = min(num_threads(), int(routes // max(MIN_ROUTES_A_THREAD, experts * MIN_ROUTES_AN_EXPERT)))
    else:
        threads = 1
    row_ints = (experts + 1 + 63) // 64 * 64  # two pairs of cache lines: threads must share none, nor its neighbour
    if threads <= 1:
        if own.row_ints < row_ints:
            own.grow(row_ints)
        arguments = own.free.pop() if own.free else _Arguments(kernels.SERIAL_ARGUMENTS)
        arguments.pack(
            arguments.buffer, 0,
            ids.data_ptr(), cols, row_stride, col_stride, bound, signed,
            map_address, map_code, map_stride, ignore, num_valid, error,
            routes, problem.top_k, experts, block_size, length, expert_ids.numel(),
            sorted_ids.data_ptr(), expert_ids.data_ptr(), out.num_tokens_post_padded.data_ptr(),
            counts, offsets, ends, positions, block_rows, scatter_idx, own.address, row_ints,
        )  # fmt: skip
        kernels.serial[width](arguments.address)
        small = routes < PARALLEL_ROUTES and not huge
        given = (expert_map, num_valid_tokens, error_word)
        if small and not problem.extras and given == _NOTHING and topk_ids.is_contiguous():
            if len(own.usual) >= _MOST_USUAL:
                own.usual.clear()
            # `problem` lives as long, since its id is the key; one of another length is another object
            own.usual[id(problem)] = (problem, arguments, kernels.serial[width])
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
    valid = kernels.prepare(
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
    task = kernels.shared[width]
    helpers.ask(threads - 1, task, (0, control), memory)
    task(1, control)


def _as_before(
    problem: Problem, topk_ids: torch.Tensor, rows: torch.Tensor, blocks: torch.Tensor, total: torch.Tensor
) -> bool:
    """Whether a call like this one was made before, with three outputs and no options: then it is made again."""
    usual = _own.usual.pop(id(problem), None)  # a call inside this one finds none
    if usual is None:
        return False
    if not topk_ids.is_contiguous():
        _own.free.append(usual[1])
        return False
    arguments = usual[1]
    _IDS(arguments.buffer, 0, topk_ids.data_ptr())
    _OUTPUTS(arguments.buffer, _OUTPUTS_AT, rows.data_ptr(), blocks.data_ptr(), total.data_ptr())
    usual[2](arguments.address)
    _own.usual[id(problem)] = usual
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
    kernels = _kernels or _load()
    batches, most = problem.num_experts, problem.top_k
    sorted_ids, expert_ids = out.sorted_token_ids, out.expert_ids
    control_ints = kernels.CONTROL_BYTES // 4
    memory = torch.empty(control_ints + 2 * batches + 2, dtype=torch.int32)
    memory[:control_ints] = 0
    control = memory.data_ptr()
    scratch = control + kernels.CONTROL_BYTES
    kernels.batched_scan(
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
        helpers.ask(threads - 1, kernels.batched_fill, (0, *arguments), memory)
    kernels.batched_fill(1, *arguments)
