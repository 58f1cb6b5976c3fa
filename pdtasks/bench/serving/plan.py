"""What can be started, and what is asked of it? A YAML file says so, and this reads it.

::

    engine: {max_model_len: 8192}            # vLLM's arguments, of every engine
    topologies:
      pair: {kind: engines, devices: [[0], [1]]}
      pdtasks 1P1D: {kind: pdtasks, prefill: 1, devices: [[0], [1]]}
    workloads:
      5000/250: {prompt: 5000, answer: 250, rates: [2, 4, 6], seconds: 20}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from pdtasks.errors import ConfigurationError


class Topology(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Engines and what stands in front of them."""

    kind: Literal["engines", "nixl", "pdtasks"]  #: `engines`: nothing is handed over
    devices: list[list[int]]  #: GPUs (on a CPU: cores) of each engine
    prefill: int = 0  #: the first so many engines compute prompts; the others decode
    both: int = 0  #: of pdtasks: the last so many engines do both
    engine: dict[str, Any] = {}  #: vLLM's arguments beside those of the plan
    env: dict[str, str] = {}

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be started."""
        if not self.devices or not all(self.devices):
            raise ValueError("`devices` needs a list of devices for each engine")
        if self.kind == "engines" and self.prefill:
            raise ValueError("`prefill` is for engines that hand over")
        if self.both and self.kind != "pdtasks":
            raise ValueError("`both` is for engines of pdtasks")
        if self.decode < 0 or (
            self.kind != "engines" and not self.both and not (self.prefill and self.decode)
        ):
            raise ValueError("`prefill` needs to leave at least one engine for each stage")

    @property
    def decode(self) -> int:
        """Engines that decode what others have computed."""
        return len(self.devices) - self.prefill - self.both

    @property
    def num_devices(self) -> int:
        """How many devices there must be."""
        return 1 + max(device for own in self.devices for device in own)


class Short(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Some of the prompts are shorter."""

    every: int  #: each so manieth
    prompt: int  #: tokens


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests that come at random times, each with a random prompt of its own."""

    prompt: int  #: tokens
    answer: int  #: tokens
    rates: list[float]  #: requests/s, a run for each; Poisson. 0: all at once
    requests: int = 0  #: of one run
    seconds: float = 0  #: or as many as come in so long
    shared_prefix: int = 0  #: tokens that all prompts begin with, beside `prompt`
    short: Short | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be asked."""
        if min(self.prompt, self.answer, *self.rates, len(self.rates) - 1, 1) < 0:
            raise ValueError("`prompt`, `answer` and `rates` are positive")
        if (self.requests > 0) == (self.seconds > 0):
            raise ValueError("either `requests` or `seconds` says how long it takes")
        if self.seconds and 0 in self.rates:
            raise ValueError("all at once needs `requests`")

    def num_requests(self, rate: float) -> int:
        """Of one run."""
        return self.requests or max(1, round(self.seconds * rate))

    def expected_s(self, rate: float) -> float:
        """Seconds in which the requests of one run come."""
        return self.num_requests(rate) / rate if rate else 0.0


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole file."""

    topologies: dict[str, Topology]
    workloads: dict[str, Workload]
    engine: dict[str, Any] = {}

    def engine_of(self, topology: Topology) -> dict[str, Any]:
        """vLLM's arguments for each of its engines, by their Python names."""
        return self.engine | topology.engine


def read_plan(file: Path) -> Plan:
    """Read a plan. Raises ConfigurationError that says what is wrong with it, and where."""
    try:
        return msgspec.yaml.decode(file.read_bytes(), type=Plan)
    except OSError as exc:
        raise ConfigurationError(f"the plan {file} cannot be read: {exc.strerror}") from exc
    except ImportError as exc:
        raise ConfigurationError("plans need PyYAML: pip install 'pdtasks[bench]'") from exc
    except msgspec.MsgspecError as exc:
        raise ConfigurationError(f"the plan {file} cannot be used: {exc}") from exc


def choose(kind: str, there: dict[str, Any], wanted: tuple[str, ...]) -> list[str]:
    """Those `wanted` of the names that are `there`, all without a wish.

    Raises ConfigurationError naming one that is not there.
    """
    for name in wanted:
        if name not in there:
            raise ConfigurationError(
                f"the plan has no {kind} {name!r}, only {', '.join(map(repr, there))}"
            )
    return list(wanted or there)
