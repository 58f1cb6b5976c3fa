"""What is shown of a run, as text and as JSON?"""

from __future__ import annotations

from typing import Any

from pdtasks.bench.chaos.run import Found
from pdtasks.bench.chaos.tally import BAD, Verdict

_COUNTED = (Verdict.RIGHT, Verdict.CLEAR_ERROR, *BAD)


def to_json(found: Found) -> dict[str, Any]:
    """The figures."""
    tally = found.tally
    return {
        "accepted": tally.accepted,
        **{str(verdict): tally.verdicts[verdict] for verdict in _COUNTED},
        "faults": [
            {
                "at_s": fault.at_s,
                "kind": str(fault.kind),
                "target": fault.target,
                "longest_wait_s": fault.longest_wait_s,
            }
            for fault in found.faults
        ],
    }


def format_report(found: Found, engine: str) -> str:
    """For a person: faults, what the clear errors were, the counts, and each broken promise."""
    tally = found.tally
    lines = [f"{'at, s':>7}  {'fault':<15} {'longest wait, s':>15}  target"]
    lines += [
        f"{f.at_s:>7.1f}  {f.kind:<15} {f.longest_wait_s:>15.2f}  {f.target}" for f in found.faults
    ]
    lines += [f"clear error, {times} times: {why}" for why, times in tally.reasons.most_common()]
    lines += [f"left behind: {what}" for what in found.left_behind]
    for story, found_bad in tally.bad:
        lines.append(f"{found_bad.verdict.upper()} {story.request_id}: {found_bad.why}")
        lines.append(f"    {story.timeline()}")
    figures = {"accepted": tally.accepted} | {str(v): tally.verdicts[v] for v in _COUNTED}
    lines.append(
        f"engines: {engine}; faults: {len(found.faults)}; "
        + "; ".join(f"{name}: {number}" for name, number in figures.items())
    )
    return "\n".join(lines)
