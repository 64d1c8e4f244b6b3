"""A layer of experts over several ranks, on torch.distributed: NCCL on GPUs, gloo on CPUs; see docs/parallel.md.

:func:`replicated_moe`   every rank holds all tokens and computes the routes of its experts; an all-reduce adds them up.
:func:`dispatched_moe`   every rank holds its own tokens; routes travel to the ranks of their experts and back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from . import modes
from . import placement as tables
from .alignment import align
from .errors import InvalidInput, InvalidType, RankFailed
from .experts.layer import fused_moe

__all__ = ["ExpertPlacement", "dispatched_moe", "replicated_moe"]


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
        object.__setattr__(self, "_tensors", {})

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

        return self._cached(("map", rank, str(device)), make)

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
        device = str(topk_ids.device)
        table = self._cached(("copies", device), lambda: torch.from_numpy(self._copies()).to(topk_ids.device))
        ids = topk_ids.to(torch.int64)
        inside = (ids >= 0) & (ids < self.num_experts)
        ids = torch.where(inside, ids, 0)
        which = torch.zeros_like(ids)
        if self.replicated:
            turns = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
            which = turns % table[:, -1][ids]
        return torch.where(inside, table[ids, which], -1).to(torch.int32)

    def _copies(self) -> npt.NDArray[np.int64]:
        """``[num_experts, max copies + 1]``: the bins of each expert's copies; the last column is their number."""
        owners_of = [self.owners(expert) for expert in range(self.num_experts)]
        copies = np.zeros((self.num_experts, max(map(len, owners_of)) + 1), dtype=np.int64)
        for expert, owners in enumerate(owners_of):
            copies[expert, : len(owners)] = [rank * self.slots + slot for rank, slot in owners]
            copies[expert, -1] = len(owners)
        return copies

    def _cached(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        cache: dict[tuple[Any, ...], Tensor] = self._tensors  # type: ignore[attr-defined]
        if key not in cache:
            cache[key] = make()
        return cache[key]


Group = Any  # a ProcessGroup, or a DeviceMesh of one dimension


@torch.compiler.disable(reason="collectives of moealign run eagerly")
def replicated_moe(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    placement: ExpertPlacement,
    *,
    group: Group = None,
    **options: Any,
) -> Tensor:
    """:func:`fused_moe` if every rank has all tokens and its own experts; every rank gets the same result.

    Each rank aligns with its expert map, which drops the routes of other ranks in the kernel, and computes its own
    routes; one all-reduce adds up the results.  It does not wait for the device.

    Args:
        hidden_states, topk_weights, topk_ids: ``[T, H]``, ``[T, k]``, ``[T, k]`` with global ids, equal on every rank.
        gate_up_proj, down_proj: this rank's experts, ``[slots, ...]``, from :meth:`ExpertPlacement.shard`.
        placement: the placement, for as many ranks as `group` has.
        group: a process group or a one-dimensional DeviceMesh; by default all ranks.
        options: further arguments of :func:`fused_moe`.

    Returns:
        ``[T, H]``.  Every rank gets the gradients of the whole layer: in full for the inputs, and for its own experts'
        weights.  The collective decides the order of the sum over ranks, so results are equal up to rounding.

    Raises:
        InvalidInput: sizes that do not match.
        RankFailed: a collective failed or timed out; the state of the other ranks is unknown.
    """
    _refuse_tracing("replicated_moe", hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids)
    group, rank = _member(placement, group, gate_up_proj)
    hidden = _Copy.apply(hidden_states, group)
    weights = _Copy.apply(topk_weights, group)
    if placement.replicated:
        bins = placement.bins(topk_ids)
        here = (bins >= rank * placement.slots) & (bins < (rank + 1) * placement.slots)
        local = torch.where(here, bins - rank * placement.slots, -1)
        out = fused_moe(hidden, gate_up_proj, down_proj, weights, local, **options)
    else:
        local_map = placement.expert_map(rank, topk_ids.device)
        out = fused_moe(hidden, gate_up_proj, down_proj, weights, topk_ids, expert_map=local_map, **options)
    return _Reduce.apply(out, group)  # type: ignore[no-any-return]


@torch.compiler.disable(reason="collectives of moealign run eagerly")
def dispatched_moe(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    placement: ExpertPlacement,
    *,
    group: Group = None,
    chunks: int = 1,
    **options: Any,
) -> Tensor:
    """:func:`fused_moe` if every rank has its own tokens: routes travel to the ranks of their experts and back.

    One alignment sorts the routes by rank and expert and counts them.  The ranks exchange counts, then rows, compute
    the rows that arrive, and send them back to be summed over ``k`` in order.  It waits for the device once, for the
    counts, which the collective needs as numbers.

    Args:
        hidden_states, topk_weights, topk_ids: this rank's tokens, ``[T, H]``, ``[T, k]``, ``[T, k]`` with global ids;
            ``T`` may differ from rank to rank, and be 0.
        gate_up_proj, down_proj: this rank's experts, ``[slots, ...]``.
        placement, group: as in :func:`replicated_moe`.
        chunks: number of parts that travel separately, so that one is computed while the next is in transit.  The same
            on every rank.  With gradients, the parts run one after the other.
        options: further arguments of :func:`fused_moe`, except those about ids.

    Returns:
        ``[T, H]``.  Differentiable; the same tensors must require gradients on every rank: backward communicates too.

    Raises:
        InvalidInput: sizes that do not match.
        RankFailed: a collective failed or timed out.
    """
    _refuse_tracing("dispatched_moe", hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids)
    group, _ = _member(placement, group, gate_up_proj)
    if type(chunks) is not int or chunks < 1:
        raise InvalidInput(f"chunks: expected an int of at least 1, got {chunks!r}")
    tokens, top_k = topk_ids.shape
    parts = [(tokens * c // chunks, tokens * (c + 1) // chunks) for c in range(chunks)]
    bins = placement.bins(topk_ids)
    layouts = [
        align(
            bins[a:b].contiguous(),
            block_size=1,
            num_experts=placement.ranks * placement.slots,
            expert_counts=True,
            positions=True,
        )
        for a, b in parts
    ]
    # One exchange for all parts, and the only wait: [ranks, chunks, slots] both ways.
    shape = (chunks, placement.ranks, placement.slots)
    sent = torch.cat([layout.expert_counts for layout in layouts]).view(shape)  # type: ignore[misc]
    sent = sent.transpose(0, 1).contiguous()
    came = torch.empty_like(sent)
    # wait() raises under TORCH_NCCL_BLOCKING_WAIT, where the synchronous call would not.
    _collective(group, lambda: dist.all_to_all_single(came, sent, group=group, async_op=True).wait())
    both = torch.stack((sent, came)).cpu()
    sends, comes = both.sum(3).tolist()

    gradients = modes.wants_gradient(hidden_states, gate_up_proj, down_proj, topk_weights, *options.values())
    slots = torch.arange(placement.slots, dtype=torch.int32, device=bins.device)
    state: list[Any] = []
    for c, (a, b) in enumerate(parts):
        outward = [sends[r][c] for r in range(placement.ranks)]
        inward = [comes[r][c] for r in range(placement.ranks)]
        order = layouts[c].sorted_token_ids[: sum(outward)].to(torch.int64)
        rows = hidden_states[a:b].index_select(0, order // max(top_k, 1))
        state.append((outward, inward, _Exchange.start(rows, inward, outward, group, gradients)))
    back = []
    for c, (outward, inward, exchange) in enumerate(state):
        rows = exchange.finish()
        counts = came[:, c].reshape(-1)
        ids = slots.repeat(placement.ranks).repeat_interleave(counts, output_size=sum(inward))
        ones = topk_weights.new_ones(len(ids), 1)
        # Also without rows a function of all inputs, so that the backward of every rank makes the same exchanges.
        result = fused_moe(rows, gate_up_proj, down_proj, ones, ids.unsqueeze(1), **options)
        back.append(_Exchange.start(result, outward, inward, group, gradients))
    out = []
    for c, (a, b) in enumerate(parts):
        returned = back[c].finish()
        positions = layouts[c].positions
        assert positions is not None
        kept = (positions >= 0).view(b - a, top_k, 1)
        padded = torch.cat((returned, returned.new_zeros(1, hidden_states.shape[1])))
        of_route = padded.index_select(0, torch.where(positions >= 0, positions, len(returned)).to(torch.int64))
        of_route = of_route.view(b - a, top_k, hidden_states.shape[1])
        weighted = of_route * topk_weights[a:b].unsqueeze(-1).masked_fill(~kept, 0)
        total = weighted.sum(1, dtype=torch.promote_types(weighted.dtype, torch.float32))
        out.append(total.to(hidden_states.dtype))
    return torch.cat(out)


# ---- collectives ---------------------------------------------------------------------------------------------------


def _refuse_tracing(name: str, *tensors: Tensor) -> None:
    """Refuse what is no tensor, tensors without data, and tracing: a graph would hold the sizes of the example."""
    for each in tensors:
        if not isinstance(each, Tensor):
            raise InvalidType(
                f"{name}: expected torch.Tensors, got {type(each).__name__}; FP8 weights are for moealign.fused_moe"
            )
    if modes.traced() or modes.transformed() or any(each.is_meta or modes.has_own_dispatch(each) for each in tensors):
        raise InvalidInput(
            f"{name}: expected an eager call with plain tensors, got one inside a tracer or transform, or with tensors "
            "that hold no data; its collectives run eagerly, also inside torch.compile"
        )


def _member(placement: ExpertPlacement, group: Group, weights: Tensor) -> tuple[Group, int]:
    if not dist.is_initialized():
        raise InvalidInput("group: expected torch.distributed to be initialized: dist.init_process_group(...) first")
    if group is not None and hasattr(group, "get_group"):  # a DeviceMesh
        group = group.get_group()
    ranks = dist.get_world_size(group)
    if placement.ranks != ranks:
        raise InvalidInput(f"placement: expected one of {ranks} ranks like the group, got {placement.ranks}")
    if weights.shape[0] != placement.slots:
        raise InvalidInput(
            f"gate_up_proj: expected this rank's {placement.slots} experts, got {weights.shape[0]}; "
            "placement.shard(weights, rank) cuts them"
        )
    return group, dist.get_rank(group)


def _collective(group: Group, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except RuntimeError as error:
        raise RankFailed(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)}: a collective failed or timed out, so another"
            f" rank is late, has stopped or called with other arguments; restart the group ({error})"
        ) from error


class _Copy(torch.autograd.Function):
    """The same tensor on every rank; its gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad.contiguous().clone()
        _collective(ctx.group, lambda: dist.all_reduce(total, group=ctx.group))
        return total, None


class _Reduce(torch.autograd.Function):
    """The sum over the ranks; its gradient is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        total = tensor.clone()
        _collective(group, lambda: dist.all_reduce(total, group=group))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks; their gradients travel back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, inward: list[int], outward: list[int], group: Group) -> Tensor:
        ctx.route = (inward, outward, group)
        came = rows.new_empty((sum(inward), *rows.shape[1:]))
        _collective(group, lambda: dist.all_to_all_single(came, rows.contiguous(), inward, outward, group=group))
        return came

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        inward, outward, group = ctx.route
        back = grad.new_empty((sum(outward), *grad.shape[1:]))
        _collective(group, lambda: dist.all_to_all_single(back, grad.contiguous(), outward, inward, group=group))
        return back, None, None, None


class _Exchange:
    """An exchange of rows in progress; with gradients it is complete from the start."""

    def __init__(self, rows: Tensor, sent: Tensor, work: Any, group: Group) -> None:
        self.rows, self.sent, self.work, self.group = rows, sent, work, group

    @classmethod
    def start(cls, rows: Tensor, inward: list[int], outward: list[int], group: Group, gradients: bool) -> _Exchange:
        if gradients:
            return cls(_AllToAll.apply(rows, inward, outward, group), rows, None, group)
        rows = rows.contiguous()
        came = rows.new_empty((sum(inward), *rows.shape[1:]))
        work = _collective(
            group, lambda: dist.all_to_all_single(came, rows, inward, outward, group=group, async_op=True)
        )
        return cls(came, rows, work, group)  # `rows` must live until the exchange is complete

    def finish(self) -> Tensor:
        if self.work is not None:
            _collective(self.group, self.work.wait)
            self.work = None
        return self.rows
