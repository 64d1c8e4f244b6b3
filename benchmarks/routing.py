"""Times routing with the layout: `moealign.route` against vLLM's top-k operator followed by its alignment.

    python benchmarks/routing.py                            # on a GPU; writes benchmarks/results/routing_<gpu>.csv
    python benchmarks/routing.py --benches routing-options  # one part

One process, CUDA graphs of calls over several logits, replayed in turns (moealign.bench).  `moealign-cuda-align` is our
alignment alone, of precomputed ids.  `moealign-cuda-apart` is the router and the alignment as two plain launches; it
shows what one launch, or overlapping the two, gains.  Before anything is timed, ids are compared with torch's top-k,
weights with its softmax, and layouts as in benchmarks/align.py.  Logits are multiples of 1/128 without two equal ones
in a row, because vLLM breaks ties differently.

Rows `routing-options` compare routers: `moealign-cuda` is softmax, the others are named by the option that they add.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import PEERS, RESULTS, finish, gpu_missing

from moealign import bench, route
from moealign.alignment import align
from moealign.backend import load
from moealign.calls.checks import check_route

SOFTMAX = [
    (tokens, 8, 256, 16 if tokens <= 128 else 64 if tokens <= 512 else 128)
    for tokens in (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
]
OTHERS = [(1, 8, 128, 16), (32, 8, 128, 16), (32, 2, 8, 16), (4096, 8, 128, 128), (4096, 2, 8, 128), (32, 10, 512, 16)]
DEEPSEEK = {"scoring": "sigmoid", "num_groups": 8, "topk_groups": 4, "scale": 2.5}
APART, ALONE, OURS = "moealign-cuda-apart", "moealign-cuda-align", "moealign-cuda"
BENCHES = ROUTING, GROUPED, OPTIONS = ("routing", "routing-grouped", "routing-options")
OPTIONS_SIZES = [
    *((tokens, 8, 256, 16 if tokens <= 128 else 128) for tokens in (1, 8, 32, 512, 4096)),
    *((tokens, 16, 896, 16 if tokens <= 128 else 128) for tokens in (1, 32, 4096)),
]


def logits_of(size: bench.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Evenly spaced numbers, shuffled in each row, so that no two of a row are equal."""
    tokens, _, experts, _ = size
    order = torch.rand((tokens, experts), generator=generator, device=generator.device).argsort(1)
    return ((order - experts / 2) / 32).to(dtype)


class RouterCase(bench.Case):
    """A case whose inputs are ids, with the logits and the options of `route` that give them."""

    logits: list[torch.Tensor]
    options: dict[str, Any]
    top_k: int


def case_of(
    session: bench.Session, name: str, size: bench.Size, dtype: torch.dtype, options: dict[str, Any]
) -> RouterCase:
    tokens, top_k, experts, block_size = size
    logits = [logits_of(size, dtype, session.generator) for _ in range(session.slots)]
    ids = [route(each, top_k, block_size=16, **options, backend="reference")[1] for each in logits]
    if not options:
        for each, chosen in zip(logits, ids, strict=True):
            assert torch.equal(each.float().topk(top_k, dim=1).indices, chosen.long())
    shared = options.get("shared_experts", 0)
    aligned = (tokens, top_k + shared, experts + shared, block_size)
    case = RouterCase(name, bench.case_name(size, str(dtype).removeprefix("torch.")), aligned, ids)
    case.logits, case.options, case.top_k = logits, options, top_k
    return case


def options_of(size: bench.Size, generator: torch.Generator) -> dict[str, dict[str, Any]]:
    """The options of `route` for each router of the bench `routing-options`."""
    tokens, top_k, experts, _ = size
    bias = torch.linspace(-0.1, 0.1, experts, device=generator.device)
    order = torch.rand((tokens, experts), generator=generator, device=generator.device).argsort(1)
    return {
        OURS: {},
        f"{OURS}-bias": {"correction_bias": bias},
        f"{OURS}-bias-groups": {"correction_bias": bias, "num_groups": 8, "topk_groups": 4},
        f"{OURS}-sqrtsoftplus": {"scoring": "sqrtsoftplus"},
        f"{OURS}-sqrtsoftplus-bias": {"scoring": "sqrtsoftplus", "correction_bias": bias, "scale": 1.5},
        f"{OURS}-expert-scale": {"expert_scale": bias + 1},
        f"{OURS}-shared-expert": {"shared_experts": 1},
        f"{OURS}-replay": {"replay_ids": order[:, :top_k].to(torch.int32)},
    }


def difference(case: RouterCase, results: dict[int, tuple[Any, ...]], slot: int) -> str | None:
    weights, ids, layout = results[slot]
    if not torch.equal(ids, case.inputs[slot]):
        return "ids differ"
    expected = route(case.logits[slot], case.top_k, block_size=16, **case.options, backend="reference")[0]
    if not torch.allclose(weights, expected, rtol=1e-5, atol=1e-8):
        return "weights differ"
    return bench.exact_difference(bench.by_name(tuple(layout)), case.expected(slot))


def fused(case: RouterCase, backend: str) -> bench.Candidate:
    results: dict[int, tuple[Any, ...]] = {}

    def call(slot: int) -> None:
        results[slot] = route(case.logits[slot], case.top_k, block_size=case.size[3], **case.options, backend=backend)

    return bench.Candidate(f"moealign-{backend}", call, lambda slot: difference(case, results, slot))


