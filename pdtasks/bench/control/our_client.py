"""A program: asks our side as the API does, in one event loop, but for HTTP and text."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
import uuid

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from api.core import PipelineCore
from pdtasks.bench.control.load import ANSWER_TOKENS, Done, Order, check, make_prompts
from pdtasks.bench.control.orders import obey
from pdtasks.bench.loop_thread import LoopThread
from pdtasks.errors import PdtasksError
from pdtasks.settings import load_settings


class _Asker:
    """What stands where vLLM's front half does. Lives in one event loop."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self._prompts = itertools.cycle(prompts)
        self._prefix, self._numbers = uuid.uuid4().hex[:16], itertools.count(1 << 60)
        self._params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0)
        self._answers: dict[str, tuple[list[int], asyncio.Future[list[int]]]] = {}

    async def open(self) -> None:
        self._core = PipelineCore(load_settings(), self._fail)
        await self._core.open()
        self._taking = asyncio.create_task(self._take())

    async def close(self) -> None:
        self._taking.cancel()
        await self._core.close()

    async def measure(self, order: Order) -> Done:
        """Do what `order` says."""
        began = time.monotonic()
        found: list[tuple[float, float]] = []

        async def ask_on() -> None:
            while (asked := time.monotonic()) < began + order.seconds:
                check(await self._ask())
                now = time.monotonic()
                found.append((now - began, now - asked))

        async with asyncio.TaskGroup() as clients:
            for _ in range(order.in_flight):
                clients.create_task(ask_on())
        return Done([at for at, _ in found], [took for _, took in found])

    async def _ask(self) -> list[int]:
        request = EngineCoreRequest(
            request_id=f"{self._prefix}{next(self._numbers):x}",
            prompt_token_ids=next(self._prompts),
            mm_features=None,
            sampling_params=self._params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        answer: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._answers[request.request_id] = [], answer
        await self._core.add_request_async(request)
        return await answer

    async def _take(self) -> None:
        while True:
            step = await self._core.get_output_async()
            for output in step.outputs:
                tokens, answer = self._answers[output.request_id]
                tokens += output.new_token_ids
                if output.finish_reason is not None:
                    del self._answers[output.request_id]
                    answer.set_result(tokens)

    async def _fail(self, request_id: str, error: PdtasksError) -> None:
        _, answer = self._answers.pop(request_id)
        answer.set_exception(error)


def main(path: str, tokens: int) -> None:
    """Obey orders that come through the socket at `path`."""
    asker = _Asker(make_prompts(tokens))
    with LoopThread("client") as thread:
        thread.call(asker.open()).result()
        obey(path, lambda order: thread.call(asker.measure(order)).result())
        thread.call(asker.close()).result()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
