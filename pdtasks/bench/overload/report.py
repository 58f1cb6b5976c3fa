"""What is shown of a run, as text and as JSON?"""

from __future__ import annotations

import statistics
from typing import Any

from api.admission import LATEST_S
from pdtasks.bench.overload.clients import Seen
from pdtasks.bench.overload.run import Found


def to_json(found: Found) -> dict[str, Any]:
    """The figures."""
    flood = _figures(found.flood) | {
        "offered_per_s": round(found.flood.asked / found.plan.seconds, 1),
        "answered_per_s": round(_per_s(found), 1),
    }
    again = None
    if found.again is not None:
        again = _figures(found.again) | {
            "came_again": found.again.came_again,
            "came_in_vain": found.again.came_in_vain,
        }
    return {
        "seconds": found.plan.seconds,
        "max_waiting": found.plan.max_waiting,
        "answers_per_s": round(found.per_s, 1),
        "answers_per_s_afterwards": round(found.per_s_afterwards, 1),
        "flood": flood,
        "recovered_s": round(found.recovered_s, 1),
        "came_again": again,
        "memory_mib": {
            group: dict(zip(("before", "first_half", "second_half"), figures, strict=True))
            for group, figures in found.memory_mib.items()
        },
        "left_behind": list(found.left_behind),
    }


def format_report(found: Found) -> str:
    """For a person."""
    figures = to_json(found)
    flood = figures["flood"]
    lines = [
        f"before: {figures['answers_per_s']} answers a second",
        f"flood of {figures['seconds']:.0f} s: {flood['offered_per_s']} requests a second",
        f"    {_told(flood)}",
        f"    {flood['answered_per_s']} answers a second",
        f"as fast as before {figures['recovered_s']} s after its end",
        f"afterwards: {figures['answers_per_s_afterwards']} answers a second",
    ]
    if again := figures["came_again"]:
        lines.append(f"clients that come again as told: {_told(again)}")
        lines.append(
            f"    of {again['came_again']} who were told less than {LATEST_S:.0f} s, "
            f"{again['came_in_vain']} came in vain"
        )
    lines.append(f"{'MiB of memory':<14} {'before':>8} {'first half':>11} {'second half':>12}")
    lines += [
        f"{group:<14} {m['before']:>8} {m['first_half']:>11} {m['second_half']:>12}"
        for group, m in figures["memory_mib"].items()
    ]
    lines += [f"left behind: {what}" for what in found.left_behind]
    return "\n".join(lines)


def _per_s(found: Found) -> float:
    """Answers a second while the flood lasted."""
    seconds = found.plan.seconds
    return sum(at <= seconds for at in found.flood.ended_at) / seconds


def _figures(seen: Seen) -> dict[str, Any]:
    return {
        "asked": seen.asked,
        "right": len(seen.took_s),
        "refused": len(seen.retry_after_s),
        "failed": dict(seen.failed),
        "answer_s": _spread(seen.took_s),
        "retry_after_s": _spread(seen.retry_after_s),
    }


def _spread(values: Any) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "least": round(min(values), 2),
        "median": round(statistics.median(values), 2),
        "most": round(max(values), 2),
    }


def _told(figures: dict[str, Any]) -> str:
    parts = [f"{figures['right']} answered", f"{figures['refused']} refused (429)"]
    if spread := figures["answer_s"]:
        parts.append(f"answers after {spread['least']} to {spread['most']} s")
    if spread := figures["retry_after_s"]:
        parts.append(f"told to come again in {spread['least']} to {spread['most']} s")
    parts += [f"FAILED {times} times: {how}" for how, times in figures["failed"].items()]
    return ", ".join(parts)
