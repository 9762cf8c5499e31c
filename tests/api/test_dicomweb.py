"""DICOMweb of a served process, with dicomweb-client and with plain HTTP: store, pull, search and retrieve."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pydicom
import pytest
import requests
from dicomweb_client.api import DICOMwebClient
from pydicom.dataset import Dataset
from pydicom.uid import UID

from app.api.catalogue import SERIES_KEYWORDS, STUDY_KEYWORDS
from app.ingest.dicom.instances import tag_of
from tests.api.service_process import RunningService, run_service
from tests.api.support import URL, WAIT, wait_for_state
from tests.support.dicom import SECRET, Series, make_datasets, write_series
from tests.support.phantom import brain, with_lesion
from tests.support.servers import free_port

SERVE = (sys.executable, "-m", "app.cli", "serve")
TYPE = 'multipart/related; type="application/dicom"; boundary=part'
TOKEN = "secret-token"  # noqa: S105 - of this test
PATIENT = {"00100010", "00100020", "00100030"}
REFERENCED, FAILED, OTHERS = "00081199", "00081198", "0008119A"


@dataclass(frozen=True)
class Service:
    running: RunningService
    web: DICOMwebClient
    series: list[Path]  # files of a series with a lesion, which was stored and analysed
    job: str
    log: Path

    @property
    def http(self) -> httpx2.Client:
        return self.running.http

    @property
    def source(self) -> Dataset:
        return pydicom.dcmread(self.series[0])


def connect(port: int, **options: Any) -> DICOMwebClient:
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {TOKEN}"
    return DICOMwebClient(f"http://127.0.0.1:{port}/dicomweb", session=session, **options)


def body(parts: Sequence[bytes]) -> bytes:
    head = b"\r\n--part\r\nContent-Type: application/dicom\r\n\r\n"
    return b"".join(head + part for part in parts) + b"\r\n--part--\r\n"


def post(
    service: Service, parts: Sequence[bytes], path: str = "/dicomweb/studies", kind: str = TYPE
) -> httpx2.Response:
    return service.http.post(path, content=body(parts), headers={"Content-Type": kind})


@pytest.fixture(scope="module")
def service(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    paths = write_series(folder / "series", with_lesion(brain(), (25.0, 10.0, 20.0)))
    (folder / "token").write_text(TOKEN)
    # The service is a source of itself. Nothing listens on the second port.
    settings = {"models": str(tiny_models), "threads": "1", "drain_seconds": "0", "token": TOKEN}
    settings |= {"sources": str(folder / "sources.toml"), "max_upload_mb": "30", "max_files": "400"}
    with run_reserved(folder, settings) as running:
        running.http.headers["Authorization"] = f"Bearer {TOKEN}"
        web = connect(running.port)
        stored = web.store_instances([pydicom.dcmread(path) for path in paths])
        assert len(stored.ReferencedSOPSequence) == len(paths)
        (job,) = running.http.get(URL).json()["scans"]
        wait_for_state(running.http, job["id"], "succeeded")
        yield Service(running, web, paths, job["id"], folder / "log")


def run_reserved(folder: Path, settings: dict[str, str]) -> Any:
    """Start the service with a file of sources, which must exist before its port is known."""
    closed = free_port()
    (folder / "sources.toml").write_text(
        f'[sources.closed]\nurl = "http://127.0.0.1:{closed}/dicomweb"\n'
        f'[sources.wrong]\nurl = "http://127.0.0.1:{closed}/other"\n'
    )
    return run_service(folder / "store", folder / "log", SERVE, {}, **settings)


# ---- store -------------------------------------------------------------------------------------


def test_stored_series_has_all_results(service: Service) -> None:
    shown = service.http.get(f"{URL}/{service.job}").json()
    assert {"segmentation", "structured_report", "capture", "parametric_map"} <= shown["links"].keys()


@pytest.mark.parametrize("chunk_size", [10_000, 10**8], ids=["chunked", "whole"])
def test_answer_names_every_instance_with_its_url(service: Service, chunk_size: int) -> None:
    """Chunks of 10 kB cut boundaries, headers and pixels."""
    web = connect(service.running.port, chunk_size=chunk_size)
    datasets = [pydicom.dcmread(path) for path in service.series]
    stored = web.store_instances(datasets)
    assert {item.ReferencedSOPInstanceUID for item in stored.ReferencedSOPSequence} == {
        dataset.SOPInstanceUID for dataset in datasets
    }
    assert "FailedSOPSequence" not in stored
    assert stored.RetrieveURL.endswith(f"/dicomweb/studies/{datasets[0].StudyInstanceUID}")
    # The URL has the host of the request. dicomweb-client leaves out the port in the header Host.
    retrieved = service.http.get(urlsplit(stored.ReferencedSOPSequence[3].RetrieveURL).path)
    assert retrieved.status_code == 200
    assert service.series[3].read_bytes() in retrieved.content


def test_same_series_is_the_same_job(service: Service) -> None:
    answer = post(service, [path.read_bytes() for path in reversed(service.series)])
    assert (answer.status_code, answer.headers["Counterpart-Jobs"]) == (200, service.job)
    assert answer.headers["content-type"] == "application/dicom+json"


def test_each_series_becomes_a_job(service: Service) -> None:
    sets = [make_datasets(brain(), Series(name=name)) for name in ("first", "second")]
    parts = [encode(dataset) for pair in zip(*sets, strict=True) for dataset in pair]  # mixed
    answer = post(service, parts)
    jobs = answer.headers["Counterpart-Jobs"].split(",")
    assert (answer.status_code, len(set(jobs))) == (200, 2)
    for job in jobs:
        wait_for_state(service.http, job, "succeeded")
        service.http.delete(f"{URL}/{job}")


def encode(dataset: Dataset) -> bytes:
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_failures_are_named_by_instance(service: Service) -> None:
    slices = make_datasets(brain(), Series(name="partly"))
    other_study, report = slices.pop(), slices.pop()
    other_study.StudyInstanceUID = "1.2.3"
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.88.33")
    parts = [*map(encode, slices), encode(other_study), encode(report), b"no DICOM at all", encode(slices[0])[:300]]
    answer = post(service, parts, f"/dicomweb/studies/{slices[0].StudyInstanceUID}")
    document = answer.json()
    assert answer.status_code == 202
    assert len(document[REFERENCED]["Value"]) == len(slices)
    failed = {item["00081155"]["Value"][0]: hex(item["00081197"]["Value"][0]) for item in document[FAILED]["Value"]}
    assert failed == {other_study.SOPInstanceUID: "0xa900", report.SOPInstanceUID: "0x122"}
    assert [hex(item["00081197"]["Value"][0]) for item in document[OTHERS]["Value"]] == ["0xc000", "0xc000"]
    service.http.delete(f"{URL}/{answer.headers['Counterpart-Jobs']}")


def test_nothing_stored_is_a_conflict(service: Service) -> None:
    answer = post(service, [b"no DICOM", b"neither"])
    assert answer.status_code == 409
    assert REFERENCED not in answer.json()
    assert len(answer.json()[OTHERS]["Value"]) == 2
    assert "Counterpart-Jobs" not in answer.headers


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b"", TYPE, 400, "empty_upload"),
        (body([b"DICM"])[:-8], TYPE, 400, "bad_request"),
        (b"no boundary", 'multipart/related; type="application/dicom"', 400, "bad_request"),
        (b"{}", 'multipart/related; type="application/dicom+json"; boundary=part', 415, "not_an_image_format"),
        (b"DICM", "application/dicom", 415, "not_an_image_format"),
        (body([b"x"] * 401), TYPE, 413, "upload_too_large"),
        (body([bytes(31 << 20)]), TYPE, 413, "upload_too_large"),
    ],
)
def test_malformed_request_is_refused(service: Service, content: bytes, kind: str, status: int, code: str) -> None:
    answer = service.http.post("/dicomweb/studies", content=content, headers={"Content-Type": kind})
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_token_is_needed(service: Service) -> None:
    for method, path in (("POST", "/dicomweb/studies"), ("GET", "/dicomweb/studies"), ("GET", "/dicomweb/studies/1.2")):
        answer = service.http.request(method, path, headers={"Authorization": "Bearer wrong"})
        assert answer.status_code == 401


# ---- search ------------------------------------------------------------------------------------


def test_search_for_studies(service: Service) -> None:
    source = service.source
    (found,) = service.web.search_for_studies(search_filters={"StudyInstanceUID": source.StudyInstanceUID})
    study = Dataset.from_json(found)
    assert study.PatientName == source.PatientName
    assert study.PatientID == source.PatientID
    assert sorted(study.ModalitiesInStudy) == ["MR", "OT", "SEG", "SR"]
    assert study.NumberOfStudyRelatedInstances == len(service.series) + 4
    assert study.NumberOfStudyRelatedSeries == 5
    assert service.web.search_for_studies(search_filters={"StudyInstanceUID": "1.2.3.4"}) == []
    assert service.http.get("/dicomweb/studies?StudyInstanceUID=1.2.3.4").status_code == 204


@pytest.mark.parametrize(
    ("query", "modalities"),
    [
        ("", {"MR", "SEG", "SR", "OT"}),
        ("?Modality=SEG", {"SEG"}),
        ("?00080060=S*", {"SEG", "SR"}),
        ("?Modality=CT", set()),
        ("?ModalitiesInStudy=SEG&includefield=all&fuzzymatching=false", {"SEG"}),
        ("?StudyDate=19000101-20991231&Modality=S?", {"SR"}),
        ("?StudyDate=20991231-", set()),
    ],
)
def test_search_for_series(service: Service, query: str, modalities: set[str]) -> None:
    answer = service.http.get(f"/dicomweb/studies/{service.source.StudyInstanceUID}/series{query}")
    assert answer.status_code == (200 if modalities else 204)
    found = answer.json() if modalities else []
    assert {item["00080060"]["Value"][0] for item in found} == modalities


def test_search_for_instances_in_pages(service: Service) -> None:
    source = service.source
    everything = {str(pydicom.dcmread(path).SOPInstanceUID) for path in service.series}
    found: list[str] = []
    while True:
        path = f"/dicomweb/studies/{source.StudyInstanceUID}/series/{source.SeriesInstanceUID}/instances"
        answer = service.http.get(f"{path}?limit=20&offset={len(found)}")
        found += [item["00080018"]["Value"][0] for item in answer.json()]
        if "Warning" not in answer.headers:
            break
        assert answer.headers["Warning"].startswith("299 ")
    assert (len(found), set(found)) == (len(everything), everything)


@pytest.mark.parametrize("path", ["/dicomweb/series", "/dicomweb/studies/{study}/series"])
def test_every_attribute_of_an_answer_is_a_key(service: Service, path: str) -> None:
    """Keys that the database checks, and those that need the files, with a value and with a wildcard."""
    study = str(service.source.StudyInstanceUID)
    path = path.format(study=study)
    (series,) = service.http.get(f"{path}?StudyInstanceUID={study}&Modality=SEG").json()
    keys = {str(tag_of(keyword)) for keyword in (*STUDY_KEYWORDS, *SERIES_KEYWORDS)} & series.keys()
    values = {tag: str(series[tag]["Value"][0]) for tag in keys - PATIENT if series[tag].get("Value")}
    assert {"0020000D", "0020000E", "00080060", "00080020", "00200011"} <= values.keys()
    for tag, value in values.items():
        if series[tag]["vr"] == "PN":
            continue
        for wanted in (value, f"{value[:-1]}?", f"{value[0]}*"):
            answer = service.http.get(path, params={tag: wanted})
            found = answer.json() if answer.status_code == 200 else []
            assert series["0020000E"] in [item["0020000E"] for item in found], (tag, wanted)
        assert service.http.get(path, params={tag: f"{value}~"}).status_code == 204, tag


@pytest.mark.parametrize("path", ["studies", "series", "instances"])
def test_search_with_another_media_type_is_refused(service: Service, path: str) -> None:
    answer = service.http.get(f"/dicomweb/{path}", headers={"Accept": "application/dicom+xml"})
    assert (answer.status_code, answer.json()["code"]) == (406, "not_acceptable")


@pytest.mark.parametrize(
    "query", ["PatientName=Somebody", "00100020=1", "PatientBirthDate=2000", "Nonsense=1", "limit=0"]
)
def test_search_by_patient_or_unknown_key_is_refused(service: Service, query: str) -> None:
    answer = service.http.get(f"/dicomweb/series?{query}")
    assert answer.status_code == 400
    assert "Somebody" not in answer.text


# ---- retrieve ----------------------------------------------------------------------------------


def test_results_are_retrieved_unchanged(service: Service) -> None:
    names = ("segmentation.dcm", "report.dcm", "capture.dcm", "anomaly.dcm")
    for name in names:
        made = pydicom.dcmread(BytesIO(service.http.get(f"{URL}/{service.job}/{name}").content))
        uids = (made.StudyInstanceUID, made.SeriesInstanceUID, made.SOPInstanceUID)
        assert service.web.retrieve_instance(*uids) == made
        (retrieved,) = service.web.retrieve_series(*uids[:2])
        assert retrieved == made


def test_study_has_the_scan_and_its_results(service: Service) -> None:
    retrieved = {dataset.SOPInstanceUID: dataset for dataset in service.web.iter_study(service.source.StudyInstanceUID)}
    assert len(retrieved) == len(service.series) + 4
    for dataset in map(pydicom.dcmread, service.series):
        assert retrieved[dataset.SOPInstanceUID] == dataset


def test_metadata(service: Service) -> None:
    source = service.source
    documents = service.web.retrieve_study_metadata(source.StudyInstanceUID)
    assert len(documents) == len(service.series) + 4
    for document in documents:
        assert "7FE00010" not in document
        assert document["00083002"]["Value"] == ["1.2.840.10008.1.2.1"]
    (document,) = [item for item in documents if item["00080018"]["Value"] == [source.SOPInstanceUID]]
    read = Dataset.from_json(document)
    assert (read.PatientName, read.Rows, read.PixelSpacing) == (source.PatientName, source.Rows, source.PixelSpacing)


def test_frames(service: Service) -> None:
    """Frames of the source, of the capture, of the map, and of the segmentation, whose frames are not whole bytes."""
    source = service.source
    uids = (source.StudyInstanceUID, source.SeriesInstanceUID, source.SOPInstanceUID)
    (frame,) = service.web.retrieve_instance_frames(*uids, [1])
    assert frame == source.PixelData[: len(frame)]
    assert len(frame) == source.Rows * source.Columns * 2
    for name in ("anomaly.dcm", "segmentation.dcm"):
        made = pydicom.dcmread(BytesIO(service.http.get(f"{URL}/{service.job}/{name}").content))
        uids = (made.StudyInstanceUID, made.SeriesInstanceUID, made.SOPInstanceUID)
        frames = service.web.retrieve_instance_frames(*uids, [2, 3])
        for number, frame in zip((2, 3), frames, strict=True):
            expected = made.pixel_array[number - 1]
            if name == "segmentation.dcm":
                pixels = np.unpackbits(np.frombuffer(frame, np.uint8), bitorder="little")[: expected.size]
            else:
                pixels = np.frombuffer(frame, np.uint16)
            np.testing.assert_array_equal(pixels.reshape(expected.shape), expected)


def test_unknown_uids_and_media_types_are_refused(service: Service) -> None:
    study = f"/dicomweb/studies/{service.source.StudyInstanceUID}"
    series = f"{study}/series/{service.source.SeriesInstanceUID}"
    frames = f"{series}/instances/{service.source.SOPInstanceUID}/frames"
    for path in ("/dicomweb/studies/1.2.3", f"{study}/series/1.2", f"{series}/instances/1.2/metadata", f"{frames}/2"):
        answer = service.http.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    for path, accept in ((study, "application/dicom+json"), (f"{study}/metadata", "multipart/related")):
        answer = service.http.get(path, headers={"Accept": accept})
        assert (answer.status_code, answer.json()["code"]) == (406, "not_acceptable")


@pytest.mark.parametrize("frames", [",", "1,", ",1", "1,,2"])
def test_malformed_lists_of_frames_are_refused(service: Service, frames: str) -> None:
    source = service.source
    series = f"/dicomweb/studies/{source.StudyInstanceUID}/series/{source.SeriesInstanceUID}"
    answer = service.http.get(f"{series}/instances/{source.SOPInstanceUID}/frames/{frames}")
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


def test_erased_job_is_not_found(service: Service) -> None:
    slices = make_datasets(brain(), Series(name="erased"))
    for dataset in slices:
        dataset.StudyInstanceUID = "1.2.840.4711"
    job = post(service, [*map(encode, slices)]).headers["Counterpart-Jobs"]
    wait_for_state(service.http, job, "succeeded")
    assert service.http.get("/dicomweb/studies/1.2.840.4711").status_code == 200
    service.http.delete(f"{URL}/{job}")
    assert service.http.get("/dicomweb/studies/1.2.840.4711").status_code == 404
    assert service.http.get("/dicomweb/studies?StudyInstanceUID=1.2.840.4711").status_code == 204


# ---- pull --------------------------------------------------------------------------------------


def pull(service: Service, **document: object) -> httpx2.Response:
    named = {"source": "closed", "study": "1.2", "series": "1.2.3"} | document
    return service.http.post(URL, content=json.dumps(named), headers={"Content-Type": "application/json", **WAIT})


@pytest.mark.parametrize(
    ("document", "status", "code"),
    [
        ({"source": "other"}, 404, "unknown_source"),
        ({"source": "http://127.0.0.1/dicomweb"}, 404, "unknown_source"),
        ({"source": "closed"}, 502, "source_unavailable"),
        ({"study": "../../x"}, 400, "bad_request"),
        ({"series": "1.2/../3"}, 400, "bad_request"),
        ({"url": "http://127.0.0.1"}, 400, "bad_request"),
        ({"study": None}, 400, "bad_request"),
        ({"source": "x" * 20_000}, 413, "upload_too_large"),
    ],
)
def test_pull_is_refused(service: Service, document: dict[str, object], status: int, code: str) -> None:
    answer = pull(service, **document)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


def test_log_has_no_patient(service: Service) -> None:
    time.sleep(0.2)
    log = service.log.read_text()
    assert "/dicomweb/studies" in log
    assert SECRET not in log
    assert "Somebody" not in log
