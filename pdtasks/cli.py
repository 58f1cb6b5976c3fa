"""The command `pdtasks`: which verbs are there, and what do they take?

Thin on purpose: every verb imports what it needs when it runs, so that `--help` is instant.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from typing import Any

import click

from pdtasks.bench.commands import bench
from pdtasks.broker.commands import deadletter
from pdtasks.errors import PdtasksError
from pdtasks.naming import ROLES


class _Verbs(click.Group):
    """Turns our own errors into one sentence and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PdtasksError as exc:
            click.echo(f"pdtasks: {exc}", err=True)
            ctx.exit(1)


@click.group(cls=_Verbs)
@click.version_option(package_name="pdtasks")
def main() -> None:
    """Serve a language model in two Celery stages: prefill and decode."""


def _takes_front_end_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Unknown flags are for vLLM's front end."""
    parser = click.option(
        "--reasoning-parser", help="vLLM's parser of what a model thinks; workers need it too."
    )
    rest = click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM_FLAGS]...")
    return rest(parser(command))


def _front_end(flags: tuple[str, ...], reasoning_parser: str | None) -> dict[str, Any]:
    """Settings for these flags. Raises ConfigurationError naming the one that cannot be used."""
    from pdtasks.settings import load_settings

    changes: dict[str, Any] = {}
    if flags:
        from api.flags import check_flags

        changes["api_args"] = shlex.join(flags)
        check_flags(changes["api_args"])
    if reasoning_parser is not None:
        from api.flags import check_reasoning_parser

        check_reasoning_parser(reasoning_parser)
        changes["engine_args"] = {
            **load_settings().engine_args,
            "reasoning_parser": reasoning_parser,
        }
    return changes


_COUNT = click.IntRange(min=0)
_SECONDS = click.FloatRange(min=0, min_open=True)
#: `pdtasks up --enable-auto-tool-choice --tool-call-parser hermes`
_FLAGS_PASS = {"ignore_unknown_options": True}


@main.command(context_settings=_FLAGS_PASS)
@click.option("--prefill", type=_COUNT, help="Prefill workers. [default: 1; with --both: 0]")
@click.option("--decode", type=_COUNT, help="Decode workers. [default: 1; with --both: 0]")
@click.option(
    "--both", default=0, type=_COUNT, help="Workers that serve both stages: one is enough."
)
@click.option(
    "--worker",
    "further",
    metavar="QUEUES",
    multiple=True,
    help="A worker of a model in PDTASKS_MODELS, by its queues: prefill.NAME,decode.NAME.",
)
@click.option(
    "--api",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="API processes, on --port and the ports after it; any of them knows every job.",
)
@click.option("--model", help="Folder or Hugging Face name; without it the embedded model.")
@click.option("--host", help="Address the API listens on. [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port of the API. [default: 8000]")
@click.option("--flower-port", type=int, help="Port of Flower. [default: 5555]")
@click.option("--concurrency", type=int, help="Jobs that one worker takes at once.")
@click.option("--no-flower", is_flag=True, help="Do not start Flower.")
@click.option(
    "--auto", is_flag=True, help="Workers change roles with the load, as by `pdtasks balance`."
)
@click.option("--ttft", type=_SECONDS, help="With --auto: target to the first token. [default: 1]")
@click.option("--itl", type=_SECONDS, help="With --auto: target between tokens. [default: 0.05]")
@_takes_front_end_flags
def up(
    *,
    prefill: int | None,
    decode: int | None,
    both: int,
    further: tuple[str, ...],
    api: int,
    model: str | None,
    host: str | None,
    port: int | None,
    flower_port: int | None,
    concurrency: int | None,
    no_flower: bool,
    auto: bool,
    ttft: float | None,
    itl: float | None,
    reasoning_parser: str | None,
    flags: tuple[str, ...],
) -> None:
    """Start services, workers, API and Flower; Ctrl-C drains and stops them.

    Other flags go to vLLM's front end: --enable-auto-tool-choice, --tool-call-parser,
    --chat-template, …
    """
    from pdtasks.balance.deciding import Targets
    from pdtasks.cluster.console import Console
    from pdtasks.cluster.supervisor import Size, run_stack

    if (ttft or itl) and not auto:
        raise click.UsageError("--ttft and --itl are targets of --auto")
    targets = Targets(ttft_s=ttft or Targets.ttft_s, itl_s=itl or Targets.itl_s)
    given = {"model": model, "api_host": host, "api_port": port, "flower_port": flower_port}
    overrides = {name: value for name, value in given.items() if value is not None}
    overrides |= _front_end(flags, reasoning_parser)
    others = 0 if both else 1
    size = Size(
        others if prefill is None else prefill,
        others if decode is None else decode,
        both,
        further,
        concurrency,
        api=api,
        flower=not no_flower,
        targets=targets if auto else None,
    )
    sys.exit(run_stack(overrides, size, Console()))


