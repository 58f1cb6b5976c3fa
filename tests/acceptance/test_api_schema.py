"""Does anything that our own routes' OpenAPI document allows end in a server error?"""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.result import Ok

from tests.acceptance.running_stack import Stack

#: Routes that are not vLLM's.
OURS = r"^/(ready$|pdtasks/|v1/(jobs|files|batches|responses))"
#: The same requests each time: a test that fails has a reason.
EXAMPLES = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_no_request_that_the_document_allows_is_a_server_error(stack: Stack) -> None:
    document = schemathesis.openapi.from_url(f"{stack.api_url}/openapi.json")
    results = list(document.include(path_regex=OURS).get_all_operations())
    operations = [result.ok() for result in results if isinstance(result, Ok)]
    assert len(operations) == len(results) > 12
    try:
        found = {operation.label: statuses_of(operation) for operation in operations}
    finally:
        forget_jobs(stack)
    assert {200, 400, 404} <= set().union(*found.values())
    assert {label: seen for label, seen in found.items() if max(seen) >= 500} == {}


def statuses_of(operation: schemathesis.schemas.APIOperation[Any, Any, Any, Any]) -> set[int]:
    """Of some requests."""
    seen = set()

    @EXAMPLES
    @given(case=operation.as_strategy())
    def ask(case: schemathesis.Case[Any]) -> None:
        if operation.path == "/v1/responses" and isinstance(case.body, dict):
            # Without a bound an answer may be as long as the model's context: minutes.
            case.body.setdefault("max_output_tokens", 32)
        seen.add(case.call(timeout=60).status_code)

    ask()
    return seen


def forget_jobs(stack: Stack) -> None:
    """Some of the requests were good ones."""
    with stack.client() as client:
        for job in client.get("/v1/jobs", params={"limit": 100}).json()["data"]:
            client.delete(f"/v1/jobs/{job['id']}").raise_for_status()
