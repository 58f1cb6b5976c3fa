"""Two models behind one API and one broker, each with workers of its own."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from celery.result import AsyncResult
from click.testing import CliRunner

from pdtasks.app import app
from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.cli import main
from pdtasks.errors import WorkerLost
from pdtasks.naming import EMBEDDED_MODEL
from pdtasks.pipeline import submit
from tests.integration.conftest import (
    DELIVERY_LIMIT,
    FURTHER_MODEL,
    FURTHER_MODELS,
    Services,
    StartWorker,
    StubWorker,
)
from tests.integration.real_api import running_api
from tests.waiting import wait_until

BOTH = (EMBEDDED_MODEL, FURTHER_MODEL)
PATIENCE_S = 30
SAID: list[dict[str, Any]] = [{"role": "user", "content": "a"}]


@dataclass
class World:
    api: httpx.Client
    workers: dict[str, list[StubWorker]]  #: by model

    def ask(self, model: str, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
        body = {"model": model, "prompt": "a b c", "max_tokens": 4, "temperature": 0}
        return self.api.post(path, json=body | fields)

    def is_ready(self, model: str) -> bool:
        return self.api.get("/ready", params={"model": model, "split": True}).status_code == 200

    def has_succeeded(self, job: str) -> bool:
        return bool(self.api.get(f"/v1/jobs/{job}").json()["state"] == "succeeded")

    def begun(self, model: str) -> list[str]:
        """Requests that the model's workers have begun, as their caller knows them."""
        found = {name for worker in self.workers[model] for name in worker.steering.added()}
        return sorted(found)

    def figure(self, name: str, *labels: str) -> float:
        lines = self.api.get("/metrics").text.splitlines()
        return sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith(f"{name}{{") and all(label in line for label in labels)
        )

    def alive(self) -> list[str]:
        return [model["id"] for model in self.api.get("/v1/models").json()["data"]]


@pytest.fixture
def world(
    start_worker: StartWorker, services: Services, bench_nursery: Nursery, tmp_path: Path
) -> Iterator[World]:
    workers = {
        model: [start_worker(stage, model=name, wait=False) for stage in ("prefill", "decode")]
        for model, name in zip(BOTH, ("", FURTHER_MODEL), strict=True)
    }
    with running_api(services, bench_nursery, tmp_path, 30, models=FURTHER_MODELS) as api:
        world = World(api, workers)
        for model in BOTH:
            wait_until(partial(world.is_ready, model), PATIENCE_S)
        yield world


def test_each_model_is_answered_by_its_own_workers_over_one_address(world: World) -> None:
    assert world.alive() == list(BOTH)

    for model in BOTH:
        before = {each: set(world.begun(each)) for each in BOTH}
        other = next(each for each in BOTH if each != model)

        for path, asked in (
            ("/v1/completions", {"prompt": "a b c", "max_tokens": 4}),
            ("/v1/chat/completions", {"messages": SAID, "max_tokens": 4}),
            ("/v1/messages", {"messages": SAID, "max_tokens": 4}),
            ("/v1/responses", {"input": "a", "max_output_tokens": 4}),
        ):
            answer = world.api.post(path, json={"model": model, "temperature": 0} | asked)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == model
            usage = answer.json()["usage"]
            assert usage.get("completion_tokens", usage.get("output_tokens")) == 4

        streamed = world.ask(model, stream=True).text
        assert streamed.rstrip().endswith("data: [DONE]")
        assert f'"model":"{model}"' in streamed

        job = world.ask(model, "/v1/jobs").raise_for_status().json()
        assert job["model"] == model
        wait_until(partial(world.has_succeeded, job["id"]), PATIENCE_S)

        assert len(set(world.begun(model)) - before[model]) == 6
        assert set(world.begun(other)) == before[other], "no job crosses"
        assert world.figure("pdtasks_requests_total", f'model="{model}"', "length") == 6
        assert world.figure("vllm:request_success_total", f'model_name="{model}"') == 6


