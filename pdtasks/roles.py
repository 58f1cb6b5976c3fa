"""Which worker is meant, and may it take another role? Asked by the API and on the command line."""

from __future__ import annotations

from collections.abc import Sequence

from pdtasks.errors import PdtasksError
from pdtasks.messages import WorkerStatus
from pdtasks.naming import DECODE, PREFILL, stages_of


class UnknownWorker(PdtasksError):
    """No worker is called so, or several are."""


def worker_called(name: str, known: Sequence[WorkerStatus]) -> WorkerStatus:
    """The worker of this name, which may leave out its host where that is not ambiguous.

    Raises UnknownWorker, which names those that there are.
    """
    meant = [w for w in known if w.name == name] or [
        w for w in known if w.name.partition("@")[0] == name
    ]
    if len(meant) == 1:
        return meant[0]
    if meant:
        names = ", ".join(worker.name for worker in meant)
        raise UnknownWorker(f"several workers are called {name!r}: {names}")
    names = ", ".join(worker.name for worker in known) or "none shows a sign of life"
    raise UnknownWorker(f"no worker is called {name!r}: {names}")


def why_not(worker: WorkerStatus, role: str, known: Sequence[WorkerStatus]) -> str:
    """Why `worker` had better not take `role`; empty: nothing speaks against it."""
    if worker.state not in ("ready", "changing"):
        return f"{worker.name} is {worker.state}: it takes another role when it is ready"
    same = (worker.model, worker.engine, "ready")
    others = [w for w in known if (w.model, w.engine, w.state) == same and w.name != worker.name]
    decoding = [w for w in others if w.serves(DECODE)]
    if DECODE not in stages_of(role) and not decoding:
        return f"no other worker that is ready serves {DECODE}: requests would be refused"
    if PREFILL in stages_of(role) or any(other.serves(PREFILL) for other in others):
        return ""
    if all(w.short_prompt_tokens for w in (worker, *decoding)):
        return ""  # decode workers do all of it
    return f"no other worker that is ready serves {PREFILL}, and decode workers compute no prompts"
