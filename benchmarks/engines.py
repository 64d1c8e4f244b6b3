"""Times a layer of experts inside the released vLLM, as it is and with MOEALIGN_VLLM=layer.

    MOEALIGN_VLLM_LIBRARY=vllm_moe.so \\
    PYTHONPATH=src:DIR/vllm-0.33.0:DIR/site312:tests/engines:tests python benchmarks/engines.py

On a GPU with vLLM's Python files and its MoE library, unpacked; tests/engines/run_engines.py --pack and
benchmarks/align.py make them.  Writes benchmarks/results/engines_<gpu>.csv.

A layer is vLLM's ``RoutedExperts`` in bfloat16, built twice over the same weights, and called as a model calls it:
preparation, alignment, products with the configuration that vLLM selects, activation and sum.  vLLM's SiLU-mul is in
a library that is not here; a plain Triton kernel stands in for it, as in benchmarks/experts.py.  Both layers are
compared with float64 on some tokens, and on all tokens with each other, before graphs of their calls are replayed in
turns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import vllm_layer
from common import (
    RESULTS,
    Shape,
    compile_launches,
    empty_layout,
    finish,
    gpu_missing,
    in_processes,
    integers,
    layer_name,
    random_inputs,
    random_weights,
    relative_error,
)
from torch import Tensor
from torch.nn import functional as F

from moealign import bench
from moealign.experts import launch
from moealign.experts.records import ExpertWeights, Routes
from moealign.experts.tiles import select_tiles, target_of
from moealign.integrations import vllm as drop_in
from moealign.timing import graphs_in_turns

OURS, VLLM = "moealign", bench.VLLM
BENCH = "engine-layer"
FUSED = "vllm.model_executor.layers.fused_moe"
TOKENS = [1, 4, 16, 64, 256, 1024, 4096]


class Model(NamedTuple):
    name: str
    shape: Shape
    bias: bool = False


#: Of DeepSeek-V3 the slice of a rank of eight; of gpt-oss the sizes and biases, with SiLU-mul.
MODELS = [
    Model("Qwen3-30B-A3B", (128, 8, 2048, 768)),
    Model("Mixtral-8x7B", (8, 2, 4096, 14336)),
    Model("DeepSeek-V3, 1/8", (256, 8, 7168, 256)),
    Model("gpt-oss-20b", (32, 4, 2880, 2880), bias=True),
]


def of_vllm(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


# ---- vLLM's layers ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(device: str) -> Iterator[None]:
    """What a layer of vLLM's needs of its process."""
    config, of_device = (of_vllm("vllm.config", name) for name in ("VllmConfig", "DeviceConfig"))
    workspace = importlib.import_module("vllm.v1.worker.workspace")
    workspace.init_workspace_manager(torch.device(device))
    try:
        with of_vllm("vllm.config", "set_current_vllm_config")(config(device_config=of_device(device=device))):
            yield
    finally:
        workspace.reset_workspace_manager()


