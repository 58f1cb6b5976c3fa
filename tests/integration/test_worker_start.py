"""A worker that is started wrongly stops with one sentence that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, Services

Started = subprocess.Popen[str]


def celery_worker(env: dict[str, str], *arguments: str) -> Started:
    """`celery -A pdtasks worker …`, as by hand."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PDTASKS_")}
    return subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "pdtasks", "worker", *arguments],
        env=clean | env | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def starts(
    services: Services, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, str]]:
    """Exit code and standard error of each wrong start. Together, for each imports a lot."""
    empty = {"PDTASKS_HOME": str(tmp_path_factory.mktemp("no-stack")), "PDTASKS_DEVICE": "cpu"}
    no_bus = empty | {"PDTASKS_BROKER_URL": services.rabbit.url}
    processes = {
        "prefork": celery_worker(services.env, "-Q", "prefill", "-P", "prefork"),
        "solo": celery_worker(services.env, "-Q", "prefill", "-P", "solo"),
        "nonsense": celery_worker(services.env, "-Q", "nonsense", "-P", "threads"),
        "both": celery_worker(services.env, "-P", "threads"),
        "no broker": celery_worker(empty, "-Q", "prefill", "-P", "threads"),
        "no bus": celery_worker(no_bus, "-Q", "prefill", "-P", "threads"),
    }
    outcomes = {}
    for name, process in processes.items():
        try:
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        outcomes[name] = (process.returncode, errors)
    return outcomes


@pytest.mark.parametrize(
    ("case", "advice"),
    [
        ("prefork", "-P threads"),
        ("solo", "-P threads"),
        ("nonsense", "-Q prefill or -Q decode"),
        ("both", "-Q prefill or -Q decode"),
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
    assert errors.splitlines()[-1] == said[0]


def test_nobody_is_told_a_password(starts: dict[str, tuple[int, str]], services: Services) -> None:
    passwords = [
        url.partition("@")[0].rpartition(":")[2]
        for url in (services.rabbit.url, services.bus_server.url)
    ]

    for _, errors in starts.values():
        assert not any(password in errors for password in passwords)


def test_a_worker_can_be_found_by_its_name() -> None:
    # `-A pdtasks` needs the attribute `celery`; everything else of the package must not need Celery.
    assert (Path(ROOT) / "pdtasks" / "__init__.py").is_file()
    code = "import pdtasks.kv.codec, sys; print('celery' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.strip() == "False"
