"""What a study comes to, in words and as JSON: for the page, the pictures and the terminal alike."""

from __future__ import annotations

import dataclasses
from typing import Any

from .. import costs
from ..trace import Trace
from .analysis import Study

__all__ = ["advice_text", "as_json", "basis_text", "batches_text", "cards", "context_lines", "gaps_text", "lines"]

_WHERE = (
    "Where to set block sizes: vLLM and SGLang read the files that --engine-config DIR writes; fused_moe chooses its "
    "own, and moealign tune finds out whether another one is faster."
)


def advice_text(each: costs.BatchCost) -> str:
    """One line: the block size for a kind of batch."""
    return f"{each.kind}, {_tokens(each.tokens)} per batch: blocks of {each.block_size} rows, {each.wasted:.1%} padding"


def alignment_text(each: costs.BatchCost, layers: int) -> str:
    """One line: what alignment costs in a layer and in a step of the model."""
    how = "measured" if each.measured else "modelled"
    return (
        f"{each.kind}, {_tokens(each.tokens)} per batch: alignment takes {each.alignment:.1f} of {each.layer:,.1f} us "
        f"of a layer ({each.share:.1%}), {each.alignment * layers:,.0f} us in {_plural(layers, 'layer')}; {how}"
    )


def basis_text(study: Study) -> str:
    """What the costs are of: the sizes of an expert, the device, and whether times are measured."""
    source = {
        "from the trace": "",
        "as given": " (as given)",
        "assumed": " (assumed: the trace has no sizes; name them by --hidden and --intermediate)",
    }[study.experts_source]
    how = "measured" if any(each.measured for each in study.advice) else "modelled"
    ran = f"; the trace was recorded on {study.trace.device}" if study.trace.device else ""
    return (
        f"Costs are {how} for experts of hidden size {study.experts.hidden:,} and intermediate size "
        f"{study.experts.intermediate:,}{source}, {study.experts.bytes} bytes per weight, on {study.machine.name}{ran}."
    )


def batches_text(study: Study) -> str:
    """What stands for a batch."""
    calls = study.trace.calls
    if calls:
        count = _plural(len(calls), "call")
        return f"Batches are the {count} of the model in the trace, of {min(calls):,} to {max(calls):,} tokens."
    return "The trace does not say where batches begin, so runs of neighbouring tokens stand for them."


def gaps_text(trace: Trace) -> str:
    """What the recorder of `trace` left out or cannot see, by the metadata; "" if that says nothing."""
    left_out, note = trace.details.get("calls_left_out"), trace.details.get("note")
    parts = []
    if left_out and isinstance(left_out, dict):
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        parts.append(f"Alignments that the trace lacks: {reasons}.")
    if isinstance(note, str):
        parts.append(note)
    return " ".join(parts)


def context_lines(study: Study) -> list[str]:
    """What the figures rest on: costs, batches, and gaps of the trace."""
    return [*filter(None, (basis_text(study), batches_text(study), gaps_text(study.trace)))]


def cards(study: Study) -> list[tuple[str, str]]:
    """The main results: a figure and what it is."""
    if not study.advice:
        return [("0 routes", "in this trace, so there is nothing to recommend")]
    found = []
    for each in study.advice:
        found.append(
            (
                f"{each.block_size} rows",
                f"a block for {each.kind} ({_tokens(each.tokens)} per batch); {100 * each.wasted:.1f} % is padding",
            )
        )
    for each in study.advice:
        how = "measured" if each.measured else "modelled"
        found.append(
            (
                f"{100 * each.share:.1f} %",
                f"of a layer's time is alignment in {each.kind}: {each.alignment:.1f} of {each.layer:,.1f} us, {how}",
            )
        )
    batch = f"a batch of {study.window:,} tokens" if study.window else "a call"
    found.append((f"{study.imbalance.mean():.2f}x", f"the mean load is on the busiest expert of {batch}"))
    if study.gains:
        gain = max(study.gains, key=lambda gain: gain.linear / gain.balanced)
        saved = 100 * (1 - gain.balanced / gain.linear)
        found.append((f"{saved:.0f} %", f"less load on the busiest of {gain.ranks} ranks with a balanced placement"))
    layers, experts = study.loads.shape
    idle = int((study.loads == 0).sum())
    found.append((f"{idle:,}", f"of {layers * experts:,} experts ({layers} layers x {experts}) are idle"))
    return found


def lines(study: Study) -> list[str]:
    """The report for a terminal."""
    trace = study.trace
    if not study.advice:
        return [*filter(None, ("The trace has no routes, so there is nothing to recommend.", gaps_text(trace)))]
    found = ["Block size:", *(f"  {advice_text(each)}" for each in study.advice)]
    found += ["Alignment:", *(f"  {alignment_text(each, trace.layers)}" for each in study.advice)]
    if study.gains:
        gain = max(study.gains, key=lambda gain: gain.linear / gain.balanced)
        found.append(
            f"Placement: on {gain.ranks} ranks the busiest has {gain.linear:.2f}x the mean load when placed linearly, "
            f"{gain.balanced:.2f}x when balanced"
        )
    found += context_lines(study)
    if study.not_measured:
        found.append(f"Not measured: {study.not_measured}.")
    return [*found, _WHERE]


def as_json(study: Study) -> dict[str, Any]:
    """All numbers of the report, as JSON values; times are in microseconds."""
    trace = study.trace
    sizes = [
        {
            "block_size": size,
            "blocks": costs.padding(study.batches, size).blocks,
            "padding": costs.padding(study.batches, size).wasted,
            "cost": dataclasses.asdict(cost) | {"total": cost.total},
            "measured": study.measured[i] if study.measured else None,
        }
        for i, (size, cost) in enumerate(zip(study.sizes, study.by_size, strict=True))
    ]
    return {
        "trace": {
            "model": trace.model,
            "source": trace.source,
            "revision": trace.revision,
            "layers": trace.layers,
            "tokens": trace.tokens,
            "top_k": trace.top_k,
            "experts": trace.num_experts,
            "calls": len(trace.calls),
            "device": trace.device or None,
        },
        "sizes": dataclasses.asdict(study.experts) | {"source": study.experts_source},
        "machine": dataclasses.asdict(study.machine),
        "not_measured": study.not_measured or None,
        "batches": [
            dataclasses.asdict(each) | {"share": each.share, "alignment_step": each.alignment * trace.layers}
            for each in study.advice
        ],
        "layers": [dataclasses.asdict(costs.summarize(loads)) for loads in study.loads],
        "imbalance": {"tokens": study.window or None, "mean": float(study.imbalance.mean())},
        "block_sizes": {"tokens": study.main_tokens, "sizes": sizes},
        "by_tokens": [dataclasses.asdict(row) for row in study.by_tokens] if study.advice else [],
        "placements": [dataclasses.asdict(gain) for gain in study.gains],
    }


def _tokens(count: int) -> str:
    return _plural(count, "token")


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
