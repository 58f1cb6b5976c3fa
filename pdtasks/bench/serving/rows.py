"""What are the figures of one workload?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

from pdtasks.bench.serving.client import Sample

#: A good answer begins within so long, and has no gap longer than the other: the one after the
#: first token counts too. Seconds.
GOOD_TTFT_S: Final = 1.0
GOOD_GAP_S: Final = 0.05

_STAGE_TIMES: Final = ("queue_s", "seconds", "kv_seconds")


@dataclass(frozen=True)
class Row:
    """One run of a workload. Milliseconds; requests and tokens a second."""

    device: str
    topology: str
    workload: str
    rate: float  #: requests/s that were meant to come; 0: all at once
    repeat: int  #: which run of the same, from 1
    client: str  #: "pdtasks" or "vllm bench serve"
    requests: int
    failed: int
    ttft_mean_ms: float | None
    ttft_p99_ms: float | None
    gap_mean_ms: float | None  #: from the first token to the second
    gap_p99_ms: float | None
    itl_p50_ms: float | None  #: all gaps, that one too
    itl_p99_ms: float | None
    e2e_mean_ms: float | None
    goodput: float | None
    output_tokens_per_s: float | None
    recomputed_blocks: int | None  #: None: nobody says
    stages_ms: dict[str, dict[str, float]] = field(default_factory=dict)  #: means of the reports
    gpu_percent: dict[str, float] = field(default_factory=dict)  #: mean utilisation of each GPU
    first_failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """An object with these fields."""
        return asdict(self)


def summarise(samples: Sequence[Sample], answer: int, seconds: float) -> dict[str, Any]:
    """The figures of a row that samples tell.

    Args:
        answer: tokens of each.
        seconds: from the first request to the last token.
    """
    right = [s for s in samples if s.failure is None]
    gaps = [gap for s in right for gap in s.gaps]
    first_gaps = [s.gaps[0] for s in right if s.gaps]
    stages = [s.stages for s in right if s.stages]
    return {
        "requests": len(samples),
        "failed": len(samples) - len(right),
        "ttft_mean_ms": _mean([s.ttft for s in right]),
        "ttft_p99_ms": quantile([s.ttft for s in right], 0.99),
        "gap_mean_ms": _mean(first_gaps),
        "gap_p99_ms": quantile(first_gaps, 0.99),
        "itl_p50_ms": quantile(gaps, 0.5),
        "itl_p99_ms": quantile(gaps, 0.99),
        "e2e_mean_ms": _mean([s.e2e for s in right]),
        "goodput": round(sum(map(is_good, right)) / seconds, 3),
        "output_tokens_per_s": round(answer * len(right) / seconds, 1),
        "recomputed_blocks": sum(
            stage["kv_blocks_recomputed"] for own in stages for stage in own.values()
        )
        if stages
        else None,
        "stages_ms": _stage_means(stages),
        "first_failure": next((s.failure for s in samples if s.failure), None),
    }


def is_good(sample: Sample) -> bool:
    """Did it begin soon, and then never pause?"""
    return sample.ttft < GOOD_TTFT_S and max(sample.gaps, default=0.0) < GOOD_GAP_S


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest of `values` (seconds) that `share` of them do not exceed, in ms."""
    if not values:
        return None
    at = min(len(values) - 1, int(share * len(values)))
    return round(1000 * sorted(values)[at], 2)


def medians(rows: Sequence[Row]) -> list[Row]:
    """One row for all runs of the same; `repeat` says how many there were."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.topology, row.workload, row.rate, row.client), []).append(row)
    return [replace(own[0], repeat=len(own), **_medians(own)) for own in groups.values()]


def _medians(rows: Sequence[Row]) -> dict[str, Any]:
    sums = ("requests", "failed", "recomputed_blocks")
    found: dict[str, Any] = {}
    for name in (f.name for f in fields(Row) if f.name.endswith("_ms") and f.name != "stages_ms"):
        found[name] = _median([getattr(row, name) for row in rows])
    for name in ("goodput", "output_tokens_per_s"):
        found[name] = _median([getattr(row, name) for row in rows])
    for name in sums:
        there = [value for row in rows if (value := getattr(row, name)) is not None]
        found[name] = sum(there) if there else None
    return found


def _median(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def format_rows(rows: Sequence[Row]) -> str:
    """A table of medians, a line for all runs of the same. Milliseconds."""
    head = (
        "topology", "workload", "req/s", "runs", "failed", "TTFT", "p99", "gap", "p99", "ITL p50",
        "p99", "e2e", "good/s", "tokens/s", "recomputed",
    )  # fmt: skip
    lines = [
        (
            r.topology + (" (vLLM's client)" if r.client != "pdtasks" else ""), r.workload,
            f"{r.rate:g}" if r.rate else "all", str(r.repeat), f"{r.failed}/{r.requests}",
            *map(_shown, (
                r.ttft_mean_ms, r.ttft_p99_ms, r.gap_mean_ms, r.gap_p99_ms, r.itl_p50_ms,
                r.itl_p99_ms, r.e2e_mean_ms, r.goodput, r.output_tokens_per_s,
            )),
            "-" if r.recomputed_blocks is None else str(r.recomputed_blocks),
        )
        for r in medians(rows)
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *lines)
    )


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _mean(values: Sequence[float]) -> float | None:
    return round(1000 * statistics.fmean(values), 2) if values else None


def _stage_means(stages: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            key.removesuffix("_s"): _mean([own[name][key] for own in stages if name in own]) or 0.0
            for key in _STAGE_TIMES
        }
        for name in dict.fromkeys(name for own in stages for name in own)
    }
