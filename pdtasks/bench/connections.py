"""How many connections were opened at RabbitMQ, by its own count?

Its management API knows the number of all that were opened since the node's start, those that are
closed again as well.  The count runs behind: RabbitMQ gathers it every few seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import httpx

from pdtasks.errors import BrokerUnavailable

#: Seconds between two updates of RabbitMQ's statistics (`collect_statistics_interval`).
UPDATE_S = 5.0
#: Seconds without a change after which the count holds: in one update it would have come.
_STEADY_S = UPDATE_S + 1.5
_LOOK_S = 0.5


def count_connections(
    api_url: str,
    *,
    timeout_s: float = 30.0,
    transport: httpx.BaseTransport | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Connections opened since RabbitMQ's start, everything included that has happened until now.

    Waits for the count to catch up: until it has stood still for longer than an update takes.
    Somebody who connects all the time is not waited for longer than `timeout_s`.

    Args:
        api_url: of the management API, with the password in it; ends with a slash.

    Raises BrokerUnavailable when the API does not answer, or knows no count.
    """
    # httpx logs each URL.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    until = clock() + timeout_s
    with httpx.Client(base_url=api_url, timeout=10, transport=transport, trust_env=False) as api:
        found = _read(api)
        changed = clock()
        while (now := clock()) < min(until, changed + _STEADY_S):
            sleep(min(_LOOK_S, until - now))
            latest = _read(api)
            if latest != found:
                found, changed = latest, clock()
    if found is None:
        raise BrokerUnavailable("RabbitMQ's management API knows no count of connections")
    return found


def _read(api: httpx.Client) -> int | None:
    """None: nothing has been counted yet."""
    try:
        answer = api.get("overview")
        answer.raise_for_status()
        overview: dict[str, Any] = answer.json()
        found: int | None = overview.get("churn_rates", {}).get("connection_created")
    except httpx.HTTPStatusError as exc:
        raise BrokerUnavailable(
            f"RabbitMQ's management API answers {exc.response.status_code}: "
            "look at PDTASKS_BROKER_API_URL"
        ) from None  # the error's text has the URL, password and all
    except (httpx.HTTPError, ValueError, AttributeError) as exc:
        raise BrokerUnavailable(
            f"RabbitMQ's management API does not answer ({type(exc).__name__}): "
            "look at PDTASKS_BROKER_API_URL"
        ) from None
    return found
