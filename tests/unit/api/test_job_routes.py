"""Which requests are taken as jobs? The routes with a store that must not be asked."""

from __future__ import annotations

from typing import Any, cast

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from api.jobs import Jobs, router
from api.runner import JobRunner
from pdtasks.bus.jobs import JobStore

CHAT = {"model": "m", "messages": [{"role": "user", "content": "canary"}]}
PLAIN = {"model": "m", "prompt": "canary"}


@pytest.mark.parametrize("body", [CHAT, PLAIN])
@pytest.mark.parametrize("stream", [{}, {"stream": True}, {"stream": False}])
def test_what_vllm_cannot_stream_is_refused_at_submission(
    body: dict[str, Any], stream: dict[str, Any]
) -> None:
    app = FastAPI()
    app.include_router(router)
    nothing = cast("JobStore", None), cast("JobRunner", None)
    app.state.pdtasks_jobs = Jobs(*nothing, timeout_s=60)

    # vLLM takes it without `stream`, and jobs are streamed whatever it says
    response = TestClient(app).post("/v1/jobs", json=body | stream | {"prompt_logprobs": 1})

    assert response.status_code == 400
    assert "a job is streamed" in response.text
    assert "prompt_logprobs" in response.text
    assert "canary" not in response.text
