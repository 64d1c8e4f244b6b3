"""Traces from vLLM's routed experts and from SGLang's recorder, in the forms in which the engines return them."""

from __future__ import annotations

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import draw

from moealign.convert import from_sglang, from_vllm
from moealign.errors import TraceError
from moealign.trace import load_trace, save_trace

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def routed(tokens, seed=0, low=0):
    return draw(low, EXPERTS, (tokens, LAYERS, TOP_K), seed, torch.int16)


def encoded(array):
    """As vLLM's HTTP server sends an array."""
    file = io.BytesIO()
    np.save(file, array.numpy())
    return base64.b64encode(file.getvalue()).decode()


def request(prompt, *completions):
    outputs = [SimpleNamespace(routed_experts=each) for each in completions]
    return SimpleNamespace(prompt_routed_experts=prompt, outputs=outputs)


PROMPT, FIRST, SECOND = routed(5), routed(2, 1), routed(3, 2)


@pytest.mark.parametrize(
    "outputs",
    [
        [PROMPT, FIRST, SECOND],
        [PROMPT.numpy(), FIRST.numpy(), SECOND.numpy()],
        torch.cat([PROMPT, FIRST, SECOND]),
        request(PROMPT.numpy(), FIRST.numpy(), SECOND.numpy()),
        [request(PROMPT.numpy(), FIRST.numpy()), request(None, SECOND.numpy())],
        [SimpleNamespace(outputs=[SimpleNamespace(routed_experts=each)]) for each in (PROMPT, FIRST, SECOND)],
        {
            "prompt_routed_experts": encoded(PROMPT),
            "choices": [{"routed_experts": encoded(FIRST)}, {"routed_experts": encoded(SECOND)}],
        },
        {"choices": [{"routed_experts": each.tolist()} for each in (PROMPT, FIRST, SECOND)]},
    ],
    ids=["tensors", "arrays", "one tensor", "one request", "requests", "no prompt", "HTTP", "HTTP with lists"],
)
def test_vllm(tmp_path, outputs):
    trace = from_vllm(outputs, num_experts=EXPERTS, model="m", source="s", revision="r")
    save_trace(tmp_path / "t.safetensors", trace)
    trace = load_trace(tmp_path / "t.safetensors")
    assert torch.equal(trace.topk_ids.int(), torch.cat([PROMPT, FIRST, SECOND]).permute(1, 0, 2).int())
    assert (trace.model, trace.source, trace.revision, trace.num_experts) == ("m", "s", "r", EXPERTS)
    assert sum(trace.details["requests"]) == trace.tokens == 10
    assert trace.calls == (), "vLLM does not report batches"


def test_vllm_s_dense_layers_are_omitted_and_missing_routes_are_minus_one():
    ids = routed(4, low=-1)
    ids[:, 1] = 0
    trace = from_vllm(ids, num_experts=EXPERTS)
    assert trace.details["layers"] == ["layer 0", "layer 2"]
    assert torch.equal(trace.topk_ids.int(), ids[:, [0, 2]].permute(1, 0, 2).int())
    assert from_vllm(torch.zeros(4, 2, 1, dtype=torch.int16), num_experts=1).layers == 2, "top 1 of 1 is a router"


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([], "expected routed experts in vLLM's outputs, got none; start vLLM with enable_return_routed_experts=True"),
        (request(None, None), "got none; start vLLM with"),
        ([PROMPT, FIRST[:, :2]], "of the same layers and top_k, got torch.int64 [2, 2, 2] beside [5, 3, 2]"),
        (PROMPT[0], "expected integer arrays [tokens, layers, top_k]"),
        (PROMPT.float(), "expected integer arrays [tokens, layers, top_k]"),
        (PROMPT + EXPERTS, "expected ids below num_experts = 8, got 15"),
        (PROMPT[:0], "expected at least one layer, token and choice"),
        ("no base64", "expected an array of routed experts, got str"),
        (base64.b64encode(b"no NumPy file").decode(), "expected an array of routed experts, got str"),
        ([object()], "got none; start vLLM with"),
    ],
)
def test_what_vllm_does_not_return(outputs, message):
    with pytest.raises(TraceError, match=re.escape(message)):
        from_vllm(outputs, num_experts=EXPERTS)


