"""The order of a run: a tenant alone, beside each kind of another's pile."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.chaos.stack import ChaosStack
from pdtasks.bench.fair.clients import Tenant
from pdtasks.bench.latency import p50_p99_ms
from pdtasks.bench.loop_thread import LoopThread
from pdtasks.cluster.console import Console
from pdtasks.keys import Key, add, digest_of, new_secret

T = TypeVar("T")

_DEADLINE_S = 3600.0
_PAUSE_S = 0.1
#: Requests that one worker runs.
_AT_ONCE = 16


@dataclass(frozen=True)
class Plan:
    """What one run is made of."""

    jobs: int = 10_000
    at_once: int = 500  #: requests of the other tenant
    answers: int = 500  #: to one request of it, and prompts of one request
    seconds: float = 30.0  #: of each phase
    in_line_s: float = 2.0  #: until a pile is in line, or gone


def run_fair(
    plan: Plan, home: Path, console: Console, nursery: Nursery | None = None
) -> dict[str, dict[str, float]]:
    """By phase, what one tenant's answers took. On a stack of its own, with stub engines.

    Main thread only. Raises PdtasksError when the stack does not start.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log each request
    keys_file = home / "keys"
    secrets = {name: new_secret() for name in ("modest", "greedy")}
    for name, secret in secrets.items():
        add(keys_file, Key(name, digest_of(secret)))
    with (
        ChaosStack(
            home,
            "stub",
            console,
            deadline_s=_DEADLINE_S,
            nursery=nursery,
            api_keys_file=keys_file,
            max_num_seqs=_AT_ONCE,
        ) as stack,
        LoopThread("clients") as thread,
    ):
        urls, model = list(stack.urls.values()), stack.settings.model_name
        modest, greedy = (Tenant(urls, model, secret) for secret in secrets.values())

        def call(work: Coroutine[Any, Any, T]) -> T:
            future = thread.call(work)
            stack.wait(future.done)
            return future.result()

        found = {}
        for tenant in (modest, greedy):
            call(tenant.open())
        call(modest.ask_for(plan.in_line_s, _PAUSE_S))  # code is run for the first time
        found["alone"] = _figures(call(modest.ask_for(plan.seconds, _PAUSE_S)))
        console.good(_told("alone", found))
        piles = {
            "beside_requests": partial(greedy.keep, plan.at_once),
            "beside_many_answers": partial(greedy.keep, 1, answers=plan.answers),
            "beside_many_prompts": partial(greedy.keep, 1, prompts=plan.answers),
        }
        for name, pile in piles.items():
            beside = thread.call(pile())
            call(asyncio.sleep(plan.in_line_s))
            before, began = greedy.answers, time.monotonic()
            found[name] = _figures(call(modest.ask_for(plan.seconds, _PAUSE_S)))
            others = (greedy.answers - before) / (time.monotonic() - began)
            found[name]["others_per_s"] = round(others, 1)
            console.good(f"{_told(name, found)}; the other had {others:.0f} a second")
            beside.cancel()
            call(asyncio.sleep(plan.in_line_s))
        # Last: they go on for longer than anybody waits.
        call(greedy.submit(plan.jobs))
        found["beside_jobs"] = _figures(call(modest.ask_for(plan.seconds, _PAUSE_S)))
        console.good(_told("beside_jobs", found))
        for tenant in (modest, greedy):
            call(tenant.close())
    return found


def _figures(took_s: Sequence[float]) -> dict[str, float]:
    p50, p99 = p50_p99_ms(took_s)
    return {"answers": len(took_s), "ms_p50": round(p50, 1), "ms_p99": round(p99, 1)}


def _told(phase: str, found: dict[str, dict[str, float]]) -> str:
    of = found[phase]
    return f"{phase}: {of['answers']:.0f} answers, p50 {of['ms_p50']} ms, p99 {of['ms_p99']} ms"
