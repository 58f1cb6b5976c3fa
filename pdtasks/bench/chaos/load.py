"""Clients that ask all the time, over HTTP as any caller, and note what they see.

Streams, whole answers, jobs, callers that hang up, small bursts; each request over a connection of
its own, to one of the API processes by chance.  One that is refused is asked again elsewhere: it
was promised nothing.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from pdtasks.bench.chaos.questions import Question
from pdtasks.bench.chaos.tally import Answer, Event, Saw, Story

#: Seconds beyond a request's deadline after which its client gives up on it.
SLACK_S = 15.0
#: Seconds before somebody who was refused asks again.
_PAUSE_S = 0.3
_CONNECT_S = 10.0
#: What an API says that knows of no worker for a stage, before any work (`api.workers`).
_NO_WORKER = re.compile(r"no (prefill|decode) worker (takes jobs|is alive that serves)")
#: What a broken connection raises.
_BROKEN = (httpx.NetworkError, httpx.ProtocolError)


@dataclass(frozen=True)
class Mix:
    """How many clients of each kind ask at once."""

    streams: int = 6
    plain: int = 3
    jobs: int = 2
    hang_ups: int = 1
    burst: int = 16  #: requests at once
    burst_every_s: float = 8.0


@dataclass(frozen=True)
class Known:
    """A question, and its undisturbed answer."""

    question: Question
    answer: Answer


class Load:
    """All clients. For one event loop."""

    def __init__(
        self,
        apis: Mapping[str, str],
        model: str,
        *,
        deadline_s: float,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Args:
        apis: URLs of the API processes, by name.
        deadline_s: seconds in which the stack promises an end.
        """
        self.stories: list[Story] = []
        self._apis = apis
        self._model = model
        self._patience_s = deadline_s + SLACK_S
        self._rng = rng
        self._clock = clock
        self._transport = transport
        self._began = clock()
        self._ending = asyncio.Event()
        self._known: Sequence[Known] = ()
        self._short: Sequence[Known] = ()
        self._clients: dict[str, httpx.AsyncClient] = {}

    def now_s(self) -> float:
        """Seconds since the load has begun."""
        return self._clock() - self._began

    def end(self) -> None:
        """Nothing new is asked from now on."""
        self._ending.set()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Everything else happens in here."""
        async with AsyncExitStack() as stack:
            for name, url in self._apis.items():
                client = httpx.AsyncClient(
                    base_url=url,
                    # A connection that the server closes just when it is used again would look
                    # like a fault.
                    limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
                    timeout=httpx.Timeout(self._patience_s, connect=_CONNECT_S),
                    transport=self._transport,
                    trust_env=False,  # no proxy
                )
                self._clients[name] = await stack.enter_async_context(client)
            yield

    async def ask_once(self, question: Question) -> Story:
        """Ask for a whole answer, of which nothing is known yet."""
        story = self._new_story("rehearsal", question, Answer((), ""))
        await self._plain(story, question)
        return story

    def begin(self, known: Sequence[Known]) -> None:
        """The clock starts, and what was asked before is forgotten; nothing may be under way."""
        self._known = known
        self._short = [k for k in known if k.question.is_short] or known
        self.stories = []
        self._began = self._clock()

    async def run(self, mix: Mix) -> None:
        """Ask until `end`; returns when everything that was asked has ended, or is given up."""
        clients = [
            *[self._forever("stream", self._stream, self._known)] * mix.streams,
            *[self._forever("plain", self._plain, self._short)] * mix.plain,
            *[self._forever("job", self._job, self._known)] * mix.jobs,
            *[self._forever("hang-up", self._hang_up, self._known)] * mix.hang_ups,
        ]
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(client())
            group.create_task(self._bursts(mix))

    def _forever(
        self,
        kind: str,
        ask: Callable[[Story, Question], Coroutine[Any, Any, None]],
        of: Sequence[Known],
    ) -> Callable[[], Coroutine[Any, Any, None]]:
        async def client() -> None:
            while not self._ending.is_set():
                known = self._rng.choice(of)
                story = self._new_story(kind, known.question, known.answer)
                await ask(story, known.question)
                refused = story.events[-1].saw is Saw.REFUSED
                await self._pause(_PAUSE_S if refused else self._rng.uniform(0, _PAUSE_S))

        return client

    async def _bursts(self, mix: Mix) -> None:
        while not self._ending.is_set():
            await self._pause(mix.burst_every_s)
            async with asyncio.TaskGroup() as group:
                for known in self._rng.choices(self._short, k=mix.burst):
                    story = self._new_story("burst", known.question, known.answer)
                    group.create_task(self._plain(story, known.question))

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._ending.wait()
        except TimeoutError:
            pass

    def _new_story(self, kind: str, question: Question, answer: Answer) -> Story:
        request_id = f"chaos-{kind}-{len(self.stories)}-q{question.number}"
        story = Story(request_id, kind, answer, self.now_s(), self._any_api())
        self.stories.append(story)
        return story

    def _any_api(self) -> str:
        return self._rng.choice(list(self._apis))

    # -- kinds of clients ------------------------------------------------------------------------

    async def _plain(self, story: Story, question: Question) -> None:
        async with self._seen(story):
            answer = await self._clients[story.api].post(
                "/v1/completions",
                json=question.body(self._model),
                headers={"X-Request-Id": story.request_id},
            )
            if answer.status_code != 200:
                self._note_refusal(story, answer)
                return
            self._note(story, Saw.ACCEPTED)
            (choice,) = answer.json()["choices"]
            self._note_choice(story, choice)
            self._note(story, Saw.CLOSED)

    async def _stream(self, story: Story, question: Question) -> None:
        async with self._seen(story):
            await self._read_stream(story, question)

    async def _hang_up(self, story: Story, question: Question) -> None:
        async with self._seen(story):
            await self._read_stream(story, question, at_most=self._rng.randint(1, 20))

    async def _read_stream(
        self, story: Story, question: Question, *, at_most: int | None = None
    ) -> None:
        async with self._clients[story.api].stream(
            "POST",
            "/v1/completions",
            json=question.body(self._model) | {"stream": True},
            headers={"X-Request-Id": story.request_id},
        ) as answer:
            if answer.status_code != 200:
                await answer.aread()
                self._note_refusal(story, answer)
                return
            self._note(story, Saw.ACCEPTED)
            num_seen = 0
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                num_seen += self._note_chunk(story, json.loads(line[6:]))
                if at_most is not None and num_seen >= at_most:
                    self._note(story, Saw.HUNG_UP)
                    return
            self._note(story, Saw.CLOSED)

    async def _job(self, story: Story, question: Question) -> None:
        """Submit a job, read its events along, wherever an API process answers; then its record."""
        async with self._seen(story):
            job_id = await self._submit(story, question)
            if job_id is None:
                return
            await self._follow(story, job_id)
            await self._take_result(story, job_id)

    # -- jobs ------------------------------------------------------------------------------------

    async def _submit(self, story: Story, question: Question) -> str | None:
        """The job's id; the same for each try, whichever API process takes it."""
        while True:
            answer = await self._try(
                "POST",
                "/v1/jobs",
                json=question.body(self._model),
                headers={"Idempotency-Key": story.request_id},
            )
            if answer is not None and answer.status_code == 202:
                self._note(story, Saw.ACCEPTED)
                return str(answer.json()["id"])
            if answer is not None and answer.status_code != 503:
                self._note_refusal(story, answer)
                return None
            if self._ending.is_set():
                self._note(story, Saw.REFUSED)
                return None
            await asyncio.sleep(_PAUSE_S)

    async def _follow(self, story: Story, job_id: str) -> None:
        last = ""
        while True:
            client = self._clients[self._any_api()]
            try:
                async with client.stream(
                    "GET", f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": last}
                ) as answer:
                    if answer.status_code == 404:
                        return  # its record says the same
                    async for line in answer.aiter_lines():
                        if line.startswith("id: "):
                            last = line[4:]
                        elif line == "data: [DONE]":
                            return
                        elif answer.status_code == 200 and line.startswith("data: "):
                            self._note_job_chunk(story, json.loads(line[6:]))
            except (*_BROKEN, httpx.ConnectTimeout):
                pass  # another API process goes on behind `last`
            await asyncio.sleep(_PAUSE_S)

    async def _take_result(self, story: Story, job_id: str) -> None:
        while True:
            answer = await self._try("GET", f"/v1/jobs/{job_id}")
            if answer is not None and answer.status_code == 404:
                self._note(story, Saw.CLOSED, detail="there is no such job")
                return
            job = answer.json() if answer is not None and answer.status_code == 200 else {}
            if job.get("state") == "succeeded":
                self._note_result(story, job["result"])
                return
            if job.get("state") in ("failed", "cancelled"):
                error = job["error"] or {}
                status = int(error.get("code") or 0)
                detail = str(error.get("message"))
                self._note(story, Saw.ERROR, detail=detail, status=status)
                return
            await asyncio.sleep(_PAUSE_S)

    async def _try(self, method: str, path: str, **options: Any) -> httpx.Response | None:
        """None: the connection broke."""
        try:
            return await self._clients[self._any_api()].request(method, path, **options)
        except (*_BROKEN, httpx.ConnectTimeout):
            return None

    def _note_job_chunk(self, story: Story, chunk: dict[str, Any]) -> None:
        if chunk.get("object") == "job.restart":
            self._note(story, Saw.VOID)
            return
        for choice in chunk.get("choices", ()):
            # Its end is in its record.
            self._note_choice(story, choice | {"finish_reason": None})

    def _note_result(self, story: Story, result: dict[str, Any]) -> None:
        (choice,) = result["choices"]
        if tuple(choice["token_ids"]) != story.expected.tokens:
            self._note(story, Saw.ERROR, detail="its result is another answer")
        elif choice["text"] != story.expected.text:
            self._note(story, Saw.ERROR, detail="its result has another text")
        else:
            self._note(story, Saw.FINISHED, detail=choice["finish_reason"])

    # -- notes -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def _seen(self, story: Story) -> AsyncIterator[None]:
        """Whatever happens inside is noted."""
        try:
            async with asyncio.timeout(self._patience_s):
                yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            self._note(story, Saw.REFUSED, detail="nobody listens")
        except (TimeoutError, httpx.TimeoutException):
            self._note(story, Saw.LATE)
        except _BROKEN as exc:
            self._note(story, Saw.CUT, detail=type(exc).__name__)
        except (ValueError, LookupError, TypeError) as exc:
            self._note(story, Saw.ERROR, detail=f"not an answer: {type(exc).__name__}")

    def _note(self, story: Story, saw: Saw, **more: Any) -> None:
        story.events.append(Event(self.now_s(), saw, **more))

    def _note_refusal(self, story: Story, answer: httpx.Response) -> None:
        try:
            detail = str(answer.json()["error"]["message"])
        except (ValueError, LookupError, TypeError):
            detail = ""
        status = answer.status_code
        if status == 429 or (status == 503 and _NO_WORKER.match(detail)):
            self._note(story, Saw.REFUSED, detail=detail, status=status)
        else:
            self._note(story, Saw.ERROR, detail=detail, status=status)

    def _note_chunk(self, story: Story, chunk: dict[str, Any]) -> int:
        """Returns the number of tokens in it."""
        if "error" in chunk:
            error = chunk["error"]
            status = int(error.get("code") or 0)
            self._note(story, Saw.ERROR, detail=str(error.get("message") or ""), status=status)
            return 0
        return sum(self._note_choice(story, choice) for choice in chunk.get("choices", ()))

    def _note_choice(self, story: Story, choice: dict[str, Any]) -> int:
        tokens = tuple(choice.get("token_ids") or ())
        text = choice.get("text") or ""
        if tokens or text:
            self._note(story, Saw.TOKENS, tokens=tokens, text=text)
        if choice.get("finish_reason") is not None:
            self._note(story, Saw.FINISHED, detail=choice["finish_reason"])
        return len(tokens)
