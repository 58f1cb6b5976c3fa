"""How are figures written for people? The same in every table of the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

NOTHING: Final = "–"
_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")


def duration(seconds: float | None) -> str:
    """Three digits at most, from microseconds to days."""
    if seconds is None:
        return NOTHING
    if seconds < 0.0995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def size(num_bytes: float) -> str:
    """In powers of 1000."""
    unit = 0
    while num_bytes >= 999.5 and unit < len(_UNITS) - 1:
        num_bytes, unit = num_bytes / 1000, unit + 1
    return (
        f"{num_bytes:.0f} {_UNITS[unit]}"
        if num_bytes >= 9.95 or not unit
        else (f"{num_bytes:.1f} {_UNITS[unit]}")
    )


def share(part: float, whole: float) -> str:
    """Percent."""
    return f"{part / whole:.0%}" if whole else NOTHING


def sparkline(values: Iterable[float | None], width: int) -> str:
    """The last `width` values as blocks, the highest full; gaps are blank."""
    shown = list(values)[-width:]
    highest = max((v for v in shown if v is not None), default=0.0)
    if highest <= 0:
        return " " * len(shown)
    top = len(_BLOCKS) - 1
    return "".join(" " if v is None else _BLOCKS[round(v / highest * top)] for v in shown)
