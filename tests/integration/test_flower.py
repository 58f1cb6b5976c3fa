"""Flower beside a running stack, in a real browser: what it shows, who may act, what it costs.

Stub engines; no keys are asked for. Flower is started as `pdtasks up` starts it, as its own user.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
import valkey

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.chaos.stack import STUB_MODEL, ChaosStack
from pdtasks.cluster import children
from pdtasks.cluster.console import Console
from pdtasks.cluster.probes import free_ports, http_status
from pdtasks.cluster.process import Process
from pdtasks.cluster.rights import User
from tests.browser import Tab
from tests.waiting import wait_until

CANARY = 12_345  # a token of the prompt
OLGA = ("olga", "a-password-for-this-test")
LOGIN = ":".join(OLGA)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, bench_nursery: Nursery) -> Iterator[ChaosStack]:
    home = tmp_path_factory.mktemp("flower")
    with ChaosStack(
        home, "stub", Console(io.StringIO()), deadline_s=120, nursery=bench_nursery
    ) as running:
        yield running


@contextmanager
def flower(stack: ChaosStack) -> Iterator[tuple[str, Process]]:
    """As `pdtasks up` has it: the URL, and the process."""
    settings = stack.settings.model_copy(
        update={
            "flower_port": free_ports(1)[0],
            "broker_url": stack.broker.url_for(User.FLOWER),
            "broker_api_url": stack.broker.api_url_for(User.FLOWER),
            "bus_url": "",
            "kv_urls": (),
        }
    )
    process = children.flower(settings, "a secret of some length")
    url = children.flower_url(settings)
    process.start()
    try:
        wait_until(lambda: not process.running or http_status(f"{url}/healthcheck") == 200, 60)
        assert process.running, process.log_tail(20)
        yield url, process
    finally:
        process.stop(5)


@pytest.fixture(scope="module")
def open_flower(stack: ChaosStack) -> Iterator[tuple[str, Process]]:
    """One without a login."""
    with flower(stack) as found:
        yield found


@pytest.fixture(scope="module")
def url(open_flower: tuple[str, Process]) -> str:
    return open_flower[0]


@pytest.fixture(scope="module")
def closed_url(stack: ChaosStack) -> Iterator[str]:
    """Of one with a login."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWER_BASIC_AUTH", LOGIN)
        with flower(stack) as (found, _):
            yield found


def as_olga(url: str) -> str:
    """The URL as somebody writes it who logs in."""
    return url.replace("://", f"://{LOGIN}@")


@dataclass
class Asked:
    """A request that somebody waits for."""

    name: str
    lines: Iterator[str] = field(default_factory=lambda: iter(()))

    def end(self) -> dict[str, Any]:
        """The last that its caller hears."""
        told = [line for line in self.lines if line.startswith("data: {")]
        last: dict[str, Any] = json.loads(told[-1].removeprefix("data: "))
        return last


def api_of(stack: ChaosStack) -> str:
    return next(iter(stack.urls.values()))


def ask(stack: ChaosStack, tokens: int = 5, *, name: str = "", **more: Any) -> httpx.Response:
    body = {"model": STUB_MODEL, "prompt": [CANARY] * 40, "max_tokens": tokens} | more
    headers = {"X-Request-Id": name} if name else {}
    url = f"{api_of(stack)}/v1/completions"
    return httpx.post(url, json=body, headers=headers, timeout=90, trust_env=False)


@contextmanager
def under_way(stack: ChaosStack, tokens: int = 1500, **more: Any) -> Iterator[Asked]:
    """A request in decode; who asks hangs up at the end."""
    asked = Asked(os.urandom(8).hex())
    body = {"model": STUB_MODEL, "prompt": [CANARY] * 40, "max_tokens": tokens, "stream": True}
    with (
        httpx.Client(base_url=api_of(stack), timeout=60, trust_env=False) as client,
        client.stream(
            "POST", "/v1/completions", json=body | more, headers={"X-Request-Id": asked.name}
        ) as answer,
    ):
        asked.lines = answer.iter_lines()
        for line in asked.lines:
            if line.startswith("data:"):  # a token
                break
        yield asked


