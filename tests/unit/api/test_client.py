"""The engine as the API sees it: replies are put together to one answer. Without network."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import Future
from typing import Any

import msgspec
import pytest
import valkey
from prometheus_client import REGISTRY
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import FinishReason

from api import client
from api.client import PipelineCore, _to_http
from pdtasks import background
from pdtasks.engine.arguments import ENGINE_VERSION
from pdtasks.engine.wire import decode_request
from pdtasks.errors import (
    BrokerUnavailable,
    IncompatibleWorker,
    InvalidRequest,
    NoWorker,
    PdtasksError,
    RepliesLost,
    RequestTimeout,
    WorkerLost,
)
from pdtasks.messages import Failure, PrefillJob, StageReport, StepReply, WorkerStatus
from pdtasks.settings import Settings
from tests.unit.factories import a_reply, a_request, an_output
from tests.waiting import until

READY = [
    WorkerStatus(
        name=f"{role}1@h",
        role=role,
        host="h",
        pid=1,
        state="ready",
        model="SmolLM2-135M-Instruct",
        engine=ENGINE_VERSION,
    )
    for role in ("prefill", "decode")
]


class StubBroker:
    """Stands for both of the API's connections to RabbitMQ and remembers what was said."""

    def __init__(self) -> None:
        self.published: list[PrefillJob] = []
        self.aborted: list[str] = []
        self.unsent: list[Future[None]] = []
        self.away = False
        self.hangs = False
        self.may_close = threading.Event()
        self.may_close.set()
        self.num_closed = 0

    def send(self, job: PrefillJob, reply_to: str | None) -> Future[None]:
        sent: Future[None] = Future()
        if self.hangs:
            self.unsent.append(sent)
        elif self.away:
            sent.set_exception(BrokerUnavailable("RabbitMQ cannot be reached: is it running?"))
        else:
            self.published.append(job)
            sent.set_result(None)
        return sent

    def abort(self, request_ids: Iterable[str]) -> None:
        self.aborted += request_ids

    def close(self) -> None:
        self.may_close.wait(10)
        self.num_closed += 1


class StubStream:
    """Takes the place of the API's reply stream; what it does is a test's."""

    name = "pd:reply:stub"

    def __init__(self) -> None:
        self.replies: list[StepReply] = []
        self.surprises = {"keep": 0, "read": 0}
        self.calls = {"keep": 0, "read": 0}
        self.hangs = False  # its close
        self.fails = False  # its close
        self.stays = False  # its `keep`, also when it is cancelled

    async def open(self) -> None:
        """Nothing to open."""

    async def keep(self) -> None:
        self._surprise("keep")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not self.stays:
                raise
            await asyncio.Event().wait()

    async def read(self) -> AsyncIterator[StepReply]:
        self._surprise("read")
        for reply in self.replies:
            yield reply
        await asyncio.Event().wait()

    def _surprise(self, name: str) -> None:
        self.calls[name] += 1
        if self.surprises[name]:
            self.surprises[name] -= 1
            raise KeyError("surprise")

    async def close(self) -> None:
        if self.fails:
            raise KeyError("surprise")
        if self.hangs:
            await asyncio.Event().wait()


