"""Commands in docs/security.md."""

from __future__ import annotations

from pathlib import Path

_PAGE = Path(__file__).parents[1] / "docs" / "security.md"


def commands(beginning: str) -> list[str]:
    """Those that begin so."""
    lines = _PAGE.read_text().splitlines()
    return [line.strip() for line in lines if line.startswith(f"    {beginning}")]
