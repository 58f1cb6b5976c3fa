"""`pdtasks` whose reply stream is on the bus that a test wants (PDTASKS_STREAM_PLACE, from 0)."""

from __future__ import annotations

import os

from api import core
from pdtasks.bus.buses import place_of
from pdtasks.bus.reply import new_stream
from pdtasks.cli import main
from pdtasks.settings import load_settings


def drawn_until_there() -> str:
    buses = 1 + len(load_settings().bus_urls)
    while place_of(name := new_stream(), buses) != int(os.environ["PDTASKS_STREAM_PLACE"]):
        pass
    return name


if __name__ == "__main__":
    vars(core)["new_stream"] = drawn_until_there
    main()
