"""One layer of experts over several ranks, in both modes, checked against the layer on one rank.

python examples/expert_parallel.py                         # two CPU processes, gloo
torchrun --nproc-per-node 2 examples/expert_parallel.py    # two GPUs with NCCL, or CPUs if there are none
"""

from __future__ import annotations

import os
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moealign import fused_moe, route
from moealign.parallel import ExpertPlacement, dispatched_moe, replicated_moe

EXPERTS, TOP_K, HIDDEN, INNER, TOKENS = 32, 4, 256, 128, 512


def work(rank: int, ranks: int) -> None:
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= ranks
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max((os.cpu_count() or ranks) // ranks, 1))
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=ranks)

    generator = torch.Generator().manual_seed(0)  # the same layer and tokens on every rank
    up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) / HIDDEN**0.5
    down = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) / INNER**0.5
    tokens = torch.randn(ranks * TOKENS, HIDDEN, generator=generator).to(device)
    # An uneven load, as in real models.
    logits = tokens.cpu() @ torch.randn(HIDDEN, EXPERTS, generator=generator) + torch.linspace(8, 0, EXPERTS)
    weights, ids, layout = route(logits.to(device), TOP_K, block_size=16, expert_counts=True)

    loads = layout.expert_counts.cpu()
    linear = ExpertPlacement.linear(EXPERTS, ranks)
    placement = ExpertPlacement.balanced(loads, ranks, replicas=ranks)
    if rank == 0:
        print(f"{ranks} ranks on {device.type}; load of the busiest rank over the mean:")
        print(f"  linear placement: {linear.imbalance(loads):.2f}")
        print(f"  balanced placement with {ranks} copies: {placement.imbalance(loads):.2f}")

    expected = fused_moe(tokens, up.to(device), down.to(device), weights, ids)
    weights_here = placement.shard(up, rank).to(device), placement.shard(down, rank).to(device)
    tokens_here = slice(rank * TOKENS, (rank + 1) * TOKENS)
    modes = {
        "replicated tokens": lambda: (replicated_moe(tokens, *weights_here, weights, ids, placement), expected),
        "dispatched tokens": lambda: (
            dispatched_moe(
                tokens[tokens_here], *weights_here, weights[tokens_here], ids[tokens_here], placement, chunks=2
            ),
            expected[tokens_here],
        ),
    }
    for name, mode in modes.items():
        mode()
        dist.barrier()
        start = time.perf_counter()
        actual, reference = mode()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4)
        if rank == 0:
            print(f"{name}: equal to one rank's layer, {seconds * 1e3:.1f} ms")
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun
        work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    else:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        mp.spawn(work, (2,), nprocs=2)
