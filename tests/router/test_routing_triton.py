"""The Triton router without a GPU: interpreted, and compiled ahead.  On a GPU test_routing.py has it."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers import WORKERS, assert_passes, compile_ahead, signature_of

from moealign.problem import RouteProblem

pytest.importorskip("triton")
routing = importlib.import_module("moealign.backend.triton.route")


def test_interpreted_it_equals_the_loops():
    assert_passes(WORKERS / "routing_interpret.py", interpreted=True)


@pytest.mark.targets
def test_compiles_ahead_within_every_targets_shared_memory():
    assert_passes(__file__, interpreted=False)


def configurations():
    """(arguments, constants, warps) of the routers that models have."""
    base = RouteProblem(torch.device("cuda"), torch.bfloat16, 3, 256, 8, "softmax", True, 1.0, 1, 1)
    grouped = {"scoring": "sigmoid", "num_groups": 8, "topk_groups": 4, "has_bias": True, "dtype": torch.float32}
    for each, shares, valid in (
        (base, False, False),
        (base._replace(num_experts=8, top_k=2, dtype=torch.float32), True, True),
        (base._replace(num_experts=60, top_k=4, renormalize=False, dtype=torch.float16), False, False),
        (base._replace(**grouped), False, True),
        (base._replace(num_experts=1024, top_k=32), True, False),
        (base._replace(num_experts=16, top_k=1, scoring="sigmoid", renormalize=False), False, False),
        (base._replace(num_experts=896, top_k=16), True, False),
        (base._replace(num_experts=896, top_k=16, has_bias=True), False, False),
        (base._replace(has_bias=True, num_groups=8, topk_groups=4, renormalize=False), True, True),
        (base._replace(scoring="sqrtsoftplus", has_bias=True, dtype=torch.float32), False, False),
    ):
        new = torch.empty
        tokens, experts, k = each.tokens, each.num_experts, each.top_k
        yield routing.launch_of(
            each,
            new(tokens, experts, dtype=each.dtype),
            new(experts) if each.has_bias else None,
            new(1, dtype=torch.int32) if valid else None,
            new(tokens, k),
            new(tokens, k, dtype=torch.int32),
            new(tokens, experts) if shares else None,
        )


def compile_all():
    from moealign.backend.triton.route_kernels import topk

    for arguments, constants, warps in configurations():
        call = signature_of(topk, arguments, constants)
        for arch, binary in compile_ahead(topk, *call, num_warps=warps, enable_fp_fusion=False):
            # A product fused with what it is added to would be another number, and another expert.
            exact = constants["SCORING"] != "softmax" or arguments[1] is not None
            if "ptx" in binary.asm:
                assert "fma.rn.f32" not in binary.asm["ptx"] or not exact, arch


if __name__ == "__main__":
    compile_all()
