"""`pdtasks chat`: talk to the running stack, and see who answered, and how fast."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TextIO

import httpx

from pdtasks.naming import DECODE, PREFILL
from pdtasks.overview import RequestReport
from pdtasks.terminal.asking import Client, NoAnswer
from pdtasks.terminal.figures import NOTHING, duration

_PROMPT: Final = "› "
_NEW: Final = "/new"
_HELP: Final = (
    f"Ctrl-C ends an answer, Ctrl-D the talk; {_NEW} forgets what was said. Talking to {{model}}."
)
#: Seconds in which there is a report of an answer that was ended here.
_REPORT_S: Final = 3.0
#: A model may say anything; a terminal obeys control characters.
_NO_CONTROLS: Final = dict.fromkeys(
    code for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
)
_DIM, _RED, _PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[0m"


@dataclass(frozen=True)
class Wishes:
    """What goes with each question."""

    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    model: str | None = None  #: None: the first that is alive


@dataclass
class _Answer:
    """As far as it has come."""

    request_id: str
    text: str = ""
    finish_reason: str | None = None
    ended_here: bool = False


@dataclass
class Chat:
    """One talk. For the main thread, which gets the signals."""

    client: Client
    wishes: Wishes
    patience_s: float  #: for the next piece of an answer
    lines: TextIO = field(default_factory=lambda: sys.stdin)
    out: TextIO = field(default_factory=lambda: sys.stdout)
    err: TextIO = field(default_factory=lambda: sys.stderr)
    failed: bool = False  #: did a question stay without an answer?

    def run(self) -> int:
        """Until there is no line more; returns the exit code. Raises NoAnswer at the beginning."""
        self._model = self.wishes.model or self.client.model()
        self._forget()
        if self._is_for_people:
            self._remark(_HELP.format(model=self._model))
        for line in self._questions():
            if line == _NEW:
                self._forget()
            elif line:
                self._answer(line)
        if self._is_for_people:
            self.out.write("\n")
        return int(self.failed and not self._is_for_people)

    @property
    def _is_for_people(self) -> bool:
        return self.lines.isatty()

    def _forget(self) -> None:
        system = self.wishes.system
        self._said: list[dict[str, str]] = (
            [] if system is None else [{"role": "system", "content": system}]
        )

    def _questions(self) -> Iterator[str]:
        if not self._is_for_people:
            for line in self.lines:
                yield line.strip()
            return
        import readline  # noqa: F401 - gives `input` a history

        while True:
            try:
                yield input(_PROMPT).strip()
            except KeyboardInterrupt:
                self.out.write("\n")  # as shells do: the line is dropped
            except EOFError:
                return

    def _answer(self, question: str) -> None:
        self._said.append({"role": "user", "content": question})
        answer = _Answer(f"chat-{secrets.token_hex(8)}")
        try:
            with self.client.explained():
                self._read(answer)
        except KeyboardInterrupt:
            answer.ended_here = True  # leaving the stream has hung up
        except NoAnswer as exc:
            self._fail(answer, str(exc))
        if answer.text:
            self._said.append({"role": "assistant", "content": answer.text})
            self.out.write("\n")
            self._remark(self._about(answer))
        else:
            self._said.pop()  # the next question does not follow on nothing
            if answer.ended_here:
                self._remark("ended before its first token")

    def _fail(self, answer: _Answer, why: str) -> None:
        self.failed = True
        if answer.text:
            self.out.write("\n")
        self.out.flush()
        self.err.write(f"{self._colour(_RED)}{why}{self._colour(_PLAIN)}\n")
        self.err.flush()

    def _read(self, answer: _Answer) -> None:
        """Raises NoAnswer when the API refuses, or an answer breaks off."""
        wishes = {
            "max_tokens": self.wishes.max_tokens,
            "temperature": self.wishes.temperature,
        }
        body = {"model": self._model, "messages": self._said, "stream": True}
        body |= {name: wish for name, wish in wishes.items() if wish is not None}
        with self.client.http.stream(
            "POST",
            "/v1/chat/completions",
            json=body,
            headers={"X-Request-Id": answer.request_id},
            timeout=httpx.Timeout(self.patience_s, connect=3.0),
        ) as response:
            if response.is_error:
                response.read()
            self.client.check(response)
            for chunk in _chunks(response):
                if "error" in chunk:
                    raise NoAnswer(f"the answer broke off: {chunk['error']['message']}")
                for choice in chunk.get("choices", ()):
                    piece = choice["delta"].get("content") or ""
                    answer.text += piece
                    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                    self.out.write(piece.translate(_NO_CONTROLS))
                    self.out.flush()

    def _about(self, answer: _Answer) -> str:
        report = self._report(
            f"chatcmpl-{answer.request_id}", _REPORT_S if answer.ended_here else 0
        )
        parts = [_told(report)] if report else ["the API knows no report of it"]
        if answer.ended_here:
            parts.append("ended here")
        elif answer.finish_reason == "length":
            parts.append("cut at its most tokens")
        return ", ".join(parts)

    def _report(self, request_id: str, patience_s: float) -> RequestReport | None:
        until = time.monotonic() + patience_s
        try:
            # Of what was ended here the API hears a moment later, and its workers after that.
            while (report := self.client.report(request_id)) is None and time.monotonic() < until:
                time.sleep(0.1)
        except KeyboardInterrupt:
            return None
        return report

    def _remark(self, words: str) -> None:
        self.out.write(f"{self._colour(_DIM)}{words}{self._colour(_PLAIN)}\n")
        self.out.flush()

    def _colour(self, code: str) -> str:
        return code if self.out.isatty() else ""


def run_chat(url: str | None, wishes: Wishes, *, patience_s: float) -> int:
    """Talk until Ctrl-D; returns the exit code. Raises NoAnswer when no API answers."""
    client = Client(url)
    try:
        return Chat(client, wishes, patience_s).run()
    finally:
        client.close()


def _chunks(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _told(report: RequestReport) -> str:
    stages, times = report.sequences[0], report.times[0]
    prefill, decode = stages.get(PREFILL), stages.get(DECODE)
    who = " → ".join(stage.worker.partition("@")[0] for stage in (prefill, decode) if stage)
    if times.route not in ("", "split"):
        who += f" alone ({times.route.replace('_', ' ')})"
    gap = None
    if times.first_s is not None and times.second_s is not None:
        gap = times.second_s - times.first_s
    streamed_s = times.seconds - (times.first_s or 0.0)
    rate = f"{(times.output_tokens - 1) / streamed_s:.1f}" if gap and streamed_s else NOTHING
    lost = decode.kv_blocks_recomputed if decode else 0
    return (
        f"{who}  first token {duration(times.first_s)}, gap {duration(gap)}, {rate} tokens/s, "
        f"{times.output_tokens} tokens" + (f", {lost} blocks computed again" if lost else "")
    )
