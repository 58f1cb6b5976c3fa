"""What are queues and tasks called?"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdtasks.naming import (
    DECODE,
    MODEL_NAME,
    PREFILL,
    STAGES,
    prefill_task_id,
    queue_of,
    request_id_of,
    stage_and_model,
)


@given(st.text())
def test_both_stages_lead_back_to_their_request(request_id: str) -> None:
    # vLLM ends every id with random hex digits, so the suffix is never the caller's own.
    request_id += "-0a1b2c3d"

    assert request_id_of(prefill_task_id(request_id)) == request_id
    assert request_id_of(request_id) == request_id
    assert prefill_task_id(request_id) != request_id


@given(st.sampled_from(STAGES), st.just("") | st.from_regex(rf"\A{MODEL_NAME}\Z"))
def test_a_queue_says_of_which_stage_and_model_it_is(stage: str, model: str) -> None:
    queue = queue_of(stage, model)

    assert stage_and_model(queue) == (stage, model)
    assert (queue in STAGES) == (model == "")
    # What `-Q` and a topic exchange would understand otherwise.
    assert not set(queue) & set(",*# /\n")


def test_the_stages_are_in_the_order_of_the_journey() -> None:
    assert STAGES == (PREFILL, DECODE)
