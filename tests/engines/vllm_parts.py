"""What vLLM's Python files need of its compiled libraries where only the MoE library is there.

run_engines.py puts a file that imports this in the place of vLLM's main library, so that every process of vLLM on a GPU
has it: the MoE library from MOEALIGN_VLLM_LIBRARY, and of the main one what its MoE layers call, in torch.
"""

from __future__ import annotations

import os

import torch

if library := os.environ.get("MOEALIGN_VLLM_LIBRARY"):
    torch.ops.load_library(library)


def silu_and_mul(result: torch.Tensor, given: torch.Tensor) -> None:
    gate, up = given.chunk(2, dim=-1)
    torch.mul(torch.nn.functional.silu(gate), up, out=result)


def quantize(values: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor) -> None:
    values.copy_((rows.float() / scale).clamp(-448, 448).view_as(values).to(values.dtype))


def per_token_group_fp8_quant(
    rows: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, group: int, least: float, low: float, high: float,
    ue8m0: bool, column_major: bool, tma_aligned: bool,
) -> None:  # fmt: skip
    assert not ue8m0
    assert (low, high) == (-448, 448)
    grouped = rows.float().unflatten(-1, (-1, group))
    scales.copy_(grouped.abs().amax(-1).clamp(min=least) / high)
    quantize(values, grouped, scales.unsqueeze(-1))


def dynamic_per_token_scaled_fp8_quant(
    values: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor, bound: torch.Tensor | None
) -> None:
    assert bound is None
    scale.copy_(rows.float().abs().amax(-1, keepdim=True).clamp(min=1 / (448 * 512)) / 448)
    quantize(values, rows, scale)


def dynamic_scaled_fp8_quant(values: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor) -> None:
    scale.copy_(rows.float().abs().amax() / 448)
    quantize(values, rows, scale)


def static_scaled_fp8_quant(
    values: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor, group_shape: list[int] | None
) -> None:
    assert scale.numel() == 1
    quantize(values, rows, scale)


_C = torch.library.Library("_C", "FRAGMENT")
for _name in ("cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8", "cutlass_group_gemm_supported"):
    _C.define(f"{_name}(int capability) -> bool")
    _C.impl(_name, lambda capability: False, "CompositeExplicitAutograd")
for _schema, _stand_in in (
    ("silu_and_mul(Tensor! result, Tensor input) -> ()", silu_and_mul),
    (
        "per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
        "float fp8_min, float fp8_max, bool scale_ue8m0, bool column_major, bool tma_aligned) -> ()",
        per_token_group_fp8_quant,
    ),
    (
        "dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
        dynamic_per_token_scaled_fp8_quant,
    ),
    ("dynamic_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale) -> ()", dynamic_scaled_fp8_quant),
    (
        "static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, int[]? group_shape) -> ()",
        static_scaled_fp8_quant,
    ),
):
    _C.define(_schema)
    _C.impl(_stand_in.__name__, _stand_in, "CompositeExplicitAutograd")
