"""The Triton router under the interpreter against the plain loops.  test_routing_triton.py runs it in its own process.

TRITON_INTERPRET=1 PYTHONPATH=src python tests/routing_interpret.py
"""

from __future__ import annotations

import sys

import torch
import triton
from test_routing import KINDS, arguments, awkward, routed
from triton_interpret import mend_interpreter

from moealign.testing import oracle_route

SIZES = [(1, 4, 1), (12, 8, 2), (4, 60, 6), (2, 100, 32), (2, 260, 8)]  # tokens, experts, top_k
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cases():
    """(what, ids, weights, mean) by the kernel and by the loops."""
    number = 0
    for kind in KINDS:
        for tokens, experts, top_k in SIZES:
            number += 1
            generator = torch.Generator().manual_seed(number)
            given = arguments(kind, experts, top_k, generator)
            logits = awkward(tokens, experts, generator).to(DTYPES[number % 3])
            valid = max(tokens - 1, 1)
            call = {"block_size": 4, "num_valid_tokens": torch.tensor([valid], dtype=torch.int32), **given}
            weights, ids, _, mean = routed(logits, top_k, **call, mean_probability=True, backend="triton")
            yield (
                f"{kind}, {tokens} x {experts}, {top_k}",
                (ids, weights, mean),
                oracle_route(logits, top_k, **given, num_valid_tokens=valid),
            )


def main() -> int:
    mend_interpreter()
    done = failures = 0
    for said, (ids, weights, mean), (want_ids, want_weights, want_mean) in cases():
        done += 1
        try:
            assert ids.tolist() == want_ids, "ids"
            torch.testing.assert_close(weights, torch.tensor(want_weights), rtol=2e-6, atol=1e-9)
            torch.testing.assert_close(mean, torch.tensor(want_mean), rtol=1e-5, atol=1e-8)
        except AssertionError as difference:
            failures += 1
            print(f"{said}: {difference}")
    print(f"triton {triton.__version__}: {done} cases, {failures} failures")
    return 1 if failures or not done else 0


if __name__ == "__main__":
    sys.exit(main())
