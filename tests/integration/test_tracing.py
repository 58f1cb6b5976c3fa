"""One trace shows where a request's time went: through HTTP, RabbitMQ and both stages.

API processes and workers are the product's, engines are stubs, the collector speaks OTLP.
"""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import pytest
from opentelemetry import trace

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.chaos.stack import STUB_MODEL, ChaosStack
from pdtasks.cluster.console import Console
from pdtasks.cluster.probes import free_ports
from pdtasks.keys import Key, add, digest_of
from pdtasks.pipeline import submit
from tests.collector import Collector, Received
from tests.integration.asker import Asker
from tests.integration.conftest import StartWorker
from tests.waiting import wait_until

KEY = "pdt-canary-secret"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{CALLER}-01"}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


@pytest.fixture(scope="module")
def url(
    tmp_path_factory: pytest.TempPathFactory, bench_nursery: Nursery, collector: Collector
) -> Iterator[str]:
    home = tmp_path_factory.mktemp("tracing")
    add(home / "keys", Key("alice", digest_of(KEY)))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in collector.env.items():
            patch.setenv(name, value)
        with ChaosStack(
            home,
            "stub",
            Console(io.StringIO()),
            deadline_s=60,
            nursery=bench_nursery,
            api_keys_file=home / "keys",
        ) as stack:
            yield next(iter(stack.urls.values()))


def post(url: str, path: str, headers: dict[str, str] | None = None, **body: Any) -> Any:
    body = {
        "model": STUB_MODEL,
        "prompt": "What is the capital of France? " * 5,
        "max_tokens": 5,
    } | body
    headers = {"Authorization": f"Bearer {KEY}"} | (headers or {})
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as caller:
        return caller.post(path, json=body, headers=headers).raise_for_status().json()


class Tree:
    """The spans of one trace."""

    def __init__(self, spans: list[Received]) -> None:
        self.spans = spans

    def one(self, name: str, parent: Received | None = None) -> Received:
        (found,) = [
            span
            for span in self.spans
            if span.name == name and (parent is None or span.parent == parent.id)
        ]
        return found

    def children(self, parent: Received) -> list[str]:
        """In the order of their beginnings."""
        return [span.name for span in self.spans if span.parent == parent.id]


def whole_trace(collector: Collector, trace_id: str, *roots: str) -> Tree:
    """Of a request with both stages, when all of it has come."""
    names = {*roots, "llm_request", "publish", "save", "load", "prefill", "decode"}
    wait_until(lambda: names <= {span.name for span in collector.spans(trace_id)})
    return Tree(collector.spans(trace_id))


def test_one_trace_goes_from_http_to_the_last_token(url: str, collector: Collector) -> None:
    answer = post(url, "/v1/completions", SAMPLED)

    tree = whole_trace(collector, TRACE, "POST /v1/completions")
    http = tree.one("POST /v1/completions")
    assert (http.parent, http.service) == (CALLER, "pdtasks-api")
    asked = tree.one("llm_request", http)
    prefill, decode = tree.one("prefill", asked), tree.one("decode", asked)
    assert sorted(tree.children(asked)) == ["decode", "line", "prefill", "publish"]
    assert tree.children(asked)[0] == "line"
    assert sorted(tree.children(prefill)) == ["compute", "publish", "queue", "save"]
    assert sorted(tree.children(decode)) == ["generate", "load", "queue"]
    # by whom
    assert prefill.service == "pdtasks-prefill"
    assert prefill.instance == prefill.attributes["pdtasks.worker"]
    assert prefill.attributes["pdtasks.worker"].startswith("prefill")
    assert decode.attributes["pdtasks.worker"].startswith("decode")
    # how much KV
    written = prefill.attributes["pdtasks.kv.bytes_written"]
    assert written > 0
    assert tree.one("save").attributes["pdtasks.kv.bytes"] == written
    assert decode.attributes["pdtasks.kv.bytes_loaded"] == written
    assert tree.one("load").attributes["pdtasks.kv.bytes"] == written
    # of what
    assert asked.attributes["gen_ai.request.id"] == f"{answer['id']}-0"
    assert asked.attributes["gen_ai.usage.completion_tokens"] == 5
    assert (
        prefill.attributes["gen_ai.usage.completion_tokens"]
        + decode.attributes["gen_ai.usage.completion_tokens"]
        == 5
    )
    assert not any(span.is_error for span in tree.spans)


