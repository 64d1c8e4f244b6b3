"""What people look at: figures about a trace, and the picture of a layer's blocks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .alignment import align
from .layout import BlockLayout

__all__ = ["LayerLoad", "Padding", "draw_blocks", "expert_layer", "layer_load", "median_time", "padding", "recommend"]


@dataclass(frozen=True)
class LayerLoad:
    """How one layer's routes spread over its experts."""

    counts: list[int]  #: kept routes of each expert

    @property
    def routes(self) -> int:
        return sum(self.counts)

    @property
    def imbalance(self) -> float:
        """Load of the busiest expert over the mean load: 1 is even; a rank that holds it waits for nobody else."""
        return max(self.counts) * len(self.counts) / self.routes if self.routes else 1.0

    @property
    def idle(self) -> int:
        """Experts without a route."""
        return self.counts.count(0)

    def bars(self, width: int = 32) -> str:
        """The loads as a line of bars, neighbours averaged where there are more experts than `width`."""
        size = -(-len(self.counts) // width)
        means = [statistics.fmean(self.counts[i : i + size]) for i in range(0, len(self.counts), size)]
        top = max(means) or 1
        return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * mean / top))] for mean in means)


@dataclass(frozen=True)
class Padding:
    """What one block size costs on some routes."""

    block_size: int
    blocks: int
    routes: int

    @property
    def rows(self) -> int:
        """Rows a grouped GEMM computes."""
        return self.blocks * self.block_size

    @property
    def wasted(self) -> float:
        """The part of those rows that is padding."""
        return 1 - self.routes / self.rows if self.rows else 0.0

    def __add__(self, other: Padding) -> Padding:
        return Padding(self.block_size, self.blocks + other.blocks, self.routes + other.routes)


def layer_load(topk_ids: Tensor, num_experts: int) -> LayerLoad:
    """The load of one layer's `topk_ids` ``[tokens, top_k]``."""
    counts = align(topk_ids, block_size=1, num_experts=num_experts, expert_counts=True).expert_counts
    assert counts is not None
    return LayerLoad(counts.tolist())


def padding(topk_ids: Tensor, num_experts: int, block_size: int) -> Padding:
    """Blocks and padding of one layer's `topk_ids` ``[tokens, top_k]``, from the layout itself."""
    layout = align(topk_ids, block_size=block_size, num_experts=num_experts, group_ends=True)
    assert layout.group_ends is not None
    return Padding(block_size, int(layout.num_tokens_post_padded) // block_size, int(layout.group_ends[-1]))


def recommend(choices: Sequence[Padding], limit: float = 0.2) -> Padding:
    """The largest block size that wastes at most `limit` of its rows; failing that, the one that wastes least.

    The smallest block always pads least, and also loads an expert's weights most often: each block reads them once.
    So the largest one whose padding is still cheap is the one to try first.
    """
    cheap = [choice for choice in choices if choice.wasted <= limit]
    if cheap:
        return max(cheap, key=lambda choice: choice.block_size)
    return min(choices, key=lambda choice: (choice.wasted, -choice.block_size))


def median_time(function: Callable[[], object], device: torch.device, seconds: float = 0.2) -> float:
    """Median time of a call in microseconds, over at least five and at most `seconds` of calls; one call to warm up."""

    def once() -> float:
        start = time.perf_counter_ns()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter_ns() - start) / 1000

    once()
    times = [once() for _ in range(5)]
    while sum(times) < seconds * 1e6 and len(times) < 1000:
        times.append(once())
    return statistics.median(times)


def expert_layer(topk_ids: Tensor, num_experts: int, block_size: int, seed: int = 0) -> tuple[float, int]:
    """One layer of experts computed block by block through the layout, and as the plain sum over each token's experts.

    Random float64 weights and hidden states, width 16.  Returns the largest difference of the two, and the blocks used.
    """
    width = 16
    draw = torch.Generator().manual_seed(seed)
    tokens, top_k = topk_ids.shape
    hidden = torch.randn(tokens, width, generator=draw, dtype=torch.float64)
    experts = torch.randn(num_experts, width, width, generator=draw, dtype=torch.float64)
    weights = torch.rand(tokens, top_k, generator=draw, dtype=torch.float64)

    layout = align(topk_ids, block_size=block_size, num_experts=num_experts)
    out = torch.zeros(tokens * top_k, width, dtype=torch.float64)
    blocks = int(layout.num_tokens_post_padded) // block_size
    for block, expert in enumerate(layout.expert_ids[:blocks].tolist()):
        rows = layout.sorted_token_ids[block * block_size : (block + 1) * block_size].long()
        rows = rows[rows < layout.num_routes]
        out[rows] = hidden[rows // top_k] @ experts[expert]
    through_blocks = (out.view(tokens, top_k, width) * weights.unsqueeze(-1)).sum(1)

    # Dense: every expert on every token, weighted by how often the token chose it and with what weight.
    gates = torch.zeros(tokens, num_experts, dtype=torch.float64).scatter_add_(1, topk_ids.long(), weights)
    dense = torch.zeros_like(hidden)
    for expert in range(num_experts):
        dense += gates[:, expert, None] * (hidden @ experts[expert])
    return float((through_blocks - dense).abs().max()), blocks


def draw_blocks(layout: BlockLayout, block_rows: Tensor, title: str, path: str | Path) -> None:
    """A picture of the used blocks: a column a block, coloured by expert, its padding hatched; written to `path`.

    Args:
        layout: with its three tensors on any device.
        block_rows: ``[blocks]``, from the same call.
        title: a line above the picture.
        path: where to; the ending decides the format (.png, .svg, .pdf).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    size = layout.block_size
    used = int(layout.num_tokens_post_padded) // size
    experts = layout.expert_ids[:used].tolist()
    rows = block_rows[:used].tolist()
    lines = max(1, -(-used // 64))
    across = max(1, -(-used // lines))
    figure, axes = plt.subplots(lines, 1, figsize=(12, 1.2 + 1.75 * lines), squeeze=False, layout="constrained")
    palette = plt.get_cmap("tab20")
    for line, (axis,) in enumerate(axes):
        first = line * across
        part = range(first, min(first + across, used))
        colours = [palette(experts[b] % 20) for b in part]
        kept = [rows[b] for b in part]
        axis.bar(part, kept, width=0.92, color=colours)
        axis.bar(
            part,
            [size - count for count in kept],
            bottom=kept,
            width=0.92,
            color="white",
            edgecolor="#888888",
            hatch="////",
            linewidth=0.4,
        )
        start = first
        for block in part:
            if block + 1 not in part or experts[block + 1] != experts[block]:
                axis.text((start + block) / 2, size * 1.03, str(experts[block]), ha="center", va="bottom", fontsize=7)
                start = block + 1
        axis.set_xlim(first - 0.6, first + across - 0.4)
        axis.set_ylim(0, size * 1.16)
        axis.set_yticks([0, size // 2, size])
        axis.set_ylabel("rows")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[-1][0].set_xlabel("block (the number above: its expert)")
    figure.suptitle(title, fontsize=11)
    figure.legend(
        handles=[
            Patch(facecolor=palette(0), label="routes of an expert (a colour an expert)"),
            Patch(facecolor="white", edgecolor="#888888", hatch="////", label="padding"),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
