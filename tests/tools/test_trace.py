"""Routing traces: written, read back, refused when they are not right; and the one that ships is real."""

from __future__ import annotations

import importlib.util
import json
import os

import pytest
import torch
from helpers import ROOT
from safetensors.torch import save_file

from moealign.errors import TraceError
from moealign.trace import Trace, example_trace, load_trace, save_trace

ABOUT = {"experts": 8, "k": 2, "model": "m", "source": "s", "revision": "r"}
IDS = torch.randint(0, 8, (3, 10, 2), dtype=torch.uint8)


def write(path, tensors, about):
    metadata = None if about is None else {"moealign": about if isinstance(about, str) else json.dumps(about)}
    save_file(tensors, str(path), metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("experts", "low", "dtype"),
    [(8, 0, torch.uint8), (256, 0, torch.uint8), (257, 0, torch.int16), (40_000, 0, torch.int32), (8, -1, torch.int8)],
)
def test_round_trip_in_the_smallest_dtype(tmp_path, experts, low, dtype):
    ids = torch.randint(low, experts, (2, 50, 4), generator=torch.Generator().manual_seed(1))
    ids[0, 0, 0], ids[0, 0, 1] = low, experts - 1
    path = tmp_path / "trace.safetensors"
    save_trace(path, Trace(ids, experts, "m", "s", "r", {"steps": 3}))
    trace = load_trace(path)
    assert trace.topk_ids.dtype is dtype
    assert torch.equal(trace.topk_ids.long(), ids)
    assert (trace.num_experts, trace.layers, trace.tokens, trace.top_k) == (experts, 2, 50, 4)
    assert (trace.model, trace.source, trace.revision, dict(trace.details)) == ("m", "s", "r", {"steps": 3})


@pytest.mark.parametrize(
    ("tensors", "about", "message"),
    [
        ({"ids": IDS}, ABOUT, "expected a tensor named topk_ids, got ids"),
        ({"topk_ids": IDS[0]}, ABOUT, r"expected topk_ids of shape \[layers, tokens, k\], got \[10, 2\]"),
        (
            {"topk_ids": IDS.float()},
            ABOUT,
            "expected topk_ids of an integer dtype \\(uint8, int8, int16, int32, int64\\), got torch.float32",
        ),
        ({"topk_ids": IDS}, None, "expected JSON metadata under the name moealign, got none"),
        ({"topk_ids": IDS}, "{", "expected JSON metadata, got text that is not JSON"),
        ({"topk_ids": IDS}, "[" * 100_000, "expected JSON metadata, got text that is not JSON"),
        ({"topk_ids": IDS}, "[1]", "expected a JSON object as metadata, got list"),
        ({"topk_ids": IDS}, {"experts": 8}, "expected k in its metadata, got experts"),
        ({"topk_ids": IDS}, {**ABOUT, "experts": "8"}, "expected experts to be of type int in its metadata, got '8'"),
        ({"topk_ids": IDS}, {**ABOUT, "experts": 0}, "expected experts and k of at least 1"),
        ({"topk_ids": IDS}, {**ABOUT, "k": 3}, "expected k = 3 ids per token as its metadata says, got 2"),
        ({"topk_ids": IDS + 7}, ABOUT, r"expected ids in \[-1, 8\), got \d+ to 14"),
        ({"topk_ids": IDS[:, :0].contiguous()}, ABOUT, "expected at least one layer, token and choice"),
    ],
)
def test_refusals(tmp_path, tensors, about, message):
    path = write(tmp_path / "trace.safetensors", tensors, about)
    if "14" in message:
        tensors["topk_ids"][0, 0, 0] = 14
        write(path, tensors, about)
    with pytest.raises(TraceError, match=message) as caught:
        load_trace(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(TraceError, match="got no such file"):
        load_trace(tmp_path / "nowhere")
    with pytest.raises(TraceError, match="got a folder"):
        load_trace(tmp_path)
    with pytest.raises(TraceError, match="got something else"):
        load_trace(os.devnull)
    text = tmp_path / "text.safetensors"
    text.write_text("not a tensor in sight")
    with pytest.raises(TraceError, match=r"expected a \.safetensors file, got something else"):
        load_trace(text)
    whole = example_trace().read_bytes()
    text.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceError, match=r"expected a \.safetensors file, got something else"):
        load_trace(text)


