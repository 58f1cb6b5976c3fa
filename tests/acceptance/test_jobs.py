"""Does a request outlive its connection, and the API process that took it?"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.acceptance.running_stack import MODEL, START_TIMEOUT_S, Stack
from tests.waiting import wait_until

QUESTION = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
}
STORY = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me a long story about a river."}],
    "max_tokens": 150,
    "min_tokens": 150,
    "temperature": 0.8,
}


def submit(client: httpx.Client, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    response = client.post("/v1/jobs", json=body, headers=headers)
    job: dict[str, Any] = response.json()
    assert response.status_code == 202, job
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    return job


def look(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    response = client.get(f"/v1/jobs/{job['id']}")
    found: dict[str, Any] = response.json()
    assert response.status_code == 200, found
    return found


def ended(client: httpx.Client, job: dict[str, Any], timeout_s: float = 60) -> dict[str, Any]:
    def it_has_ended() -> dict[str, Any] | None:
        found = look(client, job)
        return found if found["state"] in ("succeeded", "failed", "cancelled") else None

    found: dict[str, Any] = wait_until(it_has_ended, timeout_s)
    return found


def read_events(
    client: httpx.Client, job: dict[str, Any], after: str | None = None, at_most: int | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """Ids and chunks, to the end or `at_most` so many."""
    headers = {} if after is None else {"Last-Event-ID": after}
    found: list[tuple[str, dict[str, Any]]] = []
    with client.stream("GET", f"/v1/jobs/{job['id']}/events", headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        event_id = ""
        for line in response.iter_lines():
            if line.startswith("id: "):
                event_id = line[4:]
            elif line == "data: [DONE]":
                return found
            elif line.startswith("data: "):
                found.append((event_id, json.loads(line[6:])))
                if len(found) == at_most:
                    return found
    raise AssertionError("the events ended without [DONE]")


def text_of(events: list[tuple[str, dict[str, Any]]]) -> str:
    return "".join(
        choice["delta"].get("content") or "" for _, chunk in events for choice in chunk["choices"]
    )


def answer_of(job: dict[str, Any]) -> str:
    assert job["state"] == "succeeded", job
    text: str = job["result"]["choices"][0]["message"]["content"]
    return text


def test_a_job_gives_what_the_request_would_give(client: httpx.Client) -> None:
    for route, body in (
        ("/v1/chat/completions", QUESTION),
        ("/v1/chat/completions", QUESTION | {"logprobs": True, "top_logprobs": 2}),
        (
            "/v1/chat/completions",
            QUESTION | {"n": 2, "temperature": 0.3, "seed": 5, "max_tokens": 8},
        ),
        (
            "/v1/completions",
            {
                "model": MODEL,
                "prompt": ["The capital of France is", "One, two, three,"],
                "temperature": 0,
                "max_tokens": 4,
            },
        ),
    ):
        direct = client.post(route, json=body).json()
        job = ended(client, submit(client, body))

        assert job["state"] == "succeeded", job
        assert job["endpoint"] == route
        for one, other in zip(job["result"]["choices"], direct["choices"], strict=True):
            assert one == other
        assert job["result"]["usage"]["completion_tokens"] == direct["usage"]["completion_tokens"]


def test_a_job_says_who_does_what_and_when(client: httpx.Client, stack: Stack) -> None:
    with stack.paused("decode"):
        job = submit(client, QUESTION)
        assert (job["state"], job["result"], job["attempts"]) == ("queued", None, 0)
        wait_until(lambda: look(client, job)["state"] == "prefill")

    job = ended(client, job)
    assert [start["stage"] for start in job["stages"]] == ["prefill", "decode"]
    assert (job["stage"], job["attempts"]) == ("decode", 1)
    assert job["worker"].startswith("decode")
    times = [job[f"{what}_at"] for what in ("created", "started", "first_token", "finished")]
    assert times == sorted(times)
    assert job["expires_at"] > job["finished_at"]


def test_events_are_read_from_the_beginning_and_from_anywhere(client: httpx.Client) -> None:
    job = submit(client, STORY | {"max_tokens": 30, "min_tokens": 30})

    whole = read_events(client, job)
    again = read_events(client, job)
    rest = read_events(client, job, after=whole[20][0])

    assert again == whole
    assert rest == whole[21:]
    assert text_of(whole) == answer_of(look(client, job))
    assert whole[-1][1]["usage"]["completion_tokens"] == 30
    assert read_events(client, job, after=whole[-1][0]) == []


def test_a_celery_client_finds_the_result(client: httpx.Client, stack: Stack) -> None:
    job = ended(client, submit(client, QUESTION))

    code = f"from pdtasks.app import app; print(app.AsyncResult('{job['id']}').get(timeout=20))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=stack.env, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == str(job["result"])


def test_a_cancelled_job_leaves_the_engine(client: httpx.Client, stack: Stack) -> None:
    job = submit(client, STORY)
    read_events(client, job, at_most=5)

    cancelled = client.delete(f"/v1/jobs/{job['id']}").json()

    assert cancelled["state"] == "cancelled"
    assert cancelled["result"] is None
    wait_until(lambda: all(w.kv_usage == 0 for w in stack.workers()))
    assert len(read_events(client, job)) < 150
    assert client.delete(f"/v1/jobs/{job['id']}").json()["state"] == "cancelled"


def test_the_same_key_gives_the_same_job_and_another_body_is_refused(client: httpx.Client) -> None:
    key = {"Idempotency-Key": "capital of France"}

    first = submit(client, QUESTION, **key)
    second = submit(client, QUESTION, **key)
    refused = client.post("/v1/jobs", json=QUESTION | {"seed": 5}, headers=key)

    assert second["id"] == first["id"]
    assert refused.status_code == 409
    assert "new key" in refused.json()["error"]["message"]


def test_jobs_are_listed_newest_first(client: httpx.Client) -> None:
    made = [submit(client, QUESTION)["id"] for _ in range(3)][::-1]

    first = client.get("/v1/jobs", params={"limit": 2}).json()
    second = client.get("/v1/jobs", params={"limit": 2, "after": made[1]}).json()

    assert [job["id"] for job in first["data"]] == made[:2]
    assert first["has_more"]
    assert second["data"][0]["id"] == made[2]
    for job_id in made:
        ended(client, {"id": job_id})


def test_a_job_ends_with_its_timeout(client: httpx.Client, stack: Stack) -> None:
    with stack.paused("decode"):
        job = ended(client, submit(client, QUESTION | {"timeout": 1.5}))

    assert job["state"] == "failed"
    assert (job["error"]["type"], job["error"]["code"]) == ("RequestTimeout", 504)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("no json", "not JSON"),
        ([], "not a JSON object"),
        ({"model": MODEL}, "messages"),
        (QUESTION | {"prompt": "x"}, "either"),
        (QUESTION | {"temperature": "hot"}, "temperature"),
        (QUESTION | {"timeout": -1}, "timeout"),
        (QUESTION | {"use_beam_search": True}, "beam"),
    ],
)
def test_bad_jobs_are_refused_at_once(client: httpx.Client, body: object, complaint: str) -> None:
    content = body if isinstance(body, str) else json.dumps(body)

    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/jobs", content=content, headers=headers)

    assert response.status_code == 400
    assert complaint in response.json()["error"]["message"]


def test_unknown_jobs_are_not_found(client: httpx.Client) -> None:
    for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
        assert client.request(method, f"/v1/jobs/job-nobody{path}").status_code == 404


def begin_batch(client: httpx.Client, count: int) -> str:
    """The id of a batch of so many questions."""
    body = QUESTION | {"max_tokens": 4}
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for n in range(count)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    form: dict[str, Any] = {"data": {"purpose": "batch"}, "files": {"file": ("f", content)}}
    file = client.post("/v1/files", **form).json()
    order = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions"}
    batch = client.post("/v1/batches", json=order | {"completion_window": "24h"}).json()
    batch_id: str = batch["id"]
    return batch_id


def answered(client: httpx.Client, batch_id: str) -> list[str] | None:
    """The custom ids of a batch that has completed."""
    batch = client.get(f"/v1/batches/{batch_id}").json()
    if batch["status"] != "completed":
        return None
    content = client.get(f"/v1/files/{batch['output_file_id']}/content").text
    return sorted(json.loads(line)["custom_id"] for line in content.splitlines())


def test_any_api_process_answers_and_knows_the_jobs_of_the_others(
    client: httpx.Client, stack: Stack
) -> None:
    with httpx.Client(base_url=stack.other_api_url, timeout=60) as other:
        # One caller, in turn
        turns = itertools.cycle((client, other))
        body = QUESTION | {"max_tokens": 8}
        answers = [next(turns).post("/v1/chat/completions", json=body).json() for _ in range(4)]
        jobs = [submit(next(turns), body) for _ in range(2)]
        next(turns)  # from here on each is asked about what the other has taken
        found = [ended(next(turns), job) for job in jobs]
        events = [read_events(next(turns), job) for job in jobs]

    (text,) = {answer["choices"][0]["message"]["content"] for answer in answers}
    assert [answer_of(job) for job in found] == [text] * 2
    assert [text_of(chunks) for chunks in events] == [text] * 2


def test_a_job_and_a_batch_outlive_the_api_process_that_took_them(
    client: httpx.Client, stack: Stack
) -> None:
    first, second = stack.service_pids("api")
    with httpx.Client(base_url=stack.other_api_url, timeout=60) as other:
        # A job is run by the process that took it, for the other one stands still
        with stack.standing([first]):
            job = submit(other, STORY)
            before = read_events(other, job, at_most=20)
            batch = begin_batch(other, 10)
            wait_until(
                lambda: other.get(f"/v1/batches/{batch}").json()["status"] == "in_progress", 20
            )

            # When it is killed
            os.kill(second, signal.SIGKILL)

        # Then the other one goes on with it
        whole = read_events(client, job)
        found = ended(client, job)
        assert wait_until(lambda: answered(client, batch), 60) == sorted(map(str, range(10)))

        # and the one that takes its place knows it as well
        def it_answers() -> bool:
            with suppress(httpx.HTTPError):
                return other.get("/ready").status_code == 200
            return False

        wait_until(it_answers, START_TIMEOUT_S)
        assert look(other, job) == found
        assert read_events(other, job) == whole

    assert whole[:20] == before
    restarts = [n for n, (_, chunk) in enumerate(whole) if chunk["object"] == "job.restart"]
    valid = whole[restarts[0] + 1 :] if restarts else whole
    assert text_of(valid) == answer_of(found)
    assert valid[-1][1]["usage"]["completion_tokens"] == 150
    assert found["attempts"] == 2
