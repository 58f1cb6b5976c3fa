"""Which fault acts on what, when, and for how long? All of it from a seed."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What is done to a part."""

    KILL_PREFILL = "kill-prefill"
    KILL_DECODE = "kill-decode"
    KILL_ENGINE = "kill-engine"  #: vLLM's engine core alone, under a living worker
    FREEZE_ENGINE = "freeze-engine"
    KILL_API = "kill-api"
    STOP_WORKER = "stop-worker"  #: SIGTERM, a planned stop
    FREEZE_WORKER = "freeze-worker"
    FREEZE_API = "freeze-api"
    FREEZE_BROKER = "freeze-broker"
    FREEZE_BUS = "freeze-bus"
    FREEZE_KV = "freeze-kv"
    RESTART_BROKER = "restart-broker"
    RESTART_BUS = "restart-bus"
    RESTART_KV = "restart-kv"
    FLUSH_KV = "flush-kv"
    CUT_ONE = "cut-one"  #: of the connections to RabbitMQ
    CUT_ALL = "cut-all"
    MEMORY_ALARM = "memory-alarm"  #: RabbitMQ takes no messages


#: Those that last.
LASTING = frozenset(
    {
        Kind.FREEZE_WORKER,
        Kind.FREEZE_ENGINE,
        Kind.FREEZE_API,
        Kind.FREEZE_BROKER,
        Kind.FREEZE_BUS,
        Kind.FREEZE_KV,
        Kind.MEMORY_ALARM,
    }
)
#: Only an engine in a process of its own can die or stand alone.
REAL_ENGINE_ONLY = frozenset({Kind.KILL_ENGINE, Kind.FREEZE_ENGINE})

#: Seconds that a lasting fault lasts.  The longest is beyond the stack's stall time-out: a frozen
#: worker is then replaced.
_LASTS_S = (2.0, 10.0)
#: Seconds from the end of one fault to the next.
_PAUSE_S = (4.0, 14.0)
#: Seconds before the first one.
_QUIET_S = 3.0


@dataclass(frozen=True)
class Planned:
    """A fault that is to come."""

    at_s: float  #: since the load has begun
    kind: Kind
    pick: float  #: in [0, 1): which of several equal parts
    lasts_s: float = 0.0


def make_schedule(seed: int, seconds: float, kinds: Collection[Kind]) -> tuple[Planned, ...]:
    """Faults of `kinds`, one after the other, whose ends lie within `seconds`.

    Each kind comes once before any comes again.
    """
    rng = random.Random(seed)  # noqa: S311 - not a secret
    ordered = sorted(kinds)
    faults: list[Planned] = []
    deck: list[Kind] = []
    at_s = _QUIET_S
    while True:
        if not deck:
            deck = rng.sample(ordered, len(ordered))
        kind = deck.pop()
        lasts_s = rng.uniform(*_LASTS_S) if kind in LASTING else 0.0
        if at_s + lasts_s >= seconds:
            return tuple(faults)
        faults.append(Planned(round(at_s, 1), kind, rng.random(), round(lasts_s, 1)))
        at_s += lasts_s + rng.uniform(*_PAUSE_S)
