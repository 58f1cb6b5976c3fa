"""The other side: a stock Celery app whose two tasks return at once.

Stock are the app, the workers (`celery worker -P threads`, no other option but names, queues and
the number of threads), the client and all settings, serialisers (JSON) and classic queues among
them, but for these:

* `task_acks_late`, and `task_ignore_result=False` (its default): as here, a job is done when it is
  acknowledged, and there is a result;
* a queue for each task, so that each process does one stage;
* the result backend is Celery's Redis backend on the bus, and the broker's vhost is its own.

So it has less to do than ours in what is not asked for: no confirms, no quorum queues, no events,
no log of each task.  The second stage gets what ours gets, the prompt and the first token.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

PREFILL, DECODE = "stock.prefill", "stock.decode"
#: Variables with the URLs.
BROKER_URL, RESULT_URL = "STOCK_BROKER_URL", "STOCK_RESULT_URL"

app = Celery("stock", broker=os.environ.get(BROKER_URL), backend=os.environ.get(RESULT_URL))
app.conf.update(
    task_acks_late=True,
    task_ignore_result=False,
    task_routes={PREFILL: {"queue": PREFILL}, DECODE: {"queue": DECODE}},
)


@app.task(name=PREFILL)
def prefill(request: dict[str, Any]) -> dict[str, Any]:
    """Stage 1: the first token, and all that stage 2 needs."""
    return {**request, "tokens": [request["prompt"][0]]}


@app.task(name=DECODE)
def decode(request: dict[str, Any]) -> list[int]:
    """Stage 2: the answer."""
    return [*request["tokens"], request["prompt"][1]]
