"""Times vLLM's own functions and its fused layer with and without the drop-in, inside the released vLLM.

    python benchmarks/plugins.py      # on a GPU with vLLM installed; writes benchmarks/results/plugins_<gpu>.csv

Or with vLLM's Python files and its MoE library alone, unpacked; tests/engines/run_engines.py --pack and
benchmarks/align.py make them:

    MOEALIGN_VLLM_LIBRARY=vllm_moe.so PYTHONPATH=src:DIR/vllm-0.33.0:DIR/site312:tests python benchmarks/plugins.py

SiLU-mul is then torch's, in both layers.  `align` is vLLM's Python function, `layer` its fused_experts with the
configuration that it selects itself, `lora` its operator for adapters.  Each is timed in graph replay, and with `-host`
as the host time of an eager call.  Alignments are compared with a numpy oracle before they are timed, layers with
float64 on some tokens, and the layer with the drop-in with the one without, bit for bit.
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

import experts
import torch
from common import RESULTS, finish, gpu_missing, layer_name, relative_error

from moealign import bench
from moealign.integrations import vllm as drop_in

OURS, VLLM = "moealign", bench.VLLM
TOKENS = [(1, 16), (32, 16), (512, 64), (4096, 128)]  # and the block size of the alignments
EXPERTS = [128, 256]
LAYERS = [(128, 8, 2048, 768), (256, 8, 7168, 256)]  # experts, top_k, hidden, inner
ADAPTERS = 4
ALIGN = "moe_align_block_size"
FUSED = "vllm.model_executor.layers.fused_moe"

Functions = dict[str, Callable[..., Any]]  # by implementation


def both(module: types.ModuleType, name: str) -> Functions:
    """vLLM's function, and the one that the drop-in replaces it with."""
    theirs = getattr(module, name)
    drop_in.install()
    try:
        return {VLLM: theirs, OURS: getattr(module, name)}
    finally:
        drop_in.uninstall()


# ---- the functions ---------------------------------------------------------------------------------------------------


def align_candidate(impl: str, function: Callable[..., Any], case: bench.Case) -> bench.Candidate:
    _, _, num_experts, block_size = case.size
    results: dict[int, Any] = {}

    def call(slot: int) -> None:
        results[0] = function(
            case.inputs[slot], block_size, num_experts, case.expert_map, ignore_invalid_experts=case.ignore
        )

    return bench.Candidate(impl, call, lambda slot: bench.bins_difference(*results[0], case.expected(slot), block_size))


def lora_candidate(impl: str, function: Callable[..., Any], case: bench.Case, mapping: torch.Tensor) -> bench.Candidate:
    """`mapping` int32 ``[tokens]`` gives the adapter of each token; all adapters are active."""
    _, _, num_experts, block_size = case.size
    sizes = case.capacity
    length, blocks = sizes.sorted_token_ids, sizes.expert_ids
    new = lambda size: torch.full((size,), bench.POISON, dtype=torch.int32, device=case.device)  # noqa: E731
    outs = [(new(ADAPTERS * length), new(ADAPTERS * blocks), new(ADAPTERS)) for _ in case.inputs]
    enabled = torch.ones(ADAPTERS + 1, dtype=torch.int32, device=case.device)
    listed = torch.arange(-1, ADAPTERS, dtype=torch.int32, device=case.device)

    def call(slot: int) -> None:
        function(
            case.inputs[slot], mapping, num_experts, block_size, ADAPTERS, length, blocks, *outs[slot], enabled, listed
        )

    def check(slot: int) -> str | None:
        rows, names, totals = (tensor.view(ADAPTERS, -1) for tensor in outs[slot])
        for adapter in range(ADAPTERS):
            ids = torch.where(mapping[:, None] == adapter, case.inputs[slot], -1).cpu().numpy().reshape(-1)
            expected = bench.expected_layout(ids, block_size=block_size, num_experts=num_experts, length=length)
            wrong = bench.bins_difference(rows[adapter], names[adapter], totals[adapter], expected, block_size)
            if wrong:
                return f"adapter {adapter}: {wrong}"
        return None

    return bench.Candidate(impl, call, check, outs)


