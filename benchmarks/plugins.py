"""Times vLLM's own functions and its fused layer with and without the drop-in, inside the released vLLM.

    python benchmarks/plugins.py      # on a GPU, beside vLLM; writes benchmarks/results/plugins_<gpu>.csv

Or with vLLM's Python files and its MoE library alone, unpacked; tests/engines/run_engines.py --pack and
benchmarks/align.py make them:

    MOEALIGN_VLLM_LIBRARY=vllm_moe.so PYTHONPATH=DIR/vllm-0.33.0:DIR/site312:tests/engines python benchmarks/plugins.py

SiLU-mul is then torch's, in both layers.  `align` is vLLM's Python function, `layer` its fused_experts with the
configuration that it picks by itself, `lora` its operator for adapters; each in graph replay, and with `-host` the
host's time of an eager call.  Alignments are compared with a numpy oracle before they are timed, layers with float64
on some tokens, and the layer with the drop-in with the one without, bit for bit.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT / "src"), str(HERE)]

import align as bench  # noqa: E402  benchmarks/align.py: columns, CSV, peers
import experts  # noqa: E402  benchmarks/experts.py: layers

from moealign.integrations import vllm as drop_in  # noqa: E402

OURS, VLLM = "moealign", bench.VLLM
TOKENS = [(1, 16), (32, 16), (512, 64), (4096, 128)]  # and the block size of the alignments
EXPERTS = [128, 256]
LAYERS = [(128, 8, 2048, 768), (256, 8, 7168, 256)]  # experts, top_k, hidden, inner
ADAPTERS = 4
ALIGN = "moe_align_block_size"
FUSED = "vllm.model_executor.layers.fused_moe"

Functions = dict[str, Callable[..., Any]]  # by implementation


def both(module: types.ModuleType, name: str) -> Functions:
    """vLLM's function and the one that the drop-in puts in its place."""
    theirs = getattr(module, name)
    drop_in.install()
    try:
        return {VLLM: theirs, OURS: getattr(module, name)}
    finally:
        drop_in.uninstall()


# ---- the functions ---------------------------------------------------------------------------------------------------


def align_entry(impl: str, function: Callable[..., Any], work: Any) -> Any:
    _, _, num_experts, block_size = work.size
    results: dict[int, Any] = {}

    def call(slot: int) -> None:
        results[0] = function(
            work.inputs[slot], block_size, num_experts, work.expert_map, ignore_invalid_experts=work.ignore
        )

    return bench.Entry(impl, call, lambda slot: bench.bins_difference(*results[0], work.expected(slot), block_size))


def lora_entry(impl: str, function: Callable[..., Any], work: Any, mapping: torch.Tensor) -> Any:
    """Every token has an adapter, all are active; `mapping` int32 [tokens]."""
    _, _, num_experts, block_size = work.size
    sizes = work.capacity
    length, blocks = sizes.sorted_token_ids, sizes.expert_ids
    new = lambda size: torch.full((size,), bench.POISON, dtype=torch.int32, device=work.device)  # noqa: E731
    outs = [(new(ADAPTERS * length), new(ADAPTERS * blocks), new(ADAPTERS)) for _ in work.inputs]
    enabled = torch.ones(ADAPTERS + 1, dtype=torch.int32, device=work.device)
    listed = torch.arange(-1, ADAPTERS, dtype=torch.int32, device=work.device)

    def call(slot: int) -> None:
        function(
            work.inputs[slot], mapping, num_experts, block_size, ADAPTERS, length, blocks, *outs[slot], enabled, listed
        )

    def check(slot: int) -> str | None:
        rows, names, totals = (tensor.view(ADAPTERS, -1) for tensor in outs[slot])
        for adapter in range(ADAPTERS):
            ids = torch.where(mapping[:, None] == adapter, work.inputs[slot], -1).cpu().numpy().reshape(-1)
            want = bench.expected_layout(ids, block_size=block_size, num_experts=num_experts, length=length)
            wrong = bench.bins_difference(rows[adapter], names[adapter], totals[adapter], want, block_size)
            if wrong:
                return f"adapter {adapter}: {wrong}"
        return None

    return bench.Entry(impl, call, check, outs)


