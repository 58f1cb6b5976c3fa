"""Which workers count for a request? Without network."""

from __future__ import annotations

import msgspec
import pytest
import valkey

from pdtasks.errors import (
    NoWorker,
)
from pdtasks.messages import WorkerStatus
from tests.unit.api.core_bench import (
    READY,
    Bench,
    one_that,
    presence,
    watch_until,
    with_bench,
)
from tests.unit.factories import an_output


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_stage_without_workers_is_refused_with_a_way_out(role: str) -> None:
    async def test(bench: Bench) -> None:
        bench.core.workers.require()
        bench.core.workers.known = [w for w in READY if w.role != role]

        with pytest.raises(NoWorker, match=f"-Q {role}"):
            bench.core.workers.require()

    with_bench(test)


@pytest.mark.parametrize(
    ("missing", "short", "is_alive"),
    [
        ("nobody", 0, True),
        ("prefill", 0, False),
        ("prefill", 64, True),  # decode workers do all of it
        ("decode", 0, False),
        ("decode", 64, False),
    ],
)
def test_a_model_is_alive_while_each_stage_that_it_needs_has_a_worker(
    missing: str, short: int, is_alive: bool
) -> None:
    async def test(bench: Bench) -> None:
        bench.core.workers.known = [
            msgspec.structs.replace(worker, short_prompt_tokens=short)
            for worker in READY
            if worker.role != missing
        ]
        assert bench.core.workers.is_alive == is_alive

    with_bench(test)


def test_one_that_starts_is_alive() -> None:
    async def test(bench: Bench) -> None:
        bench.core.workers.known = [msgspec.structs.replace(w, state="starting") for w in READY]
        assert bench.core.workers.is_alive

    with_bench(test)


@pytest.mark.parametrize("other", [{"model": "another"}, {"engine": "vllm 0.1"}])
def test_a_worker_of_another_model_or_vllm_does_not_count(other: dict[str, str]) -> None:
    async def test(bench: Bench) -> None:
        bench.core.workers.known = [READY[0], msgspec.structs.replace(READY[1], **other)]

        with pytest.raises(NoWorker, match="SmolLM2-135M-Instruct"):
            bench.core.workers.require()

    with_bench(test)


@pytest.mark.parametrize(
    ("state", "reason", "said"),
    [
        ("draining", "", "decode1@h stops"),
        ("starting", "", "decode1@h starts"),
        (
            "stalled",
            "its main loop does not turn",
            "decode1@h is stalled: its main loop does not turn",
        ),
    ],
)
def test_only_a_worker_that_is_ready_gets_new_requests_and_who_is_not_is_named(
    state: str, reason: str, said: str
) -> None:
    async def test(bench: Bench) -> None:
        bench.core.workers.known = [READY[0], one_that(state, reason)]

        with pytest.raises(NoWorker, match=said):
            bench.core.workers.require()

    with_bench(test)


@pytest.mark.parametrize(
    ("slots", "places"), [((16, 8), 24), ((16, 0), 0)], ids=["all say", "one does not"]
)
def test_workers_that_take_jobs_say_how_many(slots: tuple[int, int], places: int) -> None:
    def with_slots(worker: WorkerStatus, number: int) -> list[WorkerStatus]:
        """That, and one that takes no jobs."""
        away = msgspec.structs.replace(worker, slots=100, state="draining")
        return [msgspec.structs.replace(worker, slots=number), away]

    async def test(bench: Bench) -> None:
        prefill, decode = READY
        bench.core.workers.known = [
            *(w for number in slots for w in with_slots(prefill, number)),
            *with_slots(decode, 32),
        ]

        room = bench.core.workers.room()

        assert (room.prefill_workers, room.prefill_slots, room.decode_slots) == (2, places, 32)

    with_bench(test)


def test_a_stage_whose_workers_are_not_seen_for_a_while_has_the_places_that_it_had() -> None:
    async def test(bench: Bench) -> None:
        bench.core.workers.known = [msgspec.structs.replace(w, slots=16) for w in READY]
        before = bench.core.workers.room()
        bench.core.workers.known = []

        room = bench.core.workers.room()

        assert (room.prefill_workers, room.decode_workers) == (0, 0)
        assert (room.prefill_slots, room.decode_slots) == (16, 16)
        assert (before.prefill_slots, before.decode_slots) == (16, 16)

    with_bench(test)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_worker_that_has_come_this_moment_is_seen(
    monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    looks: list[int] = []

    def found() -> list[WorkerStatus]:
        looks.append(1)
        return READY

    presence(monkeypatch, found)

    async def test(bench: Bench) -> None:
        bench.core.workers.known = [w for w in READY if w.role != stage]

        await bench.core.workers.look_again()
        bench.core.workers.require()
        # and the bus is not asked while all are there
        await bench.core.workers.look_again()
        assert looks == [1]

    with_bench(test)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_stage_that_stays_without_a_worker_fails_who_waits_for_it(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    presence(monkeypatch, lambda: [w for w in READY if w.role != stage])

    async def test(bench: Bench) -> None:
        # Given one request that waits for prefill and one that waits for decode
        await bench.ask("in-prefill", "in-decode")
        await bench.take((0, an_output([7], "in-decode")))

        waiting = f"in-{stage}"
        await watch_until(bench, lambda: waiting in bench.failed)

        assert type(bench.failed[waiting]) is NoWorker
        assert list(bench.failed) == [waiting]

    with_bench(test, leaves=tuple({"in-prefill", "in-decode"} - {f"in-{stage}"}), stage_grace_s=0.1)


@pytest.mark.parametrize("state", ["draining", "starting", "stalled"])
def test_whoever_is_alive_in_any_state_counts_for_what_is_under_way(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    looks = 0

    def found() -> list[WorkerStatus]:
        nonlocal looks
        looks += 1
        return [READY[0], one_that(state)]

    presence(monkeypatch, found)

    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await bench.take((0, an_output([7])))

        await watch_until(bench, lambda: looks > 20)

        assert bench.failed == {}

    with_bench(test, leaves=("r",), stage_grace_s=0.02)


def test_a_worker_that_is_back_within_the_grace_saves_its_requests(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def restarted() -> list[WorkerStatus]:
        nonlocal looks
        looks += 1
        return READY if looks > 3 else READY[:1]

    presence(monkeypatch, restarted)

    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await bench.take((0, an_output([7])))
        await watch_until(bench, lambda: looks > 10)

        assert bench.failed == {}

    with_bench(test, leaves=("r",), stage_grace_s=10)


def test_a_bus_that_is_away_is_no_proof_that_workers_are_missing(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def away() -> list[WorkerStatus]:
        nonlocal looks
        looks += 1
        raise valkey.ConnectionError("refused")

    presence(monkeypatch, away)

    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await watch_until(bench, lambda: looks > 20)

        assert bench.failed == {}

    with_bench(test, leaves=("r",), stage_grace_s=0.05)


def test_where_the_bus_takes_no_need_the_workers_are_known_all_the_same() -> None:
    async def test(bench: Bench) -> None:
        room = bench.core.workers.room()

        await bench.core.workers.share(1.0)  # of a bus that is nowhere

        assert bench.core.workers.room() == room
        assert room.part == 1.0

    with_bench(test)
