"""The commands `pdtasks deadletter …`: jobs that were given up, for operators.

Thin on purpose: each imports what it needs when it runs.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from pdtasks.errors import InvalidRequest

if TYPE_CHECKING:
    from pdtasks.broker.dead_letters import DeadLetter

_ID = click.argument("letter_id", metavar="ID")


@click.group()
def deadletter() -> None:
    """Jobs that were given up: their callers have been answered, and here is what they were.

    A job is given up when every worker that took it was lost (PDTASKS_DELIVERY_LIMIT) or when a
    worker cannot read it. The newest thousand are kept for a week.
    """


@deadletter.command("list")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_letters(*, as_json: bool) -> None:
    """Show all of them, the oldest first, without prompts."""
    from pdtasks.broker.dead_letters import dead_letters
    from pdtasks.settings import load_settings

    with dead_letters(load_settings()) as letters:
        found = [_told(letter) for letter in letters.all()]
    if as_json:
        click.echo(json.dumps(found, indent=1))
    elif not found:
        click.echo("no dead letters")
    for letter in [] if as_json else found:
        click.echo("  ".join(str(letter[name]) for name in ("at", "queue", "id", "reason")))


@deadletter.command()
@_ID
@click.option("--prompt", "with_prompt", is_flag=True, help="Show the prompt, too.")
def show(*, letter_id: str, with_prompt: bool) -> None:
    """Show what one was to do; ID is the task's or the request's."""
    from pdtasks.broker.dead_letters import dead_letters
    from pdtasks.settings import load_settings

    with dead_letters(load_settings()) as letters:
        letter = letters.find(letter_id)
        for name, value in _told(letter).items():
            click.echo(f"{name:<20} {value}")
        try:
            about = letter.about()
            prompt = letter.prompt() if with_prompt else "shown with --prompt"
        except InvalidRequest as exc:
            click.echo(str(exc))
            return
        for name, value in {**about, "prompt": prompt}.items():
            click.echo(f"{name:<20} {value}")


@deadletter.command()
@_ID
@click.option("--timeout-s", type=float, help="Until when it is to be done. [default: as ever]")
@click.option("--anyway", is_flag=True, help="Also when nobody will hear the answer.")
def replay(*, letter_id: str, timeout_s: float | None, anyway: bool) -> None:
    """Have one done from the beginning; a result that a caller can still fetch is replaced.

    A caller that read along was told of the failure and does not listen any more.
    """
    from pdtasks.broker.dead_letters import dead_letters
    from pdtasks.settings import load_settings

    settings = load_settings()
    with dead_letters(settings) as letters:
        letter = letters.find(letter_id)
        if letter.is_streamed and not anyway:
            raise InvalidRequest(
                f"the caller of {letter.id} read along, was told of the failure and is gone: ask "
                "again, or run it with --anyway, and nobody hears the answer"
            )
        letters.replay(letter, timeout_s=timeout_s or settings.request_timeout_s)
        click.echo(f"{letter.id} is in queue {letter.queue} again")


@deadletter.command()
@click.argument("letter_ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All that there are now.")
def drop(*, letter_ids: tuple[str, ...], every: bool) -> None:
    """Forget some of them, or all."""
    from pdtasks.broker.dead_letters import dead_letters
    from pdtasks.settings import load_settings

    if bool(letter_ids) == every:
        raise InvalidRequest("name dead letters, or say --all")
    with dead_letters(load_settings()) as letters:
        named = letters.all() if every else [letters.find(name) for name in letter_ids]
        # A task and its request are one letter.
        chosen = list({id(letter): letter for letter in named}.values())
        for letter in chosen:
            letters.drop(letter)
        click.echo(f"dropped {len(chosen)}")


def _told(letter: DeadLetter) -> dict[str, Any]:
    """Without prompt and answer; the id has what the caller sent as X-Request-Id."""
    return {
        "id": letter.id,
        "task": letter.task,
        "queue": letter.queue,
        "at": datetime.fromtimestamp(letter.at, UTC).isoformat(timespec="seconds"),
        "bytes": letter.num_bytes,
        "caller": "read along" if letter.is_streamed else "can fetch a result",
        "reason": letter.reason,
    }
