"""What does a hand-over take between two real engines, and how much of it does nobody notice?

Two engines on this host, a store, no Celery: a prompt is computed by one and continued by the
other, as the two stages do it.  The same prompt length computed without a hand-over is measured
between, so that machines' moods hit both alike.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from pdtasks.bench.shapes import SHAPES
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.engine.boot import start_core
from pdtasks.engine.core import Engine
from pdtasks.engine.generation import Generation, Verdict
from pdtasks.engine.handover import make_decode, make_prefill
from pdtasks.engine.models import resolve_model
from pdtasks.kv import params
from pdtasks.kv.handle import KVHandle
from pdtasks.kv.store import BlockStore
from pdtasks.settings import Settings, make_settings

_FIRST_TOKEN_ID, _LAST_TOKEN_ID = 100, 900  # in every vocabulary here


@dataclass(frozen=True)
class Row:
    """The median over several prompts; times in milliseconds."""

    model: str
    device: str
    prompt_tokens: int
    kv_bytes: int
    plain_first_token_ms: float  #: without a hand-over
    first_token_ms: float  #: with one
    stored_after_ms: float  #: from the first token until the whole prompt is in the store
    save_ms: float  #: from the first step that had blocks to save until all were stored
    load_ms: float  #: decode: from the step that asked until the last block was in its cache
    handover_ms: float  #: from the first token to the second, which the other engine makes
    hidden: float  #: share of the save that ran beside the prompt's computation
    gb_per_s_save: float
    gb_per_s_load: float
    recomputed: int  #: blocks; must be 0
    same_tokens: bool  #: as one engine's alone


def run_handover(
    *,
    shape: str | None,
    device: str,
    tokens: int,
    output_tokens: int,
    prompts: int,
    engine_args: dict[str, Any],
    progress: Callable[[str], None],
) -> Row:
    """Measure `prompts` hand-overs of `tokens` tokens; None as `shape` is the embedded model."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        server = stack.enter_context(ValkeyServer(Path(folder), "kv"))
        settings = engine_settings(
            shape,
            Path(folder),
            device=device,
            max_model_len=tokens + output_tokens + 8,
            kv_url=server.url,
            engine_args=engine_args,
            progress=progress,
        )
        progress("starting the prefill engine")
        prefill = stack.enter_context(running_engine(settings))
        progress("starting the decode engine")
        decode = stack.enter_context(running_engine(settings))
        progress("measuring")
        with closing(BlockStore(settings.kv_urls, ttl_s=60)) as store:
            bench = _Bench(prefill, decode, store, tokens, output_tokens)
            samples = [bench.sample(number) for number in range(prompts + 2)][2:]  # two warm up
    return _row(shape or settings.model_name, device, tokens, samples)


def engine_settings(
    shape: str | None,
    folder: Path,
    *,
    device: str,
    max_model_len: int,
    kv_url: str,
    engine_args: dict[str, Any],
    progress: Callable[[str], None],
) -> Settings:
    """Settings for an engine of `shape` (None: the embedded model) that computes all it is asked.

    A model's folder is made in `folder`.

    Without a prefix cache of its own; a shared prefix is loaded however short it is.
    """
    arguments = {"enable_prefix_caching": False} | engine_args
    if shape is None:
        model = resolve_model(None, make_settings().cache_dir, progress)
    else:
        model = str(SHAPES[shape].write_folder(folder / shape))
        arguments |= {"load_format": "dummy", "skip_tokenizer_init": True, "seed": 0}
    return make_settings(
        device=device,
        model=model,
        kv_urls=(kv_url,),
        kv_min_prefix_tokens=0,
        engine_args=arguments,
        max_model_len=max_model_len,
    )


@contextmanager
def running_engine(settings: Settings) -> Iterator[Engine]:
    """An engine that has started, until the end of the block."""
    assert settings.model is not None

    def die() -> None:
        raise SystemExit("the engine died")

    engine = Engine(
        partial(start_core, settings, settings.model), lambda _step, _time: None, on_death=die
    )
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@dataclass(frozen=True)
class _Sample:
    plain_first_token: float
    first_token: float
    stored: float
    second_token: float
    save: list[dict[str, Any]]
    load: list[dict[str, Any]]
    same_tokens: bool


