"""`moealign inspect`."""

from __future__ import annotations

import dataclasses
import json

import torch

from .. import costs
from ..report import terminal as tables
from ..report.summary import advice_text, gaps_text
from ..terminal import escape, paragraph
from . import checks

__all__ = ["inspect"]


def inspect(
    trace_path: checks.TracePath = checks.SHIPPED,
    block_size: checks.BlockSizes = checks.BLOCK_SIZES,
    hidden: checks.Hidden = None,
    intermediate: checks.Intermediate = None,
    as_json: checks.Json = False,
) -> None:
    """Print load per expert, imbalance, blocks and padding of a trace, and the block size to try first."""
    sizes = checks.ints("--block-size", block_size, checks.MAX_BLOCK_SIZE)
    trace = checks.load(trace_path)
    batches = costs.batch_loads(trace.topk_ids, trace.num_experts, trace.calls)  # [layers, batches, experts]
    loads = batches.sum(axis=1)
    experts, source = costs.experts_of(trace, hidden, intermediate)
    advice = costs.advise(trace, sizes, experts)
    if as_json:
        parts = [*loads, loads.sum(axis=0)]
        answer = {
            "trace": str(trace_path),
            "model": trace.model,
            "source": trace.source,
            "revision": trace.revision,
            "layers": trace.layers,
            "tokens": trace.tokens,
            "top_k": trace.top_k,
            "experts": trace.num_experts,
            "load": [dataclasses.asdict(costs.summarize(part)) for part in parts[:-1]],
            "load_all": dataclasses.asdict(costs.summarize(parts[-1])),
            "padding": [
                {
                    "block_size": size,
                    "blocks": [costs.padding(layer, size).blocks for layer in batches],
                    "padding": [costs.padding(layer, size).wasted for layer in batches],
                    "blocks_all": costs.padding(batches, size).blocks,
                    "padding_all": costs.padding(batches, size).wasted,
                }
                for size in sizes
            ],
            "advice": [
                {"kind": each.kind, "tokens": each.tokens, "block_size": each.block_size, "padding": each.wasted}
                for each in advice
            ],
            "hidden": experts.hidden,
            "intermediate": experts.intermediate,
            "machine": costs.H200.name,
        }
        print(json.dumps(answer, indent=2))
        return
    about = [str(trace_path), trace.model, trace.source, *([f"revision {trace.revision}"] if trace.revision else [])]
    print(paragraph(escape("; ".join(about))))
    print(
        paragraph(
            f"{trace.layers} layers, {trace.tokens:,} tokens, {trace.top_k} of {trace.num_experts} experts each, "
            f"{'one batch' if batches.shape[1] == 1 else f'{batches.shape[1]:,} batches'}\n"
        )
    )
    if gaps := gaps_text(trace):
        print(paragraph(escape(gaps)))
    print()
    print(tables.load_table(loads))
    print()
    print(tables.padding_table(batches, sizes))
    print()
    if not advice:
        print(paragraph("The trace has no routes, so there is nothing to recommend."))
        return
    print("Block size:")
    for each in advice:
        print(paragraph(f"  {advice_text(each)}", indent=4))
    here = "; `moealign report` measures on the GPU of this machine" if torch.cuda.is_available() else ""
    print(paragraph(f"By the cost model for {costs.H200.name}{here}; experts of {experts}, {source}."))
    print(paragraph("Smaller blocks pad less, but every block reads its expert's weights once."))
