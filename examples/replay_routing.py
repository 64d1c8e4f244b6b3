"""Routing replay: generate with one precision, train with another, with and without the generator's choices.

    python examples/replay_routing.py [--tokens 64] [--layers 4]

Reinforcement learning generates with an engine in low precision and trains in another.  Where two experts score alike,
the trainer then chooses others than the engine did, and the ratio of the two probabilities of a token, which the loss
is made of, is far from one for no reason but that.  Routing replay repeats the engine's choices in the trainer.

The model is a small Qwen3-MoE with random weights, in bfloat16 for generating and in float32 for training.
"""

from __future__ import annotations

import argparse
import copy

import torch
import transformers

import moealign
from moealign.integrations import transformers as integration


def small_model(layers: int) -> transformers.PreTrainedModel:
    config = transformers.Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=64, num_experts_per_tok=8,
        eos_token_id=None, pad_token_id=0, initializer_range=0.15,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def log_probabilities(model: transformers.PreTrainedModel, text: torch.Tensor) -> torch.Tensor:
    """Of each token of `text` ``[1, n]`` but the first, given those before it."""
    logits = model(text[:, :-1], use_cache=False).logits.float()
    return logits.log_softmax(-1).gather(-1, text[:, 1:, None])[0, :, 0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    trainer = small_model(options.layers)
    generator = copy.deepcopy(trainer).to(torch.bfloat16).eval()
    prompt = torch.randint(1, 256, (1, 16))
    text = generator.generate(prompt, max_new_tokens=options.tokens, do_sample=True, min_new_tokens=options.tokens)

    # What the engine chose, for every token that the trainer will see.
    with moealign.capture(generator, padding="keep") as recording, torch.no_grad():
        generated = log_probabilities(generator, text)
    print(
        f"{text.shape[1]} tokens, {options.layers} layers, 8 of 64 experts; generated in bfloat16, trained in float32"
    )
    print(f"{'':16}{'choices that differ':>22}{'largest ratio of probabilities':>34}")
    for name, replayed in (("without replay", None), ("with replay", recording.topk_ids)):
        trainer.zero_grad()
        with moealign.capture(trainer) as own:
            if replayed is None:
                trained = log_probabilities(trainer, text)
            else:
                with integration.replay(trainer, replayed):
                    trained = log_probabilities(trainer, text)
        ratio = (trained - generated).exp()
        (-ratio.mean()).backward()  # a policy gradient with a constant reward
        both = [(own.topk_ids[layer], ids) for layer, ids in recording.topk_ids.items()]
        kept = sum(int((one[:, :, None] == other[:, None, :]).any(2).sum()) for one, other in both)
        share = 1 - kept / sum(other.numel() for _, other in both)
        largest = torch.maximum(ratio, 1 / ratio).max().item()
        print(f"{name:16}{share:>22.1%}{largest:>34.3f}")


if __name__ == "__main__":
    main()