class StubBus:
    """A bus whose end is a test's."""

    def __init__(self) -> None:
        self.closed = False
        self.hangs = False
        self.fails = False

    async def aclose(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.fails:
            raise valkey.ConnectionError("gone")
        self.closed = True


class Bench:
    """A `PipelineCore` whose bus and broker are stubs."""

    def __init__(self, **settings: Any) -> None:
        values = {"broker_url": "amqp://nowhere", "bus_url": "valkey://nowhere"}
        self.broker = StubBroker()
        self.stream = StubStream()
        self.failed: dict[str, PdtasksError] = {}
        self.forgotten: set[str] = set()  # requests that vLLM knows nothing of
        self.core = PipelineCore(
            Settings(**values | settings),
            self._fail,
            is_known=lambda request_id: request_id not in self.forgotten,
            publisher=self.broker,
            aborter=self.broker,
            stream=self.stream,
        )
        self.core.workers = READY

    async def _fail(self, request_id: str, error: PdtasksError) -> None:
        assert request_id not in self.failed, "a request fails once"
        self.failed[request_id] = error

    async def ask(self, *request_ids: str) -> None:
        for request_id in request_ids or ("r",):
            await self.core.add_request_async(a_request(request_id))
        await asyncio.gather(*self.core._publications)

    async def take(self, *outputs: Any, **fields: Any) -> None:
        await self.core._take(a_reply(*outputs, **fields))

    def answer(self) -> list[tuple[str, list[int], FinishReason | None]]:
        """What vLLM's front half has got."""
        taken = []
        while not self.core._outputs.empty():
            outputs = self.core._outputs.get_nowait().outputs
            taken += [(o.request_id, list(o.new_token_ids), o.finish_reason) for o in outputs]
        return taken

    @property
    def aborted(self) -> list[str]:
        """What the workers were told to drop."""
        return self.broker.aborted

    def check(self, leaves: frozenset[str]) -> None:
        """Nothing is kept but what the test leaves unanswered on purpose."""
        assert set(self.core._open) == leaves


def with_bench(
    test: Callable[[Bench], Awaitable[None]], *, leaves: tuple[str, ...] = (), **settings: Any
) -> None:
    """Run `test`. `leaves`: the requests that it leaves open."""

    async def run() -> None:
        bench = Bench(**settings)
        async with asyncio.timeout(10):
            await test(bench)
        bench.check(frozenset(leaves))

    asyncio.run(run())


# -- asking ------------------------------------------------------------------------------------


def test_a_request_is_published_as_the_client_meant_it() -> None:
    async def test(bench: Bench) -> None:
        before = time.time()
        await bench.ask("r")

        (job,) = bench.broker.published
        assert job.request_id == "r"
        assert job.engine == ENGINE_VERSION
        assert job.request is not None
        assert decode_request(job.request) == a_request("r")
        assert before + 30 <= job.deadline <= time.time() + 30

    with_bench(test, leaves=("r",), request_timeout_s=30)


def test_a_broker_that_is_away_fails_the_request_alone() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a")
        bench.broker.away = True
        await bench.ask("b")

        assert [type(e) for e in bench.failed.values()] == [BrokerUnavailable]
        await bench.take((0, an_output([7], "a", FinishReason.STOP)))
        assert bench.answer() == [("a", [7], FinishReason.STOP)]

    with_bench(test)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_stage_without_workers_is_refused_with_a_way_out(role: str) -> None:
    async def test(bench: Bench) -> None:
        bench.core.require_workers()
        bench.core.workers = [w for w in READY if w.role != role]

        with pytest.raises(NoWorker, match=f"-Q {role}"):
            bench.core.require_workers()

    with_bench(test)


@pytest.mark.parametrize("other", [{"model": "another"}, {"engine": "vllm 0.1"}])
def test_a_worker_of_another_model_or_vllm_does_not_count(other: dict[str, str]) -> None:
    async def test(bench: Bench) -> None:
        bench.core.workers = [READY[0], msgspec.structs.replace(READY[1], **other)]

        with pytest.raises(NoWorker, match="SmolLM2-135M-Instruct"):
            bench.core.require_workers()

    with_bench(test)


def test_an_id_that_amqp_cannot_carry_is_refused() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("x" * 201)

        (error,) = bench.failed.values()
        assert type(error) is InvalidRequest
        assert not bench.broker.published

    with_bench(test)


def one_that(state: str, reason: str = "") -> WorkerStatus:
    """A decode worker in another state than ready."""
    return msgspec.structs.replace(READY[1], state=state, reason=reason)


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
        bench.core.workers = [READY[0], one_that(state, reason)]

        with pytest.raises(NoWorker, match=said):
            bench.core.require_workers()

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
        bench.core.workers = [w for w in READY if w.role != stage]

        await bench.core.look_again()
        bench.core.require_workers()
        # and the bus is not asked while all are there
        await bench.core.look_again()
        assert looks == [1]

    with_bench(test)


def test_what_cannot_be_sent_fails_its_request_and_leaves_nothing() -> None:
    async def test(bench: Bench) -> None:
        odd = a_request("odd")
        assert odd.sampling_params is not None
        odd.sampling_params.top_k = 2**64

        await bench.core.add_request_async(odd)
        await until(lambda: "odd" in bench.failed)

        assert type(bench.failed["odd"]) is InvalidRequest
        assert "top_k" in str(bench.failed["odd"])

    with_bench(test)


def test_a_burst_is_not_published_one_by_one() -> None:
    async def test(bench: Bench) -> None:
        # Given a broker that has confirmed nothing yet
        bench.broker.hangs = True
        for n in range(50):
            await bench.core.add_request_async(a_request(f"r{n}"))
        await asyncio.sleep(0)

        assert len(bench.broker.unsent) == 50
        for sent in bench.broker.unsent:
            sent.set_result(None)
        await asyncio.gather(*bench.core._publications)

    with_bench(test, leaves=tuple(f"r{n}" for n in range(50)))


def test_a_request_that_is_hung_up_before_it_was_sent_is_not_sent() -> None:
    async def test(bench: Bench) -> None:
        bench.broker.hangs = True
        await bench.core.add_request_async(a_request("r"))
        await asyncio.sleep(0)

        await bench.core.abort_requests_async(["r"])

        assert [sent.cancelled() for sent in bench.broker.unsent] == [True]
        await asyncio.gather(*bench.core._publications)
        assert bench.failed == {}

    with_bench(test)


def test_a_publisher_that_hangs_fails_the_request_long_before_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "CONFIRM_TIMEOUT_S", 0.05)
    monkeypatch.setattr(client, "_LATE_S", 0.05)

    async def test(bench: Bench) -> None:
        bench.broker.hangs = True
        await bench.ask("r")

        assert type(bench.failed["r"]) is BrokerUnavailable
        assert [sent.cancelled() for sent in bench.broker.unsent] == [True]

    with_bench(test, request_timeout_s=600)


