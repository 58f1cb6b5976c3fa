"""One engine, many requests. The engine core here is a stub: outputs come when a test says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason

from pdtasks.engine.arguments import engine_arguments
from pdtasks.engine.core import Engine, _log_surprise
from pdtasks.engine.generation import Generation
from pdtasks.errors import ConfigurationError, EngineFailed, RequestAborted
from pdtasks.settings import Settings
from tests.unit.factories import a_request, an_output

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

    def step(self, *outputs: EngineCoreOutput) -> None:
        self.outputs.put_nowait(EngineCoreOutputs(outputs=list(outputs), timestamp=5.0))


class Bench:
    """An engine over a stub core, on the running loop."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.deaths = 0
        self.engine = Engine(Settings(), "model", self._on_step, self._on_death)
        self.engine.loop.close()
        self.engine.loop = asyncio.get_running_loop()
        self.core = StubCore()
        self.engine._core = self.core
        self._pump = asyncio.create_task(self.engine._pump())

    def _on_step(self, step: Step, _timestamp: float) -> None:
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
        "on_output": lambda generation, output: None,
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
    def on_output(generation: Generation, output: EngineCoreOutput) -> None:
        raise ValueError("a canary that nobody should read")

    async def test(bench: Bench) -> None:
        odd, other = a_generation("odd", on_output=on_output), a_generation("b")
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

        bench.engine._on_step = surprise
        bench.core.step(an_output([7], "a#1"))
        with pytest.raises(EngineFailed):
            await tasks[0]

        bench.engine._on_step = bench._on_step
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


def test_a_loop_that_ends_by_itself_is_the_engines_death(monkeypatch: pytest.MonkeyPatch) -> None:
    died = threading.Event()
    engine = Engine(Settings(), "model", lambda *_: None, died.set)
    engine._core = StubCore()

    async def boot() -> None:
        """There is a core already."""

    monkeypatch.setattr(engine, "_boot", boot)
    engine.start()

    engine.loop.call_soon_threadsafe(engine.loop.stop)

    assert died.wait(10)
    engine._thread.join(10)
    engine.loop.close()


def test_a_surprise_in_a_callback_does_not_end_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(Settings(), "model", lambda *_: None, lambda: None)
    ran: list[int] = []
    prompt = "canary"

    def surprise() -> None:
        raise KeyError(prompt)

    engine.loop.set_exception_handler(_log_surprise)
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
        record = {"request_id": "a#1", "op": "save", "world": 2, "blocks": 3}

        bench.engine._take_records([record, {**record, "request_id": "gone#1"}])
        assert not generation.saved.is_set()
        bench.engine._take_records([record])
        assert generation.saved.is_set()

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
