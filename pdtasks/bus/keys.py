"""What is called how on the bus? Every key of ours begins with `pd:`; Celery has its own."""

from __future__ import annotations

from typing import Final

#: Of one worker's sign of life; its name follows.
WORKER: Final = "pd:worker:"
#: The names of workers by the time of their last sign of life.
WORKERS: Final = "pd:workers"
#: Of what one API process tells the others; its name follows.
API: Final = "pd:api:"
#: The names of API processes by the time of their last sign of life.
APIS: Final = "pd:apis"
#: By API process: the part of the workers' places that it could use.
APIS_NEEDS: Final = "pd:apis:needs"
#: Of an order to one worker; its kind and the name follow.
ORDER: Final = "pd:order:"
#: Which balancer of a model is at work, whose name follows; the last one's number follows behind
#: `:number`.
BALANCER: Final = "pd:balancer:of:"
#: Of one asker's reply stream; something unique follows.
REPLY: Final = "pd:reply:"
#: Of the answer to one question about a request; its id and the attempt's number follow.
PROGRESS: Final = "pd:progress:"
#: Of one job's record; its id follows.
JOB: Final = "pd:job:"
#: Behind a record's key: what its caller may read along.
EVENTS: Final = ":events"
#: All jobs by time, those that wait by their turn, those that run by the end of their lease.
JOBS: Final = "pd:jobs"
JOBS_WAITING: Final = "pd:jobs:waiting"
JOBS_RUNNING: Final = "pd:jobs:running"
#: The turn of each owner's next job.
JOBS_TURNS: Final = "pd:jobs:turns"
#: Of one Idempotency-Key; its digest follows.
IDEMPOTENCY: Final = "pd:jobs:key:"
#: Of one file's record, its id follows; of its pieces, `:` and a number follow that.
FILE: Final = "pd:file:"
#: All files by time.
FILES: Final = "pd:files"
#: Of one batch's record, its id follows; of its lines: see `pdtasks.bus.batches`.
BATCH: Final = "pd:batch:"
#: All batches by time, and those that have not ended.
BATCHES: Final = "pd:batches"
BATCHES_OPEN: Final = "pd:batches:open"
#: Of what an API key has had in a minute; its name and the minute follow.
USAGE: Final = "pd:usage:"
#: Written to find out whether the bus takes anything.
PROBE: Final = "pd:probe"
