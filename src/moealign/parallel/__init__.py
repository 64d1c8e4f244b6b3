"""A layer of experts over several ranks, on torch.distributed: NCCL on GPUs, gloo on CPUs; see docs/parallel.md.

:func:`replicated_moe`   every rank holds all tokens and computes the routes of its experts; an all-reduce adds them up.
:func:`dispatched_moe`   every rank holds its own tokens; routes travel to the ranks of their experts and back.
:class:`ExpertExchange`  the same with sizes known ahead: no wait, in CUDA graphs, compiled.
"""

from __future__ import annotations

from .exchange import Arrived, ExpertExchange, Way
from .experts import ExpertPlacement
from .layers import dispatched_moe, replicated_moe

__all__ = ["Arrived", "ExpertExchange", "ExpertPlacement", "Way", "dispatched_moe", "replicated_moe"]
