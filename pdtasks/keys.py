"""Who asks, and may he? API keys, of which only hashes are kept.

A file has one key a line, made by `pdtasks keys new NAME`; it is read again when it changes:

    alice sha256:<64 hex digits> requests_per_minute=60 tokens_per_minute=100000 at_once=8
    olga sha256:<64 hex digits> admin

A key is 32 random bytes, so that a plain hash of it tells nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pdtasks.errors import ConfigurationError
from pdtasks.links import is_loopback
from pdtasks.settings import Settings

logger = logging.getLogger(__name__)

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
_ADMIN: Final = "admin"
_LIMITS: Final = ("requests_per_minute", "tokens_per_minute", "at_once")
#: How our keys begin, so that scanners for leaked secrets can tell them.
_PREFIX: Final = "pdt-"
#: Secrets, separated by commas. No setting: what is one goes into other processes as well.
KEYS_VARIABLE: Final = "PDTASKS_API_KEYS"
#: One that commands of ours ask with.
KEY_VARIABLE: Final = "PDTASKS_API_KEY"
#: Seconds between two looks at the file.
_LOOK_S: Final = 1.0


@dataclass(frozen=True)
class Key:
    """Whose key it is, and how much he may ask for; None: as much as he likes."""

    name: str
    digest: bytes
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  #: of prompts and answers
    at_once: int | None = None  #: requests, of each API process
    admin: bool = False  #: sees the requests of all keys, and drains workers

    def line(self) -> str:
        """As in a file."""
        limits = [f"{n}={v}" for n in _LIMITS if (v := getattr(self, n)) is not None]
        flags = [_ADMIN] if self.admin else []
        return " ".join((self.name, f"sha256:{self.digest.hex()}", *flags, *limits))


#: Whose request this is; None where no keys are asked for.
asker: ContextVar[Key | None] = ContextVar("asker", default=None)


def asker_name() -> str:
    """The name of the key that asks in this context; empty without."""
    key = asker.get()
    return key.name if key else ""


@contextmanager
def asking_for(name: str) -> Iterator[None]:
    """What is asked in this context is the key `name`'s, which has been let in before."""
    before = asker.set(Key(name, b"") if name else None)
    try:
        yield
    finally:
        asker.reset(before)


