"""What crosses a process boundary, as MessagePack.

Every message carries `WIRE_VERSION`; a reader refuses another one, so that two releases never
misread each other.  vLLM's own structures travel inside as bytes made by vLLM's encoder: they
are positional, hence `engine` names the vLLM version that made them.

History of WIRE_VERSION: 1 - first.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from pdtasks.errors import IncompatibleWorker, PdtasksError, from_code
from pdtasks.naming import ROLES, STAGES, stages_of

WIRE_VERSION = 1

# Whatever is wrong with a message is found here, where it is read.  A NaN would upset an event
# loop's timers, a negative count Prometheus, a line break in a name the log.
Number = Annotated[float, Meta(gt=-(2**53), lt=2**53)]
UnixTime = Annotated[float, Meta(ge=0, lt=2**53)]  #: seconds
Count = Annotated[int, Meta(ge=0, lt=2**53)]
#: Of a worker, a request, a version: it goes into logs.
_NAME = r"\A[^\x00-\x1f\x7f]*\Z"
Name = Annotated[str, Meta(max_length=255, pattern=_NAME)]
Stage = Annotated[str, Meta(pattern=rf"\A({'|'.join(STAGES)})\Z")]
Role = Annotated[str, Meta(pattern=rf"\A({'|'.join(ROLES)})\Z")]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all that is sent."""

    version: int = WIRE_VERSION

    def to_wire(self) -> bytes:
        """Encode as MessagePack."""
        return msgspec.msgpack.encode(self)


class TextRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that the prefill worker has still to tokenise; exactly one of the three is set."""

    prompt: str | None = None
    prompt_token_ids: tuple[Count, ...] | None = None
    messages: tuple[dict[str, Any], ...] | None = None  #: chat, rendered with the model's template
    sampling: dict[str, Any] = {}  #: fields of vLLM's SamplingParams
    cache_salt: str | None = None


class StageReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one stage did for one request. Never contains text or tokens."""

    stage: Stage
    worker: Name  #: name of the Celery worker
    queue_s: Number  #: seconds in the queue before the stage (hosts' clocks compared)
    seconds: Number  #: from taking the job to its last output
    prompt_tokens: Count
    output_tokens: Count  #: made by this stage
    cached_tokens: Count = 0  #: prompt tokens found in the engine's own prefix cache
    kv_blocks_written: Count = 0  #: in the store afterwards, whether sent now or there before
    kv_bytes_written: Count = 0  #: sent now
    #: Decode: of the hand-over. Prefill: of a prefix that earlier prompts left in the store.
    kv_blocks_loaded: Count = 0
    kv_bytes_loaded: Count = 0
    kv_blocks_recomputed: Count = 0  #: to be loaded, but lost, damaged or foreign
    kv_seconds: Number = 0.0  #: the hand-over's part, overlapping with compute
    is_whole: bool = False  #: it was all there was: one worker computed prompt and answer


class Sibling(msgspec.Struct, frozen=True, kw_only=True):
    """A further answer to the prompt of a `PrefillJob`, with all its parameters but these."""

    request_id: Name
    seed: int | None


class PrefillJob(Message, frozen=True, kw_only=True):
    """A request on its way to stage 1: from the API as `request`, or as `text`."""

    request_id: Name
    engine: Name  #: version of vLLM that made `request`
    model: str | None  #: served name of the model that is asked; None: whichever the workers have
    request: bytes | None = None  #: vLLM's EngineCoreRequest
    text: TextRequest | None = None
    submitted_at: UnixTime  #: UNIX seconds
    deadline: UnixTime  #: UNIX seconds
    tells_start: bool = False  #: the asker wants to know who begins a stage, and when
    siblings: tuple[Sibling, ...] = ()

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Its own, and its siblings'."""
        return (self.request_id, *(sibling.request_id for sibling in self.siblings))


class DecodeJob(Message, frozen=True, kw_only=True):
    """A request on its way to stage 2, with the tokens so far and the place of its KV.

    Or on its only way: a worker of stage 2 computes prompt and answer (`is_whole`).
    """

    request_id: Name
    engine: Name
    model: str | None
    request: bytes  #: vLLM's EngineCoreRequest as the client meant it
    output_token_ids: tuple[Count, ...]
    handle: dict[str, Any] | None  #: `pdtasks.kv.handle.KVHandle`; None: recompute
    prefill: StageReport | None  #: None: there was no stage before
    detokenise: bool  #: the caller wants text in the result
    submitted_at: UnixTime
    prefilled_at: UnixTime
    first_token_at: UnixTime
    deadline: UnixTime
    tells_start: bool = False
    handed_on: Count = 0  #: times that a worker of this stage has begun it and left it to another

    @property
    def is_whole(self) -> bool:
        """Is it computed from its prompt on?"""
        return self.prefill is None

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Its own."""
        return (self.request_id,)


class _Asked(msgspec.Struct, frozen=True):
    request_id: Name
    siblings: tuple[Sibling, ...] = ()


def asked_in(wire: Any) -> tuple[str, ...]:
    """The requests of a job of either stage; none in what is no job."""
    try:
        job = msgspec.msgpack.decode(wire, type=_Asked)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError):
        return ()
    return (job.request_id, *(sibling.request_id for sibling in job.siblings))


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request ended without an answer."""

    code: Name
    message: str
    attempt: int = 0  #: see `PdtasksError`

    @classmethod
    def of(cls, error: PdtasksError) -> Failure:
        """Make `error` fit for another process."""
        return cls(code=error.code, message=str(error), attempt=error.attempt)

    def to_error(self) -> PdtasksError:
        """The error again."""
        return from_code(self.code, self.message)


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A worker runs a request again: how much of the answer is there (`pdtasks.bus.progress`)?"""

    attempt: int
    handed_on: Count = 0  #: see `DecodeJob`


class StepReply(Message, frozen=True, kw_only=True):
    """All that one engine step has for one reply stream."""

    worker: Name
    stage: Stage
    engine: Name
    outputs: bytes = b""  #: vLLM's EngineCoreOutputs, request ids as the asker knows them
    positions: tuple[Count, ...] = ()  #: index of each output's first token in its answer
    attempts: tuple[int, ...] = ()  #: which attempt at its request made each output
    reports: dict[str, tuple[StageReport, ...]] = {}  #: requests that are finished now
    failures: dict[str, Failure] = {}  #: requests that have failed
    started: tuple[str, ...] = ()  #: requests that this worker begins
    asks: dict[str, Ask] = {}  #: requests that this worker runs again


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The finished answer, as it lies in Celery's result backend (see `pipeline.submit`)."""

    request_id: str
    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: str  #: ``"stop"`` or ``"length"``
    stop_reason: int | str | None
    prompt_tokens: int
    stages: tuple[StageReport, ...]
    time_to_first_token_s: float  #: from submission


