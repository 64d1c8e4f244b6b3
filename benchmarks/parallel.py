"""Times both modes of expert parallelism on this machine's GPUs, beside one GPU, and their exchanges alone.

    python benchmarks/parallel.py            # every GPU; writes benchmarks/results/parallel_<gpu>.csv
    python benchmarks/parallel.py --small    # two processes with gloo, to see that it runs

The shapes and token counts of the experts' benchmark, in bfloat16.  `tokens` is the whole batch: one GPU has all of it,
as has each rank of `replicated`; `dispatched` splits it.  Times are wall times of eager calls after a barrier, of the
slowest rank; `-graph` is a CUDA graph replay, for calls that never wait for the device.  `dispatched-capacity` and
`dispatched-graph` are an ExpertExchange whose capacity is never exceeded; `dispatched-graph-1.25` has room for 1.25
times the mean from 256 tokens on, `dispatched-graph-fp8` rows in FP8 on the way there, `dispatched-graph-tokens` one
row for each token and rank, and `dispatched-capacity-tokens` the same called eagerly; `direct` and `direct-tokens` are
both without collectives, by the memory of the ranks.  `exchange-...` are the collectives of a mode alone, at the same
sizes.  `collective` rows are the terms of the model in docs/parallel.md.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import RESULTS, SHAPES, TOKENS, Shape, layer_name, random_weights

from moealign import bench, fused_moe
from moealign.parallel import ExpertExchange, ExpertPlacement, dispatched_moe, replicated_moe
from moealign.timing import NO_ARGUMENTS, Times, capture, device_us, host_us

SMALL_SHAPES: list[Shape] = [(8, 2, 32, 16)]
SMALL_TOKENS = [1, 6]
SIZES = [2**10, 2**16, 2**20, 2**24, 2**28]  # bytes that a rank passes to a collective


class Ranks:
    """This process, its device, and how it times calls together with the other ranks."""

    def __init__(self, rank: int, ranks: int, small: bool) -> None:
        self.rank, self.ranks, self.cuda = rank, ranks, not small
        self.device = torch.device("cuda", rank) if self.cuda else torch.device("cpu")

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        dist.barrier()
        if self.cuda:
            torch.cuda.synchronize()

    def slowest(self, times: list[float]) -> list[float]:
        """The time of the slowest rank in each turn."""
        slowest = torch.tensor(times, dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.tolist()

    def wall(self, call: Callable[[], Any], turns: int = 15, calls: int = 4) -> list[float]:
        """Microseconds of an eager call; the device is idle when a turn begins."""
        for _ in range(3):
            call()
        times = []
        for _ in range(turns):
            self.wait()
            times.append(host_us(call, NO_ARGUMENTS * calls, torch.cuda.synchronize if self.cuda else None))
        return self.slowest(times)

    def replays(self, call: Callable[[], Any], calls: int = 10) -> list[float]:
        """Microseconds a call in a graph of `calls`."""
        graph = capture([call] * calls, warm_up=2)
        times = []
        for _ in range(15):
            self.wait()
            times.append(device_us(graph.replay) / calls)
        return self.slowest(times)


def layer_times(
    here: Ranks,
    shape: Shape,
    tokens: int,
    whole: list[torch.Tensor],
    own: list[torch.Tensor],
    placement: ExpertPlacement,
) -> Times:
    experts, top_k, hidden, _ = shape
    dtype = whole[0].dtype
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(here.device, dtype)
    weights = torch.rand(tokens, top_k, generator=generator).to(here.device)
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices.to(here.device)
    first, last = tokens * here.rank // here.ranks, tokens * (here.rank + 1) // here.ranks
    inputs = (x[first:last], *own, weights[first:last], ids[first:last])
    part = (*inputs, placement)
    of_rank = -(-tokens // here.ranks)
    capacity = ExpertExchange.max_capacity(placement, of_rank, top_k)
    fixed = ExpertExchange(placement, capacity=capacity, device=here.device)
    variants = {"fp8": ExpertExchange(placement, capacity=capacity, device=here.device, wire="fp8")}
    most = ExpertExchange.max_capacity(placement, of_rank, top_k, rows="token")
    variants["tokens"] = ExpertExchange(placement, capacity=most, device=here.device, rows="token")
    for name, plain in (("direct", fixed), ("direct-tokens", variants["tokens"])):
        form = {"capacity": plain.capacity, "rows": plain.rows, "transport": "direct"}
        variants[name] = ExpertExchange(placement, device=here.device, **form)
    if tokens >= 256 or not here.cuda:
        expected_capacity = ExpertExchange.expected_capacity(placement, of_rank, top_k, factor=1.25)
        variants["1.25"] = ExpertExchange(placement, capacity=expected_capacity, device=here.device)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "one-gpu": lambda: fused_moe(x, *whole, weights, ids),
        "replicated": lambda: replicated_moe(x, *own, weights, ids, placement),
        "dispatched": lambda: dispatched_moe(*part),
        "dispatched-2chunks": lambda: dispatched_moe(*part, chunks=2),
        "dispatched-capacity": lambda: fixed(*inputs),
    }
    others: dict[str, Callable[[], torch.Tensor]] = {
        name: functools.partial(each, *inputs) for name, each in variants.items()
    }
    expected = calls["one-gpu"]().double()
    for name, call in calls.items():
        rows_of_rank = expected if name in ("one-gpu", "replicated") else expected[first:last]
        error = float((call().double() - rows_of_rank).norm() / expected.norm())
        if not error < 1e-2:
            raise AssertionError(f"{name}, {tokens} tokens: relative error {error:.3g}")
    for name, call in others.items():
        of_tokens = {"topk_weights": inputs[3]} if variants[name].rows == "token" else {}
        arrived, way = variants[name].dispatch(inputs[0], inputs[4], **of_tokens)
        variants[name].combine(torch.zeros_like(arrived.hidden_states), inputs[3], way)
        dropped = variants[name].overflow(way).sum()
        dist.all_reduce(dropped)
        error = float((call().double() - expected[first:last]).norm() / expected.norm())
        if int(dropped):
            print(f"dispatched, {name}, {tokens} tokens: {int(dropped)} routes dropped", flush=True)
        elif not error < (5e-2 if name == "fp8" else 1e-2):
            raise AssertionError(f"dispatched, {name}, {tokens} tokens: relative error {error:.3g}")
    rows = torch.empty(tokens, hidden, dtype=dtype, device=here.device)
    bins = placement.bins(ids[first:last]).reshape(-1)
    send_counts = [int(((bins // placement.slots) == rank).sum()) for rank in range(here.ranks)]
    arriving = torch.empty(here.ranks, dtype=torch.int64, device=here.device)
    dist.all_to_all_single(arriving, torch.tensor(send_counts, device=here.device))
    receive_counts = arriving.tolist()
    sent, received = (
        torch.empty(sum(n), hidden, dtype=dtype, device=here.device) for n in (send_counts, receive_counts)
    )
    counts = torch.zeros(here.ranks * placement.slots, dtype=torch.int32, device=here.device)
    other = torch.empty_like(counts)

    def exchange_of(fixed: ExpertExchange) -> Callable[[], None]:
        """Both collectives of a call."""
        there, back = (
            torch.empty(2, fixed.wire_bytes(hidden, dtype, way, top_k=top_k), dtype=torch.uint8, device=here.device)
            for way in (False, True)
        )

        def exchange() -> None:
            dist.all_to_all_single(there[0], there[1])
            dist.all_to_all_single(back[0], back[1])

        return exchange

    exchange_of_capacity = exchange_of(fixed)

    def exchange() -> None:
        dist.all_to_all_single(other, counts)
        dist.all_to_all_single(received, sent, receive_counts, send_counts)
        dist.all_to_all_single(sent, received, send_counts, receive_counts)

    times = {name: here.wall(call) for name, call in calls.items()}
    times["exchange-replicated"] = here.wall(lambda: dist.all_reduce(rows))
    times["exchange-dispatched"] = here.wall(exchange)
    times["exchange-capacity"] = here.wall(exchange_of_capacity)
    if here.cuda:
        for name in ("one-gpu", "replicated"):
            times[f"{name}-graph"] = here.replays(calls[name])
        times["dispatched-graph"] = here.replays(calls["dispatched-capacity"])
        times["exchange-replicated-graph"] = here.replays(lambda: dist.all_reduce(rows))
        times["exchange-dispatched-graph"] = here.replays(exchange)
        times["exchange-capacity-graph"] = here.replays(exchange_of_capacity)
        for name, call in others.items():
            times[f"dispatched-graph-{name}"] = here.replays(call)
            if variants[name].transport == "collective":
                times[f"exchange-capacity-{name}-graph"] = here.replays(exchange_of(variants[name]))
        for name in ("tokens", "direct", "direct-tokens"):
            times[f"dispatched-capacity-{name}"] = here.wall(others[name])
    else:
        times |= {f"dispatched-capacity-{name}": here.wall(call) for name, call in others.items()}
    return times


def collective_times(here: Ranks, size: int) -> Times:
    source, target = (torch.zeros(size // 2, dtype=torch.bfloat16, device=here.device) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {
        "all-reduce": lambda: dist.all_reduce(source),
        "all-to-all": lambda: dist.all_to_all_single(target, source),
    }
    if here.cuda:
        return {name: here.replays(call, 4) for name, call in calls.items()}
    return {name: here.wall(call, 3) for name, call in calls.items()}


def run(here: Ranks, small: bool, out: Path | None) -> None:
    gpu = bench.gpu_slug(torch.cuda.get_device_name()) if here.cuda else "cpu"
    session = bench.Session(here.device, gpu, [])
    log: Callable[[str], None] = bench.log if here.rank == 0 else lambda line: None
    for size in SIZES[: 2 if small else None]:
        case = bench.Case("collective", f"{size} bytes {here.ranks} ranks", (size, 1, 0, 0), [torch.zeros(1)])
        for impl, times in collective_times(here, size).items():
            session.add(case, impl, times)
            log(f"{impl} of {size:>11,} bytes: {statistics.median(times):9.1f} us")
    for shape in SMALL_SHAPES if small else SHAPES:
        experts, top_k, _, _ = shape
        whole = random_weights(shape, here.device, torch.float32 if small else torch.bfloat16)
        placement = ExpertPlacement.linear(experts, here.ranks)
        own = [placement.shard(each, here.rank) for each in whole]
        for tokens in SMALL_TOKENS if small else TOKENS:
            times = layer_times(here, shape, tokens, whole, own, placement)
            name = f"{layer_name(shape, tokens)} {here.ranks} ranks"
            case = bench.Case("parallel", name, (tokens, top_k, experts, 0), [torch.zeros(1)])
            for impl, each in times.items():
                session.add(case, impl, each)
            log(f"{name}: " + ", ".join(f"{impl} {statistics.median(each):.0f}" for impl, each in times.items()))
        del whole, own
        if here.cuda:
            torch.cuda.empty_cache()
    if here.rank == 0:
        bench.write_csv(session.rows, out or RESULTS / f"parallel_{gpu}.csv")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--small", action="store_true", help="two processes on the CPU, tiny sizes")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which all ranks are stopped")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.rank is not None:
        torch.set_num_threads(1)
        here = Ranks(args.rank, args.ranks, args.small)
        if here.cuda:
            torch.cuda.set_device(here.device)
        backend = "nccl" if here.cuda else "gloo"
        dist.init_process_group(backend, init_method=f"file://{args.store}", rank=args.rank, world_size=args.ranks)
        with torch.no_grad():
            run(here, args.small, args.out)
        dist.destroy_process_group()
        return 0
    ranks = 2 if args.small else torch.cuda.device_count()
    if ranks < 2:
        print(f"benchmarks/parallel.py: expected at least two GPUs, found {ranks}; --small runs on the CPU")
        return 2
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "NCCL_NVLS_ENABLE": "0"}
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, __file__, *(["--small"] if args.small else [])]
        own += ["--out", str(args.out)] if args.out else []
        processes = [
            subprocess.Popen(
                [*own, "--rank", str(rank), "--ranks", str(ranks), "--store", f"{folder}/store"], env=environment
            )
            for rank in range(ranks)
        ]
        until = time.monotonic() + args.limit
        while any(each.poll() is None for each in processes):
            if time.monotonic() > until or any(each.poll() for each in processes):
                for each in processes:
                    each.kill()
                break
            time.sleep(0.2)
        return max(abs(each.wait()) for each in processes)


if __name__ == "__main__":
    sys.exit(main())
