"""A program: asks the stock side, each request under way in a thread of its own.

Celery's backends belong to threads: each has its connection and its subscription to results.
"""

from __future__ import annotations

import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import get_ident
from typing import Any

from celery import chain
from celery.exceptions import TimeoutError as NotTold
from celery.result import AsyncResult

from pdtasks.bench.control.celery_app import decode, prefill
from pdtasks.bench.control.load import ANSWER_TOKENS, Done, Order, check, make_prompts
from pdtasks.bench.control.orders import obey

_MOST_IN_FLIGHT = 1024
_ANSWER_S = 60.0
#: Seconds after which a result is looked for that was not told.
_LOOK_S = 1.0


def _answer(result: AsyncResult) -> Any:
    """What a chain ends with.

    Celery subscribes to the result of a chain's last task when it is waited for: one that is
    there before has been told to nobody.
    """
    deadline = time.monotonic() + _ANSWER_S
    while True:
        try:
            return result.get(timeout=_LOOK_S)
        except NotTold:
            if not result.ready() and time.monotonic() >= deadline:
                raise


def main(path: str, tokens: int) -> None:
    """Obey orders that come through the socket at `path`."""
    prompts = itertools.cycle(make_prompts(tokens))
    numbers = itertools.count()
    # Threads stay, and their connections with them.
    threads = ThreadPoolExecutor(_MOST_IN_FLIGHT)

    def ask_until(began: float, end: float) -> list[tuple[float, float]]:
        found = []
        while (asked := time.monotonic()) < end:
            request = {
                "id": f"{get_ident()}-{next(numbers)}",
                "prompt": next(prompts),
                "max_tokens": ANSWER_TOKENS,
            }
            check(_answer(chain(prefill.s(request), decode.s()).apply_async()))
            now = time.monotonic()
            found.append((now - began, now - asked))
        return found

    def measure(order: Order) -> Done:
        began = time.monotonic()
        asking = [
            threads.submit(ask_until, began, began + order.seconds) for _ in range(order.in_flight)
        ]
        found = [one for client in asking for one in client.result()]
        return Done([at for at, _ in found], [took for _, took in found])

    obey(path, measure)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
