"""From alignments in the order of calls to the layers and steps of a model.

A *step* is one run of the model over a batch: each MoE layer is called once, in order, with the same tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Assembly", "Call", "assemble"]


class Call(NamedTuple):
    """One alignment."""

    thread: int
    layer: str | None  #: the caller's name of the layer
    ids: Tensor  #: int16 or int32 [tokens, top_k] on the CPU, in [-1, num_experts)
    num_experts: int
    mapped: bool  #: called with an expert map
    copied: Any = None  #: CUDA event after which `ids` are valid


class Assembly(NamedTuple):
    """The complete steps of a recording."""

    topk_ids: Tensor | None  #: [layers, tokens, top_k], all steps concatenated; None without a complete step
    num_experts: int
    layers: tuple[str, ...]
    layers_from: str  #: "names", "MOEALIGN_TRACE_LAYERS", "period" or "unknown"
    tokens: tuple[int, ...]  #: of each step
    left_out: int  #: calls outside complete steps


#: Layer to its ids, in the order of calls; a layer that splits its tokens has several.
_Step = dict[str, list[Tensor]]


def assemble(calls: list[Call], layers: int | None = None) -> Assembly:
    """Group `calls` into steps, and the steps into ``[layers, tokens, top_k]``.

    Layers are identified by the first of these rules that applies:

    1. `layers` is given: every `layers` consecutive calls of a thread with the same number of tokens are a step.
    2. Every call has a layer name: a step ends where a name recurs.  Consecutive calls of one layer, in a model of
       several, are parts of one call.
    3. Runs of calls with the same number of tokens differ: their greatest common divisor is the number of layers.
       The last run of a thread may be incomplete and does not count.
    4. All calls are steps of a single layer.

    A step is complete if it has the layers that most tokens pass through, all with the same number of tokens.  Calls
    with another number of experts or choices than most are left out.
    """
    tokens_of: Counter[tuple[int, int]] = Counter()
    for call in calls:
        tokens_of[call.ids.shape[1], call.num_experts] += len(call.ids)
    if not tokens_of:
        return Assembly(None, 0, (), "unknown", (), 0)
    kind = tokens_of.most_common(1)[0][0]
    threads: dict[int, list[tuple[int, Call]]] = {}
    for number, call in enumerate(calls):
        if (call.ids.shape[1], call.num_experts) == kind:
            threads.setdefault(call.thread, []).append((number, call))

    if layers is not None:
        rule = "MOEALIGN_TRACE_LAYERS"
    elif all(call.layer is not None for each in threads.values() for _, call in each):
        rule = "names"
    else:
        layers = _period(threads.values())
        rule = "unknown" if layers is None else "period"
    numbered: list[tuple[int, _Step]] = []
    for each in threads.values():
        numbered += _by_name(each) if rule == "names" else _by_order(each, layers or 1)
    steps = [step for _, step in sorted(numbered, key=lambda each: each[0])]

    patterns: Counter[tuple[str, ...]] = Counter()
    for step in steps:
        patterns[_pattern(step)] += _tokens(next(iter(step.values())))
    if not patterns:
        return Assembly(None, kind[1], (), rule, (), len(calls))
    names = max(patterns, key=lambda pattern: (patterns[pattern] * len(pattern), len(pattern)))
    complete = [step for step in steps if set(names) <= set(_pattern(step))]
    topk_ids = torch.stack([torch.cat([part for step in complete for part in step[name]]) for name in names])
    used = sum(len(step[name]) for step in complete for name in names)
    counts = tuple(_tokens(step[names[0]]) for step in complete)
    return Assembly(topk_ids, kind[1], names, rule, counts, len(calls) - used)


def _tokens(parts: list[Tensor]) -> int:
    return sum(len(part) for part in parts)


def _pattern(step: _Step) -> tuple[str, ...]:
    """The layers with as many tokens as the first one; a draft model's layers may differ."""
    tokens = _tokens(next(iter(step.values())))
    return tuple(name for name, parts in step.items() if _tokens(parts) == tokens)


def _by_name(calls: list[tuple[int, Call]]) -> list[tuple[int, _Step]]:
    several = len({call.layer for _, call in calls}) > 1
    steps: list[tuple[int, _Step]] = []
    previous = None
    for number, call in calls:
        assert call.layer is not None
        part = several and call.layer == previous
        if not steps or (call.layer in steps[-1][1] and not part):
            steps.append((number, {}))
        steps[-1][1].setdefault(call.layer, []).append(call.ids)
        previous = call.layer
    return steps


def _by_order(calls: list[tuple[int, Call]], layers: int) -> list[tuple[int, _Step]]:
    steps: list[tuple[int, _Step]] = []
    for _, group in groupby(calls, key=lambda each: len(each[1].ids)):
        run = list(group)
        for start in range(0, len(run) - layers + 1, layers):
            step = run[start : start + layers]
            steps.append((step[0][0], {f"layer {i}": [call.ids] for i, (_, call) in enumerate(step)}))
    return steps


def _period(threads: Iterable[list[tuple[int, Call]]]) -> int | None:
    runs: list[int] = []
    for calls in threads:
        lengths = [len(list(group)) for _, group in groupby(calls, key=lambda each: len(each[1].ids))]
        runs += lengths[:-1]
    return math.gcd(*runs) if runs else None
