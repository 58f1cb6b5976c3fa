"""A request as bytes and back, for one vLLM version."""

from __future__ import annotations

from typing import cast

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from pdtasks.errors import InvalidRequest

# One buffer, tensors included: text requests carry none.  Both keep state while they work and are
# used on one event loop in each process.
_encoder = MsgpackEncoder(size_threshold=1 << 60)
_decoder = MsgpackDecoder(EngineCoreRequest)


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
    """A new request, free to be changed. Raises msgspec.MsgspecError."""
    return _decoder.decode(wire)  # type: ignore[no-any-return]
