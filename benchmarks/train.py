"""Times the forward and backward of a layer of experts: moealign, plain torch, Liger's fused MoE.

    python benchmarks/train.py            # on a GPU; writes benchmarks/results/train_<gpu>.csv

"torch" is a sort, two ``torch.nn.functional.grouped_mm``, SiLU, the routing weights and an ``index_add``, as torch
differentiates them.  Liger is timed if ``liger_kernel`` can be imported; its first call tunes for up to a minute.
``moealign-recompute`` keeps only the inputs.  ``train`` rows are eager steps, ``train-graph`` rows the same steps in a
CUDA graph.  `peak_mib` is the largest memory of an eager step above what it began with, without the gradients of the
projections.

Before a shape is timed, every gradient is compared with float64 on fewer tokens and experts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Shape, compile_launches, gpu_missing, in_processes, integers, layer_name, random_weights
from torch import Tensor
from torch.nn import functional as F

from moealign import bench, fused_moe
from moealign.experts import gradients, launch
from moealign.experts.records import ExpertWeights, Routes
from moealign.experts.tiles import select_tiles, target_of
from moealign.timing import capture, device_us

OURS, RECOMPUTE, TORCH, LIGER = "moealign", "moealign-recompute", "torch-grouped_mm", "liger-0.8.5"
IMPLS = [OURS, RECOMPUTE, TORCH, LIGER]
CASES: list[tuple[Shape, int]] = [
    ((128, 8, 2048, 768), 4096),
    ((128, 8, 2048, 768), 8192),
    ((128, 8, 2048, 768), 32768),
    ((64, 6, 2048, 1408), 8192),
    ((8, 2, 4096, 14336), 4096),
    ((256, 8, 7168, 2048), 4096),
]
COLUMNS = [*bench.COLUMNS, "peak_mib"]
NAMES = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights")

#: ``(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids)`` to ``[T, H]``.
LayerCall = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def torch_layer(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """A layer in torch's operations that never waits for the device."""
    top_k, experts = ids.shape[1], gate_up.shape[0]
    owners, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(owners, torch.arange(experts, device=ids.device, dtype=ids.dtype), right=True)
    ends = ends.to(torch.int32)
    tokens = order // top_k
    rows = F.grouped_mm(x[tokens], gate_up.transpose(1, 2), offs=ends)
    gate, up = rows.chunk(2, dim=-1)
    rows = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    rows = rows * weights.flatten()[order].unsqueeze(1).to(rows.dtype)
    return torch.zeros_like(x).index_add(0, tokens, rows)


