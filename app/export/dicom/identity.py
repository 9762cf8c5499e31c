"""Who made an object, under which UIDs, at what time: nothing here looks at a clock or a die."""

import hashlib
from io import BytesIO
from typing import Any, TypeVar
from uuid import UUID, uuid5

import highdicom
from highdicom import AlgorithmIdentificationSequence
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from app.export.dicom.source import SourceSeries
from app.export.report import Report

MANUFACTURER = "Counterpart"
# Of every name-based UUID (RFC 9562, version 5) that becomes a UID (PS3.5 B.2). A change of it renames all objects.
NAMESPACE = UUID("6f1c2d1e-57a4-4e0c-9f43-0d6a5b7f2c11")
# Stands in every object until its content is known.
PLACEHOLDER = "2.25.0"
# What no public terminology names (PS3.16 section 8: designators of private schemes begin with 99).
CODING_SCHEME, CODING_SCHEME_NAME = "99COUNTERPART", "Counterpart private codes"

CATEGORY = CodedConcept.from_code(codes.SCT.MorphologicallyAbnormalStructure)  # CID 7150
TYPE = CodedConcept.from_code(codes.SCT.Lesion)  # CID 7159
SITE = CodedConcept.from_code(codes.SCT.Brain)

AnyDataset = TypeVar("AnyDataset", bound=Dataset)


def derived_uid(*parts: str) -> str:
    """The UID of a text, always the same: 2.25 and a name-based UUID."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return str(highdicom.UID.from_uuid(str(uuid5(NAMESPACE, digest))))


def complete(dataset: AnyDataset, source: SourceSeries) -> AnyDataset:
    """Name an object by its content: one that differs in a byte has other UIDs, and the same one the same.

    The hash is taken over the file with `PLACEHOLDER` where the UIDs will stand. The series is the
    object's own, so that two analyses never disagree over the attributes of one series.
    """
    # The moment of writing, optional in the standard wherever highdicom notes it.
    del dataset.InstanceCreationDate, dataset.InstanceCreationTime
    for item in dataset.ContributingEquipmentSequence:
        del item.ContributionDateTime
    if "SpecificCharacterSet" in source.images[0]:
        dataset.SpecificCharacterSet = source.images[0].SpecificCharacterSet
    _set_dimension_organization(dataset, PLACEHOLDER)  # random in highdicom; of no meaning outside the object
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    dataset.SOPInstanceUID = derived_uid("instance", digest)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.SeriesInstanceUID = derived_uid("series", digest)
    _set_dimension_organization(dataset, derived_uid("dimensions", digest))
    return dataset


def _set_dimension_organization(dataset: Dataset, uid: str) -> None:
    for item in (*dataset.get("DimensionOrganizationSequence", ()), *dataset.get("DimensionIndexSequence", ())):
        item.DimensionOrganizationUID = uid


def tracking(report: Report, series_uid: str, label: int) -> tuple[str, str]:
    """Name and UID of a lesion, the same in segmentation and report.

    The UID belongs to this analysis: nothing says that the next one's first lesion is the same.
    """
    finding = report.findings[label - 1]
    what = (series_uid, *analysis(report), finding.model_dump_json())
    return f"Lesion {label}", derived_uid("lesion", *what)


def analysis(report: Report) -> tuple[str, ...]:
    """What tells one analysis of a series from another; a report of an older version names no precision."""
    model = report.model
    return (model.sha256, str(model.seed), report.code_version, *filter(None, (model.precision,)))


def device_uid(report: Report) -> str:
    """The observer: this version of the code with these weights."""
    return derived_uid("device", report.code_version, report.model.sha256)


def parameters(report: Report) -> dict[str, str]:
    """What decided the outcome beside the code: bundle, precision, seed, thresholds."""
    precision = {"precision": report.model.precision} if report.model.precision else {}
    return {
        "bundle": report.model.id,
        "bundle_sha256": report.model.sha256,
        **precision,
        "seed": str(report.model.seed),
        "threshold": f"{report.threshold:.6g}",
        "extent_threshold": f"{report.extent_threshold:.6g}",
    }


def algorithm(report: Report) -> AlgorithmIdentificationSequence:
    """Algorithm Identification Macro (PS3.3 table 10-19)."""
    return AlgorithmIdentificationSequence(
        name=MANUFACTURER,
        version=report.code_version,
        family=codes.DCM.ArtificialIntelligence,
        source=MANUFACTURER,
        parameters=parameters(report),
    )


def common(source: SourceSeries, report: Report) -> dict[str, Any]:
    """What highdicom writes alike into every object.

    Enhanced General Equipment (PS3.3 C.7.5.2): the bundle is the model, its hash the serial number.
    """
    date, time = source.content_time
    return {
        "series_instance_uid": PLACEHOLDER,
        "sop_instance_uid": PLACEHOLDER,
        "instance_number": 1,
        "content_date": date,
        "content_time": time,
        "content_qualification": "RESEARCH",
        "specific_character_set": None,  # `complete` copies the source's: highdicom knows not all that are in use
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": report.model.id,
        "software_versions": report.code_version,
        "device_serial_number": report.model.sha256,  # 64 digits: as many as LO may have
    }


def private_code(value: str, meaning: str) -> CodedConcept:
    """A concept of our own scheme."""
    return CodedConcept(value, CODING_SCHEME, meaning)
