"""Importing the package loads nothing heavy and makes no CUDA context."""

from __future__ import annotations

import importlib.util
import json

import pytest
from helpers import run_python

HEAVY = ("numba", "triton", "cuda", "matplotlib", "typer", "rich", "safetensors", "transformers")

PROBE = """
import json, sys
import torch
before = set(sys.modules)
{work}
loaded = set(sys.modules) - before
print(json.dumps([sorted({{name.partition(".")[0] for name in loaded}}), torch.cuda.is_initialized()]))
"""


def loaded_by(work: str) -> tuple[list[str], bool]:
    """Top-level modules that `work` brings besides what torch alone brings, and whether CUDA came up."""
    names, initialised = json.loads(run_python(PROBE.format(work=work)).stdout.splitlines()[-1])
    return names, initialised


def test_import_is_light():
    names, initialised = loaded_by("import moealign, moealign.testing, moealign.trace")
    assert "moealign" in names
    assert [name for name in HEAVY if name in names] == []
    assert not initialised


def test_asking_which_backends_there_are_imports_only_what_it_has_to_try():
    names, initialised = loaded_by("import moealign; moealign.backends()")
    assert [name for name in ("triton", "matplotlib") if name in names] == []
    assert not initialised


def test_the_probe_would_see_a_heavy_import():
    names, _ = loaded_by("import moealign, safetensors, rich")
    assert {"safetensors", "rich"} <= set(names)


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_the_probe_would_see_numba():
    assert "numba" in loaded_by("import numba")[0]
    assert (
        "numba"
        in loaded_by(
            "import torch, moealign; moealign.align(torch.zeros(1, dtype=torch.int32), block_size=1, num_experts=1)"
        )[0]
    ), "the first call brings it, and the import does not"
