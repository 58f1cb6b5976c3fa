"""The first thing that a newcomer runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil


def test_the_demo_answers_proves_and_leaves_nothing(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PDTASKS_")}
    env |= {"PDTASKS_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}

    done = subprocess.run(
        [sys.executable, "-m", "pdtasks.cli", "demo"],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "The capital of France is Paris." in done.stdout
    assert "prefill1@" in done.stdout
    assert "decode1@" in done.stdout
    assert "1 KV block" in done.stdout
    assert "loaded, 0 recomputed" in done.stdout
    assert not list(tmp_path.iterdir())
    assert not [p for p in psutil.process_iter() if str(tmp_path) in _environment(p)]


def _environment(process: psutil.Process) -> str:
    try:
        return str(process.environ())
    except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
