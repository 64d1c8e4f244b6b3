"""The Triton router without a GPU: interpreted, and compiled ahead.  On a GPU test_routing.py has it."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from helpers import TARGETS, WORKERS, assert_passes, releases

from moealign.problem import RouteProblem

pytest.importorskip("triton")
routing = importlib.import_module("moealign.backend.triton.route")

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}


@pytest.mark.parametrize("release", releases())
def test_interpreted_it_equals_the_loops(release):
    assert_passes(WORKERS / "routing_interpret.py", release, interpreted=True)


@pytest.mark.parametrize("release", releases())
def test_compiles_ahead_within_every_targets_shared_memory(release):
    assert_passes(__file__, release, interpreted=False)


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


def _kind(argument):
    if argument is None:
        return "constexpr"
    if isinstance(argument, float):
        return "fp32"
    return "*" + _NAMES[argument.dtype] if isinstance(argument, torch.Tensor) else "i32"


def compile_all():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moealign.backend.triton.route_kernels import choose

    too_large = compiled = 0
    for arguments, constants, warps in configurations():
        signature, given = {}, dict(constants)
        for name, argument in zip(choose.arg_names, arguments, strict=False):
            signature[name] = _kind(argument)
            if argument is None:
                given[name] = None
        signature |= dict.fromkeys(constants, "constexpr")
        for backend, arch, warp, limit in TARGETS:
            options = {"num_warps": warps, "enable_fp_fusion": False}
            source = ASTSource(choose, signature, given)
            binary = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
            compiled += 1
            if binary.metadata.shared > limit:
                too_large += 1
                print(f"{constants}: {binary.metadata.shared} bytes of {limit} on {arch}")
            if backend == "cuda":
                # One constant's product with what it is added to would be another number, and another expert.
                assert "fma.rn.f32" not in binary.asm["ptx"] or not given["SIGMOID"], arch
    print(f"triton {triton.__version__}: {compiled} kernels")
    return too_large


if __name__ == "__main__":
    sys.exit(compile_all())
