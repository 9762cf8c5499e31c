"""DICOMweb for the results of jobs and their scans: search (QIDO-RS) and retrieve (WADO-RS), PS3.18 10.4 and 10.6.

Names and ids of patients are in the answers only. A search by them is refused, because its URL would contain them.
"""

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse, StreamingResponse

from app.api.catalogue import (
    INSTANCE,
    INSTANCE_KEYWORDS,
    MODALITY,
    SERIES,
    SERIES_KEYWORDS,
    SOP_CLASS,
    STUDY,
    STUDY_DATE,
    STUDY_KEYWORDS,
    UID_TAGS,
    Catalogue,
    Entry,
)
from app.api.dependencies import ServicesDependency
from app.api.identity import require
from app.api.problems import problem_responses
from app.api.stow import DICOM_JSON, StudyUid, base_url
from app.errors import BadRequest, NotAcceptable, NotFound
from app.ingest.dicom.instances import DicomJson, read_attributes, read_frames, tag_of, vr_of
from app.jobs.instances import InstanceFilter, Level

router = APIRouter(prefix="/dicomweb", tags=["DICOMweb"])
_LIST, _SHOW, _DOWNLOAD = ([Depends(require("read", action))] for action in ("list", "show", "download"))

SeriesUid = Annotated[str, PathParameter(description="SeriesInstanceUID.", pattern=r"^[0-9.]{1,64}$")]
InstanceUid = Annotated[str, PathParameter(description="SOPInstanceUID.", pattern=r"^[0-9.]{1,64}$")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Largest number of matches.")]
Offset = Annotated[int, Query(ge=0, description="Matches to leave out.")]

_MODALITIES = "00080061"
# A URL ends up in the logs of proxies.
_PATIENT = frozenset(tag_of(keyword) for keyword in ("PatientName", "PatientID", "PatientBirthDate"))
_KEYWORDS: Mapping[Level, tuple[str, ...]] = {
    "study": STUDY_KEYWORDS,
    "series": (*STUDY_KEYWORDS, *SERIES_KEYWORDS),
    "instance": (*STUDY_KEYWORDS, *SERIES_KEYWORDS, *INSTANCE_KEYWORDS),
}
# Keys that the database checks, if their values have no wildcard.
_INDEXED = {STUDY: "study", SERIES: "series", INSTANCE: "instance", SOP_CLASS: "sop_class", MODALITY: "modality"}
_RANGE = re.compile(r"(?=.*\d)([\d.]*)-([\d.]*)")
_MATCHED = {tag_of(keyword) for keyword in (*STUDY_KEYWORDS, *SERIES_KEYWORDS, *INSTANCE_KEYWORDS)} | {_MODALITIES}
# Only these have ranges (PS3.4 C.2.2.2.5). An accession number may have a hyphen too.
_WITH_RANGE = {tag for tag in _MATCHED if tag is not None and vr_of(tag) in ("DA", "TM", "DT")}
_OPTIONS = ("limit", "offset", "includefield", "fuzzymatching")
_BLOCK = 1 << 20

_JSON: dict[int | str, dict[str, Any]] = {
    200: {"content": {DICOM_JSON: {"schema": {"type": "array", "items": {"type": "object"}}}}}
}
_FILES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"multipart/related": {"schema": {"type": "string", "format": "binary"}}}}
}
_SEARCH: dict[int | str, dict[str, Any]] = {**_JSON, 204: {"description": "No match"}}
_SEARCH |= problem_responses(400, 401, 403, 404, 406, 413, 503)
_METADATA: dict[int | str, dict[str, Any]] = {**_JSON, **problem_responses(400, 401, 403, 404, 406, 503)}
_RETRIEVE: dict[int | str, dict[str, Any]] = {**_FILES, **problem_responses(400, 401, 403, 404, 406, 503)}


# ---- search ------------------------------------------------------------------------------------


@router.get("/studies", dependencies=_LIST, responses=_SEARCH)
async def search_studies(
    request: Request, services: ServicesDependency, limit: Limit = 100, offset: Offset = 0
) -> Response:
    """Search for studies."""
    return await _search(request, services, "study", (limit, offset))


@router.get("/series", dependencies=_LIST, responses=_SEARCH)
async def search_series(
    request: Request, services: ServicesDependency, limit: Limit = 100, offset: Offset = 0
) -> Response:
    """Search for series of all studies. Without StudyInstanceUID, only results are found."""
    return await _search(request, services, "series", (limit, offset))


