"""The batched layout on NVIDIA GPUs: one launch of ``batched.cu``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...layout import BAD_COUNT, BlockLayout, cdiv
from ...problem import AlignProblem
from .align import pointers
from .compile import Defines
from .launch import Launch, kernel

__all__ = ["BatchedAlignment", "specialisations"]

SOURCE = "batched.cu"
GROUPS_FEW = (1, 2)  # counts per lane of batched_few
THREADS_FEW = 128
THREADS_MANY = 128
PER_THREAD = (1, 2, 4)  # counts per thread of batched_many: the first that needs a single tile, else the last
CTAS_PER_MULTIPROCESSOR = 8


def specialise(dtype: torch.dtype, batches: int, block_size: int, aligned: bool) -> tuple[str, Defines]:
    """Name and macros of the kernel for `batches` counts of `dtype`.  They do not depend on the slots per batch."""
    groups = next((groups for groups in GROUPS_FEW if batches <= 32 * groups), 0)
    threads = THREADS_FEW if groups else THREADS_MANY
    defines = (
        ("COUNT_BYTES", dtype.itemsize),
        ("COUNT_SIGNED", int(dtype.is_signed)),
        ("B", block_size),
        ("VECTOR", 4 if aligned and block_size % 4 == 0 else 1),
        ("THREADS", threads),
        ("BAD_COUNT", BAD_COUNT),
    )
    if groups:
        return "batched_few", (*defines, ("PER_THREAD", 0), ("GROUPS", groups))
    one_tile = (counts for counts in PER_THREAD if threads * counts >= batches)
    return "batched_many", (*defines, ("PER_THREAD", next(one_tile, PER_THREAD[-1])))


def specialisations(major: int) -> Iterator[tuple[str, str, Defines]]:
    """(file, name, macros) at models' sizes, and of every other path, for tests that compile without a GPU."""
    for batches, block_size in ((8, 16), (32, 64), (64, 64), (256, 64), (256, 128), (32, 128)):
        yield (SOURCE, *specialise(torch.int32, batches, block_size, True))
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.int64, torch.uint64):
        yield (SOURCE, *specialise(dtype, 5 if dtype.is_signed else 100, 4, True))
    for batches in (5, 1000, 5000):
        for block_size, aligned in ((4, True), (3, True), (4, False), (1, True), (2**31 - 1, True)):
            yield (SOURCE, *specialise(torch.int32, batches, block_size, aligned))


def reciprocal(divisor: int) -> int:
    """The packed constants with which batched.cu divides numbers below 2**31 by `divisor`, at most 2**31: a 32-bit
    factor, and above it the shift of the product in excess of 31."""
    shift = (divisor - 1).bit_length()
    return -(-(1 << (31 + shift)) // divisor) | shift << 32


class BatchedAlignment:
    """One prepared call: a launch for sorted_token_ids aligned to 16 bytes, and one for others."""

    def __init__(self, problem: AlignProblem) -> None:
        self._problem = problem
        self._launches: dict[bool, Launch] = {}
        self._reciprocal = reciprocal(max(problem.row_length, 1))

    def _prepare(self, length: int, aligned: bool) -> Launch:
        problem = self._problem
        block_size = problem.block_size if length else 1  # without rows block_size may exceed 32 bits
        name, defines = specialise(problem.dtype, problem.num_experts, block_size, aligned)
        index = problem.device.index
        compiled = kernel(SOURCE, name, defines, torch.cuda.current_device() if index is None else index)
        sizes = dict(defines)
        threads = sizes["THREADS"]
        ctas = min(cdiv(max(length // sizes["VECTOR"], 1), threads), CTAS_PER_MULTIPROCESSOR * compiled.multiprocessors)
        launch = self._launches[aligned] = compiled.prepare(ctas, threads, 0)
        return launch

    def run(self, expert_num_tokens: Tensor, error_word: Tensor | None, out: BlockLayout) -> None:
        """Fill `out` on the current stream, in one launch."""
        rows, problem = out.sorted_token_ids, self._problem
        start, length = rows.data_ptr(), rows.numel()
        aligned = start % 16 == 0
        launch = self._launches.get(aligned) or self._prepare(length, aligned)
        launch(
            # inputs
            expert_num_tokens.data_ptr(),
            expert_num_tokens.stride(0),
            problem.num_experts,
            length,
            problem.row_length,
            self._reciprocal,
            # outputs
            start,
            out.expert_ids.data_ptr(),
            out.num_tokens_post_padded.data_ptr(),
            *pointers(out.expert_counts, out.expert_offsets, out.group_ends, out.positions, out.block_rows, error_word),
        )
