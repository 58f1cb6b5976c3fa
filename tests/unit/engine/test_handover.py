"""How does one request become two, and behave as if it were one? On vLLM's own structures."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from pdtasks.engine.handover import make_decode, make_prefill, may_go_on
from pdtasks.engine.wire import decode_request, encode_request
from pdtasks.errors import InvalidRequest
from tests.unit.factories import a_request

#: What decides which token comes next. Neither stage may touch it.
DECIDING: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 30,
    "min_p": 0.05,
    "seed": 42,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.2,
    "repetition_penalty": 1.1,
    "logprobs": 3,
    "logit_bias": {5: 1.0},
    "allowed_token_ids": [1, 2, 3],
    "stop_token_ids": [7, 8],
    "ignore_eos": True,
}


def params_of(request: EngineCoreRequest) -> SamplingParams:
    assert request.sampling_params is not None
    return request.sampling_params


def ours(request: EngineCoreRequest) -> dict[str, Any]:
    extra: dict[str, Any] = params_of(request).extra_args or {}
    found: dict[str, Any] = extra["kv_transfer_params"]
    return found


def prefill_of(request: EngineCoreRequest) -> EngineCoreRequest:
    make_prefill(request, "r#1.0", "t1")
    return request


def decode_of(
    request: EngineCoreRequest, handle: dict[str, Any] | None = None
) -> EngineCoreRequest:
    make_decode(request, "r#2.0", [99], handle)
    return request


def test_a_request_survives_its_way_and_can_be_changed_at_the_other_end() -> None:
    request = a_request(**DECIDING)

    read = decode_request(encode_request(request))

    assert read == request
    read.sampling_params = None
    assert request.sampling_params is not None


def test_prefill_runs_for_exactly_one_token() -> None:
    params = params_of(prefill_of(a_request(max_tokens=20, min_tokens=5)))

    assert params.max_tokens == 1
    assert params.min_tokens == 1, "the first token may not be an end either"


def test_decode_may_write_what_the_client_asked_for() -> None:
    params = params_of(decode_of(a_request(max_tokens=20, min_tokens=5)))

    assert (params.max_tokens, params.min_tokens) == (20, 5), "the first token counts as output"


@pytest.mark.parametrize("make", [prefill_of, decode_of])
def test_what_decides_the_next_token_is_left_alone(make: Any) -> None:
    changed = params_of(make(a_request(**DECIDING)))

    assert {name: getattr(changed, name) for name in DECIDING} == DECIDING
    assert changed.all_stop_token_ids == params_of(a_request(**DECIDING)).all_stop_token_ids


@pytest.mark.parametrize("make", [prefill_of, decode_of])
def test_text_is_left_to_the_asker(make: Any) -> None:
    params = params_of(make(a_request(stop=["\n\n"])))

    # An engine core without a tokenizer would otherwise be told to look for text.
    assert params.stop == []
    assert params.detokenize is False
    assert params.output_text_buffer_length == 0


@pytest.mark.parametrize(("make", "engine_id"), [(prefill_of, "r#1.0"), (decode_of, "r#2.0")])
def test_each_stage_has_a_name_of_its_own_in_its_engine(make: Any, engine_id: str) -> None:
    request = make(a_request())

    assert request.request_id == engine_id
    assert request.external_req_id is None
    assert request.client_index == 0
    assert request.prompt_token_ids == list(range(10))


def test_prefill_saves_under_the_transfer_and_decode_loads_and_resumes() -> None:
    handle = {"fingerprint": "f"}

    assert ours(prefill_of(a_request())) == {"pdtasks": {"save": "t1"}}
    assert ours(decode_of(a_request(), handle)) == {"pdtasks": {"load": handle, "resume": [99]}}


def test_without_a_handle_decode_still_resumes() -> None:
    assert ours(decode_of(a_request())) == {"pdtasks": {"load": None, "resume": [99]}}


@pytest.mark.parametrize("make", [prefill_of, decode_of])
def test_a_client_cannot_name_somebody_elses_kv(make: Any) -> None:
    # vLLM passes a client's own `kv_transfer_params` and `vllm_xargs` on to the engine.
    theirs = {"pdtasks": {"load": {"transfer_id": "somebody else's"}}, "do_remote_prefill": True}
    request = a_request(extra_args={"kv_transfer_params": theirs, "my_xarg": 7})

    make(request)

    assert "somebody" not in str(ours(request))
    assert set(ours(request)) == {"pdtasks"}
    extra = params_of(request).extra_args
    assert extra is not None
    assert extra["my_xarg"] == 7


def test_prompt_logprobs_are_answered_by_prefill_alone() -> None:
    # vLLM does not read KV from anywhere for a request that wants them.
    asked = a_request(prompt_logprobs=2)
    assert params_of(asked).skip_reading_prefix_cache

    assert params_of(prefill_of(a_request(prompt_logprobs=2))).prompt_logprobs == 2
    decode = params_of(decode_of(asked))
    assert decode.prompt_logprobs is None
    assert not decode.skip_reading_prefix_cache


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "goes_on"),
    [
        (10, 1, False),
        (10, 2, True),
        (10, None, True),
        (97, 50, True),  # 97 + 1 leaves room for another one in a context of 100
        (98, 50, True),
        (99, 50, False),  # the first token is the last that fits
        (99, None, False),
    ],
)
def test_a_request_goes_on_if_a_second_token_is_allowed(
    prompt_tokens: int, max_tokens: int | None, goes_on: bool
) -> None:
    request = a_request(prompt=[1] * prompt_tokens, max_tokens=max_tokens)

    assert may_go_on(request, max_model_len=100) is goes_on


def test_a_request_that_no_structure_could_be_read_from_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        decode_request(b"\x93\x01\x02")
