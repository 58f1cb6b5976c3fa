"""One real stack for all acceptance tests: RabbitMQ, Valkey, two vLLM engines, API and Flower."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.acceptance.parameter_cases import ENGINE_ARGS, FLAGS
from tests.acceptance.running_stack import Stack, started_stack, wedge_by_signal


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    changes = wedge_by_signal(tmp_path_factory.mktemp("wedge"))
    # Seconds, beyond the 10 after which a worker counts as silent or stalled: no test that pauses
    # one takes so long.
    changes["PDTASKS_STALL_TIMEOUT_S"] = "4"
    # What no request notices that does not ask for it.
    changes["PDTASKS_API_ARGS"] = FLAGS["tools"]
    changes["PDTASKS_ENGINE_ARGS"] = json.dumps(ENGINE_ARGS)
    with started_stack(tmp_path_factory.mktemp("stack"), changes) as running:
        yield running


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client() as c:
        yield c
