"""The long random run: backends against the oracle until told to stop.  Not part of CI.

    python tests/commands/fuzz.py --cases 100000 --backend cpu,reference
    python tests/commands/fuzz.py --cases 100000 --backend cuda --few 10

Of every 250 cases 200 are those of ``moealign check`` (:func:`moealign.testing.check_backend`) and 50 are wilder: any
strides and rank, ids and maps far out of range, every block size to 1,024, experts to 65,536, canaries around the
outputs.  One large case comes on top of every 500, of up to 4 million routes.  Stops at the first difference with exit
status 1; the seed printed repeats it: ``--seed SEED --cases 250``.

A GPU backend compiles a kernel for each combination of E, B, dtypes and outputs.  ``--few N`` draws these from N
combinations only, and makes every case a wild one, of 0 to 20,000 routes: thousands a second instead of ten.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import torch
from rich.progress import Progress

from moealign import align, capacity
from moealign.layout import EXTRAS, OUTPUTS
from moealign.testing import check_backend, difference, expected_layout, oracle_align

BATCH, WILD = 200, 50
CANARY = -99
DTYPES = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]


def values(draw: random.Random, count: int, experts: int, dtype: torch.dtype, reach: int) -> torch.Tensor:
    """`count` values around [0, experts), clamped to the dtype; `reach` of a hundred are anything the dtype holds."""
    info = torch.iinfo(dtype)
    top = experts - 1 if draw.random() < 0.7 else min(experts - 1, draw.choice((0, 1, 3)))
    numbers = [
        draw.choice((info.min, info.max, -1, experts, draw.randint(info.min, info.max), 2**32 + 3, -(2**32), 2**31))
        if draw.randrange(100) < reach
        else draw.randint(0, top)
        for _ in range(count)
    ]
    numbers = [min(max(number, info.min), info.max) for number in numbers]
    wrapped = [number - 2**info.bits if number >= 2 ** (info.bits - 1) else number for number in numbers]
    return torch.tensor(wrapped, dtype=getattr(torch, f"int{info.bits}")).view(dtype)


def view(draw: random.Random, base: torch.Tensor) -> torch.Tensor:
    """A view of `base`, 1-D, with some shape and strides: 0-d to 4-d, transposed, stepped, expanded, offset."""
    count = base.numel()
    kind = draw.choice(("plain", "0-d", "stepped", "transposed", "columns", "expanded", "permuted", "offset"))
    width = draw.choice((1, 2, 3, 6, 8))
    rows = count // width
    if kind == "0-d" and count:
        return base[count // 2]
    if kind == "stepped":
        return base[:: draw.randint(2, 5)]
    if kind == "transposed":
        return base[: rows * width].view(width, rows).T
    if kind == "columns":
        return base[: rows * width].view(rows, width)[:, :: draw.randint(1, 2)]
    if kind == "expanded":
        return base[: rows or count].unsqueeze(1).expand(-1, width) if draw.random() < 0.5 else base[:1].expand(count)
    if kind == "permuted":
        depth = rows // 2
        return base[: 2 * depth * width].view(2, depth, width).permute(draw.sample(range(3), 3))
    if kind == "offset":
        return base[1:]
    return base[: rows * width].view(rows, width)


def to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same view of the same storage, on `device`."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def count_of(draw: random.Random, few: int) -> int:
    """How many routes, before a view is taken of them; with `few` kernels also as many as the larger paths take."""
    count = draw.choice((1, 7, 33, draw.randint(0, 400)))
    if few and draw.random() < 0.02:
        count = draw.choice((draw.randint(400, 4_000), draw.randint(4_000, 20_000)))
    return count


def wild(name: str, device: torch.device, seed: str, few: int = 0) -> tuple[str, str | None]:
    """One case without regard to what is sensible, on buffers that lie between canaries."""
    draw = random.Random(seed)
    facts = random.Random(f"combination {draw.randrange(few)}") if few else draw  # what kernels are compiled for
    experts = facts.choice((1, 2, facts.randint(1, 70), facts.randint(1, 300), facts.randint(300, 3000)))
    if facts.random() < 0.01:
        experts = facts.randint(3_000, 65_536)
    ids = view(draw, values(draw, count_of(draw, few), experts, facts.choice(DTYPES), 10))
    block_size = facts.choice((1, 2, 16, facts.randint(1, 64), facts.randint(1, 1024)))
    if few:  # the oracle is a loop over rows: many cases rather than long ones
        block_size = min(block_size, -(-20_000 // experts))
    call: dict[str, object] = {"block_size": block_size}
    call |= {"num_experts": experts, "pad_sorted_ids": draw.random() < 0.5, "ignore_invalid_experts": False}
    extras = [extra for extra in EXTRAS if facts.random() < 0.6]
    tensors: dict[str, torch.Tensor] = {}
    if facts.random() < 0.5:
        step, reach = draw.randint(1, 3), draw.choice((0, 30, 100))
        tensors["expert_map"] = values(draw, experts * step, experts, facts.choice(DTYPES), reach)[::step]
        call["ignore_invalid_experts"] = facts.random() < 0.5
        if not call["ignore_invalid_experts"]:
            extras = [extra for extra in extras if extra != "scatter_idx"]
    if facts.random() < 0.3:
        valid = draw.choice((0, -1, 2**31 - 1, -(2**31), draw.randint(0, 400)))
        tensors["num_valid_tokens"] = torch.tensor([valid], dtype=torch.int32)
    room = capacity(
        ids.numel(), block_size=call["block_size"], num_experts=experts, pad_sorted_ids=call["pad_sorted_ids"]
    )
    poison, gap = draw.choice((-7, 0x5A5A5A5A)), draw.randint(1, 9)
    wanted = [field for field in OUTPUTS if field not in EXTRAS or field in extras]
    sizes = [getattr(room, field) for field in wanted]
    slab = torch.full((sum(sizes) + gap * (len(wanted) + 1),), CANARY, dtype=torch.int32, device=device)
    out, start, canaries = {}, gap, torch.ones(slab.numel(), dtype=torch.bool)
    for field, size in zip(wanted, sizes, strict=True):
        out[field] = slab[start : start + size].fill_(poison).view((-1, 1) if field == "scatter_idx" else (-1,))
        canaries[start : start + size] = False
        start += size + gap
    word = torch.zeros(1, dtype=torch.int32, device=device)
    moved = {key: to(tensor, device) for key, tensor in tensors.items()}
    align(to(ids, device), **call, **moved, **dict.fromkeys(extras, True), out=out, error_word=word, backend=name)
    expected = oracle_align(ids, **call, **tensors)
    found = difference(out, expected)
    if found is None and word.tolist() != expected["error_word"]:
        found = f"error_word: expected {expected['error_word'][0]}, got {word.item()}"
    if found is None and not (slab.cpu()[canaries] == CANARY).all():
        found = "an element outside the buffers was written"
    inputs = {key: (list(t.shape), t.stride(), t.dtype) for key, t in {"topk_ids": ids, **tensors}.items()}
    return f"wild {seed!r}: {inputs}, {call}, {extras}", found


def large(name: str, device: torch.device, seed: int) -> tuple[str, str | None]:
    """One case of up to 60,000 routes, or of up to 4 million against the fast oracle."""
    draw = random.Random(seed)
    routes, experts, size = (
        draw.randint(5_000, 60_000),
        draw.choice((8, 64, 256, 512, 2000)),
        draw.choice((16, 64, 100)),
    )
    if huge := draw.random() < 0.2:
        routes = int(60_000 * (4_000_000 / 60_000) ** draw.random())
    ids = torch.randint(-1, experts + draw.choice((0, 2)), (routes,), generator=torch.Generator().manual_seed(seed))
    if draw.random() < 0.3:
        ids[draw.randint(0, routes) :] = draw.randrange(experts)
    call = {"block_size": size, "num_experts": experts}
    layout = align(ids.to(device), **call, **dict.fromkeys(EXTRAS, True), backend=name)
    if huge:
        length = layout.sorted_token_ids.numel()
        expected = expected_layout(ids.numpy(), **call, length=length)
        expected = {field: values.tolist() for field, values in expected.items() if field in OUTPUTS}
    else:
        expected = oracle_align(ids, **call)
    return f"large: {routes} routes, {call}", difference(layout, expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="random cases for each backend")
    parser.add_argument("--backend", default="cpu", help="names joined by commas")
    parser.add_argument("--device", default=None, help="where the tensors are; by default where the backend runs")
    parser.add_argument("--few", type=int, default=0, metavar="N", help="combinations of E, B, dtypes, outputs; 0: any")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shown = sys.stdout.isatty()
    with Progress(disable=not shown) as progress:
        for name in options.backend.split(","):
            here = "cuda" if name in ("cuda", "triton") else "cpu"
            device = torch.device(options.device or here)
            bar = progress.add_task(name, total=options.cases)
            start, done = time.monotonic(), 0
            said = start
            for seed in range(options.seed, options.seed + -(-options.cases // (BATCH + WILD))):
                sensible = 0 if options.few else BATCH
                batch = list(check_backend(name, device, sensible, seed)) if sensible else []
                batch += [
                    wild(name, device, f"{seed}.{number}", options.few) for number in range(BATCH + WILD - sensible)
                ]
                if seed % 2 == 0:
                    batch.append(large(name, device, seed))
                for case, found in batch:
                    if found is not None:
                        print(f"{name}, seed {seed}: {case}: {found}")
                        sys.exit(1)
                done += len(batch) - (seed % 2 == 0)
                progress.update(bar, completed=done)
                if not shown and time.monotonic() - said > 20:
                    said = time.monotonic()
                    print(f"{name}: {done:,} of {options.cases:,} cases, {said - start:.0f} s", flush=True)
            print(f"{name} on {device}: {done:,} cases and no difference, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
