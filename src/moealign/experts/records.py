"""What travels together through this wing: the weights of a layer, the router's choice, and one grouped product.

They are tuples, so that Dynamo traces them and :func:`moealign.modes.call` finds the tensors inside.  They have methods
and no properties, which the Dynamo of torch 2.10 cannot read.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import modes
from ..alignment import align
from ..layout import BlockLayout
from .quantized import QuantizedWeights

__all__ = ["ExpertWeights", "Product", "Routes", "product_columns"]


class ExpertWeights(NamedTuple):
    """Both projections of a layer."""

    gate_up: Tensor  #: [E, 2I, H], gate first, or [E, I, H] without a gate; transposed [E, H, 2I] or [E, H, I]
    down: Tensor  #: [E, H, I]; transposed [E, I, H]
    gate_up_bias: Tensor | None = None  #: [E, 2I] or [E, I]
    down_bias: Tensor | None = None  #: [E, H]
    transposed: bool = False
    quantized: tuple[QuantizedWeights, QuantizedWeights] | None = None  #: both; the projections are then their data

    def experts(self) -> int:
        """E, a number under ``torch.jit.trace`` too."""
        return modes.size(self.gate_up, 0)

    def hidden(self) -> int:
        """H."""
        return self.down.shape[2 if self.transposed else 1]

    def inner(self) -> int:
        """I."""
        return self.down.shape[1 if self.transposed else 2]

    def gated(self) -> bool:
        """Whether the first projection has a gate beside the up part."""
        return self.gate_up.shape[2 if self.transposed else 1] == 2 * self.inner()


class Routes(NamedTuple):
    """The router's choice."""

    weights: Tensor  #: [T, k], floating
    ids: Tensor  #: [T, k], integer
    expert_map: Tensor | None = None  #: [global experts], local expert of each, -1 for another rank's
    num_valid_tokens: Tensor | None = None  #: int32, one element

    def layout(self, block_size: int, experts: int, *, group_ends: bool = False, ranges: bool = False) -> BlockLayout:
        """Align the routes for `experts` local experts, with their positions and without blocks of foreign ones; with
        `ranges`, also the counts and offsets of the experts."""
        return align(
            self.ids,
            block_size=block_size,
            num_experts=experts if self.expert_map is None else modes.size(self.expert_map, 0),
            expert_map=self.expert_map,
            ignore_invalid_experts=True,
            num_valid_tokens=self.num_valid_tokens,
            positions=True,
            group_ends=group_ends,
            expert_counts=ranges,
            expert_offsets=ranges,
        )


class Product(NamedTuple):
    """One product per expert: the arguments of :func:`moealign.grouped_gemm`, its activation split in two."""

    a: Tensor  #: [rows, K]
    b: Tensor  #: [E, N, K]; transposed [E, K, N]
    layout: BlockLayout | None  #: None: each route is a tile
    top_k: int
    row_weights: Tensor | None
    bias: Tensor | None
    activation: str | None
    gated: bool
    transposed: bool
    quantized: QuantizedWeights | None = None  #: b is then its data


def product_columns(b: Tensor, gated: bool, transposed: bool) -> int:
    """Columns of a product's output."""
    columns: int = b.shape[2 if transposed else 1]
    return columns // 2 if gated else columns
