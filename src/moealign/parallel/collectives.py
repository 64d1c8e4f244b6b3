"""Collectives with gradients, and what a failed one says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import modes
from ..errors import InvalidInput, InvalidType, RankFailed
from .experts import ExpertPlacement

__all__ = [
    "AllToAll",
    "Copy",
    "Exchange",
    "Group",
    "Reduce",
    "collective",
    "group_of",
    "member",
    "refuse_tracing",
    "swap",
]

Group = Any  # a ProcessGroup, or a DeviceMesh of one dimension


def refuse_tracing(name: str, *tensors: Tensor) -> None:
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


def group_of(placement: ExpertPlacement, group: Group) -> tuple[Group, int]:
    """The process group that `group` means, of as many ranks as `placement`, and this process's rank in it."""
    if not dist.is_initialized():
        raise InvalidInput("group: expected torch.distributed to be initialized: dist.init_process_group(...) first")
    if group is not None and hasattr(group, "get_group"):  # a DeviceMesh
        group = group.get_group()
    ranks = dist.get_world_size(group)
    if placement.ranks != ranks:
        raise InvalidInput(f"placement: expected one of {ranks} ranks like the group, got {placement.ranks}")
    return group, dist.get_rank(group)


def member(placement: ExpertPlacement, group: Group, weights: Tensor) -> tuple[Group, int]:
    """:func:`group_of` for a rank that holds `weights`."""
    group, rank = group_of(placement, group)
    if weights.shape[0] != placement.slots:
        raise InvalidInput(
            f"gate_up_proj: expected this rank's {placement.slots} experts, got {weights.shape[0]}; "
            "placement.shard(weights, rank) cuts them"
        )
    return group, rank


def collective(group: Group, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except RuntimeError as error:
        raise RankFailed(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)}: a collective failed or timed out, so another"
            f" rank is late, has stopped or called with other arguments; restart the group ({error})"
        ) from error


class Copy(torch.autograd.Function):
    """The same tensor on every rank; its gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad.contiguous().clone()
        collective(ctx.group, lambda: dist.all_reduce(total, group=ctx.group))
        return total, None


class Reduce(torch.autograd.Function):
    """The sum over the ranks; its gradient is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        total = tensor.clone()
        collective(group, lambda: dist.all_reduce(total, group=group))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class AllToAll(torch.autograd.Function):
    """Rows to other ranks; their gradients travel back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, inward: list[int], outward: list[int], group: Group) -> Tensor:
        ctx.route = (inward, outward, group)
        came = rows.new_empty((sum(inward), *rows.shape[1:]))
        collective(group, lambda: dist.all_to_all_single(came, rows.contiguous(), inward, outward, group=group))
        return came

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        inward, outward, group = ctx.route
        back = grad.new_empty((sum(outward), *grad.shape[1:]))
        collective(group, lambda: dist.all_to_all_single(back, grad.contiguous(), outward, inward, group=group))
        return back, None, None, None


class Exchange:
    """An exchange of rows in progress; with gradients it is complete from the start."""

    def __init__(self, rows: Tensor, sent: Tensor, work: Any, group: Group) -> None:
        self.rows, self.sent, self.work, self.group = rows, sent, work, group

    @classmethod
    def start(cls, rows: Tensor, inward: list[int], outward: list[int], group: Group, gradients: bool) -> Exchange:
        if gradients:
            return cls(AllToAll.apply(rows, inward, outward, group), rows, None, group)
        rows = rows.contiguous()
        came = rows.new_empty((sum(inward), *rows.shape[1:]))
        work = collective(
            group, lambda: dist.all_to_all_single(came, rows, inward, outward, group=group, async_op=True)
        )
        return cls(came, rows, work, group)  # `rows` must live until the exchange is complete

    def finish(self) -> Tensor:
        if self.work is not None:
            collective(self.group, self.work.wait)
            self.work = None
        return self.rows


# ---- equal parts -----------------------------------------------------------------------------------------------------

_library = torch.library.Library("moealign", "FRAGMENT")
_library.define("swap_rows(Tensor rows, str group) -> Tensor")


def swap(rows: Tensor, group: str) -> Tensor:
    """Part ``p`` of `rows` for rank ``p``; the result holds in part ``p`` what rank ``p`` had for this one.

    All parts have the same size, so the host waits for nothing.  It is its own inverse, and its own gradient.
    """
    if modes.watched(rows) or modes.wants_gradient(rows):
        result: Tensor = modes.call(torch.ops.moealign.swap_rows, rows, group)
        return result
    return _swap(rows, group)


def _swap(rows: Tensor, group: str) -> Tensor:
    rows = rows.contiguous()
    came = torch.empty_like(rows)
    members = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]
    # As bytes: rows may be of a dtype that a transport does not know, and hold bits that are no number.
    # What dist.all_to_all_single calls, without its checks.
    exchange = getattr(members, "all_to_all_single", None) or members.alltoall_base
    options = dist.AllToAllOptions()
    options.asyncOp = False
    parts = came.view(torch.uint8), rows.view(torch.uint8)

    def call() -> None:
        work = exchange(*parts, [], [], options)
        if work is not None:
            work.wait()

    collective(members, call)
    return came


def _swap_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


def _swap_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return swap(grad, ctx.group), None


def _swap_fake(rows: Tensor, group: str) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


_library.impl("swap_rows", _swap, "CompositeExplicitAutograd")
torch.library.register_fake("moealign::swap_rows", _swap_fake, lib=_library)
modes.differentiable(_library, "swap_rows", _swap, _swap_save, _swap_backward)
