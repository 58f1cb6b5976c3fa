"""Do Prometheus and Grafana of `deploy/compose` find what they are told of? Nothing is started."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from pdtasks.scraping import scrape_configuration
from tests.unit.test_alerts import promtool

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
COMPOSE: Final = DEPLOY / "compose"
#: Where the folder `deploy` is in the containers.
MOUNTED: Final = "/etc/pdtasks"


def read(name: str) -> Any:
    return yaml.safe_load((COMPOSE / name).read_text())


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read("compose.yaml")["services"]
    return found


def here(path: str) -> Path:
    """A path of the containers on this host."""
    assert path.startswith(f"{MOUNTED}/")
    return DEPLOY / path.removeprefix(f"{MOUNTED}/")


@pytest.mark.parametrize("name", list(services()))
def test_images_are_pinned_and_nothing_is_started_unasked(name: str) -> None:
    service = services()[name]

    assert re.fullmatch(r"[a-z0-9/_-]+:v?\d+\.\d+\.\d+", service["image"])
    assert service["profiles"] in (["observability"], ["exporters"])
    assert service["cap_drop"] == ["ALL"]


def test_all_listen_on_loopback_only() -> None:
    found = services()

    # (On the host's network `ports` would say nothing.)
    assert {(s["network_mode"], "ports" in s) for s in found.values()} == {("host", False)}
    assert "--web.listen-address=127.0.0.1:9090" in found["prometheus"]["command"]
    assert found["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    address = found["valkey-exporter"]["environment"]["REDIS_EXPORTER_WEB_LISTEN_ADDRESS"]
    assert address.startswith("127.0.0.1:")


def test_volumes_are_the_folder_of_all_this_and_named_ones() -> None:
    named = set(read("compose.yaml")["volumes"])
    for service in services().values():
        for volume in service.get("volumes", ()):
            source, target, *options = volume.split(":")
            if source in named:
                continue
            assert ((COMPOSE / source).resolve(), target) == (DEPLOY, MOUNTED)
            assert options == ["ro"]


def test_every_file_that_is_named_is_there() -> None:
    told = json.dumps([read("compose.yaml"), read("grafana/dashboards/pdtasks.yml")])
    paths = set(re.findall(rf"{MOUNTED}/[a-z/._-]+", told))

    assert len(paths) == 4
    assert [path for path in paths if not here(path).exists()] == []


def test_prometheus_takes_its_configuration_with_the_rules() -> None:
    told = promtool("check", "config", str(COMPOSE / "prometheus.yml"))

    assert "SUCCESS" in told
    assert re.search(r"[1-9]\d* rules? found", told)


def test_prometheus_finds_a_stack_as_the_command_says() -> None:
    told = yaml.safe_load(scrape_configuration(["http://127.0.0.1:8000"], asks_for_keys=False))

    assert read("prometheus.yml")["scrape_configs"][:1] == told["scrape_configs"]


def test_grafana_has_that_prometheus_and_our_dashboard() -> None:
    (source,) = read("grafana/datasources/prometheus.yml")["datasources"]
    (provider,) = read("grafana/dashboards/pdtasks.yml")["providers"]

    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    assert source["url"].removeprefix("http://") in "".join(services()["prometheus"]["command"])
    assert [file.name for file in here(provider["options"]["path"]).glob("*.json")] == [
        "pdtasks.json"
    ]