def test_a_request_that_has_ended_is_not_sent_any_more(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    presence(monkeypatch, lambda: READY)

    async def test(bench: Bench) -> None:
        bench.broker.hangs = True
        await bench.core.add_request_async(a_request("r"))
        await watch_until(bench, lambda: "r" in bench.failed)

        assert type(bench.failed["r"]) is RequestTimeout
        assert [sent.cancelled() for sent in bench.broker.unsent] == [True]
        await until(lambda: not bench.core._publications)

    with_bench(test, request_timeout_s=0.05)


def test_while_the_broker_is_away_requests_fail_at_once_and_it_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "_BROKER_PAUSE_S", 0.1)

    async def test(bench: Bench) -> None:
        bench.broker.away = True
        await bench.ask("a")
        bench.broker.away = False
        # Within the pause nobody asks the broker
        await bench.ask("b")
        assert set(bench.failed) == {"a", "b"}

        # Steady load does not put off the next try
        began = time.monotonic()
        n = 0
        while not bench.broker.published:
            assert time.monotonic() - began < 5
            n += 1
            await bench.ask(f"c{n}")
            await asyncio.sleep(0.01)

        await bench.take((0, an_output([7], f"c{n}", FinishReason.STOP)))

    with_bench(test)


# -- putting replies together --------------------------------------------------------------------


def test_tokens_of_both_stages_make_one_answer() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")

        await bench.take((0, an_output([7])))
        await bench.take((1, an_output([8])))
        await bench.take((2, an_output([9], finish_reason=FinishReason.STOP)))

        assert bench.answer() == [("r", [7], None), ("r", [8], None), ("r", [9], FinishReason.STOP)]
        assert bench.core._open == {}
        assert bench.failed == {}

    with_bench(test)


