"""For all tests: backends, hypothesis' profile, random order.  A new backend is covered by its row in TABLE."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator

# Workers of pytest-xdist share the cores: a thread that spins until the next parallel loop takes them from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # inductor would start a pool of processes in each

import pytest
import torch
from helpers import shuffle
from hypothesis import HealthCheck, settings

import moealign
from moealign.backend import TABLE

settings.register_profile(
    "moealign",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("MOEALIGN_EXAMPLES", "40")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("moealign")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--order", type=int, metavar="SEED", help="run files, and the tests of each, in this random order")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What collecting makes, PyTorch's modules and 8,000 tests, lives to the end: nobody looks for garbage in it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000, 20, 100)
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (seed := config.getoption("--order")) is not None:
        shuffle(items, seed)
    else:  # the longest tests first: one that begins last leaves the other workers of pytest-xdist idle
        items.sort(key=lambda item: not item.path.stem.endswith("_triton"))


@pytest.fixture(autouse=True)
def anew() -> None:
    """Random inputs and what Dynamo has compiled do not depend on the tests that ran before."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


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
