"""A request as bytes and back, for one vLLM version; outputs from bytes.

Whoever may write to the broker or the bus may send what no vLLM has made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from pdtasks.errors import IncompatibleWorker, InvalidRequest

# One buffer, tensors included: text requests carry none.  Both keep state while they work and are
# used on one event loop in each process.
_encoder = MsgpackEncoder(size_threshold=1 << 60)
_decoder = MsgpackDecoder(EngineCoreRequest)
_outputs_decoder = MsgpackDecoder(EngineCoreOutputs)


def encode_request(request: EngineCoreRequest) -> bytes:
    """`request` as bytes. Another vLLM version cannot read them: say which made them.

    Raises InvalidRequest naming the field that no message can carry: a number beyond 64 bits, say.
    """
    try:
        (buffer,) = _encoder.encode(request)
    except (OverflowError, TypeError, ValueError) as exc:
        raise InvalidRequest(f"{_uncarried(request)} cannot be sent to a worker") from exc
    return bytes(cast("bytes", buffer))


def _uncarried(request: EngineCoreRequest) -> str:
    params = request.sampling_params
    for name in getattr(params, "__struct_fields__", ()):
        try:
            _encoder.encode(getattr(params, name))
        except (OverflowError, TypeError, ValueError):
            return str(name)
    return "the request"


def decode_request(wire: bytes) -> EngineCoreRequest:
    """A new request, free to be changed. Raises InvalidRequest."""
    try:
        return _decoder.decode(wire)  # type: ignore[no-any-return]
    except Exception as exc:  # noqa: BLE001 - msgspec's own, and whatever vLLM's hooks stumble on
        raise InvalidRequest(f"the request cannot be read ({type(exc).__name__})") from None


def sibling_of(wire: bytes, request_id: str, seed: int | None) -> bytes:
    """The request `wire` with another id and seed. Raises InvalidRequest."""
    request = decode_request(wire)
    request.request_id = request_id
    if request.sampling_params is not None:
        request.sampling_params.seed = seed
    return encode_request(request)


def decode_outputs(wire: bytes) -> EngineCoreOutputs:
    """What an engine made in one step. Raises IncompatibleWorker."""
    try:
        return _outputs_decoder.decode(wire)  # type: ignore[no-any-return]
    except Exception as exc:  # noqa: BLE001 - as above
        raise IncompatibleWorker(f"unreadable outputs: {type(exc).__name__}") from None


def require_runnable(request: EngineCoreRequest, model_config: Any) -> None:
    """Raises InvalidRequest for a request that vLLM's front half would not have made.

    The engine takes what it gets: a token that is none would end it, and all its requests.
    """
    prompt = request.prompt_token_ids
    if request.sampling_params is None or request.pooling_params is not None or not prompt:
        raise InvalidRequest("the request is not one for text")
    if request.mm_features or request.prompt_embeds is not None or request.lora_request is not None:
        raise InvalidRequest("the request is not one for text alone")
    if len(prompt) >= model_config.max_model_len:
        raise InvalidRequest("the prompt is longer than the model's context")
    require_tokens(prompt, model_config)


def require_tokens(token_ids: Sequence[int], model_config: Any) -> None:
    """Raises InvalidRequest for tokens that the model does not have."""
    # (Two passes in C: in a loop of ours the 128,000 ids of a long prompt take several ms.)
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= model_config.get_vocab_size()):
        raise InvalidRequest("the request has tokens that the model does not have")
