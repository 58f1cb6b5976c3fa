"""The command `pdtasks`: which verbs are there, and what do they take?

Thin on purpose: every verb imports what it needs when it runs, so that `--help` is instant.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pdtasks.errors import PdtasksError


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


#: `pdtasks up --enable-auto-tool-choice --tool-call-parser hermes`
_FLAGS_PASS = {"ignore_unknown_options": True}


@main.command(context_settings=_FLAGS_PASS)
@click.option("--prefill", default=1, show_default=True, help="Prefill workers.")
@click.option("--decode", default=1, show_default=True, help="Decode workers.")
@click.option("--model", help="Folder or Hugging Face name; without it the embedded model.")
@click.option("--host", help="Address the API listens on. [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port of the API. [default: 8000]")
@click.option("--flower-port", type=int, help="Port of Flower. [default: 5555]")
@click.option("--concurrency", type=int, help="Jobs that one worker takes at once.")
@click.option("--no-flower", is_flag=True, help="Do not start Flower.")
@_takes_front_end_flags
def up(
    *,
    prefill: int,
    decode: int,
    model: str | None,
    host: str | None,
    port: int | None,
    flower_port: int | None,
    concurrency: int | None,
    no_flower: bool,
    reasoning_parser: str | None,
    flags: tuple[str, ...],
) -> None:
    """Start services, workers, API and Flower; Ctrl-C drains and stops them.

    Other flags go to vLLM's front end: --enable-auto-tool-choice, --tool-call-parser,
    --chat-template, …
    """
    from pdtasks.cluster.console import Console
    from pdtasks.cluster.supervisor import Size, run_stack

    given = {"model": model, "api_host": host, "api_port": port, "flower_port": flower_port}
    overrides = {name: value for name, value in given.items() if value is not None}
    overrides |= _front_end(flags, reasoning_parser)
    size = Size(prefill, decode, concurrency, flower=not no_flower)
    sys.exit(run_stack(overrides, size, Console()))


@main.command()
def down() -> None:
    """Drain and stop the running stack. A second time: stop it at once."""
    from pdtasks.cluster.console import Console
    from pdtasks.cluster.down import stop_stack
    from pdtasks.settings import load_settings

    sys.exit(stop_stack(load_settings().home, Console()))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(as_json: bool) -> None:
    """Show services and workers. Exit code 1 when nothing runs."""
    from pdtasks.cluster.status import format_status, read_status
    from pdtasks.settings import load_settings

    found = read_status(load_settings())
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else format_status(found))
    sys.exit(0 if found.anything else 1)


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
    from pdtasks.settings import make_settings

    settings = make_settings(**_front_end(flags, reasoning_parser))
    from api.main import serve

    serve(settings, host or settings.api_host, settings.api_port if port is None else port)


@main.group()
def bench() -> None:
    """Measure parts of pdtasks on this host."""


@bench.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    help="Where the plot goes (PNG). [default: beside the JSON file, or bench-kv.png]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="How long each figure is measured.",
)
# Less of everything, for tests: bytes of the payloads, numbers of connections.
@click.option("--size", "sizes", type=int, multiple=True, hidden=True)
@click.option("--connections", type=int, multiple=True, hidden=True)
def kv(
    *,
    json_file: Path | None,
    plot_file: Path | None,
    seconds: float,
    sizes: tuple[int, ...],
    connections: tuple[int, ...],
) -> None:
    """Put and get KV blocks through Valkey, in GB/s.

    Beside it, in the same run: plain sockets to another process, which is the limit, and other
    clients of the same server. All are measured right after each other, twice, and each one's
    better figure counts, for machines are noisy. With the default it takes eight minutes; nothing
    else should run. Needs `pip install 'pdtasks[bench]'`.
    """
    from pdtasks.bench.kv import run_bench

    run_bench(
        lambda line: click.echo(line, err=True),
        click.echo,
        json_file=json_file,
        plot_file=plot_file,
        seconds=seconds,
        sizes=sizes,
        connections=connections,
    )


def _keep_vllm_quiet() -> None:
    # It would log 60 lines for each engine between the figures; read when vLLM is imported.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


_DEVICE = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Where the cache lies. [default: what this host has]",
)
_JSON = click.option("--json", "json_file", type=click.Path(path_type=Path), help="Figures.")


@bench.command()
@_DEVICE
@_JSON
@click.option("--shape", default="tiny", show_default=True, help="llama-2-7b, llama-3-8b or tiny.")
@click.option("--tokens", default=2048, show_default=True, help="Length of the prompt.")
@click.option("--block-tokens", default=64, show_default=True, help="Tokens in a block.")
@click.option("--connections", type=int, multiple=True, default=(1, 4, 8), show_default=True)
@click.option("--passes", default=5, show_default=True, help="The median counts.")
def transfer(*, json_file: Path | None, device: str | None, **options: Any) -> None:
    """Move a prompt's blocks between an engine's cache, the store and shared memory.

    Copies and checksums are included. No engine runs; the cache holds noise.
    """
    from pdtasks.bench.transfer import run_transfer, to_json
    from pdtasks.settings import make_settings

    rows = []
    click.echo(
        "shape       device  op           conn.  blocks  MiB each    ms   best  worst   GB/s"
    )
    for row in run_transfer(
        device=device or make_settings().device,
        **options | {"connections": list(options["connections"])},
    ):
        rows.append(row)
        click.echo(
            f"{row.shape:<11} {row.device:<7} {row.op:<11} {row.connections:>6} {row.blocks:>7} "
            f"{row.block_bytes / 2**20:>9.2f} {row.seconds * 1e3:>6.1f} "
            f"{row.best_seconds * 1e3:>6.1f} {row.worst_seconds * 1e3:>6.1f} {row.gb_per_s:>6.2f}"
        )
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(rows), indent=1) + "\n")


@bench.command()
@_DEVICE
@_JSON
@click.option("--shape", help="Random weights in the shape of llama-2-7b, llama-3-8b or tiny.")
@click.option("--tokens", default=1024, show_default=True, help="Length of the prompts.")
@click.option("--output-tokens", default=8, show_default=True)
@click.option("--prompts", default=5, show_default=True, help="The median counts.")
@click.option("--engine-args", default="{}", help="Further vLLM engine arguments, as JSON.")
def handover(
    *, json_file: Path | None, device: str | None, engine_args: str, **options: Any
) -> None:
    """Hand prompts over between two engines on this host and time each part. Needs vLLM.

    Without --shape it is the embedded model.
    """
    _keep_vllm_quiet()
    from pdtasks.bench.handover import run_handover, to_json
    from pdtasks.settings import make_settings

    row = run_handover(
        device=device or make_settings().device,
        engine_args=json.loads(engine_args),
        progress=lambda line: click.echo(line, err=True),
        **options,
    )
    figures = to_json(row)
    for name, value in figures.items():
        click.echo(f"{name:<22} {value:.3g}" if isinstance(value, float) else f"{name:<22} {value}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(0 if row.same_tokens and not row.recomputed else 1)


@bench.command()
@_DEVICE
@_JSON
@click.option("--shape", help="Random weights in the shape of llama-2-7b, llama-3-8b or tiny.")
@click.option("--tokens", type=int, multiple=True, default=(128, 256, 512, 1024), show_default=True)
@click.option("--prompts", default=5, show_default=True, help="The median counts.")
@click.option("--engine-args", default="{}", help="Further vLLM engine arguments, as JSON.")
def prefix(
    *,
    json_file: Path | None,
    device: str | None,
    engine_args: str,
    tokens: tuple[int, ...],
    **options: Any,
) -> None:
    """Compare computing a shared prefix with loading it, by time to the first token. Needs vLLM.

    The shortest prefix that is cheaper to load belongs into PDTASKS_KV_MIN_PREFIX_TOKENS.
    """
    _keep_vllm_quiet()
    from pdtasks.bench.prefix import run_prefix, to_json
    from pdtasks.settings import make_settings

    rows = []
    click.echo("prefix, tokens   computed, ms   loaded, ms")
    for row in run_prefix(
        device=device or make_settings().device,
        tokens=list(tokens),
        engine_args=json.loads(engine_args),
        progress=lambda line: click.echo(line, err=True),
        **options,
    ):
        rows.append(row)
        click.echo(f"{row.prefix_tokens:>14} {row.computed_ms:>14.1f} {row.loaded_ms:>12.1f}")
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(rows), indent=1) + "\n")


@bench.command()
@click.option(
    "--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="How many bursts."
)
@_JSON
def burst(*, rounds: int, json_file: Path | None) -> None:
    """Send bursts of requests to the running stack, and see that it answers.

    Each round is 300 requests at once; the last one has also 512 answers to one request, twice, and
    a plain request. Connections are all that were opened at RabbitMQ meanwhile. Exit code 1 when a
    request was not answered.
    """
    from pdtasks.bench.burst import format_burst, run_burst
    from pdtasks.settings import load_settings

    found = run_burst(load_settings(), rounds, lambda line: click.echo(line, err=True))
    click.echo(format_burst(found))
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(found), indent=1) + "\n")
    sys.exit(0 if found.answered == found.requests else 1)


@bench.command()
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    multiple=True,
    default=(100, 500, 1500),
    show_default=True,
    help="Lengths of the prompts.",
)
@click.option(
    "--requests", type=click.IntRange(min=1), default=8, show_default=True, help="Of each length."
)
@_JSON
def gap(*, tokens: tuple[int, ...], requests: int, json_file: Path | None) -> None:
    """Measure the gap between first and second token on the running stack, beside a normal one.

    Medians of requests that are asked one after the other, each with a prompt of its own.
    """
    from pdtasks.bench.gap import format_gap, run_gap, to_json
    from pdtasks.settings import load_settings

    rows = run_gap(load_settings(), tokens, requests, lambda line: click.echo(line, err=True))
    click.echo(format_gap(rows))
    if json_file is not None:
        json_file.write_text(to_json(rows) + "\n")


if __name__ == "__main__":
    main(prog_name="pdtasks")
