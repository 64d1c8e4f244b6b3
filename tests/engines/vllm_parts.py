"""What vLLM's Python files need of its compiled libraries where only the MoE library is there.

run_engines.py puts a file that imports this in the place of vLLM's main library, so that every process of vLLM on a GPU
has it: the MoE library from MOEALIGN_VLLM_LIBRARY, and of the main one the two operators that its MoE layers call.
"""

from __future__ import annotations

import os

import torch

if library := os.environ.get("MOEALIGN_VLLM_LIBRARY"):
    torch.ops.load_library(library)


def silu_and_mul(result: torch.Tensor, given: torch.Tensor) -> None:
    gate, up = given.chunk(2, dim=-1)
    torch.mul(torch.nn.functional.silu(gate), up, out=result)


_C = torch.library.Library("_C", "FRAGMENT")
_C.define("cutlass_scaled_mm_supports_block_fp8(int capability) -> bool")
_C.impl("cutlass_scaled_mm_supports_block_fp8", lambda capability: False, "CompositeExplicitAutograd")
_C.define("silu_and_mul(Tensor! result, Tensor input) -> ()")
_C.impl("silu_and_mul", silu_and_mul, "CompositeExplicitAutograd")
