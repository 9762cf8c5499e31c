"""Series from other DICOMweb services. Only the sources of the file of COUNTERPART_SOURCES can be named."""

import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field, HttpUrl, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.errors import InvalidSettings, SourceUnavailable, UnknownSeries, UploadTooLarge

if TYPE_CHECKING:  # only a pull needs it
    import requests

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
# As stored: the reader decodes every transfer syntax.
AS_STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'
CONNECT_SECONDS = 10.0
NOT_FOUND = (204, 404, 410)
BLOCK_BYTES = 1 << 16
# End of the prefix that follows the preamble of a DICOM file.
MAGIC, MAGIC_END = b"DICM", 132


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DicomWebSource(_Table):
    """DICOMweb service from which series may be retrieved.

    Attributes
    ----------
    url : HttpUrl
        Base URL, before /studies.
    token_file : Path, optional
        File of a bearer token. It is read for each retrieval.
    ca : Path, optional
        CA of the source (PEM).
    read_seconds : float
        Seconds without a byte after which a retrieval fails.
    total_seconds : float
        Seconds after which a retrieval fails.
    """

    url: HttpUrl
    token_file: Path | None = None
    ca: Path | None = None
    read_seconds: float = Field(60.0, gt=0)
    total_seconds: float = Field(600.0, gt=0)


class Sources(_Table):
    """Content of the file of sources."""

    sources: Mapping[Name, DicomWebSource] = Field(default_factory=dict)


def read_sources(path: Path | None) -> Mapping[str, DicomWebSource]:
    """Read a file of sources. No path gives no sources.

    Raises
    ------
    InvalidSettings
        The file cannot be read, or it contains something else.
    """
    if path is None:
        return {}
    try:
        return Sources.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).sources
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    except (OSError, ValueError) as error:
        found = error.strerror or type(error).__name__ if isinstance(error, OSError) else f"no valid TOML ({error})"
    raise InvalidSettings(
        f"The file of COUNTERPART_SOURCES cannot be used: {found}.",
        expected="a table [sources.NAME] with a url for each source (see docs/dicomweb.md).",
        advice="Correct the file, or unset COUNTERPART_SOURCES.",
    )


class Receiver(Protocol):
    """Receiver of the files of a series, one after the other."""

    def begin(self) -> None:
        """Start the next file."""

    def write(self, data: bytes) -> None:
        """Append data to the current file."""

    def end(self) -> None:
        """Finish the current file."""


def retrieve_series(source: DicomWebSource, study: str, series: str, max_bytes: int, receiver: Receiver) -> int:
    """Retrieve all instances of a series (WADO-RS, PS3.18 section 10.4), and return their number.

    The receiver gets the bytes of the source in blocks, so that no instance is in memory as a whole.

    Parameters
    ----------
    source : DicomWebSource
    study, series : str
        UIDs.
    max_bytes : int
        Largest size of the response.
    receiver : Receiver

    Raises
    ------
    UnknownSeries
        The source does not have the series.
    SourceUnavailable
        The source refuses the request, does not answer in time, or answers with something else.
    UploadTooLarge
    """
    import requests  # noqa: PLC0415 - see TYPE_CHECKING above
    from urllib3.exceptions import HTTPError  # noqa: PLC0415

    deadline = time.monotonic() + source.total_seconds
    url = f"{str(source.url).rstrip('/')}/studies/{study}/series/{series}"
    with requests.Session() as session:
        session.trust_env = False  # no .netrc, and no proxy from the environment
        session.verify = str(source.ca) if source.ca else True
        try:
            # Redirects are not followed: the operator listed this address, and no other.
            with session.get(
                url,
                headers={"Accept": AS_STORED, **_authorisation(source)},
                timeout=(CONNECT_SECONDS, source.read_seconds),
                stream=True,
                allow_redirects=False,
            ) as response:
                _check_status(response.status_code)
                parser = _InstanceParser(response.headers.get("Content-Type", ""), receiver)
                for block in _read_blocks(response, max_bytes, deadline):
                    parser.write(block)
        except (requests.RequestException, HTTPError) as error:
            raise _unavailable(f"could not be read ({type(error).__name__})") from None
    return parser.finish()


def _check_status(status: int) -> None:
    if status in NOT_FOUND:
        raise _no_series()
    if status != 200:
        raise _unavailable(f"answered with status {status}")


def _read_blocks(response: "requests.Response", max_bytes: int, deadline: float) -> Iterator[bytes]:
    """Yield the body of a response as it arrives, up to a size and a time."""
    size = 0
    while block := response.raw.read1(BLOCK_BYTES, decode_content=True):
        size += len(block)
        if size > max_bytes:
            raise UploadTooLarge(
                f"The series at the source is larger than {max_bytes >> 20} MiB.",
                expected=f"at most {max_bytes >> 20} MiB.",
                advice="Name another series, or raise COUNTERPART_MAX_UPLOAD_MB.",
            )
        if time.monotonic() > deadline:
            raise _unavailable("did not send the series in time")
        yield block


class _InstanceParser:
    """Parser of a multipart/related response. Each part must begin as a DICOM file (PS3.10 section 7.1)."""

    def __init__(self, content_type: str, receiver: Receiver) -> None:
        media_type, options = parse_options_header(content_type)
        if media_type != b"multipart/related" or not options.get(b"boundary"):
            raise _no_instances()
        self._receiver = receiver
        self._head = bytearray()
        self._count = 0
        self._is_complete = False
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._begin,
                "on_part_data": lambda data, start, end: self._write(data[start:end]),
                "on_part_end": self._end,
                "on_end": self._complete,
            },
        )

    def write(self, data: bytes) -> None:
        """Parse a block."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise _no_instances() from None

    def finish(self) -> int:
        """Return the number of instances. Raise if there is none, or if the response ends before its last boundary."""
        if not self._is_complete:
            raise _no_instances()
        if not self._count:
            raise _no_series()
        return self._count

    def _begin(self) -> None:
        self._head.clear()
        self._receiver.begin()

    def _write(self, data: bytes) -> None:
        if len(self._head) < MAGIC_END:
            self._head += data[: MAGIC_END - len(self._head)]
            if len(self._head) == MAGIC_END and not self._head.endswith(MAGIC):
                raise _no_instances()
        self._receiver.write(data)

    def _end(self) -> None:
        if len(self._head) < MAGIC_END:
            raise _no_instances()
        self._receiver.end()
        self._count += 1

    def _complete(self) -> None:
        self._is_complete = True


def _authorisation(source: DicomWebSource) -> dict[str, str]:
    if source.token_file is None:
        return {}
    try:
        return {"Authorization": f"Bearer {source.token_file.read_text().strip()}"}
    except OSError as error:
        raise _unavailable(f"has no readable token file ({type(error).__name__})") from None


def _no_series() -> UnknownSeries:
    return UnknownSeries(
        "The source does not have this series.",
        expected="StudyInstanceUID and SeriesInstanceUID of a series at the source.",
        advice="Correct the UIDs, or send the scan itself.",
    )


def _no_instances() -> SourceUnavailable:
    return _unavailable("answered with something else than DICOM instances")


def _unavailable(what: str) -> SourceUnavailable:
    return SourceUnavailable(
        f"The source {what}.",
        expected="a DICOMweb service that returns the series (WADO-RS).",
        advice="Try again later. The operator must check COUNTERPART_SOURCES and the source.",
    )