def recording(*passes, physical=None, columns=8):
    """As SGLang dumps it: unused columns and layers without a router are -1."""
    records = []
    for number, ids in enumerate(passes):
        held = torch.full((LAYERS + 1, ids.shape[1], columns), -1, dtype=torch.int32)
        held[1:, :, :TOP_K] = ids
        records.append(
            {
                "forward_pass_id": number, "rank": 0, "gatherer_key": "primary", "input_ids": [7] * ids.shape[1],
                "forward_mode": 1, "topk_ids_of_layer": held, "misc_objects": [],
            }
        )  # fmt: skip
    if physical is None:
        physical = torch.arange(EXPERTS).expand(LAYERS + 1, -1).clone()
    return {"records": records, "last_physical_to_logical_map": physical}


@pytest.mark.parametrize("in_file", [True, False])
def test_sglang(tmp_path, in_file):
    passes = [draw(0, EXPERTS, (LAYERS, tokens, TOP_K), tokens) for tokens in (6, 0, 1, 1)]
    passes[0][0, 2, 1] = -1
    record = recording(*passes)
    if in_file:
        torch.save(record, tmp_path / "expert_distribution_recorder_1.0_0.pt")
        record = tmp_path / "expert_distribution_recorder_1.0_0.pt"
    trace = from_sglang(record, source="s")
    assert torch.equal(trace.topk_ids.int(), torch.cat(passes, 1))
    assert (trace.calls, trace.num_experts, trace.source) == ((6, 1, 1), EXPERTS, "s")
    assert trace.details["layers"] == ["layer 1", "layer 2", "layer 3"]
    save_trace(tmp_path / "t.safetensors", trace)


def test_sglang_s_physical_experts_become_logical_ones():
    """Two copies of expert 0, as expert parallelism with redundant experts has them."""
    physical = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 0]] * (LAYERS + 1))
    physical[2] = physical[2].roll(1)
    ids = draw(0, 9, (LAYERS, 5, TOP_K))
    trace = from_sglang(recording(ids, physical=physical))
    expected = torch.stack([physical[i + 1][ids[i].long()] for i in range(LAYERS)])
    assert torch.equal(trace.topk_ids, expected)
    assert trace.num_experts == EXPERTS


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"logical_count": torch.zeros(1)}, "--expert-distribution-recorder-mode per_token"),
        ({"records": [{"global_physical_count": torch.zeros(1)}]}, "--expert-distribution-recorder-mode per_token"),
        ({"records": []}, "--expert-distribution-recorder-mode per_token"),
        (recording(torch.zeros(LAYERS, 0, TOP_K)), "expected at least one token, got 1 forward passes without any"),
        (recording(torch.full((LAYERS, 1, TOP_K), -1)), "expected at least one route to an expert, got -1 only"),
        (
            recording(torch.full((LAYERS, 1, TOP_K), EXPERTS)),
            "expected ids below 8, the number of physical experts, got 8; record with --disable-shared-experts-fusion",
        ),
        ({"records": recording(routed(2).permute(1, 0, 2))["records"]}, "got none; pass num_experts"),
        ("nowhere.pt", "nowhere.pt: expected a file of SGLang's recorder, got No such file or directory"),
        (__file__, "test_convert.py: expected a file of SGLang's recorder, got something else"),
    ],
)
def test_what_is_no_recording_of_sglang(record, message):
    with pytest.raises(TraceError, match=re.escape(message)):
        from_sglang(record)


def test_a_file_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("code of the file ran",)

    torch.save({"records": [Evil()]}, tmp_path / "t.pt")
    with pytest.raises(TraceError, match=r"t\.pt: expected a file of SGLang's recorder, got something else$"):
        from_sglang(tmp_path / "t.pt")
