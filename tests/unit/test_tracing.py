"""When is a request traced, and what do messages say of it?"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from pdtasks import tracing
from pdtasks.errors import ConfigurationError
from pdtasks.tracing import Carried, carried_by, is_configured, message_headers

PARENT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


@pytest.fixture(autouse=True)
def _unconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("env", "on"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "mine"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
    ],
)
def test_opentelemetrys_own_variables_turn_it_on(
    env: dict[str, str], on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    assert is_configured() is on


@pytest.mark.parametrize(
    "wrong", [{"OTEL_TRACES_EXPORTER": "zipkin"}, {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}]
)
def test_what_cannot_be_done_is_said_at_the_start(
    wrong: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        tracing.make_tracer("pdtasks-api", "i")


def test_a_process_that_is_not_asked_for_traces_imports_nothing_of_opentelemetry() -> None:
    program = """
import sys
from pdtasks import pipeline, tracing
span = tracing.make_tracer("s", "i").begin("n", 1.0, parent={})
span.part("p", 1.0, 2.0, {})
span.end(2.0, {})
assert tracing.message_headers(span.headers, 1.0) == {}
assert tracing.callers_headers() == {}
sys.exit(any(name.startswith("opentelemetry") for name in sys.modules))
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", program], env=env, check=True, timeout=60)


def test_a_message_carries_its_trace_and_when_it_was_sent() -> None:
    state = PARENT | {"tracestate": "vendor=1"}

    assert carried_by(message_headers(state, 12.5)) == Carried(parent=state, sent_at=12.5)


def test_a_message_of_no_trace_says_nothing_of_one() -> None:
    assert message_headers({}, 12.5) == {}
    assert carried_by({}) == carried_by(None) == Carried()


@pytest.mark.parametrize(
    ("odd", "left"),
    [
        ({"traceparent": 7}, Carried()),
        ({"traceparent": "0" * 101}, Carried()),
        ({"tracestate": "a=1"}, Carried()),
        (PARENT | {"tracestate": ["a"]}, Carried(parent=PARENT)),
        (PARENT | {"tracestate": "a" * 513}, Carried(parent=PARENT)),
        (PARENT | {"trace_sent_at": "now"}, Carried(parent=PARENT)),
        (PARENT | {"trace_sent_at": float("nan")}, Carried(parent=PARENT)),
        (PARENT | {"trace_sent_at": True}, Carried(parent=PARENT)),
        (PARENT | {"trace_sent_at": -1}, Carried(parent=PARENT)),
        (PARENT | {"trace_sent_at": 10**400}, Carried(parent=PARENT)),
    ],
)
def test_a_trace_that_cannot_be_is_none(odd: dict[str, Any], left: Carried) -> None:
    assert carried_by(odd) == left


def test_vllms_own_processes_do_not_look_for_the_collector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://collector:4318/v1/traces")

    with tracing.not_vllms():
        assert "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT" not in os.environ

    assert os.environ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] == "http://collector:4318/v1/traces"
