"""How does one request become two, and behave as if it were one?

Prefill runs the prompt for exactly one token.  Decode gets the request as the client meant it, with
that token already there.  The functions here change vLLM's request structures and do no I/O.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.engine import EngineCoreRequest

from pdtasks.kv import params as kv_params


def make_prefill(request: EngineCoreRequest, engine_id: str, transfer_id: str) -> None:
    """Turn `request` into its first stage: one token, KV saved under `transfer_id`."""
    params = request.sampling_params
    assert params is not None
    _rename(request, engine_id)
    params.max_tokens = 1
    params.min_tokens = min(params.min_tokens, 1)
    _leave_text_to_the_asker(params)
    params.extra_args = _with_transfer(params.extra_args, kv_params.save(transfer_id))


def make_decode(
    request: EngineCoreRequest, engine_id: str, tokens: list[int], handle: dict[str, Any] | None
) -> None:
    """Turn `request` into its second stage: go on after `tokens`, with the KV at `handle`."""
    params = request.sampling_params
    assert params is not None
    _rename(request, engine_id)
    # Prefill has answered them; vLLM would otherwise refuse to read KV from anywhere.
    params.prompt_logprobs = None
    params.skip_reading_prefix_cache = False
    _leave_text_to_the_asker(params)
    params.extra_args = _with_transfer(params.extra_args, kv_params.load(handle, tokens))


def make_whole(request: EngineCoreRequest, engine_id: str, tokens: list[int]) -> None:
    """Turn `request` into one that an engine computes from its prompt on.

    Args:
        tokens: of the answer, those that an attempt has made that was lost.
    """
    params = request.sampling_params
    assert params is not None
    _rename(request, engine_id)
    if tokens:
        # They came with the first token.
        params.prompt_logprobs = None
        params.skip_reading_prefix_cache = False
    _leave_text_to_the_asker(params)
    params.extra_args = _with_transfer(params.extra_args, kv_params.resume(tokens))


def may_go_on(request: EngineCoreRequest, max_model_len: int) -> bool:
    """Does `request`, as the client meant it, allow a second token?

    Then an end by length after the first one was only the end of the first stage.
    """
    params = request.sampling_params
    assert params is not None
    assert request.prompt_token_ids is not None
    allowed = params.max_tokens if params.max_tokens is not None else max_model_len
    return allowed > 1 and len(request.prompt_token_ids) + 1 < max_model_len


def _rename(request: EngineCoreRequest, engine_id: str) -> None:
    request.request_id = engine_id
    request.external_req_id = None
    request.client_index = 0
    request.data_parallel_rank = None


def _leave_text_to_the_asker(params: Any) -> None:
    params.stop = []
    params.detokenize = False
    params.output_text_buffer_length = 0


def _with_transfer(extra_args: dict[str, Any] | None, transfer: kv_params.Params) -> dict[str, Any]:
    # Overwritten, not merged: a client could otherwise name somebody else's KV.
    return {**(extra_args or {}), "kv_transfer_params": transfer}