def layer_entries(functions: Functions, fused: types.ModuleType, layer: experts.Layer) -> list[Any]:
    chosen, want = layer.reference()
    results: dict[str, dict[int, torch.Tensor]] = {impl: {} for impl in functions}

    def entry(impl: str) -> Any:
        def call(slot: int) -> None:
            fused.moe_align_block_size = functions[impl]  # where the drop-in binds it too
            x, weights, ids = layer.inputs[slot]
            results[impl][slot] = fused.fused_experts(x, *layer.weights, weights, ids)

        def check(slot: int) -> str | None:
            found = results[impl][slot]
            error = float((found[chosen].double() - want).norm() / want.norm()) if slot == 0 else 0.0
            if error > 1e-2:
                return f"relative error {error:.3g}"
            same = torch.equal(found, results[VLLM][slot])
            return None if same else "expected the bits of the layer without the drop-in"

        return bench.Entry(impl, call, check)

    return [entry(impl) for impl in functions]


# ---- the cases -------------------------------------------------------------------------------------------------------


def run(session: Any, work: Any, entries: list[Any], host: bool) -> None:
    session.run(work, entries, bench.time_graphs)
    if host:
        work.bench += "-host"
        session.run(work, entries, bench.time_host)


def bench_align(session: Any, functions: Functions) -> None:
    for num_experts in EXPERTS:
        expert_map = torch.full((num_experts,), -1, dtype=torch.int32, device=session.device)
        expert_map[::8] = torch.arange(num_experts // 8, dtype=torch.int32, device=session.device)
        for tokens, block_size in TOKENS:
            size = (tokens, 8, num_experts, block_size)
            inputs = session.inputs("uniform", size)
            for kind, mapped in (("", None), ("mapped", expert_map)):
                work = bench.Work(
                    "plugin-align", bench.name_of(size, kind), size, inputs, expert_map=mapped, ignore=True
                )
                entries = [align_entry(impl, function, work) for impl, function in functions.items()]
                run(session, work, entries, host=True)


def bench_lora(session: Any, functions: Functions) -> None:
    for tokens, block_size in TOKENS:
        size = (tokens, 8, EXPERTS[0], block_size)
        work = bench.Work("plugin-lora", bench.name_of(size, f"A{ADAPTERS}"), size, session.inputs("uniform", size))
        mapping = torch.arange(tokens, dtype=torch.int32, device=session.device) % ADAPTERS
        entries = [lora_entry(impl, function, work, mapping) for impl, function in functions.items()]
        run(session, work, entries, host=tokens <= 32)


def bench_layer(session: Any, functions: Functions, fused: types.ModuleType) -> None:
    for layer in experts.layers(LAYERS, [tokens for tokens, _ in TOKENS]):
        num_experts, top_k, hidden, inner = layer.shape
        session.slots = len(layer.inputs)
        config = fused.try_get_optimal_moe_config(
            *(weight.size() for weight in layer.weights), top_k, None, layer.tokens
        )
        size = (layer.tokens, top_k, num_experts, config["BLOCK_SIZE_M"])
        case = f"T{layer.tokens}-k{top_k}-E{num_experts}-H{hidden}-I{inner}"
        work = bench.Work("plugin-layer", case, size, [ids for _, _, ids in layer.inputs])
        run(session, work, layer_entries(functions, fused, layer), host=layer.tokens <= 32)


def print_table(rows: list[dict[str, Any]]) -> None:
    cases: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        cases.setdefault((row["bench"], row["case"]), {})[row["impl"]] = float(row["median_us"])
    bench.say(f"{'microseconds a call':46} {'without':>9} {'with':>9}")
    for (name, case), times in cases.items():
        theirs, ours = times.get(VLLM, float("nan")), times.get(OURS, float("nan"))
        bench.say(f"{name:18} {case:27} {theirs:9.2f} {ours:9.2f}  x {theirs / ours:.2f}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        bench.say("benchmarks/plugins.py: expected a GPU that torch can use, found none")
        return 2
    home, ops, fused = map(importlib.import_module, (f"{FUSED}.{ALIGN}", "vllm._custom_ops", f"{FUSED}.fused_moe"))
    gpu = bench.gpu_slug(torch.cuda.get_device_name())
    session = bench.Session(torch.device("cuda", torch.cuda.current_device()), gpu, [])
    with torch.cuda.stream(torch.cuda.Stream()):
        for part in (
            lambda: bench_align(session, both(home, ALIGN)),
            lambda: bench_lora(session, both(ops, "moe_lora_align_block_size")),
            lambda: bench_layer(session, both(fused, ALIGN), fused),
        ):
            try:
                part()
            except Exception:  # what the other parts measure is kept
                session.wrong.append(traceback.format_exc())
    left = {name: each["vllm"] for name, each in drop_in.calls().items() if each["vllm"]}
    if left:
        session.wrong.append(f"WRONG calls that the drop-in left to vLLM: {left}")
    print_table(session.rows)
    bench.write_csv(session.rows, args.out or HERE / "results" / f"plugins_{gpu}.csv")
    for line in session.wrong:
        bench.say(line)
    return 1 if session.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
