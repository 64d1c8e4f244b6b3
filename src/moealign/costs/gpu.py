"""Measurements on a GPU: a layer at each block size, its alignment, and the rates of the cost model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..alignment import align
from ..errors import BackendUnavailable
from ..experts.gemm import grouped_gemm
from ..experts.tiles import BLOCK_SIZES
from ..layout import BlockLayout
from ..timing import graph_us
from .model import Experts, Machine

__all__ = ["measure", "measure_alignment", "measured_machine"]

GroupedGemm = Callable[..., Tensor]


def median_graph_us(call: Callable[[], object], replays: int = 15, calls: int = 5) -> float:
    """Median device time of a call in microseconds: a CUDA graph of `calls` calls, after two calls to warm up."""
    return graph_us([call] * calls, warm_up=2, min_replays=replays, max_replays=replays, untimed_replays=0)


def measure(
    topk_ids: Tensor,
    num_experts: int,
    sizes: Sequence[int],
    experts: Experts,
    gemm: GroupedGemm | None = None,
    timer: Callable[[Callable[[], object]], float] = median_graph_us,
    device: torch.device | str = "cuda",
) -> list[float | None]:
    """Microseconds of a layer at each block size: alignment, both products and the activation between, in bf16.

    None stands for a size that the GPU kernel of :func:`moealign.grouped_gemm` does not take.

    Args:
        topk_ids: ``[layers, tokens, top_k]``; the middle layer is measured.
        num_experts: number of experts; their random weights must all fit on the device.
        sizes: block sizes.
        experts: the sizes of one expert.
        gemm: ``gemm(rows, weights, layout, top_k=..., activation=...)``, by default :func:`moealign.grouped_gemm`.
        timer: returns the microseconds of a call; by default from replays of a CUDA graph.
        device: the device to measure.

    Raises:
        BackendUnavailable: too little free memory for the weights.
    """
    product = gemm if gemm is not None else grouped_gemm
    device = torch.device(device)
    weights = num_experts * experts.weight_bytes
    if device.type == "cuda" and weights > 0.6 * torch.cuda.mem_get_info(device)[0]:
        raise BackendUnavailable(f"the experts' weights take {weights / 2**30:.1f} GiB, more than 0.6 of what is free")
    ids = topk_ids[topk_ids.shape[0] // 2].to(device, torch.int32).contiguous()
    tokens, top_k = ids.shape
    draw = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device, dtype=torch.bfloat16).mul_(shape[-1] ** -0.5)

    hidden = random(tokens, experts.hidden)
    gate_up = random(num_experts, 2 * experts.intermediate, experts.hidden)
    down = random(num_experts, experts.hidden, experts.intermediate)
    times: list[float | None] = []
    for size in sizes:
        if gemm is None and device.type == "cuda" and size not in BLOCK_SIZES:
            times.append(None)  # grouped_gemm would fall back to another path, whose time compares with nothing
            continue

        def layer(size: int = size) -> Tensor:
            layout: BlockLayout = align(ids, block_size=size, num_experts=num_experts)
            inner = product(hidden, gate_up, layout, top_k=top_k, activation="silu_mul")
            return product(inner, down, layout, top_k=1)

        with torch.no_grad():
            times.append(timer(layer))
    return times


def measure_alignment(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    timer: Callable[[Callable[[], object]], float] = median_graph_us,
    device: torch.device | str = "cuda",
) -> float:
    """Microseconds of the alignment of the middle layer of `topk_ids` ``[layers, tokens, top_k]`` on `device`."""
    ids = topk_ids[topk_ids.shape[0] // 2].to(device, torch.int32).contiguous()
    return timer(lambda: align(ids, block_size=block_size, num_experts=num_experts))


def measured_machine(device: torch.device | str = "cuda") -> Machine:
    """The three rates, measured on `device` within a second: copies of 1 GiB and 8 MiB, a product of 8,192 ** 3."""
    device = torch.device(device)

    def copied(elements: int, calls: int) -> float:
        source = torch.zeros(elements, dtype=torch.int32, device=device)
        target = torch.empty_like(source)
        return 8 * elements / median_graph_us(lambda: target.copy_(source), calls=calls) * 1e6

    side = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    out: Any = torch.empty_like(side)
    return Machine(
        f"{torch.cuda.get_device_name(device)} (measured)",
        memory=copied(2**28, calls=2),
        cache=copied(2**21, calls=100),
        matrix=2 * 8192**3 / median_graph_us(lambda: torch.mm(side, side.T, out=out), calls=3) * 1e6,
    )
