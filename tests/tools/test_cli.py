"""The command line as a user meets it."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from helpers import ROOT
from processes import environment
from safetensors.torch import save_file
from typer.testing import CliRunner

import moealign
from moealign import diagnosis, startup, terminal
from moealign.cli import app, checks
from moealign.cli.check import ROUTER_KINDS, check_route
from moealign.cli.tune import describe
from moealign.errors import how_to_install
from moealign.experts.tiles import Tile
from moealign.report import demo as demo_parts
from moealign.testing import check_backend
from moealign.trace import Trace, example_trace, save_trace

TRACE = str(example_trace())
COMMANDS = ("demo", "inspect", "report", "bench", "check", "tune", "info", "completion")


#: click before 8.2 captures stderr by itself only if asked.
RUNNER = CliRunner(**({"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}))


def run(*arguments: str, **variables: str | None):
    return RUNNER.invoke(app, list(arguments), env=variables)


def process(*arguments: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moealign", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**variables), timeout=300)


def forked(*arguments: str, cwd: Path | None = None, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """:func:`process` without the start of Python and torch, for where that is not what is tested."""
    return processes.run("-m", "moealign", *arguments, env=environment(**variables), cwd=cwd)


def write_trace(path: Path, ids=None, experts: int = 4, model: str = "a model", source: str = "a text") -> str:
    ids = torch.tensor([[[0, 1], [2, 3]]]) if ids is None else ids
    save_trace(path, Trace(ids, experts, model, source, ""))
    return str(path)


# ---- what each command prints ------------------------------------------------------------------------------------


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setattr("moealign.cli.demo.times_in_turns", lambda calls, device: dict.fromkeys(calls, SPREAD))
    picture = tmp_path / "blocks.png"
    result = run("demo", "-o", str(picture))
    assert result.exit_code == 0, result.output
    for words in ("standard library", "cpu", "reference", "equal", "10..12", "1.0x", picture.name):
        assert words in result.output, words
    assert "WRONG" not in result.output
    from matplotlib import image

    pixels = image.imread(picture)
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 600
    assert len({tuple(pixel) for pixel in (pixels[::7, ::7, :3].reshape(-1, 3) * 8).astype(int).tolist()}) > 8


SPREAD = demo_parts.Spread(10.2, 12.4)


def test_demo_says_when_a_backend_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("moealign.cli.demo.times_in_turns", lambda calls, device: dict.fromkeys(calls, SPREAD))
    monkeypatch.setattr("moealign.cli.demo.difference", lambda layout, expected: "positions[0]: expected 1, got 2")
    result = run("demo", "--output", str(tmp_path / "blocks.png"))
    assert result.exit_code == 1
    assert "WRONG: layer 0 on cpu: positions[0]: expected 1, got 2" in result.output


def test_the_demo_times_both_in_turns_on_one_thread(monkeypatch):
    monkeypatch.setenv("MOEALIGN_NUM_THREADS", "7")
    threads, seen = torch.get_num_threads(), []

    def call(name):
        seen.append((name, torch.get_num_threads(), os.environ.get("MOEALIGN_NUM_THREADS")))

    calls = {"a": lambda: call("a"), "b": lambda: call("b")}
    times = demo_parts.times_in_turns(calls, torch.device("cpu"), seconds=0)
    assert {(threads, variable) for _, threads, variable in seen} == {(1, None)}
    turns = [{name for name, *_ in seen[i : i + 2]} for i in range(0, len(seen), 2)]
    assert turns == [{"a", "b"}] * 11, "one turn to warm up, and ten"
    assert all(0 < spread.min <= spread.high for spread in times.values())
    assert (torch.get_num_threads(), os.environ["MOEALIGN_NUM_THREADS"]) == (threads, "7")


def test_inspect():
    result = run("inspect", TRACE, "--block-size", "16,100")
    assert result.exit_code == 0, result.output
    for words in ("imbalance", "B = 16", "B = 100", "blocks of 100 rows", "idle"):
        assert words in result.output, words


def test_the_shipped_trace_is_the_default():
    assert run("inspect").output == run("inspect", TRACE).output


def test_inspect_says_when_neighbours_share_a_bar():
    assert "a bar each" in " ".join(run("inspect", COLUMNS="120").output.split())
    assert "each bar the mean of 5 neighbours" in " ".join(run("inspect", COLUMNS="60").output.split())


def test_inspect_of_a_trace_without_routes_recommends_nothing(tmp_path):
    result = run("inspect", write_trace(tmp_path / "t.safetensors", torch.full((1, 3, 2), -1)))
    assert result.exit_code == 0
    assert "nothing to recommend" in result.output
    assert "Try first" not in result.output


def test_check():
    result = run("check", "--cases", "25")
    assert result.exit_code == 0, result.output
    for words in ("align", "route", "fused_moe", "element for element", "Everything that is available here is ok"):
        assert words in " ".join(result.output.split()), words


def test_check_fails_when_a_backend_is_wrong(monkeypatch):
    def spoiled(name, device=None, cases=200, seed=0):
        for case, _ in check_backend(name, device, cases, seed):
            yield case, "expert_ids[0]: expected 1, got 2"

    monkeypatch.setattr("moealign.cli.check.check_backend", spoiled)
    result = run("check", "--cases", "3")
    assert result.exit_code == 1
    assert "expert_ids[0]" in result.output


@pytest.mark.parametrize(("spoil", "said"), [("weights", "weights differ"), ("ids", "ids differ"),
                                            ("layout", "sorted_token_ids[0]: expected")])  # fmt: skip
def test_check_sees_a_wrong_router(monkeypatch, spoil, said):
    honest = moealign.route

    def spoiled(*arguments, **options):
        weights, ids, layout = honest(*arguments, **options)
        if spoil == "weights":
            weights = weights * 1.001
        elif spoil == "ids":
            ids = ids.flip(1) + 1
        else:
            layout.sorted_token_ids.add_(1)
        return weights, ids, layout

    monkeypatch.setattr("moealign.cli.check.route", spoiled)
    result = run("check", "--cases", "1")
    assert result.exit_code == 1
    assert said in result.output


def test_check_draws_every_kind_of_router():
    cases = {case.split(", ", 3)[3] for case, problem in check_route("reference", torch.device("cpu"), 200)}
    assert cases == {str(kind or "softmax") for kind in ROUTER_KINDS}


def test_check_sees_wrong_experts_and_experts_that_fail(monkeypatch):
    monkeypatch.setattr("moealign.cli.check.fused_moe", lambda x, *rest, backend: x)
    assert "relative error" in run("check", "--cases", "1").output

    def broken(*arguments, backend):
        raise RuntimeError("out of order")

    monkeypatch.setattr("moealign.cli.check.fused_moe", broken)
    result = run("check", "--cases", "1")
    assert result.exit_code == 1
    assert "RuntimeError: out of order" in result.output


def test_info():
    done = forked("info", MOEALIGN_BACKENDS="cpu")
    assert done.returncode == 0, done.stderr
    for words in (moealign.__version__, "torch", "reference", "MOEALIGN_BACKEND", "available", "No problems."):
        assert words in done.stdout, words
    assert re.search(r"MOEALIGN_BACKENDS +unknown: moealign does not read it", done.stdout)
    assert "\x1b" not in done.stdout, "no control characters where the output is not a terminal"


def test_tiles_have_names():
    words = describe(Tile(128, 256, 64, 8, 8, 4, 2, 1, 1, 64))
    for part in (
        "128 rows",
        "256 columns",
        "steps of 64",
        "8 warps",
        "TMA for weights and rows",
        "persistent, 1 per SM",
    ):
        assert part in words, part
    assert "TMA" not in describe(Tile(16, 32, 64, 1, 4, 3))


def test_version_and_short_help():
    assert run("--version").output == f"moealign {moealign.__version__}\n"
    for command in ((), *((name,) for name in COMMANDS)):
        short, long = run(*command, "-h"), run(*command, "--help")
        assert short.exit_code == 0
        assert short.output == long.output
    assert run().output == run("-h").output


@pytest.mark.parametrize("columns", [50, 60, 79, 80, 120])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_cuts_nothing(name, columns):
    text = run(*filter(None, [name]), "-h", COLUMNS=str(columns)).output
    assert "…" not in text
    assert "..." not in text.replace("[TRACE]...", "").replace("[ARGS]...", "")
    assert "[[" not in text
    assert max(map(len, text.splitlines())) <= columns
    wide = run(*filter(None, [name]), "-h", COLUMNS="120").output
    assert set(re.findall(r"--[a-z]+(?:-[a-z]+)*", wide)) <= set(re.findall(r"--[a-z-]+", re.sub(r"-\n\s*", "-", text)))


def test_check_finds_a_wrong_gradient_and_a_wrong_scale(monkeypatch):
    right = moealign.fused_moe

    def wrong(x, gate_up, down, weights, ids, **options):
        out = right(x, gate_up, down, weights, ids, **options)
        if isinstance(down, moealign.QuantizedWeights):
            return 1.2 * out
        return out + 0.01 * (weights.sum() - weights.detach().sum())  # the same value

    monkeypatch.setattr("moealign.cli.check.fused_moe", wrong)
    result = run("check", "--cases", "20", COLUMNS="200")
    assert result.exit_code == 1
    for function, problem in (("fused_moe", "gradient of topk_weights: relative error"), ("fp8", ": relative error ")):
        (line,) = [each for each in result.output.splitlines() if each.startswith(f"WRONG: {function} packed on cpu")]
        assert problem in line


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (("moealign", "in"), ["inspect", "info"]),
        (("moealign", "report", "--pl"), ["--placement"]),
        (("moealign", "bench", "--b"), ["--bench", "--backend", "--budget"]),
        (("moealign", "completion", ""), ["bash", "zsh", "fish", "--help"]),
        (("moealign", "inspect", "trace"), []),
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_and_options(typed, offered):
    script = f"""{run("completion", "bash").stdout}
        COMP_WORDS=({" ".join(map(shlex.quote, typed))}); COMP_CWORD={len(typed) - 1}
        _moealign; printf '%s\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-u", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == offered


