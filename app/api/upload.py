"""Receive the body of a request: stream it to the disk in blocks, hash it, and check its format early."""

import asyncio
import errno
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.errors import (
    BadRequest,
    EmptyUpload,
    NotAnImageFormat,
    NotReady,
    StoreFull,
    UnsupportedEncoding,
    UploadTooLarge,
    UploadTooSlow,
)
from app.ingest.reader import ACCEPTED_FORMATS, HEAD_BYTES, detect_format
from app.jobs.queue import JobQueue
from app.jobs.store import Upload

# Bytes that a thread writes at once. Starting a thread costs as much as hashing some kilobytes.
BLOCK_BYTES = 1 << 20
MIB = 1 << 20
# Seconds without a byte after which an upload is refused.
BODY_SECONDS = 60.0
# An upload that is slower than this after its first minute is ended, so that single bytes keep no connection open.
MIN_BYTES_PER_SECOND = 1000
# zlib reads the head of a gzip stream if 16 is added to the largest window.
GZIP_WINDOW = 16 + zlib.MAX_WBITS

_FILE = {"schema": {"type": "string", "format": "binary"}}
_FORM = {
    "schema": {
        "type": "object",
        "required": ["file"],
        "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
    }
}
# For the OpenAPI document.
REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "description": "A NIfTI or MGH file, a zip of a DICOM series, a form of one or many files, or a "
        "multipart/related message as DICOMweb sends it. JSON names a series at a configured source instead.",
        "content": {
            "application/octet-stream": _FILE,
            "application/gzip": _FILE,
            "multipart/form-data": _FORM,
            "multipart/related": _FILE,
            # `app.api.pull.PullRequest`
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["source", "study", "series"],
                    "properties": {name: {"type": "string"} for name in ("source", "study", "series")},
                }
            },
        },
    }
}


class BodyParser(Protocol):
    """Parser for the body of one kind of request."""

    def write(self, data: bytes) -> None:
        """Parse the next block."""

    def finish(self) -> None:
        """Finish the body; raise if it contains no scan."""


@dataclass(eq=False)
class Reception:
    """An upload under way.

    Attributes
    ----------
    timer : asyncio.Timeout
        Ends the upload if no byte arrives.
    missing : int
        Bytes that the caller has announced and not sent.
    """

    timer: asyncio.Timeout
    missing: int


class Uploads:
    """All uploads under way in this process.

    Parameters
    ----------
    queue : JobQueue
        Source of the limit on disk space.
    """

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._receptions: set[Reception] = set()
        self._stopping = False

    @property
    def missing(self) -> int:
        """Bytes that all uploads under way have announced and not sent."""
        return sum(reception.missing for reception in self._receptions)

    def stop(self) -> None:
        """End all uploads, because the process ends."""
        self._stopping = True
        for reception in self._receptions:
            reception.timer.reschedule(asyncio.get_running_loop().time())

    async def receive(
        self, request: Request, upload: Upload, max_mb: int, max_files: int, parser: BodyParser | None = None
    ) -> None:
        """Stream the body of a request into an upload, by default with the parser for its Content-Type.

        Raises
        ------
        EmptyUpload
            The body has no bytes, or the form has no file.
        UploadTooLarge
            The body exceeds a limit. It is refused as soon as this is known.
        NotAnImageFormat
            No file begins like a known image format.
        BadRequest
            The form is malformed.
        UnsupportedEncoding
            The body is compressed in another way than gzip.
        StoreFull
            The disk is full, or will be when all uploads under way are complete.
        UploadTooSlow
            No byte arrived for a minute, or the upload is slower than `MIN_BYTES_PER_SECOND`.
        NotReady
            The process ends.
        """
        length = declared_length(request)
        if length > max_mb * MIB:
            raise _too_large(max_mb)
        inflate = _create_decoder(request.headers.get("content-encoding", ""))
        parser = parser or _create_parser(request.headers.get("content-type", ""), upload, max_files)
        with explain_full_disk():
            try:
                async with asyncio.timeout(BODY_SECONDS) as timer:
                    reception = Reception(timer, length)
                    self._receptions.add(reception)
                    if self._stopping:
                        timer.reschedule(0)
                    try:
                        await self._receive(request, reception, inflate, parser, max_mb)
                    finally:
                        self._receptions.discard(reception)
                await run_in_threadpool(parser.finish)
            except TimeoutError:
                raise _stopping() if self._stopping else too_slow() from None

    async def _receive(
        self, request: Request, reception: Reception, decoder: "Decoder", parser: "BodyParser", max_mb: int
    ) -> None:
        def write(block: bytes) -> int:
            self._queue.check_disk(missing)
            written = 0
            for data in decoder.decode(block):
                written += len(data)
                if size + written > max_mb * MIB:
                    raise _too_large(max_mb)
                parser.write(data)
            return written

        size = 0
        async for block in _read_blocks(self._stream(request, reception), max_mb * MIB, max_mb):
            missing = self.missing
            size += await run_in_threadpool(write, block)
        decoder.finish()

    async def _stream(self, request: Request, reception: Reception) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        slowest = loop.time() + BODY_SECONDS
        async for chunk in request.stream():
            reception.missing = max(0, reception.missing - len(chunk))
            slowest += len(chunk) / MIN_BYTES_PER_SECOND
            if not self._stopping:
                reception.timer.reschedule(min(loop.time() + BODY_SECONDS, slowest))
            yield chunk


