"""Cases: inputs of one size and kind, and the layouts that belong to them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch

from ..layout import Capacity, capacity, capacity_batched
from ..testing import expected_layout

#: (tokens, top_k, num_experts, block_size); batched: (batches, max_tokens_per_batch, batches, block_size).
Size = tuple[int, ...]


def make_ids(kind: str, size: Size, generator: torch.Generator) -> torch.Tensor:
    """int32 ids ``[tokens, top_k]`` on the generator's device, distinct within each row unless `kind` is one-expert.

    Kinds: ``uniform``, ``one-expert`` (all routes to one), ``zipf`` (skewed) and ``half-minus-one`` (half are -1).
    """
    tokens, top_k, experts = size[:3]
    device = generator.device
    if kind == "one-expert":
        expert = torch.randint(experts, (1,), generator=generator, device=device, dtype=torch.int32)
        return expert.expand(tokens * top_k).reshape(tokens, top_k).contiguous()
    scores = torch.rand((tokens, experts), generator=generator, device=device)
    if kind == "zipf":  # the k largest of log-weight plus Gumbel noise are k draws without replacement
        ranks = torch.arange(1, experts + 1, device=device, dtype=torch.float32)
        scores = -torch.log(-torch.log(scores.clamp(1e-7, 1 - 1e-7))) - torch.log(ranks)
    ids = scores.topk(top_k, dim=1).indices.to(torch.int32)
    if kind == "half-minus-one":
        ids[torch.rand(ids.shape, generator=generator, device=device) < 0.5] = -1
    return ids


@dataclass
class Case:
    """One row group of the CSV: inputs for each slot, and the arguments of the call."""

    bench: str
    name: str
    size: Size
    inputs: list[torch.Tensor]
    batched: bool = False
    expert_map: torch.Tensor | None = None
    ignore: bool = False
    extras: tuple[str, ...] = ()
    dropped: bool = False  # whether some ids are -1 or mapped to -1
    _expected: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def routes(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @functools.cached_property
    def capacity(self) -> Capacity:
        tokens, top_k, experts, block_size = self.size
        if self.batched:
            return capacity_batched(top_k, block_size=block_size, num_batches=tokens)
        return capacity(self.routes, block_size=block_size, num_experts=experts)

    def expected(self, slot: int) -> dict[str, np.ndarray]:
        """Every output for the inputs of `slot`, by the fast oracle."""
        if slot not in self._expected:
            _, top_k, experts, block_size = self.size
            ids = self.inputs[slot].cpu().numpy()
            if self.batched:
                ids = np.where(np.arange(top_k)[None] < ids[:, None], np.arange(experts)[:, None], -1)
            self._expected[slot] = expected_layout(
                ids.reshape(-1),
                block_size=block_size,
                num_experts=experts,
                length=self.capacity.sorted_token_ids,
                expert_map=None if self.expert_map is None else self.expert_map.cpu().numpy(),
                ignore=self.ignore,
            )
        return self._expected[slot]


def case_name(size: Size, kind: str = "") -> str:
    tokens, top_k, experts, block_size = size
    return f"{tokens}x{top_k}-E{experts}-B{block_size}" + (f" {kind}" if kind else "")