@router.get("/instances", dependencies=_LIST, responses=_SEARCH)
async def search_instances(
    request: Request, services: ServicesDependency, limit: Limit = 100, offset: Offset = 0
) -> Response:
    """Search for instances of all studies. Without StudyInstanceUID, only results are found."""
    return await _search(request, services, "instance", (limit, offset))


@router.get("/studies/{study}/series", dependencies=_LIST, responses=_SEARCH)
async def search_series_of_study(
    request: Request, services: ServicesDependency, study: StudyUid, limit: Limit = 100, offset: Offset = 0
) -> Response:
    """Search for series of a study."""
    return await _search(request, services, "series", (limit, offset), study)


@router.get("/studies/{study}/instances", dependencies=_LIST, responses=_SEARCH)
async def search_instances_of_study(
    request: Request, services: ServicesDependency, study: StudyUid, limit: Limit = 1000, offset: Offset = 0
) -> Response:
    """Search for instances of a study."""
    return await _search(request, services, "instance", (limit, offset), study)


@router.get("/studies/{study}/series/{series}/instances", dependencies=_LIST, responses=_SEARCH)
async def search_instances_of_series(
    request: Request,
    services: ServicesDependency,
    study: StudyUid,
    series: SeriesUid,
    limit: Limit = 1000,
    offset: Offset = 0,
) -> Response:
    """Search for instances of a series."""
    return await _search(request, services, "instance", (limit, offset), study, series)


async def _search(
    request: Request,
    services: ServicesDependency,
    level: Level,
    page: tuple[int, int],
    *uids: str,
) -> Response:
    _check_accept(request, DICOM_JSON)
    keys = _matching_keys(request)
    scope = list(uids)
    if not scope and re.fullmatch(r"[0-9.]{1,64}", keys.get(STUDY, "")):
        scope = [keys[STUDY]]
    limit, offset = page
    groups, total = await services.calls.transfer(_find_groups, services.catalogue, level, keys, scope, limit, offset)
    shown = [_describe(level, group, _KEYWORDS[level], base_url(request, services)) for group in groups]
    if not shown:
        return Response(status_code=204)
    remaining = total - offset - len(shown)
    warning = f'299 - "There are {remaining} additional results that can be requested"'
    return JSONResponse(shown, headers={"Warning": warning} if remaining else {}, media_type=DICOM_JSON)


def _find_groups(
    catalogue: Catalogue, level: Level, keys: Mapping[str, str], uids: Sequence[str], limit: int, offset: int
) -> tuple[list[list[Entry]], int]:
    """Return a page of the matching studies, series or instances, and the number of all."""

    def matches(group: Sequence[Entry]) -> bool:
        return any(_matches(entry, keys, group) for entry in group)

    if uids:
        groups = list(filter(matches, _group(catalogue.find(*uids), UID_TAGS[level])))
        return groups[offset:][:limit], len(groups)
    wanted, is_complete = _to_filter(keys)
    return catalogue.search(level, wanted, limit, offset, None if is_complete else matches)


def _to_filter(keys: Mapping[str, str]) -> tuple[InstanceFilter, bool]:
    """Return the conditions that the database can check, and whether they are all."""
    accepted: dict[str, list[str]] = {}
    modalities: list[str] = []
    dates = ("", "")
    is_complete = True
    for tag, wanted in keys.items():
        period = _RANGE.fullmatch(wanted) if tag == STUDY_DATE else None
        if period is not None:
            dates = (period[1], period[2])
        elif {"*", "?"} & set(wanted) or tag not in {*_INDEXED, STUDY_DATE, _MODALITIES}:
            is_complete = False
        elif tag == _MODALITIES:
            modalities = _options(tag, wanted)
        else:
            accepted[_INDEXED.get(tag, "study_date")] = _options(tag, wanted)
    return InstanceFilter(accepted, *dates, modalities), is_complete


def _options(tag: str, wanted: str) -> list[str]:
    """Return the alternatives of a list of values. In a text such as a description, a comma belongs to the value."""
    is_text = vr_of(tag) in ("LO", "SH")
    return re.split(r"\\" if is_text else r"[,\\]", wanted)


def _matching_keys(request: Request) -> dict[str, str]:
    """Return the value of each key, by tag."""
    keys = {}
    for name, value in request.query_params.multi_items():
        if name in _OPTIONS:
            continue
        tag = tag_of(name)
        if tag is None or tag not in _MATCHED:
            raise BadRequest(
                "The query has an unknown parameter.",
                expected=f"{', '.join(_OPTIONS)}, or a keyword or tag of docs/dicomweb.md.",
                advice="Correct the name of the parameter, or remove it.",
            )
        if tag in _PATIENT:
            raise BadRequest(
                "The query searches by an attribute of the patient, which would be part of the URL.",
                expected="StudyInstanceUID, AccessionNumber, StudyDate or another key without the patient.",
                advice="Search for the study in the PACS, and use its StudyInstanceUID here.",
            )
        if value:
            keys[tag] = value
    return keys