class _Bench:
    """The way of one prompt after the other, on both engines."""

    def __init__(
        self,
        prefill: Engine,
        decode: Engine,
        store: BlockStore,
        tokens: int,
        output_tokens: int,
    ) -> None:
        self._store = store
        self._prefill = prefill
        self._decode = decode
        self._tokens = tokens
        self._output_tokens = output_tokens
        self._prompts = Prompts()

    def sample(self, number: int) -> _Sample:
        prompt, other = self._prompts.prompt(self._tokens), self._prompts.prompt(self._tokens)
        # Beside it, a prompt of the same length that nobody hands over.
        plain = Run(f"plain-{number}", other, self._output_tokens)
        make_decode(plain.request, plain.request.request_id, tokens=[], handle=None)
        plain.generate(self._prefill)

        first = Run(f"prefill-{number}", prompt, self._output_tokens)
        make_prefill(first.request, first.request.request_id, transfer_id=f"bench-{number}")
        first.generate(self._prefill, saved=True)
        handle = params.ours(first.generation.transfer_params).get("handle")
        assert handle is not None

        rest = Run(f"decode-{number}", prompt, self._output_tokens)
        token_ids = list(first.generation.token_ids)
        make_decode(rest.request, rest.request.request_id, tokens=token_ids, handle=handle)
        rest.generate(self._decode)

        alone = Run(f"alone-{number}", prompt, self._output_tokens)
        make_decode(alone.request, alone.request.request_id, tokens=[], handle=None)
        alone.generate(self._prefill)
        # A store that runs for long reuses its memory.
        names = KVHandle.from_wire(handle)
        self._store.delete(
            names.key(index, rank)
            for index in range(names.num_blocks)
            for rank in range(names.tp_size)
        )
        return _Sample(
            plain_first_token=plain.first_output_after,
            first_token=first.first_output_after,
            stored=first.saved_after,
            second_token=rest.first_output_after,
            save=first.generation.transfers["save"],
            load=rest.generation.transfers["load"],
            same_tokens=alone.generation.token_ids == token_ids + rest.generation.token_ids,
        )


class Prompts:
    """Random prompts, the same in each run, none like another."""

    def __init__(self) -> None:
        self._random = random.Random(0)  # noqa: S311 - prompts, not secrets

    def prompt(self, tokens: int) -> list[int]:
        """Token ids that every vocabulary here has."""
        choose = self._random.randint
        return [choose(_FIRST_TOKEN_ID, _LAST_TOKEN_ID) for _ in range(tokens)]


class Run:
    """One request through one engine, with the times of what happens, in seconds from its start."""

    def __init__(self, name: str, prompt: list[int], output_tokens: int) -> None:
        self.request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=SamplingParams(
                temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
            ),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self.generation: Generation
        self.first_output_after = 0.0
        self.saved_after = 0.0

    def generate(self, engine: Engine, *, saved: bool = False) -> None:
        engine.call(self._generate(engine, saved)).result(timeout=300)

    async def _generate(self, engine: Engine, saved: bool) -> None:
        started = time.perf_counter()

        def note(_output: EngineCoreOutput) -> Verdict:
            self.first_output_after = self.first_output_after or time.perf_counter() - started
            return Verdict()

        self.generation = Generation(
            request=self.request,
            request_id=self.request.request_id,
            reply_to=None,
            position=0,
            judge=note,
        )
        await engine.generate(self.generation)
        if saved:
            async with asyncio.timeout(60):
                await self.generation.saved.wait()
            self.saved_after = time.perf_counter() - started
        engine.forget(self.generation)


def _row(model: str, device: str, tokens: int, samples: list[_Sample]) -> Row:
    def median(value: Callable[[_Sample], float]) -> float:
        return statistics.median(value(sample) for sample in samples)

    def slowest(records: list[dict[str, Any]]) -> float:
        return max(float(record["seconds"]) for record in records)

    kv_bytes = sum(record["bytes"] for record in samples[0].load)
    save, load = median(lambda s: slowest(s.save)), median(lambda s: slowest(s.load))
    stored_after = median(lambda s: s.stored - s.first_token)
    return Row(
        model=model,
        device=device,
        prompt_tokens=tokens,
        kv_bytes=kv_bytes,
        plain_first_token_ms=1e3 * median(lambda s: s.plain_first_token),
        first_token_ms=1e3 * median(lambda s: s.first_token),
        stored_after_ms=1e3 * stored_after,
        save_ms=1e3 * save,
        load_ms=1e3 * load,
        handover_ms=1e3 * median(lambda s: s.stored - s.first_token + s.second_token),
        hidden=max(0.0, 1 - stored_after / save),
        gb_per_s_save=kv_bytes / save / 1e9,
        gb_per_s_load=kv_bytes / load / 1e9,
        recomputed=sum(record["missing"] for s in samples for record in s.load),
        same_tokens=all(s.same_tokens for s in samples),
    )


def to_json(row: Row) -> dict[str, object]:
    """For `--json`."""
    return asdict(row)