class StoreFigures(msgspec.Struct, frozen=True, kw_only=True):
    """How full a kv server is, and what came of it since its start."""

    used_bytes: Count
    max_bytes: Count  #: 0: without a limit
    hits: Count  #: values that were asked for and there
    misses: Count
    evicted: Count  #: values that it gave up for want of memory
    server: Count = 0  #: its place in `kv_urls`


class EngineTotals(msgspec.Struct, frozen=True, kw_only=True):
    """Prompt tokens that an engine has looked up since its start, and found."""

    prefix_queries: Count = 0  #: in its own prefix cache
    prefix_hits: Count = 0
    kv_store_queries: Count = 0  #: in the KV store or another engine's ring
    kv_store_hits: Count = 0
    kv_store_hits_by_source: dict[str, Count] = {}  #: vLLM's names of tiers


#: States of a worker; one that is stalled lives, but takes no jobs, nor does one that is changing
#: its role and has still to end what it has begun.
WORKER_STATES: Final = ("starting", "ready", "changing", "stalled", "draining", "stopped")


class WorkerStatus(Message, frozen=True, kw_only=True):
    """What a worker says of itself on the bus."""

    name: Name
    role: Role
    host: Name
    pid: Count
    state: str  #: one of `WORKER_STATES`
    reason: str = ""  #: why it is not ready, or what is wrong although it is; for people
    active: Count = 0  #: requests in its engine
    held: Count = 0  #: requests that it keeps anything of; 0 when it is idle, or something leaks
    slots: Count = 0  #: requests that it takes at once
    kv_usage: Number = 0.0  #: share of the engine's KV blocks that requests hold, 0 to 1
    model: str = ""
    max_model_len: Count = 0
    step_tokens: Count = 0  #: most that its engine computes at once
    #: Tokens of prompts that it computes at best where it answers them; 0: it computes none there.
    short_prompt_tokens: Count = 0
    engine: str = ""
    since: float = 0.0  #: UNIX seconds of the process's start
    device: Name = ""  #: what its engine computes on, for people: "cpu", "cuda:0,1"
    stores: tuple[StoreFigures, ...] = ()  #: those of the kv servers that answered it lately
    place: str = ""  #: whose pid `pid` is (`pdtasks.running_stack.place`)
    pid_started: int = 0  #: clock ticks; with it a pid names one process for ever
    metrics: Name = ""  #: where it serves them, `host:port`; empty: nowhere
    kv_blocks: Count = 0  #: that its engine has
    kv_block_size: Count = 0  #: tokens
    totals: EngineTotals = EngineTotals()

    def serves(self, stage: str) -> bool:
        """Does it take jobs of this stage, when it is ready?"""
        return stage in stages_of(self.role)

    @property
    def process(self) -> tuple[str, str, int, int]:
        """The one process that says so, whatever its name."""
        return self.host, self.place, self.pid, self.pid_started


class DrainOrder(Message, frozen=True, kw_only=True):
    """A worker is to take nothing more, and to end."""

    process: tuple[str, str, int, int]  #: `WorkerStatus.process`


class RoleOrder(Message, frozen=True, kw_only=True):
    """A worker is to serve other stages."""

    process: tuple[str, str, int, int]  #: `WorkerStatus.process`
    role: Role
    number: Count = 0  #: of the lease that was held for it (`pdtasks.bus.lease`); 0: none


M = TypeVar("M", bound=Message)


def is_name(text: str) -> bool:
    """Could a worker, or a request, be called so?"""
    return len(text) <= 255 and re.match(_NAME, text) is not None


def read_message(kind: type[M], wire: bytes) -> M:
    """Decode `wire`. Raises IncompatibleWorker when another release wrote it, or nobody of ours."""
    try:
        message = msgspec.msgpack.decode(wire, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        # Without its cause: Celery logs it, and what cannot be read may have been a prompt.
        raise IncompatibleWorker(f"unreadable {kind.__name__}: {type(exc).__name__}") from None
    if message.version != WIRE_VERSION:
        raise IncompatibleWorker(
            f"{kind.__name__} has wire version {message.version}, this release reads "
            f"{WIRE_VERSION}: run the same release of pdtasks everywhere"
        )
    return message
