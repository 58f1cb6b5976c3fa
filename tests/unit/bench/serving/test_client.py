"""Does the client ask what the workload says, and see when tokens come?"""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from pdtasks.bench.serving.client import Request, Sample, ask_all, make_requests
from pdtasks.bench.serving.plan import Short, Workload
from tests.unit.bench.serving.stub_server import StubServer, running

WORKLOAD = Workload(
    prompt=30, answer=4, rates=[2], requests=6, shared_prefix=5, short=Short(every=3, prompt=10)
)


def ask(
    server: StubServer, *, rate: float = 0, requests: int = 3, reports: bool = False
) -> list[Sample]:
    wanted = [Request([300 + n], 4, n) for n in range(requests)]
    with running(server.app()) as url:
        return asyncio.run(ask_all(url, "m", wanted, rate, random.Random(1), reports=reports))


def test_prompts_share_what_the_workload_says_and_nothing_else() -> None:
    requests = list(make_requests(WORKLOAD, 2, random.Random()))

    assert [len(r.prompt) for r in requests] == [15, 35, 35, 15, 35, 35]
    assert len({tuple(r.prompt[:5]) for r in requests}) == 1
    assert len({tuple(r.prompt[5:15]) for r in requests}) == 6
    again = next(make_requests(WORKLOAD, 2, random.Random()))
    assert again.prompt[:5] != requests[0].prompt[:5]


def test_each_token_has_its_time() -> None:
    server = StubServer(first_s=0.1, token_s=0.05)

    samples = ask(server)

    for sample in samples:
        assert sample.failure is None
        assert len(sample.at) == 4
        assert sample.ttft >= 0.1
        assert min(sample.gaps) >= 0.03
        assert sample.e2e == pytest.approx(sample.ttft + sum(sample.gaps))
    assert server.asked[0]["ignore_eos"]
    assert server.asked[0]["max_tokens"] == 4


def test_tokens_that_come_together_came_at_one_time() -> None:
    (sample,) = ask(StubServer(together=3), requests=1)

    assert len(sample.at) == 4
    assert sample.gaps[:2] == [0, 0]


def test_requests_come_when_their_time_has_come_however_slow_the_answers_are() -> None:
    began = time.perf_counter()

    samples = ask(StubServer(first_s=0.5), rate=50, requests=10)

    starts = [s.began - began for s in samples]
    assert starts == sorted(starts)
    assert len(set(starts)) == 10
    assert starts[-1] - starts[0] < 0.5


@pytest.mark.parametrize(
    ("server", "why"),
    [
        (StubServer(status=503), "HTTP 503"),
        (StubServer(short_by=1), "not the whole answer"),
    ],
)
def test_an_answer_that_is_not_whole_is_a_failure(server: StubServer, why: str) -> None:
    assert all(why in (s.failure or "") for s in ask(server))


def test_a_server_that_is_not_there_is_a_failure() -> None:
    requests = [Request([300], 4, 0)]

    found = asyncio.run(
        ask_all("http://127.0.0.1:1", "m", requests, 0, random.Random(), reports=False)
    )

    assert "Cannot connect" in (found[0].failure or "")


def test_stages_are_asked_for_what_they_did() -> None:
    (sample,) = ask(StubServer(), requests=1, reports=True)

    assert sample.stages["decode"]["kv_blocks_loaded"] == 11
