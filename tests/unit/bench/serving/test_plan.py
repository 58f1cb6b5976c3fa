"""Does a plan say what is run, and is a wrong one refused with a reason?"""

from __future__ import annotations

from pathlib import Path

import pytest

from pdtasks.bench.serving.plan import Plan, choose, read_plan
from pdtasks.bench.serving.run import check_devices
from pdtasks.errors import ConfigurationError, PdtasksError

OURS = Path(__file__).parents[4] / "bench" / "gpu" / "plan.yaml"

PLAN = """
engine: {max_model_len: 1024, dtype: float16}
topologies:
  pair: {kind: engines, devices: [[0], [1]]}
  split: {kind: pdtasks, prefill: 1, devices: [[0], [1], [2]], engine: {dtype: bfloat16}}
workloads:
  a: {prompt: 10, answer: 2, rates: [2, 4], seconds: 5}
  b: {prompt: 10, answer: 2, rates: [0], requests: 7}
"""


def plan_of(text: str, folder: Path) -> Plan:
    (folder / "plan.yaml").write_text(text)
    return read_plan(folder / "plan.yaml")


def test_a_topology_has_engines_of_two_kinds_on_devices(tmp_path: Path) -> None:
    plan = plan_of(PLAN, tmp_path)

    split = plan.topologies["split"]
    assert (split.prefill, split.decode, split.num_devices) == (1, 2, 3)
    assert plan.engine_of(split) == {"max_model_len": 1024, "dtype": "bfloat16"}
    assert plan.engine_of(plan.topologies["pair"])["dtype"] == "float16"


def test_a_workload_lasts_for_seconds_or_for_so_many_requests(tmp_path: Path) -> None:
    plan = plan_of(PLAN, tmp_path)

    timed, counted = plan.workloads["a"], plan.workloads["b"]
    assert [timed.num_requests(rate) for rate in timed.rates] == [10, 20]
    assert timed.expected_s(4) == 5
    assert (counted.num_requests(0), counted.expected_s(0)) == (7, 0)


def test_our_own_plan_has_the_topologies_and_workloads_of_the_documentation() -> None:
    plan = read_plan(OURS)

    assert {"pair", "nixl 1P1D", "pdtasks 1P1D", "four", "pdtasks 1P3D"} <= set(plan.topologies)
    assert {"128/8", "5000/250", "200/1000"} <= set(plan.workloads)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("kind: engines", "kind: engine", "Invalid enum value 'engine'"),
        ("devices: [[0], [1]]", "devices: []", "a list of devices for each engine"),
        ("devices: [[0], [1]]", "gpus: [[0], [1]]", "unknown field `gpus`"),
        ("prefill: 1", "prefill: 3", "at least one engine for each stage"),
        ("seconds: 5", "seconds: 5, requests: 3", "either `requests` or `seconds`"),
        ("rates: [2, 4]", "rates: [-2]", "positive"),
        ("rates: [2, 4]", "rates: []", "positive"),
        ("rates: [2, 4]", "rates: [0]", "needs `requests`"),
        ("engine:", "engine: [", "cannot be used"),
    ],
)
def test_a_wrong_plan_is_refused_with_the_reason(
    old: str, new: str, why: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=why):
        plan_of(PLAN.replace(old, new, 1), tmp_path)


def test_a_plan_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nothing\.yaml cannot be read"):
        read_plan(tmp_path / "nothing.yaml")


def test_names_are_chosen_and_unknown_ones_are_named(tmp_path: Path) -> None:
    plan = plan_of(PLAN, tmp_path)

    assert choose("topology", plan.topologies, ()) == ["pair", "split"]
    assert choose("topology", plan.topologies, ("split",)) == ["split"]
    with pytest.raises(ConfigurationError, match="no workload 'c', only 'a', 'b'"):
        choose("workload", plan.workloads, ("c",))


def test_a_topology_that_needs_more_devices_than_there_are_is_named(tmp_path: Path) -> None:
    plan = plan_of(PLAN, tmp_path)

    check_devices(plan, ["pair"], 2)
    with pytest.raises(PdtasksError, match="'split' needs 3 devices, this host has 2"):
        check_devices(plan, ["pair", "split"], 2)
