"""What are queues and tasks called? Names that several processes must agree on."""

from __future__ import annotations

from collections.abc import Iterable

PREFILL = "prefill"
DECODE = "decode"
#: Stages of a request, and the queues of their jobs: of the model that is served where nobody names
#: another.
STAGES = (PREFILL, DECODE)
#: What a model may be called that has queues of its own (`queue_of`): it stands in queue names,
#: routing keys, names of workers and `-Q`, none of which it can mean anything to.
MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
#: A worker's role where it serves both.
BOTH = "both"
#: Roles of workers: which stages they serve.
ROLES = (*STAGES, BOTH)

EXCHANGE = "pdtasks"
DEAD_EXCHANGE = "pdtasks.dead"
#: Jobs whose every delivery ended with the worker's death.
DEAD_QUEUE = "pdtasks.dead"
#: The same after their callers were answered: for operators (`pdtasks deadletter`).
KEPT_QUEUE = "pdtasks.deadletters"
#: The way there, and to no other queue.
KEEP_EXCHANGE = "pdtasks.keep"

#: Control command: drop the requests whose ids it names.
ABORT = "pdtasks_abort"
#: The model that comes along, where nobody names another.
EMBEDDED_MODEL = "SmolLM2-135M-Instruct"

PREFILL_TASK = "pdtasks.prefill"
DECODE_TASK = "pdtasks.decode"

_PREFILL_SUFFIX = ".prefill"


def queue_of(stage: str, model: str = "") -> str:
    """The queue of jobs of `stage` for `model`; empty: for the one that needs no name."""
    return f"{stage}.{model}" if model else stage


def stage_and_model(queue: str) -> tuple[str, str]:
    """What `queue_of` has made a queue's name of."""
    stage, _, model = queue.partition(".")
    return stage, model


def stages_of(role: str) -> tuple[str, ...]:
    """The stages that a worker of this role serves."""
    return STAGES if role == BOTH else (role,)


def role_of(stages: Iterable[str]) -> str:
    """The role of a worker that serves these."""
    found = set(stages)
    return BOTH if found == set(STAGES) else found.pop()


def stage_of(task: str) -> str:
    """The stage that a task of this name is."""
    return task.removeprefix("pdtasks.")


def prefill_task_id(request_id: str) -> str:
    """Celery's id of the first stage; the second stage's is the request id itself."""
    return request_id + _PREFILL_SUFFIX


def request_id_of(task_id: str) -> str:
    """The request that `task_id` works for."""
    return task_id.removesuffix(_PREFILL_SUFFIX)