def layer_candidates(functions: Functions, fused: types.ModuleType, layer: experts.Layer) -> list[bench.Candidate]:
    chosen, expected = layer.reference()
    results: dict[str, dict[int, torch.Tensor]] = {impl: {} for impl in functions}

    def candidate(impl: str) -> bench.Candidate:
        def call(slot: int) -> None:
            fused.moe_align_block_size = functions[impl]  # the drop-in rebinds this name too
            x, weights, ids = layer.inputs[slot]
            results[impl][slot] = fused.fused_experts(x, *layer.weights, weights, ids)

        def check(slot: int) -> str | None:
            result = results[impl][slot]
            error = relative_error(result[chosen], expected) if slot == 0 else 0.0
            if error > 1e-2:
                return f"relative error {error:.3g}"
            same = torch.equal(result, results[VLLM][slot])
            return None if same else "expected the bits of the layer without the drop-in"

        return bench.Candidate(impl, call, check)

    return [candidate(impl) for impl in functions]


# ---- the cases -------------------------------------------------------------------------------------------------------


def run(session: bench.Session, case: bench.Case, candidates: list[bench.Candidate], host: bool) -> None:
    session.run(case, candidates, bench.time_graphs)
    if host:
        case.bench += "-host"
        session.run(case, candidates, bench.time_host)


def bench_align(session: bench.Session, functions: Functions) -> None:
    for num_experts in EXPERTS:
        expert_map = torch.full((num_experts,), -1, dtype=torch.int32, device=session.device)
        expert_map[::8] = torch.arange(num_experts // 8, dtype=torch.int32, device=session.device)
        for tokens, block_size in TOKENS:
            size = (tokens, 8, num_experts, block_size)
            inputs = session.inputs("uniform", size)
            for kind, mapped in (("", None), ("mapped", expert_map)):
                case = bench.Case(
                    "plugin-align", bench.case_name(size, kind), size, inputs, expert_map=mapped, ignore=True
                )
                candidates = [align_candidate(impl, function, case) for impl, function in functions.items()]
                run(session, case, candidates, host=True)


def bench_lora(session: bench.Session, functions: Functions) -> None:
    for tokens, block_size in TOKENS:
        size = (tokens, 8, EXPERTS[0], block_size)
        case = bench.Case("plugin-lora", bench.case_name(size, f"A{ADAPTERS}"), size, session.inputs("uniform", size))
        mapping = torch.arange(tokens, dtype=torch.int32, device=session.device) % ADAPTERS
        candidates = [lora_candidate(impl, function, case, mapping) for impl, function in functions.items()]
        run(session, case, candidates, host=tokens <= 32)


def bench_layer(session: bench.Session, functions: Functions, fused: types.ModuleType) -> None:
    for layer in experts.layers(LAYERS, [tokens for tokens, _ in TOKENS]):
        num_experts, top_k, _, _ = layer.shape
        session.slots = len(layer.inputs)
        config = fused.try_get_optimal_moe_config(
            *(weight.size() for weight in layer.weights), top_k, None, layer.tokens
        )
        size = (layer.tokens, top_k, num_experts, config["BLOCK_SIZE_M"])
        name = layer_name(layer.shape, layer.tokens)
        case = bench.Case("plugin-layer", name, size, [ids for _, _, ids in layer.inputs])
        run(session, case, layer_candidates(functions, fused, layer), host=layer.tokens <= 32)


def print_table(rows: list[dict[str, Any]]) -> None:
    bench.log(f"{'microseconds per call':46} {'without':>9} {'with':>9}")
    for name in dict.fromkeys(row["bench"] for row in rows):
        for row, times in bench.cases_of(rows, name):
            without, drop = times.get(VLLM, float("nan")), times.get(OURS, float("nan"))
            bench.log(f"{name:18} {row['case']:27} {without:9.2f} {drop:9.2f}  x {without / drop:.2f}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if gpu_missing("benchmarks/plugins.py"):
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
            except Exception:  # keep what the other parts measure
                session.failures.append(traceback.format_exc())
    left = {name: each["vllm"] for name, each in drop_in.calls().items() if each["vllm"]}
    if left:
        session.failures.append(f"WRONG calls that the drop-in left to vLLM: {left}")
    print_table(session.rows)
    return finish(session.rows, session.failures, args.out or RESULTS / f"plugins_{gpu}.csv")


if __name__ == "__main__":
    sys.exit(main())
