"""The Triton router under the interpreter against the plain loops.  test_routing_triton.py runs it in its own process.

TRITON_INTERPRET=1 PYTHONPATH=src:tests python tests/workers/routing_interpret.py
"""

from __future__ import annotations

import sys

import torch
from cases.router import KINDS, SCORES, arguments, awkward, close_calls, routed
from helpers import FLOATS, failures, patch_interpreter

from moealign.testing import oracle_route

SIZES = [(1, 4, 1), (12, 8, 2), (4, 60, 6), (2, 100, 32), (2, 260, 8), (2, 896, 16)]  # tokens, experts, top_k


def cases():
    """(case, results of the kernel, results of the loops)."""
    number = 0
    for kind in KINDS:
        for tokens, experts, top_k in SIZES:
            number += 1
            generator = torch.Generator().manual_seed(number)
            options = arguments(kind, experts, top_k, generator)
            if options.get("num_groups", 1) > 300:  # the loop over groups of one, which takes most of the time
                continue
            logits = awkward(tokens, experts, generator).to(FLOATS[number % 3])
            valid = max(tokens - 1, 1)
            call = {"block_size": 4, "num_valid_tokens": torch.tensor([valid], dtype=torch.int32), **options}
            weights, ids, _, mean = routed(logits, top_k, **call, mean_probability=True, backend="triton")
            yield (
                f"{kind}, {tokens} x {experts}, {top_k}",
                (ids, weights, mean),
                oracle_route(logits, top_k, **options, num_valid_tokens=valid),
            )


def close():
    """:func:`cases` in which the last bits of the scores decide."""
    generator = torch.Generator().manual_seed(7)
    for scoring in SCORES:
        for experts in (8, 60, 256) * 4:
            logits, bias = close_calls(scoring, experts, generator)
            options = {"scoring": scoring, "correction_bias": bias}
            weights, ids, _, mean = routed(logits, 4, block_size=4, **options, mean_probability=True, backend="triton")
            yield f"{scoring}, close calls, {experts}", (ids, weights, mean), oracle_route(logits, 4, **options)


def compared():
    """(case, difference or None)."""
    for case, (ids, weights, mean), (want_ids, want_weights, want_mean) in (*cases(), *close()):
        difference = None
        try:
            assert ids.tolist() == want_ids, "ids"
            torch.testing.assert_close(weights, torch.tensor(want_weights), rtol=2e-6, atol=1e-9)
            torch.testing.assert_close(mean, torch.tensor(want_mean), rtol=1e-5, atol=1e-8)
        except AssertionError as error:
            difference = str(error)
        yield case, difference


if __name__ == "__main__":
    patch_interpreter()
    sys.exit(failures(compared()))
