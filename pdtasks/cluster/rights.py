"""Who may do what on broker and bus? A user for each role, with what that role does and no more.

The one source: the private servers get their users from here, and docs/security.md shows the same
as commands for one's own servers (a test compares the two and runs them).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pdtasks import naming
from pdtasks.bus import keys


class User(StrEnum):
    """A role's name on broker and bus."""

    API = "pdtasks-api"
    WORKER = "pdtasks-worker"
    FLOWER = "pdtasks-flower"
    CLIENT = "pdtasks-client"  #: a program that calls `pdtasks.pipeline.submit`
    BALANCER = "pdtasks-balancer"  #: has workers change roles; on the bus alone
    #: What all of them may, and the commands of `pdtasks`: for a host with one user, and for who
    #: joins a stack by hand.
    ALL = "pdtasks"


#: With all rights, for a person.
OPERATOR: Final = "operator"
VHOST: Final = "pdtasks"


# -- RabbitMQ --------------------------------------------------------------------------------------

#: A stage's queues, which are routing keys as well: the default model's, and those of any other.
#: Which models there are is a setting of processes, not of servers.
_OF_ONE_MODEL: Final = rf"(\.{naming.MODEL_NAME})?"
_PREFILL: Final = naming.PREFILL + _OF_ONE_MODEL
_DECODE: Final = naming.DECODE + _OF_ONE_MODEL
_STAGES: Final = (_PREFILL, _DECODE)
_UUID: Final = "[0-9a-f-]{36}"
#: Celery's names.
_CONTROL: Final = r"celery\.pidbox"
_CONTROL_OF_WORKERS: Final = r".+@.+\.celery\.pidbox"
_CONTROL_ANSWERS: Final = r"reply\.celery\.pidbox"
_CONTROL_ANSWERS_OF_ONE: Final = rf"{_UUID}\.reply\.celery\.pidbox"
_EVENTS: Final = "celeryev"
_EVENTS_OF_ONE: Final = rf"celeryev\.{_UUID}"


@dataclass(frozen=True)
class BrokerRights:
    """What one user may do with queues and exchanges of these names (regular expressions).

    RabbitMQ asks for `configure` to declare or delete, `write` to publish to an exchange or to bind
    a queue, `read` to consume from a queue or to bind to an exchange.
    """

    configure: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    publish_keys: tuple[str, ...] = ()  #: routing keys on our exchange
    bind_keys: tuple[str, ...] = ()
    tag: str = ""  #: for the management API

    def permissions(self) -> tuple[str, str, str]:
        """Configure, write and read, as RabbitMQ wants them."""
        return _any_of(self.configure), _any_of(self.write), _any_of(self.read)

    def topic_permissions(self) -> tuple[str, str]:
        """Write and read, for routing keys of our exchange."""
        return _any_of(self.publish_keys), _any_of(self.bind_keys)

    def __or__(self, other: BrokerRights) -> BrokerRights:
        """Both."""

        def both(name: str) -> tuple[str, ...]:
            return tuple(dict.fromkeys((*getattr(self, name), *getattr(other, name))))

        names = ("configure", "write", "read", "publish_keys", "bind_keys")
        return BrokerRights(**{name: both(name) for name in names})  # type: ignore[arg-type]


def _any_of(names: Iterable[str]) -> str:
    return f"^({joined})$" if (joined := "|".join(names)) else "^$"


_EXCHANGE: Final = re.escape(naming.EXCHANGE)
_DEAD: Final = re.escape(naming.DEAD_QUEUE)  # queue and exchange
_KEEP: Final = re.escape(naming.KEEP_EXCHANGE)
_KEPT: Final = re.escape(naming.KEPT_QUEUE)

