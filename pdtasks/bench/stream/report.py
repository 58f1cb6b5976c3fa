"""What is shown of a run: medians of its rounds, and ratios of figures of the same round."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

#: By its name in the JSON: what it is, for people.
FIGURES: Final[Mapping[str, str]] = {
    "tokens_per_s": "tokens/s, read one by one",
    "cpu_us_per_token": "CPU of a token, us",
}

#: Figures by side; ours comes first.
Round = Mapping[str, Mapping[str, float]]


def to_json(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians of all sides; `ratios` are ours by each other's, median of the rounds' own."""
    ours, *others = rounds[0]
    return {
        side: {name: _median(r[side][name] for r in rounds) for name in FIGURES}
        for side in (ours, *others)
    } | {
        "ratios": {
            other: {
                name: _median(r[ours][name] / r[other][name] for r in rounds) for name in FIGURES
            }
            for other in others
        },
        "rounds": [
            {side: {name: round(f, 3) for name, f in of.items()} for side, of in one.items()}
            for one in rounds
        ],
    }


def format_report(figures: Mapping[str, Any]) -> str:
    """A table: figures, and ours by the other's in brackets."""
    sides = [name for name in figures if name not in ("ratios", "rounds")]
    lines = [f"{'':<36}" + "".join(f"{side:>24}" for side in sides)]
    for name, shown in FIGURES.items():
        cells = []
        for side in sides:
            ratio = figures["ratios"].get(side, {}).get(name)
            told = "" if ratio is None else f" ({ratio:.2f})"
            cells.append(f"{figures[side][name]:,.2f}{told}")
        lines.append(f"{shown:<36}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def _median(figures: Iterable[float]) -> float:
    return round(statistics.median(figures), 3)