def _group(entries: Sequence[Entry], tag: str) -> list[list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.uid(tag), []).append(entry)
    return list(groups.values())


def _matches(entry: Entry, keys: Mapping[str, str], group: Sequence[Entry]) -> bool:
    for tag, wanted in keys.items():
        if tag == _MODALITIES:
            values = [str(value) for other in group for value in other.attributes.get(MODALITY, {}).get("Value", [])]
        else:
            values = [str(value) for value in entry.attributes.get(tag, {}).get("Value", [])]
        if not any(_matches_value(tag, value, wanted) for value in values):
            return False
    return True


def _matches_value(tag: str, value: str, wanted: str) -> bool:
    """Return whether a value matches a key: single value, list of UIDs, range of dates or times, or wildcards."""
    period = _RANGE.fullmatch(wanted) if tag in _WITH_RANGE else None
    if period is not None:
        low, high = period.groups()
        return (not low or value >= low) and (not high or value[: len(high)] <= high)
    return any(fnmatchcase(value, re.sub(r"\[", "[[]", option)) for option in _options(tag, wanted))


def _describe(level: str, group: Sequence[Entry], keywords: Sequence[str], base: str) -> DicomJson:
    """Return the attributes of a study, series or instance in the answer of a search."""
    first = group[0]
    tags = sorted(str(tag_of(keyword)) for keyword in keywords)
    found: DicomJson = {tag: first.attributes[tag] for tag in tags if tag in first.attributes}
    found["00080005"] = first.attributes["00080005"]
    found["00080056"] = {"vr": "CS", "Value": ["ONLINE"]}
    url = f"{base}/studies/{first.uid(STUDY)}"
    if level == "study":
        modalities = sorted({str(value) for e in group for value in e.attributes.get(MODALITY, {}).get("Value", [])})
        found[_MODALITIES] = {"vr": "CS", "Value": modalities}
        found["00201206"] = {"vr": "IS", "Value": [len({entry.uid(SERIES) for entry in group})]}
        found["00201208"] = {"vr": "IS", "Value": [len(group)]}
    if level == "series":
        found["00201209"] = {"vr": "IS", "Value": [len(group)]}
    if level != "study":
        url += f"/series/{first.uid(SERIES)}"
    if level == "instance":
        url += f"/instances/{first.uid(INSTANCE)}"
    found["00081190"] = {"vr": "UR", "Value": [url]}
    return found


# ---- retrieve ----------------------------------------------------------------------------------


@router.get("/studies/{study}", dependencies=_DOWNLOAD, responses=_RETRIEVE)
async def retrieve_study(request: Request, services: ServicesDependency, study: StudyUid) -> Response:
    """Retrieve the instances of a study."""
    return await _retrieve(request, services, study)


@router.get("/studies/{study}/series/{series}", dependencies=_DOWNLOAD, responses=_RETRIEVE)
async def retrieve_series(
    request: Request, services: ServicesDependency, study: StudyUid, series: SeriesUid
) -> Response:
    """Retrieve the instances of a series."""
    return await _retrieve(request, services, study, series)


@router.get("/studies/{study}/series/{series}/instances/{instance}", dependencies=_DOWNLOAD, responses=_RETRIEVE)
async def retrieve_instance(
    request: Request, services: ServicesDependency, study: StudyUid, series: SeriesUid, instance: InstanceUid
) -> Response:
    """Retrieve an instance."""
    return await _retrieve(request, services, study, series, instance)


@router.get("/studies/{study}/metadata", dependencies=_SHOW, responses=_METADATA)
async def retrieve_study_metadata(request: Request, services: ServicesDependency, study: StudyUid) -> Response:
    """Retrieve the attributes of the instances of a study, without pixel data."""
    return await _metadata(request, services, study)


@router.get("/studies/{study}/series/{series}/metadata", dependencies=_SHOW, responses=_METADATA)
async def retrieve_series_metadata(
    request: Request, services: ServicesDependency, study: StudyUid, series: SeriesUid
) -> Response:
    """Retrieve the attributes of the instances of a series, without pixel data."""
    return await _metadata(request, services, study, series)