def test_its_durations_add_up(url: str, collector: Collector) -> None:
    trace_id = TRACE[::-1]
    post(url, "/v1/completions", {"traceparent": f"00-{trace_id}-{CALLER}-01"}, max_tokens=20)

    tree = whole_trace(collector, trace_id)
    asked = tree.one("llm_request")
    prefill, decode = tree.one("prefill"), tree.one("decode")
    for whole in (asked, prefill, decode):
        for part in tree.spans:
            if part.parent == whole.id and part is not decode and part is not prefill:
                assert whole.begin - 1e-3 <= part.begin <= part.end
    # The way to the first token: line, queue and computing, one after the other.
    line, queue = tree.one("line"), tree.one("queue", prefill)
    compute = tree.one("compute")
    assert line.begin == asked.begin
    assert queue.begin == prefill.begin <= compute.begin
    to_first = line.seconds + queue.seconds + compute.seconds
    assert to_first <= asked.events["first token"] - asked.begin + 0.05
    # Decode is its queue, its load and its tokens; what is beside is answering.
    queue, load, generate = (tree.one(n, decode) for n in ("queue", "load", "generate"))
    assert queue.begin == decode.begin
    assert queue.end <= generate.begin
    assert load.end <= generate.begin + 1e-3
    assert queue.seconds + load.seconds + generate.seconds <= decode.seconds + 1e-3
    # The answer's reader has its last token before decode has cleaned up, and not before it began.
    assert decode.begin < asked.events["second token"] <= asked.end


def test_several_answers_share_their_message(url: str, collector: Collector) -> None:
    trace_id = "1" * 32
    parent = {"traceparent": f"00-{trace_id}-{CALLER}-01"}
    post(url, "/v1/completions", parent, n=3, temperature=1.0)

    wait_until(lambda: len(collector.spans(trace_id, "decode")) == 3)
    wait_until(lambda: collector.spans(trace_id, "llm_request"))
    asked = collector.spans(trace_id, "llm_request")
    assert sum(span.attributes["gen_ai.request.n"] for span in asked) == 3
    stages = [s for name in ("prefill", "decode") for s in collector.spans(trace_id, name)]
    assert len(stages) == 6
    assert {span.parent for span in stages} == {span.id for span in asked}
    assert len({span.attributes["pdtasks.request_id"] for span in stages}) == 3


def test_what_is_not_sampled_is_told_by_nobody(url: str, collector: Collector) -> None:
    unsampled, after = "2" * 32, "3" * 32
    post(url, "/v1/completions", {"traceparent": f"00-{unsampled}-{CALLER}-00"})
    post(url, "/v1/completions", {"traceparent": f"00-{after}-{CALLER}-01"})

    whole_trace(collector, after)
    assert collector.spans(unsampled) == []


def test_a_job_is_part_of_its_submissions_trace(url: str, collector: Collector) -> None:
    trace_id = "4" * 32
    post(url, "/v1/jobs", {"traceparent": f"00-{trace_id}-{CALLER}-01"})

    tree = whole_trace(collector, trace_id, "POST /v1/jobs", "job")
    submission, job = tree.one("POST /v1/jobs"), tree.one("job")
    assert job.parent == submission.id
    assert job.attributes["pdtasks.job.id"].startswith("job-")
    assert tree.one("llm_request").parent == job.id
    assert tree.one("llm_request").attributes["pdtasks.kind"] == "job"
    assert tree.one("wait").parent == job.id


def test_each_line_of_a_batch_is_a_trace_of_its_own(url: str, collector: Collector) -> None:
    body = {"model": STUB_MODEL, "prompt": "hello " * 20, "max_tokens": 3}
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}
        for name in ("a", "b")
    ]
    file = "\n".join(json.dumps(line) for line in lines)
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=url, timeout=30, trust_env=False, headers=headers) as caller:
        uploaded = caller.post(
            "/v1/files", data={"purpose": "batch"}, files={"file": ("lines.jsonl", file)}
        ).raise_for_status()
        batch = {
            "input_file_id": uploaded.json()["id"],
            "endpoint": "/v1/completions",
            "completion_window": "24h",
        }
        made = caller.post("/v1/batches", json=batch).raise_for_status().json()

    def whole() -> list[Received]:
        return collector.spans(name="batch line")

    first, second = wait_until(lambda: len(whole()) == 2 and whole())
    assert first.trace != second.trace
    for line in (first, second):
        assert line.parent == ""
        assert line.attributes["pdtasks.batch.id"] == made["id"]
        tree = whole_trace(collector, line.trace)
        assert tree.one("llm_request").parent == line.id
        assert tree.one("llm_request").attributes["pdtasks.kind"] == "batch"


def test_a_refused_request_is_an_error_of_its_caller(url: str, collector: Collector) -> None:
    trace_id = "5" * 32
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        post(url, "/v1/completions", {"traceparent": f"00-{trace_id}-{CALLER}-01"}, max_tokens=-1)

    (span,) = wait_until(lambda: collector.spans(trace_id))
    assert span.attributes["http.response.status_code"] == 400
    assert not span.is_error


def test_nothing_of_prompts_and_keys_is_in_any_span(url: str, collector: Collector) -> None:
    trace_id = "6" * 32
    parent = {"traceparent": f"00-{trace_id}-{CALLER}-01"}
    post(url, "/v1/completions", parent, prompt="canary-prompt " * 20, user="canary-user")

    tree = whole_trace(collector, trace_id)
    told = repr(tree.spans) + collector.text.decode(errors="replace")
    for secret in ("canary", digest_of(KEY).hex(), "alice"):
        assert secret not in told


