"""DICOM Segmentation: position of the lesions, references, copied attributes, unusual headers."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pydicom
import pytest
from nibabel import affines, orientations
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import UID, ImplicitVRLittleEndian, SecondaryCaptureImageStorage

from app.dicom_attributes import silence_libraries
from app.export.dicom.source import PATIENT, STUDY
from app.ingest.reader import read_scan
from app.volume import Scan, Volume
from tests.export.conftest import (
    BALLS,
    OBJECTS,
    OBLIQUE,
    SHAPE,
    SPACING,
    Change,
    DicomResults,
    legacy_enhanced,
    read_series,
    set_attributes,
    turned_grid,
    write_results,
)
from tests.support.dicom import RAS_TO_LPS, SECRET, Plane, Series, make_datasets, save, shift_slice, tilt_gantry
from tests.support.enhanced import make_enhanced
from tests.support.geometry import LAYOUTS
from tests.support.grids import tilted
from tests.support.mosaic import make_mosaic
from tests.support.phantom import brain, grid
from tests.support.results import Ball, on_grid
from tests.support.segmentation import Points, segment_points

TURNS = {"straight": (0.0, 0.0, 0.0), "oblique": OBLIQUE}
SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"
# A decimal string has 16 characters, enough for micrometres.
EXACT_MM = 1e-4


def expected_points(results: DicomResults, label: int) -> Points:
    """Return the LPS millimetres of a finding's voxels, from the mask and its affine."""
    voxels = np.argwhere(results.result.labels == label)
    return np.asarray(affines.apply_affine(RAS_TO_LPS @ results.result.affine, voxels))


def sort_points(points: Points) -> Points:
    return np.asarray(points[np.lexsort(np.round(points, 2).T)])


def check_points(results: DicomResults) -> dict[int, Points]:
    """Compare every voxel of every segment with the mask."""
    assert results.absent == {}
    segments = segment_points(results.segmentation)
    assert sorted(segments) == [1, 2]
    for label, points in segments.items():
        expected = sort_points(expected_points(results, label))
        np.testing.assert_allclose(sort_points(points), expected, atol=EXACT_MM)
    return segments


def check_position(results: DicomResults) -> None:
    """Compare every voxel with the mask, and each centroid with the centre of its ball."""
    segments = check_points(results)
    for label, (centre, _) in enumerate(BALLS, start=1):
        # The voxels of a ball are not exactly symmetric about its centre.
        np.testing.assert_allclose(segments[label].mean(axis=0), RAS_TO_LPS[:3, :3] @ centre, atol=0.7)


def references(results: DicomResults) -> list[tuple[Dataset, Dataset]]:
    """Return each frame of the segmentation with its only source image reference."""
    pairs = []
    for frame in pydicom.dcmread(results.segmentation).PerFrameFunctionalGroupsSequence:
        (reference,) = frame.DerivationImageSequence[0].SourceImageSequence
        pairs.append((frame, reference))
    return pairs


def check_no_references(results: DicomResults) -> Dataset:
    """Check that no frame refers to a source image as if it were the same slice."""
    made = pydicom.dcmread(results.segmentation)
    assert not any(frame.get("DerivationImageSequence") for frame in made.PerFrameFunctionalGroupsSequence)
    return made


# ---- position ----------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("plane", get_args(Plane))
@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_lesions_keep_their_position(tmp_path: Path, plane: Plane, turn: str, modality: str) -> None:
    series = Series(plane=plane, modality=modality)  # type: ignore[arg-type]
    check_position(write_results(tmp_path / "out", read_series(tmp_path, series, turned_grid(*TURNS[turn]))))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "".join(orientations.ornt2axcodes(layout)))
def test_lesions_keep_their_position_in_every_axis_layout(tmp_path: Path, layout: Any) -> None:
    shape = (15, 19, 13)
    whole = brain(shape, tilted(grid(shape, 11.0), *OBLIQUE))
    array = orientations.apply_orientation(whole.array, layout)
    volume = Volume(array, whole.affine @ orientations.inv_ornt_aff(layout, whole.shape))
    save(tmp_path / "s", make_datasets(volume, Series(plane=None)))
    results = write_results(tmp_path / "out", read_scan(tmp_path / "s", scratch=tmp_path / "scratch"))
    for label, points in check_points(results).items():
        centroid = RAS_TO_LPS[:3, :3] @ results.report.findings[label - 1].centroid_mm
        np.testing.assert_allclose(points.mean(axis=0), centroid, atol=EXACT_MM)