@contextmanager
def explain_full_disk() -> Iterator[None]:
    """Replace the error of a disk that becomes full.

    Raises
    ------
    StoreFull
    """
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise StoreFull(
            "The disk became full during the upload.",
            expected="disk space for the scan and its results.",
            advice="Send the scan again later. The operator must free disk space.",
        ) from None


class Decoder:
    """Decoder for a body without Content-Encoding."""

    def decode(self, data: bytes) -> Iterator[bytes]:
        """Yield the decoded bytes in blocks."""
        yield data

    def finish(self) -> None:
        """Raise if the body is incomplete."""


class GzipDecoder(Decoder):
    """Decoder for `Content-Encoding: gzip`. A block is never larger than `BLOCK_BYTES`, whatever the body announces."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(GZIP_WINDOW)
        self._started = False

    def decode(self, data: bytes) -> Iterator[bytes]:
        """Yield the inflated bytes in blocks. A body may have several gzip members."""
        try:
            while data:
                if self._inflate.eof:
                    self._inflate = zlib.decompressobj(GZIP_WINDOW)
                self._started = True
                yield self._inflate.decompress(data, BLOCK_BYTES)
                data = self._inflate.unused_data or self._inflate.unconsumed_tail
        except zlib.error:
            raise _bad_gzip() from None

    def finish(self) -> None:
        """Raise if the last member is incomplete."""
        if self._started and not self._inflate.eof:
            raise _bad_gzip()


def _create_decoder(encoding: str) -> Decoder:
    name = encoding.strip().lower()
    if name in {"", "identity"}:
        return Decoder()
    if name in {"gzip", "x-gzip"}:
        return GzipDecoder()
    raise UnsupportedEncoding(
        "The body has an unsupported Content-Encoding.",
        expected="no Content-Encoding, or gzip.",
        advice="Send the scan without Content-Encoding. A file .nii.gz needs none.",
    )


def declared_length(request: Request) -> int:
    """Return the Content-Length of a request, 0 if it has none."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() else 0


def is_json(request: Request) -> bool:
    """Return whether the body of a request is JSON."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


async def _read_blocks(stream: AsyncIterator[bytes], limit: int, max_mb: int) -> AsyncIterator[bytes]:
    """Yield the stream in blocks. The first block is small: just enough to detect the format."""
    buffer = bytearray()
    received, block_bytes = 0, HEAD_BYTES
    async for chunk in stream:
        received += len(chunk)
        if received > limit:
            raise _too_large(max_mb)
        buffer += chunk
        if len(buffer) >= block_bytes:
            yield bytes(buffer)
            buffer.clear()
            block_bytes = BLOCK_BYTES
    if buffer:
        yield bytes(buffer)


def get_boundary(options: Mapping[bytes, bytes], media_type: str) -> bytes:
    """Return the boundary of a multipart body, or raise BadRequest."""
    boundary = options.get(b"boundary")
    if not boundary:
        raise BadRequest(
            "The Content-Type has no boundary.",
            expected=f"Content-Type: {media_type}; boundary=...",
            advice="Let the HTTP or DICOMweb library write this header.",
        )
    return boundary


def _create_parser(content_type: str, upload: Upload, max_files: int) -> BodyParser:
    media_type, options = parse_options_header(content_type)
    if media_type == b"multipart/form-data":
        return FormParser(get_boundary(options, "multipart/form-data"), upload, max_files)
    if media_type == b"multipart/related":
        boundary = get_boundary(options, 'multipart/related; type="application/dicom"')
        return RelatedParser(boundary, upload, max_files)
    if media_type.startswith(b"multipart/"):
        raise NotAnImageFormat(
            "The body has an unsupported multipart type.",
            expected='multipart/form-data, multipart/related; type="application/dicom", or the scan as the body.',
            advice="Use curl -F file=@scan.nii.gz, or curl --data-binary @scan.nii.gz.",
        )
    return SingleFileParser(upload)


class SingleFileParser:
    """Parser for a body that is the scan itself, with any other Content-Type."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload
        self._format_checked = False

    def write(self, data: bytes) -> None:
        """Write a block. Raise if the file does not begin like a known image format."""
        if not self._upload.heads:
            self._upload.begin()
        self._upload.write(data)
        if not self._format_checked and len(self._upload.heads[0]) >= HEAD_BYTES:
            self._check_format()

    def finish(self) -> None:
        """Close the file; raise if it is empty or too short to be an image."""
        if not self._upload.heads:
            raise _empty()
        if not self._format_checked:
            self._check_format()
        self._upload.end()

    def _check_format(self) -> None:
        detect_format(self._upload.heads[0][:HEAD_BYTES])
        self._format_checked = True


