"""The benches: which sizes are timed, and which candidates at each."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from ..layout import EXTRAS
from .candidates import Candidate, argsort_candidate, moealign_candidate
from .cases import Case, Size, case_name
from .names import ARGSORT, find_peer
from .peers import MAX_EXPERTS, argument_count, sglang_candidate, vllm_candidate
from .progress import log
from .session import Session, time_cpu, time_graphs, time_host

# Sizes: (tokens, top_k, num_experts, block_size); batched: (batches, max_tokens_per_batch, block_size).
DECODE = [(tokens, 8, 256, 16) for tokens in (1, 4, 8, 16, 32, 64, 128)]
MIDDLE = [(256, 8, 256, 64), (512, 8, 256, 64)]
PREFILL = [(tokens, 8, 256, 128) for tokens in (1024, 2048, 4096, 8192, 16384, 32768, 65536)]
OTHER = [(32, 4, 128, 16), (32, 2, 8, 16), (8192, 2, 8, 128), (32, 10, 512, 16)]
E256 = [*DECODE, *MIDDLE, *PREFILL]
SIZES = [(1, 1, 256, 16), *E256, *OTHER]
EXTRAS_SIZES = [size for size in E256 if size[0] in (1, 4, 8, 32, 128, 256, 1024, 2048, 8192, 65536)]
SKEW_SIZES = [size for size in E256 if size[0] in (1, 32, 256, 2048, 8192, 65536)]
MAP_SIZES = [(32, 8, 256, 16), (256, 8, 256, 64), (2048, 8, 256, 128), (16384, 8, 256, 128)]
BATCHED_SIZES = [(8, 128, 16), (32, 512, 64), (64, 512, 64), (256, 256, 64), (256, 1024, 128), (32, 8192, 128)]
LARGE_E = [(1024, 8, experts, 16) for experts in (1024, 2048, 4096, 8192, 16384, 32768, 65536)]
SCALE_SIZES = [
    *((routes // 8, 8, experts, 128) for routes in (2**20, 2**21, 2**22) for experts in (8, 64, 256, 512, 1024)),
    *((2**21, 8, experts, 128) for experts in (8, 256, 1024)),
]
HOST_SIZES = [(1, 8, 256, 16), (32, 8, 256, 16), (1024, 8, 256, 128)]
CPU_SIZES = [(1, 8, 256, 16), (32, 8, 256, 16), (256, 8, 256, 64), (2048, 8, 256, 128), (65536, 8, 256, 128)]

# What random shapes are drawn from: experts of models and odd numbers of them.
RANDOM_SHAPES, RANDOM_ROUTES = 200, 262_144
RANDOM_EXPERTS = (8, 16, 32, 60, 64, 128, 160, 256, 384, 512, 7, 37, 100, 257, 333, 992)
RANDOM_TOP_K = (1, 2, 4, 6, 8, 10)
RANDOM_BLOCKS = (16, 32, 64, 128)

# Numbers of routes.
QUICK = {8, 256, 8192, 524288}
TRITON_ROUTES = {8, 64, 256, 1024, 8192, 16384, 65536, 524288}  # at which triton and argsort are timed
REFERENCE_ROUTES = {256, 8192, 524288}


def selected(session: Session, sizes: Sequence[Size]) -> list[Size]:
    return [size for size in sizes if not session.quick or size[0] * size[1] in QUICK]


def moealign_candidates(
    session: Session,
    case: Case,
    triton_routes: Collection[int] = TRITON_ROUTES,
    reference_routes: Collection[int] = REFERENCE_ROUTES,
) -> list[Candidate]:
    """The backends and argsort: cuda in every case, the slower ones at some numbers of routes and within the budget."""
    candidates = []
    for backend in session.backends:
        routes = {"triton": triton_routes, "reference": reference_routes}.get(backend)
        if routes is None or (case.routes in routes and not session.over_budget()):
            candidates.append(moealign_candidate(backend, case))
    comparable = not (case.extras or case.dropped or case.batched)
    if case.routes in triton_routes and not session.over_budget() and comparable:
        candidates.append(argsort_candidate(case))
    return candidates


def peer_candidates(session: Session, case: Case) -> list[Candidate]:
    candidates = []
    supported = case.size[2] <= MAX_EXPERTS and not case.extras
    vllm = find_peer(session.peers, "vllm")
    if vllm and supported:
        candidates.append(vllm_candidate(case, impl=vllm))
    sglang = find_peer(session.peers, "sglang-kernel")
    supported = supported and not case.batched and case.expert_map is None
    if sglang and supported and case.routes <= session.sglang_max_routes:
        candidates.append(sglang_candidate(case, impl=sglang))
    return candidates


def run_with_floors(session: Session, case: Case, candidates: list[Candidate]) -> None:
    floors = session.floors.candidates(case) if session.floors else []
    session.run(case, [*candidates, *peer_candidates(session, case), *floors], time_graphs)
    if session.floors:
        session.add(case, "floor-bytes", [session.floors.bytes_us(case)])


def bench_align(session: Session) -> None:
    for size in selected(session, SIZES):
        case = Case("align", case_name(size), size, session.inputs("uniform", size))
        routes = (TRITON_ROUTES, REFERENCE_ROUTES) if size[1:3] == (8, 256) else ((), ())
        run_with_floors(session, case, moealign_candidates(session, case, *routes))


def bench_batched(session: Session) -> None:
    sizes = BATCHED_SIZES[:: len(BATCHED_SIZES) - 1] if session.quick else BATCHED_SIZES
    for batches, max_tokens, block_size in sizes:
        counts = [
            torch.randint(
                max_tokens + 1, (batches,), generator=session.generator, device=session.device, dtype=torch.int32
            )
            for _ in range(session.slots)
        ]
        name = f"nb{batches}-M{max_tokens}-B{block_size}"
        case = Case("batched", name, (batches, max_tokens, batches, block_size), counts, batched=True)
        run_with_floors(session, case, moealign_candidates(session, case, {case.routes}, ()))


def bench_extras(session: Session) -> None:
    for size in selected(session, EXTRAS_SIZES):
        inputs = session.inputs("uniform", size)
        for kind, extras in (("three", ()), ("all six", EXTRAS)):
            case = Case("align-extras", case_name(size, kind), size, inputs, extras=extras)
            candidates = moealign_candidates(session, case, {8192}, ())
            session.run(case, [each for each in candidates if each.impl != ARGSORT], time_graphs)


def bench_skew(session: Session) -> None:
    for size in selected(session, SKEW_SIZES):
        for kind in ("uniform", "one-expert", "zipf", "half-minus-one"):
            dropped = kind == "half-minus-one"
            case = Case("align-skew", case_name(size, kind), size, session.inputs(kind, size), dropped=dropped)
            candidates = moealign_candidates(session, case, (), ())
            session.run(case, [*candidates, *peer_candidates(session, case)], time_graphs)


def bench_map(session: Session) -> None:
    """Expert parallelism over eight ranks: this one holds every eighth expert."""
    for size in selected(session, MAP_SIZES):
        experts = size[2]
        expert_map = torch.full((experts,), -1, dtype=torch.int32)
        expert_map[::8] = torch.arange(len(expert_map[::8]), dtype=torch.int32)
        inputs = session.inputs("uniform", size)
        for kind, ignore in (("all binned", False), ("ignored", True)):
            case = Case(
                "align-map",
                case_name(size, kind),
                size,
                inputs,
                expert_map=expert_map.to(session.device),
                ignore=ignore,
                dropped=True,
            )
            candidates = moealign_candidates(session, case, (), ())
            session.run(case, [*candidates, *peer_candidates(session, case)], time_graphs)


def bench_large_e(session: Session) -> None:
    for size in LARGE_E[:: len(LARGE_E) - 1] if session.quick else LARGE_E:
        case = Case("large-e", case_name(size), size, session.inputs("uniform", size))
        routes = {case.routes} if size[2] in (1024, 65536) else ()
        session.run(case, moealign_candidates(session, case, routes, ()), time_graphs)


@contextlib.contextmanager
def _slots(session: Session, slots: int, replays: int) -> Iterator[None]:
    """At most so many sets of tensors and replays: for large cases, and for many."""
    held = session.slots, session.replays
    session.slots, session.replays = min(slots, session.slots), min(replays, session.replays)
    try:
        yield
    finally:
        session.slots, session.replays = held


def bench_scale(session: Session) -> None:
    """Long prefill, training and data-parallel batches."""
    for size in SCALE_SIZES[7:8] if session.quick else SCALE_SIZES:
        with _slots(session, max(2, 2**24 // (size[0] * size[1]) * 2), 20):
            case = Case("align-scale", case_name(size), size, session.inputs("uniform", size))
            candidates = moealign_candidates(session, case, {case.routes} if size[2] == 256 else (), ())
            run_with_floors(session, case, candidates)


def random_sizes(seed: int) -> list[Size]:
    """Distinct sizes; the number of routes is uniform in its logarithm."""
    draw, sizes = random.Random(seed), dict[Size, None]()
    while len(sizes) < RANDOM_SHAPES:
        experts, block_size = draw.choice(RANDOM_EXPERTS), draw.choice(RANDOM_BLOCKS)
        top_k = draw.choice([k for k in RANDOM_TOP_K if k <= experts])
        tokens = max(1, round(RANDOM_ROUTES ** draw.random() / top_k))
        sizes[tokens, top_k, experts, block_size] = None
    return list(sizes)


def bench_random(session: Session) -> None:
    """Shapes that nobody tuned for, others in every run."""
    seed = time.time_ns() % 2**32
    log(f"align-random: seed {seed}")
    for size in random_sizes(seed)[: 3 if session.quick else RANDOM_SHAPES]:
        with _slots(session, 8, 15):
            case = Case("align-random", case_name(size), size, session.inputs("uniform", size))
            candidates = [moealign_candidate(each, case) for each in session.backends if each == "cuda"]
            session.run(case, [*candidates, *peer_candidates(session, case)], time_graphs)


def bench_host(session: Session) -> None:
    """``drop-in``: vLLM's signature, which allocates its results; ``out``: into preallocated buffers."""
    backends = [backend for backend in session.backends if backend != "reference"]
    for size in HOST_SIZES[1:2] if session.quick else HOST_SIZES:
        inputs = session.inputs("uniform", size)
        case = Case("eager-host", case_name(size, "drop-in"), size, inputs)
        candidates = [moealign_candidate(backend, case, drop_in=True) for backend in backends]
        vllm = find_peer(session.peers, "vllm")
        if vllm and argument_count(torch.ops._moe_C.moe_align_block_size) == 8:  # as our copy of its wrapper calls it
            candidates.append(vllm_candidate(case, drop_in=True, impl=vllm))
        session.run(case, [*candidates, argsort_candidate(case)], time_host)
        case = Case("eager-host", case_name(size, "out"), size, inputs)
        candidates = [moealign_candidate(backend, case) for backend in backends]
        floors = session.floors.candidates(case)[:1] if session.floors else []
        session.run(case, [*candidates, *peer_candidates(session, case), *floors], time_host)
        case = Case("eager-host", case_name(size, "all six"), size, inputs, extras=EXTRAS)
        session.run(case, [moealign_candidate(each, case) for each in backends if each == "cuda"], time_host)


def bench_cpu(session: Session) -> None:
    for size in selected(session, CPU_SIZES):
        case = Case("align", case_name(size), size, session.inputs("uniform", size))
        candidates = [moealign_candidate(backend, case) for backend in session.backends]
        session.run(case, [*candidates, argsort_candidate(case)], time_cpu)


ON_GPU: dict[str, Callable[[Session], None]] = {
    "align": bench_align,
    "batched": bench_batched,
    "align-extras": bench_extras,
    "align-skew": bench_skew,
    "align-map": bench_map,
    "large-e": bench_large_e,
    "align-scale": bench_scale,
    "align-random": bench_random,
    "eager-host": bench_host,
}
BENCHES = tuple(ON_GPU)