def read_multi_frame(folder: Path, *, per_frame: bool) -> Scan:
    image = legacy_enhanced(make_datasets(brain(SHAPE, turned_grid(*OBLIQUE)), Series(plane="sagittal")))
    if per_frame:  # measures and orientation in each frame's group instead of the shared one
        shared = image.SharedFunctionalGroupsSequence[0]
        for frame in image.PerFrameFunctionalGroupsSequence:
            frame.PixelMeasuresSequence = shared.PixelMeasuresSequence
            frame.PlaneOrientationSequence = shared.PlaneOrientationSequence
        del shared.PixelMeasuresSequence, shared.PlaneOrientationSequence
    image.save_as(folder / "image", enforce_file_format=True)
    return read_scan(folder / "image", scratch=folder / "scratch")


@pytest.mark.parametrize("per_frame", [False, True])
def test_enhanced_image_is_referenced_by_frame(tmp_path: Path, *, per_frame: bool) -> None:
    results = write_results(tmp_path / "out", read_multi_frame(tmp_path, per_frame=per_frame))
    check_position(results)
    source = pydicom.dcmread(tmp_path / "image")
    for frame, reference in references(results):
        assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
        group = source.PerFrameFunctionalGroupsSequence[reference.ReferencedFrameNumber - 1]
        assert frame.PlanePositionSequence == group.PlanePositionSequence


def test_only_the_frames_of_the_read_echo_are_referenced(tmp_path: Path) -> None:
    (path,) = save(tmp_path, [make_enhanced(brain(SHAPE, turned_grid(*OBLIQUE)), Series(), (10.0, 80.0))])
    source = pydicom.dcmread(path)
    echo_times = []
    for number in (1, 2):
        scan = read_scan(path, scratch=tmp_path / "scratch", series=f"{source.SeriesInstanceUID}/{number}")
        assert len(set(scan.source.frames)) == SHAPE[2]
        results = write_results(tmp_path / f"out{number}", scan)
        check_position(results)
        found = set()
        for frame, reference in references(results):
            group = source.PerFrameFunctionalGroupsSequence[reference.ReferencedFrameNumber - 1]
            assert frame.PlanePositionSequence == group.PlanePositionSequence
            found.add(group.MREchoSequence[0].EffectiveEchoTime)
        echo_times.append(sorted(found))
    assert sorted(echo_times) == [[10.0], [80.0]]


@pytest.mark.parametrize("mirrored", [(), (0,), (2,), (0, 1)])
def test_scan_on_another_grid_is_segmented_on_that_grid(tmp_path: Path, mirrored: tuple[int, ...]) -> None:
    scan = read_series(tmp_path, Series(), turned_grid(*OBLIQUE))
    flip = np.eye(4)
    for axis in mirrored:
        flip[axis, axis], flip[axis, 3] = -1, SHAPE[axis] - 1
    results = write_results(tmp_path / "out", on_grid(scan, turned_grid(1.0, 2.0, 3.0) @ flip))
    check_position(results)
    assert len(check_no_references(results).SourceImageSequence) == SHAPE[2]


def write_resampled(folder: Path, fault: Change, degrees: tuple[float, float, float]) -> DicomResults:
    slices = make_datasets(brain(SHAPE, turned_grid(*degrees)), Series())
    fault(slices)
    save(folder / "series", slices)
    scan = read_scan(folder / "series", scratch=folder / "scratch", geometry="resample")
    assert scan.source.resampled
    return write_results(folder / "out", scan)


@pytest.mark.parametrize(
    "fault", [tilt_gantry, lambda s: s.pop(9), lambda s: shift_slice(s, 12, (0, 0, 2.3))], ids=["tilt", "gap", "uneven"]
)
def test_lesions_keep_their_position_in_a_resampled_series(tmp_path: Path, fault: Change) -> None:
    check_position(write_resampled(tmp_path, fault, OBLIQUE))


def test_resampled_slices_do_not_refer_to_adjacent_source_slices(tmp_path: Path) -> None:
    """A slice is 0.2 mm off: too much for the reader, but within the distance at which slices are matched."""
    results = write_resampled(tmp_path, lambda s: shift_slice(s, 16, (0, 0, 0.2)), (0, 0, 0))
    check_position(results)
    check_no_references(results)