def test_a_trace_that_is_none_is_not_written(tmp_path):
    with pytest.raises(TraceError, match=r"expected ids in \[-1, 4\)"):
        save_trace(tmp_path / "t.safetensors", Trace(torch.full((1, 2, 2), 4), 4, "m", "s", "r"))
    assert list(tmp_path.iterdir()) == []


class Unknown:
    pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"details": {name: 2}}, f"expected other details than .*, got {name}; set the field") for name in ABOUT),
        ({"details": {"when": Unknown()}}, "expected details that JSON can hold, got when = Unknown"),
        ({"details": {"loss": float("nan")}}, "expected details that JSON can hold, got loss = float"),
        ({"details": {3: "x"}}, "expected names of details to be strings, got 3"),
        ({"details": [1]}, "expected details to be a mapping of names to values, got list"),
        ({"model": None}, "expected model to be of type str in its metadata, got None"),
        ({"source": b"s"}, "expected source to be of type str in its metadata, got b's'"),
        ({"revision": 3}, "expected revision to be of type str in its metadata, got 3"),
        ({"num_experts": 8.0}, "expected experts to be of type int in its metadata, got 8.0"),
        ({"num_experts": True}, "expected experts to be of type int in its metadata, got True"),
        ({"num_experts": 0}, "expected experts and k of at least 1, got 0 and 2"),
        ({"topk_ids": [[[1]]]}, "expected topk_ids to be a tensor, got list"),
        ({"topk_ids": IDS[0]}, r"expected topk_ids of shape \[layers, tokens, k\], got \[10, 2\]"),
        ({"topk_ids": torch.tensor(1)}, r"expected topk_ids of shape \[layers, tokens, k\], got \[\]"),
        ({"topk_ids": IDS[:, :0]}, "expected at least one layer, token and choice"),
        (
            {"topk_ids": IDS > 1},
            "expected topk_ids of an integer dtype \\(uint8, int8, int16, int32, int64\\), got torch.bool",
        ),
        *(
            ({"details": {"calls": calls}}, "expected calls to be the tokens of each call, at least 1 and 10 in all")
            for calls in ([4, 5], [10, 0], [4.0, 6.0], 10, None, "10", [True, 9])
        ),
    ],
)
def test_what_would_not_be_read_back_is_not_written(tmp_path, changes, message):
    fields = {"topk_ids": IDS, "num_experts": 8, "model": "m", "source": "s", "revision": "r", "details": {}}
    with pytest.raises(TraceError, match=message):
        save_trace(tmp_path / "t.safetensors", Trace(**fields | changes))
    assert list(tmp_path.iterdir()) == []


def test_calls_are_kept_and_checked(tmp_path):
    path = tmp_path / "t.safetensors"
    save_trace(path, Trace(IDS, 8, "m", "s", "r", {"calls": (7, 1, 1, 1)}))
    assert load_trace(path).calls == (7, 1, 1, 1)
    assert load_trace(write(path, {"topk_ids": IDS}, ABOUT)).calls == (), "a file that does not say"
    with pytest.raises(TraceError, match=r"expected calls to be the tokens .* 10 in all, got \[7, 1\]"):
        load_trace(write(path, {"topk_ids": IDS}, {**ABOUT, "calls": [7, 1]}))


def test_sizes_and_device_are_kept_and_checked(tmp_path):
    path = tmp_path / "t.safetensors"
    save_trace(path, Trace(IDS, 8, "m", "s", "r", {"hidden": 64, "intermediate": 16, "device": "NVIDIA H200"}))
    trace = load_trace(path)
    assert (trace.hidden, trace.intermediate, trace.device) == (64, 16, "NVIDIA H200")
    trace = load_trace(write(path, {"topk_ids": IDS}, ABOUT))
    assert (trace.hidden, trace.intermediate, trace.device) == (None, None, ""), "a file that does not say"
    for name, value, message in (
        ("hidden", "64", "expected hidden to be of type int in its metadata, got '64'"),
        ("intermediate", 0, "expected intermediate between 1 and 16,777,216 in its metadata, got 0"),
        ("hidden", 2**40, "expected hidden between 1 and 16,777,216 in its metadata, got 1,099,511,627,776"),
        ("device", 3, "expected device to be of type str in its metadata, got 3"),
    ):
        with pytest.raises(TraceError, match=message):
            load_trace(write(path, {"topk_ids": IDS}, {**ABOUT, name: value}))


