"""Identity of the DICOM objects: UIDs, equipment, algorithm and codes.

No value depends on a clock or a random number: the same analysis gives objects with the same bytes.
"""

import hashlib
from collections.abc import Sequence
from io import BytesIO
from typing import Any, TypeVar
from uuid import UUID, uuid5

import highdicom
from highdicom import AlgorithmIdentificationSequence
from highdicom.sr import CodedConcept
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.sr.codedict import codes
from pydicom.valuerep import PersonName

from app.export.dicom.source import SourceSeries
from app.export.report import Report

MANUFACTURER = "Counterpart"
# Namespace of the name-based UUIDs (RFC 9562, version 5) from which UIDs are made (PS3.5 B.2). If it changes, all UIDs
# change.
NAMESPACE = UUID("6f1c2d1e-57a4-4e0c-9f43-0d6a5b7f2c11")
# Stands for the UIDs of an object until its content is complete.
PLACEHOLDER = "2.25.0"
# Scheme of the codes that no public terminology contains (PS3.16 section 8: private designators start with 99).
CODING_SCHEME, CODING_SCHEME_NAME = "99COUNTERPART", "Counterpart private codes"

CATEGORY = CodedConcept.from_code(codes.SCT.MorphologicallyAbnormalStructure)  # CID 7150
TYPE = CodedConcept.from_code(codes.SCT.Lesion)  # CID 7159
SITE = CodedConcept.from_code(codes.SCT.Brain)

# Bytes that fill a text to an even length.
_PADDING = b" \0"

AnyDataset = TypeVar("AnyDataset", bound=Dataset)


def derived_uid(*parts: str) -> str:
    """Return the UID of a text: 2.25 and a name-based UUID. The same text gives the same UID."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return str(highdicom.UID.from_uuid(str(uuid5(NAMESPACE, digest))))


def assign_uids(dataset: AnyDataset, source: SourceSeries) -> AnyDataset:
    """Set the UIDs of an object from its content. A different byte gives different UIDs.

    The hash is taken over the file with `PLACEHOLDER` in place of the UIDs. Each object gets a separate series, so
    that two analyses never give different attributes to one series.
    """
    # These attributes contain the time of writing. The standard does not require them.
    del dataset.InstanceCreationDate, dataset.InstanceCreationTime
    for item in dataset.ContributingEquipmentSequence:
        del item.ContributionDateTime
    if "SpecificCharacterSet" in source.images[0]:
        dataset.SpecificCharacterSet = source.images[0].SpecificCharacterSet
    _restore_texts(dataset, source)
    _set_dimension_organization(dataset, PLACEHOLDER)  # highdicom sets a random UID
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    dataset.SOPInstanceUID = derived_uid("instance", digest)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.SeriesInstanceUID = derived_uid("series", digest)
    _set_dimension_organization(dataset, derived_uid("dimensions", digest))
    return dataset


def _restore_texts(dataset: Dataset, source: SourceSeries) -> None:
    """Set the bytes of the source where decoding and encoding would change them.

    Bytes that do not fit the declared character set are decoded with a replacement character. A name must be the same
    in all objects of a patient.
    """
    for name, value in source.raw_texts.items():
        if name in dataset and _encode(dataset, name).rstrip(_PADDING) != value.rstrip(_PADDING):
            element = dataset[name]
            content: _EncodedName | bytes = value
            if element.VR == "PN":
                content = _EncodedName(str(element.value))
                content.content = value
            dataset[name] = DataElement(element.tag, element.VR, content, already_converted=True)


class _EncodedName(PersonName):
    """Name that is written with given bytes. pydicom writes only text attributes from bytes."""

    content = b""

    def encode(self, encodings: Sequence[str] | None = None) -> bytes:  # noqa: ARG002
        """Return the given bytes."""
        return self.content


def _encode(dataset: Dataset, name: str) -> bytes:
    """Return the bytes with which an attribute would be written."""
    part = Dataset()
    for keyword in ("SpecificCharacterSet", name):
        if keyword in dataset:
            part[keyword] = dataset[keyword]
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = False, True
    write_dataset(buffer, part)
    written = read_dataset(BytesIO(buffer.getvalue()), is_implicit_VR=False, is_little_endian=True).get_item(name)
    return bytes(written.value or b"") if written else b""


def _set_dimension_organization(dataset: Dataset, uid: str) -> None:
    for item in (*dataset.get("DimensionOrganizationSequence", ()), *dataset.get("DimensionIndexSequence", ())):
        item.DimensionOrganizationUID = uid


def tracking_identifiers(report: Report, series_uid: str, label: int) -> tuple[str, str]:
    """Return Tracking ID and Tracking UID of a lesion, for both segmentation and structured report.

    The UID belongs to one analysis. It does not identify the same lesion in another analysis.
    """
    finding = report.findings[label - 1]
    uid = derived_uid("lesion", series_uid, *analysis_key(report), finding.model_dump_json())
    return f"Lesion {label}", uid


def analysis_key(report: Report) -> tuple[str, ...]:
    """Return the values that distinguish two analyses of one series: model, seed, code version and precision."""
    model = report.model
    key = (model.sha256, str(model.seed), report.code_version)
    return (*key, model.precision) if model.precision else key


def device_uid(report: Report) -> str:
    """Return the UID of the observer: this version of the code with these weights."""
    return derived_uid("device", report.code_version, report.model.sha256)


def algorithm_parameters(report: Report) -> dict[str, str]:
    """Return the parameters that determine the result: bundle, precision, seed, thresholds."""
    precision = {"precision": report.model.precision} if report.model.precision else {}
    return {
        "bundle": report.model.id,
        "bundle_sha256": report.model.sha256,
        **precision,
        "seed": str(report.model.seed),
        "threshold": f"{report.threshold:.6g}",
        "extent_threshold": f"{report.extent_threshold:.6g}",
    }


def algorithm_identification(report: Report) -> AlgorithmIdentificationSequence:
    """Return the Algorithm Identification Macro (PS3.3 table 10-19)."""
    return AlgorithmIdentificationSequence(
        name=MANUFACTURER,
        version=report.code_version,
        family=codes.DCM.ArtificialIntelligence,
        source=MANUFACTURER,
        parameters=algorithm_parameters(report),
    )


def shared_arguments(source: SourceSeries, report: Report) -> dict[str, Any]:
    """Return the arguments that the highdicom constructors of both objects share.

    They include Enhanced General Equipment (PS3.3 C.7.5.2): the model is the bundle, the serial number is its hash.
    """
    date, time = source.content_time
    return {
        "series_instance_uid": PLACEHOLDER,
        "sop_instance_uid": PLACEHOLDER,
        "instance_number": 1,
        "content_date": date,
        "content_time": time,
        "content_qualification": "RESEARCH",
        # highdicom does not support every character set: `assign_uids` copies the source's.
        "specific_character_set": None,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": report.model.id,
        "software_versions": report.code_version,
        "device_serial_number": report.model.sha256,  # 64 characters, the maximum of the value representation LO
    }


def private_code(value: str, meaning: str) -> CodedConcept:
    """Return a concept of the private coding scheme."""
    return CodedConcept(value, CODING_SCHEME, meaning)


ANOMALY_SCORE = private_code("anomaly-score", "Anomaly score")