def test_a_step_with_several_requests_is_one_message_for_vllm_as_well() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a", "b")

        await bench.take((0, an_output([7], "a")), (0, an_output([8], "b")))

        assert bench.core._outputs.qsize() == 1
        assert bench.answer() == [("a", [7], None), ("b", [8], None)]

    with_bench(test, leaves=("a", "b"))


def test_a_successor_that_repeats_what_is_known_is_not_heard_twice() -> None:
    # Given an answer of two tokens whose worker dies
    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await bench.take((0, an_output([7])))
        await bench.take((1, an_output([8])))

        # When another worker begins again after the first token
        await bench.take((1, an_output([8])))
        await bench.take((2, an_output([9])))
        await bench.take((3, an_output([10], finish_reason=FinishReason.LENGTH)))

        assert [tokens for _, tokens, _ in bench.answer()] == [[7], [8], [9], [10]]
        assert bench.failed == {}

    with_bench(test)


def test_an_end_is_heard_even_if_its_token_is_known() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await bench.take((0, an_output([7])))

        await bench.take((0, an_output([7], finish_reason=FinishReason.STOP)))

        assert bench.answer() == [("r", [7], None), ("r", [], FinishReason.STOP)]
        assert bench.core._open == {}

    with_bench(test)


def test_new_tokens_behind_known_ones_are_heard() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await bench.take((0, an_output([7])))

        await bench.take((0, an_output([7, 8])))
        await bench.take((2, an_output([9])))

        assert [tokens for _, tokens, _ in bench.answer()] == [[7], [8], [9]]
        assert bench.failed == {}

    with_bench(test, leaves=("r",))


def test_a_successor_with_another_answer_fails_the_request_rather_than_mixing_them() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r", "other")
        await bench.take((0, an_output([7])), (0, an_output([1], "other")))
        await bench.take((1, an_output([8])))
        bench.answer()

        await bench.take((1, an_output([666])), (1, an_output([2], "other")))

        assert type(bench.failed["r"]) is WorkerLost
        assert bench.answer() == [("other", [2], None)], "the other request goes on"

    with_bench(test, leaves=("other",))


def test_a_gap_fails_the_request_rather_than_hiding_it() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await bench.take((0, an_output([7])))

        await bench.take((2, an_output([9])))

        assert type(bench.failed["r"]) is WorkerLost

    with_bench(test)


def test_tokens_for_nobody_are_answered_with_an_abort() -> None:
    # The worker was started after the abort, or did not hear of it.
    async def test(bench: Bench) -> None:
        await bench.ask("known")

        await bench.take((0, an_output([7], "known")), (3, an_output([8], "forgotten")))

        assert bench.aborted == ["forgotten"]
        assert bench.answer() == [("known", [7], None)]

    with_bench(test, leaves=("known",))


def test_a_client_that_hangs_up_is_forgotten_and_the_workers_are_told_once() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a", "b")

        await bench.core.abort_requests_async(["a", "never heard of"])
        await bench.core.abort_requests_async(["a"])

        assert bench.aborted == ["a"]
        assert list(bench.core._open) == ["b"]

    with_bench(test, leaves=("b",))


def test_a_bus_that_lost_replies_fails_what_was_open_and_nothing_later() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a", "b")
        await bench.take((0, an_output([7], "a")))

        await bench.core._replies_are_lost()

        assert {r: type(e) for r, e in bench.failed.items()} == {"a": RepliesLost, "b": RepliesLost}
        assert sorted(bench.aborted) == ["a", "b"]
        await bench.ask("c")
        assert list(bench.core._open) == ["c"]

    with_bench(test, leaves=("c",))


REPORT = StageReport(
    stage="prefill", worker="w", queue_s=0, seconds=1, prompt_tokens=10, output_tokens=1
)


def test_stage_reports_can_be_asked_for_after_the_end() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await bench.take(
            (0, an_output([7], finish_reason=FinishReason.STOP)), reports={"r": (REPORT,)}
        )

        assert await bench.core.reports("external-r") == [(REPORT,)]
        assert await bench.core.reports("external-x") == []

    with_bench(test)


