"""An upload from the wire to the disk: block by block, hashed on the way, never whole in memory."""

import errno
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.errors import BadRequest, EmptyUpload, NotAnImageFormat, StoreFull, UploadTooLarge
from app.ingest import ACCEPTED, HEAD_BYTES, sniff
from app.jobs.store import Upload

# Bytes handed to a thread at once: a hop costs as much as hashing some kilobytes.
BLOCK = 1 << 20
MIB = 1 << 20


class Reader(Protocol):
    """Takes the body of one kind of request."""

    def write(self, data: bytes) -> None:
        """The next block."""

    def finish(self) -> None:
        """There is no more: refuse what cannot be a scan."""


async def receive(request: Request, incoming: Upload, max_mb: int, max_files: int) -> None:
    """Stream a request's body into `incoming`.

    Raises
    ------
    EmptyUpload
        No bytes, or no file in the form.
    UploadTooLarge
        More bytes or files than allowed; told as soon as it is known.
    NotAnImageFormat
        By its first bytes, no file can be an image.
    BadRequest
        A form that is not one.
    StoreFull
        The disk filled up meanwhile.
    """
    limit = max_mb * MIB
    if declared(request) > limit:
        raise _too_large(max_mb)
    reader = _reader(request.headers.get("content-type", ""), incoming, max_files)
    try:
        async for block in _blocks(request.stream(), limit, max_mb):
            await run_in_threadpool(reader.write, block)
        await run_in_threadpool(reader.finish)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise StoreFull(
            "The disk filled up while the scan was received.",
            expected="room for the scan and its results.",
            advice="Send it again later; the operator frees some disk.",
        ) from None


def declared(request: Request) -> int:
    """Bytes that the request says it has; 0 where it does not say."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() else 0


async def _blocks(stream: AsyncIterator[bytes], limit: int, max_mb: int) -> AsyncIterator[bytes]:
    """The stream in larger pieces; the first one as soon as a format can be told from it."""
    buffer = bytearray()
    received, enough = 0, HEAD_BYTES
    async for chunk in stream:
        received += len(chunk)
        if received > limit:
            raise _too_large(max_mb)
        buffer += chunk
        if len(buffer) >= enough:
            yield bytes(buffer)
            buffer.clear()
            enough = BLOCK
    if buffer:
        yield bytes(buffer)


def _boundary(options: Mapping[bytes, bytes], kind: str) -> bytes:
    boundary = options.get(b"boundary")
    if not boundary:
        raise BadRequest(
            "The message has no boundary between its parts.",
            expected=f"Content-Type: {kind}; boundary=...",
            advice="Let the client's HTTP or DICOMweb library write the header.",
        )
    return boundary


def _reader(content_type: str, incoming: Upload, max_files: int) -> Reader:
    kind, options = parse_options_header(content_type)
    if kind == b"multipart/form-data":
        return FormReader(_boundary(options, "multipart/form-data"), incoming, max_files)
    if kind == b"multipart/related":
        return RelatedReader(_boundary(options, 'multipart/related; type="application/dicom"'), incoming, max_files)
    if kind.startswith(b"multipart/"):
        raise NotAnImageFormat(
            "The body is of a multipart type that is not read.",
            expected='multipart/form-data, multipart/related; type="application/dicom", or the scan as the body.',
            advice="curl -F file=@scan.nii.gz, or curl --data-binary @scan.nii.gz.",
        )
    return BodyReader(incoming)


class BodyReader:
    """The body is the scan, whatever its Content-Type says."""

    def __init__(self, incoming: Upload) -> None:
        self._incoming = incoming
        self._known = False

    def write(self, data: bytes) -> None:
        """Write a block; refuse the first if no image begins so."""
        if not self._incoming.heads:
            self._incoming.begin()
        self._incoming.write(data)
        if not self._known and len(self._incoming.heads[0]) >= HEAD_BYTES:
            self._check()

    def finish(self) -> None:
        """Put the file on the disk."""
        if not self._incoming.heads:
            raise _empty()
        if not self._known:
            self._check()
        self._incoming.end()

    def _check(self) -> None:
        sniff(self._incoming.heads[0][:HEAD_BYTES])
        self._known = True


class FormReader:
    """multipart/form-data with one or many files; Starlette's would keep each of them open."""

    def __init__(self, boundary: bytes, incoming: Upload, max_files: int) -> None:
        self._incoming = incoming
        self._max_files = max_files
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_file,
                "on_part_data": lambda data, start, end: incoming.write(data[start:end]),
                "on_part_end": incoming.end,
                "on_end": self._end,
            },
        )

    def write(self, data: bytes) -> None:
        """Parse a block."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise _malformed() from None

    def finish(self) -> None:
        """Require one image at least; what lies beside it is for `app.ingest` to judge."""
        if not self._incoming.heads or not any(self._incoming.heads):
            raise _empty()
        if not self._ended:
            raise _malformed()
        refusal: NotAnImageFormat | EmptyUpload | None = None
        for head in self._incoming.heads:
            try:
                sniff(head[:HEAD_BYTES])
            except (NotAnImageFormat, EmptyUpload) as error:
                refusal = error if refusal is None or head else refusal
            else:
                return
        assert refusal is not None
        raise refusal

    def _begin_part(self) -> None:
        self._disposition = b""

    def _end_header(self) -> None:
        field, value = self._header
        if field.lower() == b"content-disposition":
            self._disposition = bytes(value)
        field.clear()
        value.clear()

    def _begin_file(self) -> None:
        self._check_part()
        if len(self._incoming.heads) >= self._max_files:
            raise UploadTooLarge(
                f"The form has more than {self._max_files} files.",
                expected="one series.",
                advice="Send the series alone, or raise COUNTERPART_MAX_FILES.",
            )
        self._incoming.begin()

    def _check_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"filename" not in options:
            raise BadRequest(
                "The form has a field that is no file.",
                expected="files only.",
                advice="Parameters go into the query: POST /v1/scans?model=...",
            )

    def _end(self) -> None:
        self._ended = True


class RelatedReader(FormReader):
    """multipart/related: a file a part, without a name, as a DICOMweb client stores them (PS3.18 10.5)."""

    def _check_part(self) -> None:
        """Every part is a file."""


def _empty() -> EmptyUpload:
    return EmptyUpload(
        "The request holds no scan.",
        expected=ACCEPTED,
        advice="Send the file as the body (curl --data-binary @scan.nii.gz) or in a form (curl -F file=@scan.nii.gz).",
    )


def _too_large(max_mb: int) -> UploadTooLarge:
    return UploadTooLarge(
        f"The upload is larger than {max_mb} MiB.",
        expected=f"at most {max_mb} MiB.",
        advice="Send one series, compressed; or raise COUNTERPART_MAX_UPLOAD_MB.",
    )


def _malformed() -> BadRequest:
    return BadRequest(
        "The form is malformed, or ends before its last boundary.",
        expected="multipart/form-data (RFC 7578) or multipart/related (RFC 2387).",
        advice="Let the HTTP library build the form, and send it whole.",
    )
