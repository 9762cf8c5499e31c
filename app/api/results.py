"""A result as an answer: Range, HEAD and ETag are Starlette's, its refusals are problems like all others."""

from collections.abc import Mapping

from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from app.api.problems import problem_response, told
from app.errors import BadRange, UnsatisfiableRange
from app.jobs.store import StoredFile

MEDIA_TYPES = {
    "gz": "application/gzip",
    "json": "application/json",
    "png": "image/png",
    "dcm": "application/dicom",  # RFC 3240
}


class ResultFile(FileResponse):
    """A fetched result; the temporary copy, where there is one, goes when it was sent.

    Parameters
    ----------
    fetched : Fetched
    name : str
        For the caller.
    headers : mapping of str to str
    """

    def __init__(self, fetched: StoredFile, name: str, headers: Mapping[str, str]) -> None:
        media_type = MEDIA_TYPES[name.rpartition(".")[2]]
        super().__init__(fetched.path, headers=headers, media_type=media_type, filename=name)
        self._fetched = fetched

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file, or a problem where Starlette would refuse the Range in plain text."""
        refused: Message | None = None

        async def watch(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] in {400, 416}:
                refused = message
            if refused is None:
                await send(message)

        try:
            await super().__call__(scope, receive, watch)
        finally:
            self._fetched.close()
        if refused is None:
            return
        expected, advice = "bytes=0-99, within the file.", "Send no Range for the whole file; HEAD tells its length."
        if refused["status"] == 416:
            problem = told(UnsatisfiableRange("The Range lies outside the file.", expected=expected, advice=advice))
        else:
            problem = told(BadRange("The Range header cannot be read.", expected=expected, advice=advice))
        length = {name.decode(): value.decode() for name, value in refused["headers"] if name == b"content-range"}
        await problem_response(problem, length)(scope, receive, send)