def test_a_report_of_what_was_ended_here_is_waited_for() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await bench.core.abort_requests_async(["r"])

        asked = asyncio.create_task(bench.core.reports("external-r"))
        await asyncio.sleep(0.05)
        assert not asked.done()
        await bench.core._take(a_reply(reports={"r": (REPORT,)}))

        assert await asked == [(REPORT,)]

    with_bench(test)


# -- failing -----------------------------------------------------------------------------------


def test_a_workers_failure_fails_the_request_with_its_kind() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")

        await bench.take(
            failures={"r": Failure.of(WorkerLost("died")), "x": Failure.of(WorkerLost())}
        )

        assert type(bench.failed["r"]) is WorkerLost
        assert list(bench.failed) == ["r"]

    with_bench(test)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestTimeout("late"), 504),
        (NoWorker("nobody"), 503),
        (WorkerLost("died"), 503),
        (IncompatibleWorker("old"), 503),
        (PdtasksError("odd"), 500),
    ],
)
def test_a_failure_becomes_an_http_error_of_its_status(error: PdtasksError, status: int) -> None:
    http = _to_http(Failure.of(error).to_error())

    assert isinstance(http, GracefulHTTPError)
    assert http.http_status == status
    assert str(error) in str(http)


async def watch_until(bench: Bench, condition: Callable[[], bool]) -> None:
    watches = [
        asyncio.create_task(bench.core._watch_workers()),
        asyncio.create_task(bench.core._watch_deadlines()),
    ]
    try:
        while not condition():
            assert not any(watch.done() for watch in watches), "a watch has ended"
            await asyncio.sleep(0.005)
    finally:
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)


@pytest.fixture
def fast_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_WATCH_S", 0.01)


