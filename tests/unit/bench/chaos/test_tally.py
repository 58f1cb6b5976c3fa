"""Is every broken promise found, and none where it was kept?"""

from __future__ import annotations

import pytest

from pdtasks.bench.chaos.tally import (
    Answer,
    Event,
    Killed,
    Saw,
    Story,
    Verdict,
    count,
    judge,
    longest_wait,
)

DUE = Answer((10, 11, 12, 13), "abcd")
TEXTS = dict(zip(DUE.tokens, DUE.text, strict=True))


def story(*seen: Event | Saw | int, began_s: float = 0.0, api: str = "api1") -> Story:
    """A request of which one thing was seen each second; a number is a token."""
    events = []
    for at_s, thing in enumerate(seen, start=int(began_s) + 1):
        if isinstance(thing, Event):
            events.append(thing)
        elif isinstance(thing, Saw):
            events.append(Event(at_s, thing, detail="length" if thing is Saw.FINISHED else ""))
        else:
            events.append(Event(at_s, Saw.TOKENS, (thing,), TEXTS.get(thing, "?")))
    return Story("r", "stream", DUE, began_s, api, events)


def error(status: int = 503, detail: str = "ask again") -> Event:
    return Event(9.0, Saw.ERROR, status=status, detail=detail)


def verdict(*seen: Event | Saw | int) -> Verdict:
    return judge(story(*seen)).verdict


def test_the_whole_answer_and_its_end_are_right() -> None:
    assert verdict(Saw.ACCEPTED, 10, 11, 12, 13, Saw.FINISHED, Saw.CLOSED) is Verdict.RIGHT


def test_one_clear_error_is_one_whether_tokens_came_before_or_not() -> None:
    assert verdict(Saw.ACCEPTED, 10, 11, error(), Saw.CLOSED) is Verdict.CLEAR_ERROR
    assert verdict(error(504)) is Verdict.CLEAR_ERROR


def test_who_is_refused_was_promised_nothing() -> None:
    assert verdict(Saw.REFUSED) is Verdict.REFUSED
    assert count([story(Saw.REFUSED)]).accepted == 0


def test_right_tokens_before_the_own_hang_up_are_right() -> None:
    assert verdict(Saw.ACCEPTED, 10, 11, Saw.HUNG_UP) is Verdict.RIGHT


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param((Saw.ACCEPTED, 10, 11), id="nothing more came"),
        pytest.param((), id="nothing came at all"),
        pytest.param((Saw.ACCEPTED, 10, Saw.LATE), id="the deadline passed"),
        pytest.param((Saw.ACCEPTED, Saw.FINISHED, Saw.CLOSED), id="an empty success"),
        pytest.param((Saw.ACCEPTED, 10, 11, Saw.CLOSED), id="closed without an end"),
        pytest.param((Saw.ACCEPTED, 10, 11, 12, 13, Saw.CLOSED), id="whole, without an end"),
        pytest.param((Saw.ACCEPTED, 10, Saw.CUT), id="cut without an error"),
        pytest.param((Saw.CUT,), id="cut before an answer"),
    ],
)
def test_a_lost_request_is_found(seen: tuple[Saw | int, ...]) -> None:
    assert verdict(*seen) is Verdict.LOST


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param((10, 11, 11, 12, 13, Saw.FINISHED), id="a token came twice"),
        pytest.param((10, 11, 12, 10, 11, 12, 13, Saw.FINISHED), id="it began again"),
        pytest.param((10, 11, 12, 13, Saw.FINISHED, Saw.FINISHED), id="it ended twice"),
        pytest.param((10, 11, 12, 13, Saw.FINISHED, error()), id="an error after its end"),
        pytest.param((10, error(), error()), id="two errors"),
        pytest.param((10, 11, error(), 12), id="tokens after an error"),
        pytest.param((10, 11, 12, 13, Saw.FINISHED, 13), id="tokens after its end"),
        pytest.param((10, 10, Saw.HUNG_UP), id="a token came twice before the hang-up"),
    ],
)
def test_a_duplicated_answer_is_found(seen: tuple[Saw | int | Event, ...]) -> None:
    assert verdict(Saw.ACCEPTED, *seen) is Verdict.DUPLICATED


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param((10, 11, 99, 13, Saw.FINISHED), id="another token"),
        pytest.param((10, 12, 13, Saw.FINISHED), id="a token is missing"),
        pytest.param((99, error()), id="another token before an error"),
        pytest.param((99, Saw.HUNG_UP), id="another token before the hang-up"),
        pytest.param((99, Saw.CUT), id="another token before a cut"),
        pytest.param((10, 11, Saw.FINISHED), id="a success that is too short"),
        pytest.param((10, 11, 12, 13, 99, Saw.FINISHED), id="a token too many"),
        pytest.param((10, error(500)), id="an error that nobody foresaw"),
        pytest.param((error(400),), id="a valid request that is called a bad one"),
        pytest.param((error(503, ""),), id="an error without a word"),
    ],
)
def test_a_wrong_answer_is_found(seen: tuple[Saw | int | Event, ...]) -> None:
    assert verdict(Saw.ACCEPTED, *seen) is Verdict.WRONG


