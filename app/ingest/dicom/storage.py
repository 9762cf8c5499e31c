"""SOP classes and transfer syntaxes of images that can be read, and the identifiers of a received instance."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydicom.filereader import read_partial
from pydicom.tag import Tag
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    MRImageStorage,
    RLELossless,
)

from app.dicom_attributes import silence_libraries, text
from app.errors import CounterpartError, InvalidHeader
from app.ingest.dicom.deflated import check_deflated
from app.ingest.limits import DEFAULT_LIMITS

STORAGE_CLASSES = (
    MRImageStorage,
    CTImageStorage,
    EnhancedMRImageStorage,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
)
# docs/dicom.md lists the same; `tests/ingest/test_conformance.py` compares that list with the decoders.
TRANSFER_SYNTAXES = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    RLELossless,
    JPEGLosslessSV1,
    JPEGLossless,
    JPEGLSLossless,
    JPEG2000Lossless,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    JPEG2000,
    HTJ2K,
)
_LAST = Tag("SeriesInstanceUID")
_KEYWORDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")


@dataclass(frozen=True)
class Identifiers:
    """Identifiers of an instance.

    Attributes
    ----------
    sop_class, instance, study, series : str
        SOPClassUID, SOPInstanceUID, StudyInstanceUID and SeriesInstanceUID.
    """

    sop_class: str
    instance: str
    study: str
    series: str

    @property
    def series_key(self) -> str:
        """Name of a folder for the series. A peer can send any text as a UID, so that only its hash is safe."""
        return _hash(self.study, self.series)

    @property
    def instance_key(self) -> str:
        """Name of a file for the instance."""
        return _hash(self.instance)


def read_identifiers(path: Path) -> Identifiers:
    """Read the identifiers of a DICOM file.

    Raises
    ------
    InvalidHeader
        The header is damaged, or one of the identifiers is missing.
    UnsafeArchive
        The file is deflated and inflates to more than the limit.
    """
    try:
        check_deflated(path, DEFAULT_LIMITS.max_inflated_bytes, DEFAULT_LIMITS)
        with silence_libraries(), path.open("rb") as file:
            dataset = read_partial(file, stop_when=lambda tag, *_: tag > _LAST, specific_tags=list(map(Tag, _KEYWORDS)))
            values = [text(dataset, keyword) for keyword in _KEYWORDS]
    except CounterpartError:
        raise
    except Exception:  # noqa: BLE001 - for a damaged header, pydicom raises whatever its parts raise
        values = []
    if not all(values) or not values:
        raise InvalidHeader(
            "The header of an instance is damaged, or has no UID of class, instance, study or series.",
            expected=", ".join(_KEYWORDS) + ".",
            advice="Check which program wrote the instance.",
        )
    return Identifiers(*values)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:32]
