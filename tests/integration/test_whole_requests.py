"""A request that one decode worker computes and answers, over real RabbitMQ and Valkey."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from vllm.v1.engine import FinishReason

from pdtasks.bench.chaos.nursery import Nursery
from tests.integration.asker import Asker
from tests.integration.conftest import Services, StartWorker
from tests.integration.leftovers import wait_until_nothing_is_left
from tests.integration.real_api import running_api
from tests.waiting import wait_until

#: No second attempt makes the same tokens.
RANDOM: dict[str, Any] = {"temperature": 1.0, "max_tokens": 6}


def test_a_decode_worker_answers_it_alone_and_leaves_nothing(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    start_worker("decode")

    asker.ask_whole("r")

    wait_until(asker.finished)
    assert [(stage, p, o.new_token_ids) for stage, p, o in asker.outputs()] == [
        ("decode", 0, [100]),
        ("decode", 1, [101]),
        ("decode", 2, [102]),
        ("decode", 3, [103]),
    ]
    assert asker.outputs()[-1][2].finish_reason == FinishReason.LENGTH
    (report,) = asker.messages()[-1].reports["r"]
    assert (report.worker, report.is_whole) == ("decode1@test", True)
    assert (report.prompt_tokens, report.output_tokens) == (3, 4)
    wait_until_nothing_is_left(services, asker.stream)


def test_several_answers_to_a_prompt_are_answered_each(
    start_worker: StartWorker, asker: Asker
) -> None:
    start_worker("decode")

    asker.ask_whole("r", siblings=("s", "t"))

    names = ("r", "s", "t")
    wait_until(lambda: all(asker.finished(name) for name in names))
    assert [asker.tokens(name) for name in names] == [[100, 101, 102, 103]] * 3


@pytest.mark.parametrize("tokens", [0, 3], ids=["before its first token", "in its answer"])
def test_one_that_is_lost_goes_on_after_the_last_token(
    start_worker: StartWorker, asker: Asker, tokens: int
) -> None:
    victim = start_worker("decode", held=True)
    asker.ask_whole("r", **RANDOM)
    wait_until(victim.steering.added)
    for _ in range(tokens):
        victim.steering.step()
    wait_until(lambda: len(asker.tokens()) == tokens)
    begun = asker.tokens()
    victim.signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL

    start_worker("decode", 2)
    wait_until(asker.questions)
    asker.tell(begun)

    wait_until(asker.finished)
    assert asker.tokens()[:tokens] == begun
    assert len(asker.tokens()) == 6
    assert asker.failures() == {}


def test_a_worker_that_stops_hands_it_on_with_its_tokens(
    start_worker: StartWorker, asker: Asker
) -> None:
    leaving = start_worker("decode", held=True)
    asker.ask_whole("r", **RANDOM)
    wait_until(leaving.steering.added)
    leaving.steering.step(2)
    wait_until(lambda: len(asker.tokens()) == 2)
    begun = asker.tokens()
    start_worker("decode", 2)

    leaving.signal(signal.SIGTERM)

    assert leaving.wait() == 0
    wait_until(asker.questions)
    asker.tell(begun)
    wait_until(asker.finished)
    assert asker.tokens()[:2] == begun
    assert [p for _, p, _ in asker.outputs()] == [0, 1, 2, 3, 4, 5]


def test_a_caller_that_hangs_up_frees_its_worker(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    worker = start_worker("decode", held=True)
    asker.ask_whole("r")
    wait_until(worker.steering.added)

    services.bus.delete(asker.stream)
    worker.steering.step()

    wait_until_nothing_is_left(services)


def test_without_prefill_workers_decode_workers_answer_until_there_is_one(
    start_worker: StartWorker, services: Services, bench_nursery: Nursery, tmp_path: Path
) -> None:
    start_worker("decode", short_prompt_tokens="1")
    with running_api(services, bench_nursery, tmp_path, 30) as api:
        wait_until(lambda: api.get("/ready").status_code == 200)
        model = api.get("/v1/models").json()["data"][0]["id"]
        body = {"model": model, "prompt": "a b c", "max_tokens": 4, "temperature": 0}

        assert asked(api, body, "a") == ({"decode"}, "no_prefill_worker")
        job = api.post("/v1/jobs", json=body).raise_for_status().json()["id"]
        wait_until(lambda: api.get(f"/v1/jobs/{job}").json()["state"] == "succeeded")
        (stage,) = api.get(f"/v1/jobs/{job}").json()["stages"]
        assert (stage["stage"], stage["route"]) == ("decode", "no_prefill_worker")
        assert api.get("/ready", params={"split": True}).status_code == 503

        start_worker("prefill")
        wait_until(lambda: api.get("/ready", params={"split": True}).status_code == 200)
        assert asked(api, body, "b") == ({"prefill", "decode"}, "split")


def asked(api: httpx.Client, body: dict[str, Any], name: str) -> tuple[set[str], str]:
    """Which stages have answered, and the way."""
    response = api.post("/v1/completions", json=body, headers={"X-Request-Id": name})
    assert response.json()["usage"]["completion_tokens"] == 4
    found = api.get(f"/pdtasks/requests/cmpl-{name}").json()
    return set(found["sequences"][0]), found["times"][0]["route"]