def new_secret() -> str:
    """What a caller sends; kept nowhere."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> bytes:
    """What is kept of it."""
    return hashlib.sha256(secret.encode()).digest()


def parse(text: str, origin: str) -> list[Key]:
    """The keys in `text`. Raises ConfigurationError with the line, never with what is in it."""
    found: dict[str, Key] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        key = _parsed(words)
        if key is None or key.name in found:
            raise ConfigurationError(
                f"{origin}, line {number}: not `NAME sha256:HEX [{_ADMIN}] "
                f"[{'=N] ['.join(_LIMITS)}=N]`, or a name that came before"
            )
        found[key.name] = key
    return list(found.values())


def _parsed(words: Sequence[str]) -> Key | None:
    name, hashed, rest = words[0], words[1:2], words[2:]
    admin = rest[:1] == [_ADMIN]
    limits = [word.partition("=") for word in rest[admin:]]
    digest = _DIGEST.fullmatch(hashed[0]) if hashed else None
    if not _NAME.fullmatch(name) or digest is None:
        return None
    values = {limit: int(value) for limit, _, value in limits if value.isdecimal()}
    if len(values) < len(limits) or not values.keys() <= set(_LIMITS) or 0 in values.values():
        return None
    return Key(name, bytes.fromhex(digest[1]), **values, admin=admin)


class Keys:
    """The keys that are good now: those of a file, and those of the environment."""

    def __init__(self, file: Path | None, from_environment: str = "") -> None:
        """Args:
        file: None, or where keys may come to be.
        from_environment: secrets, separated by commas.

        Raises ConfigurationError.
        """
        self._file = file
        self._fixed = [
            Key(f"env-{number}", digest_of(secret))
            for number, secret in enumerate(filter(None, from_environment.split(",")), 1)
        ]
        self._known: Sequence[Key] = ()
        self._seen: tuple[int, int] | None = None
        self._look_at = 0.0
        self._read()

    def __bool__(self) -> bool:
        """Are keys asked for? Once there were some, always: a file that is lost opens no door."""
        self._look()
        return bool(self._fixed or self._known) or self._seen is not None

    def find(self, secret: str) -> Key | None:
        """Whose key it is; takes as long for a wrong one."""
        self._look()
        digest = digest_of(secret)
        found = None
        for key in (*self._fixed, *self._known):
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _look(self) -> None:
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + _LOOK_S
        try:
            self._read()
        except ConfigurationError as exc:
            logger.error("the keys stay as they were: %s", exc)  # noqa: TRY400

    def _read(self) -> None:
        if self._file is None:
            return
        try:
            state = self._file.stat()
            seen = (state.st_mtime_ns, state.st_size)
            if seen == self._seen:
                return
            self._seen = seen  # also of a damaged one, which is told once
            self._known = parse(self._file.read_text(), str(self._file))
        except FileNotFoundError:
            if self._seen is not None and self._known:
                logger.warning("%s is gone: its keys are good no more", self._file)
                self._known = ()
        except (OSError, UnicodeDecodeError) as exc:
            why = f"{self._file} cannot be read ({type(exc).__name__})"
            raise ConfigurationError(why) from None


# -- what `pdtasks keys` does ----------------------------------------------------------------------


def asks_for_keys(settings: Settings) -> bool:
    """Does an API with these settings want one? Raises ConfigurationError."""
    own = Keys(settings.keys_file, os.environ.get(KEYS_VARIABLE, ""))
    return bool(own or os.environ.get("VLLM_API_KEY"))


def require_keys(settings: Settings, host: str) -> None:
    """Raises ConfigurationError when anybody who reaches `host` could ask, and nobody has said so.

    Also when a key would be asked for twice.
    """
    own = Keys(settings.keys_file, os.environ.get(KEYS_VARIABLE, ""))
    if own and os.environ.get("VLLM_API_KEY"):
        raise ConfigurationError(
            "keys of pdtasks and VLLM_API_KEY exclude each other: unset VLLM_API_KEY"
        )
    if own or settings.api_open or os.environ.get("VLLM_API_KEY") or is_loopback(host):
        return
    raise ConfigurationError(
        f"the API would answer anybody who reaches {host}: make a key with `pdtasks keys new "
        "NAME`, or set PDTASKS_API_OPEN=1"
    )


def add(file: Path, key: Key) -> None:
    """Raises ConfigurationError when the name is taken, or the file is damaged."""
    keys = _of(file)
    if not _NAME.fullmatch(key.name):
        raise ConfigurationError(
            f"{key.name!r} is no name: letters, digits, '.', '_', '-', at most 64"
        )
    if any(known.name == key.name for known in keys):
        raise ConfigurationError(f"there is a key named {key.name}: revoke it first")
    _write(file, [*keys, key])


def remove(file: Path, name: str) -> None:
    """Raises ConfigurationError when there is none of that name."""
    keys = _of(file)
    kept = [key for key in keys if key.name != name]
    if len(kept) == len(keys):
        raise ConfigurationError(f"there is no key named {name} in {file}")
    _write(file, kept)


def listed(file: Path) -> list[Key]:
    """The keys of a file. Raises ConfigurationError."""
    return _of(file)


def _of(file: Path) -> list[Key]:
    return parse(file.read_text(), str(file)) if file.exists() else []


def _write(file: Path, keys: Iterable[Key]) -> None:
    """Whole or not at all, and for its owner alone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    with os.fdopen(handle, "w") as out:
        out.writelines(key.line() + "\n" for key in keys)
    Path(name).replace(file)
