"""Tokens a second of a Qwen3-MoE-shaped model of random weights: moealign, grouped_mm and batched_mm as its experts.

    python benchmarks/transformers_model.py            # on a GPU; layers of the real size
    python benchmarks/transformers_model.py --small    # anywhere, to see that it runs

`moealign-routers` replaces the routers as well.  Decode steps at batch 1 and 16 after a prompt of 64 tokens, and a
prefill of 4,096 tokens: eager wall time, as users of Transformers see it.  `-graph` is the same decode step captured in
a CUDA graph with a static cache, where capture succeeds.  `transformers-train` rows are training steps without the
optimiser, forward and backward; `liger` there is Liger's patch of the whole model, if it can be imported.
Logits and gradients are first compared with those of grouped_mm.  Writes benchmarks/results/transformers_<gpu>.csv.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, finish, relative_error

from moealign import bench
from moealign.integrations import transformers as integration
from moealign.timing import capture, host_us

ROUTED = "moealign-routers"
IMPLS = ["grouped_mm", "moealign", ROUTED, "batched_mm"]  # the first is what the others are compared to
BATCHED_MAX_TOKENS = 64  # batched_mm copies the weights of every route


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
        times.append(host_us(call, wait=lambda: synchronize(device)))
    return times


def decode_step(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Decodes one token for each sequence after its prompt `ids` ``[batch, prompt]``, always into one cache slot."""
    import transformers

    (batch, prompt), device = ids.shape, ids.device
    cache = transformers.StaticCache(config=model.config, max_cache_len=prompt + 8)
    for part in ids.split(max(1, BATCHED_MAX_TOKENS // batch), dim=1):
        model(part, past_key_values=cache)
    token = ids[:, -1:]
    positions = torch.full((batch, 1), prompt, device=device)

    def step() -> Any:
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt)  # back to the end of the prompt
        return model(token, past_key_values=cache, position_ids=positions)

    return step


def graphed(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    for _ in range(3):
        step()
    return capture([step])


def training_times(model: Any, ids: torch.Tensor, session: bench.Session, turns: int) -> dict[str, list[float]]:
    """Wall times of a forward and a backward by implementation, after their gradients were compared."""
    device = ids.device.type
    model.train().requires_grad_(True)
    watched = model.model.layers[0].mlp.experts.gate_up_proj
    expected = None
    timed: dict[str, list[float]] = {}

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False).loss.backward()

    for impl in ("grouped_mm", "moealign", ROUTED, "liger"):
        integration.restore_routers(model)
        try:
            if impl == "liger":
                from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

                apply_liger_kernel_to_qwen3_moe(model=model)
            else:
                model.set_experts_implementation("moealign" if impl == ROUTED else impl)
                if impl == ROUTED:
                    integration.replace_routers(model)
            step()
        except Exception as problem:
            bench.log(f"train {ids.numel()} {impl}: left out, {bench.first_line(problem)}")
            continue
        expected = watched.grad.double() if expected is None else expected
        error = relative_error(watched.grad, expected)
        if not error < 5e-2:
            session.failures.append(f"WRONG train {ids.numel()} {impl}: gradients differ by {error:.3g}")
            continue
        timed[impl] = wall(step, device, turns)
    integration.restore_routers(model)
    model.eval().zero_grad(set_to_none=True)
    return timed


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
    model = model_of(args.layers, args.small, device)
    config = model.config
    shape = f"H{config.hidden_size}-I{config.moe_intermediate_size} {args.layers} layers"

    def add(where: str, kind: str, tokens: int, timed: dict[str, list[float]]) -> None:
        case = bench.Case(where, f"{kind} T{tokens} {shape}", (tokens, 8, config.num_experts, 0), [torch.zeros(1)])
        for impl, times in timed.items():
            session.add(case, impl, times)
            median = statistics.median(times)
            bench.log(f"{kind} of {tokens:5}: {impl:18} {median:10.0f} us, {tokens / median * 1e6:10.0f} tokens/s")

    with torch.inference_mode():
        for kind, batch, length in (("decode", 1, 1), ("decode", 16, 1), ("prefill", 1, args.prefill)):
            ids = torch.randint(0, 500, (batch, length if kind == "prefill" else 64), device=device)
            tokens = batch * length
            timed: dict[str, list[float]] = {}
            expected = None
            for impl in IMPLS:
                if impl == "batched_mm" and tokens > BATCHED_MAX_TOKENS:
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
                expected = logits if expected is None else expected
                error = relative_error(logits, expected)
                if not error < 5e-2:
                    session.failures.append(f"WRONG {kind} {tokens} {impl}: logits differ by {error:.3g}")
                    continue
                step()
                timed[impl] = wall(step, device, args.turns)
                if device == "cuda" and kind == "decode":
                    try:
                        timed[f"{impl}-graph"] = wall(graphed(step).replay, device, args.turns)
                    except Exception as problem:
                        bench.log(f"{kind} {batch} {impl}: not captured, {bench.first_line(problem)}")
                        torch.cuda.synchronize()
            add("transformers", kind, tokens, timed)
    ids = torch.randint(0, 500, (1, args.prefill), device=device)  # of its own: not an inference tensor
    add("transformers-train", "train", args.prefill, training_times(model, ids, session, args.turns))
    return finish(session.rows, session.failures, args.out or RESULTS / f"transformers_{gpu}.csv")


if __name__ == "__main__":
    sys.exit(main())
