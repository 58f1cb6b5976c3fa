"""What does `pdtasks chat` say and send?"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest

from pdtasks.messages import StageReport
from pdtasks.overview import RequestReport
from pdtasks.terminal.asking import Client, NoAnswer
from pdtasks.terminal.chat import Chat, Wishes
from tests.unit.terminal.views import a_view


def a_report(stage: str, worker: str) -> StageReport:
    return StageReport(
        stage=stage, worker=worker, queue_s=0, seconds=1, prompt_tokens=9, output_tokens=1
    )


REPORT = RequestReport(
    id="chatcmpl-chat-1",
    sequences=(
        {"prefill": a_report("prefill", "prefill1@h"), "decode": a_report("decode", "decode2@h")},
    ),
    times=(a_view(first_s=0.25, second_s=0.5, seconds=2.25, output_tokens=41),),
)


def chunk(text: str | None, finish: str | None = None) -> str:
    choice = {"index": 0, "delta": {} if text is None else {"content": text}}
    return f"data: {json.dumps({'choices': [choice | {'finish_reason': finish}]})}\n\n"


class Pieces(httpx.SyncByteStream):
    """An answer's body; `then` is called after its pieces."""

    def __init__(self, pieces: list[str], then: Callable[[], None] = lambda: None) -> None:
        self._pieces = pieces
        self._then = then
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            yield piece.encode()
        self._then()

    def close(self) -> None:
        self.closed = True


def good(*texts: str) -> Pieces:
    return Pieces([*map(chunk, texts), chunk(None, "stop"), "data: [DONE]\n\n"])


class Api:
    """What answers in the place of an API: each question with the next of `answers`."""

    def __init__(self, *answers: Pieces | httpx.Response | Exception) -> None:
        self._answers = iter(answers)
        self.asked: list[dict[str, Any]] = []
        self.late_reports = 0  #: so often nothing is known of an answer

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        if request.url.path.startswith("/pdtasks/requests/chatcmpl-chat-"):
            if self.late_reports:
                self.late_reports -= 1
                return httpx.Response(404, json={"error": {"message": "none"}})
            return httpx.Response(200, content=msgspec.json.encode(REPORT))
        self.asked.append(json.loads(request.content))
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        return httpx.Response(200, stream=answer)


def talk(api: Api, *lines: str, **wishes: Any) -> tuple[int, str, str]:
    """Exit code, what was shown, and what was complained of."""
    out, err = io.StringIO(), io.StringIO()
    client = Client("http://api.test", transport=httpx.MockTransport(api))
    text = io.StringIO("".join(f"{line}\n" for line in lines))
    code = Chat(client, Wishes(**wishes), 10, text, out, err).run()
    return code, out.getvalue(), err.getvalue()


def test_an_answer_says_who_computed_it_and_how_fast() -> None:
    code, out, _ = talk(Api(good("Par", "is.")), "Capital of France?")

    assert code == 0
    assert out == (
        "Paris.\nprefill1 → decode2  first token 250 ms, gap 250 ms, 20.0 tokens/s, 41 tokens\n"
    )


def test_the_talk_goes_on_and_can_begin_anew() -> None:
    api = Api(good("one"), good("two"), good("three"))
    talk(api, "a", "", "b", "/new", "c", system="Be brief.", max_tokens=7, temperature=0.0)

    roles = [[(m["role"], m["content"]) for m in asked["messages"]] for asked in api.asked]
    system = ("system", "Be brief.")
    assert roles == [
        [system, ("user", "a")],
        [system, ("user", "a"), ("assistant", "one"), ("user", "b")],
        [system, ("user", "c")],
    ]
    assert {(a["max_tokens"], a["temperature"], a["stream"]) for a in api.asked} == {(7, 0.0, True)}


def test_of_several_models_one_can_be_wished_for() -> None:
    api = Api(good("x"), good("y"))
    talk(api, "a")
    talk(api, "a", model="further")

    assert [asked["model"] for asked in api.asked] == ["m", "further"]


def test_a_wish_that_nobody_has_is_not_sent() -> None:
    api = Api(good("x"))
    talk(api, "a")

    assert set(api.asked[0]) == {"model", "messages", "stream"}


def test_ctrl_c_ends_an_answer_and_not_the_talk() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    ended = Pieces([chunk("Once upon")], interrupt)
    api = Api(ended, good("Yes."))
    api.late_reports = 2
    code, out, _ = talk(api, "Tell me a tale.", "Enough?")

    assert code == 0
    assert ended.closed, "the API hears that nobody listens"
    assert "tokens, ended here\nYes.\n" in out
    assert api.asked[1]["messages"][1] == {"role": "assistant", "content": "Once upon"}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            httpx.Response(503, json={"error": {"message": "no decode worker is alive"}}),
            "the API answers 503: no decode worker is alive",
        ),
        (httpx.Response(401), "asks for a key: set PDTASKS_API_KEY"),
        (httpx.ConnectError("refused"), "no API answers at http://api.test"),
        (httpx.ReadTimeout("late"), "the API at http://api.test has not answered in time"),
        (httpx.RemoteProtocolError("cut"), "the API at http://api.test has hung up"),
        (
            Pieces([f"data: {json.dumps({'error': {'message': 'the worker was lost'}})}\n\n"]),
            "the answer broke off: the worker was lost",
        ),
    ],
)
def test_a_question_without_an_answer_is_told_and_forgotten(
    answer: Pieces | httpx.Response | Exception, says: str
) -> None:
    api = Api(answer, good("Yes."))
    code, out, err = talk(api, "a", "b")

    assert code == 1, "for scripts"
    assert says in err
    assert len(err.splitlines()) == 1
    assert "Yes." in out
    assert [m["content"] for m in api.asked[1]["messages"]] == ["b"]


def test_what_a_terminal_would_obey_is_not_shown() -> None:
    _, out, _ = talk(Api(good("a\x1b[2Jb\x9b\r\n\tc")), "x")

    assert out.startswith("a[2Jb\n\tc\n")


def test_where_no_api_answers_it_does_not_begin() -> None:
    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    client = Client("http://api.test", transport=httpx.MockTransport(away))
    with pytest.raises(NoAnswer, match="start a stack with `pdtasks up`"):
        Chat(client, Wishes(), 10, io.StringIO("x\n"), io.StringIO(), io.StringIO()).run()
