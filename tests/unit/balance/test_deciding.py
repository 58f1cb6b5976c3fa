"""When does a worker change to the other stage?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from pdtasks.balance.deciding import Decider, Decision, Targets
from pdtasks.balance.sight import Pool, Sight, sight_of
from pdtasks.messages import StoreFigures
from pdtasks.naming import DECODE, PREFILL
from pdtasks.overview import (
    Api,
    InFlight,
    Jobs,
    KvFlow,
    Overview,
    Quantiles,
    QueueView,
    Slot,
    Viewer,
    Window,
    WorkerView,
)

TARGETS = Targets(ttft_s=1.0, itl_s=0.05, looks=3, rest_s=20.0)


def a_worker(name: str, role: str, active: int = 0, **fields: Any) -> WorkerView:
    values: dict[str, Any] = {
        "name": f"{name}@h",
        "role": role,
        "host": "h",
        "pid": 1,
        "device": "cpu",
        "model": "m",
        "state": "ready",
        "reason": "",
        "active": active,
        "slots": 10,
        "kv_usage": 0.0,
        "since": 0.0,
    }
    return WorkerView(**values | fields)


def pool(role: str, *active: int) -> Pool:
    return Pool(tuple(a_worker(f"{role}{n}", role, a) for n, a in enumerate(active, start=1)))


#: Two of each, with little to do.
CALM = Sight(
    prefill=pool(PREFILL, 0, 0),
    decode=pool(DECODE, 2, 1),
    ttft_s=0.2,
    itl_s=0.01,
)
LATE = replace(CALM, waits_s=3.0, prompts=12)
SLOW = replace(CALM, itl_s=0.08, decode=pool(DECODE, 9, 9))


def after_looks(sight: Sight, looks: int = 3, targets: Targets = TARGETS) -> Decision:
    decider = Decider(targets)
    for n in range(looks - 1):
        assert not decider.decide(sight, n).worker
    return decider.decide(sight, looks)


def test_while_targets_are_met_nobody_changes() -> None:
    decision = after_looks(CALM, 10)
    assert not decision.worker
    assert decision.why.endswith("targets are met")


def test_late_first_tokens_take_the_decode_worker_with_least_to_do() -> None:
    decision = after_looks(LATE)
    assert (decision.worker, decision.role) == ("decode2@h", PREFILL)
    assert "first tokens are late, and decode can spare one: decode2@h to prefill" in decision.why
    assert "longest wait 3000 ms" in decision.why


def test_slow_answers_take_a_prefill_worker() -> None:
    decision = after_looks(SLOW)
    assert (decision.worker, decision.role) == ("prefill1@h", DECODE)


def test_a_wave_that_is_over_after_two_looks_changes_nothing() -> None:
    decider = Decider(TARGETS)
    for n, sight in enumerate([LATE, LATE, CALM, LATE, LATE, SLOW, LATE, LATE]):
        assert not decider.decide(sight, n).worker


def test_after_a_change_nothing_is_decided_until_its_effect_can_be_seen() -> None:
    decider = Decider(TARGETS)
    decided = [decider.decide(LATE, 2.0 * n) for n in range(16)]
    # The third look; then 20 s of rest, and three looks more.
    assert [n for n, one in enumerate(decided) if one.worker] == [2, 14]
    assert decided[3].why.endswith("the last change is to show first")


@pytest.mark.parametrize(
    ("sight", "why"),
    [
        (replace(LATE, itl_s=0.08), "both stages miss their targets: more workers are needed"),
        (replace(LATE, decode=pool(DECODE, 1)), "decode has no worker to spare"),
        (replace(LATE, decode=pool(DECODE, 5, 4)), "but decode would be too with one less"),
        (replace(LATE, itl_s=0.03), "but decode would be too with one less"),
        (replace(SLOW, prefill=pool(PREFILL, 1)), "prefill has no worker to spare"),
        (replace(SLOW, prompts=3), "but prefill would be with one less"),
        (replace(SLOW, ttft_s=0.6), "but prefill would be with one less"),
        (
            replace(SLOW, prefill=Pool(), decode=Pool()),
            "no worker that is ready serves one stage alone",
        ),
        (replace(LATE, is_settled=False), "waiting for a worker that starts or changes"),
    ],
)
def test_who_cannot_spare_a_worker_keeps_it_and_says_why(sight: Sight, why: str) -> None:
    decision = after_looks(sight, 5)
    assert not decision.worker
    assert why in decision.why


def test_pools_keep_their_least_size() -> None:
    assert not after_looks(LATE, 5, replace(TARGETS, least_decode=2)).worker
    assert not after_looks(SLOW, 5, replace(TARGETS, least_prefill=2)).worker


def test_kv_that_is_nearly_full_is_slow_too() -> None:
    full = Pool(tuple(a_worker(f"d{n}", DECODE, 1, kv_usage=0.95) for n in range(2)))
    assert after_looks(replace(CALM, decode=full)).role == DECODE


def test_a_sight_is_what_the_last_seconds_say_of_this_models_workers() -> None:
    nothing = Quantiles()
    found = Overview(
        at=100.0,
        api=Api(host="h", pid=1, since=0.0, version="", model="m"),
        viewer=Viewer(key="", sees_all=True, may_act=True),
        workers=(
            a_worker("prefill1", PREFILL),
            a_worker("decode1", DECODE, 3),
            a_worker("both1", "both"),
            a_worker("decode2", DECODE, state="stalled"),
            a_worker("decode3", DECODE, model="another", state="starting"),
        ),
        queues=(QueueView(name=PREFILL, oldest_s=2.5), QueueView(name=DECODE, oldest_s=9.0)),
        in_flight=InFlight(in_line=4, prefill=2, decode=3),
        window=Window(
            seconds=60.0,
            slot_s=5.0,
            requests=0,
            failed=0,
            tokens=0,
            tokens_per_s=0.0,
            ttft=nothing,
            gap=nothing,
            itl=nothing,
            end_to_end=nothing,
            kv=KvFlow(),
            slots=(
                Slot(at=80.0, requests=50, ttft_p50_s=9.0),
                Slot(at=90.0, requests=3, ttft_p50_s=1.0, itl_p50_s=0.02),
                Slot(at=95.0, requests=1, ttft_p50_s=2.0),
            ),
        ),
        stores=(StoreFigures(used_bytes=0, max_bytes=0, hits=0, misses=0, evicted=0),),
        requests=(),
        jobs=Jobs(),
    )

    sight = sight_of(found)

    assert [w.name for w in sight.prefill.workers] == ["prefill1@h"]
    assert [w.name for w in sight.decode.workers] == ["decode1@h"]
    assert sight.is_settled
    assert (sight.waits_s, sight.prompts) == (2.5, 6)
    assert (sight.ttft_s, sight.itl_s) == (1.25, 0.02)
    changing = replace_worker(found, state="changing")
    assert not sight_of(changing).is_settled


def replace_worker(found: Overview, **fields: Any) -> Overview:
    first, *rest = found.workers
    return msgspec.structs.replace(found, workers=(msgspec.structs.replace(first, **fields), *rest))
