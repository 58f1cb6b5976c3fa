"""Jobs that were given up can be seen, done again and forgotten by operators."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import kombu
import pytest
from celery.result import AsyncResult
from click.testing import CliRunner

from pdtasks.broker.dead_letters import dead_letters
from pdtasks.cli import main
from pdtasks.errors import BrokerUnavailable, WorkerLost
from pdtasks.messages import PrefillJob
from pdtasks.naming import KEPT_QUEUE
from pdtasks.pipeline import submit
from pdtasks.settings import Settings
from tests.integration.asker import Asker
from tests.integration.conftest import DELIVERY_LIMIT, Services, StartWorker
from tests.waiting import wait_until

#: As token ids they are easily found in what is printed.
PROMPT = [101, 102, 103, 98765]


@pytest.fixture
def pdtasks(our_app: Any) -> Iterator[Callable[..., str]]:
    """Runs a command; what it printed."""

    def run(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(main, ["deadletter", *arguments])
        assert done.exit_code == code, done.output
        return done.output

    yield run
    run("drop", "--all")


def _has_two(added: Callable[[], list[str]]) -> bool:
    return len(added()) == 2


@pytest.fixture
def given_up(start_worker: StartWorker, asker: Asker) -> AsyncResult:
    """A result, and "r" of the asker, whose workers were all lost."""
    start_worker("decode")
    asker.ask("r", prompt=tuple(PROMPT))
    result = submit(PROMPT, max_tokens=4, temperature=0)
    for number in range(1, DELIVERY_LIMIT + 2):
        victim = start_worker("prefill", number, held=True)
        added = victim.steering.added
        wait_until(partial(_has_two, added))
        victim.signal(signal.SIGKILL)
        victim.wait()
    wait_until(asker.failures)
    with pytest.raises(WorkerLost):
        result.get(timeout=20)
    return result


def letters(pdtasks: Callable[..., str]) -> dict[str, dict[str, Any]]:
    return {letter["id"]: letter for letter in json.loads(pdtasks("list", "--json"))}


def both(pdtasks: Callable[..., str]) -> dict[str, dict[str, Any]]:
    """Both letters, once they are there."""
    return dict(wait_until(lambda: len(found := letters(pdtasks)) == 2 and found))


def test_what_was_given_up_is_shown_without_its_prompt_and_can_be_dropped(
    given_up: AsyncResult, pdtasks: Callable[..., str]
) -> None:
    found = both(pdtasks)
    assert set(found) == {"r.prefill", f"{given_up.id}.prefill"}
    assert {letter["queue"] for letter in found.values()} == {"prefill"}
    assert {letter["caller"] for letter in found.values()} == {"read along", "can fetch a result"}
    assert f"{DELIVERY_LIMIT + 1} deliveries" in found["r.prefill"]["reason"]

    # A prompt is shown to who asks for it
    listed, shown = pdtasks("list"), pdtasks("show", "r")
    assert "prompt tokens        4" in shown
    assert "max_tokens           4" in shown
    assert "98765" not in listed + shown + pdtasks("show", given_up.id)
    assert "98765" in pdtasks("show", "r", "--prompt")
    assert "98765" in pdtasks("show", given_up.id, "--prompt")
    # and a look takes nothing away
    assert letters(pdtasks) == found

    assert "dropped 1" in pdtasks("drop", "r", "r.prefill")
    assert list(letters(pdtasks)) == [f"{given_up.id}.prefill"]
    assert "no dead letter 'r'" in pdtasks("show", "r", code=1)
    assert "name dead letters, or say --all" in pdtasks("drop", code=1)
    assert "dropped 1" in pdtasks("drop", "--all")
    assert "no dead letters" in pdtasks("list")
    given_up.forget()


def test_a_job_that_is_replayed_is_answered_after_all(
    given_up: AsyncResult,
    pdtasks: Callable[..., str],
    start_worker: StartWorker,
    asker: Asker,
    our_app: Any,
) -> None:
    both(pdtasks)
    assert "is in queue prefill again" in pdtasks("replay", given_up.id)
    assert list(letters(pdtasks)) == ["r.prefill"]

    # One whose caller is gone is run only on demand
    assert "--anyway" in pdtasks("replay", "r", code=1)
    assert list(letters(pdtasks)) == ["r.prefill"]
    pdtasks("replay", "r", "--anyway", "--timeout-s", "30")
    assert letters(pdtasks) == {}

    given_up.forget()
    start_worker("prefill", 9)
    answer = AsyncResult(given_up.id, app=our_app).get(timeout=20)
    assert answer["token_ids"] == [100, 101, 102, 103]
    wait_until(asker.finished)  # whose stream is still there
    given_up.forget()


def test_what_is_no_job_of_ours_is_kept_and_said_to_be_none(
    start_worker: StartWorker, pdtasks: Callable[..., str], channel: Any
) -> None:
    start_worker("decode")
    kombu.Producer(channel).publish(
        [[], {}, {}],
        routing_key="pdtasks.dead",
        serializer="json",
        headers={"id": 7, "task": ["no", "name"], "x-death": "canary"},
    )
    # and something in the queue of letters itself
    kombu.Producer(channel).publish(
        [[PrefillJob(request_id="x", engine="", model=None, submitted_at=0, deadline=0).to_wire()]],
        routing_key=KEPT_QUEUE,
        serializer="msgpack",
        headers={"id": "8", "task": "pdtasks.prefill", "pdtasks-dead": {"at": "canary"}},
    )

    assert wait_until(lambda: set(letters(pdtasks)) == {"7", "8"})
    assert "no job that this release can read" in pdtasks("show", "8", "--prompt")
    pdtasks("drop", "8")
    found = wait_until(lambda: letters(pdtasks))
    assert list(found) == ["7"]
    assert "no job that this release can read" in pdtasks("show", "7")
    assert "no job that this release can read" in pdtasks("replay", "7", code=1)
    assert list(letters(pdtasks)) == ["7"]


def test_a_broker_that_is_away_is_said_in_one_sentence() -> None:
    away = Settings(broker_url="amqp://127.0.0.1:1//")

    with pytest.raises(BrokerUnavailable, match="RabbitMQ cannot be reached"), dead_letters(away):
        pass


def test_the_queue_of_letters_is_bounded(start_worker: StartWorker, services: Services) -> None:
    start_worker("decode")

    with httpx.Client(base_url=services.rabbit.api_url, timeout=10) as api:
        arguments = api.get(f"queues/pdtasks/{KEPT_QUEUE}").json()["arguments"]
    assert arguments["x-max-length"] == 1000
    assert arguments["x-max-length-bytes"] > 0
    assert arguments["x-message-ttl"] > 0
