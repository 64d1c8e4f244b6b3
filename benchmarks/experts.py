"""Times a whole layer of experts: moealign, vLLM's Triton path, Transformers' grouped_mm, and the floor.

    python benchmarks/experts.py --fetch    # once, with a network: vLLM's kernel into .peers/, never committed
    python benchmarks/experts.py            # on a GPU; writes benchmarks/results/experts_<gpu>.csv

vLLM's path uses its own parts: its kernel, its default configuration or (`-tuned`) the one that its wheel ships for
this device, and alignment and sum from the released library (.peers/vllm_moe.so.xz, see benchmarks/align.py); for few
routes it assigns blocks without aligning.  SiLU-mul is a plain Triton kernel here, because the wheel has it in another
library.  The floor is the longer of two times: the weights of the experts that were hit, once, at the bandwidth of a
large copy, and the operations at the rate of a large matrix product, both measured here.

Each implementation is compared with float64 on some tokens before it is timed.  Then graphs of calls over several
inputs are replayed in turns.

Rows `experts-fp8` are the same layers with FP8 weights in blocks of 128 x 128 and FP8 rows: ours, ours in bfloat16, and
vLLM's kernel with its own quantising of rows.  They are compared with the arithmetic in torch.  Rows
`experts-invariant` are bfloat16 with and without `batch_invariant`.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import vllm_layer
from common import (
    PEERS,
    RESULTS,
    SHAPES,
    TOKENS,
    Shape,
    compile_launches,
    empty_layout,
    empty_quantized,
    finish,
    float64_rows,
    gpu_missing,
    in_blocks,
    in_processes,
    integers,
    layer_name,
    random_inputs,
    random_weights,
    relative_error,
)

from moealign import QuantizedWeights, bench, fused_moe
from moealign.experts import launch
from moealign.experts.records import ExpertWeights, Routes
from moealign.experts.tiles import select_tiles, target_of
from moealign.timing import device_us, graphs_in_turns

OURS, VLLM, TUNED, HF = "moealign", "vllm-0.33.0", "vllm-0.33.0-tuned", "transformers-grouped_mm"
IMPLS = [OURS, VLLM, TUNED, HF, "floor"]
BF16 = "moealign-bfloat16"
FP8_IMPLS = [OURS, BF16, VLLM, TUNED, "floor"]
INVARIANT = "moealign-invariant"
#: What `--formats` takes: the bench of each and its implementations.
FORMATS = {
    "bf16": ("experts", IMPLS),
    "fp8": ("experts-fp8", FP8_IMPLS),
    "invariant": ("experts-invariant", [OURS, INVARIANT]),
}
#: Relative errors that are accepted: with bfloat16 weights; in FP8, where rounding activated rows to bfloat16 moves
#: some of their e4m3 values by a step; and of bfloat16 weights against FP8's, which is what quantising costs.
MAX_ERROR, MAX_FP8_ERROR, MAX_BF16_ERROR = 1e-2, 3e-2, 0.1


@dataclass
class Layer:
    """One shape on the device: weights, and several inputs of one number of tokens."""

    shape: Shape
    tokens: int
    weights: list[torch.Tensor]
    quantized: list[QuantizedWeights] = field(default_factory=list)
    inputs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def reference(self, max_tokens: int = 6) -> tuple[list[int], torch.Tensor]:
        """Some tokens of the first input, and their outputs in float64."""
        chosen = sorted({int(i * (self.tokens - 1) / max(max_tokens - 1, 1)) for i in range(max_tokens)})
        x, weights, ids = self.inputs[0]
        return chosen, float64_rows(chosen, x, *self.weights, weights, ids)

    def quantized_reference(self, max_tokens: int = 6) -> tuple[list[int], torch.Tensor]:
        """The same with FP8 weights, by the arithmetic in torch."""
        chosen, _ = self.reference(max_tokens)
        x, weights, ids = (each[chosen] for each in self.inputs[0])
        return chosen, fused_moe(x, *self.quantized, weights, ids, backend="packed").double()

    def floor_us(self, bytes_per_us: float, flops_per_us: float, itemsize: int = 2) -> float:
        """For the mean of the inputs: the weights read once, or the operations."""
        _, top_k, hidden, inner = self.shape
        weights = 3 * hidden * inner  # of one expert
        hit = statistics.mean(len(ids.unique()) for _, _, ids in self.inputs)
        return max(hit * weights * itemsize / bytes_per_us, 2 * self.tokens * top_k * weights / flops_per_us)


def layers(shapes: list[Shape], tokens: list[int], fp8: bool) -> Iterator[Layer]:
    for shape in shapes:
        weights = random_weights(shape)
        quantized = [in_blocks(each) for each in weights] if fp8 else []
        for count in tokens:
            yield Layer(shape, count, weights, quantized, random_inputs(shape, count, 6 if count <= 256 else 2))
        del weights, quantized
        torch.cuda.empty_cache()


def moealign_layer(layer: Layer, fp8: bool = False, batch_invariant: bool = False) -> Callable[[int], torch.Tensor]:
    def call(slot: int) -> torch.Tensor:
        x, weights, ids = layer.inputs[slot]
        experts = layer.quantized if fp8 else layer.weights
        return fused_moe(x, *experts, weights, ids, batch_invariant=batch_invariant)

    return call


def transformers_layer(layer: Layer) -> Callable[[int], torch.Tensor] | None:
    try:
        from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward
    except ImportError as error:
        bench.log(f"{HF}: left out, {error}")
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


def compile_case(job: tuple[str, Shape, int, str, Path, bool]) -> str | None:
    """In a process of its own: compile the kernels of one case into Triton's cache."""
    impl, shape, tokens, device, folder, fp8 = job
    torch.set_num_threads(1)
    experts, top_k, hidden, inner = shape
    try:
        if impl in (OURS, INVARIANT):
            x, gate_up, down = (
                torch.empty(size, dtype=torch.bfloat16)
                for size in ((tokens, hidden), (experts, 2 * inner, hidden), (experts, hidden, inner))
            )
            scaled = (empty_quantized(gate_up), empty_quantized(down)) if fp8 else None
            weights, ids = (torch.empty(tokens, top_k, dtype=dtype) for dtype in (torch.float32, torch.int32))
            layer, routes, target = (
                ExpertWeights(scaled[0].data, scaled[1].data, quantized=scaled)
                if scaled
                else ExpertWeights(gate_up, down),
                Routes(weights, ids),
                target_of(torch.device("cuda", 0)),
            )
            tiles = select_tiles(x, layer, routes, target=target, batch_invariant=impl == INVARIANT)
            layout = empty_layout(tokens, top_k, experts, tiles.block_size) if tiles.block_size else None
            launches, _ = launch.layer_launches(tiles, x, layer, routes, layout, "silu", target)
            compile_launches(launches)
            return None
        module = vllm_layer.load_kernel(folder)
        assert module is not None
        config = vllm_layer.config_of(module, shape, tokens, device, impl == TUNED, fp8)
        if config is not None:
            vllm_layer.compile_kernel(module, config, shape, tokens, fp8)
    except Exception as error:
        return f"{job[:3]}: {bench.first_line(error)}"
    return None


