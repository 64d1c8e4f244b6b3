"""The dispatched mode of a fixed size: :class:`ExpertExchange`.

The host waits for nothing and knows every size ahead, so a call can be captured in a CUDA graph and compiled.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import modes
from ..alignment import align
from ..errors import InvalidInput, InvalidType
from ..experts import launch, operators
from ..experts.layer import fused_moe
from ..experts.quantized import data_of
from ..experts.records import ExpertWeights, Routes
from ..layout import INT32_MAX
from . import wire, wire_fp8, wire_tokens
from .collectives import Group, group_of, refuse_tracing
from .experts import ExpertPlacement, bins_of
from .transports import transport_of

__all__ = ["Arrived", "ExpertExchange", "Way"]


class Arrived(NamedTuple):
    """The rows that came to a rank: arguments of :func:`fused_moe`."""

    hidden_states: Tensor  #: ``[rows, H]``; undefined where all ids are -1
    topk_weights: Tensor  #: float32 ``[rows, 1]``, ones: the router's weights are applied at home; else ``[rows, k]``
    topk_ids: Tensor  #: int16 ``[rows, 1]`` or ``[rows, k]``: slots here; -1 for other ranks, and where nothing came


class Way(NamedTuple):
    """The way back of a rank's routes, or of the first route of each token to each rank."""

    routes: Tensor  #: int32 ``[rows]``, the route in each row of the buffer, ``T * k`` where there is none
    places: Tensor  #: int32 ``[T * k]``, the row of each route in the buffer, -1 for one without
    wanted: Tensor  #: int32 ``[ranks]``, rows for each rank, more than its capacity if some were dropped


