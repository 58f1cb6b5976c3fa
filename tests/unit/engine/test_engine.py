"""One engine, many requests. The engine core here is a stub: outputs come when a test says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import SchedulerStats

from pdtasks.engine.arguments import engine_arguments
from pdtasks.engine.core import Engine, StepListener, log_surprise
from pdtasks.engine.generation import Generation, State, Verdict
from pdtasks.errors import ConfigurationError, EngineFailed, RequestAborted
from pdtasks.kv.plan import TransferRecord
from pdtasks.settings import Settings
from tests.unit.factories import a_request, an_output
from tests.waiting import until

Step = list[tuple[Generation, int, EngineCoreOutput]]


class StubCore:
    """vLLM's engine core client without an engine."""

    def __init__(self) -> None:
        self.added: list[EngineCoreRequest] = []
        self.aborted: list[str] = []
        self.outputs: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.added.append(request)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    async def get_output_async(self) -> EngineCoreOutputs:
        outputs = await self.outputs.get()
        if isinstance(outputs, Exception):
            raise outputs
        return outputs

    def records(self, *records: dict[str, Any]) -> None:
        stats = SchedulerStats(kv_cache_usage=0.5, kv_connector_stats={"records": list(records)})
        self.outputs.put_nowait(EngineCoreOutputs(scheduler_stats=stats))

    def step(self, *outputs: EngineCoreOutput) -> None:
        self.outputs.put_nowait(EngineCoreOutputs(outputs=list(outputs), timestamp=5.0))


def an_engine(core: StubCore, *listeners: Any, loop: Any = None) -> Engine:
    """An `Engine` over `core`."""

    async def start_core(_reports_to: str) -> Any:
        return None, core

    return Engine(start_core, *listeners, loop=loop)


