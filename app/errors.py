"""Every way an analysis can fail, one class a cause.

An error says what was found, what was expected and what to do about it, and never repeats a
patient's value. It knows nothing of HTTP: `app.api.problems` gives each class its status.
"""

import traceback
from pathlib import Path
from typing import ClassVar


class CounterpartError(Exception):
    """Root of every error that Counterpart raises on purpose.

    Parameters
    ----------
    found : str
        What was met, in one sentence without patient data.
    expected : str
        What would have been accepted.
    advice : str
        What the caller can do now.

    Attributes
    ----------
    code : str
        Stable identifier of the cause: part of the public contract, never reworded.
    title : str
        The cause in a few words.
    """

    code: ClassVar[str] = "counterpart_error"
    title: ClassVar[str] = "Counterpart could not go on"

    def __init__(self, found: str, *, expected: str, advice: str) -> None:
        super().__init__(found, expected, advice)
        self.found = found
        self.expected = expected
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.found} Expected: {self.expected} {self.advice}"

    @property
    def problem(self) -> dict[str, str]:
        """The error as plain data: code, title, found, expected, advice."""
        return {
            "code": self.code,
            "title": self.title,
            "found": self.found,
            "expected": self.expected,
            "advice": self.advice,
        }


# ---- the upload itself -------------------------------------------------------------------------


class UploadError(CounterpartError):
    """What was sent cannot be a scan, whatever is in it."""

    code = "bad_upload"
    title = "Unusable upload"


class EmptyUpload(UploadError):
    code = "empty_upload"
    title = "Nothing was sent"


class UploadTooLarge(UploadError):
    code = "upload_too_large"
    title = "Too large"


class NotAnImageFormat(UploadError):
    code = "not_an_image_format"
    title = "Not an image format"


# ---- reading -----------------------------------------------------------------------------------


class UnreadableScan(CounterpartError):
    """The format is known; what is inside cannot be read as one scan."""

    code = "unreadable_scan"
    title = "Unreadable scan"


class TruncatedFile(UnreadableScan):
    code = "truncated_file"
    title = "Truncated or damaged file"


class UnsafeArchive(UnreadableScan):
    code = "unsafe_archive"
    title = "Archive refused"


class NoImageInArchive(UnreadableScan):
    code = "no_image_in_archive"
    title = "No image in the archive"


class SeveralSeries(UnreadableScan):
    code = "several_series"
    title = "More than one series"


class UnsupportedPixels(UnreadableScan):
    code = "unsupported_pixels"
    title = "Unsupported pixel data"


class TooManyVoxels(UnreadableScan):
    code = "too_many_voxels"
    title = "Larger than can be analysed"


class UnknownSeries(UnreadableScan):
    code = "unknown_series"
    title = "No such series"


class InvalidHeader(UnreadableScan):
    code = "invalid_header"
    title = "Invalid image header"


class NotAVolume(UnreadableScan):
    code = "not_a_volume"
    title = "Not one three-dimensional grey volume"


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


# ---- analysing ---------------------------------------------------------------------------------


class CannotAnalyse(CounterpartError):
    """A proper scan that this model cannot speak about."""

    code = "cannot_analyse"
    title = "Cannot be analysed"


class WrongFieldOfView(CannotAnalyse):
    code = "wrong_field_of_view"
    title = "Not the size of what the model knows"


class OutOfDistribution(CannotAnalyse):
    code = "out_of_distribution"
    title = "Not the kind of image the model knows"


class BrainNotExtracted(CannotAnalyse):
    code = "brain_not_extracted"
    title = "The brain could not be taken out of its head"


class WrongModality(CannotAnalyse):
    code = "wrong_modality"
    title = "Not the modality of the model"


class WrongSequence(CannotAnalyse):
    code = "wrong_sequence"
    title = "Not the sequence of any model"


# ---- models and machine ------------------------------------------------------------------------


class BundleError(CounterpartError):
    """A model bundle that cannot be used."""

    code = "bundle_error"
    title = "Unusable model bundle"


