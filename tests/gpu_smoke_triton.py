"""The Triton backend on a GPU: bits against the oracle, then graph-replay times.  Not collected by pytest.

PYTHONPATH=src python3 tests/gpu_smoke_triton.py check [processes]    # random cases, compiled side by side
PYTHONPATH=src python3 tests/gpu_smoke_triton.py time                 # microseconds a call, median
"""

from __future__ import annotations

import importlib
import statistics
import subprocess
import sys

import torch

import moealign
from moealign.layout import EXTRAS, Problem, capacity
from moealign.testing import argsort_align, check_backend, poisoned

backend = importlib.import_module("moealign.backends.triton")
SHAPES = [
    (1, 8, 256, 16), (4, 8, 256, 16), (8, 8, 256, 16), (32, 2, 8, 16), (16, 8, 256, 16), (32, 8, 256, 16),
    (128, 8, 256, 16), (512, 8, 256, 64), (1_024, 8, 256, 128), (2_048, 8, 256, 128), (4_096, 8, 256, 128),
    (8_192, 8, 256, 128), (16_384, 8, 256, 128), (32_768, 8, 256, 128), (65_536, 8, 256, 128),
]  # fmt: skip


def replay(call, calls: int = 20, rounds: int = 30) -> float:
    """Microseconds of one call in a captured graph of `calls`, median over `rounds` replays."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(rounds + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times[3:])


def parts_of(planned) -> list[float]:
    """Microseconds of each launch: the differences of one, two and all three.  (A second scan alone would spoil the
    table that the next launch trusts.)"""
    sums = [replay(lambda some=planned[: k + 1]: backend._launch(some)) for k in range(len(planned))]
    return [round(b - a, 2) for a, b in zip([0.0, *sums], sums, strict=False)]


def prepared(tokens, top_k, experts, size):
    ids = torch.rand(tokens, experts, device="cuda").topk(top_k, dim=1).indices.to(torch.int32)
    n = ids.numel()
    problem = Problem("align", ids.device, ids.dtype, n, top_k, experts, size)
    out = poisoned(capacity(n, block_size=size, num_experts=experts), (), "cuda", -7)
    return problem, ids, out


def time_shapes(shapes=SHAPES) -> None:
    print("routes  E  B | triton us (each launch) | argsort us")
    for shape in shapes:
        problem, ids, out = prepared(*shape)
        whole = replay(lambda p=problem, i=ids, o=out: backend.align(p, i, None, None, None, o))
        for got, want in zip(out, argsort_align(ids, shape[3], shape[2]), strict=True):
            assert torch.equal(got, want), shape
        planned = backend.launches(problem, ids, None, None, None, out)
        parts = parts_of(planned)
        baseline = replay(lambda i=ids, s=shape: argsort_align(i, s[3], s[2]), 5, 10)
        print(f"{ids.numel():7} {shape[2]} {shape[3]} | {whole:6.2f}", parts, f"| {baseline:.1f}")


def vary() -> None:
    """What other tunables would give: read before changing one."""
    print("small kernel by warps")
    for shape in SHAPES[:5]:
        problem, ids, out = prepared(*shape)
        (one,) = backend.launches(problem, ids, None, None, None, out)
        row = []
        for warps in (1, 2, 4, 8, 16):
            varied = one._replace(num_warps=warps)
            row.append((warps, round(replay(lambda o=varied: backend._launch([o])), 2)))
        print(ids.numel(), row)
    for tokens in (2_048, 8_192, 65_536):
        problem, ids, out = prepared(tokens, 8, 256, 128)
        for pairwise in (32, 64):
            for chunk in (64, 128, 256, 512):
                if chunk < pairwise or tokens * 8 // chunk > 8_192:
                    continue
                backend.PAIRWISE, backend._chunk = pairwise, lambda routes, bins, c=chunk: c
                whole = replay(lambda p=problem, i=ids, o=out: backend.align(p, i, None, None, None, o))
                planned = backend.launches(problem, ids, None, None, None, out)
                parts = parts_of(planned)
                print(f"{tokens * 8} pairwise {pairwise} chunk {chunk}: {whole:.2f}", parts, flush=True)


def compare_large() -> None:
    """Large sizes against the reference backend, with everything asked for."""
    for tokens, experts, size in ((8_192, 256, 128), (65_536, 256, 128), (4_096, 65_536, 16), (40_000, 2_000, 7)):
        ids = torch.randint(-1, experts + 1, (tokens, 8), device="cuda")
        expert_map = torch.randint(-1, experts, (experts,), device="cuda", dtype=torch.int32)
        valid = torch.tensor([tokens - 37], dtype=torch.int32, device="cuda")
        layouts = []
        for name in ("triton", "reference", "triton"):
            word = moealign.new_error_word("cuda")
            layouts.append(
                moealign.align(
                    ids, block_size=size, num_experts=experts, expert_map=expert_map, ignore_invalid_experts=True,
                    num_valid_tokens=valid, error_word=word, backend=name, **dict.fromkeys(EXTRAS, True),
                )
            )  # fmt: skip
            assert word.item() == 1, name
        for name in (*EXTRAS, "sorted_token_ids", "expert_ids", "num_tokens_post_padded"):
            first, second, third = (getattr(layout, name) for layout in layouts)
            assert torch.equal(first, second), (name, tokens, experts)
            assert torch.equal(first, third), (name, tokens, experts)
    print("large sizes equal the reference, twice")


def main(arguments: list[str]) -> int:
    mode = arguments[0] if arguments else "time"
    if mode == "check":
        if len(arguments) > 2:
            found = [pair for pair in check_backend("triton", "cuda", int(arguments[2]), int(arguments[1])) if pair[1]]
            print("\n".join(map(str, found)) or f"seed {arguments[1]}: {arguments[2]} cases equal")
            return bool(found)
        number = int(arguments[1]) if len(arguments) > 1 else 8
        running = [subprocess.Popen([sys.executable, __file__, "check", str(seed), "12"]) for seed in range(number)]
        codes = [one.wait() for one in running]
        compare_large()
        return any(codes)
    time_shapes()
    if mode == "vary":
        vary()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