def build(model: Model, weights: list[Tensor], biases: list[Tensor], max_tokens: int) -> Any:
    """vLLM's layer over `weights` and `biases`, which it reads where they lie."""
    experts, top_k, hidden, inner = model.shape
    device = weights[0].device
    sizes = {
        f"{name}_{what}": start for name in ("tp", "pcp", "dp", "ep") for what, start in (("size", 1), ("rank", 0))
    }
    parallel = of_vllm(f"{FUSED}.config", "FusedMoEParallelConfig")(
        **sizes, sp_size=1, use_ep=False, all2all_backend="allgather_reducescatter", enable_eplb=False
    )
    manager = of_vllm(f"{FUSED}.expert_map_manager", "ExpertMapManager")(
        max_num_batched_tokens=max_tokens, top_k=top_k, global_num_experts=experts, num_redundant_experts=0,
        num_expert_group=None, moe_parallel_config=parallel, placement_strategy="linear", enable_eplb=False,
    )  # fmt: skip
    config = of_vllm(f"{FUSED}.config", "FusedMoEConfig")(
        num_experts=experts, experts_per_token=top_k, hidden_dim=hidden, intermediate_size=inner,
        num_local_experts=experts, num_logical_experts=experts,
        activation=of_vllm(f"{FUSED}.activation", "MoEActivation")("silu"), device=device, has_bias=model.bias,
        routing_method=of_vllm(f"{FUSED}.config", "RoutingMethodType").Renormalize, moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device(device):
        layer = of_vllm(f"{FUSED}.routed_experts", "RoutedExperts")(
            "model.layers.0.mlp.experts", torch.bfloat16, config, None, expert_map_manager=manager
        )
    names = ["w13_weight", "w2_weight", *(("w13_bias", "w2_bias") if model.bias else ())]
    for name, tensor in zip(names, [*weights, *biases], strict=True):
        getattr(layer, name).data = tensor
    layer.quant_method.process_weights_after_loading(layer)
    for name, tensor in zip(names[:2], weights, strict=True):
        if getattr(layer, name).data_ptr() != tensor.data_ptr():
            raise RuntimeError(f"{name}: expected the weights where they were, got a copy of vLLM's")
    return layer


def layers(model: Model, weights: list[Tensor], biases: list[Tensor], max_tokens: int) -> dict[str, Any]:
    """vLLM's layer as it is, and the one that it builds with the drop-in, whose experts are ours."""
    found = {VLLM: build(model, weights, biases, max_tokens)}
    chosen = type(found[VLLM].quant_method.moe_kernel.fused_experts).__name__
    if chosen != "TritonExperts":
        raise RuntimeError(f"expected vLLM to choose TritonExperts, got {chosen}")
    drop_in.install(layers=True)
    ours = drop_in.layers()["moealign"]
    found[OURS] = build(model, weights, biases, max_tokens)
    if drop_in.layers()["moealign"] != ours + 1:
        raise RuntimeError(f"expected a layer of ours, got {drop_in.layers()}")
    return found


def reference(model: Model, weights: list[Tensor], biases: list[Tensor], batch: Any, chosen: list[int]) -> Tensor:
    """The outputs for the tokens `chosen`, in float64."""
    x, scores, ids = batch
    inner, rows = model.shape[3], []
    for token in chosen:
        row = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        for score, expert in zip(scores[token].double(), ids[token].tolist(), strict=True):
            h = weights[0][expert].double() @ x[token].double() + (biases[0][expert].double() if biases else 0)
            y = weights[1][expert].double() @ (F.silu(h[:inner]) * h[inner:])
            row += score * (y + (biases[1][expert].double() if biases else 0))
        rows.append(row)
    return torch.stack(rows)


def wrong(model: Model, weights: list[Tensor], biases: list[Tensor], batch: Any, both: dict[str, Any]) -> str | None:
    """What is wrong with the results of `both` layers for a batch; None if they are right."""
    results = {impl: layer.forward_modular(*batch) for impl, layer in both.items()}
    tokens = batch[0].shape[0]
    chosen = sorted({index * (tokens - 1) // 3 for index in range(4)})
    expected = reference(model, weights, biases, batch, chosen)
    for impl, result in results.items():
        error = relative_error(result[chosen], expected)
        if not error < 1e-2:
            return f"{impl}: relative error {error:.3g}"
    error = relative_error(results[OURS], results[VLLM].double())
    return None if error < 1e-2 else f"relative error {error:.3g} between the two"


def stand_in_activation() -> torch.library.Library:
    """vLLM's operator SiLU-mul on GPUs by a plain Triton kernel, as long as the result is held."""
    kernel = vllm_layer.silu_mul_kernel()

    def silu_and_mul(result: Tensor, given: Tensor) -> None:
        rows, width = given.shape[0], given.shape[1] // 2
        kernel[(rows, -(-width // 1024))](given, result, width, BLOCK=1024)

    library = torch.library.Library("_C", "IMPL")
    library.impl("silu_and_mul", silu_and_mul, "CUDA")
    return library


# ---- the run ---------------------------------------------------------------------------------------------------------


def compile_case(job: tuple[str, Model, int]) -> str | None:
    """In a process of its own: compile the kernels of one case into Triton's cache."""
    impl, model, tokens = job
    torch.set_num_threads(1)
    experts, top_k, hidden, inner = model.shape
    try:
        if impl == VLLM:
            module = importlib.import_module(f"{FUSED}.fused_moe")
            sizes = torch.Size((experts, 2 * inner, hidden)), torch.Size((experts, hidden, inner))
            config = module.try_get_optimal_moe_config(*sizes, top_k, None, tokens)
            vllm_layer.compile_kernel(module, config, model.shape, tokens)
            return None
        new = lambda *size, dtype=torch.bfloat16: torch.empty(size, dtype=dtype)  # noqa: E731
        x = new(tokens, hidden)
        biases = (new(experts, 2 * inner), new(experts, hidden)) if model.bias else (None, None)
        layer = ExpertWeights(new(experts, 2 * inner, hidden), new(experts, hidden, inner), *biases)
        routes = Routes(new(tokens, top_k, dtype=torch.float32), new(tokens, top_k, dtype=torch.int32))
        target = target_of(torch.device("cuda", 0))
        tiles = select_tiles(x, layer, routes, target=target)
        layout = empty_layout(tokens, top_k, experts, tiles.block_size) if tiles.block_size else None
        compile_launches(launch.layer_launches(tiles, x, layer, routes, layout, "silu", target)[0])
    except Exception as error:
        return f"{impl} {model.name} {tokens}: {bench.first_line(error)}"
    return None


def run_model(session: bench.Session, model: Model, tokens: list[int]) -> None:
    """Compare and time both layers of one model for each number of tokens."""
    weights = random_weights(model.shape, session.device)
    biases = [torch.randn_like(each[:, :, 0]) for each in weights] if model.bias else []
    both = layers(model, weights, biases, max(tokens))
    try:
        for count in tokens:
            slots = 6 if count <= 256 else 2
            inputs = random_inputs(model.shape, count, slots)
            problem = wrong(model, weights, biases, inputs[0], both)
            if problem:
                session.failures.append(f"WRONG {model.name} {count}: {problem}")
                continue
            calls: dict[str, Callable[[int], Any]] = {
                impl: (lambda slot, layer=layer, inputs=inputs: layer.forward_modular(*inputs[slot]))  # type: ignore[misc]
                for impl, layer in both.items()
            }
            times = graphs_in_turns(
                calls, slots=slots, calls_per_graph=slots, warm_up=slots, budget_us=60_000,
                on_failure=bench.log_capture_failure,
            )  # fmt: skip
            x, scores, ids = inputs[0]
            size = select_tiles(x, ExpertWeights(*weights, *(biases or (None, None))), Routes(scores, ids)).block_size
            experts, top_k = model.shape[:2]
            case = bench.Case(BENCH, layer_name(model.shape, count), (count, top_k, experts, size), [ids])
            for impl in (VLLM, OURS):
                if impl in times:
                    session.add(case, impl, times[impl])
                else:
                    session.failures.append(f"{model.name} {count}: {impl} was not captured")
    finally:
        drop_in.uninstall()


def print_table(rows: list[dict[str, Any]]) -> None:
    bench.log(f"{'microseconds per layer':34} {'vLLM':>9} {'moealign':>9}")
    gains = []
    for row, times in bench.cases_of(rows, BENCH):
        if {VLLM, OURS} <= set(times):
            gains.append(times[VLLM] / times[OURS])
            bench.log(f"{row['case']:34} {times[VLLM]:9.1f} {times[OURS]:9.1f}  x {gains[-1]:.2f}")
    if gains:
        mean = math.exp(sum(map(math.log, gains)) / len(gains))
        bench.log(f"geometric mean x {mean:.3f}, minimum x {min(gains):.2f}, of {len(gains)} cases")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", type=integers, default=list(range(len(MODELS))), help="by number, from 0")
    parser.add_argument("--tokens", type=integers, default=TOKENS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if gpu_missing("benchmarks/engines.py"):
        return 2
    started = time.perf_counter()
    models = [MODELS[index] for index in args.models]
    # vLLM's kernel with biases is compiled by the first call.
    kinds = [(impl, model) for model in models for impl in (OURS, VLLM) if impl == OURS or not model.bias]
    jobs = [(impl, model, tokens) for impl, model in kinds for tokens in args.tokens]
    failed = in_processes(compile_case, jobs, chunksize=2)
    bench.log(f"{len(jobs)} cases compiled, {time.perf_counter() - started:.0f} s; failed: {failed[:3]}")
    gpu = bench.gpu_slug(torch.cuda.get_device_name())
    session = bench.Session(torch.device("cuda", 0), gpu, [])
    importlib.import_module("vllm._custom_ops")
    with process("cuda"), torch.no_grad():
        held = stand_in_activation()
        for model in models:
            try:
                run_model(session, model, args.tokens)
            except Exception as error:  # keep what the other models measure
                session.failures.append(f"{model.name}: {type(error).__name__}: {bench.first_line(error)}")
            torch.cuda.empty_cache()
        del held
    left = drop_in.calls().get("experts", {}).get("vllm", 0)
    if left:
        session.failures.append(f"WRONG {left} calls of our layers were left to vLLM")
    print_table(session.rows)
    status = finish(session.rows, session.failures, args.out or RESULTS / f"engines_{gpu}.csv")
    bench.log(f"{time.perf_counter() - started:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