def test_what_one_model_can_do_is_not_taken_for_the_others(world: World) -> None:
    longer = list(range(300, 500))

    assert world.ask(EMBEDDED_MODEL, prompt=longer).status_code == 200
    refused = world.ask(FURTHER_MODEL, prompt=longer)

    assert refused.status_code == 400
    assert "100" in refused.json()["error"]["message"]
    assert world.begun(FURTHER_MODEL) == []
    chat = {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": False}
    counts = {
        model: world.api.post("/tokenize", json={"model": model} | chat).json()["count"]
        for model in BOTH
    }
    assert counts[FURTHER_MODEL] == 1
    assert counts[EMBEDDED_MODEL] > 10


def test_a_lost_model_is_a_503_an_unknown_one_a_404_and_the_others_go_on(world: World) -> None:
    for worker in world.workers[FURTHER_MODEL]:
        worker.signal(signal.SIGTERM)
        worker.wait()
    wait_until(lambda: world.alive() == [EMBEDDED_MODEL], PATIENCE_S)

    lost, unknown = world.ask(FURTHER_MODEL), world.ask("gpt-9")

    assert lost.status_code == 503
    assert FURTHER_MODEL in lost.json()["error"]["message"]
    assert unknown.status_code == 404
    assert all(model in unknown.json()["error"]["message"] for model in ("gpt-9", *BOTH))
    assert unknown.json()["error"]["param"] == "model"
    assert world.ask(EMBEDDED_MODEL).status_code == 200
    assert world.api.get("/ready").status_code == 200
    assert world.api.get("/ready", params={"model": FURTHER_MODEL}).status_code == 503
    assert world.api.get("/ready", params={"model": "gpt-9"}).status_code == 404


def test_a_job_of_a_model_stays_with_it_from_python_and_after_it_was_given_up(
    start_worker: StartWorker,
) -> None:
    others = [start_worker(stage) for stage in ("prefill", "decode")]
    start_worker("decode", model=FURTHER_MODEL)
    result = submit([1, 2, 3], model=FURTHER_MODEL, max_tokens=4, temperature=0)
    for number in range(1, DELIVERY_LIMIT + 2):
        victim = start_worker("prefill", number, model=FURTHER_MODEL, held=True)
        wait_until(victim.steering.added)
        victim.signal(signal.SIGKILL)
        victim.wait()
    # (Any worker answers for it, whatever it serves.)
    with pytest.raises(WorkerLost):
        result.get(timeout=PATIENCE_S)

    def letters() -> str:
        return CliRunner().invoke(main, ["deadletter", "list"]).output

    wait_until(lambda: f"prefill.{FURTHER_MODEL}" in letters())
    done = CliRunner().invoke(main, ["deadletter", "replay", result.id])
    result.forget()

    assert done.exit_code == 0, done.output
    start_worker("prefill", 9, model=FURTHER_MODEL)
    answer = AsyncResult(result.id, app=app).get(timeout=PATIENCE_S)
    assert [stage["worker"] for stage in answer["stages"]] == [
        f"{stage}.{FURTHER_MODEL}@test" for stage in ("prefill9", "decode1")
    ]
    assert [worker.steering.added() for worker in others] == [[], []]


def test_what_goes_on_is_told_by_model(world: World) -> None:
    held = world.workers[FURTHER_MODEL][0]
    held.steering.hold()
    job = world.ask(FURTHER_MODEL, "/v1/jobs").raise_for_status().json()["id"]
    wait_until(held.steering.added, PATIENCE_S)

    seen = {
        model: world.api.get("/pdtasks/overview", params={"model": model}).json() for model in BOTH
    }

    assert [seen[model]["api"]["model"] for model in BOTH] == list(BOTH)
    assert [seen[model]["in_flight"]["prefill"] for model in BOTH] == [0, 1]
    for model, suffix in zip(BOTH, ("", f".{FURTHER_MODEL}"), strict=True):
        queues = {queue["name"]: queue["consumers"] for queue in seen[model]["queues"]}
        assert queues.pop("pdtasks.dead") is not None
        assert queues == {f"prefill{suffix}": 1, f"decode{suffix}": 1}
        assert {worker["model"] for worker in seen[model]["workers"]} == {model}
    together = world.api.get("/pdtasks/overview").json()
    assert len(together["workers"]) == 4
    assert together["in_flight"]["prefill"] == 1
    assert world.figure("pdtasks_open_requests", f'model="{FURTHER_MODEL}"', 'stage="prefill"') == 1
    assert world.figure("pdtasks_open_requests", f'model="{EMBEDDED_MODEL}"') == 0
    held.steering.release()
    wait_until(partial(world.has_succeeded, job), PATIENCE_S)