class NonCommercialModel(BundleError):
    """Its licence forbids commercial use, and the operator has not said that there is none."""

    code = "non_commercial_model"
    title = "A model for non-commercial research only"


class UnknownModel(BundleError):
    code = "unknown_model"
    title = "No such model"


class DamagedBundle(BundleError):
    code = "damaged_bundle"
    title = "Damaged model bundle"


class ProviderUnavailable(CounterpartError):
    code = "provider_unavailable"
    title = "The execution provider asked for is not available"


class Cancelled(CounterpartError):
    """The caller asked to stop; raised between network evaluations."""

    code = "cancelled"
    title = "Cancelled"


# ---- jobs and service --------------------------------------------------------------------------


class InvalidSettings(CounterpartError):
    code = "invalid_settings"
    title = "Invalid settings"


class UnsafeExposure(CounterpartError):
    """The service would be reachable from other machines with no lock on the door."""

    code = "unsafe_exposure"
    title = "Refused to listen without a token"


class BadRequest(CounterpartError):
    code = "bad_request"
    title = "Malformed request"


class BadRange(BadRequest):
    code = "bad_range"
    title = "Malformed Range"


class UnsatisfiableRange(CounterpartError):
    code = "unsatisfiable_range"
    title = "Range outside the file"


class Unauthorised(CounterpartError):
    code = "unauthorised"
    title = "A token is needed"


class NotFound(CounterpartError):
    code = "not_found"
    title = "Nothing is here"


class NotFinished(CounterpartError):
    """A result was asked for of a job that has none yet, or never will."""

    code = "not_finished"
    title = "No result yet"


class NoSuchResult(CounterpartError):
    """A result that this scan does not have and never will, while it has others."""

    code = "no_such_result"
    title = "This scan has no such result"


class NoBrainMask(NoSuchResult):
    code = "no_brain_mask"
    title = "No brain was taken out of this scan"


class NotFromDicom(NoSuchResult):
    code = "not_from_dicom"
    title = "Only a scan that came as DICOM has DICOM results"


class NoLesion(NoSuchResult):
    code = "no_lesion"
    title = "Nothing was found, so there is nothing to segment"


class UnsuitableSource(NoSuchResult):
    code = "unsuitable_source"
    title = "A series that DICOM results cannot refer to"


class AlreadyFinished(CounterpartError):
    code = "already_finished"
    title = "Already finished"


class IdempotencyKeyReused(CounterpartError):
    code = "idempotency_key_reused"
    title = "The key belongs to another scan"


class QueueFull(CounterpartError):
    code = "queue_full"
    title = "The queue is full"


class StoreFull(CounterpartError):
    code = "store_full"
    title = "Too little disk is left"


class NotReady(CounterpartError):
    code = "not_ready"
    title = "Not ready"


class StoreUnavailable(CounterpartError):
    code = "store_unavailable"
    title = "The store of scans and results does not answer"


class WorkerLost(CounterpartError):
    """The process that analysed the scan died, again and again."""

    code = "worker_lost"
    title = "The analysis ended its process"


class OutOfMemory(CounterpartError):
    """The machine has too little memory for a scan, in half a batch too."""

    code = "out_of_memory"
    title = "Too little memory for this scan"


class InternalError(CounterpartError):
    """A fault of the service itself. The exception's own text may hold patient data: it is never told."""

    code = "internal_error"
    title = "Internal error"


class MissingExtra(CounterpartError):
    """An optional part of the installation is needed and absent."""

    code = "missing_extra"
    title = "An optional part is not installed"


def from_problem(problem: dict[str, str]) -> CounterpartError:
    """The error that a problem was made of, in another process."""
    found = [CounterpartError]
    for cls in found:
        found += cls.__subclasses__()
    cls = next((cls for cls in found if cls.code == problem["code"]), InternalError)
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
    """Return the class and the source location of an exception, without its text, which can hold patient data.

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
