"""What pyproject.toml says, what an index shows, and what messages advise."""

from __future__ import annotations

import importlib
import re
import sys
import types
from email.message import EmailMessage

import pytest
from commands import package
from helpers import ROOT

from moealign import bench
from moealign.backend import cuda
from moealign.errors import _PACKAGES, how_to_install

PYPROJECT = (ROOT / "pyproject.toml").read_text()
EXTRAS = {
    name: re.findall(r'"([\w-]+(?:\[[\w,]+\])?)', line)
    for name, line in re.findall(r"^(\w+) = (\[.*?\])", PYPROJECT.split("[project.optional-dependencies]")[1], re.M)
}


@pytest.fixture
def on_an_index(monkeypatch):
    """The function of hatch_build.py, without hatchling."""
    interface = types.ModuleType("hatchling.metadata.plugin.interface")
    interface.MetadataHookInterface = object
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "hatch_build", raising=False)
    return importlib.import_module("hatch_build").on_an_index


@pytest.mark.parametrize("extra", _PACKAGES)
def test_a_message_installs_what_its_extra_installs(extra):
    command = how_to_install(extra, upgrade=True)
    packages = re.match(r"pip install --upgrade (.*) \(moealign's extra '(\w+)'\)$", command)
    assert packages[2] == extra
    assert [each.strip("'") for each in packages[1].split()] == EXTRAS[extra]


def test_no_message_advises_a_release_that_does_not_exist():
    for path in (ROOT / "src").rglob("*.py"):
        assert not re.search(r"pip install [^\n]*moealign\[", path.read_text("utf-8")), path
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        assert not re.search(r"pip install '?moealign", path.read_text()), path


def test_the_extra_all_names_every_extra_of_users():
    assert EXTRAS["all"] == [f"moealign[{','.join(sorted(_PACKAGES))}]"]


def test_the_readme_s_supported_versions_are_those_of_pyproject():
    table = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|", (ROOT / "README.md").read_text(), re.M))
    bounds = dict(re.findall(r'"([a-z]+)>=([\d.]+)', PYPROJECT))
    assert f'requires-python = ">={table["Python"].split()[0]}"' in PYPROJECT
    assert table["torch"].startswith(f"{bounds['torch']} or later")
    assert table["Transformers"].startswith(f"{bounds['transformers']} to ")
    assert table["vLLM"].startswith(f"{bench.VLLM.removeprefix('vllm-')};")
    assert table["NVIDIA GPUs"].startswith(
        f"`cuda` from compute capability {'.'.join(map(str, cuda._MIN_CAPABILITY))};"
    )


def test_links_of_the_readme_are_absolute_or_absent_on_an_index(on_an_index):
    text = "[a](docs/a.md#b) [c](https://c) ![d](docs/d.png) [e](#e)"
    assert on_an_index(text, "https://r/v1/", "https://f/v1/") == (
        "[a](https://r/v1/docs/a.md#b) [c](https://c) ![d](https://f/v1/docs/d.png) [e](#e)"
    )
    assert on_an_index(text) == "a [c](https://c)  [e](#e)"
    readme = (ROOT / "README.md").read_text()
    assert package.RELATIVE.search(readme)
    assert not package.RELATIVE.search(on_an_index(readme))


def test_the_check_of_a_release_sees_what_is_missing():
    metadata = EmailMessage()
    for field in package.FIELDS:
        metadata[field] = "x"
    for extra in sorted(package.EXTRAS):
        metadata["Provides-Extra"] = extra
    metadata.set_payload("[a](https://a)")
    assert package.metadata_problems(metadata) == []
    assert package.warnings(metadata) == ["metadata: no Project-URL; set [project.urls] before a release"]
    del metadata["Author"], metadata["Provides-Extra"]
    metadata.set_payload("[a](docs/a.md)")
    assert package.metadata_problems(metadata) == [
        "metadata: expected Author, got none",
        "metadata: expected the extras all, cpu, cuda, report, transformers, got none of them",
        "description: expected absolute links, got docs/a.md and 0 others",
    ]
    assert package.content_problems("wheel", ["a.cu"], (".cu", ".cuh")) == ["wheel: expected a file *.cuh, got none"]


def test_the_check_of_a_release_wants_one_of_each(tmp_path, capsys):
    assert package.main([str(tmp_path)]) == 1
    assert "expected one wheel and one sdist, got 0 and 0" in capsys.readouterr().out
