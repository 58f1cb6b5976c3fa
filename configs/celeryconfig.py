"""Celery's options, each with its reason. Values that differ between hosts come from `Settings`."""

from __future__ import annotations

import socket

from kombu import Exchange, Queue

from pdtasks.broker.reading import frame_handler
from pdtasks.naming import DEAD_EXCHANGE, EXCHANGE, STAGES, queue_of
from pdtasks.settings import load_settings
from pdtasks.tls import amqp_arguments

_settings = load_settings()

# -- broker ------------------------------------------------------------------------------------

# Without one the worker says so and stops; None would mean localhost.
_broker = amqp_arguments(_settings.broker_url or "")
broker_url = _broker["hostname"] or None
# Also where another URL is given: those are of the same server.
broker_use_ssl = _broker.get("ssl", False)
broker_connection_retry_on_startup = True
# A worker outlives any outage of the broker; the default gives up after 100 tries and exits.
broker_connection_max_retries = None
# A closed channel (acknowledgement timeout, a name still taken) is reopened, not the worker's end.
broker_channel_error_retry = True
broker_heartbeat = 30
broker_transport_options = {
    # Confirms are waited for by the publisher of jobs alone: nothing that
    # Celery itself sends may hold up a worker's main loop.
    "confirm_publish": False,
    # Seconds: a RabbitMQ that hangs, or reads nothing under a memory alarm, holds nobody for ever.
    "read_timeout": 15,
    "write_timeout": 15,
    # A message whose properties cannot be read is refused; py-amqp's own would end its reader.
    "frame_handler": frame_handler,
    # py-amqp's default drops a connection after 1 s of stalled network.
    "socket_settings": {socket.TCP_USER_TIMEOUT: 15_000},
}

# -- queues --------------------------------------------------------------------------------------

# Whoever sends more is told so; what has got in is never refused at the next stage.  No setting,
# for another value would be another queue: a policy of RabbitMQ's can say less.
_BOUND = {"x-max-length": 20_000}

_exchange = Exchange(EXCHANGE, type="topic", durable=True)
# The default model's, and those of each further one: a worker of one model is never given a job of
# another, and what waits for one is nobody else's business.
task_queues = [
    Queue(
        queue_of(stage, model),
        exchange=_exchange,
        routing_key=queue_of(stage, model),
        durable=True,
        queue_arguments={
            # Replicated where there are several nodes; survives a restart.
            "x-queue-type": "quorum",
            # A job that kills its worker again and again ends in the dead-letter queue.
            "x-delivery-limit": _settings.delivery_limit,
            "x-dead-letter-exchange": DEAD_EXCHANGE,
            # Kept until the dead-letter queue has it; needs reject-publish.
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
        | (_BOUND if stage == STAGES[0] else {}),
    )
    for model in ("", *_settings.models)
    for stage in STAGES
]
# A misspelt -Q stops the worker instead of making a new, classic queue.
task_create_missing_queues = False
task_default_exchange = EXCHANGE
task_default_exchange_type = "topic"
task_default_queue = STAGES[0]
task_default_routing_key = STAGES[0]

# -- tasks -----------------------------------------------------------------------------------------

# Acknowledged when done: a dead worker's jobs go back to the queue.
task_acks_late = True
# A job is taken when there is a thread for it, not before: late binding balances the workers.  One
# that serves both stages takes as many of each: RabbitMQ counts for each queue.
worker_prefetch_multiplier = 1
# Token ids are bytes in MessagePack; JSON stays for Celery's own control messages. Never pickle.
task_serializer = "msgpack"
accept_content = ["msgpack", "json"]

# -- results ---------------------------------------------------------------------------------------

# Celery's backend of that name speaks to Valkey as well.
result_backend = _settings.result_backend_url
result_serializer = "json"
result_accept_content = ["json"]
result_expires = _settings.result_ttl_s
# Seconds; a bus that is frozen must look like one that is away. (Celery's default is 120.)
redis_socket_timeout = 5.0
redis_socket_connect_timeout = 2.0

# -- workers ---------------------------------------------------------------------------------------

# Threads share one engine; prefork cannot host CUDA and is refused at start.
worker_pool = "threads"
# As many jobs as the engine batches, unless -c says otherwise.
worker_concurrency = _settings.max_num_seqs
worker_consumer = "pdtasks.worker.consumer:StageConsumer"
# Flower shows what workers do; arguments and results are blanked in the tasks.
worker_send_task_events = True
task_track_started = True
# One more publish for each request, and it would carry the arguments.
task_send_sent_event = False
# Both block the main loop inside a signal handler on the threads pool.
worker_soft_shutdown_timeout = 0
worker_disable_rate_limits = True
