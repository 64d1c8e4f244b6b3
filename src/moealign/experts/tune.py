"""Find good tiles for a layer of experts on the device at hand, and write them where :func:`moealign.fused_moe` looks.

The search is short and greedy: the rules' plans for fewer and for more rows an expert, then variations of the better
ones' first product, then of the second.  Each is compared with the other path's result before its time counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..alignment import align
from ..errors import BackendUnavailable
from ..timing import graph_us
from . import launch as kernels
from .launch import Plan, Tile
from .layer import fused_moe

__all__ = ["Found", "Shape", "bases", "search", "tune", "variations", "write"]

MOST_WRONG = 2e-2  # relative error to the other path, both in the layer's dtype
SLOTS = 4  # inputs that the calls of a graph take in turn, so that no weights wait in L2


class Shape(NamedTuple):
    """A layer of experts."""

    experts: int
    top_k: int
    hidden: int
    inner: int  # columns of down_proj; gate_up_proj has twice as many rows
    dtype: torch.dtype = torch.bfloat16

    @property
    def key(self) -> str:
        return kernels.tuning_key(*self)


class Found(NamedTuple):
    """What came of one number of tokens."""

    tokens: int
    plan: Plan
    microseconds: float
    by_rule: float  # microseconds of the rule's plan
    tried: int


def bases(target: kernels.Target, shape: Shape, tokens: int) -> list[Plan]:
    """The rule's plan for this many tokens first, then those for fewer and for more."""
    item = torch.empty((), dtype=shape.dtype).element_size()
    sizes = (shape.experts, shape.hidden, shape.inner, item)
    routes = tokens * shape.top_k
    plans = [kernels._rule(target, routes, shape.top_k, *sizes)]
    for factor in (0.25, 0.5, 2.0, 4.0):
        other = max(int(routes * factor), 3 * shape.top_k)  # three tokens: never each route a tile
        plans.append(kernels._rule(target, other, shape.top_k, *sizes))
    return list(dict.fromkeys(plans))


def variations(tile: Tile) -> list[Tile]:
    """Tiles one step away, the number of rows staying."""
    found = [tile._replace(n=n) for n in (tile.n // 2, tile.n * 2) if 16 <= n <= 256]
    found += [tile._replace(k=k) for k in (tile.k // 2, tile.k * 2) if 32 <= k <= 256]
    found += [tile._replace(stages=stages) for stages in (tile.stages - 1, tile.stages + 1) if 2 <= stages <= 6]
    found.append(tile._replace(ctas=0) if tile.ctas else tile._replace(ctas=1, short=0))
    found.append(tile._replace(group=2 if tile.group > 2 else 8))
    if tile.m == 128:
        found.append(tile._replace(short=0 if tile.short else 64))
    return found


def search(first: Sequence[Plan], measure: Callable[[Plan], float]) -> tuple[Plan, float, float, int]:
    """(best plan, its time, time of the first plan, plans measured); a plan that cannot run measures as infinite."""
    times: dict[Plan, float] = {}

    def best() -> list[Plan]:
        return sorted(times, key=lambda one: times[one])

    def measured(plans: Sequence[Plan]) -> None:
        for plan in plans:
            if plan not in times:
                times[plan] = measure(plan)

    measured(first)
    for plan in best()[:2]:
        measured([plan._replace(first=tile) for tile in variations(plan.first)])
    measured([best()[0]._replace(second=tile) for tile in variations(best()[0].second)])
    plan = best()[0]
    return plan, times[plan], times[first[0]], len(times)


def tune(shape: Shape, tokens: Sequence[int], device: torch.device, seed: int = 0) -> Iterator[Found]:
    """Search for each number of tokens in turn, on random weights of the layer's real size.

    Raises:
        BackendUnavailable: the kernels do not run on `device`.
    """
    experts, top_k, hidden, inner, dtype = shape
    probe = torch.empty(0, dtype=dtype, device=device)
    reason = kernels.refuses(probe) or (None if device.type == "cuda" else "times are taken on a GPU")
    if reason is not None:
        raise BackendUnavailable(f"tune: expected a device that the kernels run on, got {device}: {reason}")
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        scale: float = size[-1] ** -0.5
        return torch.randn(size, generator=generator, device=device, dtype=dtype) * scale

    gate_up, down = randn(experts, 2 * inner, hidden), randn(experts, hidden, inner)
    for count in tokens:
        inputs = []
        for _ in range(SLOTS if count <= 512 else 1):
            scores = torch.rand(count, experts, generator=generator, device=device)
            values, ids = scores.topk(top_k, 1)
            inputs.append((randn(count, hidden) * hidden**0.5, values.softmax(1), ids.to(torch.int32)))
        x, weights, ids = inputs[0]
        want = fused_moe(x, gate_up, down, weights, ids, backend="packed").float()

        def call(
            plan: Plan, slot: int, inputs: list[tuple[Tensor, Tensor, Tensor]] = inputs, gate_up: Tensor = gate_up
        ) -> Tensor:
            x, weights, ids = inputs[slot]
            layout = None
            if plan.block_size:
                layout = align(ids, block_size=plan.block_size, num_experts=experts, positions=True)
            return kernels.fused_moe(plan, x, gate_up, down, weights, ids, layout, "silu", None, None, False)

        def measure(plan: Plan, call: Any = call, want: Tensor = want, slots: int = len(inputs)) -> float:
            try:
                wrong = float((call(plan, 0).float() - want).norm() / want.norm())
                if not wrong < MOST_WRONG:
                    return float("inf")
                calls = [lambda slot=slot: call(plan, slot) for slot in range(slots)]  # type: ignore[misc]
                return graph_us(calls, warm_up=slots, min_replays=5, max_replays=50, budget_us=5_000.0)
            except Exception:  # whatever a compiler or a launch refuses is no candidate
                torch.cuda.synchronize(device)
                return float("inf")

        plan, micros, by_rule, tried = search(bases(kernels.target_of(device), shape, count), measure)
        yield Found(count, plan, micros, by_rule, tried)


def write(path: Path, shape: Shape, found: Sequence[Found], about: dict[str, str]) -> None:
    """Add the plans to the file at `path`, keeping what it holds of other layers and of other numbers of tokens."""
    held: dict[str, Any] = {}
    if path.exists():
        held = json.loads(path.read_text())
    plans = held.setdefault("plans", {}).setdefault(shape.key, {})
    for one in found:
        plans[str(one.tokens)] = {**kernels.plan_to(one.plan), "microseconds": round(one.microseconds, 1)}
    held["about"] = about
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n")
    kernels.tuned.cache_clear()
