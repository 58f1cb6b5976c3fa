"""Which worker runs on which cores or GPUs?

Two engines left to themselves take the same core 0 or the same GPU 0, so each is told its own.  On
a CPU host the cores are shared out evenly; what does not divide is left to the API and the
services.  Prefill workers come first.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pdtasks.errors import ConfigurationError
from pdtasks.naming import ROLES, STAGES, queue_of, role_of, stage_and_model, stages_of
from pdtasks.settings import Settings


@dataclass(frozen=True)
class Placement:
    """One worker and its place."""

    role: str
    number: int  #: from 1, for each role
    devices: str  #: for people: "core 0", "GPU 1, 2"
    env: Mapping[str, str]  #: what makes the engine stay there
    model: str = ""  #: empty: the default one

    @property
    def name(self) -> str:
        """The worker's name without its host."""
        return queue_of(f"{self.role}{self.number}", self.model)

    @property
    def queues(self) -> str:
        """As `-Q` takes them."""
        return ",".join(queue_of(stage, self.model) for stage in stages_of(self.role))


@dataclass(frozen=True)
class WantedWorker:
    """A worker that is to be placed."""

    role: str
    model: str  #: empty: the default one
    ranks: int = 1  #: devices that its engine spreads over


def further_worker(queues: str, settings: Settings) -> WantedWorker:
    """What consumes from `queues`, written as for `-Q`.

    Raises ConfigurationError when they are none of a further model.
    """
    found = [stage_and_model(queue) for queue in queues.split(",")]
    stages, models = {stage for stage, _ in found}, {model for _, model in found}
    if not stages <= set(STAGES) or len(models) != 1 or "" in models:
        raise ConfigurationError(
            f"--worker {queues}: give queues of one further model, prefill.NAME or decode.NAME or "
            "prefill.NAME,decode.NAME; the default model's workers are --prefill, --decode, --both"
        )
    model = models.pop()
    ranks = ranks_per_worker(settings.of_model(model).engine_args)
    return WantedWorker(role_of(stages), model, ranks)


@dataclass(frozen=True)
class Plan:
    """Where all workers go, and what is wrong with it."""

    workers: tuple[Placement, ...]
    warning: str | None = None


def place_workers(
    prefill: int,
    decode: int,
    both: int = 0,
    *,
    device: str,
    engine_args: Mapping[str, object],
    further: Sequence[WantedWorker] = (),
) -> Plan:
    """Place the workers on what this host has.

    Args:
        both: workers that serve both stages.
        further: those of other models, which get theirs last.

    Raises ConfigurationError when a stage would be without a worker or GPUs are too few.
    """
    if not both and (prefill < 1 or decode < 1):
        raise ConfigurationError(
            "at least one prefill and one decode worker are needed, or one for both (--both)"
        )
    ranks = ranks_per_worker(engine_args)
    if device == "cuda":
        gpus = usable_gpus()
        return place_on_gpus(
            prefill, decode, both, gpus=gpus, gpus_per_worker=ranks, further=further
        )
    cores = usable_cores()
    return place_on_cores(
        prefill, decode, both, cores=cores, ranks_per_worker=ranks, further=further
    )


def place_on_cores(
    prefill: int,
    decode: int,
    both: int = 0,
    *,
    cores: Sequence[int],
    ranks_per_worker: int = 1,
    further: Sequence[WantedWorker] = (),
) -> Plan:
    """Share `cores` out. With more engines than cores some share one, which the plan warns of."""
    workers = _workers((prefill, decode, both), ranks_per_worker, further)
    ranks = sum(worker.ranks for worker, _ in workers)
    share = max(1, len(cores) // max(1, ranks))
    placed = []
    begin = 0
    for worker, number in workers:
        parts = [
            [cores[(rank * share + i) % len(cores)] for i in range(share)]
            for rank in range(begin, begin + worker.ranks)
        ]
        begin += worker.ranks
        own = [core for part in parts for core in part]
        placed.append(
            Placement(
                worker.role,
                number,
                f"{'core' if len(own) == 1 else 'cores'} {_list(own)}",
                # One list for each rank, as vLLM reads it.
                {"VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, p)) for p in parts)},
                worker.model,
            )
        )
    warning = None
    if ranks > len(cores):
        warning = f"{ranks} engines share {len(cores)} CPU cores: expect them to slow each other"
    return Plan(tuple(placed), warning)


def place_on_gpus(
    prefill: int,
    decode: int,
    both: int = 0,
    *,
    gpus: Sequence[str],
    gpus_per_worker: int = 1,
    further: Sequence[WantedWorker] = (),
) -> Plan:
    """Give each worker GPUs of its own. Raises ConfigurationError when there are too few."""
    workers = _workers((prefill, decode, both), gpus_per_worker, further)
    needed = sum(worker.ranks for worker, _ in workers)
    if needed > len(gpus):
        each = "" if gpus_per_worker == 1 else f" with {gpus_per_worker} GPUs each"
        more = f" and {both} for both" if both else ""
        more += f" and {len(further)} of other models" if further else ""
        raise ConfigurationError(
            f"{prefill} prefill and {decode} decode workers{more}{each} need {needed} GPUs, "
            f"but {len(gpus)} can be used here: start fewer workers (--prefill, --decode, --both)"
        )
    placed = []
    left = iter(gpus)
    for worker, number in workers:
        own = list(islice(left, worker.ranks))
        env = {"CUDA_VISIBLE_DEVICES": ",".join(own)}
        placed.append(Placement(worker.role, number, f"GPU {_list(own)}", env, worker.model))
    return Plan(tuple(placed))


def usable_cores() -> list[int]:
    """CPU cores that this process may use, one for each physical core first."""
    allowed = sorted(os.sched_getaffinity(0))
    first: dict[str, int] = {}
    for core in allowed:
        first.setdefault(_siblings(core), core)
    return [*first.values(), *(core for core in allowed if core not in first.values())]


def usable_gpus() -> list[str]:
    """GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip() not in ("", "-1")]
    return [str(index) for index in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def ranks_per_worker(engine_args: Mapping[str, object]) -> int:
    """Devices that one engine spreads over, by vLLM's own arguments."""
    ranks = 1
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        ranks *= int(str(engine_args.get(name) or 1))
    return ranks


def _workers(
    counts: Sequence[int], ranks: int, further: Sequence[WantedWorker]
) -> list[tuple[WantedWorker, int]]:
    """All of them, each with its number among those of its role and model.

    Args:
        counts: of the default model's, for each role in turn.
        ranks: of one of these.
    """
    wanted = [
        WantedWorker(role, "", ranks)
        for role, count in zip(ROLES, counts, strict=True)
        for _ in range(count)
    ]
    numbers: Counter[tuple[str, str]] = Counter()
    found = []
    for worker in (*wanted, *further):
        numbers[worker.role, worker.model] += 1
        found.append((worker, numbers[worker.role, worker.model]))
    return found


def _siblings(core: int) -> str:
    topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
    try:
        return (topology / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(core)


def _list(items: Sequence[int] | Sequence[str]) -> str:
    return ", ".join(map(str, items))
