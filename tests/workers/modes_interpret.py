"""The experts' kernels, under Triton's interpreter, in every mode of PyTorch with gradients.

TRITON_INTERPRET=1 PYTHONPATH=src:tests python tests/workers/modes_interpret.py

test_experts_triton.py runs it in a process.  It is the part of test_modes.py that needs a GPU otherwise.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback

import torch
from helpers import ROOT, failures, patch_interpreter

patch_interpreter()  # before the table, which aligns
specification = importlib.util.spec_from_file_location("modes_table", ROOT / "tests" / "package" / "test_modes.py")
assert specification is not None
assert specification.loader is not None
table = importlib.util.module_from_spec(specification)
specification.loader.exec_module(table)
table.B = 16  # the smallest block of the kernels


def compared():
    for name in ("fused_moe", "grouped_gemm"):
        case = table.CASES[name]._replace(dtype=torch.float32)
        for mode, check in {**table.MODES, **table.GRADIENT_MODES}.items():
            # inductor needs a compiler of C++, and sees the operators that aot_eager sees; eager sees fewer.
            if "inductor" in mode or "compile, eager" in mode:
                continue
            torch._dynamo.reset()
            try:
                check(case)
                yield f"{name}, {mode}", None
            except Exception:
                yield f"{name}, {mode}", traceback.format_exc(limit=-4)


if __name__ == "__main__":
    sys.exit(failures(compared()))
