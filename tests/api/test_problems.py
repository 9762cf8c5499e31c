import pytest

from app import errors
from app.api.problems import STATUS_OF_CODE, problem_of_failed_job, status_of
from app.errors import CounterpartError


def leaves(cls: type[CounterpartError] = CounterpartError) -> list[type[CounterpartError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in leaves(child))]


def test_every_code_is_of_one_class() -> None:
    codes = [cls.code for cls in leaves()]
    assert len(set(codes)) == len(codes)
    assert set(STATUS_OF_CODE) >= set(codes)


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
        (errors.IrregularSlices, 422),
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
def test_a_cause_has_its_status(cls: type[CounterpartError], status: int) -> None:
    assert status_of(cls) == status


@pytest.mark.parametrize(
    ("cls", "status"), [(errors.NotAnImageFormat, 422), (errors.EmptyUpload, 422), (errors.WorkerLost, 500)]
)
def test_what_a_job_tells_is_the_scans_or_the_services(cls: type[CounterpartError], status: int) -> None:
    problem = problem_of_failed_job(cls("Found.", expected="expected.", advice="Advice.").problem)
    assert problem.status == status
    assert problem.detail == "Found. Expected: expected. Advice."
    assert problem.type == f"urn:problem-type:counterpart:{cls.code}"
