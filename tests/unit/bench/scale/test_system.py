"""Does a simulated stack take the time that its parts take, and wait as queueing theory says?"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from pdtasks.bench.scale.costs import Costs
from pdtasks.bench.scale.gpu import KV_BYTES_OF_TOKEN, Gpu
from pdtasks.bench.scale.system import Ask, Layout, Outcome, System, poisson

GPU = Gpu()
FREE = Costs(
    api_request_s=0,
    api_prompt_token_s=0,
    api_token_s=0,
    api_message_s=0,
    bus_request_s=0,
    bus_message_s=0,
    broker_request_s=0,
    worker_request_s=0,
    publish_s=0,
    handover_s=0,
)


def run(layout: Layout, asks: list[Ask], costs: Costs = FREE, gpu: Gpu = GPU) -> Outcome:
    return System(layout, gpu, costs, short_prompt=0).run(asks)


def test_one_request_alone_takes_the_sum_of_its_parts() -> None:
    costs = Costs(
        api_request_s=0.01,
        api_prompt_token_s=1e-6,
        api_token_s=0.001,
        api_message_s=0.002,
        bus_message_s=0.003,
        broker_request_s=0.008,
        worker_request_s=0.012,
        publish_s=0.005,
        handover_s=0.007,
    )

    (sample,) = run(Layout(1, 1), [Ask(1.0, 1000, 3)], costs).samples

    back = 0.003 + 0.002 + 0.001
    prefill = GPU.step_of(1000, 0, 0, 0, saves=True)
    first_step = GPU.step_of(0, 1, 1001, 1000, saves=False)
    assert sample.ttft == pytest.approx(0.01 + 0.001 + 0.004 + 0.005 + 0.006 + prefill + back)
    gap, next_gap = sample.gaps
    # The worker hands over when it has the token, not when the client has it.
    assert gap == pytest.approx(0.004 + 0.007 + 0.006 + first_step)
    assert next_gap == pytest.approx(GPU.step_of(0, 1, 1002, 0, saves=False))


def test_prompts_that_fill_their_steps_wait_as_in_m_d_1() -> None:
    service = GPU.saving * GPU.prompt_step_s(GPU.step_tokens)
    load = 0.6
    asks = poisson(load / service, 20_000, GPU.step_tokens, 1, random.Random(1))

    outcome = run(Layout(1, 1), asks)

    mean = sum(sample.ttft for sample in outcome.samples) / len(outcome.samples)
    assert mean == pytest.approx(service + load * service / (2 * (1 - load)), rel=0.05)
    assert outcome.utilisation["prefill"] == pytest.approx(load, rel=0.03)


def test_prompts_go_to_prefill_engines_in_turn() -> None:
    asks = [Ask(0.0, 4000, 1) for _ in range(4)]

    one, four = (run(Layout(engines, 1), asks) for engines in (1, 4))

    assert {sample.ttft for sample in four.samples} == {GPU.saving * GPU.prompt_step_s(4000)}
    assert max(sample.ttft for sample in one.samples) > 2 * GPU.prompt_step_s(4000)


def test_replies_of_an_api_process_go_over_one_bus_whatever_the_engine() -> None:
    slow = replace(FREE, bus_message_s=0.1)
    asks = [Ask(0.0, 500, 1), Ask(0.0, 500, 1)]

    shared = run(Layout(2, 1, apis=2), asks, slow)
    own = run(Layout(2, 1, apis=2, buses=2), asks, slow)

    prefill = GPU.saving * GPU.prompt_step_s(500)
    assert [round(s.ttft - prefill, 6) for s in shared.samples] == [0.1, 0.2]
    assert [round(s.ttft - prefill, 6) for s in own.samples] == [0.1, 0.1]


def test_between_hosts_kv_goes_through_the_kv_servers() -> None:
    ask = [Ask(0.0, 5000, 2)]

    (within,) = run(Layout(1, 1), ask).samples
    (between,) = run(Layout(1, 1, kv_servers=2), ask).samples

    size = 5000 * KV_BYTES_OF_TOKEN
    least = (1 - FREE.kv_hidden) * size / FREE.kv_put_bytes_per_s + size / FREE.kv_get_bytes_per_s
    assert between.gaps[0] - within.gaps[0] == pytest.approx(least, rel=0.01)


def test_engines_of_both_stages_hand_nothing_over() -> None:
    (sample,) = run(Layout(both=1), [Ask(0.0, 5000, 3)]).samples

    assert sample.ttft == pytest.approx(GPU.prompt_step_s(5000))
    assert sample.gaps[0] == pytest.approx(GPU.step_of(0, 1, 5001, 0, saves=False))


def test_short_prompts_are_computed_by_decode_engines_until_those_have_enough() -> None:
    asks = [Ask(0.0, 200, 2) for _ in range(3)]
    system = System(Layout(1, 1), GPU, FREE, short_prompt=200)

    outcome = system.run(asks)

    together = GPU.step_of(400, 0, 0, 0, saves=False)
    alone = GPU.step_of(200, 0, 0, 0, saves=True)
    assert sorted(s.ttft for s in outcome.samples) == pytest.approx([alone, together, together])
