"""Does the utilisation law find the part that is full first, and as simulation finds it?"""

from __future__ import annotations

import random

import pytest

from pdtasks.bench.scale.bottleneck import (
    PLANNED,
    Load,
    answers_at_once,
    best_split,
    demands,
    messages_of_request,
    needed,
)
from pdtasks.bench.scale.costs import Costs
from pdtasks.bench.scale.gpu import H200
from pdtasks.bench.scale.system import Layout, System, poisson

COSTS = Costs(
    api_request_s=0.004,
    api_token_s=50e-6,
    api_message_s=100e-6,
    bus_request_s=0,
    bus_message_s=40e-6,
    broker_request_s=0.004,
    broker_cores=2,
)


def test_answers_at_once_are_those_of_littles_law() -> None:
    load = Load(6, 5000, 250)
    batch = answers_at_once(load, 2, H200)

    step = H200.step_of(0, 0, 0, 0, saves=False)
    step += batch * H200.sequence_s + batch * 5125 * H200.kv_token_s
    assert batch == pytest.approx(3 * 250 * step, rel=0.01)


def test_one_api_process_gets_a_message_a_step_and_many_get_one_a_token() -> None:
    load = Load(6, 5000, 250)
    batch = answers_at_once(load, 1, H200)

    assert messages_of_request(load, Layout(1, 1), H200) == pytest.approx(1 + 250 / batch)
    many = messages_of_request(load, Layout(1, 1, apis=1000), H200)
    assert many == pytest.approx(1 + 250, rel=0.02)


def test_parts_are_as_full_as_in_simulation() -> None:
    layout, load = Layout(3, 2, apis=2), Load(12, 5000, 250)
    rng = random.Random(1)
    asks = poisson(load.per_s, 600, load.prompt, load.answer, rng)

    simulated = System(layout, H200, COSTS).run(asks).utilisation

    law = demands(load, layout, H200, COSTS)
    for name in ("api", "bus", "broker", "prefill"):
        assert law[name] == pytest.approx(simulated[name], rel=0.15), name


def test_what_is_needed_keeps_each_part_below_what_is_planned() -> None:
    load, layout = Load(400, 5000, 250), Layout(80, 40)

    enough = needed(load, layout, H200, COSTS)

    busy = demands(load, enough, H200, COSTS)
    assert all(busy[name] <= PLANNED for name in ("api", "bus", "kv"))
    assert enough.apis > 1
    assert enough.buses > 1
    assert (enough.prefill, enough.decode) == (80, 40)


def test_kv_crosses_hosts_only_where_there_are_several() -> None:
    one, many = (
        demands(Load(10, 5000, 250), Layout(n, n, kv_servers=1), H200, COSTS)["kv"]
        for n in (4, 400)
    )

    size = 10 * 5000 * 131_072
    assert one == pytest.approx(size / COSTS.kv_put_bytes_per_s)
    put_and_get = size / COSTS.kv_put_bytes_per_s + size / COSTS.kv_get_bytes_per_s
    assert many == pytest.approx(put_and_get, rel=0.02)


def test_long_prompts_get_more_prefill_engines_than_long_answers_do() -> None:
    long_prompts, _ = best_split(8, 5000, 250, H200)
    long_answers, _ = best_split(8, 500, 500, H200)

    assert long_prompts > 4 > long_answers
