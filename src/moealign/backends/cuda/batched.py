"""The batched layout on NVIDIA GPUs: one launch of ``batched.cu``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...layout import BlockLayout, Problem
from .compile import Defines, Kernel, kernel

__all__ = ["align_batched", "specialisations"]

SOURCE = "batched.cu"
FEW = 32  # batches that one warp scans
THREADS_FEW = 128
THREADS_MANY = 128
PER_THREAD = (1, 2, 4)  # counts that a thread of batched_many scans: the least that takes one tile, else the last
CTAS_PER_MULTIPROCESSOR = 8

Plan = tuple[Kernel, int, int]  # kernel, CTAs, threads
_plans: dict[tuple[Problem, bool], Plan] = {}


def specialise(dtype: torch.dtype, batches: int, slots: int, block_size: int, aligned: bool) -> tuple[str, Defines]:
    """Name and macros of the kernel for `batches` counts of `dtype`, and `slots` rows at the most in each batch."""
    few = batches <= FEW
    threads = THREADS_FEW if few else THREADS_MANY
    defines = [
        ("COUNT_BYTES", dtype.itemsize),
        ("COUNT_SIGNED", int(dtype.is_signed)),
        ("M", slots),
        ("B", block_size),
        ("VECTOR", 4 if aligned and block_size % 4 == 0 else 1),
        ("THREADS", threads),
    ]
    if few:
        return "batched_few", tuple(defines)
    one_tile = (each for each in PER_THREAD if threads * each >= batches)
    return "batched_many", (*defines, ("PER_THREAD", next(one_tile, PER_THREAD[-1])))


def specialisations(major: int) -> Iterator[tuple[str, str, Defines]]:
    """(source, name, macros) of what models use and of every other path, to be compiled without a GPU."""
    shapes = ((8, 128, 16), (32, 512, 64), (64, 512, 64), (256, 256, 64), (256, 1024, 128), (32, 8192, 128))
    for batches, slots, block_size in shapes:
        yield (SOURCE, *specialise(torch.int32, batches, slots, block_size, True))
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.int64, torch.uint64):
        yield (SOURCE, *specialise(dtype, 5 if dtype.is_signed else 100, 8, 4, True))
    for batches in (5, 1000, 5000):
        for slots, block_size, aligned in (
            (0, 4, True),
            (7, 3, True),
            (8, 4, False),
            (1, 1, True),
            (9, 2**31 - 1, True),
        ):
            yield (SOURCE, *specialise(torch.int32, batches, slots, block_size, aligned))


def _plan(problem: Problem, rows: int, aligned: bool) -> Plan:
    name, defines = specialise(problem.dtype, problem.num_experts, problem.top_k, problem.block_size, aligned)
    index = problem.device.index
    compiled = kernel(SOURCE, name, defines, torch.cuda.current_device() if index is None else index)
    sizes = dict(defines)
    threads = sizes["THREADS"]
    ctas = -(-max(rows // sizes["VECTOR"], 1) // threads)
    plan = compiled, min(ctas, CTAS_PER_MULTIPROCESSOR * compiled.multiprocessors), threads
    _plans[problem, aligned] = plan
    return plan


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def align_batched(
    problem: Problem, expert_num_tokens: torch.Tensor, error_word: torch.Tensor | None, out: BlockLayout
) -> None:
    rows = out.sorted_token_ids
    start, length = rows.data_ptr(), rows.numel()
    aligned = start % 16 == 0
    compiled, ctas, threads = _plans.get((problem, aligned)) or _plan(problem, length, aligned)
    compiled.launch(
        ctas,
        threads,
        0,
        # inputs
        expert_num_tokens.data_ptr(),
        expert_num_tokens.stride(0),
        problem.num_experts,
        length,
        # outputs
        start,
        out.expert_ids.data_ptr(),
        out.num_tokens_post_padded.data_ptr(),
        _pointer(out.expert_counts),
        _pointer(out.expert_offsets),
        _pointer(out.group_ends),
        _pointer(out.positions),
        _pointer(out.block_rows),
        _pointer(error_word),
    )
