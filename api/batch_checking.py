"""Which requests are in a batch's input file? Found piece by piece, with what is wrong in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Any, Final

from api.guard import broken_text
from pdtasks.bus.batches import Place

#: Lines of one batch, as OpenAI bounds them.
MOST_LINES: Final = 50_000
#: Errors that are told of one file.
_MOST_ERRORS: Final = 100
_MAX_ID_LENGTH: Final = 512


class _Wrong(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(code)
        self.code, self.message, self.param = code, message, param


class InputFile:
    """What is in a file, as far as it has been fed."""

    def __init__(self, endpoint: str, models: Collection[str], *, max_line_bytes: int) -> None:
        """Args:
        endpoint: that all lines have to be for.
        models: of which all have to ask the same one.
        max_line_bytes: of one line.
        """
        self.errors: list[dict[str, Any]] = []
        self.num_lines = 0  #: that are requests
        self._endpoint = endpoint
        self.model = ""  #: that the first line asks
        self._models = models
        self._max_line_bytes = max_line_bytes
        self._rest = bytearray()
        self._number = 0  # of the line that begins with `_rest`
        self._offset = 0
        self._is_too_long = False  # that line, and its beginning is forgotten
        self._known: set[bytes] = set()  # digests of each custom_id

    @property
    def is_hopeless(self) -> bool:
        """Has enough been told?"""
        return len(self.errors) >= _MOST_ERRORS

    def feed(self, piece: bytes) -> list[Place]:
        """The lines that end in `piece`."""
        found = []
        *whole, rest = piece.split(b"\n")
        for part in whole:
            self._rest += part
            found += self._end_line(1)
        self._rest += rest
        if len(self._rest) > self._max_line_bytes:
            self._is_too_long = True
            self._offset += len(self._rest)
            self._rest.clear()
        return found

    def end(self) -> list[Place]:
        """The last line, if no end of a line is behind it."""
        found = self._end_line(0)
        if not self.num_lines and not self.errors:
            self._tell(_Wrong("empty_file", "the input file has no requests"), None)
        return found

    def _end_line(self, num_ends: int) -> list[Place]:
        line = bytes(self._rest)
        offset, self._offset = self._offset, self._offset + len(line) + num_ends
        self._rest.clear()
        self._number += 1
        is_too_long, self._is_too_long = self._is_too_long, False
        if self.is_hopeless or not (line.strip() or is_too_long):
            return []
        try:
            custom_id = self._checked(line, is_too_long or len(line) > self._max_line_bytes)
        except _Wrong as wrong:
            self._tell(wrong, self._number)
            return []
        self.num_lines += 1
        return [Place(self.num_lines, offset, len(line), custom_id)]

    def _checked(self, line: bytes, is_too_long: bool) -> str:
        """The line's custom_id. Raises _Wrong."""
        if is_too_long:
            why = f"a line may have {self._max_line_bytes} bytes (PDTASKS_MAX_BODY_BYTES)"
            raise _Wrong("line_too_long", why)
        if self.num_lines >= MOST_LINES:
            raise _Wrong("too_many_lines", f"a batch may have {MOST_LINES} requests: split it")
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            raise _Wrong("invalid_json_line", "this line is no JSON") from None
        if not isinstance(request, dict):
            raise _Wrong("invalid_json_line", "this line is no JSON object")
        if (broken := broken_text(line)) is not None:
            why = f"{broken or 'the line'}: half of a surrogate pair is no text"
            raise _Wrong("invalid_json_line", why, broken or None)
        for name in ("custom_id", "method", "url", "body"):
            if request.get(name) is None:
                raise _Wrong("missing_required_parameter", f"{name} is missing", name)
        self._check_place(request)
        return self._new_id(request["custom_id"])

    def _check_place(self, request: dict[str, Any]) -> None:
        if request["method"] != "POST":
            raise _Wrong("invalid_method", "method has to be POST", "method")
        if request["url"] != self._endpoint:
            why = f"url has to be the batch's endpoint, {self._endpoint}"
            raise _Wrong("invalid_url", why, "url")
        body = request["body"]
        if not isinstance(body, dict):
            raise _Wrong("invalid_type", "body has to be an object", "body")
        if body.get("model") is None:
            raise _Wrong("missing_required_parameter", "body.model is missing", "body.model")
        model = body["model"]
        if not isinstance(model, str) or model not in self._models:
            why = f"body.model has to be one that is served: {', '.join(self._models)}"
            raise _Wrong("mismatched_model", why, "body.model")
        self.model = self.model or model
        if model != self.model:
            why = f"all requests of a batch have to ask one model, as its first line: {self.model}"
            raise _Wrong("mismatched_model", why, "body.model")

    def _new_id(self, custom_id: Any) -> str:
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID_LENGTH:
            why = f"custom_id has to be a text of 1 to {_MAX_ID_LENGTH} characters"
            raise _Wrong("invalid_type", why, "custom_id")
        digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        if digest in self._known:
            why = "this custom_id came before: each has to be unique in its batch"
            raise _Wrong("duplicate_custom_id", why, "custom_id")
        self._known.add(digest)
        return custom_id

    def _tell(self, wrong: _Wrong, line: int | None) -> None:
        self.errors.append(
            {"code": wrong.code, "line": line, "message": wrong.message, "param": wrong.param}
        )
