"""The tuner's search, its file, and its command, without a GPU."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moealign import BackendUnavailable
from moealign.cli import app
from moealign.experts import tiles, tune
from moealign.experts.quantized import QuantizedWeights
from moealign.experts.records import ExpertWeights, Routes
from moealign.experts.tiles import LayerTiles, Tile

SHAPE = tune.Shape(128, 8, 2048, 768)
H200 = tiles.Target("NVIDIA H200", 132, True)


def test_starts_with_the_rules_tiles():
    for tokens in (1, 64, 4096):
        candidates = tune.starting_tiles(H200, SHAPE, tokens)
        assert candidates[0] == tiles.tiles_by_rule(H200, tokens * 8, 8, 128, 2048, 768, 2)
        assert len(candidates) == len(set(candidates)) >= 2


def test_neighbours_differ_in_one_thing_and_keep_the_rows():
    tile = Tile(128, 128, 64, 8, 8, 4, 1)
    neighbours = tune.neighbours(tile)
    assert len(neighbours) == len(set(neighbours)) >= 8
    for other in neighbours:
        assert sum(a != b for a, b in zip(tile, other, strict=True)) == 1
        assert other.m == 128


def test_tiles_of_fp8_weights_step_by_the_inputs_that_share_a_scale(tmp_path):
    shape = SHAPE._replace(dtype=torch.float8_e4m3fn)
    assert shape.rows is torch.bfloat16
    hopper = H200._replace(fp8=True, wgmma=True)
    for tokens in (1, 64, 4096):
        start = tune.starting_tiles(hopper, shape, tokens)
        assert start[0] == tiles.tiles_by_rule(hopper, tokens * 8, 8, 128, 2048, 768, 1)
        seen = []
        tune.search(start, lambda chosen, seen=seen: seen.append(chosen) or float(len(seen)), fp8=True)
        assert {tile.k for chosen in seen for tile in chosen[1:]} == {128}
        assert {tile.warps for chosen in seen for tile in chosen[1:]} == {4, 8}
    path, chosen = tmp_path / "mine.json", seen[-1]
    tune.write(path, shape, [tune.TuningResult(4096, chosen, 1.0, 2.0, 5)], {"device": "x"})
    assert tiles.parse_tuning(path.read_bytes())[shape.key][4096] == chosen
    contents = json.loads(path.read_text())
    contents["plans"][shape.key]["4096"]["second"][2] = 64
    with pytest.raises(ValueError, match="no tuning file") as caught:
        tiles.parse_tuning(json.dumps(contents).encode())
    assert "steps of 64" in str(caught.value.__cause__)


def test_a_layer_takes_the_tiles_tuned_for_its_weights(tmp_path, monkeypatch):
    """Those of FP8 weights and of bfloat16 ones of the same sizes are apart."""
    of_fp8 = tiles.tiles_by_rule(H200._replace(fp8=True), 512, 8, 128, 2048, 768, 1)
    path = tmp_path / "mine.json"
    fp8 = SHAPE._replace(dtype=torch.float8_e4m3fn)
    tune.write(path, fp8, [tune.TuningResult(16, of_fp8, 1.0, 2.0, 5)], {"device": "x"})
    monkeypatch.setenv("MOEALIGN_TUNING", str(path))
    tiles.tuned.cache_clear()
    target = H200._replace(fp8=True)
    new = functools.partial(torch.empty, device="meta")
    routes = Routes(new(4096, 8), new(4096, 8, dtype=torch.int32))
    x = new(4096, 2048, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        both = [QuantizedWeights(new(size, dtype=dtype), new(1)) for size in ((128, 1536, 2048), (128, 2048, 768))]
        quantized = tuple(both) if dtype is not torch.bfloat16 else None
        layer = ExpertWeights(both[0].data, both[1].data, quantized=quantized)
        assert (tiles.select_tiles(x, layer, routes, target=target) == of_fp8) is (quantized is not None)
    monkeypatch.undo()
    tiles.tuned.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_gpu_finds_tiles_that_run_and_are_right(dtype):
    (found,) = tune.tune(tune.Shape(8, 2, 256, 192, dtype), [64], torch.device("cuda", 0))
    assert 0 < found.microseconds <= found.by_rule < float("inf")
    assert found.tried >= 5


def test_finds_better_tiles_and_skips_those_that_cannot_run():
    first = tune.starting_tiles(H200, SHAPE, 1024)

    def measure(chosen):
        """Minimal at three stages and 256 columns in the second product; some tiles cannot run."""
        if chosen.first.n == 256 or chosen.first.ctas:
            return float("inf")
        return 100 + abs(chosen.first.stages - 3) + abs(chosen.second.n - 256) / 64 + abs(chosen.block_size - 128)

    chosen, micros, by_rule, tried = tune.search(first, measure)
    assert micros == measure(chosen) < by_rule == measure(first[0])
    assert (chosen.first.stages, chosen.second.n, chosen.block_size) == (3, 256, 128)
    assert tried > len(first)


def test_the_file_keeps_its_entries_and_is_read_back(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "mine.json"
    other = tune.Shape(8, 2, 64, 32, torch.float16)
    chosen = LayerTiles(64, Tile(64, 64, 64, 1, 4, 3), Tile(64, 64, 64, 1, 4, 3))
    tune.write(path, SHAPE, [tune.TuningResult(64, chosen, 12.34, 20.0, 5)], {"device": "x"})
    tune.write(path, other, [tune.TuningResult(1, chosen, 1.0, 2.0, 5)], {"device": "x"})
    tune.write(path, SHAPE, [tune.TuningResult(1, chosen, 1.0, 2.0, 5)], {"device": "x"})
    entries = json.loads(path.read_text())["plans"]
    assert set(entries) == {SHAPE.key, other.key}
    assert set(entries[SHAPE.key]) == {"1", "64"}
    monkeypatch.setenv("MOEALIGN_TUNING", str(path))
    tiles.tuned.cache_clear()
    assert tiles.tuned(H200)[SHAPE.key][64] == chosen
    monkeypatch.undo()
    tiles.tuned.cache_clear()


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv("MOEALIGN_TUNING", raising=False)
    monkeypatch.setenv("MOEALIGN_CACHE_DIR", str(tmp_path))
    assert tiles.tuning_path(H200) == tmp_path / "tuned" / "NVIDIA_H200.json"


def test_without_a_usable_cache_folder_there_is_no_file(monkeypatch, tmp_path):
    monkeypatch.delenv("MOEALIGN_TUNING", raising=False)
    monkeypatch.setenv("MOEALIGN_CACHE_DIR", str(tmp_path / "a file" / "folder"))
    (tmp_path / "a file").write_text("")
    assert tiles.tuning_path(H200) is None
    done = CliRunner().invoke(app, ["tune", *SIZES])
    assert done.exit_code == 2
    assert "--output: expected a file" in done.output


def test_without_a_home_folder_the_rules_are_used(monkeypatch):
    for name in ("MOEALIGN_TUNING", "MOEALIGN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    tiles.tuned.cache_clear()
    assert tiles.tuning_path(H200) is None
    assert tiles.tuned(H200) == tiles.tuned(tiles.Target("no such GPU", 1, False))
    tiles.tuned.cache_clear()


def test_tiles_that_ship_lie_beside_the_other_data():
    assert (tiles._SHIPPED.parent / "stdlib-moe.safetensors").exists()


def test_refuses_a_machine_without_a_gpu():
    with pytest.raises(BackendUnavailable, match="tune: expected a device that the kernels run on, got cpu"):
        next(tune.tune(SHAPE, [1], torch.device("cpu")))


SIZES = ["--experts", "8", "--top-k", "2", "--hidden", "64", "--inner", "32"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can tune")
def test_the_command_explains_a_missing_gpu():
    done = CliRunner().invoke(app, ["tune", *SIZES])
    assert done.exit_code == 2
    assert "tune: expected a device" in done.output


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tokens", "1,x"], "--tokens"),
        (["--dtype", "int8"], "--dtype"),
        (["--top-k", "9"], "--top-k: expected at most"),
    ],
)
def test_the_command_refuses(extra, message):
    done = CliRunner().invoke(app, ["tune", *SIZES, *extra])
    assert done.exit_code == 2
    assert message in done.output


def test_the_command_writes_and_shows(monkeypatch, tmp_path):
    """With the measurement replaced; the search behind it is tested above."""
    chosen = LayerTiles(16, Tile(16, 64, 64, 1, 4, 3), Tile(16, 64, 64, 1, 4, 3))
    monkeypatch.setattr(
        tune, "tune", lambda shape, counts, device: iter([tune.TuningResult(7, chosen, 10.0, 12.0, 30)])
    )
    path = tmp_path / "mine.json"
    done = CliRunner().invoke(app, ["tune", *SIZES, "--output", str(path)])
    assert done.exit_code == 0, done.output
    assert "1.20x" in done.output
    assert "7" in json.loads(path.read_text())["plans"]["E=8,k=2,H=64,I=32,bfloat16"]
