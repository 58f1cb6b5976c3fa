"""`pdtasks bench fair`: a folder of its own, and what is shown in the end."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from pathlib import Path

import click

from pdtasks.bench.fair.run import Plan, run_fair
from pdtasks.cluster.console import Console


def run_command(plan: Plan, json_file: Path | None) -> None:
    """Run `plan` on services of its own."""
    # As with Ctrl-C, what was started is ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    console = Console(sys.stderr)
    console.line("stub engines: they compute nothing")
    with tempfile.TemporaryDirectory(prefix="pdtasks-fair-") as home:
        figures = run_fair(plan, Path(home), console)
    click.echo(f"{'one tenant’s answers':<28}{'p50, ms':>10}{'p99, ms':>10}")
    for phase, of in figures.items():
        click.echo(f"{phase.replace('_', ' '):<28}{of['ms_p50']:>10.0f}{of['ms_p99']:>10.0f}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