class ExpertExchange:
    """A prepared exchange of routes between ranks, with `capacity` rows for each pair of ranks.

    ``exchange(...)`` is :func:`dispatched_moe` without its wait: one collective takes rows and slots there, one brings
    results back, and both always have the same size.  Up to `capacity` routes of a rank go to each rank; further ones
    are dropped, in the order of the routes, and reported in an `error_word`.  :meth:`max_capacity` never drops any.

    Args:
        placement: for as many ranks as `group` has.
        capacity: rows from one rank to another; the same on every rank.
        group: a process group or a one-dimensional DeviceMesh; by default all ranks.
        device: of the tensors; by default the current GPU under NCCL, else the CPU.
        wire: how rows travel to the experts.  ``same``: as they are.  ``fp8``: in e4m3 with a scale for each 128
            columns, rounded as FP8 layers round them, in about half the bytes of bfloat16; without gradients.  Results
            travel back as they are.
        rows: what a row is.  ``route``: one choice of a token, whose weight is applied at home.  ``token``: a token,
            once for each rank with any of its experts, together with its weights and slots there; that rank sums its
            experts, and home the ranks.  Fewer rows, of the same `k` and dtype on every rank; without gradients.
        transport: how they travel.  ``collective``: by all-to-all of the group, always `capacity` rows.  ``direct``:
            each rank writes its rows into the memory of their experts' rank and reads the results there, only rows that
            are there; for GPUs that reach each other's memory, and CPU processes of one machine; without gradients,
            and one batch at a time.

    Raises:
        InvalidInput: no process group, a placement of another number of ranks, a capacity below 1, more rows than int32
            numbers, more than 32,767 experts a rank, or another `wire`, `rows` or `transport`.
    """

    def __init__(
        self,
        placement: ExpertPlacement,
        *,
        capacity: int,
        group: Group = None,
        device: torch.device | str | None = None,
        wire: str = "same",
        rows: str = "route",
        transport: str = "collective",
    ) -> None:
        if wire not in ("same", "fp8"):
            raise InvalidInput(f"wire: expected same or fp8, got {wire!r}")
        self._by_token = _by_token(rows)
        group, self.rank = group_of(placement, group)
        if type(capacity) is not int or capacity < 1:
            raise InvalidInput(
                f"capacity: expected an int of at least 1, got {capacity!r}; ExpertExchange.max_capacity(placement, "
                "max_tokens, top_k) is never exceeded"
            )
        if placement.slots > 2**15 - 1:
            raise InvalidInput(f"placement: expected at most 32767 experts a rank, got {placement.slots}")
        if 2 * placement.ranks * capacity > INT32_MAX:
            raise InvalidInput(
                f"capacity: expected at most {INT32_MAX // (2 * placement.ranks)} rows for each of {placement.ranks} "
                f"ranks, got {capacity}"
            )
        if device is None:
            nccl = "nccl" in dist.get_backend(group)
            device = torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"
        self.placement, self.capacity, self.ranks, self.slots = placement, capacity, placement.ranks, placement.slots
        self.wire, self.rows, self.transport = wire, rows, transport
        self._passed: set[Any] = set()  # signatures of calls that need no more checks
        self.group = (group or dist.distributed_c10d._get_default_group()).group_name
        self.device = torch.device(device)
        # Of each id, its rank and its slot there; ids are experts or, with copies, the bins of placement.bins.
        bins = torch.arange(placement.ranks * placement.slots)
        if not placement.replicated:
            bins = placement.bins(torch.arange(placement.num_experts).unsqueeze(1)).flatten()
        self._copies = placement.copies(device) if placement.replicated else None
        self._rank_of = (bins // placement.slots).to(torch.int32).to(self.device)
        self._slot_of = torch.where(bins < 0, -1, bins % placement.slots).to(torch.int16).to(self.device)
        # One for each row: a header has at most `capacity` rows.
        self._ones = torch.ones(1 if self._by_token else 2 * self.ranks * capacity, 1, device=self.device)
        self.device = self._ones.device  # with its index
        self._transport = transport_of(transport, group, self.rank, self.ranks, self.device)

    @classmethod
    def of(
        cls, placement: ExpertPlacement, capacity: int, group: Group = None, device: torch.device | None = None
    ) -> ExpertExchange:
        """The exchange of these arguments, which `placement` keeps for the next call."""
        members, _ = group_of(placement, group)
        name = None if members is None else members.group_name
        return placement.kept(
            ("exchange", capacity, name, str(device)),
            lambda: cls(placement, capacity=capacity, group=members, device=device),
        )

    @staticmethod
    def max_capacity(placement: ExpertPlacement, max_tokens: int, top_k: int, *, rows: str = "route") -> int:
        """Rows that `max_tokens` tokens of a rank can send to another: ``max_tokens * min(top_k, slots)`` routes, or
        `max_tokens` tokens.

        It is never exceeded; by routes as long as the ids of a token differ, as those of a router do.
        """
        return max(max_tokens * (1 if _by_token(rows) else min(top_k, placement.slots)), 1)

    @staticmethod
    def expected_capacity(
        placement: ExpertPlacement,
        max_tokens: int,
        top_k: int,
        *,
        factor: float = 1.25,
        loads: Any = None,
        rows: str = "route",
    ) -> int:
        """Rows that `max_tokens` tokens of a rank send to the busiest other, times `factor`; never above
        :meth:`max_capacity`.

        With the busiest rank's share `p` of all routes, these are ``max_tokens * top_k * p`` routes, or
        ``max_tokens * (1 - (1 - p) ** top_k)`` tokens, as if each choice were drawn by itself.

        Args:
            factor: room for batches that are less even; rows past it are dropped, which an error word reports.
            loads: routes per expert, ``[num_experts]``, of a trace or ``expert_counts``; by default equal ones.
            rows: of the exchange.

        Raises:
            InvalidInput: a factor that is not positive, or other `rows`.
        """
        if not factor > 0:
            raise InvalidInput(f"factor: expected a positive number, got {factor!r}")
        imbalance = placement.imbalance([1.0] * placement.num_experts if loads is None else loads)
        expected = factor * imbalance * max_tokens * top_k / placement.ranks
        if _by_token(rows):
            expected = factor * max_tokens * (1 - (1 - imbalance / placement.ranks) ** top_k)
        most = ExpertExchange.max_capacity(placement, max_tokens, top_k, rows=rows)
        return min(max(math.ceil(expected), 1), most)

    def wire_bytes(self, hidden: int, dtype: torch.dtype, back: bool = False, *, top_k: int | None = None) -> int:
        """Bytes that a rank passes to the first collective of a call, or to the one `back`: rows and their slots.

        With rows of tokens, `top_k` weights and slots travel there with each.

        Raises:
            InvalidInput: no `top_k` where it is needed.
        """
        if self._by_token:
            if back:
                return self.ranks * self.capacity * hidden * dtype.itemsize
            if top_k is None:
                raise InvalidInput(
                    "top_k: expected the number of choices, whose weights and slots travel with a token, got None"
                )
            return self.ranks * self.capacity * wire_tokens.format_of(hidden, dtype, top_k, self.wire == "fp8").pitch
        pitch = wire_fp8.pitch_of(hidden) if self.wire == "fp8" and not back else hidden * dtype.itemsize
        return self.ranks * (self.capacity + self._header(hidden, dtype)) * pitch

    def __call__(
        self,
        hidden_states: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        num_valid_tokens: Tensor | None = None,
        error_word: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """:func:`fused_moe` if every rank has its own tokens.

        Args:
            hidden_states, topk_weights, topk_ids: this rank's tokens, ``[T, H]``, ``[T, k]``, ``[T, k]`` with global
                ids; ``T`` may differ from rank to rank, and be 0.
            gate_up_proj, down_proj: this rank's experts, ``[slots, ...]``.
            num_valid_tokens: int32, one element, on the device; later tokens send nothing and give zeros.
            error_word: as of :func:`align`; a bit says that rows were dropped for want of capacity.
            options: further arguments of :func:`fused_moe`, except `out` and those about ids.

        Returns:
            ``[T, H]``.  Differentiable with ``wire="same"`` and ``rows="route"``; the same tensors must require
            gradients on every rank.

        Raises:
            InvalidInput, InvalidType: sizes, dtypes or devices that do not match.
            RankFailed: a collective failed or timed out, where the host sees it; see docs/parallel.md.
        """
        signature = None if options else _signature(hidden_states, topk_ids, gate_up_proj, down_proj, topk_weights)
        known = signature is not None and signature in self._passed
        if not known:
            sizes = (hidden_states, topk_ids, gate_up_proj, topk_weights, down_proj)
            refusal = modes.checked(self._check, *sizes, options)
            if isinstance(refusal, modes.Refusal):
                return modes.refuse(refusal)[0]
        self._transport.begin(alone=False)
        call = (hidden_states, topk_ids, topk_weights, num_valid_tokens, error_word)
        (rows, factors, slots), way = self._dispatch(*call)
        out = self._transport.results(rows)
        # A rank receives about what it sends, or what a capacity that is never exceeded has room for.
        expected = max(topk_ids.numel(), self.capacity * (topk_ids.shape[1] if self._by_token else 1))
        if known:  # what fused_moe comes to for these tensors
            layer = (rows, ExpertWeights(gate_up_proj, down_proj), Routes(factors, slots))
            result = operators.run_layer(*layer, "silu", None, None, False, out, expected)
        else:
            options = {"expected_routes": expected, **options}
            result = fused_moe(rows, gate_up_proj, down_proj, factors, slots, out=out, **options)
            if signature is not None:
                self._passed.add(signature)
        return self._combine(result, topk_weights, way)

    def dispatch(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        *,
        topk_weights: Tensor | None = None,
        num_valid_tokens: Tensor | None = None,
        error_word: Tensor | None = None,
    ) -> tuple[Arrived, Way]:
        """Send rows to the ranks of their experts: the first half of a call, with its arguments.

        Args:
            topk_weights: for rows of tokens, with which they travel.

        Returns:
            What came to this rank, and the way back for :meth:`combine`.  ``align(arrived.topk_ids, ...)`` or
            :func:`fused_moe` takes what came.

        Raises:
            InvalidInput, InvalidType, RankFailed: as the whole call.
        """
        refusal = modes.checked(self._check_dispatch, hidden_states, topk_ids, topk_weights)
        if isinstance(refusal, modes.Refusal):
            results = modes.refuse(refusal, 6)
            return Arrived(*results[:3]), Way(*results[3:])
        self._transport.begin(alone=True)
        return self._dispatch(hidden_states, topk_ids, topk_weights, num_valid_tokens, error_word)

    def combine(self, rows: Tensor, topk_weights: Tensor, way: Way) -> Tensor:
        """Bring results back and sum them: the second half of a call.

        Args:
            rows: ``[rows, H]``, the result of each row that came.
            topk_weights: ``[T, k]`` of this rank's tokens; of rows of tokens, which have them, only the shape counts.
            way: of :meth:`dispatch`.

        Returns:
            ``[T, H]``, ``sum_j topk_weights[t, j] * result(t, j)`` over ``j`` in order, or the sum of each token's rows
            in the order of their first ``j``; a dropped row adds zero.

        Raises:
            InvalidInput, InvalidType, RankFailed: as the whole call.
        """
        refusal = modes.checked(self._check_back, rows, topk_weights, way)
        if isinstance(refusal, modes.Refusal):
            return modes.refuse(refusal)[0]
        self._transport.end()
        return self._combine(rows, topk_weights, way)

    def overflow(self, way: Way) -> Tensor:
        """int32 ``[ranks]``: the rows for each rank that were dropped because its capacity was full."""
        return (way.wanted - self.capacity).clamp(min=0)

    # ---- after the checks --------------------------------------------------------------------------------------------

    def _dispatch(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor | None,
        num_valid_tokens: Tensor | None,
        error_word: Tensor | None,
    ) -> tuple[Arrived, Way]:
        ids = topk_ids
        if self._copies is not None:
            bins = bins_of(ids, self._copies)
            ids = torch.where((bins < 0) & (ids != -1), -2, bins)  # of what is no id the layout reports an error
        layout = align(
            wire_tokens.first_of_ranks(ids, self._rank_of) if self._by_token else ids,
            block_size=1,
            num_experts=self.ranks if self._by_token else self._rank_of.shape[0],
            expert_map=None if self._by_token else self._rank_of,
            ignore_invalid_experts=True,
            num_valid_tokens=num_valid_tokens,
            expert_counts=True,
            expert_offsets=True,
            positions=True,
            error_word=error_word,
        )
        order, positions, offsets = layout.sorted_token_ids, layout.positions, layout.expert_offsets
        assert positions is not None
        assert offsets is not None
        assert layout.expert_counts is not None
        wanted = layout.expert_counts[: self.ranks]
        hidden, dtype, fp8 = hidden_states.shape[1], hidden_states.dtype, self.wire == "fp8"
        by_rank = (order, positions, offsets[: self.ranks + 1])
        if self._by_token:
            assert topk_weights is not None
            all_of = (topk_weights, ids, self._rank_of, self._slot_of, *by_rank, self.capacity, fp8)
            came, routes, places = self._transport.send(wire_tokens, hidden_states, all_of, error_word)
            arrived = wire_tokens.unpack(came, hidden, dtype, ids.shape[1], fp8)
            return Arrived(*arrived), Way(routes, places, wanted)
        sizes = (ids.shape[1], self.capacity, self._header(hidden, dtype))
        module, call = wire_fp8 if fp8 else wire, (ids, self._slot_of, *by_rank, *sizes)
        rows, routes, places = self._transport.send(module, hidden_states, call, error_word)
        if fp8:
            rows, slots = wire_fp8.unpack(rows, self.ranks, self.capacity, hidden, dtype)
        else:
            slots = wire.slots_of(rows, self.ranks, self.capacity)
        return Arrived(rows, self._ones[: rows.shape[0]], slots), Way(routes, places, wanted)

    def _combine(self, rows: Tensor, topk_weights: Tensor, way: Way) -> Tensor:
        weights = self._ones.expand(topk_weights.shape) if self._by_token else topk_weights
        return self._transport.combine(rows, weights, way.routes, way.places)

    # ---- checks ------------------------------------------------------------------------------------------------------

    def _header(self, hidden: int, dtype: torch.dtype) -> int:
        words = wire_fp8.pitch_of(hidden) // 2 if self.wire == "fp8" else wire.words_of(hidden, dtype.itemsize)
        return wire.header_rows(self.capacity, words)

    def _check_dispatch(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor | None) -> None:
        if self._by_token and topk_weights is None:
            raise InvalidInput("topk_weights: expected those of the tokens, with whose rows they travel, got None")
        if not self._by_token and topk_weights is not None:
            raise InvalidInput("topk_weights: expected None where rows are routes, got a tensor; combine takes it")
        self._check(hidden_states, topk_ids, None, topk_weights)

    def _check(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        gate_up_proj: Any = None,
        topk_weights: Tensor | None = None,
        down_proj: Any = None,
        options: Any = None,
    ) -> None:
        refuse_tracing("ExpertExchange", hidden_states, topk_ids)
        if not hidden_states.is_floating_point() or hidden_states.dtype.itemsize < 2:
            raise InvalidType(
                f"hidden_states: expected a floating dtype of two bytes or more, got {hidden_states.dtype}"
            )
        if hidden_states.dim() != 2 or wire.words_of(hidden_states.shape[1], hidden_states.dtype.itemsize) < 2:
            raise InvalidInput(
                f"hidden_states: expected [T, H] with rows of at least 4 bytes, got {list(hidden_states.shape)} of "
                f"{hidden_states.dtype}"
            )
        if topk_ids.dim() != 2 or topk_ids.shape[0] != hidden_states.shape[0] or not topk_ids.shape[1]:
            raise InvalidInput(
                f"topk_ids: expected [{hidden_states.shape[0]}, k] with at least one choice a token, got "
                f"{list(topk_ids.shape)}"
            )
        named = (("hidden_states", hidden_states), ("topk_ids", topk_ids), ("topk_weights", topk_weights))
        for name, tensor in named:
            if tensor is not None and tensor.device != self.device:
                raise InvalidInput(f"{name}: expected a tensor on {self.device}, got one on {tensor.device}")
        for name in ("out", "expert_map"):
            if options and options.get(name) is not None:
                raise InvalidInput(
                    f"{name}: expected None in an exchange, whose rows are not those of the call, got one"
                )
        experts = self.slots if gate_up_proj is None else data_of(gate_up_proj).shape[0]
        if experts != self.slots:
            raise InvalidInput(
                f"gate_up_proj: expected this rank's {self.slots} experts, got {experts}; "
                "placement.shard(weights, rank) cuts them"
            )
        if topk_weights is not None and (topk_weights.shape != topk_ids.shape or not topk_weights.is_floating_point()):
            raise InvalidInput(
                f"topk_weights: expected a floating {list(topk_ids.shape)} like topk_ids, got {topk_weights.dtype} "
                f"{list(topk_weights.shape)}"
            )
        given = (hidden_states, data_of(gate_up_proj), data_of(down_proj), topk_weights, *(options or {}).values())
        ways = (("wire", "same", self.wire), ("rows", "route", self.rows), ("transport", "collective", self.transport))
        for name, other, got in ways:
            if got != other and modes.wants_gradient(*given):
                raise InvalidInput(
                    f"{name}: expected {other} where gradients are needed, got {got}, which has none; call it under "
                    "torch.no_grad() or prepare another exchange"
                )

    def _check_back(self, rows: Tensor, topk_weights: Tensor, way: Way) -> None:
        refuse_tracing("ExpertExchange", rows, topk_weights)
        count = way.routes.shape[0]
        if rows.dim() != 2 or rows.shape[0] != count or not rows.is_floating_point():
            raise InvalidInput(
                f"rows: expected a floating [{count}, H], the results of what came, got {rows.dtype} {list(rows.shape)}"
            )
        routes, floating = way.places.shape[0], topk_weights.is_floating_point()
        if topk_weights.dim() != 2 or topk_weights.numel() != routes or not floating:
            raise InvalidInput(
                f"topk_weights: expected a floating [T, k] of {routes} routes, got {topk_weights.dtype} "
                f"{list(topk_weights.shape)}"
            )


def _by_token(rows: str) -> bool:
    """Whether `rows` of an exchange are tokens."""
    if rows not in ("route", "token"):
        raise InvalidInput(f"rows: expected route or token, got {rows!r}")
    return rows == "token"


def _signature(*tensors: Any) -> Any:
    """What the checks of a call and the way of its layer depend on, if it is a common one: plain tensors on a GPU,
    nothing that follows it, no gradients, no autocast; else None."""
    if modes.watched(*tensors) or modes.forward_mode() or modes.wants_gradient(*tensors):
        return None
    if not all(isinstance(each, Tensor) for each in tensors) or launch.refuses(tensors[0]) is not None:
        return None
    if torch.is_autocast_enabled(tensors[0].device.type):
        return None
    return tuple((each.shape, each.stride(), each.dtype, each.device) for each in tensors)
