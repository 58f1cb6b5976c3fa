"""What does `pdtasks balance` do? It looks, decides, and has one worker after the other change."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack, suppress
from typing import Final

import valkey

from pdtasks.balance.deciding import Decider, Decision, Targets
from pdtasks.balance.sight import sight_of
from pdtasks.bus.connection import BUS_ERRORS, connect
from pdtasks.bus.keys import BALANCER
from pdtasks.bus.lease import Lease
from pdtasks.bus.orders import order_role
from pdtasks.bus.presence import read_workers
from pdtasks.cluster.console import Console
from pdtasks.roles import UnknownWorker, why_not, worker_called
from pdtasks.settings import Settings
from pdtasks.terminal.asking import Client, NoAnswer

#: Seconds beyond a look for which a holder may be silent: an API that is slow to answer takes some.
_SILENT_S: Final = 20.0


class Balancer:
    """Follows the load with the roles of one model's workers. For one thread."""

    def __init__(
        self,
        client: Client,
        bus: valkey.Valkey,
        targets: Targets,
        *,
        model: str,
        every_s: float,
        dry_run: bool,
    ) -> None:
        """Args:
        model: whose workers and requests are looked at.
        every_s: seconds between two looks.
        dry_run: tell what would be done, and do nothing.
        """
        self._client = client
        self._bus = bus
        self._model = model
        self._every_s = every_s
        self._dry_run = dry_run
        self._targets = targets
        # Balancers of several models are not in each other's way.
        self._lease = Lease(bus, BALANCER + model, _SILENT_S + every_s)
        self._decider = Decider(targets)

    def step(self) -> tuple[str, bool]:
        """One look: what is to be said of it, and whether something is done.

        Raises NoAnswer, and what is in `BUS_ERRORS`.
        """
        number = 0
        # (One that only tells may do so beside one that acts.)
        if not self._dry_run and not (number := self._lease.hold()):
            return "another balancer is at work: this one waits", False
        sight = sight_of(self._client.overview(0, model=self._model))
        decision = self._decider.decide(sight, time.monotonic())
        if not decision.worker:
            return decision.why, False
        if self._dry_run:
            return f"{decision.why} (dry run: nothing is done)", True
        why = self._act(decision, number)
        return f"{decision.why}{why}", not why

    def _act(self, decision: Decision, number: int) -> str:
        """Order it; returns what is to be added, if it is not."""
        known = read_workers(self._bus)
        try:
            worker = worker_called(decision.worker, known)
        except UnknownWorker:
            return ", which has gone"
        if worker.role == decision.role:
            return ", which it serves by now"
        same = (worker.role, worker.model, "ready")
        left = sum((w.role, w.model, w.state) == same for w in known) - 1
        if left < self._targets.least_of(worker.role):
            return ", but by now its stage has no worker to spare"  # what the API tells is older
        if why := why_not(worker, decision.role, known):
            return f", but {why}"
        if self._lease.hold() != number:
            return ", but another balancer has taken over"
        order_role(self._bus, worker, decision.role, number)
        return ""

    def leave(self) -> None:
        """Let another one take over at once, if the bus hears it."""
        with suppress(*BUS_ERRORS):
            self._lease.leave()


def run_balance(
    settings: Settings,
    url: str | None,
    targets: Targets,
    console: Console,
    *,
    model: str | None,
    every_s: float,
    dry_run: bool,
    once: bool = False,
) -> None:
    """Balance until Ctrl-C, or look once. Raises NoAnswer when no API answers at the beginning.

    Told is what changes, and each minute that nothing has. `model`: None: the API's default one.
    """
    # The supervisor ends it so: another one is to take over at once then, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as ends:
        client = Client(url)
        ends.callback(client.close)
        model = model or client.overview(0).api.model
        client.overview(0, model=model)
        bus = ends.enter_context(connect(settings))
        balancer = Balancer(client, bus, targets, model=model, every_s=every_s, dry_run=dry_run)
        ends.callback(balancer.leave)
        with suppress(KeyboardInterrupt):
            _run(balancer, console, every_s, once)


def _run(balancer: Balancer, console: Console, every_s: float, once: bool) -> None:
    while True:
        try:
            said, acts = balancer.step()
        except (NoAnswer, *BUS_ERRORS) as exc:
            # Nothing is known, so nothing is done: the workers keep their roles.
            console.warn(str(exc) if isinstance(exc, NoAnswer) else f"bus: {type(exc).__name__}")
        else:
            line = f"{time.strftime('%H:%M:%S')}  {said}"
            (console.good if acts else console.line if once else console.progress)(line)
        if once:
            return
        time.sleep(every_s)
