"""How does a test steer a stub worker? Mostly through a database of the bus: not the product's."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import cast

import valkey

#: Makes a worker's main loop stand still for ever.
STALL_SIGNAL = signal.SIGRTMIN
#: A request with this prompt token kills the worker that runs it.
POISON = 666


def token_text(token_id: int) -> str:
    """What a token of its reads like."""
    return f"canary-answer-{token_id} "


def steering_url(bus_url: str) -> str:
    """Database 1 of the bus, where the product keeps nothing."""
    return bus_url.removesuffix("/0") + "/1"


def added_key(worker: str) -> str:
    """A list of the engine ids that were added."""
    return f"stub:{worker}:added"


def held_key(worker: str) -> str:
    """While it exists the engine steps only when told."""
    return f"stub:{worker}:held"


def steps_key(worker: str) -> str:
    """A list with one entry for each step that may be done."""
    return f"stub:{worker}:steps"


@dataclass(frozen=True)
class Steering:
    """One worker's stub engine."""

    worker: str
    bus: valkey.Valkey

    def hold(self) -> None:
        """No further step without `step`."""
        self.bus.set(held_key(self.worker), 1)

    def step(self, count: int = 1) -> None:
        """Do so many steps."""
        self.bus.rpush(steps_key(self.worker), *[1] * count)

    def release(self) -> None:
        """Step on its own again."""
        self.bus.delete(held_key(self.worker), steps_key(self.worker))

    def added(self) -> list[str]:
        """Requests (as their askers know them) that the engine got, one entry for each attempt."""
        ids = cast("list[bytes]", self.bus.lrange(added_key(self.worker), 0, -1))
        return [engine_id.decode().partition("#")[0] for engine_id in ids]
