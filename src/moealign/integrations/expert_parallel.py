"""Transformers' expert parallelism through :class:`moealign.parallel.ExpertExchange`, for releases from 5.24 on.

``DistributedConfig(ep_implementation="moealign")`` selects it after ``integration.install()``.  Transformers' own
``all_to_all`` sorts by several operators and waits for the sizes in each layer; this exchange waits for nothing.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor

from ..layout import cdiv, power_of_two
from ..parallel import ExpertExchange, ExpertPlacement

__all__ = ["exchange_class", "implementations"]


def implementations() -> Any:
    """Transformers' registry of expert-parallel implementations; None if this release has none."""
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
    except ImportError:
        return None
    return EPImplementationInterface


@functools.cache
def exchange_class() -> type:
    """An ``EPImplementation`` whose rows travel in an exchange of fixed size, with room for every route.

    It needs ranks that share one batch, and so know how many tokens the others have.  For ranks with batches of their
    own this is Transformers' ``all_to_all``.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from transformers.distributed.expert_parallel import AllToAllEP

    class ExchangeEP(AllToAllEP):  # type: ignore[misc]
        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            tokens, parts = hidden_states.shape[0], self.tp_mesh.size()
            if not self.shares_batch:
                theirs: Tensor = super().__call__(hidden_states, top_k_index, top_k_weights)
                return theirs
            inputs = [hidden_states, top_k_index, top_k_weights]
            if parts > 1:  # the ranks that share a batch each take a slice of it
                whole = [DTensor.from_local(each, self.tp_mesh, [Replicate()], run_check=False) for each in inputs]
                inputs = [each.redistribute(self.tp_mesh, [Shard(0)]).to_local() for each in whole]
            own, ids, weights = inputs
            exchange = self._exchange(cdiv(tokens, parts), ids.shape[1], own.device)
            arrived, way = exchange.dispatch(own, ids)
            slots = arrived.topk_ids
            # Transformers names a route without an expert here by the number of experts here.
            local = slots.to(torch.int64).masked_fill(slots < 0, cast(int, self.num_local_experts))
            rows = arrived.hidden_states.masked_fill(slots < 0, 0)  # an experts forward may compute all rows
            ones = arrived.topk_weights.to(rows.dtype).masked_fill(slots < 0, 0)
            out = exchange.combine(self.experts_forward(rows, local, ones), weights, way)
            if parts > 1:
                shape = torch.Size((tokens, out.shape[1]))
                out = DTensor.from_local(out, self.tp_mesh, [Shard(0)], shape=shape, stride=(out.shape[1], 1))
                out = out.full_tensor()
            return out

        def _exchange(self, tokens: int, top_k: int, device: torch.device) -> ExpertExchange:
            ranks: int = self.ep_mesh.size()
            placement = _placement(cast(int, self.num_local_experts) * ranks, ranks)
            # In powers of two: batches of many sizes share a few exchanges.
            capacity = power_of_two(max(tokens * top_k, 1))
            return ExpertExchange.of(placement, capacity, self.ep_mesh, device)

    return ExchangeEP


@functools.cache
def _placement(experts: int, ranks: int) -> ExpertPlacement:
    return ExpertPlacement.linear(experts, ranks)