@main.command()
def down() -> None:
    """Drain and stop the running stack. A second time: stop it at once."""
    from pdtasks.cluster.console import Console
    from pdtasks.cluster.down import stop_stack
    from pdtasks.settings import load_settings

    sys.exit(stop_stack(load_settings().home, Console()))


@main.command()
@click.argument("workers", nargs=-1)
@click.option("--rolling", is_flag=True, expose_value=False, help="One after the other: always so.")
def restart(workers: tuple[str, ...]) -> None:
    """Restart WORKERS (as `decode1`) of the running stack, or all, one after the other.

    With two workers of each stage no request notices: what one has begun another goes on with.
    Workers that were drained are started.
    """
    from pdtasks.cluster.console import Console
    from pdtasks.cluster.workers import restart_workers
    from pdtasks.settings import load_settings

    sys.exit(restart_workers(load_settings(), workers, Console()))


@main.command()
@click.argument("workers", nargs=-1, required=True)
def drain(workers: tuple[str, ...]) -> None:
    """Stop WORKERS (as `decode1`) of the running stack; they stay away.

    Each takes nothing more; what it has begun goes to another worker of its stage, or is finished.
    `pdtasks restart WORKER` brings it back.
    """
    from pdtasks.cluster.console import Console
    from pdtasks.cluster.workers import drain_workers
    from pdtasks.settings import load_settings

    sys.exit(drain_workers(load_settings(), workers, Console()))


@main.command()
@click.argument("worker")
@click.argument("role", type=click.Choice(ROLES))
@click.option("--force", is_flag=True, help="Also where that leaves a stage without a worker.")
def role(*, worker: str, role: str, force: bool) -> None:
    """Have WORKER (as `decode1`, of any host) serve other stages: prefill, decode or both.

    It takes no more jobs of a stage that it leaves; what it has begun there goes to another worker,
    or is finished. Its engine stays. After a restart it has the role that it was started with.
    """
    from pdtasks.cluster.console import Console
    from pdtasks.cluster.roles import change_role
    from pdtasks.settings import load_settings

    sys.exit(change_role(load_settings(), worker, role, Console(), force=force))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(as_json: bool) -> None:
    """Show services and workers. Exit code 1 when nothing runs."""
    from pdtasks.cluster.status import format_status, read_status
    from pdtasks.settings import load_settings

    found = read_status(load_settings())
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else format_status(found))
    sys.exit(0 if found.anything else 1)


_URL = click.option("--url", help="Of an API process. [default: of the stack on this host]")


@main.command()
@_URL
@click.option("--every", "every_s", default=1.0, show_default=True, type=click.FloatRange(min=0.2))
@click.option("--once", is_flag=True, help="Show it once, for scripts.")
@click.option("--json", "as_json", is_flag=True, help="Once, for programs.")
def top(*, url: str | None, every_s: float, once: bool, as_json: bool) -> None:
    """Show workers, queues, requests and latencies of a running stack; Ctrl-C ends it.

    Where the API asks for keys, PDTASKS_API_KEY has one; an admin's shows all requests.
    """
    from pdtasks.terminal.top import run_top

    run_top(url, every_s=every_s, once=once, as_json=as_json)


