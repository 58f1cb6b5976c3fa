"""Which services does a child of `pdtasks up` hear of?"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from pdtasks.cluster import services as module
from pdtasks.cluster.console import Console
from pdtasks.cluster.process import StartFailed
from pdtasks.cluster.rights import User
from pdtasks.cluster.services import Services
from pdtasks.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """All services are configured."""
    return Settings(
        home=tmp_path,
        broker_url="amqp://broker/",
        broker_api_url="http://broker/",
        bus_url="valkey://:hush@one:1/0",
        bus_urls=("valkey://:hush@two:1/0", "valkey://:hush@three:1/0"),
        kv_urls=("valkey://kv:1/0",),
    )


@pytest.fixture
def said() -> io.StringIO:
    """What a person is told."""
    return io.StringIO()


@pytest.fixture
def services(said: io.StringIO) -> Services:
    return Services(Console(said), lambda: None)


@pytest.mark.parametrize(
    ("user", "unknown"),
    [
        (User.API, {"broker_api_url", "kv_urls"}),
        (User.WORKER, {"broker_api_url"}),
        (User.FLOWER, {"bus_url", "bus_urls", "kv_urls"}),
        (User.BALANCER, {"broker_url", "broker_api_url", "bus_urls", "kv_urls"}),
    ],
)
def test_a_child_hears_of_what_it_uses_and_of_nothing_else(
    services: Services, settings: Settings, user: User, unknown: set[str]
) -> None:
    told = services.settings_for(user, settings)

    urls = [name for name in Settings.model_fields if name.endswith(("_url", "_urls"))]
    assert {name for name in urls if not getattr(told, name)} == unknown
    # Empty and not left out: else it would be looked for in the stack's file.
    assert {f"PDTASKS_{name.upper()}" for name in urls} <= set(told.to_env())


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets all services answer but those at hosts that a test names."""

    def answer(*, but: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(module, "_CONFIGURED_S", 0.01)
        monkeypatch.setattr(module, "broker_accepts", lambda _: True)
        monkeypatch.setattr(
            module, "valkey_answers", lambda url: not any(f"@{host}:" in url for host in but)
        )

    return answer


def test_each_bus_that_answers_is_told(
    services: Services,
    settings: Settings,
    answering: Callable[..., None],
    said: io.StringIO,
) -> None:
    answering()

    services.check_configured(settings)

    assert "bus2 at valkey://:***@two:1/0 answers" in said.getvalue()
    assert "bus3 at valkey://:***@three:1/0 answers" in said.getvalue()
    assert "hush" not in said.getvalue()


def test_nothing_is_built_on_a_further_bus_that_does_not_answer(
    services: Services, settings: Settings, answering: Callable[..., None]
) -> None:
    answering(but=("three",))

    with pytest.raises(StartFailed, match=r"the bus3 at .*three:1/0 does not answer") as error:
        services.check_configured(settings)

    assert "hush" not in str(error.value)
