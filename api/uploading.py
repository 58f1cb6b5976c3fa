"""How does a file come in? As a form, read piece by piece: it is never whole in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

#: Of what is no file: purpose, expiry.
_MAX_FIELDS: Final = 16
_MAX_FIELD_BYTES: Final = 1024
_MAX_NAME_BYTES: Final = 512


class BadForm(Exception):
    """The body is no form with one file."""


class Form:
    """What a form says beside its file."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None


async def read_form(
    content_type: str,
    body: AsyncIterator[bytes],
    write: Callable[[bytes], Awaitable[None]],
    *,
    file_field: str,
) -> Form:
    """Have `write` called with each piece of the file in `body`. Raises BadForm."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise BadForm("the body has to be a form: Content-Type: multipart/form-data")
    parts = _Parts(file_field)
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        async for piece in body:
            parser.write(piece)
            if parts.of_file:
                await write(bytes(parts.of_file))
                parts.of_file.clear()
        parser.finalize()
    except FormParserError as exc:
        raise BadForm("the body is no multipart/form-data that can be read") from exc
    if not parts.is_whole:
        raise BadForm("the form has no end")
    if parts.form.filename is None:
        raise BadForm(f"the form has no file under the name {file_field!r}")
    return parts.form


class _Parts:
    """What the parser calls."""

    def __init__(self, file_field: str) -> None:
        self.form = Form()
        self.of_file = bytearray()  #: what has come and is not written yet
        self.is_whole = False
        self._file_field = file_field
        self._name = ""
        self._is_file = False
        self._value = bytearray()
        self._header = bytearray()
        self._header_value = bytearray()
        self._disposition = b""

    def callbacks(self) -> MultipartCallbacks:
        """By the parser's names for them."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._take_header,
            "on_header_value": self._take_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._take,
            "on_part_end": self._end,
            "on_end": self._end_all,
        }

    def _begin(self) -> None:
        self._disposition = b""
        self._value.clear()

    def _take_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]  # (the parser bounds headers)

    def _take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header.clear()
        self._header_value.clear()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._is_file = b"filename" in options or self._name == self._file_field
        if self._is_file:
            if self._name != self._file_field or self.form.filename is not None:
                raise BadForm(f"the form has to have one file, under the name {self._file_field!r}")
            named = options.get(b"filename", b"")[:_MAX_NAME_BYTES].decode(errors="replace")
            self.form.filename = named or "upload"
        elif len(self.form.fields) >= _MAX_FIELDS:
            raise BadForm(f"the form has more than {_MAX_FIELDS} fields")

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.of_file += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise BadForm(f"a field of the form has more than {_MAX_FIELD_BYTES} bytes")

    def _end(self) -> None:
        if not self._is_file:
            self.form.fields[self._name] = self._value.decode(errors="replace")

    def _end_all(self) -> None:
        self.is_whole = True
