"""One real stack for all acceptance tests: RabbitMQ, Valkey, two vLLM engines, API and Flower."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.acceptance import exact_cases, parameter_cases
from tests.acceptance.nursery import Nursery
from tests.acceptance.nursery import nursery as started_nursery
from tests.acceptance.parameter_cases import ENGINE_ARGS, FLAGS
from tests.acceptance.reference import Reference, answering
from tests.acceptance.running_stack import Stack, started_stack, wedge_by_signal
from tests.collector import Collector


@pytest.fixture(scope="package")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Where workers and engines fork off whose start is not what is tested."""
    with started_nursery(tmp_path_factory.mktemp("nursery") / "log") as started:
        yield started


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """Where traces of the stack go."""
    with Collector() as running:
        yield running


@pytest.fixture(scope="package")
def stack(
    tmp_path_factory: pytest.TempPathFactory, nursery: Nursery, collector: Collector
) -> Iterator[Stack]:
    changes = wedge_by_signal(tmp_path_factory.mktemp("wedge"))
    # Seconds, beyond the 10 after which a worker counts as silent or stalled: no test that pauses
    # one takes so long.
    changes["PDTASKS_STALL_TIMEOUT_S"] = "4"
    # What no request notices that does not ask for it.
    changes["PDTASKS_API_ARGS"] = FLAGS["tools"]
    changes["PDTASKS_ENGINE_ARGS"] = json.dumps(ENGINE_ARGS)
    # Traced is who asks for it, no other test.
    changes |= collector.env | {"OTEL_TRACES_SAMPLER": "parentbased_always_off"}
    with started_stack(tmp_path_factory.mktemp("stack"), changes, nursery) as running:
        yield running


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client() as c:
        yield c


@pytest.fixture(scope="package")
def reference(
    stack: Stack, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Reference]:
    """A single engine, which answers beside the tests."""
    cases = exact_cases.CASES | parameter_cases.CASES
    folder = tmp_path_factory.mktemp("reference")
    with answering(cases, stack.env, folder, nursery) as answers:
        yield answers


@pytest.fixture(scope="package", autouse=True)
def _begins_early(request: pytest.FixtureRequest) -> None:
    """The single engine has its answers when they are asked for, if any test will ask."""
    if any("reference" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("reference")
