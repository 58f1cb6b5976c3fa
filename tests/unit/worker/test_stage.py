"""What holds for both stages, whatever they do?"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pdtasks.engine.generation import Generation
from pdtasks.messages import DecodeJob, StageReport
from pdtasks.worker.service import Worker
from pdtasks.worker.stage import Stage
from tests.spans import Kept
from tests.unit.factories import a_request

SECRET = "canary"


class Odd(Stage[DecodeJob]):
    """A stage that answers, and cannot tell what it has done."""

    name = "decode"

    async def work(self) -> str:
        self.generation = Generation(request=a_request(), request_id="r", reply_to=None, position=0)
        return "answer"

    def outcome(self, result: Any) -> str:
        return "handed_on"

    def reports(self) -> tuple[StageReport, ...]:
        raise KeyError(SECRET)


def test_no_answer_depends_on_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    here = SimpleNamespace(tracer=Kept().tracer, name="decode1@h", new_attempt=lambda: 1)
    job = SimpleNamespace(request_id="r")

    stage = Odd(cast("Worker", here), cast("DecodeJob", job), None)

    assert asyncio.run(stage.run()) == "answer"
    assert "a span of r is lost: KeyError" in caplog.text
    assert SECRET not in caplog.text
