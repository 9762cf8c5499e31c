"""HTTP status of each error, and the error table of docs/api.md."""

import re
from pathlib import Path

import pytest

from app import errors
from app.api.problems import STATUS_OF_CODE, problem_of_failed_job, status_of
from app.errors import CounterpartError

ROOT = Path(__file__).resolve().parents[2]
# Base classes, and an error that only the process of the inference sees.
NEVER_SENT = {"counterpart_error", "bad_upload", "unreadable_scan", "cannot_analyse", "bundle_error", "cancelled"}


@pytest.mark.parametrize(
    ("cls", "status"),
    [
        (errors.EmptyUpload, 400),
        (errors.UnknownModel, 400),
        (errors.Unauthorised, 401),
        (errors.NotFound, 404),
        (errors.NotFinished, 409),
        (errors.UploadTooLarge, 413),
        (errors.NotAnImageFormat, 415),
        (errors.TruncatedFile, 422),
        (errors.OutOfDistribution, 422),
        (errors.UnsatisfiableRange, 416),
        (errors.QueueFull, 429),
        (errors.StoreFull, 507),
        (errors.StoreUnavailable, 503),
        (errors.InternalError, 500),
        (errors.DamagedBundle, 503),
        (errors.ProviderUnavailable, 503),
    ],
)
def test_error_has_its_status(cls: type[CounterpartError], status: int) -> None:
    assert status_of(cls) == status


@pytest.mark.parametrize(
    ("cls", "status"), [(errors.NotAnImageFormat, 422), (errors.EmptyUpload, 422), (errors.WorkerLost, 500)]
)
def test_failed_job_has_422_or_the_status_of_a_service_fault(cls: type[CounterpartError], status: int) -> None:
    problem = problem_of_failed_job(cls("Found.", expected="expected.", advice="Advice.").problem)
    assert problem.status == status
    assert problem.detail == "Found. Expected: expected. Advice."
    assert problem.type == f"urn:problem-type:counterpart:{cls.code}"


def test_every_code_is_documented_with_its_status() -> None:
    table = (ROOT / "docs" / "api.md").read_text().partition("## Errors")[2]
    documented = {
        code: int(status)
        for status, codes in re.findall(r"^\| (\d{3}) \| ([^|]*) \|", table, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", codes)
    }
    assert documented.pop("method_not_allowed") == 405
    command_line = {"invalid_settings", "invalid_profile", "too_few_scans", "unsafe_exposure", "address_unavailable"}
    assert all(f"`{code}`" in (ROOT / "docs" / "cli.md").read_text() for code in command_line)
    sent = STATUS_OF_CODE.keys() - NEVER_SENT - command_line
    assert documented == {code: STATUS_OF_CODE[code] for code in sent}
