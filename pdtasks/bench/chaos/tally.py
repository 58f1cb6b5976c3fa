"""What became of each request, and how long did its client wait?

Pure: a client notes what it sees (`Story`); here is judged whether that keeps the promise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

#: Statuses of errors that say what happened and that to ask again may help.  Any other status is
#: wrong: every request of this bench is valid.
CLEAR_STATUSES = frozenset({503, 504})


class Saw(StrEnum):
    """What a client sees of its request."""

    ACCEPTED = "accepted"
    REFUSED = "refused"  #: with a status, or nobody listens: no promise was given
    TOKENS = "tokens"
    VOID = "void"  #: what came before does not count (a job's restart)
    FINISHED = "finished"  #: the answer says that it is complete
    CLOSED = "closed"  #: in order: nothing more will come
    ERROR = "error"
    CUT = "cut"  #: the connection broke
    HUNG_UP = "hung-up"  #: by the client itself
    LATE = "late"  #: the client's patience is over, long after the deadline


@dataclass(frozen=True)
class Event:
    """One thing that a client saw."""

    at_s: float  #: since the load has begun
    saw: Saw
    tokens: tuple[int, ...] = ()
    text: str = ""  #: of the tokens
    detail: str = ""  #: of an error, as the server put it; a finish reason
    status: int = 0  #: of an error

    def __str__(self) -> str:
        what = f"{len(self.tokens)} tokens" if self.saw is Saw.TOKENS else str(self.saw)
        status = f" {self.status}" if self.status else ""
        return f"{self.at_s:.2f} s {what}{status}{': ' if self.detail else ''}{self.detail}"


@dataclass(frozen=True)
class Answer:
    """What a request is answered when nothing disturbs it."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: str = "length"


@dataclass
class Story:
    """One request, as its client saw it."""

    request_id: str
    kind: str  #: of client
    expected: Answer
    began_s: float  #: since the load has begun
    api: str = ""  #: the API process that was asked
    events: list[Event] = field(default_factory=list)

    @property
    def ended_s(self) -> float:
        """When the last thing was seen."""
        return self.events[-1].at_s if self.events else self.began_s

    def timeline(self) -> str:
        """What happened, without a prompt or a text."""
        lines: list[str] = []
        run: list[Event] = []

        def tell_run() -> None:
            if run:
                tokens = sum(len(event.tokens) for event in run)
                lines.append(f"{run[0].at_s:.2f} to {run[-1].at_s:.2f} s {tokens} tokens")
                run.clear()

        for event in self.events:
            if event.saw is Saw.TOKENS:
                run.append(event)
                continue
            tell_run()
            lines.append(str(event))
        tell_run()
        return "; ".join([f"{self.began_s:.2f} s asked of {self.api}", *lines])


@dataclass(frozen=True)
class Killed:
    """An API process that was killed: its connections break, for nobody is left to say why."""

    api: str
    since_s: float
    until_s: float

    def took(self, story: Story) -> bool:
        """Was `story` under way there?"""
        return (
            story.api == self.api
            and story.began_s <= self.until_s
            and story.ended_s >= self.since_s
        )


class Verdict(StrEnum):
    """What became of a request."""

    REFUSED = "refused"  #: before any work; not counted
    RIGHT = "right"
    CLEAR_ERROR = "clear_error"
    LOST = "lost"
    DUPLICATED = "duplicated"
    WRONG = "wrong"


#: Of these there is one.
_ENDS = (Saw.FINISHED, Saw.ERROR)
#: These break the promise.
BAD = (Verdict.LOST, Verdict.DUPLICATED, Verdict.WRONG)


@dataclass(frozen=True)
class Judgement:
    """A verdict and its reason."""

    verdict: Verdict
    why: str = ""


def judge(story: Story, killed: Sequence[Killed] = ()) -> Judgement:
    """Which promise was kept, or broken?"""
    saw = [event.saw for event in story.events]
    if Saw.ACCEPTED not in saw and Saw.REFUSED in saw:
        return Judgement(Verdict.REFUSED)
    counted = _counted(story.events)
    tokens = tuple(token for event in counted for token in event.tokens)
    text = "".join(event.text for event in counted)
    if problem := _ended_twice(story.events) or _compare(tokens, story.expected.tokens):
        return problem
    if Saw.HUNG_UP in saw:
        return Judgement(Verdict.RIGHT)
    end = next((event for event in story.events if event.saw in _ENDS), None)
    if end is None:
        return _without_end(saw, api_was_killed=any(k.took(story) for k in killed))
    if end.saw is Saw.ERROR:
        return _of_error(end)
    return _of_success(Answer(tokens, text, end.detail), story.expected)


