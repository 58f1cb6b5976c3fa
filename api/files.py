"""The routes of files, as OpenAI has them: upload, list, read, delete, from any API process."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect

from api.guard import BodyIsLate, error_response
from api.stored import from_bus, own, page
from api.uploading import BadForm, read_form
from pdtasks.bus.files import File, FileInUse, FileStore
from pdtasks.errors import NoRoomForFiles
from pdtasks.keys import asker_name

PATH: Final = "/v1/files"
router = APIRouter(prefix=PATH)

#: The one purpose that anything here is for.
PURPOSE: Final = "batch"
#: A form around a file: boundaries, headers, fields.
_MOST_AROUND_IT: Final = 1 << 16
#: Uploads of one process at once: each holds some MiB.
_MOST_UPLOADS: Final = 16
#: Seconds that a caller may want a file to be kept, as OpenAI bounds them.
_SHORTEST_S, _LONGEST_S = 3600, 2_592_000
_MOST_LISTED: Final = 1000


class Files:
    """What the routes need, in the app's state."""

    def __init__(self, store: FileStore, *, max_bytes: int) -> None:
        """`max_bytes`: of one file."""
        self.store = store
        self.max_bytes = max_bytes
        self.num_uploads = 0


class _TooLarge(Exception):
    pass


def _files(request: Request) -> Files:
    found: Files = request.app.state.pdtasks_files
    return found


@router.post("")
async def upload(request: Request) -> JSONResponse:
    """Take a file in: a form with `file` and `purpose`."""
    files = _files(request)
    told = request.headers.get("content-length", "")
    if told.isdigit() and int(told) > files.max_bytes + _MOST_AROUND_IT:
        return _too_large(files)
    if files.num_uploads >= _MOST_UPLOADS:
        refused = error_response(429, f"{_MOST_UPLOADS} uploads are under way here: come again")
        refused.headers["Retry-After"] = "1"
        return refused
    files.num_uploads += 1
    try:
        # Before it is sent, where that can be known.
        with from_bus("file"):
            await files.store.require_room(int(told) if told.isdigit() else 0)
            return JSONResponse(shown(await _take(request, files)))
    except NoRoomForFiles as exc:
        full = error_response(exc.http_status, str(exc))
        full.headers["x-should-retry"] = "false"  # OpenAI's clients would send it all again
        return full
    except _TooLarge:
        return _too_large(files)
    except BadForm as exc:
        return error_response(400, str(exc))
    except BodyIsLate:
        return error_response(408, "the file has not come in time")
    except ClientDisconnect:
        return error_response(400, "the file was not sent to its end")
    finally:
        files.num_uploads -= 1


async def _take(request: Request, files: Files) -> File:
    async with files.store.upload() as sent:

        async def write(data: bytes) -> None:
            if sent.num_bytes + len(data) > files.max_bytes:
                raise _TooLarge
            await sent.write(data)

        kind = request.headers.get("content-type", "")
        form = await read_form(kind, request.stream(), write, file_field="file")
        purpose = form.fields.get("purpose")
        if purpose != PURPOSE:
            raise BadForm(f"purpose: files are kept for batches only: {PURPOSE!r}")
        return await sent.keep(
            filename=form.filename or "upload",
            purpose=PURPOSE,
            owner=asker_name(),
            ttl_s=_lifetime(form.fields, files.store.ttl_s),
        )


def _lifetime(fields: dict[str, str], longest_s: int) -> int:
    anchor, seconds = (fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return longest_s
    is_number = seconds is not None and seconds.isascii() and seconds.isdecimal()
    wanted = int(seconds) if is_number and seconds is not None and len(seconds) < 10 else 0
    if anchor != "created_at" or not _SHORTEST_S <= wanted <= _LONGEST_S:
        raise BadForm(
            "expires_after: anchor has to be 'created_at', seconds a number from "
            f"{_SHORTEST_S} to {_LONGEST_S}"
        )
    return min(wanted, longest_s)


@router.get("")
async def list_files(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """Files, newest first unless told otherwise."""
    with from_bus("file"):
        found = await _files(request).store.newest(
            limit=min(limit, _MOST_LISTED),
            after=after,
            owner=asker_name(),
            purpose=purpose,
            oldest_first=order == "asc",
        )
    return page("file", after, found and ([shown(file) for file in found[0]], found[1]))


@router.get("/{file_id}")
async def get_file(file_id: str, request: Request) -> dict[str, Any]:
    """What is known of a file."""
    return shown(await find(request, file_id))


@router.get("/{file_id}/content")
async def content(file_id: str, request: Request) -> StreamingResponse:
    """The file, as it was sent."""
    file = await find(request, file_id)
    return StreamingResponse(
        _files(request).store.pieces(file),
        media_type="application/octet-stream",
        headers={
            # Whoever gets a part of it only will see that it is one.
            "Content-Length": str(file.bytes),
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.filename)}",
        },
    )


@router.delete("/{file_id}")
async def delete_file(file_id: str, request: Request) -> Any:
    """Delete a file that no batch reads."""
    file = await find(request, file_id)
    try:
        with from_bus("file"):
            await _files(request).store.delete(file.id)
    except FileInUse as exc:
        return error_response(409, f"{exc.batch_id} reads this file: cancel it, or wait for it")
    return {"id": file.id, "object": "file", "deleted": True}


async def find(request: Request, file_id: str) -> File:
    """The asker's file. Raises HTTPException."""
    with from_bus("file"):
        file = await _files(request).store.get(file_id)
    return own(file, "file", file_id)


def _too_large(files: Files) -> JSONResponse:
    return error_response(
        413,
        f"the file has more than {files.max_bytes} bytes: split it, or have "
        "PDTASKS_MAX_FILE_BYTES raised",
    )


def shown(file: File) -> dict[str, Any]:
    """As OpenAI shows it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
