"""vLLM's structures for tests: a test states only what matters to it."""

from __future__ import annotations

from typing import Any, cast

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.serial_utils import MsgpackEncoder

from pdtasks.engine.arguments import ENGINE_VERSION
from pdtasks.messages import StepReply

_encoder = MsgpackEncoder(size_threshold=1 << 60)


def a_request(
    request_id: str = "r", prompt: list[int] | None = None, **sampling: Any
) -> EngineCoreRequest:
    """A request as vLLM's front half makes it."""
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=prompt or list(range(10)),
        mm_features=None,
        sampling_params=SamplingParams(**{"max_tokens": 20, **sampling}),
        pooling_params=None,
        arrival_time=1.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id=f"external-{request_id}",
    )


def an_output(
    token_ids: list[int], request_id: str = "r", finish_reason: FinishReason | None = None
) -> EngineCoreOutput:
    """What an engine says of one request in one step."""
    return EngineCoreOutput(
        request_id=request_id, new_token_ids=token_ids, finish_reason=finish_reason
    )


def a_reply(
    *outputs: tuple[int, EngineCoreOutput], engine: str = ENGINE_VERSION, **fields: Any
) -> StepReply:
    """A worker's reply with `(position, output)` pairs."""
    (wire,) = _encoder.encode(EngineCoreOutputs(outputs=[o for _, o in outputs], timestamp=5.0))
    values: dict[str, Any] = {"worker": "decode1@h", "stage": "decode", "engine": engine}
    if outputs:
        values |= {"outputs": bytes(cast("bytes", wire)), "positions": tuple(p for p, _ in outputs)}
    return StepReply(**values | fields)
