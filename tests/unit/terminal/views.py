"""An overview for tests."""

from __future__ import annotations

from typing import Any

from pdtasks.overview import (
    Api,
    InFlight,
    Jobs,
    KvFlow,
    Overview,
    Quantiles,
    QueueView,
    RequestView,
    Slot,
    Viewer,
    Way,
    Window,
    WorkerView,
)

AT = 1_800_000_000.0


def a_worker(name: str = "decode1@h", **fields: Any) -> WorkerView:
    """A worker that is ready."""
    values: dict[str, Any] = {
        "name": name,
        "role": "decode",
        "host": "h",
        "pid": 7,
        "device": "cpu",
        "model": "m",
        "state": "ready",
        "reason": "",
        "active": 3,
        "slots": 64,
        "kv_usage": 0.25,
        "since": AT - 7200,
    }
    return WorkerView(**values | fields)


def a_view(request_id: str = "chatcmpl-1", **fields: Any) -> RequestView:
    """An answer that is done."""
    values: dict[str, Any] = {
        "id": request_id,
        "key": "",
        "state": "done",
        "submitted_at": AT - 5,
        "prompt_tokens": 900,
        "output_tokens": 41,
        "first_s": 0.25,
        "second_s": 0.5,
        "seconds": 2.5,
        "way": Way(queue_s=0.05, prefill_s=0.2, handover_s=0.25, decode_s=2.0),
    }
    return RequestView(**values | fields)


def an_overview(**fields: Any) -> Overview:
    """A small stack at work."""
    values: dict[str, Any] = {
        "at": AT,
        "api": Api(host="h", pid=42, since=AT - 100, version="0.1.0", model="m"),
        "viewer": Viewer(sees_all=True, may_act=True),
        "workers": (a_worker("prefill1@h", role="prefill"), a_worker()),
        "queues": (
            QueueView(name="prefill", ready=17, consumers=1, oldest_s=1.25),
            QueueView(name="decode", ready=0, consumers=1),
        ),
        "in_flight": InFlight(in_line=1, prefill=2, handover=3, decode=4),
        "window": Window(
            seconds=300,
            slot_s=5,
            requests=10,
            failed=1,
            tokens=3000,
            tokens_per_s=10,
            ttft=Quantiles(count=9, p50_s=0.123, p95_s=0.5, p99_s=1.5),
            gap=Quantiles(),
            itl=Quantiles(),
            end_to_end=Quantiles(),
            kv=KvFlow(bytes_written=1_500_000, blocks_loaded=3, blocks_recomputed=1),
            slots=tuple(Slot(at=AT + i, ttft_p50_s=i / 10 or None) for i in range(9)),
        ),
        "requests": (a_view(),),
        "jobs": Jobs(),
    }
    return Overview(**values | fields)
