"""Which rank holds which experts: :class:`ExpertPlacement`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import placement as tables
from ..errors import InvalidInput

__all__ = ["ExpertPlacement", "bins_of"]

Kept = TypeVar("Kept")


@dataclass(frozen=True, eq=False)
class ExpertPlacement:
    """Which rank holds which experts in which slots; an expert may have copies on several ranks.

    ``table`` is int64 ``[ranks, slots]``, ``-1`` for an empty slot; see :mod:`moealign.placement`.
    A route of token ``t`` to an expert with ``c`` copies goes to copy ``t % c``, in the order of ranks.
    """

    table: npt.NDArray[np.int64]
    num_experts: int

    def __post_init__(self) -> None:
        table = np.asarray(self.table, dtype=np.int64)
        if table.ndim != 2 or not table.size:
            raise InvalidInput(f"table: expected [ranks, slots], got shape {list(table.shape)}")
        ids = table[table >= 0]
        if ids.size and ids.max() >= self.num_experts:
            raise InvalidInput(f"table: expected experts below {self.num_experts}, got {ids.max()}")
        missing = np.setdiff1d(np.arange(self.num_experts), ids)
        if missing.size:
            raise InvalidInput(f"table: expected every expert on some rank, expert {missing[0]} is on none")
        for rank, row in enumerate(table):
            own = row[row >= 0]
            if len(np.unique(own)) != len(own):
                raise InvalidInput(f"table: expected each expert once a rank, rank {rank} holds {list(row)}")
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "_kept", {})

    @classmethod
    def linear(cls, num_experts: int, ranks: int) -> ExpertPlacement:
        """Consecutive experts together: rank 0 holds the first ``cdiv(num_experts, ranks)``."""
        return cls(tables.linear(num_experts, ranks), num_experts)

    @classmethod
    def round_robin(cls, num_experts: int, ranks: int) -> ExpertPlacement:
        """Expert ``e`` on rank ``e % ranks``."""
        return cls(tables.round_robin(num_experts, ranks), num_experts)

    @classmethod
    def balanced(cls, loads: npt.ArrayLike | Tensor, ranks: int, replicas: int = 0) -> ExpertPlacement:
        """From loads ``[num_experts]``, of a trace or ``expert_counts``, with `replicas` additional copies."""
        weights = loads.detach().cpu().numpy() if isinstance(loads, Tensor) else np.asarray(loads)
        return cls(tables.balanced(weights, ranks, replicas), len(weights))

    def rebalanced(self, loads: npt.ArrayLike | Tensor, max_imbalance: float = 1.05) -> ExpertPlacement:
        """A placement for other loads ``[num_experts]`` that moves few experts: :func:`moealign.placement.rebalanced`.

        :func:`move_experts` carries the weights over.
        """
        weights = loads.detach().cpu().numpy() if isinstance(loads, Tensor) else loads
        return ExpertPlacement(tables.rebalanced(self.table, weights, max_imbalance), self.num_experts)

    @classmethod
    def load(cls, path: str | Path, ranks: int, layer: int = 0) -> ExpertPlacement:
        """The placement of `layer` from a file of :meth:`save`, ``moealign report --placement`` or an engine's EPLB.

        Raises:
            InvalidInput: the file is no placement of `ranks` ranks (:func:`moealign.placement.load`), or it has no such
                layer.
        """
        layers = tables.load(path, ranks)
        if not 0 <= layer < len(layers):
            raise InvalidInput(f"layer: expected a layer below {len(layers)}, got {layer}")
        return cls(layers[layer], int(layers[layer].max()) + 1)

    def save(self, path: str | Path) -> None:
        """Write this placement as the only layer of a file; :func:`moealign.placement.save` writes several.

        Raises:
            InvalidInput: a slot is empty.
        """
        tables.save(path, self.table[None])

    @property
    def ranks(self) -> int:
        return int(self.table.shape[0])

    @property
    def slots(self) -> int:
        """Experts per rank: the first dimension of its weights."""
        return int(self.table.shape[1])

    @property
    def replicated(self) -> bool:
        """Whether any expert has several copies."""
        return int((self.table >= 0).sum()) > self.num_experts

    def owners(self, expert: int) -> list[tuple[int, int]]:
        """``(rank, slot)`` of every copy of `expert`, by rank."""
        return [(int(rank), int(slot)) for rank, slot in np.argwhere(self.table == expert)]

    def expert_map(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """The map of `rank` for :func:`align`, int32 ``[num_experts]``: slots of its experts, ``-1`` for others."""

        def make() -> Tensor:
            slots = np.full(self.num_experts, -1, dtype=np.int32)
            row = self.table[rank]
            slots[row[row >= 0]] = np.flatnonzero(row >= 0)
            return torch.from_numpy(slots).to(device)

        return self.kept(("map", rank, str(device)), make)

    def shard(self, weights: Tensor, rank: int) -> Tensor:
        """The weights of `rank`, ``[slots, ...]``, from all ``[num_experts, ...]``; zeros in empty slots."""
        row = torch.from_numpy(self.table[rank]).to(weights.device)
        picked = weights[row.clamp(min=0)]
        return torch.where((row >= 0).view(-1, *(1,) * (weights.dim() - 1)), picked, torch.zeros_like(picked))

    def imbalance(self, loads: npt.ArrayLike | Tensor) -> float:
        """Load of the busiest rank over the mean, for loads ``[num_experts]``; 1 is even."""
        weights = loads.detach().cpu().numpy() if isinstance(loads, Tensor) else loads
        return tables.imbalance(self.table, weights)

    def bins(self, topk_ids: Tensor) -> Tensor:
        """int32 ``[T, k]`` from global ids ``[T, k]``: ``rank * slots + slot``; ``-1`` for an invalid id."""
        return bins_of(topk_ids, self.copies(topk_ids.device))

    def copies(self, device: torch.device | str) -> Tensor:
        """int64 ``[num_experts, max copies + 1]``: the bins of each expert's copies, then their number."""
        return self.kept(("copies", str(device)), lambda: torch.from_numpy(self._copies()).to(device))

    def _copies(self) -> npt.NDArray[np.int64]:
        owners_of = [self.owners(expert) for expert in range(self.num_experts)]
        copies = np.zeros((self.num_experts, max(map(len, owners_of)) + 1), dtype=np.int64)
        for expert, owners in enumerate(owners_of):
            copies[expert, : len(owners)] = [rank * self.slots + slot for rank, slot in owners]
            copies[expert, -1] = len(owners)
        return copies

    def kept(self, key: tuple[Any, ...], make: Callable[[], Kept]) -> Kept:
        """What `make` gave for `key` the first time."""
        cache: dict[tuple[Any, ...], Kept] = self._kept  # type: ignore[attr-defined]
        if key not in cache:
            cache[key] = make()
        return cache[key]


def bins_of(topk_ids: Tensor, copies: Tensor) -> Tensor:
    """:meth:`ExpertPlacement.bins` by its :meth:`ExpertPlacement.copies`."""
    ids = topk_ids.to(torch.int64)
    inside = (ids >= 0) & (ids < copies.shape[0])
    ids = torch.where(inside, ids, 0)
    if copies.shape[1] == 2:
        found = copies[:, 0][ids]
    else:
        turns = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
        found = copies[ids, turns % copies[:, -1][ids]]
    return torch.where(inside, found, -1).to(torch.int32)
