"""Is there a picture, and a reason where there is none?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdtasks.bench.serving.plot import draw_rates, draw_stages


def row(rate: float, **changes: Any) -> dict[str, Any]:
    figures = dict.fromkeys(
        ("ttft_mean_ms", "gap_p99_ms", "itl_p99_ms", "e2e_mean_ms", "goodput"), 1.0
    )
    return {"topology": "pair", "workload": "w", "rate": rate, **figures} | changes


def test_rates_and_stages_are_drawn(tmp_path: Path) -> None:
    stages = {"decode": {"queue": 1.0, "seconds": 20.0}}
    rows = [row(2), row(4), row(2, topology="ours", stages_ms=stages), row(4, gap_p99_ms=None)]

    draw_rates(rows, tmp_path / "rates.png")
    draw_stages(rows, tmp_path / "stages.png")

    for name in ("rates.png", "stages.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_rows_that_give_no_picture_say_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="several rates"):
        draw_rates([row(2)], tmp_path / "rates.png")
    with pytest.raises(ValueError, match="what the stages said"):
        draw_stages([row(2)], tmp_path / "stages.png")
