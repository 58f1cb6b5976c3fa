"""Who sees what, and who may act?"""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from api.viewing import require_admin, sees, viewer_of
from pdtasks.keys import Key, asker
from pdtasks.overview import Viewer


def view(
    key: Key | None = None, client: str = "127.0.0.1", origin: str | None = None
) -> tuple[Viewer, int]:
    """The viewer, and what he gets who wants to act."""
    app = FastAPI()

    @app.get("/viewer")
    async def viewer(request: Request) -> Any:
        asker.set(key)
        found = viewer_of(request)
        return {"key": found.key, "sees_all": found.sees_all, "may_act": found.may_act}

    @app.post("/act")
    async def act(request: Request) -> None:
        asker.set(key)
        require_admin(request)

    caller = TestClient(app, client=(client, 1))
    headers = {} if origin is None else {"Origin": origin}
    return (
        Viewer(**caller.get("/viewer", headers=headers).json()),
        caller.post("/act", headers=headers).status_code,
    )


def test_a_key_sees_its_own_and_does_nothing() -> None:
    found, acted = view(Key("alice", b""))

    assert found == Viewer(key="alice", sees_all=False, may_act=False)
    assert acted == 403
    assert sees(found, "alice")
    assert not sees(found, "bob")
    assert not sees(found, "")


def test_an_admins_key_sees_all_and_may_act_from_anywhere() -> None:
    found, acted = view(Key("olga", b"", admin=True), client="192.0.2.7", origin="https://x.test")

    assert found == Viewer(key="olga", sees_all=True, may_act=True)
    assert acted == 200
    assert sees(found, "bob")


def test_without_keys_everybody_sees_all_and_this_host_acts() -> None:
    assert view() == (Viewer(sees_all=True, may_act=True), 200)
    assert view(client="::1")[1] == 200
    assert view(client="192.0.2.7") == (Viewer(sees_all=True, may_act=False), 403)


@pytest.mark.parametrize(
    ("origin", "acted"),
    [
        ("http://127.0.0.1:8000", 200),
        ("http://localhost:8000", 200),
        ("https://evil.test", 403),
        ("http://127.0.0.1.evil.test", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_without_keys_web_pages_of_others_do_not_act(origin: str, acted: int) -> None:
    assert view(origin=origin)[1] == acted


def test_vllms_one_secret_makes_nobody_somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "x")

    assert view() == (Viewer(), 403)