@router.get("/studies/{study}/series/{series}/instances/{instance}/metadata", dependencies=_SHOW, responses=_METADATA)
async def retrieve_instance_metadata(
    request: Request, services: ServicesDependency, study: StudyUid, series: SeriesUid, instance: InstanceUid
) -> Response:
    """Retrieve the attributes of an instance, without pixel data."""
    return await _metadata(request, services, study, series, instance)


@router.get(
    "/studies/{study}/series/{series}/instances/{instance}/frames/{frames}", dependencies=_DOWNLOAD, responses=_RETRIEVE
)
async def retrieve_frames(
    request: Request,
    services: ServicesDependency,
    study: StudyUid,
    series: SeriesUid,
    instance: InstanceUid,
    frames: Annotated[
        str, PathParameter(description="Numbers from 1, separated by commas.", pattern=r"^[0-9,]{1,500}$")
    ],
) -> Response:
    """Retrieve frames of an instance as they are stored."""
    _check_accept(request, "multipart/related")
    numbers = _frame_numbers(frames)
    entries = await _find(request, services, study, series, instance)
    syntax, parts = await services.calls.transfer(_read_frames, services.catalogue, entries[0], numbers)
    kind = "application/octet-stream"
    return _multipart(kind, ((f"{kind}; transfer-syntax={syntax}", iter([part])) for part in parts))


def _frame_numbers(frames: str) -> list[int]:
    numbers = frames.split(",")
    if not all(numbers):
        raise BadRequest(
            "The list of frames has an empty entry.",
            expected="numbers from 1, separated by single commas, such as frames/1,3.",
            advice="Correct the list.",
        )
    return [int(number) for number in numbers]


async def _find(request: Request, services: ServicesDependency, *uids: str) -> list[Entry]:
    entries = await services.calls.transfer(services.catalogue.find, *uids)
    if not entries:
        raise _not_found()
    request.state.jobs = sorted({entry.job for entry in entries})  # for the audit trail
    return entries


async def _retrieve(request: Request, services: ServicesDependency, *uids: str) -> Response:
    _check_accept(request, "multipart/related")
    entries = await _find(request, services, *uids)
    kind = "application/dicom"
    return _multipart(kind, ((kind, _read_blocks(services.catalogue, entry)) for entry in entries))


async def _metadata(request: Request, services: ServicesDependency, *uids: str) -> Response:
    _check_accept(request, DICOM_JSON)
    entries = await _find(request, services, *uids)

    def read() -> list[DicomJson]:
        documents = []
        for entry in entries:
            with services.catalogue.open(entry) as path:
                if path is not None:
                    documents.append(read_attributes(path))
        return documents

    return JSONResponse(await services.calls.transfer(read), media_type=DICOM_JSON)


def _read_frames(catalogue: Catalogue, entry: Entry, numbers: Sequence[int]) -> tuple[str, list[bytes]]:
    with catalogue.open(entry) as path:
        try:
            if path is None:
                raise _not_found()
            return read_frames(path, numbers)
        except IndexError:
            raise _not_found() from None


def _read_blocks(catalogue: Catalogue, entry: Entry) -> Iterator[bytes]:
    """Yield an instance in blocks: nothing if its job was erased in the meantime."""
    with catalogue.open(entry) as path:
        if path is None:
            return
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block


def _multipart(kind: str, parts: Iterator[tuple[str, Iterator[bytes]]]) -> Response:
    """Return a multipart/related response. Its body is read block by block while it is sent."""
    boundary = secrets.token_hex(16)

    def body() -> Iterator[bytes]:
        for content_type, blocks in parts:
            yield f"--{boundary}\r\nContent-Type: {content_type}\r\n\r\n".encode()
            yield from blocks
            yield b"\r\n"
        yield f"--{boundary}--\r\n".encode()

    return StreamingResponse(body(), media_type=f'multipart/related; type="{kind}"; boundary={boundary}')


def _check_accept(request: Request, offered: str) -> None:
    """Refuse a request whose Accept header excludes what the path returns."""
    accept = request.headers.get("accept", "*/*")
    names = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    alternatives = {"*/*", offered, f"{offered.partition('/')[0]}/*"}
    if offered == DICOM_JSON:
        alternatives.add("application/json")
    if names.isdisjoint(alternatives):
        raise NotAcceptable(
            "The header Accept excludes what this path returns.",
            expected=f"Accept: {offered}.",
            advice="Correct the header, or send none.",
        )


def _not_found() -> NotFound:
    return NotFound(
        "No result or scan of a job has these UIDs.",
        expected="UIDs from a search (GET /dicomweb/studies).",
        advice="Search again. An erased job has no instances.",
    )
