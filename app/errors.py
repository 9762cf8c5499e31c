"""Errors with a known cause, one class per cause.

Each error describes what was found, what was expected and what the caller can do. It never contains patient data.
The HTTP status of each class is in `app.api.problems`.
"""

import traceback
from pathlib import Path
from typing import ClassVar


class CounterpartError(Exception):
    """Base class of all errors that Counterpart raises on purpose.

    Parameters
    ----------
    found : str
        Cause, as a sentence without patient data.
    expected : str
        Accepted input, as a phrase that follows "Expected:".
    advice : str
        Next step of the caller, as a sentence.

    Attributes
    ----------
    code : str
        Stable identifier of the cause. Codes are public and do not change.
    title : str
        Short name of the cause.
    """

    code: ClassVar[str] = "counterpart_error"
    title: ClassVar[str] = "Counterpart failed"

    def __init__(self, found: str, *, expected: str, advice: str) -> None:
        super().__init__(found, expected, advice)
        self.found = found
        self.expected = expected
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.found} Expected: {self.expected} {self.advice}"

    @property
    def problem(self) -> dict[str, str]:
        """The error as a dictionary: code, title, found, expected, advice."""
        return {
            "code": self.code,
            "title": self.title,
            "found": self.found,
            "expected": self.expected,
            "advice": self.advice,
        }


# ---- upload ------------------------------------------------------------------------------------


class UploadError(CounterpartError):
    """The upload cannot be a scan."""

    code = "bad_upload"
    title = "Unusable upload"


class EmptyUpload(UploadError):
    code = "empty_upload"
    title = "Empty upload"


class UploadTooLarge(UploadError):
    code = "upload_too_large"
    title = "Upload too large"


class NotAnImageFormat(UploadError):
    code = "not_an_image_format"
    title = "Not an image format"


class UnknownSource(CounterpartError):
    code = "unknown_source"
    title = "Unknown source"


class SourceUnavailable(CounterpartError):
    code = "source_unavailable"
    title = "Source not available"


# ---- reading -----------------------------------------------------------------------------------


class UnreadableScan(CounterpartError):
    """The file format is known, but the content cannot be read as one scan."""

    code = "unreadable_scan"
    title = "Unreadable scan"


class TruncatedFile(UnreadableScan):
    code = "truncated_file"
    title = "Truncated or damaged file"


class UnsafeArchive(UnreadableScan):
    code = "unsafe_archive"
    title = "Unsafe archive"


class NoImageInArchive(UnreadableScan):
    code = "no_image_in_archive"
    title = "No image in the archive"


class SeveralSeries(UnreadableScan):
    code = "several_series"
    title = "More than one series"


class SeveralPatients(UnreadableScan):
    code = "several_patients"
    title = "More than one patient"


class UnsupportedPixels(UnreadableScan):
    code = "unsupported_pixels"
    title = "Unsupported pixel data"


class TooManyVoxels(UnreadableScan):
    code = "too_many_voxels"
    title = "Too many voxels"


class UnknownSeries(UnreadableScan):
    code = "unknown_series"
    title = "Unknown series"


class InvalidHeader(UnreadableScan):
    code = "invalid_header"
    title = "Invalid image header"


class NotAVolume(UnreadableScan):
    code = "not_a_volume"
    title = "Not a single three-dimensional greyscale volume"


class InvalidVoxels(UnreadableScan):
    code = "invalid_voxels"
    title = "Invalid voxel values"


class ConstantVoxels(UnreadableScan):
    code = "constant_voxels"
    title = "Constant image"


class InvalidGeometry(UnreadableScan):
    code = "invalid_geometry"
    title = "Invalid geometry"


class IrregularSlices(UnreadableScan):
    code = "irregular_slices"
    title = "Missing, tilted or unevenly spaced slices"


# ---- analysis ----------------------------------------------------------------------------------


class CannotAnalyse(CounterpartError):
    """The scan is valid, but the model cannot analyse it."""

    code = "cannot_analyse"
    title = "Scan cannot be analysed"


class WrongFieldOfView(CannotAnalyse):
    code = "wrong_field_of_view"
    title = "Wrong field of view"


