"""Who may use Flower? Whoever has its login may act, others of this host may look."""

from __future__ import annotations

import os
from typing import Final

from pdtasks.errors import ConfigurationError
from pdtasks.links import is_loopback

#: How all variables begin that Flower reads. Its alone: some are secrets.
FLOWER_PREFIX: Final = "FLOWER_"
#: Flower's own: `name:password`, several separated by commas.
LOGIN_VARIABLE: Final = "FLOWER_BASIC_AUTH"


def has_login() -> bool:
    """Does Flower ask who it is?"""
    return bool(os.environ.get(LOGIN_VARIABLE))


def require_login(host: str) -> None:
    """Raises ConfigurationError when anybody who reaches `host` could look.

    Also when what is to be a login is none.
    """
    for login in filter(None, os.environ.get(LOGIN_VARIABLE, "").split(",")):
        name, _, password = login.partition(":")
        if not (name and password):
            raise ConfigurationError(f"{LOGIN_VARIABLE} has to be NAME:PASSWORD")
    if not has_login() and not is_loopback(host):
        raise ConfigurationError(
            f"Flower would show everything to anybody who reaches {host}: set "
            f"{LOGIN_VARIABLE}=NAME:PASSWORD, or leave PDTASKS_FLOWER_HOST out"
        )
