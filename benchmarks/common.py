"""What several benchmarks share: folders, random layers and their float64 results, compiling ahead, how a run ends."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moealign import QuantizedWeights, bench
from moealign.layout import BlockLayout, capacity

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ROOT / ".peers"

Shape = tuple[int, int, int, int]  # experts, top_k, hidden, inner
SHAPES: list[Shape] = [(128, 8, 2048, 768), (8, 2, 4096, 14336), (256, 8, 7168, 1024)]
TOKENS = [1, 16, 64, 256, 1024, 4096]


def gpu_missing(program: str) -> bool:
    """Whether there is no GPU; logs it."""
    if torch.cuda.is_available():
        return False
    bench.log(f"{program}: expected a GPU that torch can use, found none")
    return True


def finish(rows: Sequence[dict[str, Any]], failures: Iterable[str], path: Path) -> int:
    """Write the CSV, log the failures, return the exit status."""
    bench.write_csv(rows, path)
    failures = list(failures)
    for line in failures:
        bench.log(line)
    return 1 if failures else 0


def integers(text: str) -> list[int]:
    """An option's value, such as ``1,16,64``."""
    return [int(part) for part in text.split(",")]


# ---- layers of experts -----------------------------------------------------------------------------------------------


def layer_name(shape: Shape, tokens: int) -> str:
    """The name of a case, as in the CSV."""
    experts, top_k, hidden, inner = shape
    return f"T{tokens}-k{top_k}-E{experts}-H{hidden}-I{inner}"


def random_weights(
    shape: Shape, device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """gate_up_proj ``[experts, 2 * inner, hidden]`` and down_proj ``[experts, hidden, inner]``."""
    experts, _, hidden, inner = shape
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(size, generator=generator, device=device, dtype=dtype) * size[2] ** -0.5
        for size in ((experts, 2 * inner, hidden), (experts, hidden, inner))
    ]


def in_blocks(weights: Tensor, size: int = 128) -> QuantizedWeights:
    """`weights` in FP8, with a scale for each block of `size` x `size`: the largest absolute value is 448."""
    experts, outputs, inputs = weights.shape
    data = torch.empty_like(weights, dtype=torch.float8_e4m3fn)
    scales = weights.new_empty(experts, outputs // size, inputs // size, dtype=torch.float32)
    for expert in range(experts):  # one at a time, for memory
        blocks = weights[expert].float().view(outputs // size, size, inputs // size, size)
        scales[expert] = blocks.abs().amax((1, 3)).clamp(min=1e-10) / 448
        data[expert] = (blocks / scales[expert][:, None, :, None]).view(outputs, inputs).to(data.dtype)
    return QuantizedWeights(data, scales, (size, size))


def empty_quantized(weights: Tensor) -> QuantizedWeights:
    """Uninitialised FP8 weights of the same sizes in blocks of 128 x 128, to compile for."""
    experts, outputs, inputs = weights.shape
    scales = weights.new_empty(experts, outputs // 128, inputs // 128, dtype=torch.float32)
    return QuantizedWeights(torch.empty_like(weights, dtype=torch.float8_e4m3fn), scales)


def random_inputs(shape: Shape, tokens: int, slots: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each slot hidden states ``[tokens, hidden]``, weights and int32 ids ``[tokens, top_k]``, on the GPU."""
    experts, top_k, hidden, _ = shape
    generator = torch.Generator("cuda").manual_seed(tokens)
    inputs = []
    for _ in range(slots):
        x = torch.randn(tokens, hidden, generator=generator, device="cuda").to(torch.bfloat16)
        scores, ids = torch.rand(tokens, experts, generator=generator, device="cuda").topk(top_k, 1)
        inputs.append((x, scores.softmax(1), ids.to(torch.int32)))
    return inputs


def float64_rows(
    tokens: Iterable[int], x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor
) -> Tensor:
    """The outputs of a gated SiLU layer for some `tokens`, in float64."""
    inner = down.shape[2]
    rows = []
    for token in tokens:
        row = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            h = gate_up[expert].double() @ x[token].double()
            row += weight * (down[expert].double() @ (F.silu(h[:inner]) * h[inner:]))
        rows.append(row)
    return torch.stack(rows)


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


# ---- compiling ahead -------------------------------------------------------------------------------------------------


def empty_layout(tokens: int, top_k: int, experts: int, block_size: int) -> BlockLayout:
    """An uninitialised layout on the CPU: a compiler needs its dtypes and shapes."""
    sizes = capacity(tokens * top_k, block_size=block_size, num_experts=experts)
    rows, names, total, positions = (torch.empty(size, dtype=torch.int32) for size in (*sizes[:3], tokens * top_k))
    return BlockLayout(rows, names, total, positions=positions, block_size=block_size)


def compile_launches(launches: Iterable[Any]) -> None:
    """Compile the experts' kernels of `launches` into Triton's cache."""
    for launch in launches:
        kernel = getattr(importlib.import_module(f"moealign.experts.{launch.module}"), launch.kernel)
        kernel.warmup(*launch.arguments, **launch.constants, **launch.options(), grid=launch.grid)


def in_processes(compile_one: Callable[[Any], str | None], jobs: Iterable[Any], chunksize: int = 1) -> list[str]:
    """Run `compile_one` on every job, in as many processes as there are cores; returns the error messages."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        return [error for error in pool.map(compile_one, jobs, chunksize=chunksize) if error]
