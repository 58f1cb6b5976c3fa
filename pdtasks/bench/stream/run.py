"""The order of a run: all sides have their streams open, and in each round each goes on in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.control.stack import Services
from pdtasks.bench.stream.client import Crowd
from pdtasks.bench.stream.report import Round
from pdtasks.bench.stream.stack import MODEL, Side, our_side, vllm_side

#: By its name: its module with the stub.
OURS = {"pdtasks": "stub", "pdtasks_without_log": "without_log"}

#: The kernel counts CPU in these: a round of few tokens may seem to have used none.
_TICK_S: Final = 0.01


@dataclass(frozen=True)
class Plan:
    """What one run is made of."""

    rounds: int = 12
    streams: int = 256
    tokens: int = 20  #: of each stream in a round


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
        progress: gets a line for each part of it.
        ours: names of our sides, and their modules with the stub.
        nursery: where processes fork off; None: one of its own.
        services: of the first of our sides; None: its own, as the others'.

    Raises StartFailed when a part does not start, StreamsFailed when a stream is not whole.
    """
    with ExitStack() as ends:
        nursery = nursery or ends.enter_context(Nursery(home / "nursery.log"))
        sides = []
        for name, stub in ours.items():
            progress(f"{name} starts")
            starting = our_side(
                name, home / name, nursery, streams=plan.streams, stub=stub, services=services
            )
            sides.append(ends.enter_context(starting))
            services = None
        progress("vllm starts")
        sides.append(ends.enter_context(vllm_side(home / "vllm", nursery, plan.streams)))
        for side in sides:
            ends.callback(side.begin_to_stop)
        for side in sides:
            side.wait()
        return asyncio.run(_rounds(plan, sides, progress))


async def _rounds(
    plan: Plan, sides: Sequence[Side], progress: Callable[[str], None]
) -> list[Round]:
    async with AsyncExitStack() as ends:
        crowds: dict[str, Crowd] = {}
        for side in sides:
            progress(f"{side.name}: {plan.streams} streams begin")
            # The first one, a round that does not count (code is run for the first time), and the
            # last one: ends cost more.
            tokens = 1 + (plan.rounds + 1) * plan.tokens + 1
            crowd = Crowd(side.url, MODEL, streams=plan.streams, tokens=tokens)
            crowds[side.name] = await ends.enter_async_context(crowd)
        rounds: list[Round] = []
        for number in range(plan.rounds + 1):
            found: dict[str, Mapping[str, float]] = {}
            # Each comes first in turn, and none of three twice in a row: it would find warm caches.
            first = number % len(sides)
            for side in (*sides[first:], *sides[:first]):
                figures = await _relay(side, crowds[side.name], plan)
                found[side.name] = figures
                shown = f"round {number} of {plan.rounds}" if number else "before the first round"
                progress(
                    f"{shown}: {side.name} {figures['tokens_per_s']:,.0f} tokens/s,"
                    f" {figures['cpu_us_per_token']:.0f} us of CPU each"
                )
            rounds.append({side.name: found[side.name] for side in sides})
    return rounds[1:]


async def _relay(side: Side, crowd: Crowd, plan: Plan) -> dict[str, float]:
    before = side.cpu_s()
    seconds = await crowd.relay(plan.tokens)
    used, tokens = max(side.cpu_s() - before, _TICK_S), plan.streams * plan.tokens
    return {"tokens_per_s": tokens / seconds, "cpu_us_per_token": 1e6 * used / tokens}