@pytest.mark.parametrize("downwards", [False, True])
def test_mosaic_is_segmented_at_the_position_of_its_tiles(tmp_path: Path, *, downwards: bool) -> None:
    volume = brain(SHAPE, turned_grid(*OBLIQUE))
    (path,) = save(tmp_path, [make_mosaic(volume, Series(), is_reversed=downwards)])
    results = write_results(tmp_path / "out", read_scan(path, scratch=tmp_path / "scratch"))
    check_position(results)
    made, source = check_no_references(results), pydicom.dcmread(path)
    assert (made.Columns, made.Rows) == SHAPE[:2]
    assert (source.Columns, source.Rows) != SHAPE[:2]
    assert [item.ReferencedSOPInstanceUID for item in made.SourceImageSequence] == [source.SOPInstanceUID]


def test_slightly_irregular_slices_keep_their_own_positions(tmp_path: Path) -> None:
    """The reader's limits: cosines that differ in the fourth decimal, positions rounded to 0.1 mm."""

    def make_irregular(slices: list[FileDataset]) -> None:
        for k, dataset in enumerate(slices):
            dataset.ImagePositionPatient = [round(float(v), 1) for v in dataset.ImagePositionPatient]
            cosine = 4e-4 * (k % 2)
            dataset.ImageOrientationPatient = [1, cosine, 0, -cosine, 1, 0]

    results = write_results(tmp_path / "out", read_series(tmp_path, Series(), change=make_irregular))
    sources = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, results.scan.source.instances)}
    for frame, reference in references(results):
        position = sources[reference.ReferencedSOPInstanceUID].ImagePositionPatient
        assert frame.PlanePositionSequence[0].ImagePositionPatient == position
    for label, points in segment_points(results.segmentation).items():
        np.testing.assert_allclose(points.mean(axis=0), expected_points(results, label).mean(axis=0), atol=0.1)


# ---- references and codes ----------------------------------------------------------------------


def test_segmentation_belongs_to_the_study_and_refers_to_the_slices(results: DicomResults) -> None:
    sources = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, results.scan.source.instances)}
    first = next(iter(sources.values()))
    made = pydicom.dcmread(results.segmentation)
    assert (made.SOPClassUID, made.Modality, made.SegmentationType) == (SEGMENTATION_STORAGE, "SEG", "BINARY")
    assert made.StudyInstanceUID == first.StudyInstanceUID
    assert made.FrameOfReferenceUID == first.FrameOfReferenceUID
    assert made.SeriesInstanceUID != first.SeriesInstanceUID
    series = made.ReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == first.SeriesInstanceUID
    assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} == set(sources)
    shared = made.SharedFunctionalGroupsSequence[0]
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == first.ImageOrientationPatient
    assert shared.PixelMeasuresSequence[0].PixelSpacing == first.PixelSpacing
    assert shared.PixelMeasuresSequence[0].SpacingBetweenSlices == pytest.approx(SPACING[2])
    pairs = references(results)
    slices = [np.unique(np.round(points[:, 2], 3)) for points in segment_points(results.segmentation).values()]
    assert len(pairs) == sum(map(len, slices))
    for frame, reference in pairs:
        position = sources[reference.ReferencedSOPInstanceUID].ImagePositionPatient
        assert frame.PlanePositionSequence[0].ImagePositionPatient == position


def test_segments_have_codes_and_algorithm(results: DicomResults) -> None:
    made = pydicom.dcmread(results.segmentation)
    assert [int(s.SegmentNumber) for s in made.SegmentSequence] == [1, 2]
    for number, segment in enumerate(made.SegmentSequence, start=1):
        codes = (
            segment.SegmentedPropertyCategoryCodeSequence[0],
            segment.SegmentedPropertyTypeCodeSequence[0],
            segment.AnatomicRegionSequence[0],
        )
        assert [(c.CodeValue, c.CodingSchemeDesignator) for c in codes] == [
            ("49755003", "SCT"),  # Morphologically Abnormal Structure
            ("52988006", "SCT"),  # Lesion
            ("12738006", "SCT"),  # Brain
        ]
        assert (segment.SegmentLabel, segment.SegmentAlgorithmType) == (f"Lesion {number}", "AUTOMATIC")
        algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("Counterpart", results.report.code_version)
        assert f"bundle=tiny-0.0.1,bundle_sha256={'5a' * 32},seed=7" in algorithm.AlgorithmParameters
    assert made.ContentQualification == "RESEARCH"
    assert made.ContentDescription == "Research use only. Not a medical device. Not for diagnosis."
    assert made.DeviceSerialNumber == "5a" * 32


