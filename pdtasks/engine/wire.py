"""A request as bytes and back, for one vLLM version."""

from __future__ import annotations

from typing import cast

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

# One buffer, tensors included: text requests carry none.  Both keep state while they work and are
# used on one event loop in each process.
_encoder = MsgpackEncoder(size_threshold=1 << 60)
_decoder = MsgpackDecoder(EngineCoreRequest)


def encode_request(request: EngineCoreRequest) -> bytes:
    """`request` as bytes. Another vLLM version cannot read them: say which made them."""
    (buffer,) = _encoder.encode(request)
    return bytes(cast("bytes", buffer))


def decode_request(wire: bytes) -> EngineCoreRequest:
    """A new request, free to be changed. Raises msgspec.MsgspecError."""
    return _decoder.decode(wire)  # type: ignore[no-any-return]
