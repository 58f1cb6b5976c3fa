"""Flower's options, each with its reason. Read by `celery -A pdtasks flower --conf=<this file>`.

Address and port come from the command line; the cookie's secret from FLOWER_COOKIE_SECRET, a login
from FLOWER_BASIC_AUTH.
"""

from __future__ import annotations

import os
import sys

from tornado.options import options

from pdtasks.errors import ConfigurationError
from pdtasks.flower_login import has_login, require_login

# Flower's own is every address of the host.
address = options.address or "127.0.0.1"
try:
    require_login(address)
except ConfigurationError as exc:
    sys.exit(f"pdtasks: {exc}")

# Queue lengths come from RabbitMQ's management API. Its URL holds a password, and everybody on the
# host can read a command line.
broker_api = os.environ.get("PDTASKS_BROKER_API_URL")

# Tasks in memory; Flower's own limit is 100 000.
max_tasks = 5_000

# Workers that are gone for 10 min leave the page and the metrics.
purge_offline_workers = 600

# Without a login Flower lets every web page that is open in a browser on this host call its API (it
# answers with Access-Control-Allow-Origin: *). Looking is harmless, for no prompt is in it; without
# this line such a page could end everybody's requests. With one, other sites' pages get a 403.
read_only = not has_login()

# Nothing is written to disk.
persistent = False
