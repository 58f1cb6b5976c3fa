"""Which stages does this worker serve, and how does that change while it runs?

It takes no more jobs of what it leaves.  What it has begun there is handed on or ends here; then it
takes jobs of what it is to serve.  Engine, weights and KV stay.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Final, Protocol

from pdtasks.errors import where
from pdtasks.naming import DECODE, role_of, stages_of

logger = logging.getLogger(__name__)

#: Seconds for RabbitMQ to hear of it; without a connection the next one is told so anyhow.
_TAKE_FROM_S: Final = 5.0
#: Seconds before it is told again.
_PAUSE_S: Final = 0.5
#: Seconds between two looks at what is still under way.
_LOOK_S: Final = 0.02


class TakesJobs(Protocol):
    """`pdtasks.worker.consumer.StageConsumer`, as far as this module needs it."""

    def take_from(self, credit: Mapping[str, int]) -> Future[None]: ...


class Announces(Protocol):
    """`pdtasks.worker.announcing.Presence`, as far as this module needs it."""

    @property
    def is_draining(self) -> bool: ...

    def serve(self, role: str, becomes: str = "") -> None: ...


class GivesCredit(Protocol):
    """`pdtasks.worker.credit.Credit`, as far as this module needs it."""

    @property
    def of(self) -> Mapping[str, int]: ...


class Serves(Protocol):
    """`pdtasks.worker.service.Worker`, as far as this module needs it."""

    @property
    def presence(self) -> Announces: ...

    @property
    def num_jobs(self) -> int: ...

    def soon(self, call: Callable[[], None]) -> None: ...

    async def hand_on(self) -> None: ...

    def keeps_its_jobs(self) -> None: ...

    @property
    def credit(self) -> GivesCredit: ...


class Serving:
    """The stages of this worker. For the engine's loop."""

    def __init__(self, role: str, here: Serves, *, patience_s: float) -> None:
        """`patience_s`: what it has begun has ended by then, or will not."""
        self._role = role
        self._patience_s = patience_s
        self._wanted = role
        self._here = here
        self._consumer: TakesJobs | None = None
        self._taken: dict[str, int] = {}  # jobs at once, of which RabbitMQ has heard, by stage
        self._connections = 0  # so far
        self._changing: asyncio.Task[None] | None = None

    def consumed_by(self, consumer: TakesJobs) -> None:
        """Who takes jobs for this worker from RabbitMQ, from now on. From its thread."""
        self._consumer = consumer
        self._here.soon(self._connected)

    def _connected(self) -> None:
        self._connections += 1
        self._taken = {}  # a new one has been told nothing yet
        self.credit_changed()

    def credit_changed(self) -> None:
        """Take as many jobs at once as there is credit for by now."""
        if self._changing is None or self._changing.done():
            self._changing = asyncio.create_task(self._change())

    def become(self, role: str) -> None:
        """Take `role`, as soon as what it leaves has ended; of several the last one counts."""
        self._wanted = role
        if self._changing is None or self._changing.done():
            self._changing = asyncio.create_task(self._change())

    async def _change(self) -> None:
        while not self._is_settled and not self._here.presence.is_draining:
            try:
                if self._role != self._wanted:
                    await self._become(self._wanted)
                else:
                    await self._take_from(stages_of(self._role))
            except Exception as exc:  # noqa: BLE001 - whatever it is, the worker works on
                logger.error("the role was not changed, trying again: %s", where(exc))  # noqa: TRY400
                await asyncio.sleep(_PAUSE_S)

    @property
    def _is_settled(self) -> bool:
        if self._role != self._wanted:
            return False
        return self._consumer is None or self._taken == self._credit_of(stages_of(self._role))

    def _credit_of(self, stages: Collection[str]) -> dict[str, int]:
        return {stage: self._here.credit.of[stage] for stage in stages}

    async def _become(self, role: str) -> None:
        here, before = self._here, self._role
        old, new = set(stages_of(before)), set(stages_of(role))
        kept = old & new
        logger.info("changing from %s to %s", before, role)
        if not kept:
            here.presence.serve(role, becomes=role)
        await self._take_from(kept)
        if kept:
            here.presence.serve(role_of(kept))
        if DECODE in old - new:
            await here.hand_on()
        if not kept:
            # (What it serves anyhow needs no wait, nor does a further stage.)
            await self._jobs_ended()
        if here.presence.is_draining:
            return
        here.keeps_its_jobs()
        await self._take_from(new)
        self._role = role
        here.presence.serve(role)
        logger.info("serving %s", role)

    async def _jobs_ended(self) -> None:
        try:
            async with asyncio.timeout(self._patience_s):
                while self._here.num_jobs and not self._here.presence.is_draining:  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            logger.error(  # noqa: TRY400 - one line says it
                "%d jobs have not ended by their deadline: please report this", self._here.num_jobs
            )

    async def _take_from(self, stages: Collection[str]) -> None:
        """Returns when RabbitMQ has heard of it. Tries until then, or until this worker stops."""
        while (consumer := self._consumer) is not None and not self._here.presence.is_draining:
            credit, connection = self._credit_of(stages), self._connections
            try:
                async with asyncio.timeout(_TAKE_FROM_S):
                    await asyncio.wrap_future(consumer.take_from(credit))
            except Exception as exc:  # noqa: BLE001 - of a connection that was lost, perhaps
                logger.warning("RabbitMQ has not heard yet what is served: %s", where(exc))
                await asyncio.sleep(_PAUSE_S)
            else:
                if connection == self._connections:
                    self._taken = credit
                return