#: What a caller in Python may: its prompts are tokenised by a prefill worker.
_CLIENT_ON_BROKER: Final = BrokerRights(write=(_EXCHANGE, _CONTROL), publish_keys=(_PREFILL,))
_API_ON_BROKER: Final = BrokerRights(write=(_EXCHANGE, _CONTROL), publish_keys=_STAGES)
_WORKER_ON_BROKER: Final = BrokerRights(
    configure=(
        *(*_STAGES, _EXCHANGE, _DEAD, _KEEP, _KEPT),
        *(_CONTROL, _CONTROL_OF_WORKERS, _CONTROL_ANSWERS, _EVENTS),
    ),
    write=(
        *(*_STAGES, _EXCHANGE, _DEAD, _KEEP, _KEPT),
        *(_CONTROL_OF_WORKERS, _CONTROL_ANSWERS, _EVENTS),
    ),
    # Not what is kept of dead jobs: it only puts them there.
    read=(*_STAGES, _EXCHANGE, _DEAD, _KEEP, _CONTROL, _CONTROL_OF_WORKERS),
    publish_keys=(_DECODE,),
    bind_keys=_STAGES,
)
_FLOWER_ON_BROKER: Final = BrokerRights(
    configure=(_EVENTS, _EVENTS_OF_ONE, _CONTROL, _CONTROL_ANSWERS, _CONTROL_ANSWERS_OF_ONE),
    write=(_EVENTS_OF_ONE, _CONTROL, _CONTROL_ANSWERS_OF_ONE),
    read=(_EVENTS, _EVENTS_OF_ONE, _CONTROL_ANSWERS, _CONTROL_ANSWERS_OF_ONE),
    tag="management",  # lengths of queues
)
_COMMANDS_ON_BROKER: Final = BrokerRights(configure=(_KEPT,), read=(_KEPT,))
_ALL_ON_BROKER: Final = _API_ON_BROKER | _WORKER_ON_BROKER | _FLOWER_ON_BROKER | _COMMANDS_ON_BROKER

BROKER_RIGHTS: Final[dict[User, BrokerRights]] = {
    User.API: _API_ON_BROKER,
    User.WORKER: _WORKER_ON_BROKER,
    User.FLOWER: _FLOWER_ON_BROKER,
    User.CLIENT: _CLIENT_ON_BROKER,
    User.ALL: BrokerRights(**(vars(_ALL_ON_BROKER) | {"tag": "monitoring"})),
}


def rabbitmqctl_lines() -> list[str]:
    """Commands that make the vhost and all users on a RabbitMQ of one's own.

    `add_user` asks for the password.
    """
    lines = [f"rabbitmqctl add_vhost {VHOST}"]
    for user, rights in BROKER_RIGHTS.items():
        permissions = " ".join(f"'{one}'" for one in rights.permissions())
        topic = " ".join(f"'{one}'" for one in rights.topic_permissions())
        lines += [
            f"rabbitmqctl add_user {user}",
            f"rabbitmqctl set_permissions -p {VHOST} {user} {permissions}",
            f"rabbitmqctl set_topic_permissions -p {VHOST} {user} {naming.EXCHANGE} {topic}",
        ]
        if rights.tag:
            lines.append(f"rabbitmqctl set_user_tags {user} {rights.tag}")
    return lines


# -- the bus ---------------------------------------------------------------------------------------

#: Sent by every client: is it there?  CLIENT SETINFO is not needed, but each refusal would push a
#: telling one out of ACL LOG.
_ANY: Final = "+ping +client|setinfo"
#: Celery's results; a job's is stored by the API.
_RESULTS: Final = "celery-task-meta-*"

