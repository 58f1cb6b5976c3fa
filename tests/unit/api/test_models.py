"""Which front half answers a request? The one of the model that its body names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.middleware import Middleware

from api import errors, models
from api.front import Fronts, model_in
from api.guard import Guard
from api.models import ByModel

BOTH = ("one", "other")
PROMPT = "canary"


class StubWorkers:
    """Those of one model."""

    def __init__(self) -> None:
        self.looks = 0
        self.is_alive = True

    async def look_again(self) -> None:
        self.looks += 1


class StubModels:
    """vLLM's list of one model."""

    def __init__(self, name: str) -> None:
        self.data = [self]
        self._name = name

    async def show_available_models(self) -> StubModels:
        return self

    def model_dump(self) -> dict[str, str]:
        return {"id": self._name}


class StubFront:
    """Answers with its name, or raises a prompt."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.app = FastAPI()
        self.core = self  # whose workers are looked at
        self.workers = StubWorkers()
        self.app.state.openai_serving_models = StubModels(name)

        @self.app.post("/v1/completions")
        async def complete() -> str:
            return name

        @self.app.post("/raise")
        async def surprise() -> None:
            raise RuntimeError(PROMPT)

        errors.install(self.app)


class StubFronts(Fronts):
    def __init__(self) -> None:
        fronts: Any = {name: StubFront(name) for name in BOTH}
        self._by_name = fronts


@pytest.fixture
def fronts() -> StubFronts:
    return StubFronts()


@pytest.fixture
def client(fronts: StubFronts) -> TestClient:
    """The default model's app, as `api.main` puts it together, with a route of jobs."""

    async def nothing() -> None:
        pass

    app = fronts.default.app

    @app.post("/v1/jobs")
    async def submit() -> str:
        return "a job"

    models.install(app, fronts)
    app.user_middleware += [
        Middleware(Guard, max_body_bytes=1000, before=nothing),
        Middleware(ByModel, fronts=fronts),
    ]
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("body", "model"),
    [
        ('{"model": "one"}', "one"),
        ('{"model": "other"}', "other"),
        ('{"prompt": [1], "model": "oth\\u0065r"}', "other"),
        ('{"model": "other", "temperature": NaN}', "other"),
        ('{"model": "one", "model": "other"}', "other"),
        # What the default one's front half answers, or refuses in its own words
        ("{}", "one"),
        ('{"model": null}', "one"),
        ('{"model": ""}', "one"),
        ('{"model": ["other"]}', "one"),
        ("[1]", "one"),
        ('"other"', "one"),
        ('{"model": "other"', "one"),
        ("", "one"),
    ],
)
def test_a_request_goes_to_the_model_that_its_body_names(
    client: TestClient, body: str, model: str
) -> None:
    assert client.post("/v1/completions", content=body).json() == model


def test_before_a_further_model_answers_its_workers_are_looked_for(
    client: TestClient, fronts: StubFronts
) -> None:
    client.post("/v1/completions", json={"model": "other"})

    assert [front.core.workers.looks for front in fronts] == [0, 1]  # type: ignore[attr-defined]


def test_a_model_that_there_is_not_is_told_with_those_that_there_are(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"model": "gpt"})

    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": "The model `gpt` does not exist, but: one, other",
        "type": "Not Found",
        "param": "model",
        "code": 404,
    }


def test_what_is_of_the_process_is_asked_whatever_model_is_named(client: TestClient) -> None:
    for model in (*BOTH, "gpt"):
        assert client.post("/v1/jobs", json={"model": model}).json() == "a job"


@pytest.mark.parametrize("model", BOTH)
def test_what_nobody_foresaw_is_answered_alike_and_without_its_text(
    client: TestClient, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = client.post("/raise", json={"model": model})

    assert answer.status_code == 500
    assert "an unforeseen RuntimeError" in answer.json()["error"]["message"]
    assert PROMPT not in answer.text + caplog.text


def test_listed_are_those_that_are_alive(client: TestClient, fronts: StubFronts) -> None:
    def listed() -> list[str]:
        return [model["id"] for model in client.get("/v1/models").json()["data"]]

    assert listed() == ["one", "other"]
    fronts.default.core.workers.is_alive = False  # type: ignore[misc]
    assert listed() == ["other"]


def test_a_body_may_be_nested_as_deeply_as_it_likes() -> None:
    nested = b'{"a": ' + b"[" * 100_000
    assert model_in(nested) is None
    assert model_in(json.dumps({"model": "other"}).encode()) == "other"
