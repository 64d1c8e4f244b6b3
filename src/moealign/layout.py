"""The block-aligned layout: what it is and how large it is.

Words used everywhere: a *route* is one (token, k) choice, numbered ``i = token * top_k + k``; a *bin* collects the
routes of one expert (or of one local expert, or of one batch); a *block* is ``block_size`` consecutive rows that
belong to one bin.  ``n`` routes, ``E`` experts, ``B`` rows per block, ``cdiv(a, b) = ceil(a / b)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex, overload

import torch
from torch.utils import _pytree

__all__ = [
    "ERROR_BITS",
    "EXTRAS",
    "INT32_MAX",
    "OUTPUTS",
    "BlockLayout",
    "Capacity",
    "capacity",
    "capacity_batched",
    "cdiv",
    "power_of_two",
]

INT32_MAX = 2**31 - 1


#: Bits that backends, and an exchange between ranks, set in an error word, and what each says.
BAD_ID, BAD_MAP, BAD_NUM_VALID, BAD_COUNT, PAST_CAPACITY = 1, 2, 4, 8, 16
ERROR_BITS = {
    BAD_ID: "topk_ids held an id outside {-1} | [0, num_experts); its route was dropped",
    BAD_MAP: "expert_map held a value outside {-1} | [0, num_experts); it counted as -1",
    BAD_NUM_VALID: "num_valid_tokens was outside [0, number of tokens]; it was clamped",
    BAD_COUNT: "expert_num_tokens held a count outside [0, max_tokens_per_batch]; it was clamped",
    PAST_CAPACITY: "more routes went to a rank than the exchange has capacity for; the routes past it were dropped",
}


def cdiv(a: int, b: int) -> int:
    """The quotient of two ints, rounded up."""
    return -(-a // b)


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << max(value - 1, 0).bit_length()


#: The three outputs of every call, then the optional ones.
REQUIRED = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")
EXTRAS = ("expert_counts", "expert_offsets", "group_ends", "positions", "block_rows", "scatter_idx")
OUTPUTS = REQUIRED + EXTRAS


@dataclass(slots=True, eq=False, frozen=True, repr=False)
class BlockLayout:
    """Routes sorted by expert and padded to whole blocks.  All tensors are int32 and contiguous.

    With ``c[e]`` the kept routes of bin ``e`` and ``o[e] = sum(cdiv(c[:e], B)) * B`` its first row:

    ==========================  ==============  =============================================================
    ``sorted_token_ids``        ``[L]``         rows ``o[e] .. o[e]+c[e]-1`` = routes of bin ``e``, ascending;
                                                every other row = ``n``
    ``expert_ids``              ``[cdiv(L,B)]`` bin of block ``b``; ``-1`` past the used blocks
    ``num_tokens_post_padded``  ``[1]``         ``o[E]``
    ``expert_counts``           ``[E]``         ``c``
    ``expert_offsets``          ``[E + 1]``     ``o``
    ``group_ends``              ``[E]``         ``cumsum(c)``
    ``positions``               ``[n]``         ``sorted_token_ids[positions[i]] == i``; ``-1`` if dropped
    ``block_rows``              ``[cdiv(L,B)]`` kept rows of block ``b``; 0 past the used blocks
    ``scatter_idx``             ``[n, 1]``      ``i`` if route ``i`` is kept, else ``-1``
    ==========================  ==============  =============================================================

    Outputs that were not requested are None.  Iterating, indices and ``len`` see the first three, as vLLM's
    function returns them.
    A layout is immutable, a pytree node, and can be pickled and loaded by ``torch.load`` with ``weights_only=True``.
    For a batched layout a bin is a batch, ``E`` the number of batches and ``n = E * max_tokens_per_batch``.
    """

    sorted_token_ids: torch.Tensor
    expert_ids: torch.Tensor
    num_tokens_post_padded: torch.Tensor
    expert_counts: torch.Tensor | None = None
    expert_offsets: torch.Tensor | None = None
    group_ends: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    block_rows: torch.Tensor | None = None
    scatter_idx: torch.Tensor | None = None
    block_size: int = 0
    num_experts: int = 0
    num_routes: int = 0  # the sentinel in sorted_token_ids
    mapped: bool = False  # expert_ids are values of an expert_map, so weights may be of fewer experts

    def _required(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.sorted_token_ids, self.expert_ids, self.num_tokens_post_padded

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._required())

    def __len__(self) -> int:
        return 3

    @overload
    def __getitem__(self, index: SupportsIndex) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[torch.Tensor, ...]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return self._required()[index]

    def __repr__(self) -> str:
        sizes = f"block_size={self.block_size}, num_experts={self.num_experts}, num_routes={self.num_routes}"
        capacity = f"rows={self.sorted_token_ids.shape[0]}, blocks={self.expert_ids.shape[0]}"
        extras = "".join(f", {name}" for name in EXTRAS if getattr(self, name) is not None)
        return f"BlockLayout({sizes}, {capacity}, device={str(self.device)!r}{extras})"

    @property
    def device(self) -> torch.device:
        return self.sorted_token_ids.device

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> BlockLayout:
        values = ((name, getattr(self, name)) for name in OUTPUTS)
        tensors = {name: None if value is None else function(value) for name, value in values}
        rest = {name: getattr(self, name) for name in _FIELDS[len(OUTPUTS) :]}
        return BlockLayout(**tensors, **rest)  # type: ignore[arg-type]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> BlockLayout:
        """The same layout on `device`; tensors that are there already are shared."""
        return self._map(lambda tensor: tensor.to(device=device, non_blocking=non_blocking))

    def cpu(self) -> BlockLayout:
        """The same layout on the CPU."""
        return self.to("cpu")

    def clone(self) -> BlockLayout:
        """A copy that shares no memory."""
        return self._map(torch.clone)


class _Unfrozen:
    """A layout before it is frozen.  A frozen dataclass sets each field through ``object.__setattr__``, ten times as
    slowly; that would be a fifth of a short call."""

    __slots__ = tuple(BlockLayout.__dataclass_fields__)

    def __init__(
        self, rows: Any, blocks: Any, total: Any, counts: Any, offsets: Any, ends: Any, positions: Any, block_rows: Any,
        scatter_idx: Any, block_size: int, num_experts: int, num_routes: int, mapped: bool,
    ) -> None:  # fmt: skip
        self.sorted_token_ids, self.expert_ids, self.num_tokens_post_padded = rows, blocks, total
        self.expert_counts, self.expert_offsets, self.group_ends = counts, offsets, ends
        self.positions, self.block_rows, self.scatter_idx = positions, block_rows, scatter_idx
        self.block_size, self.num_experts, self.num_routes, self.mapped = block_size, num_experts, num_routes, mapped


def frozen(*values: Any) -> BlockLayout:
    """``BlockLayout(*values)`` with all of its values, but faster; not for compiled code."""
    layout: Any = _Unfrozen(*values)
    layout.__class__ = BlockLayout
    return layout  # type: ignore[no-any-return]


_FIELDS = (*OUTPUTS, "block_size", "num_experts", "num_routes", "mapped")


def _flatten(layout: BlockLayout) -> tuple[list[object], None]:
    return [getattr(layout, name) for name in _FIELDS], None


def _unflatten(values: object, context: None) -> BlockLayout:
    return BlockLayout(*values)  # type: ignore[misc]


# A pytree node, so that a layout passes through torch.compile and torch.export like a tuple of tensors.
_pytree.register_pytree_node(BlockLayout, _flatten, _unflatten, serialized_type_name="moealign.BlockLayout")  # type: ignore[arg-type]
torch.serialization.add_safe_globals([BlockLayout])


class Capacity(NamedTuple):
    """Elements of every output, by its name; all int32.  ``scatter_idx`` is ``[n, 1]``, the rest have one axis."""

    sorted_token_ids: int
    expert_ids: int
    num_tokens_post_padded: int
    expert_counts: int
    expert_offsets: int
    group_ends: int
    positions: int
    block_rows: int
    scatter_idx: int


def capacity(routes: int, *, block_size: int, num_experts: int, pad_sorted_ids: bool = False) -> Capacity:
    """Sizes of the outputs of :func:`moealign.align`, to allocate them ahead.

    ``L = n + E*(B-1)``, rounded up to a multiple of ``B`` with `pad_sorted_ids`, and at most ``n*B``, since each
    route opens at most one block.  (vLLM applies that bound only if ``n < E``; otherwise it is not the tighter one.)

    Depends on shapes and ints alone, which may be symbolic; reads no value on a device.
    """
    length = routes + num_experts * (block_size - 1)
    if pad_sorted_ids:
        length = (length + block_size - 1) // block_size * block_size
    bound = routes * block_size
    # sym_min keeps a symbolic size symbolic, where an `if` would compile once for each answer.
    symbolic = isinstance(length, torch.SymInt) or isinstance(bound, torch.SymInt)
    length = torch.sym_min(length, bound) if symbolic else min(length, bound)
    blocks = (length + block_size - 1) // block_size
    return Capacity(length, blocks, 1, num_experts, num_experts + 1, num_experts, routes, blocks, routes)


def capacity_batched(max_tokens_per_batch: int, *, block_size: int, num_batches: int) -> Capacity:
    """Sizes of the outputs of :func:`moealign.align_batched`: ``L = nb * cdiv(M, B) * B``.  There is no scatter_idx."""
    blocks = num_batches * ((max_tokens_per_batch + block_size - 1) // block_size)
    routes = num_batches * max_tokens_per_batch
    return Capacity(blocks * block_size, blocks, 1, num_batches, num_batches + 1, num_batches, routes, blocks, 0)
