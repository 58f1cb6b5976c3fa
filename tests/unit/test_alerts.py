"""Do the alert rules fire when they should, and can whoever is woken read what to do?"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.scraping import PROMTOOL
from tests.unit.test_observability_manual import in_code

ROOT: Final = Path(__file__).parents[2]
RULES: Final = ROOT / "deploy" / "prometheus" / "alerts.yml"
CASES: Final = Path(__file__).with_name("alerts_test.yml")
RUNBOOK: Final = (ROOT / "docs" / "runbook.md").read_text()


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


NAMES: Final = [rule["alert"] for rule in alerts()]


def promtool(*arguments: str) -> str:
    """What it says; fails when it is not content."""
    done = subprocess.run(
        [PROMTOOL, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_rules() -> None:
    assert f"{len(NAMES)} rules found" in promtool("check", "rules", str(RULES))


def test_each_alert_fires_when_it_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", str(CASES))


@pytest.mark.parametrize("name", NAMES)
def test_each_alert_has_a_case_in_which_it_fires(name: str) -> None:
    fires = {
        test["alertname"]
        for case in yaml.safe_load(CASES.read_text())["tests"]
        for test in case["alert_rule_test"]
        if test["exp_alerts"]
    }

    assert name in fires


@pytest.mark.parametrize("rule", alerts(), ids=NAMES)
def test_each_alert_links_to_an_entry_that_says_what_to_do(rule: dict[str, Any]) -> None:
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    entries = {
        title.lower(): text
        for title, text in re.findall(
            r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL
        )
    }

    assert page == "docs/runbook.md"
    assert anchor == rule["alert"].lower()
    for part in ("**It means:**", "**Look at:**", "**Do:**"):
        assert part in entries[anchor], part


def test_each_entry_of_the_runbook_is_of_an_alert() -> None:
    assert re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE) == NAMES


def test_the_runbook_and_the_rules_name_metrics_that_there_are() -> None:
    known = {name for name, _ in in_code()}
    named = set(re.findall(r"\bpdtasks_[a-z_]+", RULES.read_text() + RUNBOOK))

    assert len(named) > 15
    assert sorted(named - known) == []
