"""The command line as a user meets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moealign
from moealign.cli import app
from moealign.testing import check_backend
from moealign.trace import example_trace

TRACE = str(example_trace())


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_demo(tmp_path):
    picture = tmp_path / "blocks.png"
    result = run("demo", "--output", str(picture))
    assert result.exit_code == 0, result.output
    for words in (
        "standard library",
        "cpu",
        "reference",
        "yes, all outputs",
        "against the",
        "equal",
        str(picture.name),
    ):
        assert words in result.output, words
    assert "no:" not in result.output
    from matplotlib import image

    pixels = image.imread(picture)
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 600
    assert len({tuple(pixel) for pixel in (pixels[::7, ::7, :3].reshape(-1, 3) * 8).astype(int).tolist()}) > 8


def test_demo_says_when_a_backend_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("moealign.cli.difference", lambda layout, expected: "positions[0]: expected 1, got 2")
    result = run("demo", "--output", str(tmp_path / "blocks.png"))
    assert result.exit_code == 1
    assert "no: positions[0]" in result.output


def test_inspect():
    result = run("inspect", TRACE, "--block-size", "16,100")
    assert result.exit_code == 0, result.output
    for words in ("imbalance", "B = 16", "B = 100", "blocks of 100 rows", "idle"):
        assert words in result.output, words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "/no/such/file"), "/no/such/file: expected a .safetensors file, got no such file"),
        (("inspect", __file__), "expected a .safetensors file, got something else"),
        (("inspect", TRACE, "--block-size", "16,0"), "--block-size: expected ints of at least 1, separated by commas"),
        (("inspect", TRACE, "--block-size", "16;32"), "--block-size: expected ints of at least 1, separated by commas"),
        (("demo", "--layer", "99"), "--layer: expected a layer below 4, got 99"),
        (("demo", "--output", "/no/such/folder/a.png"), "--output: expected a path in a folder that exists"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_bad_input_is_said_on_stderr_without_a_traceback():
    command = [sys.executable, "-m", "moealign", "inspect", "/no/such/file"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "moealign: /no/such/file: expected a .safetensors file, got no such file\n"


def test_check():
    result = run("check", "--cases", "25")
    assert result.exit_code == 0, result.output
    assert "right" in result.output


def test_check_fails_when_a_backend_is_wrong(monkeypatch):
    def spoiled(name, device=None, cases=200, seed=0):
        for said, _ in check_backend(name, device, cases, seed):
            yield said, "expert_ids[0]: expected 1, got 2"

    monkeypatch.setattr("moealign.cli.check_backend", spoiled)
    result = run("check", "--cases", "3")
    assert result.exit_code == 1
    assert "expert_ids[0]" in result.output


def test_info():
    done = subprocess.run([sys.executable, "-m", "moealign", "info"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in (moealign.__version__, "torch", "reference", "MOEALIGN_BACKEND", "ready"):
        assert words in done.stdout, words
    assert "\x1b" not in done.stdout, "no control characters where the output is not a terminal"


def test_without_the_extra_there_is_one_line(tmp_path):
    (tmp_path / "typer.py").write_text("raise ImportError(\"No module named 'typer'\", name='typer')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from moealign.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "moealign: typer is not installed; pip install 'moealign[report]' brings it"


def test_the_readme_s_picture_is_the_demo_s():
    assert (Path(__file__).parents[2] / "docs" / "images" / "blocks.png").stat().st_size > 10_000