# ---- copied attributes -------------------------------------------------------------------------

NOT_COPIED = (
    "PatientAddress",
    "PatientMotherBirthName",
    "OtherPatientNames",
    "PatientComments",
    "PatientTelephoneNumbers",
    "Occupation",
    "AdditionalPatientHistory",
    "StudyDescription",
    "PhysiciansOfRecord",
    "OperatorsName",
    "InstitutionName",
    "InstitutionAddress",
    "InstitutionalDepartmentName",
    "StationName",
    "DeviceSerialNumber",
    "ManufacturerModelName",
    "ImageComments",
    "RequestingPhysician",
    "ClinicalTrialSponsorName",
    "ClinicalTrialProtocolID",
    "ClinicalTrialSubjectID",
)


def add_patient_data(slices: list[FileDataset]) -> None:
    """Fill the headers with attributes that must not be copied."""
    for dataset in slices:
        for name in NOT_COPIED:
            setattr(dataset, name, f"{SECRET} {name}"[:16])
        dataset.PatientAge, dataset.PatientWeight, dataset.PatientSize = "119Y", "80", "1.8"
        dataset.EthnicGroup, dataset.PatientIdentityRemoved, dataset.PregnancyStatus = SECRET, "NO", 4
        other = Dataset()
        other.PatientID, other.IssuerOfPatientID = SECRET, SECRET
        dataset.OtherPatientIDsSequence = [other]
        dataset.add_new(0x00091001, "LO", SECRET)
        dataset.add_new(0x00090010, "LO", SECRET)


@pytest.mark.parametrize("name", OBJECTS)
def test_only_required_attributes_are_copied(tmp_path: Path, name: str) -> None:
    results = write_results(tmp_path / "out", read_series(tmp_path, Series(), change=add_patient_data))
    made = pydicom.dcmread(getattr(results, name))
    secret = {e.keyword for e in made.iterall() if SECRET in str(e.value) and e.VR != "SQ"}
    assert secret == {"PatientName", "PatientID", "ReferringPhysicianName"}
    source = pydicom.dcmread(results.scan.source.instances[0])
    for keyword in (*PATIENT, *STUDY):
        assert made[keyword].value == source[keyword].value, keyword
    prefixes = ("Patient", "Other", "Study", "Clinical", "Ethnic")
    assert {e.keyword for e in made if e.keyword.startswith(prefixes)} <= {*PATIENT, *STUDY, "PatientOrientation"}
    assert [e.ManufacturerModelName for e in made.ContributingEquipmentSequence] == ["highdicom"]


def test_patient_data_is_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def change(slices: list[FileDataset]) -> None:
        add_patient_data(slices)
        for dataset in slices:
            dataset.PatientName = f"{SECRET} Alberta"  # highdicom warns about a name without a caret and prints it

    caplog.set_level(logging.DEBUG)
    scan = read_series(tmp_path, Series(), change=change)
    caplog.clear()
    capfd.readouterr()
    assert write_results(tmp_path / "out", scan).absent == {}
    assert SECRET not in caplog.text
    assert capfd.readouterr() == ("", "")


