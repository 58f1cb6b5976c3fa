"""What changes as a whole in the bus's server, or not at all: `lua/`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import valkey.asyncio

_FOLDER: Final = Path(__file__).with_name("lua")
#: Part of the bus's memory that may be full when something comes in: the rest is for tokens.
MOST_MEMORY: Final = 0.75


def script(bus: valkey.asyncio.Valkey, *names: str) -> Any:
    """The files of these names one behind the other, as something to call."""
    return bus.register_script(
        "".join((_FOLDER / f"{name}.lua").read_text() for name in ("common", *names))
    )


def flat(fields: Mapping[str, Any]) -> list[str]:
    """Names and values in turn; what is no text is JSON."""
    found = []
    for name, value in fields.items():
        found += [name, value if isinstance(value, str) else json.dumps(value)]
    return found
