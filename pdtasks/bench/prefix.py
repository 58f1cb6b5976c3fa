"""From which length on is a shared prefix cheaper to load than to compute?

One real engine without a prefix cache of its own: each prompt is computed once, which leaves its
blocks in the store, and then asked for again, which loads them.  The time to the first token is
compared; where the second one begins to win is what `PDTASKS_KV_MIN_PREFIX_TOKENS` should say.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pdtasks.bench.handover import Prompts, Run, engine_settings, running_engine
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.engine.handover import make_prefill


@dataclass(frozen=True)
class Row:
    """Medians, in milliseconds to the first token."""

    model: str
    device: str
    prefix_tokens: int  #: in whole blocks
    computed_ms: float
    loaded_ms: float


def run_prefix(
    *,
    shape: str | None,
    device: str,
    tokens: list[int],
    prompts: int,
    engine_args: dict[str, Any],
    progress: Callable[[str], None],
) -> Iterator[Row]:
    """Measure prompts that have `tokens` tokens in whole blocks and one more.

    Raises RuntimeError when a prefix was not loaded: then the comparison means nothing.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        server = stack.enter_context(ValkeyServer(Path(folder), "kv"))
        settings = engine_settings(
            shape,
            Path(folder),
            device=device,
            max_model_len=max(tokens) + 8,
            kv_url=server.url,
            engine_args=engine_args,
            progress=progress,
        )
        progress("starting the engine")
        engine = stack.enter_context(running_engine(settings))
        choose = Prompts()
        for length in tokens:
            computed, loaded = [], []
            for number in range(prompts + 1):
                prompt = choose.prompt(length + 1)
                times = []
                for again in (False, True):
                    run = Run(f"{length}-{number}-{again}", prompt, 1)
                    make_prefill(run.request, run.request.request_id, run.request.request_id)
                    run.generate(engine, saved=True)
                    if again != bool(run.generation.transfers.get("load")):
                        raise RuntimeError(
                            f"a prefix of {length} tokens was not loaded as it should"
                        )
                    times.append(run.first_output_after)
                if number:  # the first one warms up
                    computed.append(times[0])
                    loaded.append(times[1])
            yield Row(
                model=settings.model_name,
                device=device,
                prefix_tokens=length,
                computed_ms=1e3 * statistics.median(computed),
                loaded_ms=1e3 * statistics.median(loaded),
            )


def to_json(rows: list[Row]) -> list[dict[str, object]]:
    """For `--json`."""
    return [asdict(row) for row in rows]
