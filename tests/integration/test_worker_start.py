"""A worker that is started wrongly stops with one sentence that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT, Nursery, Services


@pytest.fixture(scope="module")
def starts(
    nursery: Nursery, services: Services, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, str]]:
    """Exit code and words of each wrong start."""
    folder = tmp_path_factory.mktemp("starts")
    alone = {"PDTASKS_HOME": str(folder), "PDTASKS_DEVICE": "cpu"}
    no_bus = alone | {"PDTASKS_BROKER_URL": services.rabbit.url}
    cases: dict[str, tuple[dict[str, str], list[str]]] = {
        "solo": (services.env, ["-Q", "prefill", "-P", "solo"]),
        "nonsense": (services.env, ["-Q", "nonsense", "-P", "threads"]),
        "unknown model": (services.env, ["-Q", "prefill.gpt", "-P", "threads"]),
        "two models": (services.env, ["-Q", "prefill,decode.gpt", "-P", "threads"]),
        "all queues": (services.env, ["-P", "threads"]),
        "no broker": (alone, ["-Q", "prefill", "-P", "threads"]),
        "no bus": (no_bus, ["-Q", "prefill", "-P", "threads"]),
    }
    outcomes = {}
    for name, (env, arguments) in cases.items():
        log = folder / f"{name}.log"
        code = nursery.run(arguments, env | {"STUB_NAME": "none"}, log)
        outcomes[name] = (code, log.read_text())
    return outcomes


def test_by_hand_a_wrong_pool_ends_with_one_clear_sentence(services: Services) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PDTASKS_")}

    done = subprocess.run(
        [
            *(sys.executable, "-m", "celery", "-A", "pdtasks", "worker"),
            *("-Q", "prefill", "-P", "prefork"),
        ],
        env=env | services.env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 2
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("pdtasks: ")]
    assert "-P threads" in said
    assert done.stderr.splitlines()[-1] == said


@pytest.mark.parametrize(
    ("case", "advice"),
    [
        ("solo", "-P threads"),
        ("nonsense", "-Q prefill, -Q decode, or"),
        ("all queues", "-Q prefill, -Q decode, or"),
        ("unknown model", "PDTASKS_MODELS has no model 'gpt'"),
        ("two models", "a worker serves one model"),
        ("no broker", "PDTASKS_BROKER_URL"),
        ("no bus", "PDTASKS_BUS_URL"),
    ],
)
def test_a_wrong_start_ends_with_one_clear_sentence(
    starts: dict[str, tuple[int, str]], case: str, advice: str
) -> None:
    code, errors = starts[case]

    assert code != 0
    said = [line for line in errors.splitlines() if line.startswith("pdtasks: ")]
    assert len(said) == 1, errors
    assert advice in said[0]
    assert "Traceback" not in errors
    assert errors.rstrip().splitlines()[-1] == said[0]


def test_nobody_is_told_a_password(starts: dict[str, tuple[int, str]], services: Services) -> None:
    passwords = [
        url.partition("@")[0].rpartition(":")[2]
        for url in (services.rabbit.url, services.bus_server.url)
    ]

    for _, errors in starts.values():
        assert not any(password in errors for password in passwords)


def test_the_kv_plane_does_not_need_celery() -> None:
    # `-A pdtasks` needs the attribute `celery`; plain `vllm serve` with our connector does not.
    code = "import pdtasks.kv.codec, sys; print('celery' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.strip() == "False"
