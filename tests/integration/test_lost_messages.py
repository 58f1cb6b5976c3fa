"""A queue is emptied, or one message taken out, while callers wait: what do they see, and when?

Nobody can tell them before: RabbitMQ says nothing of it, and a message that waits looks no
different from here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bus.presence import read_workers
from pdtasks.errors import RequestTimeout
from pdtasks.naming import DECODE, PREFILL
from pdtasks.pipeline import submit
from pdtasks.settings import load_settings
from tests.integration.conftest import Services, StartWorker
from tests.integration.real_api import running_api
from tests.waiting import wait_until

#: Of every request. (One whose time is over lies in its queue all the same.)
DEADLINE_S = 6.0
#: The API looks once a second.
LATE_S = 5.0


@pytest.fixture
def api(
    start_worker: StartWorker, services: Services, bench_nursery: Nursery, tmp_path: Path
) -> Iterator[httpx.Client]:
    with running_api(services, bench_nursery, tmp_path, DEADLINE_S) as client:
        yield client


Ended = tuple[float, dict[str, Any]]  # after so many seconds, with this error


class Callers:
    """One of each kind. What each sees is its error, in OpenAI's format."""

    def __init__(self, api: httpx.Client, threads: ThreadPoolExecutor) -> None:
        self._api = api
        self._body = {"model": load_settings().model_name, "prompt": "hello", "max_tokens": 20}
        self._body["temperature"] = 0  # the stub's other tokens are none of the model's
        kinds: list[Callable[[], dict[str, Any]]]
        kinds = [self._stream, self._whole, self._job, self._result]
        self.all: dict[str, Future[Ended]] = {
            kind.__name__: threads.submit(self._timed, kind) for kind in kinds
        }

    @staticmethod
    def _timed(kind: Callable[[], dict[str, Any]]) -> Ended:
        began = time.monotonic()
        error = kind()
        return time.monotonic() - began, error

    def _stream(self) -> dict[str, Any]:
        with self._api.stream("POST", "/v1/completions", json=self._body | {"stream": True}) as got:
            lines = (line for line in got.iter_lines() if line.startswith("data: {"))
            seen = [json.loads(line.removeprefix("data: ")) for line in lines]
        (error,) = [chunk["error"] for chunk in seen if "error" in chunk]
        assert "error" in seen[-1], "something came behind the error"
        choices = [choice for chunk in seen[:-1] for choice in chunk["choices"]]
        assert not any(choice["finish_reason"] for choice in choices)
        return dict(error)

    def _whole(self) -> dict[str, Any]:
        got = self._api.post("/v1/completions", json=self._body)
        error = dict(got.json()["error"])
        assert got.status_code == error["code"]
        return error

    def _job(self) -> dict[str, Any]:
        job = self._api.post("/v1/jobs", json=self._body).json()

        def ended() -> Any:
            found = self._api.get(f"/v1/jobs/{job['id']}").json()
            return found if found["state"] in ("succeeded", "failed", "cancelled") else None

        found = wait_until(ended, DEADLINE_S + 20)
        assert found["state"] == "failed"
        return dict(found["error"])

    @staticmethod
    def _result() -> dict[str, Any]:
        result = submit("hello", max_tokens=20, timeout_s=DEADLINE_S)
        with pytest.raises(RequestTimeout) as raised:
            result.get(timeout=DEADLINE_S + 20)
        assert result.failed()
        return {"code": raised.value.http_status, "message": str(raised.value)}


def stored(services: Services) -> list[bytes]:
    return cast("list[bytes]", services.kv.keys())


def waiting_in(channel: Any, queue: str) -> int:
    return int(channel.queue_declare(queue, passive=True).message_count)


def test_whoever_waits_for_a_message_that_was_removed_gets_one_clear_error_at_his_deadline(
    start_worker: StartWorker,
    api: httpx.Client,
    make_asker: Callable[[], Any],
    channel: Any,
    services: Services,
) -> None:
    # Given workers that have as much to do as they take
    prefill = start_worker(PREFILL, concurrency=1)
    decode = start_worker(DECODE, concurrency=1, held=True)
    asker = make_asker()
    asker.ask("in decode", max_tokens=4)
    wait_until(decode.steering.added)
    wait_until(lambda: api.get("/ready").status_code == 200)

    with ThreadPoolExecutor(8) as threads:
        # and callers who wait for the second stage,
        late = Callers(api, threads)
        wait_until(lambda: waiting_in(channel, DECODE) == 4)
        # whose partial blocks lie in the store
        wait_until(lambda: len(stored(services)) >= 4)
        # and others who wait for the first
        prefill.steering.hold()
        asker.ask("in prefill", max_tokens=4)
        wait_until(lambda: "in prefill" in prefill.steering.added())
        early = Callers(api, threads)
        # (and one of them in the API, for the worker has places for no more)
        wait_until(lambda: waiting_in(channel, PREFILL) == 3)

        # When an operator takes one message and empties the queues
        for queue, waiting in ((DECODE, 4), (PREFILL, 3)):
            taken = channel.basic_get(queue)
            channel.basic_ack(taken.delivery_tag)
            assert channel.queue_purge(queue) == waiting - 1

        # Then each ends at its deadline, and says why
        for callers in (late, early):
            for kind, caller in callers.all.items():
                seconds, error = caller.result(DEADLINE_S + 30)
                assert error["code"] == 504, (kind, error)
                assert "took" in error["message"], (kind, error)
                assert seconds < DEADLINE_S + LATE_S, kind

    # and nothing of them is left: the API waits for none, workers hold none
    prefill.steering.release()
    decode.steering.release()
    wait_until(lambda: asker.finished("in decode") and asker.finished("in prefill"))
    wait_until(lambda: all(w.held == w.active == 0 for w in read_workers(services.bus)))
    counts = dict(
        line.rsplit(" ", 1) for line in api.get("/metrics").text.splitlines() if line[:1] != "#"
    )
    assert float(counts["pdtasks_api_leaks_total"]) == 0
    open_requests = [
        float(n) for name, n in counts.items() if name.startswith("vllm:num_requests_")
    ]
    assert open_requests
    assert not any(open_requests)
    # what they have in the store expires
    assert all(cast("int", services.kv.ttl(key)) > 0 for key in stored(services))
    # and who asks now is answered
    got = api.post("/v1/completions", json=late._body | {"max_tokens": 4, "temperature": 0})
    assert got.status_code == 200
