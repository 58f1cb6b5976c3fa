"""Flower shows the tasks of both stages, and never what was asked or answered."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import httpx

from tests.acceptance.running_stack import Stack, ask
from tests.waiting import wait_until

CANARY = "xylophone"


def test_flower_shows_both_stages_and_no_text(stack: Stack, client: httpx.Client) -> None:
    body = ask(client, f"Repeat the word {CANARY} {CANARY}.", "flower", max_tokens=16)
    assert body["choices"][0]["message"]["content"]
    with httpx.Client(base_url=stack.flower_url, timeout=20, follow_redirects=True) as flower:

        def tasks() -> dict[str, Any] | None:
            found: dict[str, Any] = flower.get("/api/tasks").json()
            ours = {k: t for k, t in found.items() if "chatcmpl-flower" in k}
            done = {t["name"] for t in ours.values() if t["state"] == "SUCCESS"}
            return ours if done == {"pdtasks.prefill", "pdtasks.decode"} else None

        ours = wait_until(tasks)
        pages = ["/", "/workers", "/tasks", "/api/tasks", "/api/workers", "/broker"]
        pages += [f"/task/{task_id}" for task_id in ours]
        pages += [f"/api/task/info/{task_id}" for task_id in ours]
        texts = {page: flower.get(page).text for page in pages}

    assert all(texts.values())
    assert not [page for page, text in texts.items() if CANARY in text]


def test_no_text_reaches_a_log(stack: Stack, client: httpx.Client) -> None:
    """Of good requests and of bad ones, whose error may quote them."""
    code = f"""
from pdtasks.errors import InvalidRequest
from pdtasks.pipeline import submit
from tests.waiting import wait_until
try:
    submit('{CANARY}', bad_words=['{CANARY}', '']).get(timeout=60)
except InvalidRequest as exc:
    print(exc)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=stack.env,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert CANARY in done.stdout
    ask(client, f"What is a {CANARY}? Explain {CANARY}.", "logs", max_tokens=24)

    assert CANARY not in stack.logs()


def test_flower_shows_no_result(stack: Stack) -> None:
    """Its API would, if it could reach them."""
    code = f"""
from pdtasks.pipeline import submit
result = submit('Repeat the word {CANARY}.', max_tokens=4)
print(result.id, bool(result.get(timeout=60)['text']))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=stack.env,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    request_id, has_text = done.stdout.split()
    answer = httpx.get(f"{stack.flower_url}/api/task/result/{request_id}", timeout=20)

    assert has_text == "True"
    assert answer.status_code == 503


def _password(url: str) -> str:
    return url.rpartition("@")[0].rpartition(":")[2]


def test_no_password_is_in_logs_or_command_lines(stack: Stack) -> None:
    import psutil

    urls = [stack.private(name) for name in ("broker_url", "bus_url", "kv_urls")]
    secrets = {_password(url) for url in (*urls, *stack.operator_urls().values())}
    secrets |= {_password(url) for url in _urls_of_children(stack)}
    commands = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    # Of broker, bus and kv; the operator's three; the API's two and Flower's one.
    assert len(secrets) == 9
    assert all(len(secret) > 15 for secret in secrets)
    for secret in secrets:
        assert secret not in stack.logs()
        assert not [c for c in commands if secret in c]


def _urls_of_children(stack: Stack) -> set[str]:
    """Without workers: Celery writes their titles over their environment."""
    import psutil

    names = ("PDTASKS_BROKER_URL", "PDTASKS_BUS_URL", "PDTASKS_KV_URLS", "PDTASKS_BROKER_API_URL")
    pids = stack.service_pids("api") + stack.service_pids("flower")
    environments = [psutil.Process(pid).environ() for pid in pids]
    return {env[name] for env in environments for name in names if env.get(name)}


def test_each_child_comes_as_its_own_user(stack: Stack, client: httpx.Client) -> None:
    ask(client, "What is a user?", "users", max_tokens=4)  # all of them are connected then
    with httpx.Client(base_url=stack.operator_url("broker_api"), timeout=20) as management:

        def users() -> set[str]:
            return {connection["user"] for connection in management.get("connections").json()}

        # (the list is some seconds old)
        wait_until(lambda: users() == {"pdtasks-api", "pdtasks-worker", "pdtasks-flower"})
    clients: Any = stack.bus.client_list()
    assert {c["user"] for c in clients} >= {"pdtasks-api", "pdtasks-worker", "pdtasks"}


def test_no_child_has_more_than_its_own_passwords(stack: Stack) -> None:
    import psutil

    secrets = [_password(url) for url in stack.operator_urls().values()]
    secrets += [_password(stack.private(name)) for name in ("broker_url", "bus_url")]
    content = json.loads((stack.home / "stack.json").read_text())
    pids = [member["pid"] for member in (*content["services"], *content["helpers"])]

    assert pids
    assert set(stack.operator_urls()) == {"broker", "broker_api", "bus", "kv"}
    for pid in pids:
        environment = str(psutil.Process(pid).environ())
        assert not [secret for secret in secrets if secret in environment]
    assert "operator" not in json.dumps(stack.status())
