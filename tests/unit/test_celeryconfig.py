"""Celery's options: those whose loss would be noticed only in an accident."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pdtasks.settings import load_settings

CONFIG = Path(__file__).parents[2] / "configs" / "celeryconfig.py"


@pytest.fixture
def read_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., dict[str, Any]]]:
    for name in [n for n in os.environ if n.startswith("PDTASKS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PDTASKS_HOME", str(tmp_path))

    def read(**env: str) -> dict[str, Any]:
        for name, value in env.items():
            monkeypatch.setenv(f"PDTASKS_{name}", value)
        load_settings.cache_clear()
        return runpy.run_path(str(CONFIG))

    yield read
    load_settings.cache_clear()


@pytest.fixture
def config(read_config: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return read_config()


def test_pickle_is_neither_written_nor_read(config: dict[str, Any]) -> None:
    assert config["task_serializer"] == "msgpack"
    assert config["result_serializer"] == "json"
    assert set(config["accept_content"]) == {"msgpack", "json"}
    assert set(config["result_accept_content"]) == {"json"}


def test_each_stage_has_a_quorum_queue_that_gives_up_at_last(
    read_config: Callable[..., dict[str, Any]],
) -> None:
    queues = read_config(DELIVERY_LIMIT="5")["task_queues"]

    assert [(q.name, q.routing_key, q.exchange.name) for q in queues] == [
        ("prefill", "prefill", "pdtasks"),
        ("decode", "decode", "pdtasks"),
    ]
    for queue in queues:
        assert queue.durable
        assert queue.queue_arguments == {
            "x-queue-type": "quorum",
            "x-delivery-limit": 5,
            "x-dead-letter-exchange": "pdtasks.dead",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        } | ({"x-max-length": 20_000} if queue.name == "prefill" else {})


def test_a_further_model_has_queues_like_those_of_the_default_one(
    read_config: Callable[..., dict[str, Any]],
) -> None:
    queues = read_config(MODELS='{"qwen-2.5": "/models/qwen"}')["task_queues"]

    assert [q.name for q in queues] == ["prefill", "decode", "prefill.qwen-2.5", "decode.qwen-2.5"]
    assert [q.routing_key for q in queues] == [q.name for q in queues]
    for queue, default in zip(queues[2:], queues[:2], strict=True):
        assert queue.queue_arguments == default.queue_arguments
        assert queue.exchange == default.exchange


def test_a_misspelt_queue_is_not_made(config: dict[str, Any]) -> None:
    assert config["task_create_missing_queues"] is False


def test_a_job_is_acknowledged_when_it_is_done_and_taken_when_there_is_room(
    config: dict[str, Any],
) -> None:
    assert config["task_acks_late"] is True
    assert config["worker_prefetch_multiplier"] == 1


def test_a_worker_outlives_an_outage_of_the_broker(config: dict[str, Any]) -> None:
    assert config["broker_connection_max_retries"] is None
    assert config["broker_connection_retry_on_startup"] is True
    assert config["broker_channel_error_retry"] is True


def test_what_celery_itself_sends_waits_for_rabbitmq_within_bounds(config: dict[str, Any]) -> None:
    options = config["broker_transport_options"]
    assert options["confirm_publish"] is False
    assert 0 < options["read_timeout"] <= 30
    assert 0 < options["write_timeout"] <= 30
    assert 0 < config["redis_socket_timeout"] <= 10


def test_waiting_tasks_send_no_event_with_their_arguments(config: dict[str, Any]) -> None:
    assert config["task_send_sent_event"] is False


@pytest.mark.parametrize(
    ("bus_url", "backend"),
    [
        ("valkey://:pw@127.0.0.1:6379/0", "redis://:pw@127.0.0.1:6379/0"),
        ("valkey://:valkey@bus/0", "redis://:valkey@bus/0"),
        ("redis://bus/1", "redis://bus/1"),
    ],
)
def test_results_lie_on_the_bus(
    read_config: Callable[..., dict[str, Any]], bus_url: str, backend: str
) -> None:
    config = read_config(BUS_URL=bus_url, RESULT_TTL_S="77")

    assert config["result_backend"] == backend
    assert config["result_expires"] == 77


def test_without_a_bus_there_is_no_result_backend(config: dict[str, Any]) -> None:
    assert config["result_backend"] == "disabled://"
    assert config["broker_url"] is None
