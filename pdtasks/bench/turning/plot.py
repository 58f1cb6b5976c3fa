"""How does a load that turns look? Roles, and latencies beside their targets, over time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

_ROLES: Final = ("prefill", "decode", "both")


def draw_turning(
    moments: Sequence[Mapping[str, Any]], file: Path, *, ttft_s: float, itl_s: float
) -> None:
    """Write a PNG of `moments` (`run.Moment` as plain values)."""
    mpl.use("agg")
    figure = Figure(figsize=(10, 7), layout="constrained")
    roles, ttft, itl = figure.subplots(3, 1, sharex=True)
    at = [moment["at_s"] for moment in moments]
    for role in _ROLES:
        numbers = [moment["roles"].get(role, 0) for moment in moments]
        if any(numbers):
            roles.step(at, numbers, where="post", label=role)
    roles.set_ylabel("ready workers")
    roles.set_ylim(bottom=0)
    roles.legend(loc="upper right")
    for axes, name, target, title in (
        (ttft, "ttft_p50_ms", ttft_s, "first token, p50 of 5 s, ms"),
        (itl, "itl_p50_ms", itl_s, "between tokens, p50 of 5 s, ms"),
    ):
        told = [(m["at_s"], m[name]) for m in moments if m[name] is not None]
        axes.plot([x for x, _ in told], [y for _, y in told], ".-", linewidth=0.8, markersize=3)
        axes.axhline(1000 * target, linestyle="--", color="grey", linewidth=0.8)
        axes.set_ylabel(title, fontsize=9)
        axes.set_ylim(bottom=0)
    itl.set_xlabel("seconds; dashed: targets")
    for phase, own in itertools.groupby(moments, key=lambda moment: str(moment["phase"])):
        begin = next(iter(own))["at_s"]
        for axes in (roles, ttft, itl):
            axes.axvline(begin, color="black", linewidth=0.5)
        roles.annotate(phase, (begin, 1.02), xycoords=("data", "axes fraction"), fontsize=9)
    figure.savefig(file, format="png", dpi=100)