def ceilings() -> tuple[float, float, float]:
    """Bytes a microsecond of a large copy, read and written; operations a microsecond of a large product, in bfloat16
    and in FP8 (0 if this GPU has none)."""
    bandwidth = bench.copy_bandwidth(torch.randn(2**28, device="cuda"))
    left, right = (torch.randn(8192, 8192, device="cuda").to(torch.bfloat16) for _ in range(2))
    times = [device_us(lambda: left @ right) for _ in range(12)]
    wide = 2 * 8192**3 / statistics.median(times[2:])
    if torch.cuda.get_device_capability() < (8, 9):
        return bandwidth, wide, 0.0
    one = torch.ones((), device="cuda")
    a, b = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).T
    times = [device_us(lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16)) for _ in range(12)]
    return bandwidth, wide, 2 * 8192**3 / statistics.median(times[2:])


def verified(
    layer: Layer, calls: dict[str, Callable[[int], Any] | None], failures: list[str], fp8: bool = False
) -> dict[str, Callable[[int], Any]]:
    """The calls whose results are close to the reference; the others are added to `failures`."""
    chosen, expected = layer.quantized_reference() if fp8 else layer.reference()
    right: dict[str, Callable[[int], Any]] = {}
    for impl, call in calls.items():
        if call is None:
            continue
        try:
            error = relative_error(call(0)[chosen], expected)
        except Exception as problem:
            failures.append(f"WRONG {layer.shape} {layer.tokens} {impl}: {bench.first_line(problem)}")
            continue
        limit = MAX_BF16_ERROR if impl == BF16 else MAX_FP8_ERROR if fp8 else MAX_ERROR
        if error < limit:
            right[impl] = call
        else:
            failures.append(f"WRONG {layer.shape} {layer.tokens} {impl}: relative error {error:.3g}")
    return right


def add(session: bench.Session, layer: Layer, times: dict[str, list[float]], format_name: str) -> None:
    """Add the rows of one case to the session."""
    name, impls = FORMATS[format_name]
    x, weights, ids = layer.inputs[0]
    records = ExpertWeights(*layer.weights)
    if format_name == "fp8":
        records = records._replace(quantized=(layer.quantized[0], layer.quantized[1]))
    size = (layer.tokens, layer.shape[1], layer.shape[0], select_tiles(x, records, Routes(weights, ids)).block_size)
    case = bench.Case(name, layer_name(layer.shape, layer.tokens), size, [ids])
    for impl in impls:
        if impl in times:
            session.add(case, impl, times[impl])


