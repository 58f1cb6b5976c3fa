"""What were the GPUs doing meanwhile? `nvidia-smi` says so once a second."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterator

from pdtasks.cluster.placement import usable_cores, usable_gpus

_QUERY = ("--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits", "-l", "1")


def count_devices(device: str) -> int:
    """GPUs or CPU cores that this process may use."""
    return len(usable_gpus()) if device == "cuda" else len(usable_cores())


def describe(device: str) -> str:
    """The machine in words, as "2 x NVIDIA H200, 32 cores"."""
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    smi = shutil.which("nvidia-smi") if device == "cuda" else None
    if smi is None:
        return cores
    done = subprocess.run(
        [smi, "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    names = done.stdout.strip().splitlines()
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return f"{kinds}, {cores}"


@contextlib.contextmanager
def watched_gpus() -> Iterator[dict[str, float]]:
    """The mean utilisation of each GPU in percent, there on leaving; empty without nvidia-smi."""
    means: dict[str, float] = {}
    smi = shutil.which("nvidia-smi")
    if smi is None:
        yield means
        return
    said = subprocess.Popen([smi, *_QUERY], stdout=subprocess.PIPE, text=True)
    found: dict[str, list[float]] = defaultdict(list)

    def read() -> None:
        assert said.stdout is not None
        for line in said.stdout:
            index, _, percent = line.partition(",")
            with contextlib.suppress(ValueError):  # "[N/A]"
                found[index.strip()].append(float(percent))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield means
    finally:
        said.kill()
        said.wait()
        reader.join(timeout=5)
        means.update({gpu: round(statistics.fmean(own), 1) for gpu, own in found.items()})
