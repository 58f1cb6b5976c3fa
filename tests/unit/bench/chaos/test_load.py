"""Does a client note what it sees? What it does not note, nobody can judge."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import httpx
import pytest

from pdtasks.bench.chaos.load import Known, Load, Mix
from pdtasks.bench.chaos.questions import Question, make_questions
from pdtasks.bench.chaos.tally import Answer, Saw, Story, Verdict, judge
from tests.waiting import until

QUESTION = Question(0, "prompt", max_tokens=3, seed=None)
DUE = Answer((10, 11, 12), "abc")
TEXTS = dict(zip(DUE.tokens, DUE.text, strict=True))

Handler = Callable[[httpx.Request], httpx.Response]


class Server(httpx.AsyncBaseTransport):
    """Answers each request with the next of what it was given; the last one again and again."""

    def __init__(self, *answers: Handler) -> None:
        self._answers = list(answers)
        self.asked: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        handler = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return handler(request)


class Lines(httpx.AsyncByteStream):
    """Server-sent events; an exception among them breaks the connection."""

    def __init__(self, lines: Iterable[str | Exception]) -> None:
        self._lines = lines

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for line in self._lines:
            if isinstance(line, Exception):
                raise line
            yield (line + "\n").encode()


def stream(*things: dict[str, Any] | str | Exception) -> Handler:
    lines = [f"data: {json.dumps(t)}" if isinstance(t, dict) else t for t in things]
    return lambda _: httpx.Response(200, stream=Lines(lines))


def chunk(*tokens: int, end: str | None = None) -> dict[str, Any]:
    text = "".join(TEXTS.get(token, "?") for token in tokens)
    return {"choices": [{"token_ids": list(tokens), "text": text, "finish_reason": end}]}


def body(status: int, content: dict[str, Any]) -> Handler:
    return lambda _: httpx.Response(status, json=content)


def error(status: int, message: str) -> Handler:
    return body(status, {"error": {"message": message, "code": status}})


def break_off(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("broken", request=request)


DONE = "data: [DONE]"
BROKEN = httpx.RemoteProtocolError("incomplete chunked read")


def ask(kind: str, server: Server, *, expected: Answer = DUE) -> Story:
    """One client of one kind asks once."""

    async def once() -> Story:
        load = Load(
            {"api1": "http://api1"}, "m", deadline_s=0, rng=random.Random(1), transport=server
        )
        load.begin([Known(QUESTION, expected)])
        story = Story("r", kind, expected, 0.0, "api1")
        async with load.connected():
            await getattr(load, f"_{kind}")(story, QUESTION)
        return story

    return asyncio.run(once())


def saw(story: Story) -> list[Saw]:
    return [event.saw for event in story.events]


def test_a_stream_is_noted_token_by_token_to_its_end() -> None:
    story = ask("stream", Server(stream(chunk(10), chunk(11, 12, end="length"), DONE)))

    assert saw(story) == [Saw.ACCEPTED, Saw.TOKENS, Saw.TOKENS, Saw.FINISHED, Saw.CLOSED]
    assert judge(story).verdict is Verdict.RIGHT


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        pytest.param(stream(chunk(10), DONE), Verdict.LOST, id="closed without an end"),
        pytest.param(stream(chunk(10), BROKEN), Verdict.LOST, id="broken off"),
        pytest.param(stream(chunk(10), chunk(10), DONE), Verdict.DUPLICATED, id="a token twice"),
        pytest.param(stream(chunk(11), DONE), Verdict.WRONG, id="a token is missing"),
        pytest.param(
            stream(chunk(10, 11, 12, end="length"), chunk(12), DONE),
            Verdict.DUPLICATED,
            id="tokens after the end",
        ),
        pytest.param(
            stream(chunk(10), {"error": {"message": "ask again", "code": 503}}, DONE),
            Verdict.CLEAR_ERROR,
            id="an error in the stream",
        ),
        pytest.param(error(503, "RabbitMQ is away"), Verdict.CLEAR_ERROR, id="an error at once"),
        pytest.param(error(500, "oh"), Verdict.WRONG, id="a surprise"),
        pytest.param(
            error(503, "no decode worker takes jobs for m now: decode1 stops"),
            Verdict.REFUSED,
            id="refused",
        ),
    ],
)
def test_what_goes_wrong_with_a_stream_is_noted(server: Handler, expected: Verdict) -> None:
    assert judge(ask("stream", Server(server))).verdict is expected


def test_whole_answers_are_noted_too() -> None:
    whole = body(200, chunk(10, 11, 12, end="length"))
    empty = body(200, chunk(end="length"))

    assert judge(ask("plain", Server(whole))).verdict is Verdict.RIGHT
    assert judge(ask("plain", Server(empty))).verdict is Verdict.LOST
    assert judge(ask("plain", Server(break_off))).verdict is Verdict.LOST


def test_who_hangs_up_notes_what_came_before() -> None:
    long = Answer(tuple(range(30)), "?" * 30)
    tokens = [chunk(token) for token in long.tokens]

    right = ask("hang_up", Server(stream(*tokens)), expected=long)
    wrong = ask("hang_up", Server(stream(chunk(99), *tokens)), expected=long)

    assert saw(right)[-1] is Saw.HUNG_UP
    assert 1 <= saw(right).count(Saw.TOKENS) <= 20
    assert judge(right).verdict is Verdict.RIGHT
    assert judge(wrong).verdict is Verdict.WRONG


def test_a_job_is_followed_across_broken_connections_behind_the_last_event() -> None:
    record = body(
        200, {"id": "job-1", "state": "succeeded", "result": chunk(10, 11, 12, end="length")}
    )
    server = Server(
        break_off,
        body(202, {"id": "job-1"}),
        stream("id: 1-0", chunk(10), BROKEN),
        error(503, "the bus is away"),
        stream("id: 2-0", chunk(11, 12, end="length"), "id: 3-0", DONE),
        break_off,
        record,
    )

    story = ask("job", server)

    assert judge(story).verdict is Verdict.RIGHT
    # It was submitted twice under one key, and read along behind what was there.
    assert [r.headers["Idempotency-Key"] for r in server.asked[:2]] == ["r", "r"]
    assert [r.headers["Last-Event-ID"] for r in server.asked[2:5]] == ["", "1-0", "1-0"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        pytest.param(error(404, "no job"), Verdict.LOST, id="forgotten"),
        pytest.param(
            body(200, {"state": "succeeded", "result": chunk(10, 12, end="length")}),
            Verdict.WRONG,
            id="another result",
        ),
        pytest.param(
            body(200, {"state": "failed", "error": {"message": "lost", "code": 503}}),
            Verdict.CLEAR_ERROR,
            id="failed",
        ),
    ],
)
def test_a_jobs_end_is_what_its_record_says(record: Handler, expected: Verdict) -> None:
    events = stream("id: 1-0", chunk(10, 11, 12, end="length"), DONE)

    story = ask("job", Server(body(202, {"id": "job-1"}), events, record))

    assert judge(story).verdict is expected


def test_a_job_that_begins_again_is_noted_as_such() -> None:
    events = stream(chunk(10), {"object": "job.restart", "choices": []}, chunk(10, 11, 12), DONE)
    record = body(200, {"state": "succeeded", "result": chunk(10, 11, 12, end="length")})

    story = ask("job", Server(body(202, {"id": "job-1"}), events, record))

    assert Saw.VOID in saw(story)
    assert judge(story).verdict is Verdict.RIGHT


def test_clients_of_all_kinds_ask_until_the_end_of_the_load() -> None:
    async def run() -> list[Story]:
        server = Server(stream(chunk(10, 11, 12, end="length"), DONE))
        load = Load(
            {"a": "http://a", "b": "http://b"},
            "m",
            deadline_s=0,
            rng=random.Random(1),
            transport=server,
        )
        load.begin([Known(QUESTION, DUE)])
        async with load.connected():
            mix = Mix(streams=2, plain=0, jobs=0, hang_ups=1, burst=0)
            asking = asyncio.create_task(load.run(mix))
            await until(lambda: len(load.stories) >= 10)
            load.end()
            await asking
        return load.stories

    stories = asyncio.run(run())

    assert {story.kind for story in stories} == {"stream", "hang-up"}
    assert {story.api for story in stories} == {"a", "b"}
    assert len({story.request_id for story in stories}) == len(stories)


def test_the_same_seed_asks_the_same_questions_some_of_them_short() -> None:
    questions = make_questions(1, 12, 100)

    assert questions == make_questions(1, 12, 100)
    assert questions != make_questions(2, 12, 100)
    assert {q.is_short for q in questions} == {True, False}
    assert {q.seed is None for q in questions} == {True, False}
    assert len({q.prompt for q in questions}) == 12