class Bench:
    """An engine over a stub core, on the running loop."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.deaths = 0
        self.core = StubCore()
        self.on_step: StepListener = self.note_step
        self.engine = an_engine(
            self.core,
            lambda step, timestamp: self.on_step(step, timestamp),  # noqa: PLW0108 - tests set it
            self._on_death,
            loop=asyncio.get_running_loop(),
        )
        self._pump = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        await self.engine.boot()
        await self.engine.pump()

    def note_step(self, step: Step, _timestamp: float) -> None:
        self.steps.append(step)

    def _on_death(self) -> None:
        self.deaths += 1

    def run(self, generation: Generation) -> asyncio.Task[None]:
        return asyncio.create_task(self.engine.generate(generation))

    async def close(self) -> None:
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)


def with_bench(test: Callable[[Bench], Awaitable[None]]) -> None:
    async def run() -> None:
        bench = Bench()
        try:
            async with asyncio.timeout(10):
                await test(bench)
        finally:
            await bench.close()

    asyncio.run(run())


def a_generation(request_id: str = "r", position: int = 0, **fields: Any) -> Generation:
    values: dict[str, Any] = {
        "request": a_request(f"{request_id}#1"),
        "request_id": request_id,
        "reply_to": "pd:reply:a",
        "position": position,
    }
    return Generation(**values | fields)


def test_tokens_of_several_requests_in_a_step_are_one_call_with_their_positions() -> None:
    async def test(bench: Bench) -> None:
        one, other = a_generation("a"), a_generation("b", position=1)
        tasks = [bench.run(one), bench.run(other)]
        await asyncio.sleep(0)

        bench.core.step(an_output([7], "a#1"), an_output([8], "b#1"))
        bench.core.step(
            an_output([9], "a#1", FinishReason.STOP), an_output([10], "b#1", FinishReason.LENGTH)
        )
        await asyncio.gather(*tasks)

        steps = [[(g.request_id, p, o.request_id) for g, p, o in step] for step in bench.steps]
        # The asker's names, not the engine's.
        assert steps == [[("a", 0, "a"), ("b", 1, "b")], [("a", 1, "a"), ("b", 2, "b")]]
        assert (one.token_ids, other.token_ids) == ([7, 9], [8, 10])
        assert bench.core.aborted == []

    with_bench(test)


def test_an_abort_ends_all_attempts_at_a_request_and_no_other() -> None:
    async def test(bench: Bench) -> None:
        attempts = [a_generation("a"), a_generation("a", request=a_request("a#2"))]
        other = a_generation("b")
        tasks = [bench.run(g) for g in (*attempts, other)]
        await asyncio.sleep(0)

        assert bench.engine.abort("a")
        assert not bench.engine.abort("unknown")

        results = await asyncio.gather(*tasks[:2], return_exceptions=True)
        assert [type(r) for r in results] == [RequestAborted, RequestAborted]
        assert sorted(bench.core.aborted) == ["a#1", "a#2"]
        assert not tasks[2].done()
        bench.core.step(an_output([7], "b#1", FinishReason.STOP))
        await tasks[2]

    with_bench(test)


def test_tokens_that_come_after_the_abort_are_not_told() -> None:
    async def test(bench: Bench) -> None:
        generation, other = a_generation("a"), a_generation("b")
        task, other_task = bench.run(generation), bench.run(other)
        await asyncio.sleep(0)
        bench.engine.abort("a")

        bench.core.step(an_output([7], "a#1"), an_output([8], "b#1", FinishReason.STOP))
        await other_task

        assert [[g.request_id for g, _, _ in step] for step in bench.steps] == [["b"]]
        with pytest.raises(RequestAborted):
            await task

    with_bench(test)


def test_cancelling_the_caller_aborts_in_the_engine() -> None:
    async def test(bench: Bench) -> None:
        task = bench.run(a_generation("a"))
        await asyncio.sleep(0)

        task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task
        assert bench.core.aborted == ["a#1"]

    with_bench(test)


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.ABORT])
def test_a_request_that_vllm_gives_up_has_failed(reason: FinishReason) -> None:
    async def test(bench: Bench) -> None:
        task = bench.run(a_generation("a"))
        await asyncio.sleep(0)

        bench.core.step(an_output([], "a#1", reason))

        with pytest.raises(EngineFailed):
            await task

    with_bench(test)


def test_one_request_that_cannot_be_handled_does_not_take_the_others_along(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def judge(output: EngineCoreOutput) -> Verdict:
        raise ValueError("a canary that nobody should read")

    async def test(bench: Bench) -> None:
        odd, other = a_generation("odd", judge=judge), a_generation("b")
        task, other_task = bench.run(odd), bench.run(other)
        await asyncio.sleep(0)

        bench.core.step(an_output([7], "odd#1"), an_output([8], "b#1", FinishReason.STOP))

        await other_task
        with pytest.raises(EngineFailed, match="ValueError") as caught:
            await task
        assert "canary" not in str(caught.value)
        assert bench.core.aborted == ["odd#1"]
        assert bench.deaths == 0

    with_bench(test)


def test_a_step_that_cannot_be_told_fails_its_requests_and_not_the_engine() -> None:
    async def test(bench: Bench) -> None:
        one, other = a_generation("a"), a_generation("b")
        tasks = [bench.run(one), bench.run(other)]
        await asyncio.sleep(0)

        def surprise(step: Step, timestamp: float) -> None:
            raise KeyError("canary")

        bench.on_step = surprise
        bench.core.step(an_output([7], "a#1"))
        with pytest.raises(EngineFailed):
            await tasks[0]

        bench.on_step = bench.note_step
        bench.core.step(an_output([8], "b#1", FinishReason.STOP))
        await tasks[1]
        assert bench.deaths == 0
        assert other.token_ids == [8]

    with_bench(test)


def test_how_much_runs_is_a_number_that_any_thread_may_ask_for() -> None:
    async def test(bench: Bench) -> None:
        one, other = a_generation("a"), a_generation("b")
        tasks = [bench.run(one), bench.run(other)]
        await asyncio.sleep(0)
        assert (bench.engine.num_running, bench.engine.num_held) == (2, 2)

        bench.core.step(an_output([7], "a#1", FinishReason.STOP))
        await tasks[0]
        assert bench.engine.num_running == 1
        bench.engine.abort("b")
        await asyncio.gather(*tasks, return_exceptions=True)
        assert bench.engine.num_running == 0
        # Held until their stages have seen their KV to the store
        assert bench.engine.num_held == 2
        for generation in (one, other):
            bench.engine.forget(generation)
        assert bench.engine.num_held == 0

    with_bench(test)


def test_a_dead_engine_fails_all_requests_and_is_reported_once() -> None:
    async def test(bench: Bench) -> None:
        tasks = [bench.run(a_generation(name)) for name in "ab"]
        await asyncio.sleep(0)

        bench.core.outputs.put_nowait(RuntimeError("the core is gone"))

        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(r) for r in results] == [EngineFailed, EngineFailed]
        assert bench.deaths == 1

    with_bench(test)


def test_a_loop_that_ends_by_itself_is_the_engines_death() -> None:
    died = threading.Event()
    engine = an_engine(StubCore(), lambda *_: None, died.set)
    engine.start()

    engine.loop.call_soon_threadsafe(engine.loop.stop)

    assert died.wait(10)
    engine._thread.join(10)
    engine.loop.close()


def test_a_surprise_in_a_callback_does_not_end_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    engine = an_engine(StubCore(), lambda *_: None, lambda: None)
    ran: list[int] = []
    prompt = "canary"

    def surprise() -> None:
        raise KeyError(prompt)

    engine.loop.set_exception_handler(log_surprise)
    engine.loop.call_soon(surprise)
    engine.loop.call_soon(ran.append, 1)
    engine.loop.call_later(0.01, engine.loop.stop)
    engine.loop.run_forever()
    engine.loop.close()

    assert ran
    assert "in the engine's loop: KeyError" in caplog.text
    assert "canary" not in caplog.text


def test_a_transfer_is_complete_when_all_ranks_have_reported() -> None:
    async def test(bench: Bench) -> None:
        generation = a_generation("a")
        task = bench.run(generation)
        await asyncio.sleep(0)
        record = asdict(
            TransferRecord(request_id="a#1", op="save", rank=0, world=2, blocks=3, bytes=9)
        )

        bench.core.records(record, {**record, "request_id": "gone#1"})
        await until(lambda: generation.transfers.get("save"))
        assert not generation.saved.is_set()
        bench.core.records(record)
        await until(generation.saved.is_set)

        bench.core.step(an_output([7], "a#1", FinishReason.STOP))
        await task
        bench.engine.forget(generation)
        assert bench.engine.num_running == 0

    with_bench(test)


def test_explicit_engine_arguments_win_over_ours() -> None:
    settings = Settings(device="cpu", engine_args={"max_num_batched_tokens": 7, "dtype": "float32"})

    arguments = engine_arguments(settings, "/models/m")

    assert arguments["max_num_batched_tokens"] == 7
    assert arguments["dtype"] == "float32"
    assert arguments["model"] == "/models/m"


@pytest.mark.parametrize(("capability", "dtype"), [("AVX2", "float32"), ("AVX512", None)])
def test_a_cpu_that_is_slow_with_16_bits_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, capability: str, dtype: str | None
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)

    assert engine_arguments(Settings(device="cpu"), "m").get("dtype") == dtype
    named = Settings(device="cpu", engine_args={"dtype": "bfloat16"})
    assert engine_arguments(named, "m")["dtype"] == "bfloat16"


@pytest.mark.parametrize("length", [None, 512, 8192])
def test_a_cpu_engine_takes_a_whole_prompt_in_one_step(length: int | None) -> None:
    # A seeded request whose prompt is computed in chunks kills vLLM 0.32's CPU engine.
    arguments = engine_arguments(Settings(device="cpu", max_model_len=length), "m")

    assert arguments["enable_chunked_prefill"] is False
    assert arguments["max_num_batched_tokens"] >= arguments["max_model_len"]


def test_statistics_that_carry_the_hand_over_cannot_be_switched_off() -> None:
    settings = Settings(engine_args={"disable_log_stats": True}, device="cpu")

    with pytest.raises(ConfigurationError, match="disable_log_stats"):
        engine_arguments(settings, "model")


def test_a_generation_goes_only_where_the_table_says() -> None:
    async def test(bench: Bench) -> None:
        generation = a_generation("a")
        task = bench.run(generation)
        await until(lambda: generation.state is State.RUNNING)

        with pytest.raises(RuntimeError, match="is RUNNING, not to be RUNNING"):
            generation.begin()
        bench.core.step(an_output([7], "a#1", FinishReason.STOP))
        await task
        assert generation.state is State.ANSWERED
        # What has ended does not fail any more
        generation.fail(EngineFailed("late"))
        assert generation.state is State.ANSWERED

    with_bench(test)


def test_a_text_that_is_complete_ends_the_generation_in_the_engine_too() -> None:
    async def test(bench: Bench) -> None:
        generation = a_generation("a", judge=lambda output: Verdict(stopped_at="Paris."))
        task = bench.run(generation)
        await until(lambda: generation.state is State.RUNNING)

        bench.core.step(an_output([7], "a#1"))
        await task

        assert generation.state is State.STOPPED
        assert (generation.finish_reason, generation.stop_reason) == (FinishReason.STOP, "Paris.")
        assert bench.core.aborted == ["a#1"]

    with_bench(test)


def test_an_end_that_is_only_the_end_of_a_stage_is_not_told() -> None:
    async def test(bench: Bench) -> None:
        generation = a_generation("a", judge=lambda output: Verdict(hides_end=True))
        task = bench.run(generation)
        await until(lambda: generation.state is State.RUNNING)

        bench.core.step(an_output([7], "a#1", FinishReason.LENGTH))
        await task

        ((told,),) = bench.steps
        assert told[2].finish_reason is None
        assert generation.finish_reason == FinishReason.LENGTH
        assert bench.core.aborted == []

    with_bench(test)


def test_a_configuration_of_reasoning_goes_together_with_a_parser() -> None:
    # vLLM writes the parser's name into it, which a dict from JSON does not take.
    engine_args = {"reasoning_config": {"reasoning_start_str": "a"}, "reasoning_parser": "granite"}
    settings = Settings(device="cpu", engine_args=engine_args)

    arguments = engine_arguments(settings, "model")

    assert arguments["reasoning_config"].reasoning_start_str == "a"
    assert arguments["reasoning_parser"] == "granite"