def print_table(rows: list[dict[str, Any]]) -> None:
    for name, impls in FORMATS.values():
        bench.log(f"{name:30} {'us: ' + ', '.join(impls)}; of each the time over ours")
        for row, times in bench.cases_of(rows, name):
            own = times.get(OURS, float("nan"))
            cells = " ".join(f"{times[impl]:8.1f}" if impl in times else f"{'-':>8}" for impl in impls)
            ratios = " ".join(f"{times[impl] / own:5.2f}" if impl in times else "    -" for impl in impls[1:])
            bench.log(f"{row['case']:30} {cells}  {ratios}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--fetch", action="store_true", help="fetch vLLM's kernel into --peers and stop")
    parser.add_argument("--wheel", type=Path, help="with --fetch: a downloaded wheel of vLLM")
    parser.add_argument("--peers", type=Path, default=PEERS)
    parser.add_argument("--shapes", type=integers, default=[0, 1, 2])
    parser.add_argument("--tokens", type=integers, default=TOKENS)
    parser.add_argument("--formats", default=",".join(FORMATS), help="of the weights, or invariant")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.fetch:
        args.peers.mkdir(parents=True, exist_ok=True)
        vllm_layer.extract(args.wheel, args.peers) if args.wheel else vllm_layer.fetch(args.peers)
        return 0
    if gpu_missing("benchmarks/experts.py"):
        return 2
    started = time.perf_counter()
    shapes = [SHAPES[index] for index in args.shapes]
    gpu = torch.cuda.get_device_name()
    module = vllm_layer.load_kernel(args.peers)
    formats = [name for name in FORMATS if name in args.formats.split(",")]
    if "fp8" in formats and torch.cuda.get_device_capability() < (8, 9):
        bench.log("experts-fp8: left out, this GPU has no FP8 products")
        formats.remove("fp8")
    impls = [OURS]
    failures: list[str] = []
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if module is not None:
            bench.load_peers(args.peers, scratch)
            impls += [VLLM, TUNED]
        else:
            bench.log(f"{VLLM}: left out, no {vllm_layer.KERNEL} in {args.peers} (--fetch makes it)")
        quantising = module is not None and hasattr(module, "_per_token_group_quant_fp8")
        if module is not None and not quantising:
            bench.log(f"{VLLM}: left out of experts-fp8, its {vllm_layer.KERNEL} is older (--fetch makes it again)")
        jobs = [
            (impl, shape, count, gpu, args.peers, name == "fp8")
            for name in formats
            for shape in shapes
            for count in args.tokens
            for impl in (FORMATS[name][1] if name == "invariant" else impls if name == "bf16" or quantising else [OURS])
        ]
        failed = in_processes(compile_case, jobs)
        bench.log(f"{len(jobs)} cases compiled, {time.perf_counter() - started:.0f} s; failed: {failed[:3]}")
        bytes_us, flops_us, fp8_us = ceilings()
        bench.log(f"copy {bytes_us / 1e6:.2f} TB/s, product {flops_us / 1e6:.0f} TFLOP/s, FP8 {fp8_us / 1e6:.0f}")
        session = bench.Session(torch.device("cuda", 0), bench.gpu_slug(gpu), [])
        silu_mul = vllm_layer.silu_mul_kernel() if module is not None else None
        for layer in layers(shapes, args.tokens, "fp8" in formats):
            for name in formats:
                fp8, invariant = name == "fp8", name == "invariant"
                calls: dict[str, Callable[[int], Any] | None] = {OURS: moealign_layer(layer, fp8)}
                if invariant:
                    calls[INVARIANT] = moealign_layer(layer, batch_invariant=True)
                else:
                    calls |= {BF16: moealign_layer(layer)} if fp8 else {HF: transformers_layer(layer)}
                if module is not None and not invariant and (quantising or not fp8):
                    for impl in (VLLM, TUNED):
                        config = vllm_layer.config_of(module, layer.shape, layer.tokens, gpu, impl == TUNED, fp8)
                        calls[impl] = vllm_layer.vllm_layer(layer, module, config, silu_mul, fp8) if config else None
                slots = len(layer.inputs)
                times = graphs_in_turns(
                    verified(layer, calls, failures, fp8),
                    slots=slots,
                    calls_per_graph=slots,
                    warm_up=slots,
                    budget_us=60_000,
                    on_failure=bench.log_capture_failure,
                )
                times["floor"] = [layer.floor_us(bytes_us, fp8_us if fp8 else flops_us, 1 if fp8 else 2)]
                add(session, layer, times, name)
    print_table(session.rows)
    status = finish(session.rows, failures, args.out or RESULTS / f"experts_{session.gpu}.csv")
    bench.log(f"{time.perf_counter() - started:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
