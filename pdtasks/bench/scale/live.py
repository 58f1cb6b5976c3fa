"""The order of a live run: more and more workers, each number asked the same share of a GPU's load.

Open loop: requests come at random times (Poisson), whatever the answers do.  What each part uses
of the CPU follows from its processes' own counts, less what it uses while nobody asks.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.control.stack import Services
from pdtasks.bench.scale.gpu import H200
from pdtasks.bench.scale.stack import MODEL, ScaleStack
from pdtasks.bench.serving.client import Sample, ask_all, make_requests
from pdtasks.bench.serving.plan import Workload
from pdtasks.bench.serving.rows import summarise

#: Seconds in which nobody asks, before each number of workers is asked; before that what has just
#: started comes to rest.
_IDLE_S: Final = 4.0
_REST_S: Final = 3.0
#: Above this part of the host's CPU time nothing that is measured is the stack's own pace.
FULL: Final = 0.92
#: When at least so much of it is used by the stack and its client: else others fill it.
_OURS: Final = 0.5
#: Seconds for a number of workers beside its requests: starts, ends.
_SLACK_S: Final = 15.0


@dataclass(frozen=True)
class Size:
    """Of a stack."""

    prefill: int
    decode: int
    apis: int = 1

    def __str__(self) -> str:
        return f"{self.prefill}P{self.decode}D"


@dataclass(frozen=True)
class LivePlan:
    """What one run is made of."""

    sizes: Sequence[Size] = tuple(Size(n, n, 1 + n // 8) for n in (1, 2, 4, 8, 16, 32))
    seconds: float = 15.0  #: in which requests come, of each workload
    share: float = 0.5  #: of what the prefill engines can do
    slower: float = 1.0  #: how many times as long as a GPU the stub takes; rates are as much lower
    #: Tokens of prompt and answer.  Two answers: what a request costs and what a token does.
    workloads: Sequence[tuple[int, int]] = ((5000, 250), (5000, 10))
    minutes: float = 8.0  #: nothing begins that would not end within

    def rate(self, size: Size, prompt: int, answer: int) -> float:
        """Requests/s."""
        most = min(
            size.prefill * H200.prompts_per_s(prompt),
            size.decode * H200.answers_per_s(prompt, answer),
        )
        return self.share * most / self.slower


@dataclass(frozen=True)
class Used:
    """What was used between two looks."""

    seconds: float
    cpu_s: Mapping[str, float]  #: of each part
    host: float  #: part of the host's CPU time that was used, by whomever
    bus_messages: int  #: replies that it took
    bus_commands_s: float  #: seconds that it was at commands; sockets and files are beside that


def run_live(
    plan: LivePlan,
    home: Path,
    *,
    services: Services,
    nursery: Nursery,
    progress: Callable[[str], None],
    write: Callable[[Sequence[Mapping[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Run `plan` under `home`; a row for each size and workload.

    Args:
        progress: gets a line for each part of it.
        write: gets all rows so far, after each.

    Raises StartFailed when a part does not start.
    """
    until = time.monotonic() + 60 * plan.minutes
    rows: list[dict[str, Any]] = []
    with ScaleStack(home, services, nursery, slower=plan.slower) as stack:
        for size in plan.sizes:
            needed = len(plan.workloads) * (plan.seconds + _SLACK_S)
            if rows and time.monotonic() + needed > until:
                progress(f"{size}: not run, no time is left")
                break
            stack.grow(size.prefill, size.decode, size.apis, progress)
            idle = _idle(stack)
            for workload in plan.workloads:
                row = _ask(plan, size, workload, stack, idle)
                rows.append(row)
                write(rows)
                progress(_told(row))
            if why := why_to_stop([r for r in rows if r["size"] == str(size)]):
                progress(f"stops here: {why}")
                break
    return rows


def why_to_stop(rows: Sequence[Mapping[str, Any]]) -> str:
    """Why more workers would tell nothing of the stack; empty: they would."""
    if any(row["host_cpu"] > FULL and row["own_cpu"] > _OURS for row in rows):
        return f"the host's cores are full (more than {FULL:.0%} used): that is its limit"
    if failed := [row for row in rows if row["failed"]]:
        return f"{failed[0]['failed']} requests failed, one with {failed[0]['first_failure']}"
    return ""


def _idle(stack: ScaleStack) -> dict[str, float]:
    """Cores that each part uses while nobody asks."""
    time.sleep(_REST_S)
    look = _looking(stack)
    time.sleep(_IDLE_S)
    used = look()
    return {name: seconds / used.seconds for name, seconds in used.cpu_s.items()}


