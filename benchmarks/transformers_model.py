"""Tokens a second of a Qwen3-MoE-shaped model of random weights: moealign, grouped_mm and batched_mm as its experts.

    PYTHONPATH=src python3 benchmarks/transformers_model.py            # a GPU; layers of the real size
    PYTHONPATH=src python3 benchmarks/transformers_model.py --small    # anything, to see that it runs

`moealign-routers` has the routers replaced as well.  Decode at batch 1 and 16 behind a prompt of 64 tokens, and a
prefill of 4,096: eager, wall time, as a user of Transformers has it; `graph` is the same decode step captured in a CUDA
graph with a static cache, where that succeeds.
Logits are compared with grouped_mm's first.  Writes benchmarks/results/transformers_<gpu>.csv.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE)]

import align as bench  # noqa: E402  benchmarks/align.py: columns and CSV

from moealign.integrations import transformers as integration  # noqa: E402

ROUTED = "moealign-routers"  # and its routers too
IMPLS = ["moealign", ROUTED, "grouped_mm", "batched_mm"]
BATCHED_MOST = 64  # tokens: batched_mm copies the weights of every route


def model_of(layers: int, small: bool, device: str) -> Any:
    import transformers

    size: dict[str, int] = {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768}
    size |= {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
    if small:
        size = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
        size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 16}
    config = transformers.Qwen3MoeConfig(
        **size, vocab_size=32_000 if not small else 512, num_experts_per_tok=8, num_hidden_layers=layers,
        max_position_embeddings=8192, pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def wall(call: Callable[[], Any], device: str, turns: int) -> list[float]:
    times = []
    for _ in range(turns):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e6)
    return times


def decode_step(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """One token for each sequence behind its prompt `ids` ``[batch, prompt]``, always into one place of a cache."""
    import transformers

    (batch, prompt), device = ids.shape, ids.device
    cache = transformers.StaticCache(config=model.config, max_cache_len=prompt + 8)
    model(ids, past_key_values=cache)
    token = ids[:, -1:]
    where = torch.full((batch, 1), prompt, device=device)

    def step() -> Any:
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt)  # back to behind the prompt
        return model(token, past_key_values=cache, position_ids=where)

    return step


def graphed(step: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prefill", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = bench.gpu_slug(torch.cuda.get_device_name()) if device == "cuda" else "cpu"
    integration.install()
    session = bench.Session(torch.device(device), gpu, [])
    wrong = []
    with torch.inference_mode():
        model = model_of(args.layers, args.small, device)
        config = model.config
        shape = f"H{config.hidden_size}-I{config.moe_intermediate_size} {args.layers} layers"
        for kind, batch, length in (("decode", 1, 1), ("decode", 16, 1), ("prefill", 1, args.prefill)):
            ids = torch.randint(0, 500, (batch, length if kind == "prefill" else 64), device=device)
            tokens = batch * length
            found: dict[str, list[float]] = {}
            want = None
            for impl in sorted(IMPLS, key=lambda each: each != "grouped_mm"):
                if impl == "batched_mm" and tokens > BATCHED_MOST:
                    continue
                integration.restore_routers(model)
                model.set_experts_implementation("moealign" if impl == ROUTED else impl)
                if impl == ROUTED:
                    integration.replace_routers(model)
                if kind == "prefill":
                    step = lambda: model(ids, use_cache=False, logits_to_keep=1)  # noqa: E731, B023
                else:
                    step = decode_step(model, ids)
                logits = step().logits.double()
                want = logits if want is None else want
                error = float((logits - want).norm() / want.norm())
                if not error < 5e-2:
                    wrong.append(f"WRONG {kind} {tokens} {impl}: logits differ by {error:.3g}")
                    continue
                step()
                found[impl] = wall(step, device, args.turns)
                if device == "cuda" and kind == "decode":
                    try:
                        found[f"{impl}-graph"] = wall(graphed(step), device, args.turns)
                    except Exception as problem:
                        bench.say(f"{kind} {batch} {impl}: not captured, {bench.first_line(problem)}")
                        torch.cuda.synchronize()
            size = (tokens, 8, config.num_experts, 0)
            work = bench.Work("transformers", f"{kind} T{tokens} {shape}", size, [torch.zeros(1)])
            for impl, times in found.items():
                session.add(work, impl, times)
                median = statistics.median(times)
                bench.say(f"{kind} of {tokens:5}: {impl:18} {median:10.0f} us, {tokens / median * 1e6:10.0f} tokens/s")
    bench.write_csv(session.rows, args.out or HERE / "results" / f"transformers_{gpu}.csv")
    for line in wrong:
        bench.say(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
