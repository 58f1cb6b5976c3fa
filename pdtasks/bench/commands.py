"""The commands `pdtasks bench …`: what do they take, and how do they show what they found?

Thin on purpose: each imports what it needs when it runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click

from pdtasks.naming import ROLES


@click.group()
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
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="How long there are load and faults.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of faults and load.")
@click.option(
    "--engine",
    type=click.Choice(["stub", "real"]),
    default="stub",
    show_default=True,
    help="Engines that compute nothing and repeat themselves, or vLLM with the embedded model.",
)
@_JSON
def chaos(
    *, minutes: float, seed: int, engine: Literal["stub", "real"], json_file: Path | None
) -> None:
    """Kill, freeze, cut and restart the parts of a stack under load, and count what became of it.

    The stack is its own: services, two workers of each stage, two API processes. Every answer is
    compared with the one that the same engines gave before. Exit code 1 when a request was lost,
    duplicated or wrong; then the logs are kept.
    """
    _keep_vllm_quiet()
    from pdtasks.bench.chaos.command import run_command

    sys.exit(run_command(minutes, seed, engine, json_file))


@bench.command()
@click.option(
    "--seconds",
    type=click.FloatRange(min=10),
    default=120.0,
    show_default=True,
    help="How long the flood lasts, and then how long clients come again as told.",
)
@click.option(
    "--times",
    type=click.FloatRange(min=1),
    default=10.0,
    show_default=True,
    help="How many times what the stack can do.",
)
@_JSON
def overload(*, seconds: float, times: float, json_file: Path | None) -> None:
    """Ask a stack for ten times what it can do, and see whether it stays small, honest and fast.

    The stack is its own, with stub engines: services, two workers of each stage, two API processes.
    First what it can do, then new clients at ten times that pace who come once, then what it can do
    afterwards; then ten times as many clients as it has room for, who come again when they were
    told to. Exit code 1 when a request ended neither with its right answer nor with a 429.
    """
    _keep_vllm_quiet()
    from pdtasks.bench.overload.command import run_command

    sys.exit(run_command(seconds, times, json_file))


@bench.command()
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=3.0,
    show_default=True,
    help="Of each side in a round, once with many requests in flight and once with one.",
)
@click.option(
    "--in-flight",
    type=click.IntRange(min=1, max=1024),
    default=64,
    show_default=True,
    help="Requests under way, and threads of each worker.",
)
@click.option("--tokens", type=click.IntRange(min=2), default=1000, show_default=True)
@_JSON
def control(
    *, rounds: int, seconds: float, in_flight: int, tokens: int, json_file: Path | None
) -> None:
    """Measure publishes, hops and results without an engine, beside a stock Celery chain.

    Both sides are on the same broker and bus, a worker of each stage: requests a second with many
    in flight, latency with one, CPU of client and workers. One side after the other, in short
    rounds: medians, and ratios of the same round. Nothing else should run.
    """
    _keep_vllm_quiet()
    from pdtasks.bench.control.command import run_command
    from pdtasks.bench.control.run import Plan

    run_command(
        Plan(rounds, seconds, in_flight=in_flight, threads=in_flight, prompt_tokens=tokens),
        json_file,
    )


@bench.command()
@click.option("--jobs", type=click.IntRange(min=0), default=10_000, show_default=True)
@click.option("--at-once", type=click.IntRange(min=0), default=500, show_default=True)
@click.option(
    "--answers",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Of one request, and prompts of one.",
)
@click.option("--seconds", type=click.FloatRange(min=1), default=30.0, show_default=True)
@_JSON
def fair(*, jobs: int, at_once: int, answers: int, seconds: float, json_file: Path | None) -> None:
    """Measure one tenant's answers alone, and beside all that another may ask for.

    Many requests at once; one request for many answers, or with many prompts, after the other;
    many jobs.

    On services, workers and API processes of its own, with stub engines.
    """
    _keep_vllm_quiet()
    from pdtasks.bench.fair.command import run_command
    from pdtasks.bench.fair.run import Plan

    run_command(Plan(jobs, at_once, answers, seconds), json_file)


@bench.command()
@click.option("--rounds", type=click.IntRange(min=1), default=12, show_default=True)
@click.option("--streams", type=click.IntRange(min=1, max=10_000), default=256, show_default=True)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Of each stream in a round.",
)
@_JSON
def stream(*, rounds: int, streams: int, tokens: int, json_file: Path | None) -> None:
    """Measure the relaying of tokens from a stub engine, beside vLLM's own front end.

    One decode worker and one API process on services of their own; `vllm serve`'s server on the
    same stub; and ours without telling attempts apart, which is what going on after a lost worker
    costs. A stream gets its next token when the client has read the one before. One side after the
    other, in short rounds: medians, and ratios of the same round. Nothing else should run.
    """
    _keep_vllm_quiet()
    from pdtasks.bench.stream.command import run_command
    from pdtasks.bench.stream.run import Plan

    run_command(Plan(rounds, streams, tokens), json_file)


@bench.group()
def scale() -> None:
    """Find the first bottleneck of many GPUs: live with a stub engine, beyond that by a model."""


@scale.command()
@click.option(
    "--pairs",
    type=click.IntRange(min=1, max=256),
    multiple=True,
    default=(1, 2, 4, 8, 16, 32),
    show_default=True,
    help="Workers of each stage, one number after the other.",
)
@click.option("--apis", type=click.IntRange(min=1), help="API processes. [default: 1 for 8 pairs]")
@click.option("--seconds", type=click.FloatRange(min=1), default=15.0, show_default=True)
@click.option(
    "--share",
    type=click.FloatRange(min=0, min_open=True, max=1),
    default=0.5,
    show_default=True,
    help="Of what the GPUs can do, asked at random times.",
)
@click.option(
    "--slower",
    type=click.FloatRange(min=1),
    default=1.0,
    show_default=True,
    help="Times of a GPU so many times longer, rates so many times lower: for more workers.",
)
@click.option("--prompt", type=click.IntRange(min=1), default=5000, show_default=True)
@click.option(
    "--answer",
    "answers",
    type=click.IntRange(min=2),
    multiple=True,
    default=(250, 10),
    show_default=True,
    help="Tokens. Two lengths tell apart what a request costs and what a token does.",
)
@click.option(
    "--minutes",
    type=float,
    default=8.0,
    show_default=True,
    help="Begin nothing that would take longer.",
)
@_JSON
def live(
    *,
    pairs: tuple[int, ...],
    apis: int | None,
    prompt: int,
    answers: tuple[int, ...],
    json_file: Path | None,
    **options: float,
) -> None:
    """Run real workers, RabbitMQ, Valkey and API processes with a stub engine of a GPU's times.

    More and more workers, each number asked at random times for a share of what so many GPUs could
    do. Shows what clients see and what a request costs each part; stops where the host is full.
    """
    _keep_vllm_quiet()
    from pdtasks.bench.scale.command import live_command
    from pdtasks.bench.scale.live import LivePlan, Size

    sizes = [Size(n, n, apis or 1 + n // 8) for n in pairs]
    workloads = [(prompt, answer) for answer in answers]
    live_command(LivePlan(sizes, workloads=workloads, **options), json_file)


@scale.command("bus")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=3.0, show_default=True)
@click.option("--buses", type=click.IntRange(min=1), default=1, show_default=True)
@_JSON
def scale_bus(*, seconds: float, buses: int, json_file: Path | None) -> None:
    """Measure how many replies of engine steps buses take, by their real writers and readers."""
    from pdtasks.bench.scale.bus import format_bus, run_bus

    rows = run_bus(seconds=seconds, buses=buses)
    click.echo(format_bus(rows))
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


@scale.command()
@click.option(
    "--live",
    "live_files",
    type=click.Path(path_type=Path),
    multiple=True,
    help="JSON of `bench scale live`: what each part costs. [default: that of docs/scaling.md]",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("bench/results"),
    show_default=True,
    help="Folder with what was measured on GPUs.",
)
@click.option(
    "--faster",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Services and API processes run on cores so many times as fast.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=6.0,
    show_default=True,
    help="Of requests in each simulation of a large stack.",
)
@_JSON
@click.option("--plot", "plot_folder", type=click.Path(path_type=Path), help="For pictures (PNG).")
def model(
    *,
    live_files: tuple[Path, ...],
    results: Path,
    faster: float,
    seconds: float,
    json_file: Path | None,
    plot_folder: Path | None,
) -> None:
    """Simulate stacks of 2 to 512 GPUs: which part is full first, and how many are needed.

    A discrete-event model with times of one H200 and costs of `bench scale live`. Shows rows that
    were measured beside the same modelled, then sizes, splits of four GPUs, and a rule for them.
    """
    from pdtasks.bench.scale.command import model_command

    model_command(
        live_files,
        results,
        times=faster,
        seconds=seconds,
        json_file=json_file,
        plot_folder=plot_folder,
    )


@bench.command()
@click.option("--rounds", type=click.IntRange(min=1), default=6, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=6.0, show_default=True)
@click.option("--streams", type=click.IntRange(min=1, max=10_000), default=128, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=400, show_default=True)
@_JSON
def observed(
    *, rounds: int, seconds: float, streams: int, tokens: int, json_file: Path | None
) -> None:
    """Measure what it costs to be looked at.

    The same stub stack as in `control` and `stream`, in turns with Flower, events of tasks and a
    scraper of all metrics every 5 s, and without. Ratios are of the same round. Nothing else should
    run.
    """
    _keep_vllm_quiet()
    from pdtasks.bench.observed import Plan, run_command

    run_command(Plan(rounds=rounds, seconds=seconds, streams=streams, tokens=tokens), json_file)


@bench.command()
@click.argument("worker")
@click.argument("roles", nargs=-1, required=True, type=click.Choice(ROLES))
@click.option("--rate", type=click.FloatRange(min=0.01), default=1.0, show_default=True)
@click.option("--prompt", type=click.IntRange(min=2), default=300, show_default=True)
@click.option("--answer", type=click.IntRange(min=2), default=60, show_default=True)
@click.option("--hold", type=click.FloatRange(min=0), default=10.0, show_default=True)
@_JSON
def role(
    *,
    worker: str,
    roles: tuple[str, ...],
    rate: float,
    prompt: int,
    answer: int,
    hold: float,
    json_file: Path | None,
) -> None:
    """Have WORKER of the running stack take ROLES in turn, while requests come.

    RATE requests/s of PROMPT and ANSWER tokens; HOLD seconds in each role. Shows how soon it
    serves, and what the requests notice.
    """
    from pdtasks.bench.role import Load, format_role, run_role, to_json
    from pdtasks.settings import load_settings

    load = Load(rate, prompt, answer, hold)
    result = run_role(load_settings(), worker, roles, load, lambda line: click.echo(line, err=True))
    click.echo(format_role(result))
    if json_file is not None:
        json_file.write_text(to_json(result) + "\n")


@bench.command()
@click.option(
    "--phase",
    "phases",
    multiple=True,
    default=("1200/8@0.4", "40/150@0.4", "1200/8@0.4"),
    show_default=True,
    help="PROMPT/ANSWER@RATE: tokens, and requests/s.",
)
@click.option("--seconds", type=click.FloatRange(min=5), default=120.0, show_default=True)
@click.option("--ttft", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True)
@click.option("--itl", type=click.FloatRange(min=0, min_open=True), default=0.05, show_default=True)
@click.option(
    "--stub",
    nargs=2,
    type=click.IntRange(min=1),
    help="Instead of the running stack: so many prefill and decode workers with stub engines.",
)
@click.option("--slower", type=click.FloatRange(min=1), default=1.0, show_default=True)
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path))
@_JSON
def turning(
    *,
    phases: tuple[str, ...],
    seconds: float,
    ttft: float,
    itl: float,
    stub: tuple[int, int] | None,
    slower: float,
    plot_file: Path | None,
    json_file: Path | None,
) -> None:
    """Ask for long prompts, then for long answers, then for long prompts again.

    Shows how roles (`pdtasks up --auto`) and latencies follow; each phase lasts SECONDS. TTFT and
    ITL are the targets, in seconds. Stub engines take a GPU's times, or SLOWER times as long.
    """
    from pdtasks.balance.deciding import Targets
    from pdtasks.bench.turning.command import turning_command
    from pdtasks.bench.turning.run import Phase

    try:
        wanted = [Phase.read(phase) for phase in phases]
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    turning_command(
        wanted,
        seconds=seconds,
        targets=Targets(ttft_s=ttft, itl_s=itl),
        stub=stub or None,
        slower=slower,
        json_file=json_file,
        plot_file=plot_file,
    )


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


@bench.command()
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    multiple=True,
    default=(32, 64, 128, 256),
    show_default=True,
    help="Lengths of the prompts.",
)
@click.option(
    "--others", type=click.IntRange(min=0), default=4, show_default=True, help="Answers meanwhile."
)
@click.option(
    "--requests", type=click.IntRange(min=1), default=8, show_default=True, help="Of each length."
)
@_JSON
def route(*, tokens: tuple[int, ...], others: int, requests: int, json_file: Path | None) -> None:
    """Compare both stages with one worker for all of it, by the prompt's length.

    On the running stack; what the prompts cost other answers' tokens is measured too.
    """
    from pdtasks.bench.route import format_route, run_route, to_json
    from pdtasks.settings import load_settings

    told = partial(click.echo, err=True)
    rows = run_route(load_settings(), tokens, others, requests, told)
    click.echo(format_route(rows))
    if json_file is not None:
        json_file.write_text(to_json(rows) + "\n")


@bench.command()
@click.option(
    "--answers", type=click.IntRange(min=2), default=8, show_default=True, help="To each prompt."
)
@click.option(
    "--tokens", type=click.IntRange(min=2), default=1500, show_default=True, help="Of a prompt."
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@_JSON
def answers(*, answers: int, tokens: int, rounds: int, json_file: Path | None) -> None:
    """Measure what n answers to one prompt cost on the running stack.

    Beside one answer, and beside as many prompts of their own; medians.
    """
    from pdtasks.bench.answers import format_answers, run_answers, to_json
    from pdtasks.settings import load_settings

    rows = run_answers(
        load_settings(), answers, tokens, rounds, lambda line: click.echo(line, err=True)
    )
    click.echo(format_answers(rows))
    if json_file is not None:
        json_file.write_text(to_json(rows) + "\n")


@bench.command()
@click.option("--prompts", type=click.IntRange(min=2), default=16, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--answer", type=click.IntRange(min=1), default=64, show_default=True)
@_JSON
def exact(*, prompts: int, tokens: int, answer: int, json_file: Path | None) -> None:
    """Count greedy answers that are others when all are asked for at once.

    Prompts of random tokens, of which no next one is likely: the most sensitive there are. Needs a
    stack: `pdtasks up`.
    """
    from pdtasks.bench.exact import format_exact, run_exact, to_json
    from pdtasks.settings import load_settings

    rows = run_exact(
        load_settings(), prompts, tokens, answer, lambda line: click.echo(line, err=True)
    )
    click.echo(format_exact(rows))
    if json_file is not None:
        json_file.write_text(to_json(rows) + "\n")


_A_DAY_S = 86_400.0


@bench.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--topology", "topologies", multiple=True, help="Of the plan. [default: all]")
@click.option("--workload", "workloads", multiple=True, help="Of the plan. [default: all]")
@click.option(
    "--rate",
    "rates",
    type=click.FloatRange(min=0),
    multiple=True,
    help="Instead of the workloads' own.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Runs of each; medians are shown.",
)
@click.option("--vllm-client", is_flag=True, help="Ask with `vllm bench serve` as well.")
@click.option("--exact", is_flag=True, help="Compare answers with those of the first topology.")
@click.option("--model", required=True, help="Folder with config.json and tokenizer, or a name.")
@_DEVICE
@click.option("--minutes", type=float, help="Begin nothing that would take longer.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for figures and logs."
)
def serving(
    *,
    plan: Path,
    topologies: tuple[str, ...],
    workloads: tuple[str, ...],
    rates: tuple[float, ...],
    repeats: int,
    vllm_client: bool,
    exact: bool,
    model: str,
    device: str | None,
    minutes: float | None,
    out: Path,
) -> None:
    """Serve a model in one topology after the other, and ask each the same: pdtasks and its peers.

    PLAN is a YAML file, bench/gpu/plan.yaml for example. Exit code 1 when something was not run or
    not answered. Needs vLLM and `pip install 'pdtasks[bench]'`.
    """
    # As with Ctrl-C, what was started is ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    from pdtasks.bench.serving.devices import count_devices, describe
    from pdtasks.bench.serving.plan import choose, read_plan
    from pdtasks.bench.serving.processes import Host
    from pdtasks.bench.serving.rows import format_rows
    from pdtasks.bench.serving.run import OWN_CLIENT, VLLM_CLIENT, Runner, Wanted, check_devices
    from pdtasks.settings import make_settings

    device = device or make_settings().device
    chosen = read_plan(plan)
    wanted = Wanted(
        topologies=choose("topology", chosen.topologies, topologies),
        workloads=choose("workload", chosen.workloads, workloads),
        rates=rates,
        repeats=repeats,
        clients=(OWN_CLIENT, VLLM_CLIENT) if vllm_client else (OWN_CLIENT,),
        exact=exact,
    )
    check_devices(chosen, wanted.topologies, count_devices(device))
    host = Host(model, device, lambda line: click.echo(line, err=True))
    found = Runner(
        chosen,
        host.started,
        tokenizer=model,
        machine=describe(device),
        out=out,
        limit_s=60 * minutes if minutes else _A_DAY_S,
        progress=host.progress,
    ).run(wanted)
    click.echo(format_rows(found.rows))
    for problem in found.problems:
        click.echo(problem)
    sys.exit(1 if found.problems else 0)


@bench.command()
@click.argument("rows", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for the pictures (PNG)."
)
def plot(*, rows: tuple[Path, ...], out: Path) -> None:
    """Draw the rows of `bench serving`: latency and goodput over the rate, and where time goes."""
    from pdtasks.bench.serving.plot import draw_rates, draw_stages

    every = [row for file in rows for row in json.loads(file.read_text())]
    out.mkdir(parents=True, exist_ok=True)
    for draw, name in ((draw_rates, "rates.png"), (draw_stages, "stages.png")):
        try:
            draw(every, out / name)
            click.echo(out / name)
        except ValueError as exc:
            click.echo(f"no {name}: {exc}", err=True)


@bench.command()
@click.option("--lines", type=click.IntRange(1, 50_000), default=10_000, show_default=True)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Lines that each API process runs at once.",
)
@click.option("--seconds", type=click.FloatRange(min=1), default=20.0, show_default=True)
@_JSON
def batch(*, lines: int, concurrency: int, seconds: float, json_file: Path | None) -> None:
    """Run a long batch to its end, while somebody waits for answers.

    Shows its pace, what it does to who waits (`--seconds` alone before it), and the memory of each
    part. On services, workers and API processes of its own, with stub engines.
    """
    _keep_vllm_quiet()
    import tempfile

    from pdtasks.bench.batch import Plan, format_batch, run_batch, to_json
    from pdtasks.cluster.console import Console

    # As with Ctrl-C, what was started is ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    console = Console(sys.stderr)
    console.line("stub engines: they compute nothing")
    with tempfile.TemporaryDirectory(prefix="pdtasks-batch-") as home:
        found = run_batch(Plan(lines, concurrency, seconds), Path(home), console)
    click.echo(format_batch(found))
    if json_file is not None:
        json_file.write_text(to_json(found) + "\n")
    if found.answered != lines:
        raise SystemExit(1)