class FormParser:
    """Parser for multipart/form-data with one or many files. Starlette's parser would keep each file open."""

    def __init__(self, boundary: bytes, upload: Upload, max_files: int) -> None:
        self._upload = upload
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
                "on_part_data": lambda data, start, end: upload.write(data[start:end]),
                "on_part_end": upload.end,
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
        """Check that at least one file begins like an image; `app.ingest` checks the others."""
        self.check_complete()
        refusal: NotAnImageFormat | EmptyUpload | None = None
        for head in self._upload.heads:
            try:
                detect_format(head[:HEAD_BYTES])
            except (NotAnImageFormat, EmptyUpload) as error:
                refusal = error if refusal is None or head else refusal
            else:
                return
        assert refusal is not None
        raise refusal

    def check_complete(self) -> None:
        """Raise if no part has a byte, or the body ends before its last boundary."""
        if not self._upload.heads or not any(self._upload.heads):
            raise _empty()
        if not self._ended:
            raise _malformed()

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
        if len(self._upload.heads) >= self._max_files:
            raise UploadTooLarge(
                f"The form has more than {self._max_files} files.",
                expected="the files of one series.",
                advice="Send only that series, or raise COUNTERPART_MAX_FILES.",
            )
        self._upload.begin()

    def _check_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"filename" not in options:
            raise BadRequest(
                "The form has a field that is not a file.",
                expected="only files in the form.",
                advice="Send parameters in the query: POST /v1/scans?model=...",
            )

    def _end(self) -> None:
        self._ended = True


class RelatedParser(FormParser):
    """Parser for multipart/related as DICOMweb sends it (PS3.18 section 10.5): each part is a file without a name."""

    def _check_part(self) -> None:
        """Accept every part."""


def _empty() -> EmptyUpload:
    return EmptyUpload(
        "The request contains no scan.",
        expected=ACCEPTED_FORMATS,
        advice="Send the file as the body (curl --data-binary @scan.nii.gz) or in a form (curl -F file=@scan.nii.gz).",
    )


def _too_large(max_mb: int) -> UploadTooLarge:
    return UploadTooLarge(
        f"The upload is larger than {max_mb} MiB.",
        expected=f"at most {max_mb} MiB.",
        advice="Send one series, compressed, or raise COUNTERPART_MAX_UPLOAD_MB.",
    )


def too_slow() -> UploadTooSlow:
    """Return the error of a body that stopped, or that is too slow."""
    return UploadTooSlow(
        f"No byte of the upload arrived for {BODY_SECONDS:g} s, or fewer than {MIN_BYTES_PER_SECOND} bytes a second.",
        expected="the whole scan without long breaks.",
        advice="Send the scan again.",
    )


def _stopping() -> NotReady:
    return NotReady(
        "The service stops, and the upload is not complete.",
        expected="a running service.",
        advice="Send the scan again when the service has started (see Retry-After).",
    )


def _bad_gzip() -> BadRequest:
    return BadRequest(
        "The body is not the gzip stream that Content-Encoding announces, or it is incomplete.",
        expected="a complete gzip stream, or no Content-Encoding.",
        advice="Remove the header Content-Encoding if the body is the file itself.",
    )


def _malformed() -> BadRequest:
    return BadRequest(
        "The form is malformed, or it ends before its last boundary.",
        expected="multipart/form-data (RFC 7578) or multipart/related (RFC 2387).",
        advice="Let the HTTP library create the form, and send all of it.",
    )
