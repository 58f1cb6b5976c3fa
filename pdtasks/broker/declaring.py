"""Is there what we send to? Asked once for each connection; declared only when it is not.

Asking needs no right in RabbitMQ, declaring does, and who may declare may delete: the API's user
may not.  Workers declare all that there is when they start.
"""

from __future__ import annotations

from typing import Any

import kombu
from amqp.exceptions import AccessRefused, NotFound

from pdtasks.errors import BrokerUnavailable


def ensure_declared(channel: Any, entity: kombu.Exchange | kombu.Queue) -> None:
    """Return when `entity` is there. `channel` stays usable whatever RabbitMQ says.

    Raises BrokerUnavailable when this user may not declare it, or what kombu raises.
    """
    connection = channel.connection.client
    known: set[Any] = connection.declared_entities
    if entity in known:
        return
    try:
        _ask(connection, entity)
    except NotFound:
        try:
            # (A refusal closes the channel that it came on.)
            entity(connection.channel()).declare()
        except AccessRefused as exc:
            raise BrokerUnavailable(
                f"RabbitMQ has no {entity.name} yet, and this user may not make it: "
                "start a worker, which does"
            ) from exc
    known.add(entity)


def _ask(connection: kombu.Connection, entity: kombu.Exchange | kombu.Queue) -> None:
    with connection.channel() as channel:
        if isinstance(entity, kombu.Queue):
            entity(channel).queue_declare(passive=True)
        else:
            channel.exchange_declare(entity.name, entity.type, passive=True)
