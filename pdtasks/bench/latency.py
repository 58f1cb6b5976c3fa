"""How long did answers take, in two figures?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def p50_p99_ms(took_s: Sequence[float]) -> tuple[float, float]:
    """Milliseconds, of at least one answer's seconds; p99 is one that was measured."""
    took = sorted(1000 * s for s in took_s)
    return statistics.median(took), took[min(len(took) - 1, int(0.99 * len(took)))]
