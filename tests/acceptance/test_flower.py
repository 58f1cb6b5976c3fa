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


def test_no_password_is_in_logs_or_command_lines(stack: Stack) -> None:
    import psutil

    urls = [stack.private(name) for name in ("broker_url", "bus_url", "kv_urls")]
    urls.append(stack.operator_url("kv"))
    secrets = {url.rpartition("@")[0].rpartition(":")[2] for url in urls}
    commands = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    assert len(secrets) == 4
    assert all(len(secret) > 15 for secret in secrets)
    for secret in secrets:
        assert secret not in stack.logs()
        assert not [c for c in commands if secret in c]


def test_the_operators_password_is_not_in_a_childs_environment(stack: Stack) -> None:
    import psutil

    secret = stack.operator_url("kv").rpartition("@")[0].rpartition(":")[2]
    content = json.loads((stack.home / "stack.json").read_text())
    pids = [member["pid"] for member in (*content["services"], *content["helpers"])]

    assert pids
    for pid in pids:
        assert secret not in str(psutil.Process(pid).environ())
    assert "operator" not in json.dumps(stack.status())