def options_case(session: bench.Session, size: bench.Size) -> tuple[RouterCase, list[bench.Candidate]]:
    """The case of softmax, and a candidate for each router."""
    cases, candidates = [], []
    for impl, options in options_of(size, session.generator).items():
        cases.append(case_of(session, OPTIONS, size, torch.float32, options))
        candidates.append(fused(cases[-1], "cuda"))
        candidates[-1].impl = impl
    return cases[0], candidates


def apart(case: RouterCase) -> bench.Candidate:
    """The router's kernel, then the alignment's."""
    _, top_k, experts, block_size = case.size
    options = {"scoring": "softmax", "renormalize": True, "correction_bias": None, "num_groups": 1, "topk_groups": 1}
    options |= {"scale": 1.0, "num_valid_tokens": None, **case.options}
    routing = check_route(case.logits[0], top_k, **options)
    results: dict[int, tuple[Any, ...]] = {}
    router = load("cuda").prepare_route(routing)

    def call(slot: int) -> None:
        ids = torch.empty_like(case.inputs[slot])
        weights = torch.empty_like(ids, dtype=torch.float32)
        router.run(case.logits[slot], options["correction_bias"], None, weights, ids, None)
        results[slot] = (weights, ids, align(ids, block_size=block_size, num_experts=experts, backend="cuda"))

    return bench.Candidate(APART, call, lambda slot: difference(case, results, slot))


def alone(case: RouterCase) -> bench.Candidate:
    candidate = bench.moealign_candidate("cuda", case)
    candidate.impl = ALONE
    return candidate


def vllm(case: RouterCase) -> bench.Candidate:
    """vLLM's top-k operator for the case, then its alignment, into preallocated buffers."""
    top_k = case.size[1]
    ids = [torch.empty_like(each) for each in case.inputs]
    weights = [torch.empty_like(each, dtype=torch.float32) for each in ids]
    indices = torch.empty_like(ids[0])
    alignment = bench.vllm_candidate(bench.Case(case.bench, case.name, case.size, ids))
    ops, options = torch.ops._moe_C, case.options
    optional = (None,) * (bench.argument_count(ops.topk_softmax) - 5)

    def softmax(slot: int) -> None:
        ops.topk_softmax(weights[slot], ids[slot], indices, case.logits[slot], True, *optional)
        alignment.call(slot)

    def grouped(slot: int) -> None:
        groups = (options["num_groups"], options["topk_groups"])
        weights[slot], ids[slot] = ops.grouped_topk(
            case.logits[slot], *groups, top_k, True, options["scale"], options["correction_bias"], 1
        )
        alignment.call(slot)

    def check(slot: int) -> str | None:
        expected = case.inputs[slot].sort(1).values
        return None if torch.equal(ids[slot].sort(1).values.to(expected.dtype), expected) else "ids differ"

    return bench.Candidate(alignment.impl, grouped if options else softmax, check)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--peers", type=Path, default=PEERS)
    parser.add_argument("--benches", default=",".join(BENCHES), help="parts, with commas")
    parser.add_argument("--quick", action="store_true", help="a few sizes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if gpu_missing("benchmarks/routing.py"):
        return 2
    device = torch.device("cuda", 0)
    session = bench.Session(device, bench.gpu_slug(torch.cuda.get_device_name()), [])
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loaded, _ = bench.load_peers(args.peers, scratch)
        bias = torch.linspace(-0.1, 0.1, 256, device=device)
        cases = [(ROUTING, size, torch.bfloat16, {}) for size in (SOFTMAX + OTHERS)]
        cases += [(ROUTING, size, torch.float32, {}) for size in SOFTMAX]
        cases += [(GROUPED, size, torch.float32, {**DEEPSEEK, "correction_bias": bias})
                  for size in SOFTMAX[::4]]  # fmt: skip
        stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        asked = args.benches.split(",")
        cases = [case for case in cases if case[0] in asked]
        for name, size, dtype, options in cases[:: 5 if args.quick else 1]:
            case = case_of(session, name, size, dtype, options)
            candidates = [fused(case, "cuda"), apart(case), alone(case)]
            if hasattr(load("triton"), "route"):
                candidates.append(fused(case, "triton"))
            if bench.VLLM in loaded:
                candidates.append(vllm(case))
            session.run(case, candidates, bench.time_graphs)
        for size in OPTIONS_SIZES if OPTIONS in asked else []:
            session.run(*options_case(session, size), bench.time_graphs)
    print_table(session.rows)
    return finish(session.rows, session.failures, args.out or RESULTS / f"routing_{session.gpu}.csv")


def print_table(rows: list[dict[str, Any]]) -> None:
    impls = [OURS, APART, ALONE, "moealign-triton", bench.VLLM]
    bench.log(f"{'case':38}" + "".join(f"{impl.removeprefix('moealign-'):>13}" for impl in impls) + "  /vllm  of align")
    for name in (ROUTING, GROUPED):
        for row, times in bench.cases_of(rows, name):
            cells = "".join(f"{times[impl]:13.2f}" if impl in times else f"{'-':>13}" for impl in impls)
            own = times.get(OURS, float("nan"))
            ratios = f"{times.get(bench.VLLM, 0) / own:6.2f} {own / times.get(ALONE, 1):6.2f}"
            bench.log(f"{name[7:]} {row['case']:36} {cells} {ratios}")
    for row, times in bench.cases_of(rows, OPTIONS):
        ratios = " ".join(
            f"{impl.removeprefix(OURS)[1:]} {us / times[OURS]:.2f}" for impl, us in times.items() if impl != OURS
        )
        bench.log(f"{row['case']:28} {times[OURS]:.2f} us; of it {ratios}")


if __name__ == "__main__":
    sys.exit(main())
