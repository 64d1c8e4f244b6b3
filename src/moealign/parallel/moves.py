"""Experts that change their ranks while a model runs: :func:`move_experts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InvalidInput
from .collectives import Group, collective, group_of
from .experts import ExpertPlacement

__all__ = ["ExpertMove", "move_experts"]


class Transfer(NamedTuple):
    """One expert on its way; both sides know it from the placements."""

    source: int  #: rank
    source_slot: int
    target: int  #: rank
    target_slot: int


def move_experts(
    weights: Sequence[Tensor],
    old: ExpertPlacement,
    new: ExpertPlacement,
    *,
    group: Group = None,
    experts_per_step: int | None = None,
) -> ExpertMove:
    """Carry the weights of each expert from its rank in `old` to those in `new`, a few at a time.

    Call ``step()`` between two steps of the model until it returns True.  Until then the tensors hold the weights of
    `old`, unchanged: experts on their way wait in memory of their own.  With the last step, the tensors hold those of
    `new`, in place.  The host waits for nothing: the placements decide every size.

    Args:
        weights: this rank's tensors ``[slots, ...]`` of any dtype, contiguous, such as both projections and their
            biases; the same on every rank.  They must not change before the last step: while training, take one step.
        old, new: of the same experts, ranks and slots.
        group: as in :func:`replicated_moe`.
        experts_per_step: the most experts that a rank sends, and receives, in a step; by default all in one.

    Raises:
        InvalidInput: placements or tensors that do not match.
    """
    return ExpertMove(weights, old, new, group, experts_per_step)


class ExpertMove:
    """A move in progress, from :func:`move_experts`."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        old: ExpertPlacement,
        new: ExpertPlacement,
        group: Group,
        experts_per_step: int | None,
    ) -> None:
        if old.table.shape != new.table.shape or old.num_experts != new.num_experts:
            raise InvalidInput(
                f"new: expected a placement of {old.num_experts} experts on {old.ranks} ranks of {old.slots} slots "
                f"like old, got one of {new.num_experts} on {new.ranks} of {new.slots}"
            )
        if experts_per_step is not None and (type(experts_per_step) is not int or experts_per_step < 1):
            raise InvalidInput(f"experts_per_step: expected an int of at least 1 or None, got {experts_per_step!r}")
        for tensor in weights:
            if tensor.dim() < 1 or tensor.shape[0] != old.slots or not tensor.is_contiguous():
                raise InvalidInput(
                    f"weights: expected contiguous tensors of {old.slots} experts, got {list(tensor.shape)} with "
                    f"strides {list(tensor.stride())}"
                )
        self.group, self.rank = group_of(old, group)
        self._bytes = [each.detach().view(old.slots, -1).view(torch.uint8) for each in weights if each.numel()]
        self._parts, self._local = _schedule(old, new, experts_per_step)
        self._emptied = np.flatnonzero((new.table[self.rank] < 0) & (old.table[self.rank] >= 0)).tolist()
        self._came: list[tuple[list[int], list[Tensor]]] = []  # slots, and of each tensor the rows for them
        self._next, self._done = 0, False

    @property
    def steps(self) -> int:
        """Calls of :meth:`step` until it returns True, the same on every rank; at least one."""
        return max(len(self._parts), 1)

    def step(self) -> bool:
        """Exchange the next experts; True if that was the last step, and the tensors hold the weights of `new`.

        Every rank must call it as often.  After the last step it does nothing and returns True.

        Raises:
            RankFailed: a collective failed or timed out; the tensors still hold the weights of `old`.
        """
        if self._done:
            return True
        if self._next < len(self._parts):
            self._exchange(self._parts[self._next])
            self._next += 1
        if self._next >= len(self._parts):
            self._finish()
        return self._done

    def _exchange(self, part: list[Transfer]) -> None:
        ranks = dist.get_world_size(self.group)
        sent = sorted(each for each in part if each.source == self.rank)
        sent.sort(key=lambda each: each.target)
        came = sorted(each for each in part if each.target == self.rank)
        outward = [sum(each.target == rank for each in sent) for rank in range(ranks)]
        inward = [sum(each.source == rank for each in came) for rank in range(ranks)]
        rows = []
        for tensor in self._bytes:
            picked = _rows(tensor, [each.source_slot for each in sent])
            arriving = tensor.new_empty(len(came), tensor.shape[1])
            collective(
                self.group,
                lambda out=arriving, given=picked: dist.all_to_all_single(  # type: ignore[misc]
                    out, given, inward, outward, group=self.group
                ),
            )
            rows.append(arriving)
        self._came.append(([each.target_slot for each in came], rows))

    def _finish(self) -> None:
        local = [each for each in self._local if each.target == self.rank]
        self._came.append(
            (
                [each.target_slot for each in local],
                [_rows(tensor, [each.source_slot for each in local]) for tensor in self._bytes],
            )
        )
        for slots, rows in self._came:
            for tensor, part in zip(self._bytes, rows, strict=True):
                for slot, row in zip(slots, part, strict=True):
                    tensor[slot].copy_(row)
        for tensor in self._bytes:
            for slot in self._emptied:
                tensor[slot].zero_()
        self._came.clear()
        self._done = True


def _rows(tensor: Tensor, slots: list[int]) -> Tensor:
    """Copies of the rows `slots`; no list of numbers goes to the device."""
    return torch.stack([tensor[slot] for slot in slots]) if slots else tensor.new_empty(0, tensor.shape[1])


def _schedule(
    old: ExpertPlacement, new: ExpertPlacement, experts_per_step: int | None
) -> tuple[list[list[Transfer]], list[Transfer]]:
    """The transfers of each step, and those inside a rank; the same on every rank.

    An expert comes from that rank with a copy which sends the fewest.
    """
    sends = [0] * old.ranks
    travelling, local = [], []
    for rank, slot in np.argwhere((new.table != old.table) & (new.table >= 0)).tolist():
        owners = dict(old.owners(int(new.table[rank, slot])))
        if rank in owners:
            local.append(Transfer(rank, owners[rank], rank, slot))
            continue
        source = min(owners, key=lambda each: (sends[each], each))
        sends[source] += 1
        travelling.append(Transfer(source, owners[source], rank, slot))
    if experts_per_step is None:
        return ([travelling] if travelling else []), local
    parts: list[list[Transfer]] = []
    while travelling:
        part: list[Transfer] = []
        sent, came = [0] * old.ranks, [0] * old.ranks
        for each in travelling:
            if sent[each.source] < experts_per_step and came[each.target] < experts_per_step:
                part.append(each)
                sent[each.source] += 1
                came[each.target] += 1
        taken = set(part)
        travelling = [each for each in travelling if each not in taken]
        parts.append(part)
    return parts, local
