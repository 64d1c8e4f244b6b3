"""Candidates: implementations to time in one case, and how their outputs are verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..alignment import align, align_batched, moe_align_block_size
from ..testing import argsort_align, poisoned
from .cases import Case
from .names import ARGSORT

POISON = -7
REQUIRED = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")


@dataclass
class Candidate:
    """One implementation in one case.

    `call` enqueues the work of a slot.  `check` describes the first wrong output of a slot, or returns None.
    """

    impl: str
    call: Callable[[int], Any]
    check: Callable[[int], str | None] | None = None
    buffers: Sequence[Sequence[torch.Tensor]] = ()  # outputs of each slot, if the caller owns them

    def poison(self, slot: int) -> None:
        if self.buffers:
            for tensor in self.buffers[slot]:
                tensor.fill_(POISON)


def moealign_candidate(backend: str, case: Case, drop_in: bool = False) -> Candidate:
    """align or align_batched into preallocated buffers, or with `drop_in` vLLM's signature, which allocates."""
    _, top_k, experts, block_size = case.size
    impl = f"moealign-{backend}"
    if drop_in:
        results: dict[int, tuple[torch.Tensor, ...]] = {}

        def call(slot: int) -> None:
            results[0] = moe_align_block_size(case.inputs[slot], block_size, experts, backend=backend)

        return Candidate(impl, call, lambda slot: exact_difference(by_name(results[0]), case.expected(slot)))

    extras: dict[str, Any] = dict.fromkeys(case.extras, True)
    outs = [poisoned(case.capacity, case.extras, case.device, POISON) for _ in case.inputs]
    outputs = [{name: getattr(out, name) for name in (*REQUIRED, *case.extras)} for out in outs]
    if case.batched:

        def call(slot: int) -> None:
            align_batched(
                case.inputs[slot],
                max_tokens_per_batch=top_k,
                block_size=block_size,
                out=outs[slot],
                backend=backend,
                **extras,
            )
    else:

        def call(slot: int) -> None:
            align(
                case.inputs[slot],
                block_size=block_size,
                num_experts=experts,
                expert_map=case.expert_map,
                ignore_invalid_experts=case.ignore,
                out=outs[slot],
                backend=backend,
                **extras,
            )

    return Candidate(
        impl,
        call,
        lambda slot: exact_difference(outputs[slot], case.expected(slot)),
        [list(tensors.values()) for tensors in outputs],
    )


def argsort_candidate(case: Case) -> Candidate:
    _, _, experts, block_size = case.size
    results: dict[int, tuple[torch.Tensor, ...]] = {}

    def call(slot: int) -> None:
        results[slot] = argsort_align(case.inputs[slot], block_size, experts)

    return Candidate(ARGSORT, call, lambda slot: exact_difference(by_name(results[slot]), case.expected(slot)))


# ---- verifying ---------------------------------------------------------------------------------------------------


def by_name(results: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(REQUIRED, results, strict=True))


def exact_difference(outputs: dict[str, torch.Tensor], expected: dict[str, np.ndarray]) -> str | None:
    """The first element of `outputs` that differs, None if all are equal."""
    for name, tensor in outputs.items():
        values = tensor.detach().cpu().numpy().reshape(-1)
        if values.shape != expected[name].shape:
            return f"{name}: expected {expected[name].shape[0]} elements, got {values.shape[0]}"
        wrong = np.flatnonzero(values != expected[name])
        if len(wrong):
            at = wrong[0]
            return f"{name}[{at}]: expected {expected[name][at]}, got {values[at]} ({len(wrong)} elements differ)"
    return None


def bins_difference(
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    total: torch.Tensor,
    expected: dict[str, np.ndarray],
    block_size: int,
) -> str | None:
    """Like exact_difference, for what peers promise: each used block holds routes of its expert, in any order.

    A peer may fill blocks of expert -1, tails and the order within a bin as it likes.
    """
    bins = expected["bins"]
    n, rows = len(bins), int(total.cpu()[0])
    if rows % block_size or not 0 <= rows <= sorted_ids.numel() + block_size:
        return f"total: expected a multiple of {block_size} within the buffer, got {rows}"
    routes = sorted_ids.cpu().numpy()[:rows]
    experts = np.repeat(expert_ids.cpu().numpy()[: rows // block_size], block_size)[: len(routes)]
    listed = (routes >= 0) & (routes < n) & (experts >= 0)
    routes, experts = routes[listed], experts[listed]
    if np.bincount(routes, minlength=1).max() > 1 or len(routes) != int((bins >= 0).sum()):
        return f"expected {int((bins >= 0).sum())} routes once each, got {len(routes)}"
    wrong = np.flatnonzero(bins[routes] != experts)
    if len(wrong):
        at = wrong[0]
        return f"route {routes[at]}: expected expert {bins[routes[at]]}, got {experts[at]} ({len(wrong)} routes differ)"
    return None
