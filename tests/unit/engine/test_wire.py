"""Does a request come back from its bytes as it was, or say what cannot go?"""

from __future__ import annotations

import pytest
from vllm.sampling_params import RepetitionDetectionParams, SamplingParams

from pdtasks.engine.wire import decode_request, encode_request
from pdtasks.errors import InvalidRequest
from tests.unit.factories import a_request


def test_a_request_comes_back_as_it_was() -> None:
    request = a_request("r")

    assert decode_request(encode_request(request)) == request


@pytest.mark.parametrize(
    ("params", "named"),
    [
        (SamplingParams(top_k=2**64), "top_k"),
        (SamplingParams(stop=["\ud800"], detokenize=True), "stop"),
        (
            SamplingParams(
                repetition_detection=RepetitionDetectionParams(
                    max_pattern_size=2**70, min_pattern_size=1, min_count=2
                )
            ),
            "repetition_detection",
        ),
    ],
)
def test_what_cannot_go_is_named(params: SamplingParams, named: str) -> None:
    request = a_request("r")
    request.sampling_params = params

    with pytest.raises(InvalidRequest, match=f"^{named} cannot be sent"):
        encode_request(request)
