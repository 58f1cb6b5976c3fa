"""Who answers for a job that no worker survives, and for what is no job at all?"""

from __future__ import annotations

import pickle
import signal
from typing import Any

import kombu
import pytest

from pdtasks.errors import WorkerLost
from pdtasks.pipeline import submit
from tests.integration.asker import Asker
from tests.integration.conftest import DELIVERY_LIMIT, Services, StartWorker
from tests.integration.steering import POISON
from tests.waiting import wait_until


def test_a_job_that_kills_every_worker_is_answered_for(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    # Given somebody who survives, for he does another stage
    survivor = start_worker("decode")

    # When two requests kill all workers that take them, as often as is allowed
    asker.ask("r", prompt=(1, POISON))
    result = submit([1, POISON], max_tokens=4)
    for number in range(1, DELIVERY_LIMIT + 2):
        victim = start_worker("prefill", number, wait=False)
        wait_until(victim.has_ended, what="it took the poison")
        assert victim.wait() == -signal.SIGKILL

    # Then both askers are told, and the queue is free again
    wait_until(asker.failures)
    assert asker.failures()["r"].code == "WorkerLost"
    with pytest.raises(WorkerLost, match=r"pdtasks\.prefill was given up"):
        result.get(timeout=20)
    result.forget()
    start_worker("prefill", 9)
    asker.ask("next")
    wait_until(lambda: asker.finished("next"))
    assert "gave up r" in survivor.log
    assert asker.tokens() == []


def publish(channel: Any, body: Any, serializer: str, **headers: Any) -> None:
    with kombu.Producer(channel, exchange=kombu.Exchange("pdtasks", "topic")) as producer:
        producer.publish(body, routing_key="prefill", serializer=serializer, headers=headers)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_no_job_of_ours_stops_no_worker(
    start_worker: StartWorker, asker: Asker, services: Services, channel: Any
) -> None:
    prefill, decode = start_worker("prefill"), start_worker("decode")

    # When somebody else's messages come into our queue
    publish(channel, {"hello": "canary"}, "json")
    publish(channel, [[], {}, {}], "json", id="x", task="somebody.elses.task", lang="py")
    publish(channel, "canary", "json", id="x", task="pdtasks.prefill", lang="py")
    publish(channel, [["canary"], {}, {}], "json", id="y", task="pdtasks.prefill", lang="py")
    publish(channel, [[], {}, {}], "pickle", id="z", task="pdtasks.prefill", lang="py")
    publish(channel, [[], {}, None], "pickle", id="z", task="somebody.elses.task", lang="py")
    kombu.Producer(channel).publish(
        pickle.dumps("canary"),
        routing_key="pdtasks.dead",
        content_type="application/x-python-serialize",
        content_encoding="binary",
        headers={"id": "z", "task": "pdtasks.prefill"},
    )
    kombu.Producer(channel).publish(
        [[], {}, {}],
        routing_key="pdtasks.dead",
        serializer="json",
        headers={"id": 7, "task": ["no", "name"], "x-death": "canary"},
    )

    # Then our own requests are served all the same, by the same workers
    asker.ask("r")
    wait_until(lambda: asker.finished("r"))
    dead = kombu.Queue("pdtasks.dead", channel=channel)
    wait_until(lambda: dead.queue_declare(passive=True).message_count == 0)
    assert not prefill.has_ended()
    assert not decode.has_ended()
    assert asker.failures() == {}