@main.command()
@_URL
@click.option("--model", help="Whose workers; default: the API's default model.")
@click.option("--ttft", default=1.0, show_default=True, type=_SECONDS, help="To the first token.")
@click.option("--itl", default=0.05, show_default=True, type=_SECONDS, help="Between tokens.")
@click.option("--min-prefill", default=1, show_default=True, type=click.IntRange(min=0))
@click.option("--min-decode", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--every", "every_s", default=2.0, show_default=True, type=_SECONDS)
@click.option("--looks", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--rest", "rest_s", default=20.0, show_default=True, type=click.FloatRange(min=0))
@click.option("--dry-run", is_flag=True, help="Say what would be done, and why; do nothing.")
@click.option("--once", is_flag=True, help="Look once, for scripts.")
def balance(
    *,
    url: str | None,
    model: str | None,
    ttft: float,
    itl: float,
    min_prefill: int,
    min_decode: int,
    every_s: float,
    looks: int,
    rest_s: float,
    dry_run: bool,
    once: bool,
) -> None:
    """Follow the load with the workers' roles, until Ctrl-C.

    TTFT and ITL are targets, in seconds, for medians of the last 15 seconds. A stage that misses
    its own gets a worker of the other, where that can spare one: when LOOKS in a row, EVERY seconds
    apart, say so, and not within REST seconds of the last change. Workers of both stages stay as
    they are. Of several balancers of a model one is at work. Where the API asks for keys,
    PDTASKS_API_KEY has one.
    """
    from pdtasks.balance.deciding import Targets
    from pdtasks.balance.running import run_balance
    from pdtasks.cluster.console import Console
    from pdtasks.settings import load_settings

    targets = Targets(ttft, itl, min_prefill, min_decode, 1 if once else looks, rest_s)
    run_balance(
        load_settings(),
        url,
        targets,
        Console(),
        model=model,
        every_s=every_s,
        dry_run=dry_run,
        once=once,
    )


@main.command()
@_URL
@click.option("--model", help="Of several; default: the first that has workers.")
@click.option("--system", help="What the model is told first.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Of each answer.")
@click.option("--temperature", type=click.FloatRange(min=0.0))
def chat(
    *,
    url: str | None,
    model: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
) -> None:
    """Talk to the running stack; each answer says who computed it, and how fast.

    Questions are lines of the standard input. Ctrl-C ends an answer, Ctrl-D the talk. Where the API
    asks for keys, PDTASKS_API_KEY has one.
    """
    from pdtasks.settings import load_settings
    from pdtasks.terminal.chat import Wishes, run_chat

    wishes = Wishes(system, max_tokens, temperature, model)
    sys.exit(run_chat(url, wishes, patience_s=load_settings().request_timeout_s + 10))


@main.command()
def metrics() -> None:
    """Print what belongs into prometheus.yml to scrape the API and all workers."""
    from pdtasks.scraping import configuration_of
    from pdtasks.settings import load_settings

    click.echo(configuration_of(load_settings()), nl=False)


@main.command()
def doctor() -> None:
    """Say what is missing on this host and how to get it."""
    from pdtasks.cluster.doctor import run_checks
    from pdtasks.settings import load_settings

    checks = run_checks(load_settings())
    for check in checks:
        click.echo(f"{'✓' if check.ok else '✗'} {check.name}: {check.detail}")
        if not check.ok:
            click.echo(f"    {check.remedy}")
    sys.exit(0 if all(check.ok for check in checks) else 1)


@main.command()
@click.option("--prompt", default="What is the capital of France?", show_default=True)
def demo(prompt: str) -> None:
    """Start a stack of its own, ask one question, show the proof, stop."""
    from pdtasks.cluster.console import Console
    from pdtasks.cluster.demo import run_demo

    sys.exit(run_demo(prompt, Console()))


@main.command(context_settings=_FLAGS_PASS)
@click.option("--host", help="Address to listen on. [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on. [default: 8000]")
@_takes_front_end_flags
def api(
    host: str | None, port: int | None, reasoning_parser: str | None, flags: tuple[str, ...]
) -> None:
    """Run one API process beside workers that run already.

    Other flags go to vLLM's front end: --enable-auto-tool-choice, --tool-call-parser,
    --chat-template, …
    """
    from api import device
    from pdtasks.links import require_trusted
    from pdtasks.settings import load_settings, make_settings

    device.use_none(load_settings())
    settings = make_settings(**_front_end(flags, reasoning_parser))
    require_trusted(settings)
    from api.main import serve

    serve(settings, host or settings.api_host, settings.api_port if port is None else port)


@main.group()
def keys() -> None:
    """API keys: who may ask, and how much. A running API takes changes within a second."""


_LIMIT = click.IntRange(min=1)


@keys.command("new")
@click.argument("name")
@click.option("--requests-per-minute", type=_LIMIT, help="More get a 429.")
@click.option("--tokens-per-minute", type=_LIMIT, help="Of prompts and answers.")
@click.option("--at-once", type=_LIMIT, help="Requests under way, of each API process.")
@click.option("--admin", is_flag=True, help="May see the requests of all keys and drain workers.")
def new_key(name: str, *, admin: bool, **limits: int | None) -> None:
    """Make a key for NAME and show it, once: only its hash is kept."""
    from pdtasks.keys import Key, add, digest_of, new_secret
    from pdtasks.settings import load_settings

    secret = new_secret()
    file = load_settings().keys_file
    add(file, Key(name, digest_of(secret), **limits, admin=admin))
    click.echo(f"kept as {name} in {file}; the key, which is shown this once:", err=True)
    click.echo(secret)


@keys.command("list")
def list_keys() -> None:
    """Show names and limits."""
    from pdtasks.keys import listed
    from pdtasks.settings import load_settings

    file = load_settings().keys_file
    found = listed(file)
    for key in found:
        name, _, *limits = key.line().split()
        click.echo("  ".join((name, *limits)))
    if not found:
        click.echo(f"no keys in {file}: whoever reaches the API may ask", err=True)


@keys.command("revoke")
@click.argument("name")
def revoke_key(name: str) -> None:
    """The key of NAME is good no more."""
    from pdtasks.keys import remove
    from pdtasks.settings import load_settings

    remove(load_settings().keys_file, name)


main.add_command(bench)
main.add_command(deadletter)


if __name__ == "__main__":
    main(prog_name="pdtasks")