# -- workers alone -------------------------------------------------------------------------------


def otel(collector: Collector) -> dict[str, str]:
    return {name.lower(): value for name, value in collector.env.items()}


def test_a_python_callers_trace_goes_on_in_the_workers(
    start_worker: StartWorker, collector: Collector
) -> None:
    start_worker("prefill", **otel(collector))
    start_worker("decode", **otel(collector))
    context = trace.SpanContext(
        int("7" * 32, 16), int(CALLER, 16), is_remote=False, trace_flags=trace.TraceFlags(1)
    )

    with trace.use_span(trace.NonRecordingSpan(context)):
        submit("hello", temperature=0, max_tokens=4).get(timeout=20)

    for name in ("prefill", "decode"):
        (span,) = wait_until(partial(collector.spans, "7" * 32, name))
        assert span.parent == CALLER


def test_without_one_both_stages_are_in_one_trace_all_the_same(
    start_worker: StartWorker, asker: Asker, collector: Collector
) -> None:
    before = len(collector.spans(name="decode"))
    start_worker("prefill", **otel(collector))
    start_worker("decode", **otel(collector))

    asker.ask("r")

    wait_until(lambda: len(collector.spans(name="decode")) > before)
    decode = collector.spans(name="decode")[-1]
    (prefill,) = wait_until(lambda: collector.spans(decode.trace, "prefill"))
    assert prefill.parent == ""
    assert decode.parent == prefill.id


def test_a_worker_that_hands_on_and_its_heir_are_in_one_trace(
    start_worker: StartWorker, asker: Asker, collector: Collector
) -> None:
    start_worker("prefill", **otel(collector))
    leaving = start_worker("decode", held=True, **otel(collector))
    asker.ask("r")
    wait_until(leaving.steering.added)
    leaving.steering.step(1)
    wait_until(lambda: len(asker.tokens()) == 2)
    start_worker("decode", 2, **otel(collector))

    leaving.signal(signal.SIGTERM)

    # The worker that stops sends what it has on its way out.
    assert leaving.wait() == 0
    wait_until(asker.questions)
    asker.tell(asker.tokens())
    wait_until(asker.finished)
    wait_until(lambda: collector.spans(name="decode")[-1].instance == "decode2@test")
    heir = collector.spans(name="decode")[-1]
    first, second = collector.spans(heir.trace, "decode")
    assert first.attributes["pdtasks.outcome"] == "handed_on"
    assert (second.attributes["pdtasks.outcome"], second.attributes["pdtasks.again"]) == (
        "done",
        True,
    )
    assert first.parent == second.parent


def test_a_worker_that_is_lost_and_its_heir_are_in_one_trace(
    start_worker: StartWorker, asker: Asker, collector: Collector
) -> None:
    start_worker("prefill", **otel(collector))
    lost = start_worker("decode", held=True, **otel(collector))
    asker.ask("r")
    wait_until(lost.steering.added)

    lost.signal(signal.SIGKILL)
    lost.wait()
    start_worker("decode", 2, **otel(collector))

    wait_until(asker.questions)
    asker.tell(asker.tokens())
    wait_until(asker.finished)
    wait_until(lambda: collector.spans(name="decode")[-1].instance == "decode2@test")
    heir = collector.spans(name="decode")[-1]
    assert heir.attributes["pdtasks.again"] is True
    (prefill,) = wait_until(partial(collector.spans, heir.trace, "prefill"))
    assert heir.parent == prefill.id
    # The time that the lost run took is in its queue.
    (queue,) = [s for s in collector.spans(heir.trace, "queue") if s.parent == heir.id]
    assert prefill.begin < queue.begin < queue.end


def test_a_collector_that_is_not_there_costs_no_answer_and_one_line(
    start_worker: StartWorker, asker: Asker
) -> None:
    (nobody,) = free_ports(1)
    env = {
        "otel_exporter_otlp_endpoint": f"http://127.0.0.1:{nobody}",
        "otel_exporter_otlp_timeout": "1",
        "otel_bsp_schedule_delay": "50",
    }
    worker = start_worker("prefill", **env)
    said = "the collector of traces takes nothing"

    asker.ask("a", max_tokens=1)
    wait_until(lambda: asker.finished("a"))
    wait_until(lambda: said in worker.log)
    for name in ("b", "c"):
        asker.ask(name, max_tokens=1)
        wait_until(partial(asker.finished, name))
    worker.signal(signal.SIGTERM)

    assert worker.wait() == 0
    assert worker.log.count(said) == 1
    assert "Traceback" not in worker.log


def test_a_way_of_sending_that_there_is_not_ends_the_start(
    start_worker: StartWorker,
) -> None:
    worker = start_worker("prefill", wait=False, otel_traces_exporter="zipkin")

    assert worker.wait() == 2
    assert "OTEL_TRACES_EXPORTER is otlp or none" in worker.log
