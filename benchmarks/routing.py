"""Times routing with the layout: `moealign.route` against vLLM's top-k operator followed by its alignment.

    PYTHONPATH=src python3 benchmarks/routing.py    # on a GPU; writes benchmarks/results/routing_<gpu>.csv

One process, CUDA graphs of calls over several logits, replayed in turns (moealign.bench).  `moealign-cuda-align` is our
alignment alone, of ids that are there; `moealign-cuda-apart` the router and the alignment as two plain launches, which
shows what one launch, or beginning the second early, gains.  Before anything is timed, ids are compared with torch's
own top-k, weights with its softmax, and layouts as in benchmarks/align.py; logits are whole multiples of 1/128 so far
apart that no two of a row are equal, because vLLM's order of equals is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src")]

from moealign import bench, route  # noqa: E402
from moealign.alignment import align  # noqa: E402
from moealign.backend import load  # noqa: E402
from moealign.calls.checks import check_route  # noqa: E402

SOFTMAX = [
    (tokens, 8, 256, 16 if tokens <= 128 else 64 if tokens <= 512 else 128)
    for tokens in (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
]
OTHERS = [(1, 8, 128, 16), (32, 8, 128, 16), (32, 2, 8, 16), (4096, 8, 128, 128), (4096, 2, 8, 128), (32, 10, 512, 16)]
DEEPSEEK = {"scoring": "sigmoid", "num_groups": 8, "topk_groups": 4, "scale": 2.5}
APART, ALONE = "moealign-cuda-apart", "moealign-cuda-align"


def logits_of(size: bench.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """No two of a row alike: a shuffle of evenly spaced numbers."""
    tokens, _, experts, _ = size
    order = torch.rand((tokens, experts), generator=generator, device=generator.device).argsort(1)
    return ((order - experts / 2) / 32).to(dtype)


class Case(bench.Work):
    """Work whose inputs are ids; logits that give them beside it."""

    logits: list[torch.Tensor]
    given: dict[str, Any]


def case_of(session: bench.Session, name: str, size: bench.Size, dtype: torch.dtype, given: dict[str, Any]) -> Case:
    top_k = size[1]
    logits = [logits_of(size, dtype, session.generator) for _ in range(session.slots)]
    ids = [route(each, top_k, block_size=16, **given, backend="reference")[1] for each in logits]
    if not given:
        for each, chosen in zip(logits, ids, strict=True):
            assert torch.equal(each.float().topk(top_k, dim=1).indices, chosen.long())
    case = Case(name, bench.name_of(size, str(dtype).removeprefix("torch.")), size, ids)
    case.logits, case.given = logits, given
    return case


def checked(case: Case, results: dict[int, tuple[Any, ...]], slot: int) -> str | None:
    weights, ids, layout = results[slot]
    if not torch.equal(ids, case.inputs[slot]):
        return "ids differ"
    want = route(case.logits[slot], case.size[1], block_size=16, **case.given, backend="reference")[0]
    if not torch.allclose(weights, want, rtol=1e-5, atol=1e-8):
        return "weights differ"
    return bench.exact_difference(bench._named(tuple(layout)), case.expected(slot))


def ours(case: Case, backend: str) -> bench.Entry:
    results: dict[int, tuple[Any, ...]] = {}

    def call(slot: int) -> None:
        results[slot] = route(case.logits[slot], case.size[1], block_size=case.size[3], **case.given, backend=backend)

    return bench.Entry(f"moealign-{backend}", call, lambda slot: checked(case, results, slot))


def apart(case: Case) -> bench.Entry:
    """The router's kernel and the alignment's, one behind the other."""
    _, top_k, experts, block_size = case.size
    facts = {"scoring": "softmax", "renormalize": True, "correction_bias": None, "num_groups": 1, "topk_groups": 1}
    facts |= {"scale": 1.0, "num_valid_tokens": None, **case.given}
    routing = check_route(case.logits[0], top_k, **facts)
    results: dict[int, tuple[Any, ...]] = {}
    module = load("cuda")

    def call(slot: int) -> None:
        ids = torch.empty_like(case.inputs[slot])
        weights = torch.empty_like(ids, dtype=torch.float32)
        module.route(routing, case.logits[slot], facts["correction_bias"], None, weights, ids, None)
        results[slot] = (weights, ids, align(ids, block_size=block_size, num_experts=experts, backend="cuda"))

    return bench.Entry(APART, call, lambda slot: checked(case, results, slot))


def alone(case: Case) -> bench.Entry:
    entry = bench.ours("cuda", case)
    entry.impl = ALONE
    return entry


def vllm(case: Case) -> bench.Entry:
    """Its top-k operator for the case, then its alignment, into buffers that are there."""
    top_k = case.size[1]
    ids = [torch.empty_like(each) for each in case.inputs]
    weights = [torch.empty_like(each, dtype=torch.float32) for each in ids]
    indices = torch.empty_like(ids[0])
    behind = bench.vllm(bench.Work(case.bench, case.case, case.size, ids))
    ops, given = torch.ops._moe_C, case.given
    nothing = (None,) * (bench.arguments_of(ops.topk_softmax) - 5)

    def softmax(slot: int) -> None:
        ops.topk_softmax(weights[slot], ids[slot], indices, case.logits[slot], True, *nothing)
        behind.call(slot)

    def grouped(slot: int) -> None:
        groups = (given["num_groups"], given["topk_groups"])
        weights[slot], ids[slot] = ops.grouped_topk(
            case.logits[slot], *groups, top_k, True, given["scale"], given["correction_bias"], 1
        )
        behind.call(slot)

    def check(slot: int) -> str | None:
        want = case.inputs[slot].sort(1).values
        return None if torch.equal(ids[slot].sort(1).values.to(want.dtype), want) else "ids differ"

    return bench.Entry(behind.impl, grouped if given else softmax, check)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".peers")
    parser.add_argument("--quick", action="store_true", help="few sizes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/routing.py: expected a GPU that torch can use, found none")
        return 2
    gpu = bench.gpu_slug(torch.cuda.get_device_name())
    device = torch.device("cuda", 0)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loaded, _ = bench.load_peers(args.peers, scratch)
        session = bench.Session(device, gpu, [])
        bias = torch.linspace(-0.1, 0.1, 256, device=device)
        cases = [("routing", size, torch.bfloat16, {}) for size in (SOFTMAX + OTHERS)]
        cases += [("routing", size, torch.float32, {}) for size in SOFTMAX]
        cases += [("routing-grouped", size, torch.float32, {**DEEPSEEK, "correction_bias": bias})
                  for size in SOFTMAX[::4]]  # fmt: skip
        stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        for name, size, dtype, given in cases[:: 5 if args.quick else 1]:
            case = case_of(session, name, size, dtype, given)
            entries = [ours(case, "cuda"), apart(case), alone(case)]
            if hasattr(load("triton"), "route"):
                entries.append(ours(case, "triton"))
            if bench.VLLM in loaded:
                entries.append(vllm(case))
            session.run(case, entries, bench.time_graphs)
    table(session)
    bench.write_csv(session.rows, args.out or HERE / "results" / f"routing_{gpu}.csv")
    return 1 if session.wrong else 0


def table(session: bench.Session) -> None:
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in session.rows:
        found.setdefault((row["bench"], row["case"]), {})[row["impl"]] = float(row["median_us"])
    impls = ["moealign-cuda", APART, ALONE, "moealign-triton", bench.VLLM]
    bench.say(f"{'case':38}" + "".join(f"{impl.removeprefix('moealign-'):>13}" for impl in impls) + "  /vllm  of align")
    for (name, case), times in found.items():
        cells = "".join(f"{times[impl]:13.2f}" if impl in times else f"{'-':>13}" for impl in impls)
        mine = times.get("moealign-cuda", float("nan"))
        bench.say(
            f"{name[7:]} {case:36} {cells} {times.get(bench.VLLM, 0) / mine:6.2f} {mine / times.get(ALONE, 1):6.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
