"""What does a trace show of the API's part?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from copy import copy
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import FinishReason

from api.tracing import Traces, span_around, tracer_of, tracing
from pdtasks.errors import WorkerLost
from pdtasks.tracing import NO_SPAN, NO_TRACER, carried_by
from tests.spans import Kept, id_of, parent_of, seconds
from tests.unit.api.core_bench import READY, Bench, with_bench
from tests.unit.factories import a_request, an_output

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
LAST = FinishReason.LENGTH


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def client(kept: Kept) -> TestClient:
    app = FastAPI(middleware=[Middleware(Traces, tracer=kept.tracer)])

    @app.api_route("/v1/echo/{name}", methods=["GET", "POST"])
    async def echo(name: str) -> JSONResponse:
        return JSONResponse(span_around().headers, 503 if name == "away" else 200)

    @app.post("/odd")
    async def odd() -> None:
        raise KeyError("canary")

    return TestClient(app, raise_server_exceptions=False)


def test_a_request_goes_on_with_its_callers_trace(client: TestClient, kept: Kept) -> None:
    inside = client.post("/v1/echo/x?secret=canary", headers={"traceparent": TRACEPARENT}).json()

    (span,) = kept.spans
    assert span.name == "POST /v1/echo/{name}"
    assert parent_of(span) == 0xB7AD6B7169203331
    assert carried_by(inside).parent["traceparent"].split("-")[2] == f"{id_of(span):016x}"
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/echo/{name}",
    }
    assert span.status.is_ok


def test_a_request_of_no_trace_begins_one(client: TestClient, kept: Kept) -> None:
    client.post("/v1/echo/x", headers={"traceparent": "canary"})

    assert parent_of(kept.spans[0]) is None


def test_who_only_looks_is_not_traced(client: TestClient, kept: Kept) -> None:
    assert client.get("/v1/echo/x", headers={"traceparent": TRACEPARENT}).json() == {}
    assert kept.spans == []


def test_a_path_of_nobody_gives_no_span_a_name(client: TestClient, kept: Kept) -> None:
    client.post("/canary")

    (span,) = kept.spans
    assert span.name == "POST"
    assert "canary" not in str(span.to_json())


@pytest.mark.parametrize(("path", "status"), [("/v1/echo/away", 503), ("/odd", 500)])
def test_what_failed_is_an_error(path: str, status: int, client: TestClient, kept: Kept) -> None:
    client.post(path)

    (span,) = kept.spans
    assert not span.status.is_ok
    assert "canary" not in str(span.to_json())


def test_an_app_without_a_tracer_traces_nothing() -> None:
    assert tracer_of(FastAPI()) is NO_TRACER
    assert span_around() is NO_SPAN


def test_what_is_asked_is_part_of_what_runs_it(kept: Kept) -> None:
    async def test(bench: Bench) -> None:
        with tracing(kept.tracer, "job", time.time(), {"pdtasks.job.id": "job-1"}):
            await bench.ask("r")
        await bench.take((0, an_output([1])), stage="prefill")
        await bench.take((1, an_output([2])))
        await bench.take((2, an_output([3, 4], finish_reason=LAST)))

        sent.extend(bench.broker.traces)

    sent: list[Mapping[str, str]] = []
    with_bench(test)

    job, asked = kept.named("job"), kept.named("llm_request")
    (headers,) = sent
    assert headers["traceparent"].split("-")[2] == f"{id_of(asked):016x}"
    assert parent_of(asked) == id_of(job)
    for name in ("line", "publish"):
        assert parent_of(kept.named(name)) == id_of(asked)
    # one after the other, from the very beginning
    assert seconds(kept.named("line"))[0] == seconds(asked)[0]
    assert seconds(kept.named("line"))[1] == seconds(kept.named("publish"))[0]
    attributes = dict(asked.attributes or {})
    assert attributes["gen_ai.request.id"] == "external-r"
    assert attributes["gen_ai.request.n"] == 1
    assert attributes["gen_ai.usage.prompt_tokens"] == 10
    assert attributes["gen_ai.usage.completion_tokens"] == 4
    assert attributes["pdtasks.kind"] == "interactive"
    assert attributes["pdtasks.outcome"] == "done"
    assert attributes["pdtasks.route"] == "split"
    first, second = asked.events
    assert (first.name, second.name) == ("first token", "second token")
    begin, end = seconds(asked)
    assert begin <= first.timestamp / 1e9 <= second.timestamp / 1e9 <= end
    ttft = attributes["gen_ai.latency.time_to_first_token"]
    assert ttft == pytest.approx(first.timestamp / 1e9 - begin, abs=1e-4)
    assert attributes["gen_ai.latency.e2e"] == pytest.approx(end - begin, abs=1e-4)


def test_several_answers_to_one_prompt_are_one_span(kept: Kept) -> None:
    async def test(bench: Bench) -> None:
        first = a_request("0_r", n=2)
        other = copy(first)
        other.request_id = "1_r"
        other.sampling_params = SamplingParams(max_tokens=20)
        with tracing(kept.tracer, "around", time.time(), {}):
            await bench.core.add_request_async(first)
            await bench.core.add_request_async(other)
        await bench.published()
        await bench.take((0, an_output([1], "0_r", LAST)), stage="prefill")
        assert "llm_request" not in [span.name for span in kept.spans]
        await bench.take((0, an_output([1, 2], "1_r", LAST)), stage="prefill")

    with_bench(test)

    attributes = dict(kept.named("llm_request").attributes or {})
    assert attributes["gen_ai.request.n"] == 2
    assert attributes["gen_ai.usage.completion_tokens"] == 3
    kept.named("line")
    kept.named("publish")


def test_answers_to_a_short_prompt_are_in_its_trace_as_well(kept: Kept) -> None:
    async def test(bench: Bench) -> None:
        decode = msgspec.structs.replace(READY[1], short_prompt_tokens=10)
        bench.core.workers.known = [READY[0], decode]
        first = a_request("0_r", n=2)
        other = copy(first)
        other.request_id = "1_r"
        other.sampling_params = SamplingParams(max_tokens=20)
        with tracing(kept.tracer, "around", time.time(), {}):
            await bench.core.add_request_async(first)
            await bench.core.add_request_async(other)
        await bench.published()
        for name in ("0_r", "1_r"):
            await bench.take((0, an_output([1], name, LAST)))
        sent.extend(bench.broker.traces)

    sent: list[Mapping[str, str]] = []
    with_bench(test)

    asked = kept.named("llm_request")
    assert (asked.attributes or {})["pdtasks.route"] == "short_prompt"
    assert [headers["traceparent"].split("-")[2] for headers in sent] == [
        f"{id_of(asked):016x}"
    ] * 2


@pytest.mark.parametrize("how", ["aborted", "failed"])
def test_a_request_that_ends_early_has_ended_in_its_trace(how: str, kept: Kept) -> None:
    async def test(bench: Bench) -> None:
        with tracing(kept.tracer, "around", time.time(), {}):
            await bench.ask("r")
        if how == "aborted":
            await bench.core.abort_requests_async(["r"])
        else:
            await bench.core._drop("r", WorkerLost("canary"))

    with_bench(test)

    span = kept.named("llm_request")
    outcome = "stopped" if how == "aborted" else "WorkerLost"
    assert (span.attributes or {})["pdtasks.outcome"] == outcome
    assert span.status.is_ok is (how == "aborted")
    assert "canary" not in str(span.to_json())


def test_one_that_is_not_remembered_any_more_ends_as_well(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.reports._REMEMBERED", 1)

    async def test(bench: Bench) -> None:
        with tracing(kept.tracer, "around", time.time(), {}):
            await bench.ask("old", "new")
        await bench.core.abort_requests_async(["old", "new"])

    with_bench(test)

    assert [span.name for span in kept.spans].count("llm_request") == 2


def test_a_request_of_no_trace_costs_no_span_and_no_header() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await bench.take((0, an_output([1], finish_reason=LAST)), stage="prefill")
        assert bench.broker.traces == [{}]

    with_bench(test)


def test_what_is_cancelled_has_not_failed(kept: Kept) -> None:
    async def cancelled() -> None:
        with tracing(kept.tracer, "job", time.time(), {}):
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())

    assert kept.named("job").status.is_ok


def test_what_runs_in_a_span_may_fail(kept: Kept) -> None:
    async def failing() -> Any:
        with tracing(kept.tracer, "job", time.time(), {}):
            raise WorkerLost("canary")

    with pytest.raises(WorkerLost):
        asyncio.run(failing())

    (span,) = kept.spans
    assert (span.attributes or {})["error.type"] == "WorkerLost"
    assert "canary" not in str(span.to_json())
    assert span_around() is NO_SPAN
