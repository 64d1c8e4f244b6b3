"""Backends and hypothesis profiles for all tests.  A new backend is covered by its row in moealign.backends.TABLE."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

import moealign
from moealign.backends import TABLE

settings.register_profile(
    "moealign",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("MOEALIGN_EXAMPLES", "40")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("moealign")


def places() -> list[tuple[str, str]]:
    """(backend, device) for every backend of the table, on every device where it is meant to run."""
    pairs = []
    for name in TABLE:
        if name in ("cuda", "triton"):
            pairs.append((name, "cuda"))
        else:
            pairs.append((name, "cpu"))
    if torch.cuda.is_available():
        pairs.append(("reference", "cuda"))
    return pairs


def skip_unless_here(name: str) -> None:
    reason = moealign.backends()[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


@pytest.fixture(params=places(), ids=lambda pair: "-".join(pair))
def place(request: pytest.FixtureRequest) -> tuple[str, torch.device]:
    """A backend that runs on this machine, and the device to give it."""
    name, device = request.param
    skip_unless_here(name)
    return name, torch.device(device)
