#!/usr/bin/env python3
"""Every path of the GPU backends once, at a small size, against the oracle: the program for compute-sanitizer.

    compute-sanitizer --tool racecheck python3 tests/commands/gpu_sanitize.py
    python tests/commands/gpu_sanitize.py --device cpu --backends cpu,reference     # the program itself, without a GPU

Inputs and poisoned buffers are made on the host, so that few kernels run but ours.  benchmarks/reliability.sh runs it
under all four tools.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch

import moealign
from moealign.layout import EXTRAS
from moealign.testing import difference, oracle_align, oracle_align_batched, poisoned

POISON = -7
BATCHED_EXTRAS = tuple(name for name in EXTRAS if name != "scatter_idx")


class Case(NamedTuple):
    path: str  # that it takes on backend `cuda`
    tokens: int
    top_k: int
    num_experts: int
    block_size: int
    dtype: torch.dtype = torch.int32
    ids: str = "uniform"  # or: bad (some outside the range), one-expert, none (all -1)
    map: torch.dtype | None = None
    ignore: bool = False
    valid: int | None = None
    extras: bool = True
    pad: bool = False
    strided: bool = False
    shift: int = 0  # elements from a 16-byte boundary to the buffers of out=


# fmt: off
CASES = [
    Case("warp, no routes", 0, 8, 256, 16),
    Case("warp, one route", 1, 1, 256, 16),
    Case("warp", 1, 8, 256, 16, ids="bad"),
    Case("pairwise", 5, 8, 256, 16, torch.int64, map=torch.int32, ignore=True, valid=4),
    Case("warp, three outputs", 4, 8, 256, 16, extras=False, shift=1),
    Case("pairwise, few experts", 12, 8, 8, 7, torch.uint8, map=torch.int64),
    Case("pairwise, one hot expert", 32, 2, 8, 16, ids="one-expert"),
    Case("pairwise, 256 routes", 32, 8, 256, 16, ids="bad", valid=30),
    Case("pairwise, three outputs", 32, 8, 256, 16, extras=False),
    Case("independent, 512 experts", 32, 10, 512, 16, torch.int16, pad=True),
    Case("independent, several chunks", 375, 8, 256, 64, torch.int64, map=torch.int32, ignore=True, valid=370),
    Case("independent, odd sizes", 333, 9, 160, 100, ids="one-expert", strided=True, shift=3),
    Case("independent, one expert, blocks of one", 700, 3, 1, 1, ids="bad"),
    Case("cluster", 700, 8, 256, 64, ids="bad"),
    Case("cluster, three outputs", 1000, 8, 256, 128, extras=False, shift=1),
    Case("cluster, map and valid", 1500, 8, 256, 128, torch.int64, map=torch.int64, ignore=True, valid=1400),
    Case("cluster, odd sizes", 1777, 9, 161, 100, ids="one-expert", strided=True, shift=3),
    Case("cluster, max routes", 4001, 8, 256, 128, ids="bad"),
    Case("cluster, few experts", 9001, 3, 7, 128, torch.int16, map=torch.int32),
    Case("grid", 4200, 8, 256, 128, ids="bad"),
    Case("grid, three outputs", 4200, 8, 256, 128, extras=False, shift=1),
    Case("grid, map and valid", 4200, 8, 256, 128, torch.int64, map=torch.int64, ignore=True, valid=4100),
    Case("grid, few experts", 17001, 2, 8, 128, torch.int16, ids="one-expert", map=torch.int32),
    Case("grid, nothing kept", 4200, 8, 128, 64, ids="none"),
    Case("tiles", 4200, 8, 256, 128, ids="bad"),
    Case("tiles, three outputs", 4200, 8, 256, 128, extras=False, shift=1),
    Case("tiles, map and valid", 4200, 8, 256, 128, torch.int64, map=torch.int64, ignore=True, valid=4100),
    Case("tiles, few experts", 17001, 2, 8, 1, torch.int16, ids="one-expert", strided=True),
    Case("tiles, nothing kept", 4200, 8, 128, 64, ids="none"),
    Case("tiles, 2,000 experts", 4200, 8, 2000, 7, torch.int64, ids="bad", valid=4199),
    Case("pairwise, 3,000 experts", 5, 8, 3000, 16, ids="bad"),
    Case("independent, 3,000 experts", 64, 8, 3000, 16, map=torch.int32, ignore=True),
    Case("grid, 3,000 experts", 2500, 8, 3000, 7, torch.int64, ids="bad", valid=2499),
    Case("radix, 65,536 experts", 125, 8, 65536, 16, map=torch.int32),
    Case("radix, three outputs", 2500, 8, 65536, 16, torch.int64, ids="bad", extras=False),
]
BATCHED = [  # batches, rows of a batch, block_size, dtype, extras
    (0, 16, 16, torch.int32, True),
    (8, 128, 16, torch.int32, True),
    (8, 128, 16, torch.int64, False),
    (33, 17, 7, torch.int16, True),
    (256, 64, 64, torch.int32, True),
    (1500, 5, 4, torch.int64, True),
]
# fmt: on


def ids_of(case: Case, draw: random.Random) -> torch.Tensor:
    low, high = {"uniform": (0, case.num_experts - 1), "bad": (-2, case.num_experts + 1)}.get(case.ids, (0, 0))
    if case.ids == "none":
        low = high = -1
    if case.dtype is torch.uint8:
        low, high = max(low, 0), min(high, 255)
    values = [draw.randint(low, high) for _ in range(case.tokens * case.top_k)]
    if case.ids == "one-expert":
        values = [case.num_experts // 2] * len(values)
    ids = torch.tensor(values, dtype=case.dtype).reshape(case.tokens, case.top_k)
    return ids.T.contiguous().T if case.strided else ids


def on_device(out: moealign.BlockLayout, device: torch.device, shift: int) -> dict[str, torch.Tensor]:
    """The buffers of `out` on `device`, each `shift` elements past an aligned address."""
    moved = {}
    for name in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", *EXTRAS):
        tensor = getattr(out, name)
        if tensor is not None:
            room = torch.cat((torch.full((shift,), POISON, dtype=torch.int32), tensor.reshape(-1))).to(device)
            moved[name] = room[shift:].view(tensor.shape)
    return moved


def run_align(case: Case, backend: str, device: torch.device, draw: random.Random) -> str | None:
    ids = ids_of(case, draw)
    expert_map = None
    if case.map is not None:  # every second expert is local; two values must count as -1
        expert_map = torch.tensor([e // 2 if e % 2 else -1 for e in range(case.num_experts)], dtype=case.map)
        expert_map[:2] = torch.tensor([-5, case.num_experts][: min(2, case.num_experts)])
    valid = None if case.valid is None else torch.tensor([case.valid], dtype=torch.int32)
    sizes: dict[str, Any] = {"block_size": case.block_size, "num_experts": case.num_experts}
    flags = {"pad_sorted_ids": case.pad, "ignore_invalid_experts": case.ignore}
    expected = oracle_align(ids, **sizes, **flags, expert_map=expert_map, num_valid_tokens=valid)

    takes_scatter = expert_map is None or case.ignore
    extras = (EXTRAS if takes_scatter else BATCHED_EXTRAS) if case.extras else ()
    capacity = moealign.capacity(ids.numel(), **sizes, pad_sorted_ids=case.pad)
    out = on_device(poisoned(capacity, extras, "cpu", POISON), device, case.shift)
    word = torch.zeros(1, dtype=torch.int32).to(device)
    there = ids.to(device)
    if case.strided:
        there = ids.T.contiguous().to(device).T
    moved = {
        "expert_map": None if expert_map is None else expert_map.to(device),
        "num_valid_tokens": None if valid is None else valid.to(device),
    }
    wanted = dict.fromkeys(extras, True)
    if backend == "cuda" and case.path.startswith("tiles"):  # at sizes that the grid path would take
        importlib.import_module("moealign.backend.cuda.align")._grid = lambda *facts: None
    moealign.align(there, **sizes, **flags, **moved, **wanted, error_word=word, out=out, backend=backend)
    found = difference({name: tensor.cpu() for name, tensor in out.items()}, expected)
    if found is None and word.tolist() != expected["error_word"]:
        found = f"error_word: expected {expected['error_word']}, got {word.tolist()}"
    if found is None and case.valid is None:  # once more as vLLM calls it, which allocates
        args = (there, case.block_size, case.num_experts, moved["expert_map"], case.pad, case.ignore)
        names = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")
        results = moealign.moe_align_block_size(*args, backend=backend)
        found = difference({n: tensor.cpu() for n, tensor in zip(names, results, strict=True)}, expected)
    return found


def run_batched(case: tuple[Any, ...], backend: str, device: torch.device, draw: random.Random) -> str | None:
    batches, most, block_size, dtype, with_extras = case
    counts = torch.tensor([draw.randint(-1, most + 1) for _ in range(batches)], dtype=dtype)
    expected = oracle_align_batched(counts, max_tokens_per_batch=most, block_size=block_size)
    extras = BATCHED_EXTRAS if with_extras else ()
    capacity = moealign.capacity_batched(most, block_size=block_size, num_batches=batches)
    out = on_device(poisoned(capacity, extras, "cpu", POISON), device, 0)
    word = torch.zeros(1, dtype=torch.int32).to(device)
    moealign.align_batched(
        counts.to(device),
        max_tokens_per_batch=most,
        block_size=block_size,
        error_word=word,
        out=out,
        backend=backend,
        **dict.fromkeys(extras, True),  # type: ignore[arg-type]
    )
    found = difference({name: tensor.cpu() for name, tensor in out.items()}, expected)
    if found is None and word.tolist() != expected["error_word"]:
        found = f"error_word: expected {expected['error_word']}, got {word.tolist()}"
    return found


#: tokens, experts, top_k, dtype and options of route: one launch without and with a barrier, two launches, the mean,
#: scores that warps share;
#: then the same of replayed ids and factors of experts, each by its dtype, and shared experts.
ROUTED: list[tuple[int, int, int, torch.dtype, dict[str, Any]]] = [
    (1, 256, 8, torch.bfloat16, {}),
    (1, 60, 4, torch.float32, {"renormalize": False}),
    (3, 128, 8, torch.float32, {"expert_counts": True, "positions": True}),
    (8, 256, 8, torch.float16, {}),
    (40, 256, 8, torch.bfloat16, {"block_rows": True}),
    (300, 64, 8, torch.float32, {"scoring": "sigmoid", "num_groups": 8, "topk_groups": 4, "bias": True, "scale": 2.5}),
    (33, 384, 32, torch.float32, {"mean_probability": True}),
    (5, 60, 4, torch.float32, {"num_groups": 6, "topk_groups": 3, "bias": True}),
    (300, 896, 16, torch.bfloat16, {"bias": True, "renormalize": False}),
    (40, 256, 6, torch.float32, {"scoring": "sqrtsoftplus", "bias": True, "scale": 1.5}),
    (40, 768, 12, torch.bfloat16, {"bias": True, "renormalize": False}),
    (1, 256, 8, torch.float32, {"bias": True}),
    (1, 896, 16, torch.float32, {"scoring": "sigmoid", "bias": True}),
    (1, 256, 8, torch.bfloat16, {"replay": torch.int32, "shared_experts": 1}),
    (3, 60, 4, torch.float32, {"replay": torch.int64, "factors": torch.float32, "renormalize": False}),
    (8, 128, 8, torch.bfloat16, {"factors": torch.bfloat16, "shared_experts": 2}),
    (40, 64, 8, torch.float32, {"replay": torch.int64, "factors": torch.float16, "shared_experts": 1}),
    (300, 64, 8, torch.float32, {"factors": torch.float32, "shared_experts": 32, "bias": True}),
    (33, 384, 8, torch.float16, {"replay": torch.int32, "mean_probability": True, "shared_experts": 1}),
]


def run_routed(case: tuple[Any, ...], backend: str, device: torch.device, draw: random.Random) -> str | None:
    tokens, experts, top_k, dtype, options = case
    options = dict(options)
    generator = torch.Generator().manual_seed(draw.randint(0, 2**31))
    logits = torch.randn(tokens, experts, generator=generator).to(dtype)
    tensors = {"correction_bias": torch.rand(experts, generator=generator)} if options.pop("bias", False) else {}
    if (ids := options.pop("replay", None)) is not None:  # some are no experts, one of them far outside
        tensors["replay_ids"] = torch.randint(-2, experts + 2, (tokens, top_k), generator=generator).to(ids)
        tensors["replay_ids"][0, 0] = torch.iinfo(ids).max
    if (factors := options.pop("factors", None)) is not None:
        tensors["expert_scale"] = torch.rand(experts, generator=generator).to(factors)
    valid = torch.tensor([tokens - tokens // 4], dtype=torch.int32)
    call = {"block_size": 16, **options}
    places = ((backend, device), ("reference", torch.device("cpu")))
    (weights, ids, layout, *_), (want, want_ids, want_layout, *_) = (
        moealign.route(
            logits.to(where),
            top_k,
            num_valid_tokens=valid.to(where),
            **{key: tensor.to(where) for key, tensor in tensors.items()},
            **call,
            backend=name,
        )
        for name, where in places
    )
    if not torch.equal(ids.cpu(), want_ids):
        return "ids differ"
    if not torch.allclose(weights.cpu(), want, rtol=2e-6, atol=1e-9):
        return "weights differ"
    same = all(torch.equal(a.cpu(), b) for a, b in zip(layout, want_layout, strict=True))
    return None if same else "layouts differ"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", default="cuda,triton")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("tests/commands/gpu_sanitize.py: expected a GPU that torch can use, found none")
        return 2
    device = torch.device(args.device)
    wrong = ran = 0
    for backend in args.backends.split(","):
        reason = moealign.backends()[backend]
        if reason is not None:
            print(f"{backend}: {reason}")
            wrong += 1
            continue
        draw = random.Random(20261123)
        cases: list[tuple[str, Any, Any]] = [(case.path, run_align, case) for case in CASES]
        cases += [(f"batched, {batch[0]} x {batch[1]}", run_batched, batch) for batch in BATCHED]
        cases += [(f"route, {each[0]} x {each[1]}, top {each[2]}", run_routed, each) for each in ROUTED]
        for name, run, case in cases:
            if args.only not in name:
                continue
            start = time.perf_counter()
            try:
                found = run(case, backend, device, draw)
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            ran += 1
            wrong += found is not None
            print(f"{backend:<9} {name:<40} {time.perf_counter() - start:6.2f} s  {found or 'equal'}", flush=True)
    print(f"{ran} cases, {wrong} wrong")
    return int(wrong > 0 or ran == 0)


if __name__ == "__main__":
    sys.exit(main())