# Each in parentheses: these commands on these keys, and none of them on others.
_SEE_WORKERS: Final = f"(%R~{keys.WORKER}* %R~{keys.WORKERS} +zrange +mget)"
#: Compared before it is set: a name is one process's.
_BE_SEEN: Final = (
    f"(~{keys.WORKER}* ~{keys.WORKERS} "
    "+get +pttl +set +del +watch +zadd +zrem +zremrangebyscore +expire) "
    "+unwatch +multi +exec +discard"
)
_TELL_OTHER_APIS: Final = (
    f"(~{keys.API}* ~{keys.APIS} ~{keys.APIS_NEEDS} "
    "+set +mget +del +zadd +zrem +zrange +zcard +zremrangebyscore +expire +hset +hdel +hgetall)"
)
_GIVE_ORDERS: Final = f"(%W~{keys.ORDER}* +set)"
_HEAR_ORDERS: Final = f"(%R~{keys.ORDER}* +get)"
_SEND_REPLIES: Final = f"(%W~{keys.REPLY}* +xadd)"
_READ_REPLIES: Final = f"(~{keys.REPLY}* +xgroup|create +expire +xread +xdel +del)"
_ASK_PROGRESS: Final = f"(~{keys.PROGRESS}* +blpop)"
_TELL_PROGRESS: Final = f"(%W~{keys.PROGRESS}* +rpush +expire)"
#: From TIME on: what the scripts do (`pdtasks/bus/lua`).
_RUN_JOBS: Final = (
    f"(~{keys.JOB}* ~{keys.JOBS} ~{keys.JOBS}:* "
    "+evalsha +script|load +hgetall +hmget +zrevrank +zrevrange +zrem +xread "
    "+time +info +exists +get +set +ttl +pttl +expire +pexpire +hget +hset +hexists +hincrby "
    "+zadd +zcard +zrange +zpopmin +xadd)"
)
#: The same of batches and their files.
_RUN_BATCHES: Final = (
    f"(~{keys.FILE}* ~{keys.FILES} ~{keys.BATCH}* ~{keys.BATCHES} ~{keys.BATCHES}:* "
    f"%R~{keys.JOBS_WAITING} "
    "+evalsha +script|load +hgetall +zrank +zrevrank +zrange +zrevrange +zrem +get +getrange "
    "+unlink +info "
    "+time +exists +set +append +strlen +del +ttl +pttl +expire +pexpire +hget +hmget +hset +hdel "
    "+hkeys +hincrby +zadd +zcard +rpush +lpop +llen)"
)
_STORE_RESULTS: Final = f"(~{_RESULTS} &{_RESULTS} +get +setex +publish) +multi +exec +discard"
_READ_RESULTS: Final = f"(~{_RESULTS} &{_RESULTS} +get +mget +del +subscribe +unsubscribe)"
_COUNT_USAGE: Final = f"(~{keys.USAGE}* +hincrby +hget +expire)"
_PROBE: Final = f"(%W~{keys.PROBE} +set)"
_BALANCE: Final = f"(~{keys.BALANCER}* +get +set +pexpire +del)"

_API_ON_BUS: Final = (
    *(_SEE_WORKERS, _READ_REPLIES, _TELL_PROGRESS, _RUN_JOBS, _RUN_BATCHES, _COUNT_USAGE),
    *(_STORE_RESULTS, _GIVE_ORDERS, _TELL_OTHER_APIS),
)
_WORKER_ON_BUS: Final = (
    *(_BE_SEEN, _SEE_WORKERS, _SEND_REPLIES, _ASK_PROGRESS, _STORE_RESULTS, _HEAR_ORDERS),
)
_CLIENT_ON_BUS: Final = (_READ_RESULTS,)
_BALANCER_ON_BUS: Final = (_SEE_WORKERS, _GIVE_ORDERS, _BALANCE)
_COMMANDS_ON_BUS: Final = (_SEE_WORKERS, _PROBE, _BALANCE)

#: Flower has no user here: results, which it would show, hold answers.
BUS_RIGHTS: Final[dict[User, str]] = {
    user: " ".join(("resetchannels -@all", _ANY, *dict.fromkeys(rights)))
    for user, rights in {
        User.API: _API_ON_BUS,
        User.WORKER: _WORKER_ON_BUS,
        User.CLIENT: _CLIENT_ON_BUS,
        User.BALANCER: _BALANCER_ON_BUS,
        User.ALL: (*_API_ON_BUS, *_WORKER_ON_BUS, *_CLIENT_ON_BUS, *_COMMANDS_ON_BUS),
    }.items()
}
#: Who has anything to do on a further bus: nothing but replies, and questions about them, is there.
#: The same users as on the first, with the same rights.
REPLYING: Final = (User.API, User.WORKER)
#: What `pdtasks.kv.store` does, on the names of `pdtasks.kv.keys`, and figures of the server:
#: workers alone use it.
KV_RIGHTS: Final = f"~pd:kv:* resetchannels -@all +get +set +expire +unlink +del +info {_ANY}"
ALL_RIGHTS: Final = "~* &* +@all"


def acl_lines() -> list[str]:
    """Commands that make all users of the bus on a Valkey of one's own."""
    return [f"ACL SETUSER {u} reset on #<sha256> {rights}" for u, rights in BUS_RIGHTS.items()]
