"""Does one trace show where a real request's time went, and its KV?"""

from __future__ import annotations

import httpx

from tests.acceptance.running_stack import MODEL
from tests.collector import Collector
from tests.waiting import wait_until

TRACE, CALLER = "c0ffee51916cd43dd8448eb211c80319", "b7ad6b7169203331"
PARTS = {"line", "publish", "prefill", "compute", "save", "decode", "load", "generate"}


def test_a_trace_shows_where_the_time_and_the_kv_of_a_request_went(
    client: httpx.Client, collector: Collector
) -> None:
    response = client.post(
        "/v1/completions",
        json={
            "model": MODEL,
            "prompt": "canary: a trace of many words. " * 20,
            "max_tokens": 8,
            "ignore_eos": True,
        },
        headers={"traceparent": f"00-{TRACE}-{CALLER}-01", "X-Request-Id": "traced"},
    )
    assert response.status_code == 200, response.text

    wait_until(lambda: {*PARTS, "llm_request"} <= {s.name for s in collector.spans(TRACE)})
    spans = {span.name: span for span in collector.spans(TRACE)}  # (of both queues, the last)
    assert spans["POST /v1/completions"].parent == CALLER
    asked = spans["llm_request"]
    assert asked.parent == spans["POST /v1/completions"].id
    prefill, decode = spans["prefill"], spans["decode"]
    assert prefill.parent == decode.parent == asked.id
    # It tells what the request's report tells.
    (report,) = client.get("/pdtasks/requests/cmpl-traced").json()["sequences"]
    for span in (prefill, decode):
        assert span.attributes["pdtasks.worker"] == report[span.name]["worker"]
    assert decode.attributes["pdtasks.kv.bytes_loaded"] == report["decode"]["kv_bytes_loaded"]
    assert decode.attributes["pdtasks.kv.blocks_recomputed"] == 0
    assert spans["save"].attributes["pdtasks.kv.bytes"] > 0
    assert spans["load"].attributes["pdtasks.kv.bytes"] > 0
    # The engines' time is the most of it, and lies within.
    assert spans["compute"].seconds + spans["generate"].seconds <= asked.seconds
    assert asked.begin <= spans["compute"].end <= spans["load"].end <= spans["generate"].end
    assert "canary" not in repr(collector.spans()) + collector.text.decode(errors="replace")
