"""Experts over rows in the layouts of DeepEP, for whoever exchanges with it; nothing here imports it.

:func:`batched_moe`     what ``low_latency_dispatch`` returns: a matrix for each expert, and counts.
:func:`contiguous_moe`  rows with the expert of each, as ``m_indices`` says it to DeepGEMM.

What its ``dispatch`` returns, ``recv_x``, ``recv_topk_idx`` and ``recv_topk_weights``, are arguments of
:func:`fused_moe` as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput, InvalidType
from ..experts.layer import fused_moe

__all__ = ["batched_moe", "contiguous_moe"]


def batched_moe(
    rows: Tensor, expert_num_tokens: Tensor, gate_up_proj: Tensor, down_proj: Tensor, **options: Any
) -> Tensor:
    """``out[e, j] = expert(e, rows[e, j])`` for ``j < expert_num_tokens[e]``, zero elsewhere.

    Args:
        rows: ``[E, M, H]``, ``recv_x`` of DeepEP's ``low_latency_dispatch``, with ``M = ranks * max tokens``; rows from
            ``expert_num_tokens[e]`` on may hold anything.
        expert_num_tokens: ``[E]``, integer, ``recv_count``; also what :func:`align_batched` takes.
        gate_up_proj, down_proj: this rank's experts, ``[E, ...]``.
        options: further arguments of :func:`fused_moe`, except those about ids.

    Returns:
        ``[E, M, H]`` in the dtype of `rows`: what ``low_latency_combine`` takes.  Differentiable.

    Raises:
        InvalidInput, InvalidType: shapes or dtypes do not match.
    """
    if rows.dim() != 3:
        raise InvalidInput(f"rows: expected [E, M, H], got {list(rows.shape)}")
    _check_integers("expert_num_tokens", expert_num_tokens, rows.shape[0])
    experts, most, hidden = rows.shape
    numbers = torch.arange(most, device=rows.device)
    names = torch.arange(experts, device=rows.device, dtype=torch.int32).unsqueeze(1)
    ids = torch.where(numbers < expert_num_tokens.unsqueeze(1), names, -1).view(-1, 1)
    return _one_expert_a_row(rows.reshape(-1, hidden), ids, gate_up_proj, down_proj, options).view(rows.shape)


def contiguous_moe(rows: Tensor, m_indices: Tensor, gate_up_proj: Tensor, down_proj: Tensor, **options: Any) -> Tensor:
    """``out[r] = expert(m_indices[r], rows[r])``, zero where ``m_indices[r]`` is no expert, such as -1.

    Args:
        rows: ``[R, H]``, in any order.
        m_indices: ``[R]``, integer, the local expert of each row; :func:`moealign.views.group_indices` makes them of a
            layout.
        gate_up_proj, down_proj, options: as in :func:`batched_moe`.

    Returns:
        ``[R, H]`` in the dtype of `rows`.  Differentiable.

    Raises:
        InvalidInput, InvalidType: shapes or dtypes do not match.
    """
    if rows.dim() != 2:
        raise InvalidInput(f"rows: expected [R, H], got {list(rows.shape)}")
    _check_integers("m_indices", m_indices, rows.shape[0])
    return _one_expert_a_row(rows, m_indices.unsqueeze(1), gate_up_proj, down_proj, options)


def _one_expert_a_row(
    rows: Tensor, ids: Tensor, gate_up_proj: Tensor, down_proj: Tensor, options: dict[str, Any]
) -> Tensor:
    ones = torch.ones(ids.shape, device=rows.device)
    return fused_moe(rows, gate_up_proj, down_proj, ones, ids, **options)


def _check_integers(name: str, tensor: Tensor, length: int) -> None:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
        raise InvalidType(f"{name}: expected an integer dtype, got {tensor.dtype}")
    if list(tensor.shape) != [length]:
        raise InvalidInput(f"{name}: expected [{length}] like rows, got {list(tensor.shape)}")
