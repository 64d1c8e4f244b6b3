"""What alignment, block sizes and placements cost for the routes of a trace: a model, and measurements on a GPU.

The input is one tensor of ids ``[layers, tokens, top_k]``, and the number of tokens of each call of the model where the
trace has it: each call is a batch.  Blocks and padding follow from the loads, the number of routes of each expert.
"""

from .gpu import measure, measure_alignment, measured_machine
from .loads import (
    MAX_DECODE_TOKENS,
    Floats,
    Ints,
    LoadSummary,
    Padding,
    batch_loads,
    blocks_of,
    loads_of,
    padding,
    pieces,
    summarize,
    typical_batches,
    windows,
)
from .model import (
    ALIGNMENT_US,
    H200,
    BatchCost,
    Cost,
    Experts,
    Machine,
    PlacementGain,
    Recommendation,
    alignment_us,
    batch_costs,
    cost,
    experts_of,
    placement_gain,
    recommend,
    recommend_by_tokens,
)

__all__ = [
    "ALIGNMENT_US",
    "H200",
    "MAX_DECODE_TOKENS",
    "BatchCost",
    "Cost",
    "Experts",
    "Floats",
    "Ints",
    "LoadSummary",
    "Machine",
    "Padding",
    "PlacementGain",
    "Recommendation",
    "alignment_us",
    "batch_costs",
    "batch_loads",
    "blocks_of",
    "cost",
    "experts_of",
    "loads_of",
    "measure",
    "measure_alignment",
    "measured_machine",
    "padding",
    "pieces",
    "placement_gain",
    "recommend",
    "recommend_by_tokens",
    "summarize",
    "typical_batches",
    "windows",
]
