"""What are queues and tasks called?"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdtasks.naming import DECODE, PREFILL, STAGES, prefill_task_id, request_id_of


@given(st.text())
def test_both_stages_lead_back_to_their_request(request_id: str) -> None:
    # vLLM ends every id with random hex digits, so the suffix is never the caller's own.
    request_id += "-0a1b2c3d"

    assert request_id_of(prefill_task_id(request_id)) == request_id
    assert request_id_of(request_id) == request_id
    assert prefill_task_id(request_id) != request_id


def test_the_stages_are_in_the_order_of_the_journey() -> None:
    assert STAGES == (PREFILL, DECODE)