def test_completion_knows_every_option_of_every_command():
    scripts = {shell: run("completion", shell).stdout for shell in ("bash", "zsh", "fish")}
    assert scripts["bash"] == scripts["zsh"]
    for name in COMMANDS:
        options = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", run(name, "-h", COLUMNS="120").output)) - {"--no-gpu"}
        (line,) = re.findall(rf"^ *{name}\) (.*)$", scripts["bash"], re.MULTILINE)
        assert options <= set(re.findall(r"--[a-z-]+", line)), name
        found = re.findall(rf"__fish_seen_subcommand_from {name}\" -l (.*)", scripts["fish"])
        assert options <= {f"--{each}" for each in found}, name


def test_options_have_the_same_names_everywhere():
    for name in ("demo", "report", "bench", "tune"):
        text = run(name, "-h", COLUMNS="120").output
        assert "--output" in text, name
        assert "-o" in text, name
        assert "--out " not in text, name
        assert "--inner" not in text, name
    for name in ("inspect", "report", "tune"):
        assert "--intermediate" in run(name, "-h", COLUMNS="120").output, name


# ---- JSON --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (("info",), {"moealign", "python", "platform", "packages", "devices", "backends", "engines", "environment",
                     "unknown_variables", "problems", "warnings"}),
        (("check", "--cases", "2"), {"moealign", "ok", "seed", "results", "unavailable"}),
        (("inspect",), {"trace", "model", "source", "revision", "layers", "tokens", "top_k", "experts", "load",
                        "load_all", "padding", "advice", "hidden", "intermediate", "machine"}),
        (("report", "--no-gpu"), {"trace", "sizes", "machine", "not_measured", "batches", "layers", "imbalance",
                                  "block_sizes", "by_tokens", "placements"}),
        (("report", "--no-gpu", TRACE, TRACE), {"A", "B", "overlap", "placement"}),
    ],
    ids=["info", "check", "inspect", "report", "two traces"],
)  # fmt: skip
def test_json(arguments, keys):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)) == keys
    documented = (ROOT / "docs" / "cli.md").read_text()
    assert [key for key in keys if f"`{key}`" not in documented] == []


