"""One real stack for all acceptance tests: RabbitMQ, Valkey, two vLLM engines, API and Flower."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.acceptance.running_stack import Stack, started_stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with started_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client() as c:
        yield c
