"""What the engines' operators must write, in plain loops: vLLM's adapters and SGLang's layout."""

from __future__ import annotations

import random

import torch

from moealign.testing import oracle_align


def rows_of(ids, block_size, num_experts, **named):
    layout = oracle_align(ids, block_size=block_size, num_experts=num_experts, **named)
    return [layout["sorted_token_ids"], layout["expert_ids"], layout["num_tokens_post_padded"][0]]


def lora_oracle(ids, mapping, experts, block_size, slots, length, blocks, enabled, listed, expert_map):
    """vLLM's moe_lora_align_block_size, slot by slot, in plain loops; None for a slot that it leaves as it is."""
    n, top_k = ids.numel(), ids.shape[1]
    found = []
    for slot in range(slots):
        if slot not in listed[: slots + 1] or not enabled[slot]:
            found.append(None)
            continue
        bins = {}
        for i, expert in enumerate(ids.flatten().tolist()):
            if mapping[i // top_k] != slot or not 0 <= expert < experts:
                continue
            local = expert if expert_map is None else expert_map[expert]
            if 0 <= local < experts:
                bins.setdefault(local, []).append(i)
        rows, of = [], []
        for expert in sorted(bins):
            padded = -(-len(bins[expert]) // block_size) * block_size
            rows += bins[expert] + [n] * (padded - len(bins[expert]))
            of += [expert] * (padded // block_size)
        found.append((rows + [n] * (length - len(rows)), of + [-1] * (blocks - len(of)), len(rows)))
    return found


LORA = [
    # tokens, top_k, experts, block size, slots, spare rows, map
    (0, 2, 4, 4, 2, 0, False),
    (1, 1, 1, 1, 1, 0, False),
    (3, 2, 8, 16, 3, 5, True),  # fewer routes than experts
    (40, 6, 16, 16, 4, 0, False),
    (33, 3, 7, 8, 5, 11, True),
    (9, 4, 5, 4, 40, 0, False),  # more slots than are compared at once
]


def lora_case(tokens, top_k, experts, block_size, slots, spare, mapped, device="cpu", seed=0):
    """Arguments of the operator with poisoned buffers, and what must be in them."""
    draw = random.Random(seed)
    ids = torch.tensor(
        [[draw.randint(-1, experts) for _ in range(top_k)] for _ in range(tokens)], dtype=torch.int32
    ).reshape(tokens, top_k)
    mapping = [draw.randint(-1, slots) for _ in range(tokens)]
    enabled = [draw.randint(0, 3) for _ in range(slots + 1)]
    listed = [slot for slot in range(slots) if draw.random() < 0.8]
    listed = [-1, *listed, *[slots] * (slots - len(listed)), 0]  # vLLM reads one more than there are slots, no further
    expert_map = [draw.randint(-1, experts - 1) for _ in range(experts)] if mapped else None
    n = tokens * top_k
    length = (n * block_size if n < experts else n + experts * (block_size - 1)) + spare
    blocks = -(-length // block_size)

    def int32(values):
        return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)

    out = [
        torch.full((size,), -7, dtype=torch.int32, device=device) for size in (slots * length, slots * blocks, slots)
    ]
    arguments = (
        ids.to(device), int32(mapping), experts, block_size, slots, length, blocks, *out,
        int32(enabled), int32(listed), int32(expert_map),
    )  # fmt: skip
    expected = lora_oracle(ids, mapping, experts, block_size, slots, length, blocks, enabled, listed, expert_map)
    return arguments, out, expected


def assert_lora(out, expected, poisoned=True):
    slots = len(expected)
    found = zip(out[0].view(slots, -1).tolist(), out[1].view(slots, -1).tolist(), out[2].tolist(), strict=True)
    for slot, (got, want) in enumerate(zip(found, expected, strict=True)):
        if want is not None:
            assert got == want, f"slot {slot}"
        elif poisoned:
            assert {*got[0], *got[1], got[2]} == {-7}, f"slot {slot}: written, though it is not active"


def sglang_oracle(ids, block_size, experts, ignore):
    """SGLang's moe_align_block_size in plain loops: bins are ids plus one."""
    flat, bins = ids.flatten().tolist(), {}
    for i, expert in enumerate(flat):
        if (expert >= 0 or (expert == -1 and not ignore)) and expert < experts:
            bins.setdefault(expert + 1, []).append(i)
    n = len(flat)
    length = n * block_size if n < experts + 1 else n + (experts + 1) * (block_size - 1)
    length = (length + 3) // 4 * 4
    rows, of = [], []
    for bin_ in sorted(bins):
        padded = -(-len(bins[bin_]) // block_size) * block_size
        rows += bins[bin_] + [n] * (padded - len(bins[bin_]))
        of += [bin_ - 1] * (padded // block_size)
    return rows + [n] * (length - len(rows)), of + [-1] * (-(-length // block_size) - len(of)), len(rows)