def tasks(url: str, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/api/tasks", timeout=20, **options).json()
    return found


def task_of(url: str, name: str, stage: str, state: str, **options: Any) -> str:
    """The id of a request's task, as soon as Flower has it in that state."""

    def found() -> str | None:
        return next(
            (
                task_id
                for task_id, task in tasks(url, **options).items()
                if (name in task_id, task["name"], task["state"]) == (True, stage, state)
            ),
            None,
        )

    return str(wait_until(found, 30, f"{stage} of {name} is {state}"))


def rows(tab: Tab, table: str) -> list[list[str]]:
    """The cells of its lines, as people read them."""
    lines = f"[...document.querySelectorAll('#{table} tbody tr')]"
    found: list[list[str]] = tab.run(f"{lines}.map((r) => [...r.cells].map((c) => c.innerText))")
    return found


# -- what is shown ---------------------------------------------------------------------------------


def test_tasks_are_shown_with_states_and_runtimes(stack: ChaosStack, url: str, tab: Tab) -> None:
    first = ask(stack)
    assert first.status_code == 200, first.text

    def done() -> list[list[str]]:
        tab.go(f"{url}/tasks")
        tab.wait("document.querySelectorAll('#tasks-table tbody tr').length > 0")
        return [row for row in rows(tab, "tasks-table") if "SUCCESS" in row]

    found = wait_until(lambda: len(done()) >= 2 and done())
    assert {row[0] for row in found} == {"pdtasks.prefill", "pdtasks.decode"}
    workers = {row[0].partition(".")[2]: row[-1] for row in found}
    assert workers["prefill"].startswith("prefill")
    assert workers["decode"].startswith("decode")
    assert all(re.fullmatch(r"[\d.]+ m?s", row[-2]) for row in found), "runtimes"


def test_workers_are_shown_with_role_and_device(stack: ChaosStack, url: str, tab: Tab) -> None:
    tab.go(f"{url}/workers")
    tab.wait("document.querySelector('#workers-online').innerText === '4'")
    found = {row[0]: row for row in rows(tab, "workers-table")}
    assert sorted(name.partition("@")[0] for name in found) == [
        *("decode1", "decode2", "prefill1", "prefill2"),
    ]

    (name,) = (name for name in found if name.startswith("decode1@"))
    tab.go(f"{url}/worker/{name}")
    tab.wait("document.querySelector('#tab-other') !== null")
    told = dict(
        tab.run(
            "[...document.querySelectorAll('#tab-other tr')].map((r) => "
            "[...r.cells].map((c) => c.textContent.trim()))"
        )
    )
    assert {key.lower(): value for key, value in told.items()} | {
        "role": "decode",
        "device": "cpu",
        "model": STUB_MODEL,
    } == {key.lower(): value for key, value in told.items()}


def test_lengths_of_queues_are_shown(stack: ChaosStack, url: str, tab: Tab) -> None:
    """With what is under way: nobody has acknowledged it."""
    with under_way(stack):

        def decode() -> list[str] | None:
            tab.go(f"{url}/broker")
            tab.wait("document.querySelectorAll('#queue-table tbody tr').length >= 2")
            found = {row[0]: row for row in rows(tab, "queue-table")}
            assert {"prefill", "decode"} <= set(found)
            return found["decode"] if found["decode"][1] == "1" else None

        # Queue, messages, unacked, ready, consumers
        assert wait_until(decode)[:5] == ["decode", "1", "1", "0", "2"]


def test_nothing_of_a_prompt_an_answer_or_a_password_is_anywhere(
    stack: ChaosStack, url: str
) -> None:
    words = "xylophone"
    answer = ask(stack, 7, prompt=f"the {words}").json()
    request_id = answer["id"]
    said = [CANARY, words]
    ours = [task_of(url, request_id, f"pdtasks.{s}", "SUCCESS") for s in ("prefill", "decode")]
    workers = httpx.get(f"{url}/api/workers?refresh=1", timeout=30).json()
    pages = ["/", "/workers", "/tasks", "/broker", "/metrics", "/api/tasks", "/api/workers"]
    pages += ["/api/queues/length", "/workers?json=1", "/tasks/datatable?" + _COLUMNS]
    pages += [f"/task/{task}" for task in ours] + [f"/api/task/info/{task}" for task in ours]
    pages += [f"/api/task/result/{task}" for task in ours]
    pages += [f"/worker/{quote(name)}" for name in workers]
    texts = {page: httpx.get(url + page, timeout=20).text for page in pages}

    assert ours[0] in texts["/api/tasks"]
    assert [page for page, text in texts.items() if not text] == [
        f"/api/task/result/{task}" for task in ours
    ]  # it cannot reach results
    for page, text in texts.items():
        assert not [one for one in said if str(one) in text], page
        for secret in (stack.broker.url, stack.bus.url, stack.kv.url):
            assert str(urlsplit(secret).password) not in text, page


_COLUMNS = (
    "draw=1&start=0&length=100&search[value]=&order[0][column]=0&order[0][dir]=asc"
    "&columns[0][data]=name"
)


# -- who may act -----------------------------------------------------------------------------------


def test_without_a_login_nobody_acts(stack: ChaosStack, url: str, tab: Tab) -> None:
    with under_way(stack, tokens=50) as asked:
        task = task_of(url, asked.name, "pdtasks.decode", "STARTED")
        tab.go(f"{url}/task/{task}")
        tab.wait("document.querySelector('.task-uuid-value') !== null")
        assert tab.run("document.querySelector('#task-terminate')") is None
        for path in (f"/api/task/revoke/{task}?terminate=1", "/api/worker/shutdown/decode1@x"):
            assert httpx.post(url + path, timeout=20).status_code == 403
        assert asked.end()["choices"][0]["finish_reason"] == "length"


def test_with_a_login_nothing_is_shown_to_others(closed_url: str, tab: Tab) -> None:
    for path in ("/", "/tasks", "/broker", "/api/tasks", "/api/workers", "/tasks/datatable"):
        for login in (None, ("olga", "a-guess"), ("", "")):
            assert httpx.get(closed_url + path, auth=login, timeout=20).status_code == 401, path
    tab.go(f"{closed_url}/workers")
    tab.wait("document.body && document.querySelector('#workers-table') === null")
    tab.go(f"{as_olga(closed_url)}/workers")
    tab.wait("document.querySelector('#workers-table') !== null")


def test_terminate_ends_a_running_request_and_gives_all_back(
    stack: ChaosStack, closed_url: str, tab: Tab
) -> None:
    with under_way(stack) as asked:
        task = task_of(closed_url, asked.name, "pdtasks.decode", "STARTED", auth=OLGA)
        tab.go(f"{as_olga(closed_url)}/workers")
        tab.wait("document.querySelector('#workers-table') !== null")
        tab.go(f"{closed_url}/task/{task}")  # (a page's own requests may not name a password)
        tab.wait("document.readyState === 'complete' && document.querySelector('#task-terminate')")
        tab.run("document.querySelector('#task-terminate').click()")

        # Its caller hears why, long before the answer would have been there
        error = asked.end()["error"]
        assert (error["code"], error["message"]) == (410, "the request was revoked")

    # Flower knows, the engine has dropped it, and no block is left
    task_of(closed_url, asked.name, "pdtasks.decode", "REVOKED", auth=OLGA)
    assert stack.left_behind(20) == ()
    wait_until(lambda: keys_of(stack, asked.name) == [], what="its KV is deleted")


def keys_of(stack: ChaosStack, name: str) -> list[str]:
    """What belongs to one request alone on the kv server."""
    with valkey.Valkey.from_url(stack.kv.operator_url) as kv:
        return [key.decode() for key in kv.scan_iter(f"*{name}*")]


def test_a_script_revokes_with_the_login_alone(stack: ChaosStack, closed_url: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        name = os.urandom(8).hex()
        answer = pool.submit(ask, stack, 1500, name=name)
        task = task_of(closed_url, name, "pdtasks.decode", "STARTED", auth=OLGA)
        assert keys_of(stack, name), "its KV, which decode has loaded"
        revoke = f"{closed_url}/api/task/revoke/{task}?terminate=1"
        assert httpx.post(revoke, timeout=20).status_code == 401
        # of another site's page, in the browser of somebody who has logged in
        for header in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://elsewhere.example"}):
            refused = httpx.post(revoke, auth=OLGA, headers=header, timeout=20)
            assert refused.status_code == 403
        assert not answer.done()
        httpx.post(revoke, auth=OLGA, timeout=20).raise_for_status()
        # Not a 5xx, which official clients would ask again
        assert answer.result(30).status_code == 410
    wait_until(lambda: keys_of(stack, name) == [], what="its KV is deleted")


@pytest.mark.parametrize("path", ["async-apply/pdtasks.decode", "send-task/pdtasks.decode"])
def test_flower_cannot_send_tasks_even_with_a_login(
    path: str, stack: ChaosStack, closed_url: str
) -> None:
    before = set(tasks(closed_url, auth=OLGA))
    body = json.dumps({"args": ["x"]})
    answer = httpx.post(f"{closed_url}/api/task/{path}", content=body, auth=OLGA, timeout=60)
    assert answer.status_code >= 400 or set(tasks(closed_url, auth=OLGA)) == before


# -- what it costs ---------------------------------------------------------------------------------


def test_a_frozen_flower_costs_no_request_and_no_worker_anything(
    stack: ChaosStack, open_flower: tuple[str, Process]
) -> None:
    url, process = open_flower
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: ask(stack, 3), range(64)))
        assert {answer.status_code for answer in answers} == {200}
        seen = httpx.get(f"{api_of(stack)}/pdtasks/overview", timeout=20, trust_env=False).json()
        assert [worker["state"] for worker in seen["workers"]] == ["ready"] * 4
    finally:
        os.kill(process.pid, signal.SIGCONT)

    # When it goes on, it shows what comes then
    answer = ask(stack).json()
    task_of(url, answer["id"], "pdtasks.decode", "SUCCESS")


def test_a_worker_that_has_stopped_is_offline(stack: ChaosStack, url: str, tab: Tab) -> None:
    """The last one here: nobody starts the worker again."""
    with under_way(stack, tokens=100) as asked:
        task = task_of(url, asked.name, "pdtasks.decode", "STARTED")
        name = tasks(url)[task]["worker"]
        (part,) = (p for p in stack.workers if name.startswith(f"{p.name}@"))
        part.process.signal(signal.SIGTERM)
        asked.end()  # there, or by the other one of its stage
        wait_until(lambda: not part.process.running, 60)

    tab.go(f"{url}/workers")
    tab.wait("document.querySelector('#workers-online').innerText === '3'")
    states = {row[0]: row[1] for row in rows(tab, "workers-table")}
    assert {worker: state for worker, state in states.items() if state != "Online"} == {
        name: "Offline"
    }