def liger_layer() -> LayerCall | None:
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError as error:
        bench.log(f"{LIGER}: left out, {error}")
        return None

    def call(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        result: Tensor = LigerFusedMoEFunction.apply(x, gate_up, down, ids, weights.to(x.dtype))
        return result

    return call


def liger_tuners() -> list[Any]:
    from liger_kernel.ops import fused_moe_kernels

    return [each for each in vars(fused_moe_kernels).values() if hasattr(each, "configs") and hasattr(each, "cache")]


def compile_liger(job: tuple[Shape, int, int]) -> str | None:
    """In a process of its own: compile the configurations number `part`, `part` + `parts`, ... of Liger's kernels."""
    (_, top_k, hidden, inner), part, parts = job
    try:
        for tuner in liger_tuners():
            tuner.configs = tuner.configs[part::parts] or tuner.configs[:1]
        call = liger_layer()
        assert call is not None
        step_of(call, random_step((top_k, top_k, hidden, inner), 128))()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{job}: {bench.first_line(error)}"
    return None


@contextlib.contextmanager
def untuned(tuners: Sequence[Any]) -> Iterator[None]:
    """Within it, Liger takes its first configurations; afterwards, it tunes anew, for the tokens of the next call."""
    configs = [tuner.configs for tuner in tuners]
    for tuner in tuners:
        tuner.configs = tuner.configs[:1]
    try:
        yield
    finally:
        for tuner, every in zip(tuners, configs, strict=True):
            tuner.configs = every
            tuner.cache.clear()


def implementations() -> dict[str, LayerCall]:
    calls: dict[str, LayerCall | None] = {
        OURS: fused_moe,
        RECOMPUTE: lambda *layer: fused_moe(*layer, recompute=True),
        TORCH: torch_layer,
        LIGER: liger_layer(),
    }
    return {name: call for name, call in calls.items() if call is not None}


def random_step(shape: Shape, tokens: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Leaves x, gate_up, down, weights, then ids and the gradient of the output."""
    experts, top_k, hidden, _ = shape
    generator = torch.Generator(device).manual_seed(tokens)
    x, grad = (torch.randn(tokens, hidden, generator=generator, device=device).to(dtype) for _ in range(2))
    scores, ids = torch.rand(tokens, experts, generator=generator, device=device).topk(top_k, 1)
    leaves = [x, *random_weights(shape, device, dtype), scores.softmax(1)]
    return [*(each.requires_grad_() for each in leaves), ids.to(torch.int32), grad]


def step_of(call: LayerCall, tensors: Sequence[Tensor]) -> Callable[[], None]:
    """A forward and a backward, which leave the gradients in the leaves."""
    *leaves, ids, grad = tensors

    def step() -> None:
        for each in leaves:
            each.grad = None
        call(*leaves, ids).backward(grad)

    return step


# ---- correctness -----------------------------------------------------------------------------------------------------


def gradient_errors(calls: dict[str, LayerCall], shape: Shape, tokens: int, device: str = "cuda") -> dict[str, Any]:
    """For each implementation the relative error of each gradient against float64, or an exception."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tensors = random_step(shape, tokens, device, dtype)
    *leaves, ids, grad = tensors
    wide = [each.detach().double().requires_grad_() for each in leaves]
    fused_moe(*wide, ids, backend="packed").backward(grad.double())
    errors: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            step_of(call, tensors)()
            errors[name] = [
                float((one.grad.double() - other.grad).norm() / other.grad.norm())  # type: ignore[union-attr,operator]
                for one, other in zip(leaves, wide, strict=True)
            ]
        except Exception as error:
            errors[name] = error
    return errors


def verified(calls: dict[str, LayerCall], shape: Shape, failures: list[str], device: str = "cuda") -> list[str]:
    """The implementations whose gradients are right, with at most 8 experts of the shape."""
    experts, top_k, hidden, inner = shape
    smaller = (min(experts, 8), min(top_k, 8), hidden, inner)
    errors = gradient_errors(calls, smaller, 1000, device)
    right = []
    for name, each in errors.items():
        if isinstance(each, Exception) or not max(each) < 2e-2:
            reason = bench.first_line(each) if isinstance(each, Exception) else f"relative errors {each}"
            failures.append(f"WRONG {shape} {name}: {reason}")
            continue
        right.append(name)
        if not isinstance(errors[TORCH], Exception):
            ratios = " ".join(f"{a / b:.2f}" for a, b in zip(each, errors[TORCH], strict=True))
            bench.log(f"{shape} {name}: errors {' '.join(f'{error:.2e}' for error in each)}, of torch's {ratios}")
    return right


# ---- timing ----------------------------------------------------------------------------------------------------------


def peak_mib(step: Callable[[], None], leaves: Sequence[Tensor]) -> float:
    for each in leaves:
        each.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    projections = sum(each.numel() * each.element_size() for each in leaves[1:3])
    return (torch.cuda.max_memory_allocated() - start - projections) / 2**20


def time_eager(steps: dict[str, Callable[[], None]], turns: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 1):
        for name, step in steps.items():
            spent = device_us(step)
            if turn:  # the first warms up
                times[name].append(spent)
    return times


def time_graphs(steps: dict[str, Callable[[], None]], turns: int) -> dict[str, list[float]]:
    """One graph at a time: its memory is that of a whole step.  Each implementation has two turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(2):
        for name in list(steps):
            try:
                graph = capture([steps[name]], warm_up=1)
            except Exception as error:
                bench.log(f"{name}: not captured, {bench.first_line(error.__context__ or error)}")
                torch.cuda.synchronize()
                del steps[name]
                continue
            graph.replay()
            times[name] += [device_us(graph.replay) for _ in range(turns)]
            del graph
            torch.cuda.empty_cache()
    return {name: each for name, each in times.items() if each}


def compile_case(job: tuple[Shape, int]) -> str | None:
    """In a process of its own: compile our kernels of one case into Triton's cache."""
    (experts, top_k, hidden, inner), tokens = job
    torch.set_num_threads(1)
    recorded: list[Any] = []
    run, target = launch.run, target_of(torch.device("cuda", 0))
    try:
        new = lambda *size: torch.empty(size, dtype=torch.bfloat16)  # noqa: E731
        x, layer = new(tokens, hidden), ExpertWeights(new(experts, 2 * inner, hidden), new(experts, hidden, inner))
        routes = Routes(torch.empty(tokens, top_k), torch.zeros(tokens, top_k, dtype=torch.int32))
        launch.run = lambda some, device: recorded.extend(some)
        gradients.target_of = lambda device: target
        tiles = select_tiles(x, layer, routes, target=target)
        before = new(tokens * top_k, 2 * inner)
        layout = routes.layout(tiles.block_size, experts) if tiles.block_size else None
        recorded += launch.layer_launches(tiles, x, layer, routes, layout, "silu", target, before)[0]
        recorded += launch.layer_launches(tiles, x, layer, routes, layout, "silu", target)[0]
        for kept in (before, None):
            gradients.layer_gradients(x, kept, x, layer, routes, "silu", (True,) * 4 + (False,) * 2)
        compile_launches(recorded)
    except Exception as error:
        return f"{job}: {bench.first_line(error)}"
    finally:
        launch.run = run
    return None


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    bench.log(f"{'case':34} {'ours':>9} {'again':>9} {'torch':>9} {'liger':>9}  /torch /liger TFLOP/s  MiB of torch's")
    for name in ("train", "train-graph"):
        for row, times in bench.cases_of(rows, name):
            cells = " ".join(f"{times[impl]:9.0f}" if impl in times else f"{'-':>9}" for impl in IMPLS)
            own = times.get(OURS, float("nan"))
            ratios = " ".join(f"{times[impl] / own:6.2f}" if impl in times else "     -" for impl in (TORCH, LIGER))
            peaks = {
                each["impl"]: float(each["peak_mib"])
                for each in rows
                if (each["bench"], each["case"]) == ("train", row["case"])
            }
            share = f"{peaks[OURS] / peaks[TORCH]:.2f}" if {OURS, TORCH} <= set(peaks) else "-"
            rate = operations(row) / own / 1e6
            bench.log(f"{name:11} {row['case']:30} {cells}  {ratios} {rate:7.0f}  {share}")


def operations(row: dict[str, Any]) -> float:
    """Of a forward and a backward: three products the size of each of the forward's."""
    _, _, _, hidden, inner = (int(part.lstrip("TkEHI")) for part in row["case"].split("-"))
    return 18.0 * int(row["routes"]) * hidden * inner


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--cases", type=integers, default=list(range(len(CASES))), help="numbers of cases: 0,1")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if gpu_missing("benchmarks/train.py"):
        return 2
    started = time.perf_counter()
    gpu = bench.gpu_slug(torch.cuda.get_device_name())
    chosen = [CASES[number] for number in args.cases]
    failed = in_processes(compile_case, chosen)
    parts = max((os.cpu_count() or 1) - 2, 1)
    if liger_layer() is not None:
        shapes = list(dict.fromkeys(shape for shape, _ in chosen))
        failed += in_processes(compile_liger, [(shape, part, parts) for shape in shapes for part in range(parts)])
    bench.log(
        f"{len(chosen)} cases compiled, {time.perf_counter() - started:.0f} s; failed: {len(failed)} {failed[:3]}"
    )
    failures: list[str] = []
    rows: list[dict[str, Any]] = []
    calls = implementations()
    for shape, tokens in chosen:
        with untuned(liger_tuners() if LIGER in calls else []):
            right = verified(calls, shape, failures)
        torch.cuda.empty_cache()
        tensors = random_step(shape, tokens)
        steps = {name: step_of(calls[name], tensors) for name in right}
        peaks: dict[str, float] = {}
        for name in list(steps):
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                steps[name]()  # compiles, and tunes Liger's
                peaks[name] = peak_mib(steps[name], tensors[:4])
                continue
            bench.log(f"{shape} {tokens} {name}: left out, too little memory")
            del steps[name]
        experts, top_k, _, _ = shape
        size = (tokens, top_k, experts, 0)
        for where, timer in (("train", time_eager), ("train-graph", time_graphs)):
            for name, times in timer(dict(steps), args.turns).items():
                row = bench.row_of(where, layer_name(shape, tokens), tokens * top_k, size, name, times, gpu)
                rows.append({**row, "peak_mib": f"{peaks[name]:.1f}"})
        print_table([row for row in rows if row["case"] == layer_name(shape, tokens)])
        bench.write_csv(rows, args.out or RESULTS / f"train_{gpu}.csv", COLUMNS)
        bench.log(f"{time.perf_counter() - started:.0f} s")
        del tensors, steps
        torch.cuda.empty_cache()
    print_table(rows)
    for line in failures:
        bench.log(line)
    bench.log(f"{time.perf_counter() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
