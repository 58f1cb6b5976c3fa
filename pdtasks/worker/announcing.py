"""What does a worker say of itself on the bus, and when?"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import Counter

from pdtasks.background import Background
from pdtasks.bus.connection import BUS_ERRORS, connect
from pdtasks.bus.orders import asked_role, is_asked_to_drain
from pdtasks.bus.presence import remove_status
from pdtasks.engine.arguments import ENGINE_VERSION
from pdtasks.errors import where
from pdtasks.messages import EngineTotals, RoleOrder, StoreFigures, WorkerStatus
from pdtasks.running_stack import identify, place
from pdtasks.settings import Settings
from pdtasks.worker import counting
from pdtasks.worker.liveness import Liveness
from pdtasks.worker.name import Name, NameTaken

logger = logging.getLogger(__name__)

_ANNOUNCE_S = 2.0
#: Seconds between two looks whether a name is free.
_CLAIM_S = 0.2
#: Longest wait for the last sign of life.
_CLOSE_S = 5.0

_LEAKS = Counter("pdtasks_leaks", "Times that an idle worker was found to hold ended requests")


@dataclass(frozen=True)
class Figures:
    """How much a worker has to do."""

    active: int = 0  #: requests in its engine
    stages: int = 0  #: tasks at work
    held: int = 0  #: requests that anything is kept of
    kv_usage: float = 0.0  #: share of the engine's KV blocks in use, 0 to 1
    max_model_len: int = 0  #: tokens
    step_tokens: int = 0  #: that the engine computes at once, at most
    stores: tuple[StoreFigures, ...] = ()
    kv_blocks: int = 0  #: that the engine has
    kv_block_size: int = 0  #: tokens
    totals: EngineTotals = field(default_factory=EngineTotals)


NOTHING: Final = Figures()


class Presence:
    """A worker's sign of life: a thread, and a key on the bus that expires when it falls silent."""

    def __init__(
        self,
        settings: Settings,
        *,
        name: str,
        role: str,
        slots: int,
        liveness: Liveness,
        background: Background,
        on_name_taken: Callable[[str], None],
        on_drain: Callable[[], None],
        on_role: Callable[[str], None],
        metrics: str = "",
    ) -> None:
        """Args:
        on_name_taken: is told, once, who has this worker's name; then nothing more is said.
        on_drain: is called when somebody has asked this worker to drain.
        on_role: is told which role somebody wants it to have, again and again for a while.
        metrics: where they are served, `host:port`.
        """
        self._settings = settings
        self._name = name
        self._serves = role, ""
        self._slots = slots
        self._metrics = metrics
        self._liveness = liveness
        self._background = background
        self._on_name_taken = on_name_taken
        self._on_drain = on_drain
        self._on_role = on_role
        self._highest = 0  # number of a lease under which this worker was ordered something
        self._is_asked = False
        self._claim = Name(settings.worker_ttl_s)
        self._since = time.time()
        self._place = place()
        own = identify(os.getpid())
        self._pid_started = own.started if own else 0
        self._state = "starting"
        self._changed = threading.Event()
        self._figures: Callable[[], Figures] = lambda: NOTHING
        self._leaked_before = self._leaks_told = 0

    def claim(self) -> None:
        """Return when no other worker has this one's name, or nobody can tell. Before `start`.

        Raises NameTaken. A worker of another host that was lost keeps its name until its sign of
        life expires.
        """
        waits = False
        with connect(self._settings) as bus:
            while True:
                try:
                    holder = self._claim.renew(bus, self.status())
                except BUS_ERRORS as exc:
                    logger.warning("bus is away: %s", type(exc).__name__)
                    return
                if holder is None:
                    return
                if not waits:
                    waits = True
                    logger.warning(
                        "%s was the name of another worker (host %s, pid %d): waiting up to %.0f s "
                        "to see whether it lives",
                        *(self._name, holder.status.host, holder.status.pid, holder.ttl_s),
                    )
                time.sleep(_CLAIM_S)

    def start(self) -> None:
        """Begin to say it."""
        self._thread = self._background.thread("presence", self._announce)

    def observe(self, figures: Callable[[], Figures]) -> None:
        """Tell `figures` from now on; asked in the thread."""
        self._figures = figures

    def enter(self, state: str) -> None:
        """Change to `state` ("ready", "draining" or "stopped") and say so at once."""
        self._state = state
        self._changed.set()

    def serve(self, role: str, becomes: str = "") -> None:
        """Say from now on that it has this role; `becomes`: takes nothing until it has that one."""
        self._serves = role, becomes  # one value: another thread reads it
        self._changed.set()

    @property
    def is_draining(self) -> bool:
        """Does it take nothing more?"""
        return self._state in ("draining", "stopped")

    def leave(self) -> None:
        """Take the sign of life away. After `enter("stopped")`."""
        with connect(self._settings) as bus, suppress(*BUS_ERRORS):
            remove_status(bus, self.status())

    def wait_until_silent(self) -> None:
        """Return when nothing is said any more, or soon."""
        self._thread.join(_CLOSE_S)

    def status(self) -> WorkerStatus:
        """What this worker says of itself."""
        state, reason = self._state, ""
        role, becomes = self._serves
        if state == "ready":
            if stall := self._liveness.stall():
                state, reason = "stalled", stall.reason
            elif becomes:
                state, reason = "changing", f"ends what it has begun, then serves {becomes}"
            else:
                reason = "; ".join(self._background.problems())
        figures = self._figures() if self._state in ("ready", "draining") else NOTHING
        return WorkerStatus(
            name=self._name,
            role=role,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=state,
            reason=reason,
            active=figures.active,
            slots=self._slots,
            held=figures.held,
            kv_usage=figures.kv_usage,
            model=self._settings.model_name,
            max_model_len=figures.max_model_len,
            step_tokens=figures.step_tokens,
            short_prompt_tokens=self._settings.short_prompts_up_to,
            engine=ENGINE_VERSION,
            since=self._since,
            device=_device(self._settings),
            stores=figures.stores,
            place=self._place,
            pid_started=self._pid_started,
            metrics=self._metrics,
            kv_blocks=figures.kv_blocks,
            kv_block_size=figures.kv_block_size,
            totals=figures.totals,
        )

    def _announce(self) -> None:
        bus = connect(self._settings)
        said = ""  # the state
        while self._state != "stopped":
            self._changed.clear()
            try:
                status = self.status()
                if status.state == "stalled" != said:
                    counting.stalled()
                said = status.state
                if holder := self._claim.renew(bus, status):
                    logger.warning("pid %d has this worker's name", holder.status.pid)
                elif not self._is_asked and is_asked_to_drain(bus, self.status()):
                    self._is_asked = True  # a second signal would be a demand to hurry
                    self._on_drain()
                elif self._state == "ready" and (order := asked_role(bus, status)):
                    self._obey(order)
            except NameTaken as exc:
                self._on_name_taken(str(exc))
                return
            except BUS_ERRORS as exc:
                logger.warning("bus is away: %s", type(exc).__name__)
            except Exception as exc:  # noqa: BLE001
                # A worker that works but is not seen would be a riddle: say it and go on.
                logger.error("the worker's status could not be announced: %s", where(exc))  # noqa: TRY400
            self._look_for_leaks()
            self._changed.wait(min(_ANNOUNCE_S, self._settings.worker_ttl_s / 3))

    def _obey(self, order: RoleOrder) -> None:
        if order.number:
            if order.number < self._highest:
                logger.warning("an order of a balancer that was replaced is not obeyed")
                return
            self._highest = order.number
        self._on_role(order.role)

    def _look_for_leaks(self) -> None:
        """An idle worker that holds anything will hold more and more: say so, once."""
        figures = self._figures() if self._state == "ready" else NOTHING
        leaked = 0 if figures.stages else figures.held
        # Twice in a row: between the two numbers a request may have begun.
        if leaked and self._leaked_before and leaked != self._leaks_told:
            _LEAKS.inc()
            self._leaks_told = leaked
            logger.warning("%d requests that have ended are still held: please report this", leaked)
        self._leaked_before = leaked


def _device(settings: Settings) -> str:
    """What the engine computes on, for people."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "") if settings.device == "cuda" else ""
    return f"{settings.device}:{chosen}"[:255] if chosen else settings.device
