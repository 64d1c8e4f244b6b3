"""Times both modes of expert parallelism on this machine's GPUs, beside one GPU, and what the exchange costs alone.

    PYTHONPATH=src python3 benchmarks/parallel.py            # every GPU; writes benchmarks/results/parallel_<gpu>.csv
    PYTHONPATH=src python3 benchmarks/parallel.py --small    # two processes with gloo, to see that it runs

The shapes and token counts of the experts' benchmark, bf16.  `tokens` is the whole batch: one GPU has all of it, so has
each rank of `replicated`, and `dispatched` shares it out.  Wall time of an eager call between two barriers, the slowest
rank; `-graph` is a CUDA graph replay, for what waits for nothing.  `exchange-...` are that mode's collectives alone, of
the same sizes.  `collective` rows are the terms of the model in docs/parallel.md.
"""

from __future__ import annotations

import argparse
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

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src")]

from moealign import bench, fused_moe  # noqa: E402
from moealign.parallel import ExpertPlacement, dispatched_moe, replicated_moe  # noqa: E402

SHAPES = [(128, 8, 2048, 768), (8, 2, 4096, 14336), (256, 8, 7168, 1024)]  # experts, top_k, hidden, inner
TOKENS = [1, 16, 64, 256, 1024, 4096]
SMALL_SHAPES, SMALL_TOKENS = [(8, 2, 32, 16)], [1, 6]
SIZES = [2**10, 2**16, 2**20, 2**24, 2**28]  # bytes that a rank gives to a collective

Times = dict[str, list[float]]


class Ranks:
    """This process among the others."""

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
        """Of each turn the time of the slowest rank."""
        every = torch.tensor(times, dtype=torch.float64, device=self.device)
        dist.all_reduce(every, op=dist.ReduceOp.MAX)
        return [float(each) for each in every]

    def wall(self, call: Callable[[], Any], turns: int = 15, calls: int = 4) -> list[float]:
        """Microseconds a call, eager, the device emptied between turns."""
        for _ in range(3):
            call()
        times = []
        for _ in range(turns):
            self.wait()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            if self.cuda:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / calls * 1e6)
        return self.slowest(times)

    def graphed(self, call: Callable[[], Any], calls: int = 10) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        return graph.replay

    def replays(self, call: Callable[[], Any], calls: int = 10) -> list[float]:
        """Microseconds a call in a graph of `calls`."""
        replay = self.graphed(call, calls)
        times = []
        for _ in range(15):
            self.wait()
            start, end = bench.event_pair()
            start.record()
            replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / calls)
        return self.slowest(times)