def test_another_text_or_another_end_of_the_right_tokens_is_wrong() -> None:
    tokens = Event(1.0, Saw.TOKENS, DUE.tokens, "abcx")
    assert verdict(tokens, Saw.FINISHED) is Verdict.WRONG

    aborted = Event(9.0, Saw.FINISHED, detail="abort")
    assert verdict(10, 11, 12, 13, aborted) is Verdict.WRONG


def test_what_a_restart_has_voided_does_not_count_but_what_follows_does() -> None:
    whole = (10, 11, 12, 13, Saw.FINISHED)
    assert verdict(Saw.ACCEPTED, 10, 11, Saw.VOID, *whole) is Verdict.RIGHT
    assert verdict(Saw.ACCEPTED, 10, 11, Saw.VOID, 12, 13, Saw.FINISHED) is Verdict.WRONG


def test_a_broken_connection_is_an_error_only_of_a_process_that_was_killed_meanwhile() -> None:
    cut = story(Saw.ACCEPTED, 10, Saw.CUT, began_s=5.0)  # at 8 s

    for killed, expected in [
        (Killed("api1", 7.5, 8.5), Verdict.CLEAR_ERROR),
        (Killed("api2", 7.5, 8.5), Verdict.LOST),  # it was asked of the other one
        (Killed("api1", 1.0, 4.0), Verdict.LOST),  # that was before it was asked
        (Killed("api1", 9.0, 9.5), Verdict.LOST),  # and that after it was cut
    ]:
        assert judge(cut, [killed]).verdict is expected


def test_a_killed_process_excuses_no_wrong_token_and_no_orderly_close() -> None:
    killed = [Killed("api1", 0.0, 60.0)]

    assert judge(story(Saw.ACCEPTED, 99, Saw.CUT), killed).verdict is Verdict.WRONG
    assert judge(story(Saw.ACCEPTED, 10, Saw.CLOSED), killed).verdict is Verdict.LOST


def test_the_count_names_each_bad_request_and_why() -> None:
    right = story(Saw.ACCEPTED, 10, 11, 12, 13, Saw.FINISHED)
    lost = story(Saw.ACCEPTED, 10, 11)
    refused = story(Saw.REFUSED)
    failed = story(Saw.ACCEPTED, error())

    tally = count([right, lost, refused, failed])

    assert tally.accepted == 3
    assert tally.verdicts[Verdict.RIGHT] == 1
    assert tally.reasons == {"ask again": 1}
    ((bad, why),) = tally.bad
    assert bad is lost
    assert why.verdict is Verdict.LOST
    assert "2 tokens" in bad.timeline()


def test_a_wait_counts_for_a_fault_that_falls_into_it() -> None:
    first = Event(1.0, Saw.TOKENS, (10,))
    second = Event(6.0, Saw.TOKENS, (11,))
    waits = Story("r", "stream", DUE, 0.5, "api1", [first, second])

    assert longest_wait([waits], 2.0, 3.0) == 5.0
    assert longest_wait([waits], 0.0, 0.9) == 0.5
    assert longest_wait([waits], 7.0, 9.0) == 0.0
    assert longest_wait([], 0.0, 9.0) == 0.0
