"""A module imports only what the table of wings in CONTRIBUTING.md allows.  Imports are read from the source."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from helpers import ROOT

import moealign

PACKAGE = Path(moealign.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NEVER_AT_IMPORT = {"numba", "triton", "cuda", "matplotlib", "safetensors", "vllm", "sglang"}
HEAVY_ALLOWED = {
    "backend/cpu/align_kernels.py": {"numba"},
    "backend/cpu/intrinsics.py": {"numba"},
    "backend/cpu/route_kernels.py": {"numba"},
    "backend/triton/align_kernels.py": {"triton"},
    "backend/triton/route_kernels.py": {"triton"},
    "experts/activation_kernels.py": {"triton"},
    "experts/gradient_kernels.py": {"triton"},
    "experts/kernels.py": {"triton"},
    "experts/quantized_kernels.py": {"triton"},
    "experts/row_kernels.py": {"triton"},
    "integrations/sglang_kernels.py": {"triton"},
    "integrations/vllm_kernels.py": {"triton"},
}


def wings(text: str) -> tuple[dict[str, str], dict[str, set[str]]]:
    """The wing of each module, and the wings that each wing may import, by the table in `text`."""
    table = text[text.index("| wing | modules |") :].split("\n\n")[0].splitlines()[2:]
    wing_of, allowed = {}, {}
    for line in table:
        wing, modules, _, imports = (cell.strip() for cell in line.strip("|").split("|"))
        wing_of |= dict.fromkeys(re.findall(r"`(\w+)`", modules), wing)
        allowed[wing] = {wing, *(each for each in imports.split(", ") if each != "-")}
    return wing_of, allowed


WING_OF, ALLOWED = wings((ROOT / "CONTRIBUTING.md").read_text())


def imported(source: str, package: tuple[str, ...]) -> set[str]:
    """The modules and packages directly below moealign that a module in `package` (below moealign) imports, wherever
    the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)] if node.level > 1 else package
            full = (*base, *(node.module or "").split(".")) if node.module else base
            found.update([full[0]] if full and full[0] else [alias.name for alias in node.names])
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "moealign":
            parts = node.module.split(".")[1:]
            found.update(parts[:1] or [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("moealign."))
    return {name for name in found if name in WING_OF}


def forbidden(module: str, source: str, package: tuple[str, ...] = ()) -> list[str]:
    """What a file of `module` imports although its wing may not."""
    return sorted(each for each in imported(source, package) if WING_OF[each] not in ALLOWED[WING_OF[module]])


def module_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_wings_import_one_way():
    seen: set[str] = set()
    for wing in reversed(ALLOWED):  # from the ground up
        assert ALLOWED[wing] - {wing} <= seen, f"{wing}: expected only wings below it in the table"
        seen.add(wing)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_a_module_imports_what_its_wing_may(path):
    if path == PACKAGE / "__init__.py":  # the package itself names what is public
        return
    assert module_of(path) in WING_OF, f"{module_of(path)}: in no wing; add it to the table in CONTRIBUTING.md"
    assert forbidden(module_of(path), path.read_text(), path.relative_to(PACKAGE).parts[:-1]) == []


def test_no_module_of_a_wing_imports_in_a_circle():
    """Among the modules directly below moealign, also inside a wing."""
    needs = {name: set() for name in WING_OF}
    for path in FILES:
        if path != PACKAGE / "__init__.py":
            name = module_of(path)
            needs[name] |= imported(path.read_text(), path.relative_to(PACKAGE).parts[:-1]) - {name}
    while needs:
        free = [name for name, others in needs.items() if not others & needs.keys()]
        assert free, f"a circle among {sorted(needs)}"
        for name in free:
            del needs[name]


def test_the_table_names_only_modules_that_exist():
    missing = [name for name in WING_OF if not importlib.util.find_spec(f"moealign.{name}")]
    assert missing == []


def test_no_public_name_hides_a_module():
    names = [name for name in moealign.__all__ if not name.startswith("__")]
    assert [name for name in names if importlib.util.find_spec(f"moealign.{name}")] == []


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_nothing_heavy_at_import(path):
    allowed = HEAVY_ALLOWED.get(path.relative_to(PACKAGE).as_posix(), set())
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    assert found & NEVER_AT_IMPORT <= allowed


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_a_long_file_says_why(path):
    """No file is longer than 450 lines without a reason in its first paragraph."""
    text = path.read_text()
    assert len(text.splitlines()) <= 450 or "One file because" in text.split('"""')[1]


@pytest.mark.parametrize(
    ("module", "source", "package", "wrong"),
    [
        ("layout", "from .alignment import align", (), ["alignment"]),
        ("calls", "from .. import routing", ("calls",), ["routing"]),
        ("backend", "from ..alignment import align", ("backend",), ["alignment"]),
        ("backend", "from ...calls.dispatch import x", ("backend", "cpu"), ["calls"]),
        ("calls", "def f():\n    import moealign.report", ("calls",), ["report"]),
        ("errors", "from moealign.calls.checks import x", (), ["calls"]),
        ("backend", "from ..layout import cdiv\nfrom .kernels import f", ("backend",), []),
    ],
)
def test_a_forbidden_import_is_seen(module, source, package, wrong):
    assert forbidden(module, source, package) == wrong