def test_the_json_of_inspect_has_the_figures_of_its_tables():
    answer = json.loads(run("inspect", "--block-size", "64", "--json").stdout)
    (padding,) = answer["padding"]
    text = run("inspect", "--block-size", "64").output
    for layer in range(answer["layers"]):
        assert f"{padding['blocks'][layer]:,}, {padding['padding'][layer]:.1%}" in text
        assert f"{answer['load'][layer]['max']:,}" in text
    assert [each["kind"] for each in answer["advice"]] == ["decode", "prefill"]


# ---- widths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", [("inspect",), ("info",), ("check", "--cases", "2")], ids=lambda c: c[0])
def test_lines_fit_and_no_figure_is_cut(command, columns):
    result = run(*command, COLUMNS=str(columns))
    lines = [line for line in result.output.splitlines() if TRACE not in line]
    assert max(map(len, lines)) <= columns
    assert "…" not in result.output
    if command == ("inspect",):
        figures = set(re.findall(r"[\d,]+, [\d.]+%|\d\.\d\d\b", run("inspect", COLUMNS="200").output))
        assert len(figures) > 25
        assert figures <= set(re.findall(r"[\d,]+, [\d.]+%|\d\.\d\d\b", result.output))


def test_a_table_that_is_too_wide_continues_below():
    text = terminal.table(["name", "a", "bb"], [["x", "123456", "7"], ["yy", "8", "1234567"]], columns=14, title="T")
    assert text.splitlines() == [
        "T", "name       a", "----  ------", "x     123456", "yy         8", "",
        "name       bb", "----  -------", "x           7", "yy    1234567",
    ]  # fmt: skip


