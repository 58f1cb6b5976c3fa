"""The order of a run: each side in turn, at a pace that all keep up with and at full speed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.control.stack import Services
from pdtasks.bench.stream.client import Order, Relayed, relay
from pdtasks.bench.stream.report import Round
from pdtasks.bench.stream.stack import MODEL, Side, our_side, vllm_side

#: By its name: its module with the stub.
OURS = {"pdtasks": "stub", "pdtasks_without_log": "without_log"}


#: A side keeps up when so much of what the engine makes arrives in time, each token by itself.
_KEEPS_UP = 0.9
#: Halvings of the interval in which the pace is looked for that a side just keeps up with.
_HALVINGS = 5


@dataclass(frozen=True)
class Plan:
    """What one run is made of."""

    rounds: int = 3
    streams: int = 256
    tokens: int = 50  #: of each stream
    step_ms: int = 100  #: between two steps, where all keep up
    fastest_ms: int = 4  #: where none does


def run_stream(
    plan: Plan,
    home: Path,
    progress: Callable[[str], None],
    *,
    ours: Mapping[str, str] = OURS,
    nursery: Nursery | None = None,
    services: Services | None = None,
) -> list[Round]:
    """Run `plan` under `home`.

    Args:
        progress: gets a line for each round.
        ours: names of our sides, and their modules with the stub.
        nursery: where processes fork off; None: one of its own.
        services: of the first of our sides; None: its own, as the others'.

    Raises StartFailed when a part does not start, RuntimeError when a stream is not whole.
    """
    with ExitStack() as ends:
        nursery = nursery or ends.enter_context(Nursery(home / "nursery.log"))
        sides = []
        for name, stub in ours.items():
            where = home / name
            starting = our_side(
                name, where, nursery, streams=plan.streams, stub=stub, services=services
            )
            sides.append(ends.enter_context(starting))
            services = None
        sides.append(ends.enter_context(vllm_side(home / "vllm", nursery, plan.streams)))
        for side in sides:
            # Connections come about, and code is run for the first time.
            _relay(side, plan, plan.fastest_ms)
        rounds: list[Round] = []
        for number in range(plan.rounds):
            # Who comes second finds a warmer machine, or a busier one.
            order = sides if number % 2 == 0 else sides[::-1]
            found = {side.name: _paced(side, plan) for side in order}
            for side in order:
                found[side.name]["tokens_per_s"] = _pace_kept(side, plan)
            rounds.append({side.name: found[side.name] for side in sides})
            told = (f"{s.name} {found[s.name]['tokens_per_s']:,.0f}/s" for s in sides)
            progress(f"round {number + 1} of {plan.rounds}: {', '.join(told)}")
    return rounds


def _relay(side: Side, plan: Plan, step_ms: int) -> Relayed:
    order = Order(plan.streams, plan.tokens, step_ms)
    return asyncio.run(relay(side.url, MODEL, order, side.cpu_s))


def _paced(side: Side, plan: Plan) -> dict[str, float]:
    done = _relay(side, plan, plan.step_ms)
    return {
        "cpu_us_per_token": 1e6 * done.cpu_s / done.tokens,
        "paced_tokens_per_s": done.tokens / done.seconds,
        "tokens_per_event": done.tokens / done.events,
    }


def _pace_kept(side: Side, plan: Plan) -> float:
    """Tokens a second that `side` relays one by one, as the engine makes them.

    Faster than that they arrive late, several in one event, and cost less.
    """
    kept, fast, slow = 0.0, float(plan.fastest_ms), 4.0 * plan.step_ms
    for _ in range(_HALVINGS):
        step_ms = round(math.sqrt(fast * slow))
        done = _relay(side, plan, step_ms)
        asked = 1000 * plan.streams / step_ms
        if min(done.tokens / done.seconds / asked, done.events / done.tokens) >= _KEEPS_UP:
            kept, slow = done.tokens / done.seconds, step_ms
        else:
            fast = step_ms
    return kept
