"""The long random run: backends against the oracle until told to stop.  Not part of CI.

    python tests/fuzz.py --cases 100000 --backend cpu,reference
    python tests/fuzz.py --cases 100000 --backend cuda

Cases are those of ``moealign check`` (:func:`moealign.testing.check_backend`), from a new seed every 200 cases, and one
large case every 500.  Stops at the first difference with exit status 1 and the words to repeat it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import torch
from rich.progress import Progress

from moealign import align
from moealign.layout import EXTRAS
from moealign.testing import check_backend, difference, oracle_align

BATCH = 200


def large(name: str, device: torch.device, seed: int) -> tuple[str, str | None]:
    """One case of up to 60,000 routes."""
    draw = random.Random(seed)
    routes, experts, size = (
        draw.randint(5_000, 60_000),
        draw.choice((8, 64, 256, 512, 2000)),
        draw.choice((16, 64, 100)),
    )
    ids = torch.randint(-1, experts + draw.choice((0, 2)), (routes,), generator=torch.Generator().manual_seed(seed))
    if draw.random() < 0.3:
        ids[draw.randint(0, routes) :] = draw.randrange(experts)
    call = {"block_size": size, "num_experts": experts}
    layout = align(ids.to(device), **call, **dict.fromkeys(EXTRAS, True), backend=name)
    return f"large: {routes} routes, {call}", difference(layout, oracle_align(ids, **call))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="random cases for each backend")
    parser.add_argument("--backend", default="cpu", help="names joined by commas")
    parser.add_argument("--device", default=None, help="where the tensors are; by default where the backend runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with Progress(disable=not sys.stdout.isatty()) as progress:
        for name in options.backend.split(","):
            here = "cuda" if name in ("cuda", "triton") else "cpu"
            device = torch.device(options.device or here)
            bar = progress.add_task(name, total=options.cases)
            start, done = time.monotonic(), 0
            for seed in range(options.seed, options.seed + -(-options.cases // BATCH)):
                batch = list(check_backend(name, device, min(BATCH, options.cases - done), seed))
                if seed % 2 == 0:
                    batch.append(large(name, device, seed))
                for said, found in batch:
                    if found is not None:
                        print(f"{name}, seed {seed}: {said}: {found}")
                        sys.exit(1)
                done += len(batch) - (seed % 2 == 0)
                progress.update(bar, completed=done)
            print(f"{name} on {device}: {done:,} cases and no difference, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
