"""What is said of a start while it lasts? Our own words, from logs as they really were."""

from __future__ import annotations

import pytest

from pdtasks.cluster.steps import FIRST, step_of

#: A worker's log, shortened, and the step after each line.
WORKER = (
    ("User information: uid=0 euid=0 gid=0 egid=0", FIRST),
    ("  _warn_or_raise_security_error(egid, euid, gid, uid,", FIRST),
    (
        "[2026-11-26 23:48:26,502: INFO/MainProcess] starting the engine for SmolLM2",
        "starting the engine",
    ),
    ("AssertionError: Expected one _C_extension*.so", "starting the engine"),
    (
        "(EngineCore pid=1) INFO 11-26 23:48:33 [cpu_model_runner.py:68] Starting to load model",
        "loading weights",
    ),
    ("Loading safetensors checkpoint shards:   0% Completed | 0/1", "loading weights"),
    (
        "(EngineCore pid=1) INFO 11-26 23:48:34 [default_loader.py:501] Loading weights took 0.7 s",
        "warming up",
    ),
    (
        "(EngineCore pid=1) INFO 11-26 23:48:36 [core.py:402] init engine took 0.79 s",
        "warming up",
    ),
    (
        "[2026-11-26 23:48:37,549: INFO/MainProcess] the engine is ready after 11.0 s",
        "waiting for the queue",
    ),
)


def test_a_workers_start_is_told_step_by_step() -> None:
    log = ""
    for line, step in WORKER:
        log += line + "\n"
        assert step_of(log) == step


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("Capturing CUDA graphs (decode, FULL):  50%|", "capturing CUDA graphs"),
        ("INFO:     Waiting for application startup.", "preparing its routes"),
        ("INFO:     Application startup complete.", "waiting for workers"),
        ("", FIRST),
    ],
)
def test_other_steps(line: str, step: str) -> None:
    assert step_of(line) == step
