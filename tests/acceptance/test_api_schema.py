"""Does anything that our own routes' OpenAPI document allows end in a server error?"""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error

from tests.acceptance.running_stack import Stack

#: Routes that are not vLLM's.
OURS = r"^/(ready$|pdtasks/|v1/(jobs|files|batches|responses))"


@pytest.fixture
def document(stack: Stack) -> schemathesis.schemas.BaseSchema:
    return schemathesis.openapi.from_url(f"{stack.api_url}/openapi.json").include(path_regex=OURS)


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,  # the same each time: a test that fails has a reason
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_that_the_document_allows_is_a_server_error(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=[not_a_server_error], timeout=60)
