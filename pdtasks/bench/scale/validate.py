"""Is the model right where something was measured? Rows of bench/results beside the same modelled.

Requests come at the very times at which they came to the GPUs (`serving.run.arrivals_of`), so that
p99 of a hundred requests can be compared too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pdtasks.bench.scale.costs import GPU_HOST, Costs
from pdtasks.bench.scale.gpu import H200, Gpu
from pdtasks.bench.scale.system import SHORT_PROMPT, Layout, System, poisson
from pdtasks.bench.serving.rows import summarise

#: The figures that are compared.
FIGURES: Final = (
    *("ttft_mean_ms", "ttft_p99_ms", "gap_mean_ms", "itl_p50_ms", "itl_p99_ms", "e2e_mean_ms"),
    "goodput",
)

_SPLIT: Final = "2026-11-30-h200x2-4d57b95-a.json"
_SHORT: Final = "2026-11-30-h200x2-dbf6766.json"
_ONE: Final = "2026-11-30-h200x2-4d57b95-a.json"
_PAIR: Final = "2026-11-30-h200x2-9fcd1e7.json"


@dataclass(frozen=True)
class Case:
    """A row that was measured."""

    file: str
    topology: str
    workload: str
    rate: float
    layout: Layout
    prompt: int
    answer: int
    number: int  #: of requests
    short_prompt: int = SHORT_PROMPT

    def __str__(self) -> str:
        at = f"{self.rate:g}/s" if self.rate else "at once"
        return f"{self.topology}, {self.prompt}/{self.answer}, {at}"


_1P1D: Final = Layout(prefill=1, decode=1)
CASES: Final = (
    Case(_SPLIT, "pdtasks 1P1D", "5000/250", 4, _1P1D, 5000, 250, 80),
    Case(_SPLIT, "pdtasks 1P1D", "5000/250", 6, _1P1D, 5000, 250, 120),
    Case(_SPLIT, "pdtasks 1P1D", "200/500, 64 at once", 0, _1P1D, 200, 500, 64, 0),
    Case(_SPLIT, "pdtasks 1P1D", "2048/20", 0.7, _1P1D, 2048, 20, 6),
    Case(_SPLIT, "pdtasks 1P1D", "128/8", 4, _1P1D, 128, 8, 64, 0),
    Case(_ONE, "one", "5000/250", 4, Layout(both=1), 5000, 250, 80),
    Case(_ONE, "one", "5000/250", 6, Layout(both=1), 5000, 250, 120),
    Case(_PAIR, "pair", "5000/250", 4, Layout(both=2), 5000, 250, 80),
    Case(_PAIR, "pair", "5000/250", 6, Layout(both=2), 5000, 250, 120),
)


def measured(case: Case, folder: Path) -> dict[str, Any]:
    """The row. Raises LookupError when the file does not have it."""
    for row in json.loads((folder / case.file).read_text()):
        wanted = (case.topology, case.workload, case.rate, "pdtasks")
        if (row["topology"], row["workload"], row["rate"], row["client"]) == wanted:
            return {name: row[name] for name in FIGURES}
    raise LookupError(f"{case.file} has no row of {case}")


def modelled(case: Case, gpu: Gpu = H200, costs: Costs = GPU_HOST) -> dict[str, Any]:
    """The same figures by simulation."""
    # As `serving.run.arrivals_of`.
    rng = random.Random(f"{case.workload} {case.rate:g} 1")  # noqa: S311 - not a secret
    asks = poisson(case.rate, case.number, case.prompt, case.answer, rng)
    system = System(case.layout, gpu, costs, short_prompt=case.short_prompt)
    outcome = system.run(asks)
    found = summarise(outcome.samples, case.answer, outcome.seconds)
    return {name: found[name] for name in FIGURES}


def validate(folder: Path, cases: Sequence[Case] = CASES) -> list[dict[str, Any]]:
    """Measured, modelled and by how much the model is off, for each case."""
    rows = []
    for case in cases:
        was, found = measured(case, folder), modelled(case)
        rows.append(
            {
                "case": str(case),
                "file": case.file,
                "measured": was,
                "modelled": found,
                "error": {
                    name: round(found[name] / was[name] - 1, 3)
                    for name in FIGURES
                    if was[name] and found[name] is not None
                },
            }
        )
    return rows
