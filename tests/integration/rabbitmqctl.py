"""The tool of a private node."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pdtasks.cluster.rabbitmq import RabbitNode, server_programs


def rabbitmqctl(node: RabbitNode, *command: str, stdin: str = "") -> str:
    """Runs a command; what it printed."""
    lines = Path(f"/proc/{node.process.pid}/environ").read_bytes().decode().split("\0")
    env = dict(line.split("=", 1) for line in lines if "=" in line)
    # Of the server's start alone: the tool would take them for its own.
    for name in ("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "RUNNING_UNDER_SYSTEMD", "NOTIFY_SOCKET"):
        env.pop(name, None)
    tool = server_programs()[0].with_name("rabbitmqctl")
    done = subprocess.run(
        [str(tool), *command],
        env=env,
        input=stdin,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout
