"""Who may use Flower, and who gets its login?"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from tornado.options import options

from pdtasks.cluster import children
from pdtasks.cluster.placement import place_workers
from pdtasks.errors import ConfigurationError
from pdtasks.flower_login import has_login, require_login
from pdtasks.settings import Settings

importlib.import_module("flower.options")  # which they are

LOGIN = "olga:a-secret-of-olgas"


class Unstarted:
    """What a child would be started with."""

    def __init__(self, _name: str, argv: list[str], *, env: dict[str, str], **_: Any) -> None:
        self.argv, self.env = argv, env


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLOWER_BASIC_AUTH", raising=False)


@pytest.fixture
def with_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWER_BASIC_AUTH", LOGIN)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_beyond_this_host_flower_needs_a_login(host: str) -> None:
    with pytest.raises(ConfigurationError, match="set FLOWER_BASIC_AUTH=NAME:PASSWORD"):
        require_login(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_on_this_host_it_needs_none(host: str) -> None:
    require_login(host)
    assert not has_login()


@pytest.mark.usefixtures("with_login")
def test_with_a_login_it_may_listen_anywhere() -> None:
    require_login("0.0.0.0")
    assert has_login()


@pytest.mark.parametrize("login", ["olga", "olga:", ":secret", f"{LOGIN},otto"])
def test_what_is_no_login_is_refused_and_not_quoted(
    login: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWER_BASIC_AUTH", login)
    with pytest.raises(ConfigurationError, match="has to be NAME:PASSWORD") as refused:
        require_login("127.0.0.1")
    assert "olga" not in str(refused.value)


@pytest.mark.usefixtures("with_login")
def test_the_login_is_flowers_alone_and_in_no_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "Process", Unstarted)
    settings = Settings(home=tmp_path, device="cpu")
    placement = place_workers(1, 1, device="cpu", engine_args={}).workers[0]
    make: Any = Unstarted
    others: list[Any] = [
        children.worker(settings, placement, 1, tmp_path, make=make),
        children.api(settings, tmp_path, make=make),
    ]
    monkeypatch.setattr(children._python, "__defaults__", (Unstarted,))
    flower: Any = children.flower(settings, "cookie")

    assert flower.env["FLOWER_BASIC_AUTH"] == LOGIN
    assert "FLOWER_UNAUTHENTICATED_API" not in flower.env
    assert LOGIN not in "".join(flower.argv)
    assert not [one for one in others if LOGIN in str(one.env)]


@pytest.mark.parametrize(("login", "read_only"), [("", True), (LOGIN, False)])
def test_without_a_login_flower_only_shows(
    login: str, read_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWER_BASIC_AUTH", login)
    config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "flowerconfig.py"))

    assert (config["read_only"], config["address"]) == (read_only, "127.0.0.1")


def test_a_flower_that_is_started_by_hand_is_held_to_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["flower"])
    options.address = "0.0.0.0"
    try:
        with pytest.raises(SystemExit, match=r"anybody who reaches 0\.0\.0\.0"):
            runpy.run_path(str(Path(__file__).parents[2] / "configs" / "flowerconfig.py"))
    finally:
        options.address = ""
