"""A patient's name in every place that a scan has for one: no log, metric or error repeats it."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydicom.config import disable_value_validation
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit

from app.api.logging import ALLOWED_KEYS
from tests.api.service_process import CHECKOUT, WITH_SUBPROCESS, RunningService, run_service
from tests.api.support import fake_scan
from tests.support.dicom import SECRET, Series, datasets, save, zipped
from tests.support.phantom import brain

URL = "/v1/scans"
CLI = (sys.executable, "-m", "app.cli")
# Text that a scanner or a person may fill in; beside them PatientName and others, which every series here has.
TEXTS = (
    *("AccessionNumber", "StudyID", "StudyDescription", "SeriesDescription", "ProtocolName", "InstitutionName"),
    *("StationName", "PerformingPhysicianName", "OperatorsName", "PatientComments", "ImageComments", "SequenceName"),
    *("OtherPatientIDs", "PatientAddress", "PatientTelephoneNumbers", "AdditionalPatientHistory", "DeviceSerialNumber"),
)


def planted(series: Series | None = None) -> list[FileDataset]:
    """A series with the name in every text, in a private element, and in a nested one."""
    slices = datasets(brain(), series or Series())
    for dataset in slices:
        for keyword in TEXTS:
            setattr(dataset, keyword, SECRET)
        block = dataset.private_block(0x0011, SECRET, create=True)
        block.add_new(0x01, "LO", SECRET)
        nested = FileDataset("", {})
        nested.ReferencedSOPInstanceUID, nested.ContentDescription = "1.2.3", SECRET
        dataset.ReferencedImageSequence = [nested]
    return slices


def gap(slices: list[FileDataset]) -> None:
    del slices[len(slices) // 2]


def two_series(slices: list[FileDataset]) -> None:
    slices += planted(Series(name=SECRET, description=SECRET))


def no_pixels(slices: list[FileDataset]) -> None:
    for dataset in slices:
        dataset.PixelData = SECRET.encode() + b"!"


def no_jpeg(slices: list[FileDataset]) -> None:
    for dataset in slices:
        dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        dataset.PixelData = encapsulate([b"\xff\xd8" + SECRET.encode() * 20 + b"\xff\xd9"])
        dataset["PixelData"].VR = "OB"


def strange_letters(slices: list[FileDataset]) -> None:
    for dataset in slices:
        dataset.SpecificCharacterSet = SECRET


def of_another_kind(slices: list[FileDataset]) -> None:
    for dataset in slices:
        dataset.Modality, dataset.PhotometricInterpretation = SECRET, SECRET


CASES: tuple[Callable[[list[FileDataset]], None], ...] = (
    *(gap, two_series, no_pixels, no_jpeg, strange_letters, of_another_kind),
    lambda _: None,
)


# Where a slice is cut off: in its header, behind most of the names.
CUT = 1500


def sendings(folder: Path) -> Iterator[Path]:
    """Zips, with the name in their own and in the names of their files too: those of CASES, and damaged ones."""
    for number, spoil in enumerate(CASES):
        slices = planted()
        spoil(slices)
        files = [path.rename(path.with_name(f"{SECRET}-{path.name}")) for path in save(folder / str(number), slices)]
        yield zipped(folder / f"{SECRET}-{number}.zip", files)
    whole = (folder / f"{SECRET}-{len(CASES) - 1}.zip").read_bytes()
    half = folder / f"{SECRET}-half.zip"
    half.write_bytes(whole[: len(whole) // 2])
    yield half
    files[-1].write_bytes(files[-1].read_bytes()[:CUT])
    yield zipped(folder / f"{SECRET}-cut.zip", files)
    text = folder / f"{SECRET}.txt"
    text.write_text(SECRET)
    yield zipped(folder / f"{SECRET}-text.zip", [text])


SENDINGS = len(CASES) + 3


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    with disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name is neither a modality nor an encoding
        return list(sendings(tmp_path_factory.mktemp("planted")))


def test_names_in_headers_appear_in_no_log_metric_or_error(
    scans: list[Path], tiny_models: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with run_service(tmp_path / "store", log, (*CLI, "serve"), models=str(tiny_models), threads="1") as service:
        told, outcomes = _send_all(service, scans)
    assert outcomes[len(CASES) - 1] == "succeeded"  # the good one
    assert len(set(outcomes)) >= 5, outcomes
    assert SECRET.lower() not in told.lower()
    text = log.read_text()
    assert SECRET.lower() not in text.lower()
    assert {key for line in text.splitlines() for key in json.loads(line)} <= ALLOWED_KEYS


def _send_all(service: RunningService, scans: list[Path]) -> tuple[str, list[str]]:
    """All that is told about them, and how each ended."""
    told, outcomes = [], []
    wait = {"Prefer": "wait=120"}
    for number, path in enumerate(scans):
        form = {"file": (path.name, path.read_bytes())}
        answer = service.http.post(
            f"{URL}?seed={number}", files=form, headers={**wait, "Idempotency-Key": f"{SECRET}-{number}"}
        )
        outcomes.append(answer.json().get("code") or answer.json()["state"])
        told.append(answer.text)
        if "location" in answer.headers:
            job = answer.headers["location"]
            told += [service.http.get(f"{job}{part}").text for part in ("", "/events", "/report.json", "/mask.nii.gz")]
    for place in ("/metrics", URL, f"{URL}?model={SECRET}&after={SECRET}", f"{URL}?code={SECRET}", "/readyz"):
        told.append(service.http.get(place).text)
    for name in ("series", "model", "seed", "geometry", "priority", "patient"):
        told.append(service.http.post(f"{URL}?{name}={SECRET}", content=scans[0].read_bytes(), headers=wait).text)
    return "".join(told), outcomes


def test_what_the_process_of_the_inference_says_of_a_fault_is_not_heard(tmp_path: Path) -> None:
    """An exception and its traceback, a library's log and warnings, what C writes: for all have the name in them."""
    log = tmp_path / "log"
    with run_service(tmp_path / "store", log, WITH_SUBPROCESS) as service:
        headers = {"Prefer": "wait=120"}
        answers = [
            service.http.post(URL, content=fake_scan(shout=SECRET, crash=SECRET), headers=headers),
            service.http.post(URL, content=fake_scan(shout=SECRET, die=True), headers=headers),
        ]
        told = [answer.text for answer in answers] + [service.http.get(place).text for place in ("/metrics", URL)]
    assert [answer.json()["code"] for answer in answers] == ["internal_error", "worker_lost"]
    assert SECRET.lower() not in "".join(told).lower()
    text = log.read_text()
    assert SECRET.lower() not in text.lower()
    assert '"exception": "ValueError", "where": "support.py:' in text


@pytest.mark.parametrize("number", range(SENDINGS))
def test_names_in_headers_appear_in_no_message_of_the_command_line(
    scans: list[Path], number: int, tiny_models: Path, tmp_path: Path
) -> None:
    environ = {"COUNTERPART_MODELS": str(tiny_models), "PYTHONPATH": str(CHECKOUT), "HOME": str(tmp_path)}
    command = [*CLI, "detect", str(scans[number]), "-o", str(tmp_path / "out")]
    if number == len(CASES) - 1:  # nothing is wrong with it but what is asked for
        command += ["--series", SECRET]
    ended = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode in {0, 2}, ended.stderr
    assert (ended.returncode == 2) == (": " in ended.stderr), ended.stderr
    assert SECRET.lower() not in (ended.stdout + ended.stderr).lower()
