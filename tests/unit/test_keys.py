"""Which keys are good, and what is kept of them?"""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from pdtasks import keys
from pdtasks.cli import main
from pdtasks.errors import ConfigurationError
from pdtasks.keys import Key, Keys, add, digest_of, listed, parse, remove, require_keys
from pdtasks.settings import Settings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "home" / "api-keys"


@pytest.fixture(autouse=True)
def looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_LOOK_S", 0.0)


def test_a_file_keeps_names_limits_and_hashes_for_its_owner_alone(file: Path) -> None:
    add(file, Key("alice", digest_of("a-secret"), requests_per_minute=3, at_once=2))
    add(file, Key("bob", digest_of("b-secret"), tokens_per_minute=500))

    text = file.read_text()
    assert "secret" not in text
    assert [key.name for key in parse(text, "it")] == ["alice", "bob"]
    assert listed(file)[0].requests_per_minute == 3
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    remove(file, "alice")
    assert [key.name for key in listed(file)] == ["bob"]


def test_a_key_is_found_by_its_secret_and_by_nothing_else(file: Path) -> None:
    add(file, Key("alice", digest_of("a-secret"), at_once=2))
    known = Keys(file)

    found = known.find("a-secret")
    assert found is not None
    assert (found.name, found.at_once) == ("alice", 2)
    for wrong in ("", "alice", "a-secret ", "A-SECRET", digest_of("a-secret").hex()):
        assert known.find(wrong) is None


def test_a_key_is_an_admins_only_where_its_line_says_so(file: Path) -> None:
    add(file, Key("alice", digest_of("a")))
    add(file, Key("olga", digest_of("o"), at_once=2, admin=True))
    known = Keys(file, "from-env")

    admins = {s for s in ("a", "o", "from-env") if (key := known.find(s)) and key.admin}
    assert admins == {"o"}


def test_a_file_that_changes_is_read_again(file: Path) -> None:
    known = Keys(file)
    assert not known

    add(file, Key("alice", digest_of("a")))
    assert known
    assert known.find("a")

    add(file, Key("bob", digest_of("b")))
    remove(file, "alice")
    assert known.find("b")
    assert known.find("a") is None


def test_a_file_that_is_lost_or_damaged_opens_no_door(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(file, Key("alice", digest_of("a")))
    known = Keys(file)

    file.write_text("canary\n")
    assert known.find("a"), "damaged: as it was"
    assert "line 1" in caplog.text
    assert "canary" not in caplog.text

    file.unlink()
    assert known.find("a") is None
    assert known, "keys are asked for all the same"

    add(file, Key("bob", digest_of("b")))
    assert known.find("b")


@pytest.mark.parametrize(
    "line",
    [
        "canary",
        "canary sha256:00",
        "canary md5:" + "0" * 64,
        "canary sha256:" + "0" * 64 + " at_once=0",
        "canary sha256:" + "0" * 64 + " at_once=many",
        "canary sha256:" + "0" * 64 + " color=1",
        "canary sha256:" + "0" * 64 + " admin admin",
        "canary sha256:" + "0" * 64 + " admins",
        "can/ary sha256:" + "0" * 64,
        "first sha256:" + "1" * 64,
    ],
)
def test_a_line_that_is_no_key_is_told_by_its_number(line: str) -> None:
    first = "first sha256:" + "0" * 64 + "  # a remark"

    with pytest.raises(ConfigurationError, match="keys, line 3:") as refused:
        parse(f"{first}\n\n{line}\n", "keys")

    assert "canary" not in str(refused.value)


def test_keys_also_come_from_the_environment() -> None:
    known = Keys(None, "one,two")

    assert known
    found = known.find("two")
    assert found is not None
    assert found.name == "env-2"
    assert known.find("one,two") is None


def test_an_api_for_other_hosts_needs_keys_unless_it_is_open_by_name(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    settings = Settings(home=file.parent)
    require_keys(settings, "127.0.0.1")
    with pytest.raises(ConfigurationError, match="pdtasks keys new"):
        require_keys(settings, "0.0.0.0")
    require_keys(Settings(home=file.parent, api_open=True), "0.0.0.0")

    add(file, Key("alice", digest_of("a")))
    require_keys(settings, "0.0.0.0")
    monkeypatch.setenv("VLLM_API_KEY", "x")
    with pytest.raises(ConfigurationError, match="unset VLLM_API_KEY"):
        require_keys(settings, "0.0.0.0")


def test_the_commands_show_a_key_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdtasks.settings.load_settings", lambda: Settings(home=file.parent))
    run = CliRunner().invoke

    made = run(main, ["keys", "new", "alice", "--requests-per-minute", "60", "--at-once", "8"])
    secret = made.stdout.strip()
    assert made.exit_code == 0
    found = Keys(file).find(secret)
    assert found is not None
    assert found.requests_per_minute == 60

    assert run(main, ["keys", "new", "olga", "--admin", "--at-once", "9"]).exit_code == 0
    shown = run(main, ["keys", "list"])
    assert shown.stdout == "alice  requests_per_minute=60  at_once=8\nolga  admin  at_once=9\n"
    assert run(main, ["keys", "revoke", "olga"]).exit_code == 0
    again = run(main, ["keys", "new", "alice"])
    assert (again.exit_code, "revoke it first" in again.output) == (1, True)
    assert run(main, ["keys", "new", "no/name"]).exit_code == 1
    assert run(main, ["keys", "revoke", "alice"]).exit_code == 0
    assert run(main, ["keys", "revoke", "alice"]).exit_code == 1
    assert listed(file) == []