class OutOfDistribution(CannotAnalyse):
    code = "out_of_distribution"
    title = "Image unlike the training data"


class BrainNotExtracted(CannotAnalyse):
    code = "brain_not_extracted"
    title = "Brain extraction failed"


class WrongModality(CannotAnalyse):
    code = "wrong_modality"
    title = "Wrong modality for the model"


class WrongSequence(CannotAnalyse):
    code = "wrong_sequence"
    title = "No model for this sequence"


# ---- models and devices ------------------------------------------------------------------------


class BundleError(CounterpartError):
    """A model bundle cannot be used."""

    code = "bundle_error"
    title = "Unusable model bundle"


class NonCommercialModel(BundleError):
    """The model's licence forbids commercial use, and the operator has not allowed such models."""

    code = "non_commercial_model"
    title = "Model for non-commercial research only"


class UnknownModel(BundleError):
    code = "unknown_model"
    title = "Unknown model"


class DamagedBundle(BundleError):
    code = "damaged_bundle"
    title = "Damaged model bundle"


class ProviderUnavailable(CounterpartError):
    code = "provider_unavailable"
    title = "Execution provider not available"


class Cancelled(CounterpartError):
    """The caller cancelled the analysis. Raised between network evaluations."""

    code = "cancelled"
    title = "Cancelled"


# ---- jobs and service --------------------------------------------------------------------------


class InvalidSettings(CounterpartError):
    code = "invalid_settings"
    title = "Invalid settings"


class InvalidProfile(CounterpartError):
    code = "invalid_profile"
    title = "Invalid site profile"


class TooFewScans(CounterpartError):
    """Too few healthy scans, or scans of several scanners, for a site profile."""

    code = "too_few_scans"
    title = "Too few scans for a site profile"


class UnsafeExposure(CounterpartError):
    """The service would be reachable from other machines without a token."""

    code = "unsafe_exposure"
    title = "Network access without a token"


class BadRequest(CounterpartError):
    code = "bad_request"
    title = "Malformed request"


class BadRange(BadRequest):
    code = "bad_range"
    title = "Malformed Range header"


class UnsatisfiableRange(CounterpartError):
    code = "unsatisfiable_range"
    title = "Range outside the file"


class Unauthorised(CounterpartError):
    code = "unauthorised"
    title = "Token required"


class SearchTooBroad(CounterpartError):
    """Too many instances would have to be read for a search."""

    code = "search_too_broad"
    title = "Search too broad"


class NotAcceptable(CounterpartError):
    code = "not_acceptable"
    title = "Not an offered media type"


class Forbidden(CounterpartError):
    """The caller is known, and lacks the scope of the route."""

    code = "forbidden"
    title = "Scope required"


class LoginFailed(CounterpartError):
    """The login by OIDC ended without a session."""

    code = "login_failed"
    title = "Login failed"


class IdentityUnavailable(CounterpartError):
    """The token cannot be checked, because its keys or the file of tokens cannot be read."""

    code = "identity_unavailable"
    title = "Tokens cannot be checked"


class AuditUnavailable(CounterpartError):
    """The audit trail cannot be written, so the request is refused."""

    code = "audit_unavailable"
    title = "Audit trail not available"


class NotFound(CounterpartError):
    code = "not_found"
    title = "Not found"


class NotFinished(CounterpartError):
    """The job has not succeeded, so it has no results."""

    code = "not_finished"
    title = "No result available"


class NoSuchResult(CounterpartError):
    """The scan was analysed, but this result does not exist for it."""

    code = "no_such_result"
    title = "Result does not exist for this scan"


class NoBrainMask(NoSuchResult):
    code = "no_brain_mask"
    title = "No brain was extracted from this scan"


class NotFromDicom(NoSuchResult):
    code = "not_from_dicom"
    title = "DICOM results need a DICOM scan"


class NoLesion(NoSuchResult):
    code = "no_lesion"
    title = "No lesion to segment"


class UnsuitableSource(NoSuchResult):
    code = "unsuitable_source"
    title = "DICOM results cannot refer to this series"


