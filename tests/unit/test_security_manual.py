"""docs/security.md shows the very commands that set up one's own servers."""

from __future__ import annotations

from pathlib import Path

from pdtasks.cluster.rights import (
    BROKER_RIGHTS,
    BUS_RIGHTS,
    KV_RIGHTS,
    acl_lines,
    rabbitmqctl_lines,
)
from tests.manual import commands

DOCS = Path(__file__).parents[2] / "docs"


def test_the_manual_has_the_users_of_the_broker() -> None:
    # One that only says how to change a password is not indented.
    assert commands("rabbitmqctl ") == rabbitmqctl_lines()


def test_the_manual_has_the_users_of_the_bus() -> None:
    assert commands("ACL SETUSER ") == acl_lines()


def test_the_manual_has_the_rights_on_kv() -> None:
    assert f"{KV_RIGHTS}\n" in (DOCS / "kv-security.md").read_text()


def test_every_user_is_in_the_manuals_table() -> None:
    text = (DOCS / "security.md").read_text()

    for user in {*BROKER_RIGHTS, *BUS_RIGHTS}:
        assert f"\n| `{user}` |" in text