@pytest.mark.parametrize("experts", [2**16 + 1, 2**30, 2**40])
def test_absurd_numbers_of_experts_are_refused(tmp_path, experts):
    path = write(tmp_path / "t.safetensors", {"topk_ids": IDS}, {**ABOUT, "experts": experts})
    with pytest.raises(TraceError, match=f"expected at most 65,536 experts in its metadata, got {experts:,}"):
        load_trace(path)


def overlap(ids: torch.Tensor) -> float:
    """Mean number of experts that a token shares with the token before it."""
    hot = torch.zeros(*ids.shape[:2], int(ids.max()) + 1).scatter_(2, ids.long(), 1.0)
    return (hot[:, 1:] * hot[:, :-1]).sum(-1).mean().item()


def test_the_shipped_trace_is_a_real_router_s():
    trace = load_trace(example_trace())
    assert trace.layers >= 3
    assert trace.num_experts >= 64
    assert "standard library" in trace.source
    assert trace.details["held_out_loss"] < 0.7 * trace.details["unigram_loss"]
    assert example_trace().stat().st_size < 2**21
    ids = trace.topk_ids
    rows = ids.sort(-1).values
    assert (rows[..., 1:] != rows[..., :-1]).all(), "the top k of a token are different experts"
    # Routing depends on the text: the same byte in a like place goes to like experts.  Random ids would not show it.
    by_chance = trace.top_k**2 / trace.num_experts
    shuffled = ids[:, torch.randperm(trace.tokens, generator=torch.Generator().manual_seed(0))]
    assert overlap(shuffled) > 1.05 * by_chance, "some experts are busier than others"
    assert abs(overlap(ids) - overlap(shuffled)) > 0.05, "neighbours are not like strangers"


@pytest.mark.parametrize("path", ["nowhere/t.safetensors", "."])
def test_a_path_that_cannot_be_written(tmp_path, path):
    with pytest.raises(TraceError, match="expected a path that can be written, got"):
        save_trace(tmp_path / path, Trace(IDS, 8, "m", "s", "r"))


# ---- examples/make_trace.py --------------------------------------------------------------------------------------


@pytest.fixture
def maker(monkeypatch):
    """The example without its training."""
    spec = importlib.util.spec_from_file_location("make_trace", ROOT / "examples" / "make_trace.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.trained = []
    monkeypatch.setattr(module, "train", lambda *arguments: module.trained.append(arguments))
    monkeypatch.setattr(module, "RECORDED", 256)
    return module


def test_a_model_that_has_learned_little_still_gives_a_trace(maker, tmp_path, capsys):
    path = tmp_path / "t.safetensors"
    maker.main(["--steps", "20", "--output", str(path)])
    trace = load_trace(path)
    assert (trace.tokens, trace.details["steps"]) == (256, 20)
    assert "warning: the held-out loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "19"], "--steps: expected at least 20, got 19"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--device", "nowhere"], "--device: expected one that torch can use, got nowhere"),
        (["--output", "nowhere/t.safetensors"], "--output: expected a file in an existing folder"),
        (["--output", "."], "--output: expected a file in an existing folder"),
    ],
)
def test_wrong_options_are_refused_before_the_training(maker, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        maker.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert maker.trained == []


def test_the_fewest_steps_have_a_learning_rate(maker):
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = maker.warm_up(optimiser, 3e-3, maker.MIN_STEPS)
    rates = []
    for _ in range(maker.MIN_STEPS):
        rates += schedule.get_last_lr()
        optimiser.step()
        schedule.step()
    assert min(rates) > 0
    assert max(rates) == pytest.approx(3e-3)


def test_every_option_is_described(maker):
    described = {action.dest: action.help for action in maker.parser()._actions}
    assert all(described.values())
    assert {"steps", "seed", "threads", "output"} <= described.keys()