def presence(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    """Let the bus say that `found()` are the workers."""

    async def read(_bus: Any) -> list[WorkerStatus]:
        workers: list[WorkerStatus] = found()
        return workers

    monkeypatch.setattr(client, "read_workers_async", read)


def test_a_request_beyond_its_deadline_fails_and_the_workers_drop_it(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    presence(monkeypatch, lambda: READY)

    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await watch_until(bench, lambda: "r" in bench.failed)

        assert type(bench.failed["r"]) is RequestTimeout
        assert bench.aborted == ["r"]

    with_bench(test, request_timeout_s=0.05)


def test_a_deadline_holds_although_the_bus_is_away(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> list[WorkerStatus]:
        raise valkey.ConnectionError("refused")

    presence(monkeypatch, away)

    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await watch_until(bench, lambda: "r" in bench.failed)

        assert type(bench.failed["r"]) is RequestTimeout

    with_bench(test, request_timeout_s=0.05)


def test_a_bus_that_does_not_answer_makes_no_deadline_late(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(_bus: Any) -> list[WorkerStatus]:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(client, "read_workers_async", silent)

    async def test(bench: Bench) -> None:
        await bench.ask("r")
        async with asyncio.timeout(2):
            await watch_until(bench, lambda: "r" in bench.failed)

        assert type(bench.failed["r"]) is RequestTimeout

    with_bench(test, request_timeout_s=0.05)


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


def leaks() -> float:
    return REGISTRY.get_sample_value("pdtasks_api_leaks_total") or 0.0


def test_what_vllm_knows_nothing_of_any_more_is_dropped_and_told(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    presence(monkeypatch, lambda: READY)

    async def test(bench: Bench) -> None:
        await bench.ask("leak", "r")
        bench.forgotten = {"leak"}
        before = leaks()

        await watch_until(bench, lambda: "leak" in bench.aborted)

        assert leaks() == before + 1

        assert list(bench.core._open) == ["r"]
        assert "leak has ended without our hearing of it" in caplog.text

    with_bench(test, leaves=("r",))


@pytest.mark.parametrize("name", ["reply-stream", "replies", "workers"])
def test_a_surprise_in_a_background_task_is_told_while_it_lasts_and_survived(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(background, "_PAUSE_S", 0.3)
    looks: list[int] = []

    def found() -> list[WorkerStatus]:
        looks.append(1)
        if name == "workers" and len(looks) == 2:
            raise KeyError("surprise")
        return READY

    presence(monkeypatch, found)

    async def test(bench: Bench) -> None:
        stream = bench.stream
        stream.surprises = {"keep": int(name == "reply-stream"), "read": int(name == "replies")}
        await bench.core.open()
        try:
            # It has failed: whoever asks is told
            await until(bench.core.background.problems)
            assert bench.core.background.problems() == [
                f"{name} has failed 1 times and begins again soon"
            ]
            # and it goes on
            await until(lambda: not bench.core.background.problems())
            seen = len(looks)
            await until(lambda: stream.calls["keep"] and stream.calls["read"])
            await until(lambda: len(looks) >= seen + 3)
            assert bench.core.background.failures()[name] == 1
        finally:
            await bench.core.close()

    with_bench(test)


def test_a_close_is_bounded_whatever_hangs(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_CLOSE_S", 0.2)
    presence(monkeypatch, lambda: READY)

    async def test(bench: Bench) -> None:
        bench.stream.hangs = True
        await bench.core.open()
        bench.broker.hangs = True
        await bench.core.add_request_async(a_request("r"))

        began = time.monotonic()
        await bench.core.close()

        assert time.monotonic() - began < 3

    with_bench(test, leaves=("r",))


@pytest.mark.parametrize(
    "what",
    ["stream hangs", "stream fails", "bus hangs", "bus fails", "broker hangs", "task stays"],
)
def test_whatever_hangs_or_fails_in_a_close_keeps_nothing_else_open(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(client, "_CLOSE_S", 0.2)
    presence(monkeypatch, lambda: READY)
    bus = StubBus()
    bus.hangs, bus.fails = what == "bus hangs", what == "bus fails"
    monkeypatch.setattr(client, "connect_async", lambda _: bus)

    async def test(bench: Bench) -> None:
        bench.stream.hangs = what == "stream hangs"
        bench.stream.fails = what == "stream fails"
        bench.stream.stays = what == "task stays"
        await bench.core.open()
        await until(lambda: bench.stream.calls["keep"] and bench.stream.calls["read"])
        if what == "broker hangs":
            bench.broker.may_close.clear()

        began = time.monotonic()
        try:
            await bench.core.close()
            assert time.monotonic() - began < 3
            assert bus.closed == (not what.startswith("bus"))
            assert bench.broker.num_closed == (0 if what == "broker hangs" else 2)
        finally:
            bench.broker.may_close.set()

    with_bench(test)


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


def test_one_bad_reply_does_not_end_the_answers_of_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")
        bench.stream.replies = [
            a_reply(outputs=b"\xc1 no outputs at all", positions=(0,)),
            a_reply((0, an_output([7], finish_reason=FinishReason.STOP))),
        ]

        listening = asyncio.create_task(bench.core._listen())
        await until(lambda: not bench.core._open)
        listening.cancel()

        assert bench.answer() == [("r", [7], FinishReason.STOP)]
        assert "could not be used" in caplog.text
        assert "invalid opcode" not in caplog.text, "an error's text may quote"

    with_bench(test)


def test_an_output_that_cannot_be_used_fails_its_own_request_alone() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("odd", "r")
        bench.core._open["odd"].token_ids = None  # type: ignore[assignment]  # whatever is wrong

        await bench.core._take(
            a_reply(
                (0, an_output([5], request_id="odd")),
                (0, an_output([7], finish_reason=FinishReason.STOP)),
            )
        )

        assert bench.answer() == [("r", [7], FinishReason.STOP)]
        assert type(bench.failed["odd"]) is WorkerLost
        assert bench.aborted == ["odd"]

    with_bench(test)