def _ask(
    plan: LivePlan,
    size: Size,
    workload: tuple[int, int],
    stack: ScaleStack,
    idle: Mapping[str, float],
) -> dict[str, Any]:
    prompt, answer = workload
    rate = plan.rate(size, prompt, answer)
    asked = Workload(prompt, answer, [rate], seconds=plan.seconds)
    # Made before the clock runs: random prompts cost the client more than asking.
    parts = [
        list(make_requests(Workload(prompt, answer, [rate], requests=number), rate, _random()))
        for number in _shares(asked.num_requests(rate), len(stack.urls))
    ]

    async def ask() -> list[list[Sample]]:
        each = rate / len(stack.urls)
        return await asyncio.gather(
            *(
                ask_all(url, MODEL, own, each, _random(), reports=False)
                for url, own in zip(stack.urls, parts, strict=True)
            )
        )

    look = _looking(stack)
    samples = [sample for own in asyncio.run(ask()) for sample in own]
    used = look()
    figures = summarise(samples, answer, used.seconds)
    return {
        "engine": MODEL,
        "size": str(size),
        **asdict(size),
        "slower": plan.slower,
        "prompt": prompt,
        "answer": answer,
        **_rates(samples, rate, used.seconds),
        **{name: figures[name] for name in figures if name.endswith("_ms") and name != "stages_ms"},
        "answered": len(samples) - figures["failed"],
        "failed": figures["failed"],
        "first_failure": figures["first_failure"],
        "host_cpu": round(used.host, 3),
        "own_cpu": round(sum(used.cpu_s.values()) / used.seconds / (psutil.cpu_count() or 1), 3),
        **_costs(used, idle, len(samples) - figures["failed"]),
        "memory_mib": {name: round(mib, 1) for name, mib in stack.memory_mib().items()},
    }


def _shares(number: int, parts: int) -> list[int]:
    """`number` in as many parts as equal as can be."""
    return [len(range(at, number, parts)) for at in range(parts)]


def _random() -> random.Random:
    return random.Random()  # noqa: S311 - not a secret


def _rates(samples: Sequence[Sample], rate: float, seconds: float) -> dict[str, float]:
    """While requests came: their last answers come when hardly anything else is asked."""
    right = [s for s in samples if s.failure is None]
    first, last = min(s.began for s in samples), max(s.began for s in samples)
    span = max(last - first, 1e-3)
    tokens = sum(first <= at <= last for s in right for at in s.at)
    return {
        "rate": round(rate, 3),
        "offered_per_s": round((len(samples) - 1) / span, 3) if len(samples) > 1 else 0.0,
        "answered_per_s": round(len(right) / seconds, 3),
        "seconds": round(seconds, 2),
        "streams": round(sum(s.e2e for s in right) / seconds, 1),
        "streams_most": most_at_once([(s.began, s.at[-1]) for s in right]),
        "tokens_per_s": round(tokens / span, 1),
    }


def most_at_once(spans: Sequence[tuple[float, float]]) -> int:
    """How many of these spans, each from its beginning to its end, lie over one moment at most."""
    changes = sorted(change for begin, end in spans for change in ((begin, 1), (end, -1)))
    return max(itertools.accumulate(change for _, change in changes), default=0)


def _costs(used: Used, idle: Mapping[str, float], answered: int) -> dict[str, Any]:
    """What an answered request cost each part, beyond what it uses while nobody asks."""
    beyond = {
        name: max(0.0, seconds - used.seconds * idle.get(name, 0.0))
        for name, seconds in used.cpu_s.items()
    }
    messages = max(1, used.bus_messages)
    return {
        "idle_cores": {name: round(cores, 4) for name, cores in idle.items()},
        "cores": {name: round(s / used.seconds, 4) for name, s in used.cpu_s.items()},
        "cpu_ms_per_request": {
            name: round(1e3 * seconds / max(1, answered), 3) for name, seconds in beyond.items()
        },
        "bus_messages": messages,
        "bus_messages_per_s": round(messages / used.seconds, 1),
        "bus_cpu_us_per_message": round(1e6 * beyond["bus"] / messages, 2),
        "bus_commands_us_per_message": round(1e6 * used.bus_commands_s / messages, 2),
    }


def _looking(stack: ScaleStack) -> Callable[[], Used]:
    """Begin to look; the call says what was used since."""

    def look() -> tuple[float, dict[str, float], int, float, Any]:
        # (This process is the client, and the nursery's parent: its children do not count.)
        cpu = {**stack.cpu_s(), "client": time.process_time()}
        commands = stack.bus_commands()
        messages, _ = commands.get("xadd", (0, 0.0))
        commands_s = sum(seconds for _, seconds in commands.values())
        return time.monotonic(), cpu, messages, commands_s, psutil.cpu_times()

    at, cpu, messages, commands_s, host = look()

    def used() -> Used:
        now, cpu_now, messages_now, commands_now, host_now = look()
        busy, every = _busy(host_now), sum(host_now[:8])
        return Used(
            now - at,
            {name: cpu_now[name] - cpu[name] for name in cpu},
            (busy - _busy(host)) / max(every - sum(host[:8]), 1e-3),
            messages_now - messages,
            commands_now - commands_s,
        )

    return used


def _busy(times: Any) -> float:
    return float(sum(times[:8]) - times.idle - times.iowait)


def _told(row: Mapping[str, Any]) -> str:
    return (
        f"{row['size']}, {row['prompt']}/{row['answer']}: {row['offered_per_s']:.1f} requests/s, "
        f"{row['streams']:.0f} streams, {row['tokens_per_s']:,.0f} tokens/s, "
        f"TTFT {row['ttft_mean_ms']} ms, host {row['host_cpu']:.0%} busy "
        f"({row['own_cpu']:.0%} by this run)"
    )
