"""Times a whole layer of experts: ours, vLLM's Triton path, Transformers' grouped_mm, and the floor, in one process.

    python3 benchmarks/experts.py --fetch          # once, with a network: vLLM's kernel into .peers/, never committed
    PYTHONPATH=src python3 benchmarks/experts.py   # on a GPU; writes benchmarks/results/experts_<gpu>.csv

vLLM's path is its own: its kernel, its default configuration or (`-tuned`) the one that its wheel ships for this
device, its alignment and its sum from the released library (.peers/vllm_moe.so.xz, see benchmarks/align.py); its
assignment without alignment for few routes.  SiLU-mul is a plain Triton kernel here, as the wheel has it in another
library.  The floor: the weights of the experts that were hit, once, over the bandwidth of a large copy, or the
operations over the rate of a large matrix product, both measured here, whichever is longer.

Each implementation is compared with float64 on some tokens before it is timed; then graphs of calls over several inputs
are replayed in turns.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE)]

import align as bench  # noqa: E402  benchmarks/align.py: columns, CSV, peers

from moealign import fused_moe  # noqa: E402
from moealign.experts import launch as kernels  # noqa: E402
from moealign.layout import BlockLayout, capacity  # noqa: E402

SHAPES = [(128, 8, 2048, 768), (8, 2, 4096, 14336), (256, 8, 7168, 1024)]  # experts, top_k, hidden, inner
TOKENS = [1, 16, 64, 256, 1024, 4096]
OURS, VLLM, TUNED, HF = "moealign", "vllm-0.33.0", "vllm-0.33.0-tuned", "transformers-grouped_mm"
IMPLS = [OURS, VLLM, TUNED, HF, "floor"]
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 28, 31, 34, 35)]
KERNEL = "vllm_fused_moe.py"

Shape = tuple[int, int, int, int]


# ---- vLLM's kernel ---------------------------------------------------------------------------------------------------


def fetch(folder: Path) -> None:
    """vLLM's Triton kernel, its default configuration and its tuned ones, out of the released wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", "3.12", "--implementation", "cp", "-d", scratch, "vllm==0.33.0"]
        for platform in PLATFORMS:
            command += ["--platform", platform]
        subprocess.run(command, check=True)
        extract(next(Path(scratch).glob("*.whl")), folder)


def extract(wheel: Path, folder: Path) -> None:
    base = "vllm/model_executor/layers/fused_moe/"
    with zipfile.ZipFile(wheel) as archive:
        source = archive.read(base + "fused_moe.py").decode()
        configs = {}
        for name in archive.namelist():
            found = re.fullmatch(re.escape(base) + r"configs/E=(\d+),N=(\d+),device_name=([^,]+)\.json", name)
            if found:
                configs["/".join(found.groups())] = json.loads(archive.read(name))
    wanted = {"write_zeros_to_output", "fused_moe_kernel", "get_default_config"}
    parts = ["import types", "import triton", "import triton.language as tl"]
    parts.append("envs = types.SimpleNamespace(VLLM_BATCH_INVARIANT=False)")
    parts.append("current_platform = types.SimpleNamespace(is_rocm=lambda: False)")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in wanted:
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            parts.append("\n".join(source.splitlines()[first - 1 : node.end_lineno]))
    parts.append(f"CONFIGS = {configs!r}")
    (folder / KERNEL).write_text("\n\n".join(parts) + "\n")
    print(f"{folder / KERNEL}: {len(configs)} tuned configurations")


