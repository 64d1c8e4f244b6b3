"""The Triton steps of the engines' operators under the interpreter.  Run by test_integrations.py in its own process."""

from __future__ import annotations

import os

os.environ.update(TRITON_INTERPRET="1", MOEALIGN_BACKEND="reference")

import torch
from cases.engines import LORA, assert_lora, lora_case
from helpers import patch_interpreter

from moealign.integrations import sglang, vllm_kernels, vllm_ops


def main() -> None:
    patch_interpreter()
    vllm_ops.uses_triton = lambda tensor: True
    for case in LORA:
        arguments, out, expected = lora_case(*case)
        vllm_ops.align_lora(*arguments)
        assert_lora(out, expected)
    ids = torch.randint(0, 9, (700, 2))
    kept = torch.randint(-1, 2, (1400, 1), dtype=torch.int32)
    expected = torch.where(kept.view_as(ids) >= 0, ids + 90, -1)
    vllm_kernels.globalize(ids, kept, 90)
    assert torch.equal(ids, expected)
    for prefix in (False, True):
        for top_k, block_size in ((1, 8), (6, 16), (8, 64), (32, 48)):
            given = torch.randint(-1, 40, (1, top_k), dtype=torch.int32)
            sglang.uses_triton = lambda tensor: False
            wanted = sglang._align_single(given, block_size, return_inactive_prefix_count=prefix)
            sglang.uses_triton = lambda tensor: True
            found = sglang._align_single(given, block_size, return_inactive_prefix_count=prefix)
            assert all(torch.equal(one, same) for one, same in zip(found, wanted, strict=True))


if __name__ == "__main__":
    main()