def _ended_twice(events: Sequence[Event]) -> Judgement | None:
    ends = [number for number, event in enumerate(events) if event.saw in _ENDS]
    if len(ends) > 1:
        seen = " and ".join(str(events[number].saw) for number in ends)
        return Judgement(Verdict.DUPLICATED, f"it ended {len(ends)} times: {seen}")
    if ends and any(event.saw is Saw.TOKENS for event in events[ends[0] :]):
        return Judgement(Verdict.DUPLICATED, "tokens came after its end")
    return None


def _counted(events: Sequence[Event]) -> Sequence[Event]:
    """Those behind the last restart."""
    voided = [n for n, event in enumerate(events) if event.saw is Saw.VOID]
    return events[voided[-1] + 1 :] if voided else events


def _compare(tokens: tuple[int, ...], expected: tuple[int, ...]) -> Judgement | None:
    """Do `tokens` begin the answer that is due? None: yes."""
    right = next(
        (n for n, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1]),
        min(len(tokens), len(expected)),
    )
    if right == len(tokens):
        return None
    rest = tokens[right:]
    # The same tokens as before it: somebody began again at a place that the client had passed.
    if any(rest == expected[n : n + len(rest)] for n in range(right)):
        why = f"after {right} right tokens {len(rest)} come that came before"
        return Judgement(Verdict.DUPLICATED, why)
    why = f"after {right} right tokens of {len(expected)} there is another one"
    return Judgement(Verdict.WRONG, why)


def _without_end(saw: Sequence[Saw], *, api_was_killed: bool) -> Judgement:
    if Saw.CUT in saw:
        if api_was_killed:
            return Judgement(Verdict.CLEAR_ERROR, "its API process was killed")
        return Judgement(Verdict.LOST, "it was cut off without an error")
    if Saw.CLOSED in saw:
        return Judgement(Verdict.LOST, "it was closed without an end")
    return Judgement(Verdict.LOST, "it had no end by its deadline")


def _of_success(answer: Answer, expected: Answer) -> Judgement:
    """What came is known to begin the right answer."""
    if not answer.tokens:
        return Judgement(Verdict.LOST, "an empty success")
    if answer.finish_reason != expected.finish_reason:
        return Judgement(Verdict.WRONG, f"it was finished by {answer.finish_reason}")
    if len(answer.tokens) < len(expected.tokens):
        why = f"a success with {len(answer.tokens)} of {len(expected.tokens)} tokens"
        return Judgement(Verdict.WRONG, why)
    if answer.text != expected.text:
        return Judgement(Verdict.WRONG, "the right tokens with another text")
    return Judgement(Verdict.RIGHT)


def _of_error(end: Event) -> Judgement:
    if end.status in CLEAR_STATUSES and end.detail:
        return Judgement(Verdict.CLEAR_ERROR, end.detail)
    return Judgement(Verdict.WRONG, f"its error is not clear: {end.status} {end.detail}".strip())


@dataclass(frozen=True)
class Tally:
    """What became of all requests."""

    verdicts: Counter[Verdict]
    bad: tuple[tuple[Story, Judgement], ...]
    reasons: Counter[str]  #: of the clear errors

    @property
    def accepted(self) -> int:
        """Requests that were promised an end."""
        return self.verdicts.total() - self.verdicts[Verdict.REFUSED]


def count(stories: Iterable[Story], killed: Sequence[Killed] = ()) -> Tally:
    """Judge all `stories`."""
    judged = [(story, judge(story, killed)) for story in stories]
    return Tally(
        verdicts=Counter(found.verdict for _, found in judged),
        bad=tuple((story, found) for story, found in judged if found.verdict in BAD),
        reasons=Counter(f.why for _, f in judged if f.verdict is Verdict.CLEAR_ERROR),
    )


def longest_wait(stories: Iterable[Story], since_s: float, until_s: float) -> float:
    """Seconds of the longest wait of any client that fell into that time, even if partly.

    A wait is that between two things that a client sees: from its question to the first token,
    between tokens, to the end of an answer that comes as a whole.
    """
    longest = 0.0
    for story in stories:
        earlier = story.began_s
        if earlier > until_s or story.ended_s < since_s:
            continue
        for event in story.events:
            if event.at_s >= since_s and earlier <= until_s:
                longest = max(longest, event.at_s - earlier)
            earlier = event.at_s
    return longest
