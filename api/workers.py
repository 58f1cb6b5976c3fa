"""Who is there to run this API's requests?

A worker of another model or another vLLM is no help and does not count.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import valkey.asyncio
from prometheus_client import Gauge

from api.line import Room
from pdtasks.bus.connection import BUS_ERRORS
from pdtasks.bus.needs import fair_part, tell_need
from pdtasks.bus.orders import ask_for_role, ask_to_drain
from pdtasks.bus.presence import read_workers_async
from pdtasks.engine.arguments import ENGINE_VERSION
from pdtasks.errors import NoWorker
from pdtasks.messages import WorkerStatus
from pdtasks.naming import DECODE, STAGES

logger = logging.getLogger(__name__)

#: What a worker in this state does, for people.
_DOES: Final = {"starting": "starts", "draining": "stops", "changing": "changes its role"}

_PART = Gauge(
    "pdtasks_api_part",
    "Part of the workers' places that this process may fill beside others",
    ["model"],
)


class Workers:
    """What presence said when it was last looked at. For one event loop."""

    def __init__(
        self, bus: valkey.asyncio.Valkey, model: str, queue_of: Callable[[str], str] = str
    ) -> None:
        """`queue_of`: the queue of this model for a stage."""
        self.known: list[WorkerStatus] = []
        self._bus = bus
        self._model = model
        self._queue_of = queue_of
        self._missing_since: dict[str, float] = {}  # by stage, UNIX seconds
        self._process = uuid.uuid4().hex
        self._part = 1.0  # of their places, that this process may fill
        # Asked for with each request that comes or goes.
        self._room, self._room_of = Room(), self.known

    async def look(self) -> None:
        """Read from the bus who is there. Raises what is in `pdtasks.bus.connection.BUS_ERRORS`."""
        self.known = await read_workers_async(self._bus)
        for stage in STAGES:
            # In any state: one that starts will take the jobs that wait, one that drains finishes
            # what it has.
            if self._of(stage):
                self._missing_since.pop(stage, None)
            else:
                self._missing_since.setdefault(stage, time.time())

    async def share(self, need: float) -> None:
        """Have other API processes leave room for this one, and leave them theirs.

        `need`: the part of all places that this one could use.
        """
        try:
            others = await tell_need(self._bus, self._process, self._model, need)
        except BUS_ERRORS as exc:
            logger.warning("the workers are not shared anew: %s", type(exc).__name__)
            return
        self._part = fair_part(others)
        _PART.labels(self._model).set(self._part)

    async def look_again(self) -> None:
        """`look` if a stage has none that takes jobs: one may have come this moment."""
        if all(any(w.state == "ready" for w in self._of(stage)) for stage in STAGES):
            return
        with suppress(*BUS_ERRORS):  # then what was known last counts
            await self.look()

    async def drain(self, worker: WorkerStatus) -> None:
        """Ask a worker to drain. Raises what is in `pdtasks.bus.connection.BUS_ERRORS`."""
        await ask_to_drain(self._bus, worker)

    async def change_role(self, worker: WorkerStatus, role: str) -> None:
        """Ask a worker to serve other stages. Raises what is in `BUS_ERRORS`."""
        await ask_for_role(self._bus, worker, role)

    def require(self, *, split: bool = False) -> None:
        """Raises NoWorker when a stage has nobody who could begin it now.

        Without prefill workers decode workers may do all of it, unless both are wanted: `split`.
        """
        for stage in STAGES[-1:] if self.decode_does_all and not split else STAGES:
            workers = self._of(stage)
            if any(worker.state == "ready" for worker in workers):
                continue
            if workers:
                states = "; ".join(_described(worker) for worker in workers)
                raise NoWorker(f"no {stage} worker takes jobs for {self._model} now: {states}")
            queue = self._queue_of(stage)
            up = "pdtasks up" if queue == stage else f"pdtasks up --worker {queue}"
            raise NoWorker(
                f"no {stage} worker is alive that serves {self._model}: start "
                f"`celery -A pdtasks worker -Q {queue} -P threads`, or `{up}`"
            )

    @property
    def is_alive(self) -> bool:
        """Has each stage that requests need a worker, in whatever state?"""
        stages = STAGES[-1:] if self.decode_does_all else STAGES
        return all(self._of(stage) for stage in stages)

    def ours(self) -> list[WorkerStatus]:
        """Those of this model and vLLM, in any state."""
        wanted = (self._model, ENGINE_VERSION)
        return [w for w in self.known if (w.model, w.engine) == wanted]

    def room(self) -> Room:
        """What those that take jobs have room for."""
        if self._room_of is not self.known:
            self._room, self._room_of = self._count_room(), self.known
        if self._room.part != self._part:
            self._room = dataclasses.replace(self._room, part=self._part)
        return self._room

    def _count_room(self) -> Room:
        prefill, decode = ([w for w in self._of(s) if w.state == "ready"] for s in STAGES)
        if all(worker.serves(DECODE) for worker in prefill) and self.decode_does_all:
            # To hand a prompt over from one of them to another would help nobody.
            prefill = []
        # One of an older release, which does not say, leaves the sum unknown.  Where nobody is left
        # to say, those who come will have about what there was: unknown would be without a limit.
        prefill_slots, decode_slots = self._room.prefill_slots, self._room.decode_slots
        if prefill:
            known = all(worker.slots for worker in prefill)
            prefill_slots = sum(map(_places_for_prompts, prefill)) if known else 0
        if decode:
            decode_slots = sum(worker.slots for worker in decode)
        return Room(
            prefill_workers=len(prefill),
            prefill_slots=prefill_slots,
            step_tokens=min((w.step_tokens for w in prefill or decode), default=0),
            decode_workers=len(decode),
            decode_slots=decode_slots,
            decode_active=sum(w.active for w in decode),
            # One of an older release computes no prompts, and any of them may take the job.
            short_tokens=self._short_tokens,
        )

    @property
    def decode_does_all(self) -> bool:
        """Can requests be answered by decode workers alone?"""
        return self._short_tokens > 0

    @property
    def _short_tokens(self) -> int:
        """Tokens of prompts that whoever gets a decode job computes."""
        decode = (w for w in self._of(DECODE) if w.state == "ready")
        return min((w.short_prompt_tokens for w in decode), default=0)

    def missing_s(self, stage: str) -> float:
        """Seconds for which `stage` has had no worker in any state."""
        now = time.time()
        return now - self._missing_since.get(stage, now)

    def unknown(self) -> None:
        """The bus is away: whether workers are missing is not known now."""
        self._missing_since.clear()

    def _of(self, stage: str) -> list[WorkerStatus]:
        return [worker for worker in self.ours() if worker.serves(stage)]


def _places_for_prompts(worker: WorkerStatus) -> int:
    """One that decodes too has its places for both."""
    return max(1, worker.slots - worker.active) if worker.serves(DECODE) else worker.slots


def _described(worker: WorkerStatus) -> str:
    state = _DOES.get(worker.state, f"is {worker.state}")
    return f"{worker.name} {state}" + (f": {worker.reason}" if worker.reason else "")