def load_kernel(folder: Path) -> types.ModuleType | None:
    import importlib.util

    path = folder / KERNEL
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("vllm_fused_moe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vllm_config(module: types.ModuleType, shape: Shape, tokens: int, device: str, tuned: bool) -> dict[str, int] | None:
    experts, top_k, hidden, inner = shape
    if not tuned:
        config: dict[str, int] = module.get_default_config(tokens, experts, inner, hidden, top_k, None)
        return config
    known = module.CONFIGS.get(f"{experts}/{inner}/{device.replace(' ', '_')}")
    if known is None:
        return None
    sizes = {int(key): value for key, value in known.items() if key.isdigit()}
    chosen: dict[str, int] = sizes[min(sizes, key=lambda size: abs(size - tokens))]
    return chosen


def vllm_launch(
    module: types.ModuleType,
    config: dict[str, int],
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    weights: torch.Tensor | None,
    sorted_ids: torch.Tensor | None,
    expert_ids: torch.Tensor,
    total: torch.Tensor,
    top_k: int,
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments and constants of one launch, as invoke_fused_moe_triton_kernel passes them."""
    import triton.language as tl

    tokens, size = a.shape[0], config["BLOCK_SIZE_M"]
    routes = tokens * top_k
    if sorted_ids is None:
        rows = routes * size
    else:
        rows = sorted_ids.shape[0]
        if tokens < size:
            rows = min(rows, routes * size)
    grid = (bench.cdiv(rows, size) * bench.cdiv(b.shape[1], config["BLOCK_SIZE_N"]),)
    # fmt: off
    arguments = (
        a, b, c, None, None, None, weights, sorted_ids, expert_ids, total,
        b.shape[1], b.shape[2], rows, routes,
        a.stride(0), a.stride(1), b.stride(0), b.stride(2), b.stride(1), c.stride(-2), c.stride(-1),
        0, 0, 0, 0, 0, 0, 0, 0, 0,
    )
    # fmt: on
    constants = {
        "naive_block_assignment": sorted_ids is None,
        "MUL_ROUTED_WEIGHT": weights is not None,
        "top_k": top_k,
        "compute_type": tl.bfloat16,
        "use_fp8_w8a8": False,
        "use_int8_w8a8": False,
        "use_int8_w8a16": False,
        "per_channel_quant": False,
        "HAS_BIAS": False,
        "SWAP_AB": False,
        "USE_TD": False,
        "SPLIT_K": 1,
        **config,
    }
    return grid, arguments, constants


def silu_mul_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def silu_mul(x, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        gate = tl.load(x + row * 2 * width + at, mask=at < width).to(tl.float32)
        up = tl.load(x + row * 2 * width + width + at, mask=at < width).to(tl.float32)
        result = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32) * up
        tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=at < width)

    silu_mul.fn.__globals__["tl"] = tl
    return silu_mul


# ---- the layers ------------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """One shape on the device: weights, and for one number of tokens several inputs."""

    shape: Shape
    tokens: int
    weights: list[torch.Tensor]
    inputs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def fill(self, slots: int) -> None:
        experts, top_k, hidden, _ = self.shape
        generator = torch.Generator("cuda").manual_seed(self.tokens)
        for _ in range(slots):
            x = torch.randn(self.tokens, hidden, generator=generator, device="cuda").to(torch.bfloat16)
            scores, ids = torch.rand(self.tokens, experts, generator=generator, device="cuda").topk(top_k, 1)
            self.inputs.append((x, scores.softmax(1), ids.to(torch.int32)))

    def reference(self, most: int = 6) -> tuple[list[int], torch.Tensor]:
        """Some tokens of the first input, and their outputs in float64."""
        x, weights, ids = self.inputs[0]
        gate_up, down = self.weights
        inner = down.shape[2]
        chosen = sorted({int(i * (self.tokens - 1) / max(most - 1, 1)) for i in range(most)})
        rows = []
        for token in chosen:
            total = torch.zeros(x.shape[1], dtype=torch.float64, device="cuda")
            for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
                h = gate_up[expert].double() @ x[token].double()
                total += weight * (down[expert].double() @ (torch.nn.functional.silu(h[:inner]) * h[inner:]))
            rows.append(total)
        return chosen, torch.stack(rows)

    def floor_us(self, bytes_per_us: float, flops_per_us: float) -> float:
        """Of the mean input: weights once, or operations."""
        _, top_k, hidden, inner = self.shape
        each = 3 * hidden * inner
        hit = statistics.mean(len(ids.unique()) for _, _, ids in self.inputs)
        return max(hit * each * 2 / bytes_per_us, 2 * self.tokens * top_k * each / flops_per_us)


def ours(layer: Layer) -> Callable[[int], torch.Tensor]:
    def call(slot: int) -> torch.Tensor:
        x, weights, ids = layer.inputs[slot]
        return fused_moe(x, *layer.weights, weights, ids)

    return call


def transformers_layer(layer: Layer) -> Callable[[int], torch.Tensor] | None:
    try:
        from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward
    except ImportError as error:
        bench.say(f"{HF}: left out, {error}")
        return None
    module = types.SimpleNamespace(
        num_experts=layer.shape[0], gate_up_proj=layer.weights[0], down_proj=layer.weights[1], has_gate=True,
        has_bias=False, is_transposed=False, is_concatenated=True, act_fn=torch.nn.SiLU(),
        _is_expert_parallel=False, has_post_expert_norm=False,
    )  # fmt: skip
    module._apply_gate = types.MethodType(_default_apply_gate, module)
    inputs = [(x, ids.long(), weights.to(x.dtype)) for x, weights, ids in layer.inputs]

    def call(slot: int) -> torch.Tensor:
        result: torch.Tensor = grouped_mm_experts_forward(module, *inputs[slot])
        return result

    return call


def vllm_layer(
    layer: Layer, module: types.ModuleType, config: dict[str, int], silu_mul: Any
) -> Callable[[int], torch.Tensor]:
    experts, top_k, hidden, inner = layer.shape
    tokens, routes = layer.tokens, layer.tokens * layer.shape[1]
    size = config["BLOCK_SIZE_M"]
    gate_up, down = layer.weights
    new = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="cuda")  # noqa: E731

    def call(slot: int) -> torch.Tensor:
        x, weights, ids = layer.inputs[slot]
        shared = new(routes * max(2 * inner, hidden))
        first, second = shared[: routes * 2 * inner].view(routes, -1), shared[: routes * hidden].view(routes, -1)
        between, out = new(routes, inner), torch.empty_like(x)
        if routes * 4 <= experts:
            sorted_ids, expert_ids = None, ids.view(-1)
            total = torch.full((1,), routes * size, dtype=torch.int32, device="cuda")
        else:
            length = routes + experts * (size - 1)
            if routes < experts:
                length = min(routes * size, length)
            sorted_ids, total = new(length, dtype=torch.int32), new(1, dtype=torch.int32)
            expert_ids = new(bench.cdiv(length, size), dtype=torch.int32)
            torch.ops._moe_C.moe_align_block_size(ids, experts, size, sorted_ids, expert_ids, total, None, None)
        where = (sorted_ids, expert_ids, total)
        for a, b, c, w, k in ((x, gate_up, first, None, top_k), (between, down, second, weights, 1)):
            grid, arguments, constants = vllm_launch(module, config, a, b, c, w, *where, k)
            module.fused_moe_kernel[grid](*arguments, **constants)
            if w is None:
                silu_mul[(routes, bench.cdiv(inner, 1024))](first, between, inner, BLOCK=1024)
        torch.ops._moe_C.moe_sum(second.view(tokens, top_k, hidden), out)
        return out

    return call


# ---- compiling ahead -------------------------------------------------------------------------------------------------


def warm(job: tuple[str, Shape, int, str, Path]) -> str | None:
    """In a process of its own: compile what one case needs into Triton's cache."""
    impl, shape, tokens, device, folder = job
    torch.set_num_threads(1)
    experts, top_k, hidden, inner = shape
    new = lambda *size, dtype=torch.bfloat16: torch.empty(size, dtype=dtype)  # noqa: E731
    x, gate_up, down = new(tokens, hidden), new(experts, 2 * inner, hidden), new(experts, hidden, inner)
    weights, ids = new(tokens, top_k, dtype=torch.float32), new(tokens, top_k, dtype=torch.int32)
    routes = tokens * top_k
    try:
        if impl == OURS:
            from moealign.experts import kernels as gemm

            target = kernels.target_of(torch.device("cuda", 0))
            how = kernels.plan(x, gate_up, down, ids, False, None, None, None, target)
            layout = None
            if how.block_size:
                sizes = capacity(routes, block_size=how.block_size, num_experts=experts)
                each = [new(size, dtype=torch.int32) for size in (*sizes[:3], routes)]
                layout = BlockLayout(*each[:3], positions=each[3], block_size=how.block_size)
            planned, _ = kernels.launches(
                how, x, gate_up, down, weights, ids, layout, "silu", None, None, False, target
            )
            for one in planned:
                options: dict[str, Any] = {"num_warps": one.num_warps, "num_stages": one.num_stages}
                if one.pdl:
                    options["launch_pdl"] = True
                getattr(gemm, one.kernel).warmup(*one.arguments, **one.constants, **options, grid=one.grid)
            return None
        module = load_kernel(folder)
        assert module is not None
        config = vllm_config(module, shape, tokens, device, impl == TUNED)
        if config is None:
            return None
        size = config["BLOCK_SIZE_M"]
        where: tuple[Any, ...] = (new(routes * size, dtype=torch.int32), new(routes, dtype=torch.int32))
        if routes * 4 <= experts:
            where = (None, where[1])
        for a, b, w, k in ((x, gate_up, None, top_k), (new(routes, inner), down, weights, 1)):
            total = new(1, dtype=torch.int32)
            c = new(routes, b.shape[1])
            grid, arguments, constants = vllm_launch(module, config, a, b, c, w, *where, total, k)
            module.fused_moe_kernel.warmup(*arguments, **constants, grid=grid)
    except Exception as error:
        return f"{job[:3]}: {bench.first_line(error)}"
    return None


# ---- timing ----------------------------------------------------------------------------------------------------------


def graphs_in_turns(
    calls: dict[str, Callable[[int], Any]], slots: int, enough_us: float = 60_000.0
) -> dict[str, list[float]]:
    """Microseconds a call in graph replay, the implementations taking turns."""
    graphs, turns = {}, {}
    for impl, call in calls.items():
        for slot in range(slots):
            call(slot)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for slot in range(slots):
                    call(slot)
        except Exception as error:
            bench.say(f"{impl}: not captured, {bench.first_line(error)}")
            torch.cuda.synchronize()
            continue
        graph.replay()
        start, end = bench.event_pair()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        graphs[impl] = graph
        turns[impl] = max(5, min(50, int(enough_us / (start.elapsed_time(end) * 1e3))))
    events: dict[str, list[Any]] = {impl: [] for impl in graphs}
    for turn in range(max(turns.values(), default=0)):
        for impl, graph in graphs.items():
            if turn < turns[impl]:
                start, end = bench.event_pair()
                torch.cuda._sleep(100_000)  # holds the device while the host queues
                start.record()
                graph.replay()
                end.record()
                events[impl].append((start, end))
    torch.cuda.synchronize()
    return {impl: [a.elapsed_time(b) * 1e3 / slots for a, b in pairs] for impl, pairs in events.items()}


def ceilings() -> tuple[float, float]:
    """Bytes a microsecond of a large copy, read and written; operations a microsecond of a large product."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    left = torch.randn(8192, 8192, device="cuda").to(torch.bfloat16)
    right = torch.randn(8192, 8192, device="cuda").to(torch.bfloat16)

    def median(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(12):
            start, end = bench.event_pair()
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return statistics.median(times[2:])

    copied = median(lambda: target.copy_(source))
    multiplied = median(lambda: left @ right)
    return 2 * source.numel() * 4 / copied, 2 * 8192**3 / multiplied


def layers(shapes: list[Shape], tokens: list[int]) -> Iterator[Layer]:
    for shape in shapes:
        experts, _, hidden, inner = shape
        generator = torch.Generator("cuda").manual_seed(0)
        weights = [
            torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16) * size[2] ** -0.5
            for size in ((experts, 2 * inner, hidden), (experts, hidden, inner))
        ]
        for count in tokens:
            layer = Layer(shape, count, weights)
            layer.fill(6 if count <= 256 else 2)
            yield layer
        del weights
        torch.cuda.empty_cache()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--fetch", action="store_true", help="fetch vLLM's kernel into --peers and stop")
    parser.add_argument("--wheel", type=Path, help="with --fetch: a wheel of vLLM that is there already")
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".peers")
    parser.add_argument("--shapes", default="0,1,2")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.fetch:
        args.peers.mkdir(parents=True, exist_ok=True)
        extract(args.wheel, args.peers) if args.wheel else fetch(args.peers)
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/experts.py: expected a GPU that torch can use, found none")
        return 2
    started = time.perf_counter()
    shapes = [SHAPES[int(one)] for one in args.shapes.split(",")]
    tokens = [int(one) for one in args.tokens.split(",")]
    gpu = torch.cuda.get_device_name()
    module = load_kernel(args.peers)
    impls = [OURS]
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if module is not None:
            bench.load_peers(args.peers, scratch)
            impls += [VLLM, TUNED]
        else:
            bench.say(f"{VLLM}: left out, no {KERNEL} in {args.peers} (--fetch makes it)")
        jobs = [(impl, shape, count, gpu, args.peers) for shape in shapes for count in tokens for impl in impls]
        with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
            failed = [said for said in pool.map(warm, jobs) if said]
        bench.say(f"{len(jobs)} cases compiled, {time.perf_counter() - started:.0f} s; failed: {failed[:3]}")
        bytes_us, flops_us = ceilings()
        bench.say(f"copy {bytes_us / 1e6:.2f} TB/s, product {flops_us / 1e6:.0f} TFLOP/s")
        session = bench.Session(torch.device("cuda", 0), bench.gpu_slug(gpu), [])
        silu_mul = silu_mul_kernel() if module is not None else None
        table = []
        wrong = []
        for layer in layers(shapes, tokens):
            experts, top_k, hidden, inner = layer.shape
            calls: dict[str, Callable[[int], Any] | None] = {OURS: ours(layer), HF: transformers_layer(layer)}
            if module is not None:
                for impl in (VLLM, TUNED):
                    config = vllm_config(module, layer.shape, layer.tokens, gpu, impl == TUNED)
                    calls[impl] = vllm_layer(layer, module, config, silu_mul) if config else None
            chosen, want = layer.reference()
            right: dict[str, Callable[[int], Any]] = {}
            for impl, call in calls.items():
                if call is None:
                    continue
                try:
                    error = float((call(0)[chosen].double() - want).norm() / want.norm())
                except Exception as problem:
                    wrong.append(f"WRONG {layer.shape} {layer.tokens} {impl}: {bench.first_line(problem)}")
                    continue
                if error < 1e-2:
                    right[impl] = call
                else:
                    wrong.append(f"WRONG {layer.shape} {layer.tokens} {impl}: relative error {error:.3g}")
            times = graphs_in_turns(right, len(layer.inputs))
            floor = layer.floor_us(bytes_us, flops_us)
            how = kernels.plan(layer.inputs[0][0], *layer.weights, layer.inputs[0][2], False, None, None, None)
            size = (layer.tokens, top_k, experts, how.block_size)
            case = f"T{layer.tokens}-k{top_k}-E{experts}-H{hidden}-I{inner}"
            work = bench.Work("experts", case, size, [layer.inputs[0][2]])
            for impl in IMPLS:
                if impl in times:
                    session.add(work, impl, times[impl])
            session.add(work, "floor", [floor])
            mid = {impl: statistics.median(each) for impl, each in times.items()}
            table.append([case, mid, floor])
        bench.write_csv(session.rows, args.out or HERE / "results" / f"experts_{bench.gpu_slug(gpu)}.csv")
    bench.say(f"{'case':30} {'ours':>8} {'vllm':>8} {'tuned':>8} {'hf':>8} {'floor':>8}  /vllm /tuned  /hf  of floor")
    for case, mid, floor in table:
        cells = " ".join(f"{mid[impl]:8.1f}" if impl in mid else f"{'-':>8}" for impl in IMPLS[:-1])
        mine = mid.get(OURS)
        ratios = " ".join(f"{mid[impl] / mine:5.2f}" if mine and impl in mid else "    -" for impl in (VLLM, TUNED, HF))
        bench.say(f"{case:30} {cells} {floor:8.1f}  {ratios}  {floor / mine:.2f}" if mine else f"{case} {cells}")
    for line in wrong:
        bench.say(line)
    bench.say(f"{time.perf_counter() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