def layer_times(here: Ranks, shape: tuple[int, ...], tokens: int, whole: list[torch.Tensor], own: list[torch.Tensor],
                placement: ExpertPlacement) -> Times:  # fmt: skip
    experts, top_k, hidden, _ = shape
    dtype = whole[0].dtype
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(here.device, dtype)
    weights = torch.rand(tokens, top_k, generator=generator).to(here.device)
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices.to(here.device)
    first, last = tokens * here.rank // here.ranks, tokens * (here.rank + 1) // here.ranks
    part = (x[first:last], *own, weights[first:last], ids[first:last], placement)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "one-gpu": lambda: fused_moe(x, *whole, weights, ids),
        "replicated": lambda: replicated_moe(x, *own, weights, ids, placement),
        "dispatched": lambda: dispatched_moe(*part),
        "dispatched-2chunks": lambda: dispatched_moe(*part, chunks=2),
    }
    want = calls["one-gpu"]().double()
    for name, call in calls.items():
        part_of = want if name in ("one-gpu", "replicated") else want[first:last]
        error = float((call().double() - part_of).norm() / want.norm())
        if not error < 1e-2:
            raise AssertionError(f"{name}, {tokens} tokens: relative error {error:.3g}")
    rows = torch.empty(tokens, hidden, dtype=dtype, device=here.device)
    bins = placement.bins(ids[first:last]).reshape(-1)
    to = [int(((bins // placement.slots) == rank).sum()) for rank in range(here.ranks)]
    came = torch.empty(here.ranks, dtype=torch.int64, device=here.device)
    dist.all_to_all_single(came, torch.tensor(to, device=here.device))
    back = came.tolist()
    sent, received = (torch.empty(sum(n), hidden, dtype=dtype, device=here.device) for n in (to, back))
    counts = torch.zeros(here.ranks * placement.slots, dtype=torch.int32, device=here.device)
    other = torch.empty_like(counts)

    def exchange() -> None:
        dist.all_to_all_single(other, counts)
        dist.all_to_all_single(received, sent, back, to)
        dist.all_to_all_single(sent, received, to, back)

    times = {name: here.wall(call) for name, call in calls.items()}
    times["exchange-replicated"] = here.wall(lambda: dist.all_reduce(rows))
    times["exchange-dispatched"] = here.wall(exchange)
    if here.cuda:
        for name in ("one-gpu", "replicated"):
            times[f"{name}-graph"] = here.replays(calls[name])
        times["exchange-replicated-graph"] = here.replays(lambda: dist.all_reduce(rows))
        times["exchange-dispatched-graph"] = here.replays(exchange)
    return times


def collective_times(here: Ranks, size: int) -> Times:
    give, take = (torch.zeros(size // 2, dtype=torch.bfloat16, device=here.device) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {
        "all-reduce": lambda: dist.all_reduce(give),
        "all-to-all": lambda: dist.all_to_all_single(take, give),
    }
    if here.cuda:
        return {name: here.replays(call, 4) for name, call in calls.items()}
    return {name: here.wall(call, 3) for name, call in calls.items()}


def work(here: Ranks, small: bool, out: Path | None) -> None:
    gpu = bench.gpu_slug(torch.cuda.get_device_name()) if here.cuda else "cpu"
    session = bench.Session(here.device, gpu, [])
    say: Callable[[str], None] = bench.say if here.rank == 0 else lambda line: None
    for size in SIZES[: 2 if small else None]:
        case = bench.Work("collective", f"{size} bytes {here.ranks} ranks", (size, 1, 0, 0), [torch.zeros(1)])
        for impl, times in collective_times(here, size).items():
            session.add(case, impl, times)
            say(f"{impl} of {size:>11,} bytes: {statistics.median(times):9.1f} us")
    for shape in SMALL_SHAPES if small else SHAPES:
        experts, top_k, hidden, inner = shape
        generator = torch.Generator(here.device).manual_seed(0)
        dtype = torch.float32 if small else torch.bfloat16
        whole = [
            torch.randn(size, generator=generator, device=here.device, dtype=dtype) * size[2] ** -0.5
            for size in ((experts, 2 * inner, hidden), (experts, hidden, inner))
        ]
        placement = ExpertPlacement.linear(experts, here.ranks)
        own = [placement.shard(each, here.rank) for each in whole]
        for tokens in SMALL_TOKENS if small else TOKENS:
            times = layer_times(here, shape, tokens, whole, own, placement)
            name = f"T{tokens}-k{top_k}-E{experts}-H{hidden}-I{inner} {here.ranks} ranks"
            case = bench.Work("parallel", name, (tokens, top_k, experts, 0), [torch.zeros(1)])
            for impl, each in times.items():
                session.add(case, impl, each)
            mid = {impl: statistics.median(each) for impl, each in times.items()}
            say(f"{name}: " + ", ".join(f"{impl} {value:.0f}" for impl, value in mid.items()))
        del whole, own
        if here.cuda:
            torch.cuda.empty_cache()
    if here.rank == 0:
        bench.write_csv(session.rows, out or HERE / "results" / f"parallel_{gpu}.csv")


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
            work(here, args.small, args.out)
        dist.destroy_process_group()
        return 0
    ranks = 2 if args.small else torch.cuda.device_count()
    if ranks < 2:
        print(f"benchmarks/parallel.py: expected two GPUs at least, found {ranks}; --small runs on the CPU")
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
