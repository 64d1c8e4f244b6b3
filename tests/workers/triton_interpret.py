"""The Triton backend under the interpreter against the plain-loop oracle.  Run by test_triton.py in its own process.

TRITON_INTERPRET=1 PYTHONPATH=src:tests python tests/workers/triton_interpret.py [cases]
"""

from __future__ import annotations

import sys

import torch
from helpers import failures, patch_interpreter

import moealign
from moealign.layout import EXTRAS
from moealign.testing import check_backend, difference, oracle_align, oracle_align_batched

# (tokens, top_k, experts, block size): each crosses a rule of the backend or a bound of a kernel.
SIZES = [
    (0, 8, 4, 16),  # no route
    (1, 1, 1, 1),  # one of everything
    (16, 8, 256, 16),  # the maximum for one program
    (43, 3, 7, 16),  # one route more: the first of independent programs
    (17, 8, 256, 16),  # the last of them with a few routes, and others with none
    (64, 8, 1_000, 1),  # as many bins as they take, blocks of one row
    (1023, 2, 60, 7),  # as many routes as they take, a block size that divides nothing
    (1031, 2, 60, 7),  # three launches: a chunk cut short
    (1100, 8, 33, 64),  # many chunks
    (33, 1, 1_025, 16),  # too many bins for the small kernel's offsets
    (150, 1, 65_536, 16),  # tables beyond any register; two steps and more of the last scan
    (5, 2, 6, 5_000),  # a block of more rows than a filling tile
    (9, 2, 5, 8_192),  # too many rows for one program
]
BATCHED = [(0, 4, 4), (5, 8, 4), (3, 0, 16), (33, 17, 7), (300, 5, 64), (4_200, 2, 1)]


def hand_made(generator):
    """(case, layout, error word, the oracle's layout) of calls with all extras."""
    extras = dict.fromkeys(EXTRAS, True)
    for tokens, top_k, experts, size in SIZES:
        ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator, dtype=torch.int32)
        call = {"block_size": size, "num_experts": experts}
        last = torch.full_like(ids, experts - 1)
        for what, values in (("random", ids), ("one expert", last))[: 1 if experts > 1_025 else 2]:
            word = moealign.new_error_word("cpu")
            layout = moealign.align(values, **call, **extras, error_word=word, backend="triton")
            yield f"{what} {tokens} x {top_k}, {experts} experts, B {size}", layout, word, oracle_align(values, **call)
    for size in (60, 500):
        far = torch.full((size, 1), 2**32 + 3)
        far[::3] = 3
        call = {"block_size": 4, "num_experts": 5}
        word = moealign.new_error_word("cpu")
        layout = moealign.align(far, **call, error_word=word, backend="triton")
        yield f"2**32 + 3 is no 3, {size}", layout, word, oracle_align(far, **call)
    del extras["scatter_idx"]
    for batches, max_tokens, size in BATCHED:
        counts = torch.randint(-1, max_tokens + 2, (batches,), generator=generator)
        call = {"max_tokens_per_batch": max_tokens, "block_size": size}
        word = moealign.new_error_word("cpu")
        layout = moealign.align_batched(counts, **call, **extras, error_word=word, backend="triton")
        yield f"{batches} batches of {max_tokens}, B {size}", layout, word, oracle_align_batched(counts, **call)


def compared(cases: int):
    """(case, difference or None)."""
    for case, layout, word, expected in hand_made(torch.Generator().manual_seed(0)):
        wrong = difference(layout, expected)
        if wrong is None and word.tolist() != expected["error_word"]:
            wrong = f"error_word: expected {expected['error_word'][0]}, got {word.item()}"
        yield case, wrong
    yield from check_backend("triton", "cpu", cases=cases)


if __name__ == "__main__":
    patch_interpreter()
    sys.exit(failures(compared(cases=int(sys.argv[1]) if len(sys.argv) > 1 else 40)))
