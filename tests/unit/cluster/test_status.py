"""What does `pdtasks status` show?"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pdtasks.cluster import status as module
from pdtasks.cluster.stack import write_stack
from pdtasks.cluster.status import Row, Status, format_status, read_status
from pdtasks.messages import WorkerStatus
from pdtasks.running_stack import Identity, Member, Stack, identify
from pdtasks.settings import Settings

_HERE = socket.gethostname()
_DEAD = 2**22 + 1  # above any pid

Answering = Callable[..., None]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Answering:
    """Let services and workers answer as given, without any of them."""

    def answer(
        *, urls: Sequence[str] = (), http: int | None = None, workers: Sequence[WorkerStatus] = ()
    ) -> None:
        monkeypatch.setattr(module, "broker_accepts", lambda url: url in urls)
        monkeypatch.setattr(module, "valkey_answers", lambda url: url in urls)
        monkeypatch.setattr(module, "http_status", lambda url: http)
        monkeypatch.setattr(module, "_present_workers", lambda url: list(workers))

    return answer


def _settings(home: Path, **values: object) -> Settings:
    alone = {"home": home, "broker_url": None, "bus_url": None, "bus_urls": (), "kv_urls": ()}
    return Settings(**{**alone, **values})  # type: ignore[arg-type]


def _own() -> Identity:
    own = identify(os.getpid())
    assert own is not None
    return own


def _member(name: str, role: str, identity: Identity) -> Member:
    return Member(name, role, identity.pid, identity.started, "/log")


def _worker(
    name: str, role: str, pid: int, state: str = "ready", host: str = _HERE
) -> WorkerStatus:
    return WorkerStatus(
        name=name, role=role, host=host, pid=pid, state=state, active=3, kv_usage=0.25
    )


def _stack(home: Path, *members: Member, state: str = "ready") -> None:
    own = _own()
    write_stack(
        home,
        Stack(
            pid=own.pid,
            pid_started=own.started,
            state=state,  # type: ignore[arg-type]
            urls={"api": "http://127.0.0.1:1", "bus": "valkey://:pw@127.0.0.1:2/0"},
            services=members,
        ),
    )


def test_without_stack_and_urls_nothing_runs(tmp_path: Path, answering: Answering) -> None:
    answering()

    status = read_status(_settings(tmp_path))

    assert not status.anything
    assert status.to_json() == {"services": (), "workers": (), "urls": {}}
    assert "pdtasks up" in format_status(status)


def test_a_service_that_answers_is_ready_and_another_that_runs_is_starting(
    tmp_path: Path, answering: Answering
) -> None:
    _stack(tmp_path, _member("valkey bus", "bus", _own()), _member("api", "api", _own()))
    answering(urls=["valkey://:pw@127.0.0.1:2/0"], http=None)

    status = read_status(_settings(tmp_path))

    assert status.services == (
        Row("valkey bus", "bus", os.getpid(), "ready"),
        Row("api", "api", os.getpid(), "starting"),
    )


def test_each_api_process_is_asked_for_itself(
    tmp_path: Path, answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, members = _own(), [_member(f"api{number}", "api", _own()) for number in (1, 2, 3)]
    write_stack(
        tmp_path,
        Stack(
            pid=own.pid,
            pid_started=own.started,
            urls={"api": "http://127.0.0.1:1,http://127.0.0.1:2,http://127.0.0.1:3"},
            services=(*members[:2], replace(members[2], pid=_DEAD)),
        ),
    )
    answering()
    monkeypatch.setattr(
        module, "http_status", lambda url: 200 if url.endswith(":2/health") else None
    )

    services = read_status(_settings(tmp_path)).services

    assert [(row.name, row.state) for row in services] == [
        ("api1", "starting"),
        ("api2", "ready"),
        ("api3", "dead"),
    ]


def test_a_service_whose_process_is_gone_is_dead(tmp_path: Path, answering: Answering) -> None:
    _stack(tmp_path, _member("valkey bus", "bus", Identity(_DEAD, 1)))
    answering(urls=["valkey://:pw@127.0.0.1:2/0"])

    assert [row.state for row in read_status(_settings(tmp_path)).services] == ["dead"]


def test_workers_are_shown_as_they_say_with_their_requests(
    tmp_path: Path, answering: Answering
) -> None:
    _stack(tmp_path, _member("prefill1", "prefill", _own()))
    own = _worker(f"prefill1@{_HERE}", "prefill", os.getpid(), "draining")
    elsewhere = _worker("decode9@other", "decode", 5, host="other")
    answering(workers=[elsewhere, own])

    assert read_status(_settings(tmp_path)).workers == (
        Row(f"prefill1@{_HERE}", "prefill", os.getpid(), "draining", 3, 0.25),
        Row("decode9@other", "decode", 5, "ready", 3, 0.25),
    )


def test_a_worker_that_says_nothing_yet_is_starting(tmp_path: Path, answering: Answering) -> None:
    _stack(tmp_path, _member("prefill1", "prefill", _own()))
    answering()

    assert read_status(_settings(tmp_path)).workers == (
        Row("prefill1", "prefill", os.getpid(), "starting", 0, 0.0),
    )


def test_the_last_sign_of_life_of_a_killed_worker_does_not_make_it_alive(
    tmp_path: Path, answering: Answering
) -> None:
    answering(
        urls=["valkey://:pw@127.0.0.1:2/0"],
        workers=[_worker(f"byhand@{_HERE}", "decode", _DEAD)],
    )

    status = read_status(_settings(tmp_path, bus_url="valkey://:pw@127.0.0.1:2/0"))

    assert [row.state for row in status.workers] == ["dead"]


def test_a_worker_that_was_started_again_is_shown_once(
    tmp_path: Path, answering: Answering
) -> None:
    _stack(tmp_path, _member("decode1", "decode", _own()))
    answering(workers=[_worker(f"decode1@{_HERE}", "decode", _DEAD)])

    assert read_status(_settings(tmp_path)).workers == (
        Row("decode1", "decode", os.getpid(), "starting", 0, 0.0),
    )


def test_configured_services_and_workers_started_by_hand_are_shown_without_a_stack(
    tmp_path: Path, answering: Answering
) -> None:
    urls = {
        "broker_url": "amqp://u:pw@127.0.0.1:1//",
        "bus_url": "valkey://:pw@127.0.0.1:2/0",
        "bus_urls": ("valkey://:pw@127.0.0.1:5/0", "valkey://:pw@127.0.0.1:6/0"),
        "kv_urls": ("valkey://:pw@127.0.0.1:3/0", "valkey://:pw@127.0.0.1:4/0"),
    }
    answering(
        urls=[urls["broker_url"], urls["bus_url"], urls["bus_urls"][1], urls["kv_urls"][0]],
        workers=[_worker(f"a@{_HERE}", "prefill", os.getpid())],
    )

    status = read_status(_settings(tmp_path, **urls))

    assert [(row.role, row.pid, row.state) for row in status.services] == [
        ("broker", None, "ready"),
        ("bus", None, "ready"),
        ("bus2", None, "dead"),  # it does not answer
        ("bus3", None, "ready"),
        ("kv", None, "dead"),  # one of the two does not answer
    ]
    assert "pw" not in f"{status} {format_status(status)}"
    assert [row.name for row in status.workers] == [f"a@{_HERE}"]


def test_everything_drains_while_the_stack_stops(tmp_path: Path, answering: Answering) -> None:
    _stack(
        tmp_path,
        _member("api", "api", _own()),
        _member("prefill1", "prefill", _own()),
        state="draining",
    )
    answering(http=200)

    status = read_status(_settings(tmp_path))

    assert {row.state for row in (*status.services, *status.workers)} == {"draining"}


def test_after_a_killed_supervisor_only_what_still_runs_is_shown(
    tmp_path: Path, answering: Answering
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pass
    members = (_member("api", "api", _own()), _member("kv", "kv", Identity(_DEAD, 1)))
    write_stack(tmp_path, Stack(pid=child.pid, pid_started=1, services=members))
    answering()

    status = read_status(_settings(tmp_path))

    assert status.services == (Row("api", "api", os.getpid(), "draining"),)


def test_no_password_is_shown(tmp_path: Path, answering: Answering) -> None:
    _stack(tmp_path, _member("api", "api", _own()))
    answering(http=200)

    status = read_status(_settings(tmp_path))

    assert status.urls["bus"] == "valkey://:***@127.0.0.1:2/0"
    assert "pw" not in format_status(status)
    assert "pw" not in str(status.to_json())


def test_the_table_names_every_column_and_url() -> None:
    status = Status(
        (Row("api", "api", 7, "ready"),),
        (Row("prefill1@h", "prefill", 8, "stalled", 2, 0.126, "it does not turn"),),
        {"api": "http://127.0.0.1:8000"},
    )

    assert format_status(status).splitlines() == [
        "name        role     pid  state                       active  kv",
        "api         api      7    ready                       -       -",
        "prefill1@h  prefill  8    stalled (it does not turn)  2       13%",
        "",
        "api  http://127.0.0.1:8000",
    ]