# ---- unusual headers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"PatientSex": "U"}, {"PatientSex": ""}),
        ({"PatientBirthDate": "1900"}, {"PatientBirthDate": ""}),
        ({"StudyDate": "", "StudyTime": ""}, {"StudyDate": "", "ContentDate": "20200101"}),
        (
            {"StudyDate": "", "StudyTime": "", "SeriesDate": None},
            {"ContentDate": "19000101", "ContentTime": "000000"},
        ),
        (
            {"PatientName": None, "PatientID": None, "AccessionNumber": None, "StudyID": None},
            {"PatientName": "", "StudyID": ""},
        ),
        ({"SliceThickness": None}, {}),
        ({"ReferringPhysicianName": None}, {"ReferringPhysicianName": ""}),
        (
            {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "山田^太郎"},
            {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "山田^太郎"},
        ),
        (
            {"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou=山田^太郎"},
            {"PatientName": "Yamada^Tarou=山田^太郎"},
        ),
        ({"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jörg"}, {"PatientName": "Müller^Jörg"}),
        ({"LossyImageCompression": "01", "LossyImageCompressionRatio": "10"}, {"LossyImageCompression": "01"}),
        (
            {
                "ContentDate": "20211231",
                "ContentTime": "235959.5",
                "AcquisitionDate": "20200303",
                "AcquisitionTime": "1",
            },
            {"ContentDate": "20211231", "ContentTime": "235959.5"},
        ),
    ],
)
def test_unusual_header_is_accepted(tmp_path: Path, change: dict[str, object], expected: dict[str, str]) -> None:
    with silence_libraries():
        results = write_results(tmp_path / "out", read_series(tmp_path, Series(), change=set_attributes(**change)))
        check_position(results)
        for path in results.paths:
            made = pydicom.dcmread(path)
            for name, value in expected.items():
                if path != results.structured_report or not name.startswith("Lossy"):
                    assert str(made[name].value or "") == value, name


def set_invalid_ratio(slices: list[FileDataset]) -> None:
    for dataset in slices:
        dataset.LossyImageCompression = "01"
        dataset.add_new("LossyImageCompressionRatio", "LO", SECRET)


@pytest.mark.parametrize(
    ("change", "keyword"),
    [
        (set_attributes(StudyInstanceUID=None), "StudyInstanceUID"),
        (set_attributes(SOPClassUID=SecondaryCaptureImageStorage), "Secondary Capture Image Storage"),
        (set_attributes(SOPClassUID="1.2.840.113619.4.2"), "SOP class"),
        (lambda s: setattr(s[3], "StudyInstanceUID", "1.2.3"), "2 studies"),
        (lambda s: setattr(s[3], "SOPInstanceUID", s[4].SOPInstanceUID), "SOPInstanceUID of another image"),
        (set_invalid_ratio, "invalid value"),
    ],
)
def test_unsuitable_series_has_no_dicom_results(tmp_path: Path, change: Change, keyword: str) -> None:
    with silence_libraries():
        # Implicit VR: the reader assigns the value representation of the standard to the invalid value.
        scan = read_series(tmp_path, Series(syntax=ImplicitVRLittleEndian), change=change)
        results = write_results(tmp_path / "out", scan)
    assert set(results.absent) == {path.name for path in results.paths}
    for reason in results.absent.values():
        assert reason.code == "unsuitable_source"
        assert keyword in reason.found
        assert SECRET not in str(reason)
    assert list((tmp_path / "out").iterdir()) == []


def set_other_frame_of_reference(slices: list[FileDataset]) -> None:
    slices[3].FrameOfReferenceUID = "1.2.3"


@pytest.mark.parametrize(
    ("change", "keyword"),
    [
        (set_attributes(FrameOfReferenceUID=None), "no FrameOfReferenceUID"),
        (set_other_frame_of_reference, "2 frames of reference"),
    ],
)
@pytest.mark.parametrize("balls", [BALLS, ()], ids=["lesions", "none"])
def test_series_without_one_frame_of_reference_has_only_a_report_and_a_page(
    tmp_path: Path, change: Change, keyword: str, balls: Sequence[Ball]
) -> None:
    results = write_results(tmp_path / "out", read_series(tmp_path, Series(), change=change), balls)
    assert set(results.absent) == {"segmentation.dcm", "anomaly.dcm"}
    assert keyword in results.absent["anomaly.dcm"].found
    assert results.absent["segmentation.dcm"].code == ("unsuitable_source" if balls else "no_lesion")
    made = pydicom.dcmread(results.structured_report)
    groups = [item for item in made.ContentSequence if "ContentSequence" in item]
    assert groups
    if balls:
        assert keyword in results.absent["segmentation.dcm"].found
        volumes = [f"{finding.volume_ml:g}" for finding in results.report.findings]
        text = str(made)
        assert all(volume in text for volume in volumes)
        assert "Referenced Segment" not in text


def write_concatenation(folder: Path, parts: Sequence[int]) -> None:
    """Write a phantom as legacy enhanced images of one series, with this number of frames each."""
    slices = make_datasets(brain(SHAPE, turned_grid(0, 0, 0)), Series())
    folder.mkdir()
    for number, count in enumerate(parts):
        image = legacy_enhanced(slices[:count])
        del slices[:count]
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.{number + 1}")
        image.save_as(folder / str(number), enforce_file_format=True)


