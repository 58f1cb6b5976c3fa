"""Does vLLM's front half go on when one output, or a figure, cannot be used?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from vllm.exceptions import GracefulHTTPError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import FinishReason
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.outputs import LogprobsLists

from api.client import _Statistics, _TextOutput
from tests.unit.factories import a_request, an_output


def asked(processor: _TextOutput, request_id: str) -> RequestOutputCollector:
    """Where the answer of a new request arrives."""
    request = a_request(request_id, logprobs=1, output_kind=RequestOutputKind.DELTA)
    queue = RequestOutputCollector(RequestOutputKind.DELTA, request_id)
    processor.add_request(request, None, queue=queue)
    return queue


def test_an_output_that_vllm_cannot_use_ends_its_request_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    processor = _TextOutput(None, log_stats=False)
    spoilt, honest = asked(processor, "spoilt"), asked(processor, "honest")
    output = an_output([7], "spoilt")
    output.new_logprobs = LogprobsLists(np.zeros((1, 0)), np.zeros((1, 0)), np.zeros(1))

    done = processor.process_outputs(
        [output, an_output([8], "honest", FinishReason.STOP), an_output([9], "nobody")]
    )

    answer: Any = honest.get_nowait()
    assert isinstance(answer, RequestOutput)
    assert answer.outputs[0].token_ids == [8]
    with pytest.raises(GracefulHTTPError, match="an output could not be used"):
        spoilt.get_nowait()
    assert done.reqs_to_abort == ["spoilt"]
    assert not processor.request_states, "nothing is kept of either"
    assert "output of spoilt" in caplog.text


def test_what_was_ended_by_its_text_before_a_spoilt_output_is_still_told_to_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor = _TextOutput(None, log_stats=False)
    stopped, _ = asked(processor, "stopped"), asked(processor, "spoilt")
    detokenizer = processor.request_states["stopped"].detokenizer
    monkeypatch.setattr(detokenizer, "update", lambda *_: "its stop string")
    spoilt = an_output([7], "spoilt")
    spoilt.new_logprobs = LogprobsLists(np.zeros((1, 0)), np.zeros((1, 0)), np.zeros(1))

    done = processor.process_outputs([an_output([8], "stopped"), spoilt])

    answer: Any = stopped.get_nowait()
    assert answer.outputs[0].stop_reason == "its stop string"
    assert done.reqs_to_abort == ["stopped", "spoilt"]


def test_figures_that_prometheus_does_not_take_end_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "canary"

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError(secret)

    monkeypatch.setattr(StatLoggerManager, "record", refuse)

    object.__new__(_Statistics).record(scheduler_stats=None, iteration_stats=None)

    assert "the statistics of a step are lost: ValueError" in caplog.text
    assert "canary" not in caplog.text
