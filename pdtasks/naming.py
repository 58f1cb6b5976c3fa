"""What are queues and tasks called? Names that several processes must agree on."""

from __future__ import annotations

PREFILL = "prefill"
DECODE = "decode"
#: Roles of workers, and their queues.
STAGES = (PREFILL, DECODE)

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


def prefill_task_id(request_id: str) -> str:
    """Celery's id of the first stage; the second stage's is the request id itself."""
    return request_id + _PREFILL_SUFFIX


def request_id_of(task_id: str) -> str:
    """The request that `task_id` works for."""
    return task_id.removesuffix(_PREFILL_SUFFIX)
