"""Run a Transformers Mixture-of-Experts model with moealign's experts.

    python examples/faster_transformers.py                          # a small random model, on the GPU or the CPU
    python examples/faster_transformers.py Qwen/Qwen3-30B-A3B       # a real model, if it fits

`moealign.integrations.transformers.install()` registers the experts; models then select them by name.  The script
generates with Transformers' experts and with ours, compares the tokens, times both in turns, and records the routing.
On a GPU ours are faster; on a CPU it depends on the model and the machine, see docs/experts.md.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import transformers

import moealign
from moealign.integrations import transformers as integration


def random_model(device: str) -> Any:
    """A small Qwen3-MoE with random weights, which needs no download."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        pad_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32).eval()


def generate(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[torch.Tensor, float]:
    """Greedy tokens, and their rate in tokens per second."""
    start = time.perf_counter()
    out = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    if out.is_cuda:
        torch.cuda.synchronize()
    return out, tokens * len(prompt) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", nargs="?", help="a name or a path (default: a small random model)")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each sequence (default: 32)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: 1)")
    parser.add_argument("--turns", type=int, default=5, help="timed turns of each implementation (default: 5)")
    args = parser.parse_args()
    if min(args.tokens, args.batch, args.turns) < 1:
        parser.error("--tokens, --batch and --turns: expected ints of at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    integration.install()

    if args.model:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map=device)
        text = transformers.AutoTokenizer.from_pretrained(args.model)("Mixture of experts", return_tensors="pt")
        prompt = text["input_ids"].to(device).expand(args.batch, -1)
    else:
        model = random_model(device)
        prompt = torch.randint(0, 1024, (args.batch, 16), generator=torch.Generator().manual_seed(0)).to(device)

    names = ("grouped_mm", "moealign")
    outputs: dict[str, torch.Tensor] = {}
    rates: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(args.turns + 1):
        # In turns, the order reversed each time, so that a busy machine slows both alike; the first compiles kernels.
        for name in names if turn % 2 else reversed(names):
            model.set_experts_implementation(name)  # or experts_implementation="moealign" in from_pretrained
            outputs[name], rate = generate(model, prompt, args.tokens)
            if turn:
                rates[name].append(rate)
    print(f"{device}, {torch.get_num_threads()} CPU threads for both, {args.turns} turns; tokens per second")
    for name in names:
        print(f"{name:>12}: best {max(rates[name]):8.1f}, worst {min(rates[name]):8.1f}")
    ratios = sorted(ours / theirs for ours, theirs in zip(rates["moealign"], rates["grouped_mm"], strict=True))
    print(
        f"moealign / grouped_mm: {max(rates['moealign']) / max(rates['grouped_mm']):.2f} of the best; "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f} in single turns"
    )
    same = torch.equal(outputs["grouped_mm"], outputs["moealign"])
    print("the same tokens" if same else "different tokens: rounding decides greedy choices between near ties")

    with moealign.capture(model) as recording, torch.no_grad():
        model(outputs["moealign"])
    trace = recording.trace()
    counts = torch.bincount(trace.topk_ids.flatten().long(), minlength=trace.num_experts)
    print(
        f"routing: {trace.layers} layers, {trace.tokens} tokens to {trace.top_k} of {trace.num_experts} experts; "
        f"the busiest gets {counts.max() / counts.float().mean():.1f} times the mean"
    )


if __name__ == "__main__":
    main()