class AlreadyFinished(CounterpartError):
    code = "already_finished"
    title = "Job already finished"


class IdempotencyKeyReused(CounterpartError):
    code = "idempotency_key_reused"
    title = "Idempotency key used for another scan"


class QueueFull(CounterpartError):
    code = "queue_full"
    title = "Queue full"


class StoreFull(CounterpartError):
    code = "store_full"
    title = "Not enough disk space"


class NotReady(CounterpartError):
    code = "not_ready"
    title = "Service not ready"


class StoreUnavailable(CounterpartError):
    code = "store_unavailable"
    title = "Store not available"


class DatabaseUnavailable(CounterpartError):
    """The job database does not answer, or is damaged."""

    code = "database_unavailable"
    title = "Job database not available"


class TooManyStreams(CounterpartError):
    code = "too_many_streams"
    title = "Too many open event streams"


class TooManyConnections(CounterpartError):
    code = "too_many_connections"
    title = "Too many open connections"


class HeaderTooLarge(BadRequest):
    code = "header_too_large"
    title = "Request header too large"


class UploadTooSlow(CounterpartError):
    code = "upload_too_slow"
    title = "Upload stopped"


class UnsupportedEncoding(CounterpartError):
    code = "unsupported_encoding"
    title = "Unsupported Content-Encoding"


class ForeignHost(CounterpartError):
    """The Host header names another server: a web page may have bound its own name to this address."""

    code = "foreign_host"
    title = "Host not accepted"


class ForeignOrigin(CounterpartError):
    """A web page of another site sent the request."""

    code = "foreign_origin"
    title = "Request of another site"


class AddressUnavailable(CounterpartError):
    code = "address_unavailable"
    title = "Cannot listen on the address"


class WorkerLost(CounterpartError):
    """The process that analysed the scan died repeatedly."""

    code = "worker_lost"
    title = "Worker process died"


class OutOfMemory(CounterpartError):
    """The machine has too little memory for the scan, even with half the batch size."""

    code = "out_of_memory"
    title = "Not enough memory"


class TookTooLong(CounterpartError):
    """A step of the analysis exceeded its deadline (COUNTERPART_DEADLINE_SECONDS)."""

    code = "took_too_long"
    title = "Analysis took too long"


class InternalError(CounterpartError):
    """A fault of the service. The text of the exception is not shown, because it may contain patient data."""

    code = "internal_error"
    title = "Internal error"


class MissingExtra(CounterpartError):
    """An optional dependency is needed but not installed."""

    code = "missing_extra"
    title = "Optional dependency not installed"


def from_problem(problem: dict[str, str]) -> CounterpartError:
    """Rebuild an error from its `problem`, for example one that another process sent.

    An unknown code gives an InternalError.
    """
    classes = [CounterpartError]
    for cls in classes:  # grows while it is iterated: all descendants
        classes += cls.__subclasses__()
    cls = next((cls for cls in classes if cls.code == problem["code"]), InternalError)
    return cls(problem["found"], expected=problem["expected"], advice=problem["advice"])


# ---- unexpected exceptions ---------------------------------------------------------------------


class UnexpectedError(Exception):
    """An unexpected exception in another process, of which only the class and the location are known.

    Parameters
    ----------
    location : dict of str
        Result of `error_location` in the other process.
    """

    def __init__(self, location: dict[str, str]) -> None:
        super().__init__(location["where"])
        self.location = location


def error_location(error: BaseException) -> dict[str, str]:
    """Return the class and the source location of an exception, without its text, which can contain patient data.

    Returns
    -------
    dict of str
        `exception`, the name of the class, and `where`, the location as "file.py:line".
    """
    if isinstance(error, UnexpectedError):
        return error.location
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown"
    return {"exception": type(error).__name__, "where": where}


def scan_out_of_memory() -> OutOfMemory:
    """Return the error for a scan that did not fit into memory outside the networks."""
    return OutOfMemory(
        "The machine has too little memory to read, analyse or write this scan.",
        expected="enough memory for one scan (see Sizing in docs/operations.md).",
        advice="Send the scan again when fewer programs run on this machine, or give the worker more memory.",
    )
