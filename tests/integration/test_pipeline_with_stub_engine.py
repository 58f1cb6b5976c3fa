"""The path of a request over real RabbitMQ and Valkey, with workers whose engine core is a stub."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
from celery.exceptions import TaskRevokedError
from vllm.v1.engine import FinishReason

from pdtasks.bus.presence import read_workers
from pdtasks.engine.wire import decode_request
from pdtasks.errors import InvalidRequest, PdtasksError, RequestAborted, RequestTimeout
from pdtasks.messages import DecodeJob, read_message
from pdtasks.pipeline import submit
from tests.integration.asker import Asker, engine_request
from tests.integration.conftest import Services, StartWorker, cut_connections
from tests.integration.leftovers import wait_until_nothing_is_left
from tests.waiting import wait_until

ANSWER = [100, 101, 102, 103]


def is_idle(services: Services) -> bool:
    """Nobody works on anything. (Workers say so every second or two.)"""
    return all(w.active == 0 for w in read_workers(services.bus))


# -- the journey -------------------------------------------------------------------------------


def test_prefill_publishes_the_first_token_itself_and_hands_over_the_rest(
    start_worker: StartWorker, asker: Asker, our_app: Any, channel: Any
) -> None:
    # Given no decode worker, but its queue
    queue = our_app.amqp.queues["decode"].bind(channel)
    queue.declare()
    start_worker("prefill")

    asker.ask("r", max_tokens=4, seed=7)

    # Then the first token is there all the same, without an end
    wait_until(asker.outputs)
    ((stage, position, output),) = asker.outputs()
    assert (stage, position, output.new_token_ids) == ("prefill", 0, [100])
    assert output.finish_reason is None
    # and the decode job carries what is needed to go on, and whom to answer
    message = wait_until(lambda: queue.get(no_ack=True, accept=["msgpack"]))
    assert message.properties["reply_to"] == asker.stream
    (wire,), _, _ = message.decode()
    job = read_message(DecodeJob, wire)
    assert job.output_token_ids == (100,)
    assert job.handle is not None
    assert job.prefill is not None
    assert job.prefill.worker == "prefill1@test"
    assert decode_request(job.request) == engine_request("r", max_tokens=4, seed=7)


def test_both_stages_make_one_answer_and_leave_nothing_behind(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    start_worker("prefill")
    start_worker("decode")

    asker.ask("r")

    wait_until(asker.finished)
    assert [(p, o.new_token_ids) for _, p, o in asker.outputs()] == [
        (0, [100]),
        (1, [101]),
        (2, [102]),
        (3, [103]),
    ]
    assert [stage for stage, _, _ in asker.outputs()] == ["prefill", *["decode"] * 3]
    assert asker.outputs()[-1][2].finish_reason == FinishReason.LENGTH
    prefill, decode = asker.messages()[-1].reports["r"]
    assert (prefill.worker, decode.worker) == ("prefill1@test", "decode1@test")
    assert (prefill.output_tokens, decode.output_tokens) == (1, 3)
    # A request with a reply stream stores no result.
    wait_until_nothing_is_left(services, asker.stream)


def test_an_answer_of_one_token_never_reaches_decode(
    start_worker: StartWorker, asker: Asker, services: Services, channel: Any
) -> None:
    start_worker("prefill")

    asker.ask("r", max_tokens=1)

    wait_until(asker.finished)
    assert asker.tokens() == [100]
    assert [r.stage for r in asker.messages()[-1].reports["r"]] == ["prefill"]
    wait_until_nothing_is_left(services, asker.stream)
    # The queue is not there, for nobody has published to it.
    with pytest.raises(channel.connection.channel_errors):
        channel.queue_declare("decode", passive=True)


def test_a_step_is_one_message_for_each_stream_however_many_requests_are_in_it(
    start_worker: StartWorker, make_asker: Callable[[], Asker]
) -> None:
    # Given three requests of two askers in one engine
    worker = start_worker("prefill", held=True)
    one, other = make_asker(), make_asker()
    one.ask("a", max_tokens=1)
    one.ask("b", max_tokens=1)
    other.ask("c", max_tokens=1)
    wait_until(lambda: len(worker.steering.added()) == 3)

    worker.steering.step()

    wait_until(lambda: one.messages() and other.messages())
    assert [sorted(m.reports) for m in one.messages()] == [["a", "b"]]
    assert [sorted(m.reports) for m in other.messages()] == [["c"]]


def test_many_requests_at_once_all_get_their_own_answer(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    start_worker("prefill")
    start_worker("decode")
    names = [f"r{i}" for i in range(24)]

    for length, name in enumerate(names, start=1):
        asker.ask(name, max_tokens=length)

    wait_until(lambda: all(asker.finished(name) for name in names))
    for length, name in enumerate(names, start=1):
        assert asker.tokens(name) == list(range(100, 100 + length))
    wait_until_nothing_is_left(services, asker.stream)


# -- results for Python callers ------------------------------------------------------------------


def test_submit_gives_the_finished_answer(start_worker: StartWorker, services: Services) -> None:
    start_worker("prefill")
    start_worker("decode")

    answer = submit("hello", temperature=0, max_tokens=4).get(timeout=20)

    assert answer["token_ids"] == ANSWER
    assert answer["text"] == "".join(f"canary-answer-{t} " for t in ANSWER)
    assert answer["finish_reason"] == "length"
    assert [s["stage"] for s in answer["stages"]] == ["prefill", "decode"]
    wait_until(lambda: not services.kv.keys())


def test_submit_gives_an_answer_that_ends_in_prefill(start_worker: StartWorker) -> None:
    start_worker("prefill")

    answer = submit("hello", temperature=0, max_tokens=1).get(timeout=20)

    assert answer["token_ids"] == [100]
    assert [s["stage"] for s in answer["stages"]] == ["prefill"]


def test_submit_raises_what_was_wrong_with_the_request(start_worker: StartWorker) -> None:
    start_worker("prefill")

    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        submit("").get(timeout=20)


def test_a_result_lives_as_long_as_configured(
    start_worker: StartWorker, services: Services
) -> None:
    start_worker("prefill", result_ttl_s="77")

    result = submit("hello", temperature=0, max_tokens=1)
    result.get(timeout=20)

    (key,) = cast("list[bytes]", services.bus.keys("celery-task-meta-*"))
    assert 70 < cast("int", services.bus.ttl(key)) <= 77


# -- nobody wants it any more ------------------------------------------------------------------


def test_an_abort_that_overtakes_its_request_is_remembered(
    start_worker: StartWorker, asker: Asker, services: Services, abort: Callable[[str], None]
) -> None:
    worker = start_worker("prefill")
    abort("r")

    asker.ask("r")
    asker.ask("other", max_tokens=1)

    wait_until(lambda: asker.finished("other") and "r.prefill] succeeded" in worker.log)
    assert worker.steering.added() == ["other"], "nothing was generated for it"
    assert asker.failures() == {}
    wait_until_nothing_is_left(services, asker.stream)


def test_an_abort_before_decode_begins_drops_the_decode_job(
    start_worker: StartWorker, asker: Asker, services: Services, abort: Callable[[str], None]
) -> None:
    # Given a request between its stages
    start_worker("prefill")
    asker.ask("r")
    wait_until(asker.outputs)
    wait_until(services.kv.keys)

    # When it is aborted before a decode worker hears of it, or of the request
    decode = start_worker("decode", held=True)
    wait_until(lambda: decode.steering.added() == ["r"])
    abort("r")

    wait_until_nothing_is_left(services, asker.stream)
    assert asker.tokens() == [100]
    wait_until(lambda: is_idle(services))


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_an_abort_ends_a_running_request_and_frees_its_keys(
    start_worker: StartWorker,
    asker: Asker,
    services: Services,
    abort: Callable[[str], None],
    stage: str,
) -> None:
    workers = {role: start_worker(role, held=role == stage) for role in ("prefill", "decode")}
    asker.ask("r", max_tokens=60)
    asker.ask("other", max_tokens=60)
    held = workers[stage]
    wait_until(lambda: sorted(held.steering.added()) == ["other", "r"])

    abort("r")
    told = len(asker.tokens())
    held.steering.release()

    wait_until(lambda: asker.finished("other"))
    assert len(asker.tokens("other")) == 60
    assert len(asker.tokens("r")) == told
    assert asker.failures() == {}
    wait_until_nothing_is_left(services, asker.stream)


def test_an_asker_that_is_gone_is_noticed_and_its_requests_are_dropped(
    start_worker: StartWorker, make_asker: Callable[[], Asker], services: Services
) -> None:
    # Given two askers with endless requests in decode
    start_worker("prefill")
    decode = start_worker("decode", held=True)
    gone, other = make_asker(), make_asker()
    gone.ask("a", max_tokens=900)
    other.ask("b", max_tokens=4)
    wait_until(lambda: sorted(decode.steering.added()) == ["a", "b"])

    # When one disappears without a word
    gone.hang_up()
    decode.steering.step()

    # Then its request ends with the next token, and nothing piles up for it
    wait_until(lambda: "aborted a" in decode.log)
    decode.steering.release()
    wait_until(lambda: other.finished("b"))
    wait_until_nothing_is_left(services, other.stream)


def test_an_aborted_result_says_so(start_worker: StartWorker, abort: Callable[[str], None]) -> None:
    start_worker("prefill")
    decode = start_worker("decode", held=True)
    results = [submit("hello", temperature=0, max_tokens=4) for _ in range(2)]
    wait_until(lambda: len(decode.steering.added()) == 2)

    abort(results[0].id)
    results[1].revoke(terminate=True)  # Celery's own way

    with pytest.raises(RequestAborted):
        results[0].get(timeout=20)
    with pytest.raises((RequestAborted, TaskRevokedError)):
        results[1].get(timeout=20)


# -- too late ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_deadline_in_the_engine_is_told(
    start_worker: StartWorker, asker: Asker, services: Services, stage: str
) -> None:
    workers = {role: start_worker(role, held=role == stage) for role in ("prefill", "decode")}
    asker.ask("r", timeout_s=1.5)
    result = submit("hello", temperature=0, max_tokens=4, timeout_s=1.5)
    wait_until(lambda: len(workers[stage].steering.added()) == 2)

    wait_until(asker.failures)

    assert asker.failures()["r"].code == "RequestTimeout"
    with pytest.raises(RequestTimeout):
        result.get(timeout=20)
    result.forget()
    wait_until_nothing_is_left(services, asker.stream)
    wait_until(lambda: is_idle(services))


def test_a_deadline_that_passed_in_the_queue_costs_no_engine_and_leaves_nothing(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    start_worker("prefill")
    asker.ask("r", timeout_s=0.6)
    wait_until(services.kv.keys)
    deadline_passed = threading.Event()
    deadline_passed.wait(0.6)  # the one thing to wait for is the clock

    decode = start_worker("decode")

    wait_until(asker.failures)
    assert asker.failures()["r"].code == "RequestTimeout"
    assert asker.tokens() == [100]
    wait_until_nothing_is_left(services, asker.stream)
    assert len(decode.steering.added()) <= 1


# -- workers come and go -------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_worker_that_is_killed_hands_its_jobs_to_another(
    start_worker: StartWorker, asker: Asker, services: Services, stage: str
) -> None:
    other_stage = "decode" if stage == "prefill" else "prefill"
    start_worker(other_stage)
    victim = start_worker(stage, held=True)
    asker.ask("r")
    result = submit("hello", temperature=0, max_tokens=4)
    wait_until(lambda: len(victim.steering.added()) == 2)

    victim.signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    start_worker(stage, 2)

    wait_until(asker.finished)
    assert asker.tokens() == ANSWER
    assert asker.failures() == {}
    answer = result.get(timeout=20)
    assert answer["token_ids"] == ANSWER
    assert {s["stage"]: s["worker"] for s in answer["stages"]}[stage] == f"{stage}2@test"
    result.forget()
    wait_until_nothing_is_left(services, asker.stream)


def test_a_worker_that_is_told_to_stop_finishes_what_it_has(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    worker = start_worker("prefill", held=True)
    asker.ask("r", max_tokens=1)
    wait_until(worker.steering.added)

    worker.signal(signal.SIGTERM)
    wait_until(lambda: [w.state for w in read_workers(services.bus)] == ["draining"])
    worker.steering.release()

    assert worker.wait() == 0
    assert asker.finished()
    assert read_workers(services.bus) == []


def test_a_cold_stop_gives_the_jobs_back_at_once(start_worker: StartWorker, asker: Asker) -> None:
    worker = start_worker("prefill", held=True)
    asker.ask("r", max_tokens=1)
    wait_until(worker.steering.added)

    worker.signal(signal.SIGQUIT)

    wait_until(worker.has_ended, 10, "the worker ends although its request does not")
    start_worker("prefill", 2)
    wait_until(asker.finished)
    assert asker.tokens() == [100]


def test_a_lost_connection_does_not_run_a_request_twice(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    # Given requests in decode that no second attempt would answer alike
    start_worker("prefill")
    decode = start_worker("decode", held=True)
    asker.ask("r", temperature=1.0)
    result = submit("hello", temperature=1.0, max_tokens=4)
    wait_until(lambda: len(decode.steering.added()) == 2)
    decode.steering.step()

    # When RabbitMQ loses the worker, and delivers its jobs again
    with cut_connections(services, decode):
        wait_until(lambda: decode.log.count("joins its run") == 2)
    decode.steering.release()

    # Then the first attempt goes on, and is the only one
    wait_until(asker.finished)
    answer = result.get(timeout=20)
    assert len(asker.tokens()) == len(answer["token_ids"]) == 4
    assert asker.failures() == {}
    assert sorted(decode.steering.added()) == sorted(["r", result.id])
    # Both deliveries store the answer, one as good as the other: forget what the last one stored.
    wait_until(lambda: decode.log.count(f"pdtasks.decode[{result.id}] succeeded") == 2)
    result.forget()
    wait_until_nothing_is_left(services, asker.stream)


def test_a_lost_connection_during_prefill_makes_one_decode_job(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    prefill = start_worker("prefill", held=True)
    decode = start_worker("decode")
    asker.ask("r", temperature=1.0)
    wait_until(prefill.steering.added)

    with cut_connections(services, prefill):
        wait_until(lambda: "r.prefill was delivered again and joins its run" in prefill.log)
    prefill.steering.release()

    wait_until(asker.finished)
    assert len(asker.tokens()) == 4
    assert (prefill.steering.added(), decode.steering.added()) == (["r"], ["r"])


# -- nobody reads along ----------------------------------------------------------------------------


def test_prompts_and_answers_are_in_no_log_event_or_inspection(
    start_worker: StartWorker, our_app: Any, services: Services
) -> None:
    # Given somebody who listens to all events
    events: list[dict[str, Any]] = []
    connection = our_app.connection_for_read()
    receiver = our_app.events.Receiver(connection, handlers={"*": events.append})
    listener = threading.Thread(
        target=lambda: receiver.capture(limit=None, timeout=None), daemon=True
    )
    prefill, decode = start_worker("prefill"), start_worker("decode", held=True)
    listener.start()
    # Workers send their first heartbeat to a listener within seconds.
    wait_until(lambda: any(e["type"] == "worker-heartbeat" for e in events))

    # When a request is answered, one is refused and one comes too late
    answered = submit("canary-prompt", temperature=0, max_tokens=4)
    wait_until(decode.steering.added)
    inspect = our_app.control.inspect(timeout=1.0)
    seen = [inspect.active(), inspect.reserved(), inspect.query_task(answered.id)]
    decode.steering.release()
    assert "canary-answer" in answered.get(timeout=20)["text"]
    decode.steering.hold()
    late = submit("canary-prompt", temperature=0, max_tokens=4, timeout_s=0.5)
    with pytest.raises(PdtasksError):
        late.get(timeout=20)

    def events_of(kind: str) -> list[dict[str, Any]]:
        return [e for e in events if e["type"] == kind]

    wait_until(lambda: len(events_of("task-succeeded")) >= 3 and events_of("task-failed"))
    receiver.should_stop = True
    listener.join(5)

    # Then Flower and the logs know the tasks, and nothing of what was said
    assert any(task["id"] == answered.id for tasks in seen[0].values() for task in tasks)
    assert {e["uuid"] for e in events_of("task-received")} >= {answered.id}
    for text in (repr(seen), repr(events), prefill.log, decode.log):
        assert "canary" not in text
        assert "101, 102" not in text, "token ids are the answer as well"
    connection.release()
