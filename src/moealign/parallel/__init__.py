"""A layer of experts over several ranks, on torch.distributed: NCCL on GPUs, gloo on CPUs; see docs/parallel.md.

:func:`replicated_moe`   every rank holds all tokens and computes the routes of its experts; an all-reduce adds them up.
:func:`dispatched_moe`   every rank holds its own tokens; routes travel to the ranks of their experts and back.
:class:`ExpertExchange`  the same with sizes known ahead: no wait, in CUDA graphs, compiled.
:func:`beside`           shared experts, or the next router, beside an exchange.
:func:`batched_moe`, :func:`contiguous_moe`  the layouts of DeepEP, for whoever exchanges with it.
:func:`move_experts`     carries weights from one placement to another while a model runs.
"""

from __future__ import annotations

from .deepep import batched_moe, contiguous_moe
from .exchange import Arrived, ExpertExchange, Way
from .experts import ExpertPlacement
from .layers import dispatched_moe, replicated_moe
from .moves import ExpertMove, move_experts
from .overlap import Beside, beside

__all__ = [
    "Arrived",
    "Beside",
    "ExpertExchange",
    "ExpertMove",
    "ExpertPlacement",
    "Way",
    "batched_moe",
    "beside",
    "contiguous_moe",
    "dispatched_moe",
    "move_experts",
    "replicated_moe",
]
