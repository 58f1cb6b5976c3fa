"""Does the Grafana dashboard ask for what there is, in words that Prometheus understands?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from tests.unit.test_alerts import promtool
from tests.unit.test_observability_manual import in_code

FILE: Final = Path(__file__).parents[2] / "deploy" / "grafana" / "pdtasks.json"
#: What Grafana puts into queries.
_VARIABLES: Final = {"$__rate_interval": "1m"}
_METRIC: Final = re.compile(r"\b(?:pdtasks_|vllm:)[a-z0-9_]+")


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> Iterator[str]:
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"]
            for name, value in _VARIABLES.items():
                query = query.replace(name, value)
            yield query


def metrics() -> set[str]:
    """Names of metrics in its queries, those of histograms without what their samples add."""
    names = {name for query in queries() for name in _METRIC.findall(query)}
    return {name.removesuffix("_bucket") for name in names}


def test_prometheus_understands_each_query(tmp_path: Path) -> None:
    rules = [{"record": f"query:{n}", "expr": query} for n, query in enumerate(queries())]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))

    assert f"{len(rules)} rules found" in promtool("check", "rules", str(file))


def test_it_asks_for_metrics_of_ours_that_there_are() -> None:
    ours = {name for name in metrics() if name.startswith("pdtasks_")}

    assert len(ours) > 20
    assert sorted(ours - {name for name, _ in in_code()}) == []


def test_it_loads_into_any_grafana_without_edits() -> None:
    found = dashboard()

    (source,) = found["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    assert {panel["datasource"]["uid"] for panel in panels()} == {f"${{{source['name']}}}"}
    ids = [panel["id"] for panel in found["panels"]]
    assert len(ids) == len(set(ids))
    for panel in found["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]


def test_no_two_panels_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
