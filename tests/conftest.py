"""What a failed test shows beside its own output: the last words of the processes it had."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

#: Lines of each log, and logs, of one failed test.
_LINES, _LOGS = 15, 12


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where CI runs, the logs are gone with the machine."""
    report = yield
    if report.when == "call" and report.failed:
        found = sorted(
            set(_logs(getattr(item, "funcargs", {}))), key=lambda log: log.stat().st_mtime
        )
        for log in found[-_LOGS:]:
            words = log.read_text(errors="replace").splitlines()[-_LINES:]
            report.sections.append((f"last lines of {log}", "\n".join(words)))
    return report


def _logs(fixtures: dict[str, Any]) -> Iterator[Path]:
    if isinstance(folder := fixtures.get("tmp_path"), Path):
        yield from folder.rglob("*.log")
    if stack := fixtures.get("stack"):
        home = stack.home if hasattr(stack, "home") else stack.settings.home
        yield from (home / "logs").glob("*.log")