# ---- refusals ----------------------------------------------------------------------------------------------------

TUNE = ("tune", "--experts", "8", "--top-k", "2", "--hidden", "64")
SIZED = (*TUNE, "--intermediate", "32")
TRACED = (("inspect",), ("report",))
WRITING = (("demo",), ("report",), ("bench",), SIZED)
LISTS = (
    "16,0",
    "16;32",
    "",
    "1.5",
    "65537",
    "1000000000",
    "1" + "0" * 20,
    "1" * 5000,
    ",".join(map(str, range(1, 99))),
)


def each(commands, arguments, message):
    return [((*command, *arguments), message) for command in commands]


#: (arguments, part of the one line), for a folder that holds only the folder "folder.png".
BAD = [
    (("nonsense",), "No such command 'nonsense'"),
    (("demo", "-z"), "No such option: -z"),
    *each(WRITING, ("-o", "no/such/x.png"), "expected a path in a folder that exists"),
    *each(WRITING, ("-o", "/proc/x.png"), "expected a path that can be written, got /proc/x.png"),
    *each(WRITING[:3], ("-o", "folder.png"), "expected a file, got the folder folder.png"),
    *each(WRITING[:3], ("-o", "a\0b.png"), "null byte"),
    *each(WRITING[:2], ("-o", "x.txt"), "expected a path that ends in ."),
    *each(TRACED, ("no such [bold] file",), "no such [bold] file: expected a .safetensors file, got no such file"),
    *each(TRACED, (".",), "expected a .safetensors file, got a folder"),
    *each(TRACED, (__file__,), "expected a .safetensors file, got something else"),
    *[bad for numbers in LISTS for bad in each(TRACED, ("--block-size", numbers), "--block-size: expected")],
    *each(TRACED, ("--hidden", "0"), "--hidden"),
    *each(TRACED, ("--intermediate", "1" + "0" * 20), "--intermediate"),
    (("demo", "--block-size", "x"), "--block-size"),
    (("demo", "--block-size", "100000000"), "--block-size"),
    (("demo", "--block-size", "1" + "0" * 20), "--block-size"),
    (("demo", "--layer", "99"), "--layer: expected a layer below 4, got 99"),
    (("report", "--layer", "99"), "--layer: expected a layer below 4, got 99"),
    (("report", "--map-block-size", "1" + "0" * 20), "--map-block-size"),
    (("report", "--dark"), "--dark: expected an --output that ends in .png"),
    *[(("report", option, "200000"), f"'{option}': ") for option in ("--ranks", "--replicas")],
    *[
        (("report", "--placement", "p.json", *counts), f"replicas: expected {expected}")
        for counts, expected in (
            (("--replicas", "3"), "0 or a multiple of 8 more"),
            (("--ranks", "2", "--replicas", "66"), "0 to 64"),
        )
    ],
    *[
        (("report", "--device-name", "G", "--engine-config", *values), message)
        for values, message in (
            (("/proc/x/y",), "--engine-config: expected a folder that can be written, got /proc/x/y (No such file"),
            (("new/a\0b",), "null byte"),
            ((__file__,), "--engine-config: expected a folder, got the file"),
            (("new", "--device-name", "G" * 300), "a folder that can be written, got new (File name too long: E="),
            (("same", "--placement", "same"), "--placement: expected another path than --engine-config's"),
            (("new/folder", "--block-size", "16,100"), "block sizes among 16, 32, 64, 128, 256, got 100; pass other"),
        )
    ],
    (("check", "--cases", "0"), "--cases"),
    (("check", "--cases", "1" + "0" * 20), "--cases"),
    (("check", "--seed", "x"), "--seed"),
    (("bench", "--device", "tpu"), "--device: expected cuda or cpu, got 'tpu'"),
    (("bench", "--backend", "cuda", "--device", "cpu"), "--backend: expected backends that run on --device cpu"),
    (("bench", "--backend", ","), "--backend: expected one of cuda, triton, cpu, reference, got ,"),
    (("bench", "--backend", ""), "--backend: expected one of"),
    (("bench", "--bench", "alien"), "--bench: expected one of align, batched"),
    (("bench", "--bench", "batched", "--device", "cpu"), "--bench: expected align, the only part on a CPU"),
    *[(("bench", "--budget", value), "--budget: expected seconds of at least 0") for value in ("-1", "nan", "inf")],
    (("bench", "--peers", "no such"), "--peers: expected a folder, got no such"),
    (("bench", "--figure", "a.gif"), "--figure: expected a path that ends in .png, .svg, got a.gif"),
    (("bench", "-o", "a.svg", "--figure", "a.svg"), "--figure: expected another path than --output's"),
    (TUNE, "--intermediate: expected one width inside an expert, got none"),
    ((*SIZED, "--tokens", "1,x"), "--tokens: expected ints"),
    ((*SIZED, "--tokens", "1" + "0" * 20), "--tokens: expected"),
    ((*SIZED, "--dtype", "int8"), "--dtype: expected"),
    ((*SIZED, "--top-k", "9"), "--top-k: expected at most"),
    ((*SIZED, "-o", __file__), "--output: expected a tuning file"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else ""
)
def test_a_bad_argument_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    for module in ("demo.expert_layer", "report.pages.study", "bench.benchmark.measure", "check.check_backend"):
        monkeypatch.setattr(f"moealign.cli.{module}", lambda *a, **k: pytest.fail("the command began"))
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("moealign: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


VALUES = [
    ("MOEALIGN_BACKEND", "nonsense", "expected one of cuda, triton, cpu, reference, got 'nonsense'"),
    ("MOEALIGN_NUM_THREADS", "nonsense", "expected a whole number from 1 on, got 'nonsense'"),
    ("MOEALIGN_NUM_THREADS", "0", "expected a whole number from 1 on, got '0'"),
    ("MOEALIGN_CACHE_DIR", __file__, "expected a folder, got the file"),
    ("MOEALIGN_TUNING", __file__, "expected a tuning file, got"),
    ("MOEALIGN_TUNING", os.path.dirname(__file__), "expected a tuning file, got the folder"),
    ("MOEALIGN_TRACE", "/no/such/t.safetensors", "expected a path in a folder that exists, got"),
    ("MOEALIGN_TRACE", os.path.dirname(__file__), "expected a file to write, got the folder"),
    ("MOEALIGN_TRACE_MB", "0", "expected a number of MiB above 0, got '0'"),
    ("MOEALIGN_VLLM", "yes", "expected 1, layer or 0, got 'yes'"),
    ("MOEALIGN_SGLANG", "on", "expected 1, layer or 0, got 'on'"),
]
RUNNABLE = {
    "demo": (),
    "inspect": (),
    "report": (),
    "bench": (),
    "check": (),
    "tune": SIZED[1:],
    "completion": ("bash",),
}


@pytest.mark.parametrize("command", RUNNABLE)
@pytest.mark.parametrize(("variable", "value", "message"), VALUES)
def test_every_command_refuses_a_variable_that_means_nothing(command, variable, value, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(command, *RUNNABLE[command], **{variable: value})
    assert result.exit_code == 2
    assert result.stderr.startswith(f"moealign: {variable}: {message}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert run(command, "--help", **{variable: value}).exit_code == 0


def test_info_names_every_problem():
    values = {"MOEALIGN_BACKEND": "nonsense", "MOEALIGN_NUM_THREADS": "-1", "MOEALIGN_VLLM": "maybe"}
    result = run("info", COLUMNS="200", **values)
    assert result.exit_code == 1
    assert [name for name in values if f"  {name}: expected " not in result.output] == []
    assert len(json.loads(run("info", "--json", **values).stdout)["problems"]) == 3
    assert "(and 2 more; see moealign info)" in run("inspect", **values).stderr


def test_a_cache_folder_that_cannot_be_made_is_a_warning(tmp_path):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "folder")
    result = run("info", COLUMNS="300", MOEALIGN_CACHE_DIR=folder)
    assert result.exit_code == 0, result.output
    message = f"MOEALIGN_CACHE_DIR: expected a folder that only you can write, got '{folder}'; every process compiles"
    assert message in result.stdout
    assert "No problems." in result.stdout
    answer = json.loads(run("info", "--json", MOEALIGN_CACHE_DIR=folder).stdout)
    assert (answer["problems"], len(answer["warnings"])) == ([], 1)
    assert run("inspect", MOEALIGN_CACHE_DIR=folder).exit_code == 0


def test_every_variable_that_the_package_reads_is_checked():
    source = "".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    read = set(re.findall(r"""(?:environ(?:\.get\(|\[)|getenv\()["'](MOEALIGN_\w+)["']""", source))
    assert read <= set(diagnosis.VARIABLES)
    assert all(f"`{name}`" in (ROOT / "README.md").read_text() for name in diagnosis.VARIABLES)


def test_valid_values_are_no_problems(tmp_path, monkeypatch):
    for name, value in {
        "MOEALIGN_BACKEND": "reference", "MOEALIGN_NUM_THREADS": "2", "MOEALIGN_CACHE_DIR": str(tmp_path / "new"),
        "MOEALIGN_TUNING": str(tmp_path / "new.json"), "MOEALIGN_VLLM": "layer", "MOEALIGN_SGLANG": "",
        "MOEALIGN_TRACE": str(tmp_path / "t.safetensors"), "MOEALIGN_TRACE_MB": "0.5", "MOEALIGN_TRACE_LAYERS": "48",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert diagnosis.problems() == []


@pytest.mark.parametrize("experts", [2**24, 2**30, 2**40])
@pytest.mark.parametrize("command", ["inspect", "report"])
def test_a_trace_of_absurdly_many_experts_is_refused(command, experts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = {"experts": experts, "k": 2, "model": "m", "source": "s", "revision": ""}
    ids = torch.zeros(12, 4096, 2, dtype=torch.uint8)
    save_file({"topk_ids": ids}, "t.safetensors", metadata={"moealign": json.dumps(about)})
    result = run(command, "t.safetensors")
    assert result.exit_code == 2
    assert result.stderr.startswith("moealign: t.safetensors: expected")
    assert "65,536" in result.stderr or "65536" in result.stderr
    assert result.stderr.count("\n") == 1


def test_names_with_brackets_and_control_characters_are_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = write_trace(Path("t[bold]x.safetensors"), model="m [v2] [/]", source="a\x1b[31m\nb [bold]")
    result = run("inspect", name, COLUMNS="200")
    assert result.exit_code == 0, result.output
    assert "t[bold]x.safetensors; m [v2] [/]; a\\x1b[31m\\nb [bold]" in result.output
    assert "revision" not in result.output
    result = run("report", name, "-o", "r[bold].png", COLUMNS="200")
    assert result.exit_code == 0, result.output
    assert "r[bold].png" in result.output


def test_endings_in_capitals_are_taken(tmp_path):
    for ending in ("HTML", "SVG", "PNG"):
        path = tmp_path / f"r.{ending}"
        assert run("report", write_trace(tmp_path / "t.safetensors"), "-o", str(path)).exit_code == 0
        start = path.read_bytes()[:300].lower()
        assert {"HTML": b"<!doctype html", "SVG": b"<svg", "PNG": b"\x89png"}[ending] in start


def test_an_output_that_exists_stays_as_it_was_until_the_end(tmp_path):
    path = tmp_path / "old.png"
    path.write_bytes(b"old")
    assert checks.output("--output", path, (".png",)) == path
    assert path.read_bytes() == b"old"


def test_a_failure_to_write_is_one_line(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moealign.cli.report.pages.write", full)
    result = run("report", write_trace(tmp_path / "t.safetensors"), "-o", str(tmp_path / "r.html"))
    assert (result.exit_code, result.stderr) == (1, "moealign: [Errno 28] No space left on device\n")


# ---- without the extra -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_info_works_and_the_rest_is_one_line(tmp_path, missing):
    (tmp_path / f"{missing}.py").write_text(f"raise ImportError('broken', name={missing!r})")
    env = environment(tmp_path)

    def bare(*arguments):
        return processes.run("-m", "moealign", *arguments, env=env)

    done = bare("inspect")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"moealign: {missing} is not installed: {how_to_install('report')}. Only `moealign info` works without it\n"
    )
    assert "Backends, in the order" in bare("info").stdout
    if missing == "typer":  # from there on it is the same process for either
        assert "backends" in json.loads(bare("info", "--json").stdout)
        assert bare("--version").stdout == f"moealign {moealign.__version__}\n"


# ---- streams and signals -----------------------------------------------------------------------------------------


def test_bad_input_is_on_stderr_without_a_traceback():
    done = forked("inspect", "/no/such/file")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "moealign: /no/such/file: expected a .safetensors file, got no such file\n"


def shell(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    python = f"{sys.executable} -m moealign"
    command = ["bash", "-c", "set -o pipefail; " + line.replace("MOEALIGN", python)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**variables), timeout=200)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_output_is_one_line_and_costs_no_work(tmp_path):
    done = shell("MOEALIGN info > /dev/full")
    message = "moealign: standard output: cannot be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (1, message)
    trace, page = write_trace(tmp_path / "t.safetensors"), tmp_path / "r.html"
    done = shell(f"MOEALIGN report {trace} -o {page} > /dev/full")
    assert (done.returncode, done.stderr) == (1, message)
    assert page.stat().st_size > 10_000


def test_closed_streams_and_closed_pipes_are_silent(tmp_path):
    trace, page = write_trace(tmp_path / "t.safetensors"), tmp_path / "r.html"
    done = shell("MOEALIGN inspect >&-")
    assert (done.returncode, done.stderr) == (0, "")
    done = shell(f"MOEALIGN report {trace} -o {page} >&- 2>&- <&-")
    assert done.returncode == 0
    assert page.read_text().lower().startswith("<!doctype html>"), "no output landed in the file"
    reader, writer = os.pipe()
    os.close(reader)  # before the command begins, so that no timing decides what it sees
    with os.fdopen(writer, "wb") as pipe:
        command = [sys.executable, "-m", "moealign", "info"]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, env=environment(), timeout=200)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_that_cannot_encode(variables, tmp_path):
    trace = write_trace(tmp_path / "t.safetensors", model="modèle")
    done = process("inspect", trace, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "mod\\xe8le" in done.stdout


@pytest.mark.parametrize("arguments", [("report", "-o", "r.html", "t.safetensors"), ("demo", "-h")], ids=lambda a: a[0])
def test_every_command_prints_what_the_terminal_can_encode(arguments, tmp_path):
    write_trace(tmp_path / "t.safetensors", model="modèle")
    done = forked(*arguments, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()


def interrupted(*arguments: str, after: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "moealign", *arguments]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests under nohup inherit that it is ignored
    )
    time.sleep(after)
    child.send_signal(signal.SIGINT)
    return child


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("after", [0.3, 0.8, 1.5, 6.0])  # three while it imports; while it checks
def test_an_interrupt_at_any_time_is_silent_and_130(after, tmp_path):
    with interrupted("check", "--cases", "100000", after=after) as child:
        try:
            _, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    assert (child.returncode, errors) == (130, "")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(
    "where", ["interrupt()", "ctypes.CFUNCTYPE(None)(interrupt)()", "Finalized()", "exec('interrupt()')"]
)
def test_an_interrupt_anywhere_ends_a_command(where, tmp_path):
    (tmp_path / "command.py").write_text(f"""
import ctypes, signal, time
from moealign.terminal import exit_with

def interrupt():
    signal.raise_signal(signal.SIGINT)

class Finalized:
    def __del__(self):
        interrupt()

def run():
    {where}
    time.sleep(600)

exit_with(run)
""")
    command = [sys.executable, "-m", "command"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_what_else_python_has_to_ignore_is_told():
    script = """
from moealign.terminal import exit_with

class Bad:
    def __del__(self):
        1 / 0

exit_with(lambda: Bad() and 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0
    assert "ZeroDivisionError" in done.stderr


def test_only_our_own_command_changes_the_process():
    assert startup.is_command(["-m"], ["python", "-m", "moealign", "info"])
    assert startup.is_command(["-m"], ["python", "-X", "utf8", "-mmoealign"])
    assert startup.is_command(["-m"], ["python", "-m", "moealign.bench"])
    assert startup.is_command(["/usr/bin/moealign", "info"], ["python", "/usr/bin/moealign", "info"])
    for other in (["-m"], ["pytest"], ["-c"], [""], []):
        assert not startup.is_command(other, ["python", "-m", "pytest", "moealign"])


def test_the_readme_s_picture_is_the_demo_s():
    assert (ROOT / "docs" / "images" / "blocks.png").stat().st_size > 10_000
