"""A file imports only from lower levels.  The imports are read from the source, not trusted."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import moealign

ROOT = Path(moealign.__file__).parent

LEVELS = {
    "errors": 0,
    "placement": 1,
    "layout": 0,
    "timing": 0,
    "checks": 1,
    "modes": 1,
    "backends": 2,
    "dispatch": 3,
    "align": 4,
    "routing": 5,
    "grouped_gemm": 5,
    "fused_moe": 6,
    "parallel": 7,
    "testing": 7,
    "tune": 7,
    "trace": 7,
    "integrations": 7,
    "costs": 7,
    "report": 8,
    "bench": 8,
    "choices": 7,
    "recorder": 8,
    "cli": 9,
    "__main__": 10,
    "__init__": 11,
}
NEVER_AT_IMPORT = {"numba", "triton", "cuda", "matplotlib", "safetensors", "vllm", "sglang"}
HEAVY_ALLOWED = {
    "backends/cpu/kernels.py": {"numba"},
    "backends/cpu/routing_kernels.py": {"numba"},
    "backends/triton/kernels.py": {"triton"},
    "backends/triton/routing_kernels.py": {"triton"},
    "backends/triton/gemm.py": {"triton"},
    "integrations/vllm_kernels.py": {"triton"},
}


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(source: str, package: tuple[str, ...]) -> set[str]:
    """The parts of moealign that a module in `package` (below moealign) imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)] if node.level > 1 else package
            full = (*base, *(node.module or "").split(".")) if node.module else base
            if full and full[0]:
                found.add(full[0])
            else:
                found.update(alias.name for alias in node.names if alias.name in LEVELS)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "moealign":
            parts = node.module.split(".")[1:]
            found.update(parts[:1] or [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("moealign."))
    return found


def too_high(name: str, source: str, package: tuple[str, ...] = ()) -> list[str]:
    level = LEVELS[name]
    return sorted(
        other for other in imported(source, package) if other != name and LEVELS.get(other, level) >= max(level, 1)
    )


FILES = sorted(path for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_run_one_way(path):
    package = path.relative_to(ROOT).parts[:-1]
    assert part_of(path) in LEVELS, f"{path.name} has no level: give it one in LEVELS and in CONTRIBUTING.md"
    assert too_high(part_of(path), path.read_text(), package) == []


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_nothing_heavy_at_import(path):
    allowed = HEAVY_ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    assert found & NEVER_AT_IMPORT <= allowed


@pytest.mark.parametrize(
    ("name", "source", "package", "wrong"),
    [
        ("layout", "from .align import align", (), ["align"]),
        ("checks", "from . import dispatch", (), ["dispatch"]),
        ("backends", "from ..align import align", ("backends",), ["align"]),
        ("backends", "from ...dispatch import choose", ("backends", "cpu"), ["dispatch"]),
        ("dispatch", "def f():\n    import moealign.report", (), ["report"]),
        ("errors", "from moealign.calls.checks import x", (), ["checks"]),
        ("backends", "from ..layout import AlignProblem\nfrom .kernels import f", ("backends",), []),
    ],
)
def test_the_reader_of_imports_sees_a_wrong_one(name, source, package, wrong):
    assert too_high(name, source, package) == wrong
