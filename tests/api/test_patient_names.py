"""No log, metric, response or message repeats a patient's name, wherever a scan contains it."""

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

from app.api.server import ALLOWED_KEYS
from tests.api.service_process import CHECKOUT, WITH_SUBPROCESS, RunningService, run_service
from tests.api.support import URL, WAIT, fake_scan
from tests.support.dicom import SECRET, Series, make_datasets, save, zip_files
from tests.support.phantom import brain

CLI = (sys.executable, "-m", "app.cli")
# Text elements that a scanner or a person may fill in. Every series of the tests has the name in PatientName too.
TEXT_KEYWORDS = (
    *("AccessionNumber", "StudyID", "StudyDescription", "SeriesDescription", "ProtocolName", "InstitutionName"),
    *("StationName", "PerformingPhysicianName", "OperatorsName", "PatientComments", "ImageComments", "SequenceName"),
    *("OtherPatientIDs", "PatientAddress", "PatientTelephoneNumbers", "AdditionalPatientHistory", "DeviceSerialNumber"),
)
# Bytes that are left of a truncated slice: most of the names precede the cut.
TRUNCATED_BYTES = 1500


def create_slices(series: Series | None = None) -> list[FileDataset]:
    """Return a series with the name in every text, in a private element and in a nested one."""
    slices = make_datasets(brain(), series or Series())
    for dataset in slices:
        for keyword in TEXT_KEYWORDS:
            setattr(dataset, keyword, SECRET)
        block = dataset.private_block(0x0011, SECRET, create=True)
        block.add_new(0x01, "LO", SECRET)
        nested = FileDataset("", {})
        nested.ReferencedSOPInstanceUID, nested.ContentDescription = "1.2.3", SECRET
        dataset.ReferencedImageSequence = [nested]
    return slices


def remove_slice(slices: list[FileDataset]) -> None:
    del slices[len(slices) // 2]


def add_second_series(slices: list[FileDataset]) -> None:
    slices += create_slices(Series(name=SECRET, description=SECRET))


def damage_pixels(slices: list[FileDataset]) -> None:
    for dataset in slices:
        dataset.PixelData = SECRET.encode() + b"!"


def damage_jpeg(slices: list[FileDataset]) -> None:
    for dataset in slices:
        dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        dataset.PixelData = encapsulate([b"\xff\xd8" + SECRET.encode() * 20 + b"\xff\xd9"])
        dataset["PixelData"].VR = "OB"


def damage_character_set(slices: list[FileDataset]) -> None:
    for dataset in slices:
        dataset.SpecificCharacterSet = SECRET


def damage_modality(slices: list[FileDataset]) -> None:
    for dataset in slices:
        dataset.Modality, dataset.PhotometricInterpretation = SECRET, SECRET


def leave_intact(_: list[FileDataset]) -> None:
    """Keep a series that can be analysed."""


CHANGES: tuple[Callable[[list[FileDataset]], None], ...] = (
    *(remove_slice, add_second_series, damage_pixels, damage_jpeg, damage_character_set, damage_modality),
    leave_intact,
)
INTACT = len(CHANGES) - 1
UPLOADS = len(CHANGES) + 3


def create_uploads(folder: Path) -> Iterator[Path]:
    """Yield zips with the name in file names too: one for each change, a truncated one, a truncated slice, a text."""
    for number, change in enumerate(CHANGES):
        slices = create_slices()
        change(slices)
        files = [path.rename(path.with_name(f"{SECRET}-{path.name}")) for path in save(folder / str(number), slices)]
        yield zip_files(folder / f"{SECRET}-{number}.zip", files)
    intact = (folder / f"{SECRET}-{INTACT}.zip").read_bytes()
    half = folder / f"{SECRET}-half.zip"
    half.write_bytes(intact[: len(intact) // 2])
    yield half
    files[-1].write_bytes(files[-1].read_bytes()[:TRUNCATED_BYTES])
    yield zip_files(folder / f"{SECRET}-cut.zip", files)
    text = folder / f"{SECRET}.txt"
    text.write_text(SECRET)
    yield zip_files(folder / f"{SECRET}-text.zip", [text])


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    with disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns about the invalid values
        return list(create_uploads(tmp_path_factory.mktemp("uploads")))


def test_service_repeats_no_name(uploads: list[Path], tiny_models: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with run_service(tmp_path / "store", log, (*CLI, "serve"), models=str(tiny_models), threads="1") as service:
        responses, outcomes = _send_all(service, uploads)
    assert outcomes[INTACT] == "succeeded"
    assert len(set(outcomes)) >= 5, outcomes
    assert SECRET.lower() not in responses.lower()
    text = log.read_text()
    assert SECRET.lower() not in text.lower()
    assert {key for line in text.splitlines() for key in json.loads(line)} <= ALLOWED_KEYS


def _send_all(service: RunningService, uploads: list[Path]) -> tuple[str, list[str]]:
    """Return all responses about the uploads, and the outcome of each upload."""
    responses, outcomes = [], []
    for number, upload in enumerate(uploads):
        form = {"file": (upload.name, upload.read_bytes())}
        headers = {**WAIT, "Idempotency-Key": f"{SECRET}-{number}"}
        answer = service.http.post(f"{URL}?seed={number}", files=form, headers=headers)
        outcomes.append(answer.json().get("code") or answer.json()["state"])
        responses.append(answer.text)
        if "location" in answer.headers:
            job = answer.headers["location"]
            paths = (job, f"{job}/events", f"{job}/report.json", f"{job}/mask.nii.gz")
            responses += [service.http.get(path).text for path in paths]
    lists = (URL, f"{URL}?model={SECRET}&after={SECRET}", f"{URL}?code={SECRET}")
    responses += [service.http.get(path).text for path in ("/metrics", "/readyz", *lists)]
    for name in ("series", "model", "seed", "geometry", "priority", "patient"):
        answer = service.http.post(f"{URL}?{name}={SECRET}", content=uploads[0].read_bytes(), headers=WAIT)
        responses.append(answer.text)
    return "".join(responses), outcomes


def test_output_of_the_child_process_is_not_logged(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with run_service(tmp_path / "store", log, WITH_SUBPROCESS) as service:
        answers = [
            service.http.post(URL, content=fake_scan(log_text=SECRET, raise_value_error=SECRET), headers=WAIT),
            service.http.post(URL, content=fake_scan(log_text=SECRET, exit_process=True), headers=WAIT),
        ]
        responses = [answer.text for answer in answers] + [service.http.get(path).text for path in ("/metrics", URL)]
    assert [answer.json()["code"] for answer in answers] == ["internal_error", "worker_lost"]
    assert SECRET.lower() not in "".join(responses).lower()
    text = log.read_text()
    assert SECRET.lower() not in text.lower()
    assert '"exception": "ValueError", "where": "support.py:' in text


@pytest.mark.parametrize("number", range(UPLOADS))
def test_command_line_repeats_no_name(uploads: list[Path], number: int, tiny_models: Path, tmp_path: Path) -> None:
    environ = {"COUNTERPART_MODELS": str(tiny_models), "PYTHONPATH": str(CHECKOUT), "HOME": str(tmp_path)}
    command = [*CLI, "detect", str(uploads[number]), "-o", str(tmp_path / "out")]
    if number == INTACT:  # fails only because of the requested series
        command += ["--series", SECRET]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode in {0, 2}, done.stderr
    assert (done.returncode == 2) == (": " in done.stderr), done.stderr
    assert SECRET.lower() not in (done.stdout + done.stderr).lower()
