"""How the tests are run: the driver of the version matrix, without installing anything, and the random order."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import versions
from helpers import ROOT, shuffle

SUITE = """
import pytest

def test_right(): pass
def test_wrong(): assert False
@pytest.mark.skip
def test_left_out(): pass
@pytest.fixture
def broken(): raise ValueError
def test_of_a_broken_fixture(broken): pass
"""


def test_the_oldest_row_pins_the_lower_bounds_of_pyproject():
    bounds = dict(re.findall(r'"([a-z]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    pinned = dict(each.removesuffix(".*").split("==") for each in versions.ROWS["oldest"].packages)
    stated = {name: bounds[name] for name in ("torch", "numba", "transformers", "typer", "rich", "matplotlib")}
    assert {name: pinned[name] for name in stated} == stated
    assert f'requires-python = ">={versions.ROWS["oldest"].python}"' in (ROOT / "pyproject.toml").read_text()


def test_every_test_of_every_row_is_there():
    for row in versions.ROWS.values():
        for test in row.tests:
            path, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / path).read_text(), test


def test_it_counts_what_pytest_counts(tmp_path):
    (tmp_path / "test_small.py").write_text(SUITE)
    found = versions.run(Path(sys.executable), [str(tmp_path)], 0)
    assert found == {"passed": 1, "failed": 2, "skipped": 1}


def test_a_run_that_dies_is_a_failure(tmp_path):
    (tmp_path / "test_dies.py").write_text("import os\ndef test(): os._exit(0)\n")
    assert versions.run(Path(sys.executable), [str(tmp_path)], 0) == {"passed": 0, "failed": 1, "skipped": 0}


def line(name: str, passed: int = 1, failed: int = 0) -> dict[str, str]:
    return {**dict.fromkeys(versions.COLUMNS, "-"), "name": name, "passed": str(passed), "failed": str(failed)}


def test_a_row_replaces_the_one_of_its_name_and_stands_in_order(tmp_path):
    path = tmp_path / "versions.csv"
    for each in (line("oldest"), line("torch-2.11", 5), line("torch-2.10"), line("torch-2.11", 7), line("gone")):
        versions.merge(path, each)
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(versions.COLUMNS)
    assert [each.split(",")[0] for each in lines[1:]] == ["torch-2.10", "torch-2.11", "oldest"]
    assert ",7,0," in lines[2]


@pytest.mark.parametrize(("failed", "status"), [(0, 0), (2, 1)])
def test_failures_are_written_and_returned(monkeypatch, tmp_path, failed, status):
    path = tmp_path / "versions.csv"
    monkeypatch.setattr(versions, "measure", lambda row, folder, keep: line(row.name, 3, failed))
    arguments = ["--only", "oldest", "--output", str(path)]
    assert versions.main([*arguments, "--no-write"]) == status
    assert not path.exists()
    assert versions.main(arguments) == status
    assert f"oldest,-,-,-,-,-,-,3,{failed},-,-" in path.read_text()


def test_a_python_that_is_not_here_is_skipped_with_a_word(monkeypatch, tmp_path, capsys):
    assert versions.interpreter("3.99") is None
    monkeypatch.setitem(versions.ROWS, "oldest", versions.ROWS["oldest"]._replace(python="3.99"))
    arguments = ["--only", "oldest", "--root", str(tmp_path), "--output", str(tmp_path / "versions.csv")]
    assert versions.main(arguments) == 0
    assert "oldest: skipped, this machine has no Python 3.99" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_this_python_is_found():
    found = versions.interpreter(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert found is None or subprocess.run([found, "-c", "import venv, ensurepip"]).returncode == 0


def test_a_folder_of_path_without_a_python_is_passed_over(monkeypatch, tmp_path):
    (tmp_path / "python3.99").write_text("not to be run")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions.interpreter("3.99") is None


def test_an_unfinished_environment_is_refused(tmp_path, capsys):
    (tmp_path / "oldest").mkdir()
    assert versions.main(["--only", "oldest", "--root", str(tmp_path), "--no-write"]) == 1
    assert "expected an environment with a file .ready, got an unfinished one; remove it" in capsys.readouterr().out
    assert (tmp_path / "oldest").exists()


@pytest.mark.parametrize("keep", [False, True])
def test_an_environment_of_this_run_is_removed_unless_kept(monkeypatch, tmp_path, keep):
    row = versions.Row("small", (), ())
    monkeypatch.setattr(versions, "make", lambda row, python, home: home.mkdir())
    monkeypatch.setattr(versions, "run", lambda python, tests: {"passed": 1, "failed": 0, "skipped": 0})
    monkeypatch.setattr(versions, "installed", lambda python: {"python": "3.12.1"})
    monkeypatch.setattr(versions, "interpreter", lambda version: sys.executable)
    assert versions.measure(row, tmp_path, keep)["passed"] == "1"
    assert (tmp_path / "small").exists() is keep


def test_an_environment_that_was_there_is_used_and_stays(monkeypatch, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / ".ready").touch()
    monkeypatch.setattr(versions, "make", None)
    monkeypatch.setattr(versions, "run", lambda python, tests: {"passed": 1, "failed": 0, "skipped": 0})
    monkeypatch.setattr(versions, "installed", lambda python: {"python": "3.12.1"})
    assert versions.measure(versions.Row("small", (), ()), tmp_path, keep=False)["python"] == "3.12.1"
    assert (tmp_path / "small").exists()


def test_an_environment_that_cannot_be_made_leaves_nothing(monkeypatch, tmp_path):
    def refused(command, **_):
        (tmp_path / "small").mkdir(exist_ok=True)
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(versions.subprocess, "run", refused)
    with pytest.raises(subprocess.CalledProcessError):
        versions.make(versions.Row("small", ("torch==0.0",), ()), sys.executable, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_installed_versions_are_read():
    found = versions.installed(Path(sys.executable))
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert re.match(r"\d+\.\d+", found["torch"])
    assert set(found) == {"python", *versions.RECORDED}


# ---- random order --------------------------------------------------------------------------------------------------


class Item(NamedTuple):
    path: str
    number: int


def test_a_seed_orders_files_and_their_tests_and_loses_none():
    given = [Item(path, number) for path in "abcdef" for number in range(6)]
    first, again, second = orders = [list(given) for _ in range(3)]
    for order, seed in zip(orders, (1, 1, 2), strict=True):
        shuffle(order, seed)
    assert first == again
    assert len({tuple(each) for each in (given, first, second)}) == 3
    for order in (first, second):
        assert sorted(order) == given
        assert [path for path, _ in itertools.groupby(order, lambda item: item.path)] != list("abcdef")
        assert len(list(itertools.groupby(order, lambda item: item.path))) == 6, "each file stays together"
