"""An asking process reduced to its stream: asks, and looks at what the workers wrote."""

from __future__ import annotations

import asyncio
import time
import uuid
from concurrent.futures import Future
from typing import Any, Literal, cast

import valkey
import valkey.asyncio
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder

from pdtasks.bus.progress import Progress, tell_progress
from pdtasks.engine.arguments import ENGINE_VERSION
from pdtasks.engine.wire import encode_request
from pdtasks.messages import Failure, PrefillJob, Sibling, StepReply, read_message
from pdtasks.pipeline import Publisher
from pdtasks.siblings import whole


def engine_request(
    request_id: str, prompt: tuple[int, ...] = (1, 2, 3), **sampling: Any
) -> EngineCoreRequest:
    """A request as the API's front half makes it."""
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        mm_features=None,
        sampling_params=SamplingParams(**{"max_tokens": 4, "temperature": 0.0, **sampling}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


class Asker:
    """Owns a reply stream from which nothing is removed."""

    def __init__(self, bus: valkey.Valkey, publisher: Publisher | None = None) -> None:
        """`publisher`: another one's; else it has its own."""
        self.bus = bus
        self.stream = f"pd:reply:{uuid.uuid4().hex}"
        self.bus.xgroup_create(self.stream, "owner", mkstream=True)
        self._publisher = publisher or Publisher()

    def ask(self, request_id: str = "r", *, timeout_s: float = 60.0, **request: Any) -> None:
        """Publish a request; `siblings`: ids of further answers to its prompt."""
        self._publisher.publish(self._job(request_id, timeout_s, request), self.stream)

    def send(
        self, request_id: str = "r", *, timeout_s: float = 60.0, **request: Any
    ) -> Future[None]:
        """`ask`, without waiting."""
        return self._publisher.send(self._job(request_id, timeout_s, request), self.stream)

    def ask_whole(self, request_id: str = "r", *, timeout_s: float = 60.0, **request: Any) -> None:
        """`ask`, of workers that compute prompts and answer them."""
        for job in whole(self._job(request_id, timeout_s, request)):
            self._publisher.send(job, self.stream).result(10)

    @staticmethod
    def _job(request_id: str, timeout_s: float, request: dict[str, Any]) -> PrefillJob:
        now = time.time()
        siblings = tuple(
            Sibling(request_id=sibling, seed=None) for sibling in request.pop("siblings", ())
        )
        return PrefillJob(
            request_id=request_id,
            engine=ENGINE_VERSION,
            model=None,
            request=encode_request(engine_request(request_id, **request)),
            submitted_at=now,
            deadline=now + timeout_s,
            siblings=siblings,
        )

    def messages(self) -> list[StepReply]:
        """Everything that was written so far."""
        entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", self.bus.xrange(self.stream))
        return [read_message(StepReply, fields[b"m"]) for _, fields in entries]

    def outputs(self) -> list[tuple[str, int, EngineCoreOutput]]:
        """(stage, position, output) in the order of arrival."""
        decoder = MsgpackDecoder(EngineCoreOutputs)
        return [
            (message.stage, position, output)
            for message in self.messages()
            if message.outputs
            for position, output in zip(
                message.positions, decoder.decode(message.outputs).outputs, strict=True
            )
        ]

    def tokens(self, request_id: str = "r") -> list[int]:
        """The answer so far, by position; a repeat must say the same."""
        found: dict[int, int] = {}
        for _, position, output in self.outputs():
            if output.request_id == request_id:
                for place, token_id in enumerate(output.new_token_ids, start=position):
                    assert found.setdefault(place, token_id) == token_id, "two answers at once"
        assert sorted(found) == list(range(len(found))), "a gap"
        return [found[place] for place in sorted(found)]

    def finished(self, request_id: str = "r") -> bool:
        """Has the last token come?"""
        return any(
            o.finish_reason is not None for _, _, o in self.outputs() if o.request_id == request_id
        )

    def questions(self, request_id: str = "r") -> list[tuple[str, int]]:
        """(stage, attempt) of each attempt that wants to know how much of the answer is there."""
        return [
            (message.stage, message.asks[request_id].attempt)
            for message in self.messages()
            if request_id in message.asks
        ]

    def tell(
        self,
        token_ids: list[int] | None,
        request_id: str = "r",
        *,
        otherwise: Literal["gone", "elsewhere"] = "gone",
    ) -> None:
        """Answer the last question: `token_ids` are there, or (None) what is the case instead."""
        progress = Progress(state=otherwise)
        if token_ids is not None:
            progress = Progress(state="wanted", token_ids=tuple(token_ids))
        _, attempt = self.questions(request_id)[-1]
        kwargs = self.bus.connection_pool.connection_kwargs

        async def tell() -> None:
            names = ("host", "port", "db", "username", "password")
            async with valkey.asyncio.Valkey(**{n: kwargs.get(n) for n in names}) as bus:
                await tell_progress(bus, request_id, attempt, progress)

        asyncio.run(tell())

    def failures(self) -> dict[str, Failure]:
        """What has failed."""
        return {r: f for message in self.messages() for r, f in message.failures.items()}

    def hang_up(self) -> None:
        """Be gone."""
        self.bus.delete(self.stream)

    def close(self) -> None:
        """Close the connections."""
        self._publisher.close()
        self.bus.close()
