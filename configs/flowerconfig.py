"""Flower's options, each with its reason. Read by `celery -A pdtasks flower --conf=<this file>`.

Address and port come from the command line; the cookie's secret from FLOWER_COOKIE_SECRET.
"""

from __future__ import annotations

import os

# Queue lengths come from RabbitMQ's management API. Its URL holds a password, and everybody on the
# host can read a command line.
broker_api = os.environ.get("PDTASKS_BROKER_API_URL")

# Tasks in memory; Flower's own limit is 100 000.
max_tasks = 5_000

# Workers that are gone for 10 min leave the page and the metrics.
purge_offline_workers = 600

# Flower asks for no password here, and then lets every web page that is open in a browser on this
# host call its API (it answers with Access-Control-Allow-Origin: *). Looking is harmless, for no
# prompt is in it; without this line such a page could shut down the workers.
read_only = True

# Nothing is written to disk.
persistent = False
