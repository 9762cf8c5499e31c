"""Series from other DICOMweb services. Only the sources of the file of COUNTERPART_SOURCES can be named."""

import logging
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, HttpUrl, ValidationError

from app.errors import InvalidSettings, SourceUnavailable, UnknownSeries, UploadTooLarge

if TYPE_CHECKING:  # an import takes a second, and only a pull needs it
    import requests

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
# As stored: the reader decodes every transfer syntax.
AS_STORED = (("application/dicom", "*"),)
CONNECT_SECONDS = 10.0
NOT_FOUND = (204, 404, 410)


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


def retrieve_series(
    source: DicomWebSource, study: str, series: str, max_bytes: int, write: Callable[[bytes], None]
) -> int:
    """Retrieve all instances of a series, one at a time (WADO-RS), and return their number.

    Parameters
    ----------
    source : DicomWebSource
    study, series : str
        UIDs.
    max_bytes : int
        Largest size of the response.
    write : callable
        Called with the bytes of each instance.

    Raises
    ------
    UnknownSeries
        The source does not have the series.
    SourceUnavailable
        The source refuses the request, does not answer in time, or answers with something else.
    UploadTooLarge
    """
    import requests  # noqa: PLC0415 - see TYPE_CHECKING above
    from dicomweb_client.web import DICOMwebClient  # noqa: PLC0415
    from pydicom.errors import InvalidDicomError  # noqa: PLC0415

    for name in ("dicomweb_client", "retrying"):  # their messages contain headers and tracebacks
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    deadline = time.monotonic() + source.total_seconds
    with requests.Session() as session, ExitStack() as responses:
        session.trust_env = False  # no .netrc, and no proxy from the environment
        session.max_redirects = 0  # the operator listed this address, and no other
        session.verify = str(source.ca) if source.ca else True
        client = DICOMwebClient(
            str(source.url).rstrip("/"),
            session=session,
            headers=_authorisation(source),
            callback=lambda response, **_: _limit(responses.enter_context(response), max_bytes, deadline),
            timeout=(CONNECT_SECONDS, source.read_seconds),
        )
        client.set_http_retry_params(retry=False)
        count = 0
        try:
            for dataset in client.iter_series(study, series, media_types=AS_STORED):
                buffer = BytesIO()
                dataset.save_as(buffer, enforce_file_format=True)
                write(buffer.getvalue())
                count += 1
        except requests.HTTPError as error:
            status = error.response.status_code if error.response is not None else None
            raise _no_series() if status in NOT_FOUND else _unavailable(f"answered with status {status}") from None
        except requests.RequestException as error:
            raise _unavailable(f"could not be read ({type(error).__name__})") from None
        # From pydicom and the multipart parser.
        except (InvalidDicomError, ValueError, KeyError, AttributeError, EOFError, TypeError):
            raise _unavailable("answered with something else than DICOM instances") from None
    if not count:
        raise _no_series()
    return count


def _authorisation(source: DicomWebSource) -> dict[str, str]:
    if source.token_file is None:
        return {}
    try:
        return {"Authorization": f"Bearer {source.token_file.read_text().strip()}"}
    except OSError as error:
        raise _unavailable(f"has no readable token file ({type(error).__name__})") from None


def _limit(response: "requests.Response", max_bytes: int, deadline: float) -> "requests.Response":
    """Make the body of a response end with an error at a size and at a time."""
    read = response.iter_content

    def iter_content(*arguments: Any, **options: Any) -> Iterator[bytes]:
        size = 0
        for chunk in read(*arguments, **options):
            size += len(chunk)
            if size > max_bytes:
                raise UploadTooLarge(
                    f"The series at the source is larger than {max_bytes >> 20} MiB.",
                    expected=f"at most {max_bytes >> 20} MiB.",
                    advice="Name another series, or raise COUNTERPART_MAX_UPLOAD_MB.",
                )
            if time.monotonic() > deadline:
                raise _unavailable("did not send the series in time")
            yield chunk

    response.iter_content = iter_content  # type: ignore[method-assign]
    return response


def _no_series() -> UnknownSeries:
    return UnknownSeries(
        "The source does not have this series.",
        expected="StudyInstanceUID and SeriesInstanceUID of a series at the source.",
        advice="Correct the UIDs, or send the scan itself.",
    )


def _unavailable(what: str) -> SourceUnavailable:
    return SourceUnavailable(
        f"The source {what}.",
        expected="a DICOMweb service that returns the series (WADO-RS).",
        advice="Try again later. The operator must check COUNTERPART_SOURCES and the source.",
    )