@pytest.mark.parametrize("parts", [(20, 4), (10, 13, 1), (1, 23)], ids=str)
def test_segmentation_refers_to_the_frames_of_a_concatenation(tmp_path: Path, parts: tuple[int, ...]) -> None:
    write_concatenation(tmp_path / "s", parts)
    results = write_results(tmp_path / "out", read_scan(tmp_path / "s", scratch=tmp_path / "scratch"))
    assert results.absent == {}
    images = {image.SOPInstanceUID: image for image in map(pydicom.dcmread, (tmp_path / "s").iterdir())}
    made = pydicom.dcmread(results.segmentation)
    referenced = made.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {item.ReferencedSOPInstanceUID for item in referenced} == set(images)
    for group in made.PerFrameFunctionalGroupsSequence:
        (item,) = group.DerivationImageSequence[0].SourceImageSequence
        frames = images[item.ReferencedSOPInstanceUID].PerFrameFunctionalGroupsSequence
        source = frames[item.ReferencedFrameNumber - 1].PlanePositionSequence[0].ImagePositionPatient
        assert group.PlanePositionSequence[0].ImagePositionPatient == source
    report = pydicom.dcmread(results.structured_report)
    evidence = str(report.CurrentRequestedProcedureEvidenceSequence)
    assert all(uid in evidence for uid in images)
    segments = segment_points(results.segmentation)
    for finding in results.report.findings:
        centroid = segments[finding.label].mean(axis=0)
        np.testing.assert_allclose(centroid, RAS_TO_LPS[:3, :3] @ finding.centroid_mm, atol=1e-3)


@pytest.mark.parametrize("charset", ["ISO_IR 192", "ISO_IR 6", "GB18030", "ISO 2022 IR 87"])
def test_bytes_that_do_not_fit_the_character_set_are_copied_unchanged(tmp_path: Path, charset: str) -> None:
    """The bytes are patched in the files, because pydicom does not write them."""
    names = set_attributes(SpecificCharacterSet=charset, PatientName="M#ller^Uwe", PatientID="M#1", StudyID="M#")
    slices = make_datasets(brain(SHAPE, turned_grid(0, 0, 0)), Series())
    names(slices)
    with silence_libraries():
        for path in save(tmp_path / "s", slices):
            path.write_bytes(path.read_bytes().replace(b"M#", b"M\xfc"))
        results = write_results(tmp_path / "out", read_scan(tmp_path / "s", scratch=tmp_path / "scratch"))
    for path in results.paths:
        content = path.read_bytes()
        assert b"PN\x0a\x00M\xfcller^Uwe" in content
        assert b"LO\x04\x00M\xfc1 " in content
        assert b"SH\x02\x00M\xfc" in content
        with silence_libraries():
            assert pydicom.dcmread(path).SpecificCharacterSet == charset


# ---- label map ---------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", get_args(Plane))
def test_label_map_has_the_labels_at_their_positions(tmp_path: Path, plane: Plane) -> None:
    scan = read_series(tmp_path, Series(plane=plane), turned_grid(*OBLIQUE))
    results = write_results(tmp_path / "out", scan, segmentation_type="labelmap")
    made = pydicom.dcmread(results.segmentation)
    assert (made.SOPClassUID, made.SegmentationType) == (LABEL_MAP_STORAGE, "LABELMAP")
    pixels = made.pixel_array.reshape(made.NumberOfFrames, made.Rows, made.Columns)
    orientation = np.array(made.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient)
    spacing = np.array(made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing, float)
    found = np.zeros(scan.volume.shape, int)
    to_voxels = np.linalg.inv(RAS_TO_LPS @ scan.volume.affine)
    for group, frame in zip(made.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        origin = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        rows, columns = np.nonzero(frame)
        points = origin + np.outer(columns * spacing[1], orientation[:3]) + np.outer(rows * spacing[0], orientation[3:])
        found[tuple(affines.apply_affine(to_voxels, points).round().astype(int).T)] = frame[rows, columns]
    np.testing.assert_array_equal(found, results.result.labels)
    assert made.SOPInstanceUID in str(pydicom.dcmread(results.structured_report))
