"""What is shown of a run: medians of its rounds, and ratios of figures of the same round."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

#: By its name in the JSON: what it is, for people.
FIGURES: Final[Mapping[str, str]] = {
    "chains_per_s": "requests/s",
    "latency_ms_p50": "latency, ms, p50",
    "latency_ms_p99": "latency, ms, p99",
    "loaded_latency_ms_p50": "under load, ms, p50",
    "loaded_latency_ms_p99": "under load, ms, p99",
    "cpu_ms_per_request": "CPU of client and workers, ms",
    "broker_cpu_ms": "CPU of RabbitMQ, ms",
    "bus_cpu_ms": "CPU of the bus, ms",
    "kv_cpu_ms": "CPU of the kv server, ms",
}

#: Figures by side.
Round = Mapping[str, Mapping[str, float]]


def to_json(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians of both sides; `ratios` are ours by theirs, median of the rounds' own."""
    ours, theirs = rounds[0]
    return {
        side: {name: _median(r[side][name] for r in rounds) for name in FIGURES}
        for side in (ours, theirs)
    } | {
        "ratios": {
            name: _median(r[ours][name] / r[theirs][name] for r in rounds)
            for name in FIGURES
            if all(r[theirs][name] for r in rounds)
        },
        "rounds": [
            {side: {name: round(f, 3) for name, f in of.items()} for side, of in one.items()}
            for one in rounds
        ],
    }


def format_report(figures: Mapping[str, Any]) -> str:
    """A table."""
    ours, theirs = list(figures)[:2]
    lines = [f"{'':<30} {ours:>12} {theirs:>14} {'ratio':>7}"]
    for name, shown in FIGURES.items():
        ratio = figures["ratios"].get(name)
        lines.append(
            f"{shown:<30} {figures[ours][name]:>12.2f} {figures[theirs][name]:>14.2f} "
            f"{'' if ratio is None else f'{ratio:.2f}':>7}"
        )
    return "\n".join(lines)


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)
