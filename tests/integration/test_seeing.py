"""What a running stack shows of itself: the overview, the page in a real browser, the terminal.

Stub engines; keys are asked for, so that there is somebody who may not see all.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from click.testing import CliRunner

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.chaos.stack import STUB_MODEL, ChaosStack
from pdtasks.cli import main
from pdtasks.cluster.console import Console
from pdtasks.cluster.probes import free_ports
from pdtasks.cluster.process import Process
from pdtasks.keys import Key, add, digest_of
from pdtasks.overview import Overview, RequestReport
from pdtasks.scraping import scrape_configuration
from tests.browser import Tab
from tests.scraping import PROMTOOL
from tests.waiting import wait_until

ALICE, BOB, OLGA = "pdt-alice", "pdt-bob", "pdt-olga"
CANARY = 12_345  # a token of the prompt


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, bench_nursery: Nursery) -> Iterator[ChaosStack]:
    home = tmp_path_factory.mktemp("seeing")
    keys = home / "keys"
    for name, secret in (("alice", ALICE), ("bob", BOB)):
        add(keys, Key(name, digest_of(secret)))
    add(keys, Key("olga", digest_of(OLGA), admin=True))
    console = Console(io.StringIO())
    with ChaosStack(
        home, "stub", console, deadline_s=60, nursery=bench_nursery, api_keys_file=keys
    ) as running:
        yield running


@pytest.fixture
def url(stack: ChaosStack) -> str:
    stack.tick()
    return next(iter(stack.urls.values()))


def client(url: str, key: str) -> httpx.Client:
    return httpx.Client(
        base_url=url, timeout=30, trust_env=False, headers={"Authorization": f"Bearer {key}"}
    )


def ask(url: str, key: str, tokens: int = 5, **more: Any) -> str:
    """The id of an answered request."""
    body = {"model": STUB_MODEL, "prompt": [CANARY] * 40, "max_tokens": tokens} | more
    with client(url, key) as caller:
        answer = caller.post("/v1/completions", json=body).raise_for_status().json()
    return f"{answer['id']}-0"


def overview(url: str, key: str) -> Overview:
    with client(url, key) as caller:
        answer = caller.get("/pdtasks/overview").raise_for_status()
    return msgspec.json.decode(answer.content, type=Overview)


def test_an_admin_sees_everything_and_others_their_own(url: str) -> None:
    asked = {key: ask(url, key) for key in (ALICE, BOB)}

    seen = overview(url, OLGA)
    assert seen.viewer.sees_all
    assert seen.viewer.may_act
    assert [(w.role, w.state) for w in seen.workers] == [
        *[("prefill", "ready")] * 2,
        *[("decode", "ready")] * 2,
    ]
    assert [(q.name, q.ready, q.consumers) for q in seen.queues][:2] == [
        ("prefill", 0, 2),
        ("decode", 0, 2),
    ]
    assert seen.problems == ()
    by_id = {request.id: request for request in seen.requests}
    for key, name in ((ALICE, "alice"), (BOB, "bob")):
        request = by_id[asked[key]]
        assert (request.key, request.state, request.output_tokens) == (name, "done", 5)
        assert [report.stage for report in request.stages] == ["prefill", "decode"]
    assert seen.window.requests >= 2
    assert seen.window.ttft.count >= 2
    assert seen.window.kv.blocks_loaded >= 2
    (store,) = wait_until(lambda: overview(url, OLGA).stores)
    assert 0 < store.used_bytes < store.max_bytes

    own = overview(url, ALICE)
    assert not own.viewer.may_act
    assert {request.key for request in own.requests} == {"alice"}
    assert asked[BOB] not in msgspec.json.encode(own).decode()


def test_the_report_of_a_request_is_its_owners_and_the_admins(url: str) -> None:
    request_id = ask(url, ALICE)
    answers = {}
    for key in (ALICE, OLGA, BOB):
        with client(url, key) as caller:
            answers[key] = caller.get(f"/pdtasks/requests/{request_id}")

    assert {key: answer.status_code for key, answer in answers.items()} == {
        ALICE: 200,
        OLGA: 200,
        BOB: 404,
    }
    report = msgspec.json.decode(answers[ALICE].content, type=RequestReport)
    assert list(report.sequences[0]) == ["prefill", "decode"]
    assert report.times[0].second_s is not None


def test_nothing_that_was_asked_or_answered_is_shown(url: str) -> None:
    ask(url, ALICE)
    with client(url, OLGA) as caller:
        texts = [caller.get("/pdtasks/overview").text]
        texts += [caller.get(f"/pdtasks/requests/{ask(url, OLGA)}").text]

    assert not [text for text in texts if str(CANARY) in text]


def test_whichever_api_process_is_asked_all_is_shown(stack: ChaosStack, url: str) -> None:
    one, other = stack.urls.values()
    before = overview(other, OLGA).window
    request_id = ask(one, ALICE)

    def seen() -> Overview | None:
        found = overview(other, OLGA)
        by_id = {request.id: request for request in found.requests}
        # (What the other one has told may be of while it was under way.)
        is_all = request_id in by_id and len(by_id[request_id].stages) == 2
        return found if is_all else None

    found = wait_until(seen, what="the other API process knows the request")
    assert len(found.others) == 1
    assert {found.api.pid, found.others[0].pid} == {part.process.pid for part in stack.apis}
    assert found.window.ttft.count > before.ttft.count
    assert found.window.tokens >= before.tokens + 5
    with client(other, ALICE) as caller:
        report = caller.get(f"/pdtasks/requests/{request_id}").raise_for_status()
    decoded = msgspec.json.decode(report.content, type=RequestReport)
    assert list(decoded.sequences[0]) == ["prefill", "decode"]
    # Others' keys see it there as little as where it was asked
    with client(other, BOB) as caller:
        assert caller.get(f"/pdtasks/requests/{request_id}").status_code == 404
    assert request_id not in [request.id for request in overview(other, BOB).requests]
    # Prometheus hears of both
    with client(other, OLGA) as caller:
        groups = caller.get("/pdtasks/targets").raise_for_status().json()
    apis = [g["targets"][0] for g in groups if g["labels"].get("job") == "pdtasks-api"]
    assert sorted(f"http://{address}" for address in apis) == sorted(stack.urls.values())
    assert len(groups) == 6


def test_prometheus_finds_all_by_what_one_api_process_tells(
    stack: ChaosStack, url: str, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text(OLGA)
    text = scrape_configuration(list(stack.urls.values()), asks_for_keys=True)
    text = text.replace("/etc/prometheus/pdtasks-api-key", str(key))
    configuration = tmp_path / "prometheus.yml"
    # (As long as one scrape may take.)
    configuration.write_text(f"global: {{scrape_interval: 3s}}\n{text}")
    (port,) = free_ports(1)
    prometheus = Process(
        "prometheus",
        [
            str(Path(PROMTOOL).with_name("prometheus")),
            f"--config.file={configuration}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        env=dict(os.environ),
        log=tmp_path / "prometheus.log",
    )
    prometheus.start()
    try:

        def asked(query: str) -> list[Any]:
            address = f"http://127.0.0.1:{port}/api/v1/query"
            try:
                answer = httpx.get(address, params={"query": query}, trust_env=False)
            except httpx.TransportError:
                return []  # it is coming up
            if answer.status_code == 503:
                return []  # it reads what it has stored
            result: list[Any] = answer.json().get("data", {}).get("result", [])
            return result

        # Each API process once, although both tell of both
        wait_until(lambda: len(asked("up == 1")) == 6, 60, "all are scraped")
        jobs = [one["metric"]["job"] for one in asked("up")]
        assert Counter(jobs) == {"pdtasks-api": 2, "pdtasks-workers": 4}
        before = asked("sum(vllm:request_success_total)")[0]["value"][1]
        for address in stack.urls.values():
            ask(address, ALICE)
        wait_until(
            lambda: (
                float(asked("sum(vllm:request_success_total)")[0]["value"][1]) >= float(before) + 2
            ),
            30,
            "what both count is summed",
        )
    finally:
        prometheus.stop(10)


def test_a_jobs_way_is_shown_to_its_owner(url: str) -> None:
    with client(url, BOB) as caller:
        body = {"model": STUB_MODEL, "prompt": [CANARY] * 9, "max_tokens": 3}
        job_id = caller.post("/v1/jobs", json=body).raise_for_status().json()["id"]

    def job(key: str) -> Any:
        return next((j for j in overview(url, key).jobs.recent if j.id == job_id), None)

    wait_until(lambda: job(BOB).state == "succeeded")
    assert [stage for stage, _, _ in job(BOB).stages] == ["prefill", "decode"]
    assert job(OLGA).key == "bob"
    assert job(ALICE) is None


def test_top_shows_a_running_stack(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request_id = ask(url, ALICE)
    monkeypatch.setenv("PDTASKS_API_KEY", OLGA)
    shown = CliRunner().invoke(main, ["top", "--once", "--url", url])
    told = CliRunner().invoke(main, ["top", "--json", "--url", url])

    assert (shown.exit_code, told.exit_code) == (0, 0)
    assert request_id[:20] in shown.output
    assert "prefill1@" in shown.output
    assert json.loads(told.output)["viewer"]["key"] == "olga"

    monkeypatch.delenv("PDTASKS_API_KEY")
    refused = CliRunner().invoke(main, ["top", "--once", "--url", url])
    assert refused.exit_code == 1
    assert "set PDTASKS_API_KEY" in refused.output


# -- the page --------------------------------------------------------------------------------------


def give_key(tab: Tab, key: str) -> None:
    """As somebody does who has a keyboard only."""
    tab.wait("document.querySelector('#ask-key').open")
    tab.run("document.querySelector('#key-value').focus()")
    tab.write(key)
    tab.press("Enter", 13, "\r")
    tab.wait("!document.querySelector('#main').hidden")


def test_the_page_shows_the_stack_and_loads_nothing_from_elsewhere(url: str, tab: Tab) -> None:
    request_id = ask(url, ALICE)
    tab.go(f"{url}/dashboard")
    give_key(tab, OLGA)
    tab.wait(f"document.querySelector('#requests').innerText.includes({request_id!r})")

    assert "4 of 4 ready" in tab.text("#workers-note")
    assert tab.run("document.querySelectorAll('#workers tr').length") == 4
    assert "ms" in tab.text("#cards .ttft .big")
    assert tab.run("document.querySelector('#cards .rate .chart-line').getAttribute('d')")
    widths = "[...document.querySelectorAll('#requests tr .bar')].map((bar) => bar.scrollWidth)"
    assert min(tab.run(widths)) > 50
    assert {address.partition("/dashboard")[0] for address in tab.requested} <= {
        url,
        f"{url}/pdtasks/overview?limit=16",
    }
    # (a browser tells of each 401; of a page that breaks its own policy it tells, too)
    assert [one for one in tab.complaints if "401" not in one] == []
    assert OLGA not in tab.run("document.documentElement.outerHTML")


def test_more_is_offered_where_there_is_more(url: str, tab: Tab) -> None:
    ask(url, BOB)
    tab.go(f"{url}/dashboard")
    give_key(tab, BOB)
    tab.wait("document.querySelectorAll('#requests tr').length > 0")
    assert tab.run("document.querySelector('#more').hidden")

    for _ in range(16):
        ask(url, BOB, tokens=1)
    tab.wait("!document.querySelector('#more').hidden")
    assert tab.run("document.querySelectorAll('#requests tr').length") == 15
    tab.run("document.querySelector('#more').click()")
    tab.wait("document.querySelectorAll('#requests tr').length > 16")
    assert tab.text("#more") == "Show fewer"


def test_a_request_opens_by_keyboard_and_shows_its_report(url: str, tab: Tab) -> None:
    request_id = ask(url, OLGA)
    tab.go(f"{url}/dashboard")
    give_key(tab, OLGA)
    own = f"[...document.querySelectorAll('button.id')].find((b) => b.title === {request_id!r})"
    tab.wait(f"{own} !== undefined")
    tab.run(f"{own}.focus()")
    tab.press("Enter", 13, "\r")
    tab.wait("document.querySelector('#report-body table') !== null")

    report = tab.text("#report")
    assert request_id in report
    assert "prefill" in report
    assert "decode1@" in report or "decode2@" in report
    tab.press("Escape", 27)
    tab.wait("!document.querySelector('#report').open")
    assert tab.run(f"document.activeElement === {own}"), "the focus is where it was"


def test_on_a_phone_nothing_is_beyond_the_edge(url: str, tab: Tab) -> None:
    ask(url, OLGA)
    tab.look(390, 844, phone=True, dark=True)
    tab.go(f"{url}/dashboard")
    give_key(tab, OLGA)
    tab.wait("document.querySelectorAll('#requests tr').length > 0")

    assert tab.run("document.documentElement.scrollWidth") == 390
    assert tab.run("document.querySelector('#requests .bar').getBoundingClientRect().width") > 300
    background = "getComputedStyle(document.body).backgroundColor"
    assert tab.run(background) == "rgb(14, 19, 26)"


def test_who_is_no_admin_has_no_buttons_for_workers(url: str, tab: Tab) -> None:
    tab.go(f"{url}/dashboard")
    give_key(tab, ALICE)
    tab.wait("document.querySelectorAll('#workers tr').length === 4")

    assert tab.run("[...document.querySelectorAll('#workers button')].every((b) => b.hidden)")
    with client(url, ALICE) as caller:
        assert caller.post("/pdtasks/workers/decode1/drain").status_code == 403
        wish = {"role": "both"}
        assert caller.post("/pdtasks/workers/decode1/role", json=wish).status_code == 403


def test_an_admin_drains_a_worker_by_its_button(stack: ChaosStack, url: str, tab: Tab) -> None:
    before = {w.name: w.pid for w in overview(url, OLGA).workers}
    name = next(name for name in before if name.startswith("decode2"))
    tab.go(f"{url}/dashboard")
    give_key(tab, OLGA)
    button = f"document.querySelector('[aria-label=\"Drain {name}\"]')"
    tab.wait(f"{button} !== null && !{button}.hidden")
    tab.run(f"{button}.click()")
    tab.wait("document.querySelector('#ask-drain').open")
    tab.run("document.querySelector('#ask-drain .act').click()")

    def is_another() -> bool:
        stack.tick()  # the process that ends is started again here: it is no stack of `up`
        return any(w.name == name and w.pid != before[name] for w in overview(url, OLGA).workers)

    wait_until(is_another, 60)
    assert {w.name for w in overview(url, OLGA).workers} == set(before)
    with client(url, OLGA) as caller:
        assert caller.post("/pdtasks/workers/nobody/drain").status_code == 404


def test_an_admin_changes_a_workers_role_by_its_button(
    stack: ChaosStack, url: str, tab: Tab
) -> None:
    before = {w.name: w.pid for w in overview(url, OLGA).workers}
    name = next(name for name in before if name.startswith("decode1"))

    def takes(role: str) -> None:
        button = f"document.querySelector('[aria-label=\"Role of {name}\"]')"
        tab.wait(f"{button} !== null && !{button}.hidden")
        tab.run(f"{button}.click()")
        tab.wait("document.querySelector('#ask-role').open")
        tab.run(f"document.querySelector('#ask-role [value={role}]').click()")
        tab.wait(f"document.querySelector('#workers .role[title={role}]') !== null")
        wait_until(lambda: (name, role, "ready") in seen())

    def seen() -> list[tuple[str, str, str]]:
        stack.tick()
        return [(w.name, w.role, w.state) for w in overview(url, OLGA).workers]

    tab.go(f"{url}/dashboard")
    give_key(tab, OLGA)
    takes("both")
    assert {w.name: w.pid for w in overview(url, OLGA).workers} == before, "it is the same process"
    takes("decode")


def test_a_role_that_cannot_be_is_refused(url: str) -> None:
    with client(url, OLGA) as caller:

        def asked(name: str, **wish: Any) -> httpx.Response:
            return caller.post(f"/pdtasks/workers/{name}/role", json=wish)

        unknown = asked("nobody", role="both")
        assert unknown.status_code == 404
        assert "no worker is called 'nobody'" in unknown.json()["error"]["message"]
        odd = asked("decode1", role="lord")
        assert odd.status_code == 400
        assert "role" in odd.json()["error"]["message"]


def test_a_page_whose_api_is_gone_says_so(url: str, tab: Tab) -> None:
    tab.go(f"{url}/dashboard")
    give_key(tab, OLGA)
    tab.call(
        "Network.emulateNetworkConditions",
        offline=True,
        latency=0,
        downloadThroughput=0,
        uploadThroughput=0,
    )
    tab.wait("document.querySelector('#status').innerText === 'the API does not answer'")
    tab.call(
        "Network.emulateNetworkConditions",
        offline=False,
        latency=0,
        downloadThroughput=-1,
        uploadThroughput=-1,
    )
    tab.wait("document.querySelector('#status').className === 'live'")


@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/app.js", "/dashboard/style.css"])
def test_the_page_is_open_and_allows_itself_little(path: str, url: str) -> None:
    answer = httpx.get(url + path, trust_env=False)

    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    assert httpx.get(f"{url}/dashboard/nothing.js", trust_env=False).status_code == 401


def test_pages_and_their_parts_name_no_other_place() -> None:
    folder = Path(__file__).parents[2] / "api" / "page"
    names = ("http://www.w3.org/2000/svg",)  # a name, not an address
    for file in folder.iterdir():
        text = file.read_text()
        for name in names:
            text = text.replace(name, "")
        assert "//" not in "".join(
            line for line in text.splitlines() if not line.strip().startswith("//")
        ).replace("// ", ""), file.name
