"""Do autoscalers ask for what there is, and does it say how much each stage has to do?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import yaml

from tests.unit.test_alerts import promtool
from tests.unit.test_observability_manual import in_code

ROOT: Final = Path(__file__).parents[2]
RULES: Final = ROOT / "deploy" / "prometheus" / "scaling.yml"
CASES: Final = Path(__file__).with_name("scaling_test.yml")


def rules() -> list[dict[str, str]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    found: list[dict[str, str]] = group["rules"]
    return found


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "deploy" / "autoscaling" / name).read_text()))


def series() -> set[str]:
    return {rule["record"] for rule in rules()}


def test_prometheus_takes_the_rules_and_they_say_what_there_is_to_do() -> None:
    assert f"{len(rules())} rules found" in promtool("check", "rules", str(RULES))
    assert "SUCCESS" in promtool("test", "rules", str(CASES))


def test_they_are_made_of_metrics_of_ours_that_there_are() -> None:
    asked = {name for rule in rules() for name in re.findall(r"\bpdtasks_\w+", rule["expr"])}

    assert len(asked) >= 3
    assert asked <= {name for name, _ in in_code()}


def test_keda_asks_for_each_series_by_the_stage_that_it_is_of() -> None:
    asked = {
        trigger["metadata"]["query"]: scaled["spec"]["scaleTargetRef"]["name"]
        for scaled in documents("keda.yaml")
        for trigger in scaled["spec"]["triggers"]
    }

    assert asked.keys() == series()
    for query, target in asked.items():
        assert target == ("pdtasks-decode" if "decode" in query else "pdtasks-prefill")


def test_the_hpa_asks_for_the_same_with_the_same_limits() -> None:
    def number(text: str) -> float:
        return float(text.removesuffix("m")) / (1000 if text.endswith("m") else 1)

    (adapter,) = documents("prometheus-adapter.yaml")
    (rule,) = adapter["rules"]["external"]
    assert rule["name"] == {"matches": "pdtasks:(.*)", "as": "pdtasks_$1"}
    asked = {
        metric["external"]["metric"]["name"].replace("pdtasks_", "pdtasks:", 1): number(
            metric["external"]["target"].get("averageValue")
            or metric["external"]["target"]["value"]
        )
        for scaler in documents("hpa.yaml")
        for metric in scaler["spec"]["metrics"]
    }

    assert asked == {
        trigger["metadata"]["query"]: float(trigger["metadata"]["threshold"])
        for scaled in documents("keda.yaml")
        for trigger in scaled["spec"]["triggers"]
    }


def test_the_manual_names_each_series() -> None:
    manual = (ROOT / "docs" / "scaling.md").read_text()

    assert all(f"`{name}`" in manual for name in series())
