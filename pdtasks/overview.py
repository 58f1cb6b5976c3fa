"""What is said of the whole stack, whichever API process is asked? For the page and `pdtasks top`.

`GET /pdtasks/overview` answers an `Overview` as JSON.  Neither prompts nor answers are in it; other
keys' requests and jobs only for an admin's key.
"""

from __future__ import annotations

import msgspec

from pdtasks.messages import StageReport, StoreFigures


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all that is shown."""


class Api(Part, frozen=True, kw_only=True):
    """An API process."""

    host: str
    pid: int
    since: float  #: UNIX seconds of its start
    version: str
    model: str


class Viewer(Part, frozen=True, kw_only=True):
    """Who looks."""

    key: str = ""  #: the API key's name; empty where none is asked for
    sees_all: bool = False  #: requests and jobs of all keys
    may_act: bool = False  #: drain workers


class WorkerView(Part, frozen=True, kw_only=True):
    """A worker, as its last sign of life has it."""

    name: str
    role: str
    host: str
    pid: int
    device: str
    model: str
    state: str
    reason: str
    active: int  #: requests in its engine
    slots: int  #: requests that it takes at once
    kv_usage: float  #: share of the engine's KV blocks that requests hold, 0 to 1
    since: float  #: UNIX seconds of its start


class QueueView(Part, frozen=True, kw_only=True):
    """A queue of RabbitMQ's."""

    name: str
    ready: int | None = None  #: messages that no worker has taken; None: RabbitMQ does not say
    consumers: int | None = None
    #: Seconds that the API processes' oldest request waits for this stage's first token. What
    #: `submit` has published they do not know.
    oldest_s: float | None = None


class InFlight(Part, frozen=True, kw_only=True):
    """How many requests are where, of all API processes."""

    in_line: int = 0  #: not published yet: it is not their turn
    prefill: int = 0  #: published to prefill, without a token
    handover: int = 0  #: with one token: on their way to decode
    decode: int = 0  #: with more, or all theirs


class Quantiles(Part, frozen=True, kw_only=True):
    """Of some durations, in seconds; within 5 %."""

    count: int = 0
    p50_s: float | None = None  #: None: there were none
    p95_s: float | None = None
    p99_s: float | None = None


class KvFlow(Part, frozen=True, kw_only=True):
    """What stages did with KV, of requests that reported meanwhile."""

    bytes_written: int = 0
    bytes_loaded: int = 0
    blocks_loaded: int = 0  #: handed over, from a ring or the store
    blocks_recomputed: int = 0  #: to be loaded, but lost, damaged or foreign
    prefix_blocks_loaded: int = 0  #: of prefixes that earlier prompts left in the store
    prompt_tokens: int = 0
    cached_tokens: int = 0  #: of them, found in an engine's own prefix cache


class Slot(Part, frozen=True, kw_only=True):
    """A few seconds."""

    at: float  #: UNIX seconds of its beginning
    requests: int = 0  #: that ended
    tokens: int = 0
    ttft_p50_s: float | None = None
    gap_p50_s: float | None = None
    itl_p50_s: float | None = None
    kv_bytes: int = 0  #: written and loaded


class Window(Part, frozen=True, kw_only=True):
    """The last minutes, of all API processes."""

    seconds: float  #: less while it is young
    slot_s: float
    requests: int  #: that ended with their answer
    failed: int
    tokens: int
    tokens_per_s: float
    ttft: Quantiles  #: from the request to its first token
    gap: Quantiles  #: from the first token to the second
    itl: Quantiles  #: between later ones
    end_to_end: Quantiles
    kv: KvFlow
    slots: tuple[Slot, ...]


class Way(Part, frozen=True, kw_only=True):
    """Where an answer's time went, in seconds; one after the other."""

    queue_s: float = 0.0  #: in line and in the queue, as far as prefill has said
    prefill_s: float = 0.0  #: to the first token
    handover_s: float = 0.0  #: to the second
    decode_s: float = 0.0


class RequestView(Part, frozen=True, kw_only=True):
    """One answer, under way or ended lately. Without its text."""

    id: str  #: as the caller knows it; several answers to one request share it
    key: str  #: who asked; empty without keys
    #: ``"line"``, ``"prefill"``, ``"handover"``, ``"decode"``, ``"done"``, ``"stopped"`` (a stop
    #: string, or its caller hung up), or the code of an error
    state: str
    #: ``"split"``: prefill, then decode.  Else a decode worker does all of it, and this is why:
    #: ``"short_prompt"``, ``"no_prefill_worker"``, ``"prefill_busy"``.  Empty: not decided yet.
    route: str = ""
    submitted_at: float  #: UNIX seconds
    prompt_tokens: int
    output_tokens: int
    #: Seconds from its beginning to its first and second token, and to its end or now.
    first_s: float | None = None
    second_s: float | None = None
    seconds: float
    way: Way
    stages: tuple[StageReport, ...] = ()


class JobView(Part, frozen=True, kw_only=True):
    """One job of `/v1/jobs`, without its body and result."""

    id: str
    key: str
    state: str
    created_at: float
    finished_at: float | None = None
    first_token_at: float | None = None
    attempts: int = 0
    stages: tuple[tuple[str, str, float], ...] = ()  #: stage, worker, when it began


class Jobs(Part, frozen=True, kw_only=True):
    """Of all API processes."""

    waiting: int = 0
    running: int = 0
    recent: tuple[JobView, ...] = ()


class Overview(Part, frozen=True, kw_only=True):
    """Everything."""

    at: float  #: UNIX seconds
    api: Api  #: the process that says all this
    #: The others that share its bus: what they say of themselves is some seconds old. Of their
    #: requests only the newest are there.
    others: tuple[Api, ...] = ()
    viewer: Viewer
    workers: tuple[WorkerView, ...]
    queues: tuple[QueueView, ...]
    in_flight: InFlight
    window: Window
    stores: tuple[StoreFigures, ...] = ()  #: the kv servers
    requests: tuple[RequestView, ...]
    jobs: Jobs
    problems: tuple[str, ...] = ()  #: what could not be asked, and what is not well here


class RequestReport(Part, frozen=True, kw_only=True):
    """`GET /pdtasks/requests/{id}`."""

    id: str
    #: What each stage did, one entry for each answer.
    sequences: tuple[dict[str, StageReport], ...]
    #: When, as this process saw it, in the same order.
    times: tuple[RequestView, ...] = ()
