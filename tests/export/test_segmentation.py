"""Segmentations: where they lie, what they refer to, what they repeat of the source."""

import logging
from pathlib import Path
from typing import Any, get_args

import nibabel as nib
import numpy as np
import pydicom
import pytest
from highdicom.legacy import LegacyConvertedEnhancedMRImage
from nibabel import affines, orientations
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import ImplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from app.export.dicom.source import PATIENT, STUDY
from app.ingest import read
from app.ingest.quiet import quiet
from app.volume import Scan, Volume
from tests.export.conftest import BALLS, SHAPE, SPACING, Change, Written, oblique, scan_of, write
from tests.ingest.test_round_trip import LAYOUTS
from tests.ingest.test_stack import shift, tilt
from tests.support.dicom import RAS_TO_LPS, SECRET, Plane, Series, datasets, save
from tests.support.enhanced import enhanced as with_echoes
from tests.support.grids import tilted
from tests.support.external_tools import require_tool
from tests.support.mosaic import mosaic
from tests.support.phantom import brain, grid
from tests.support.results import resampled
from tests.support.segmentation import segment_points

TURNS = {"straight": (0.0, 0.0, 0.0), "oblique": (9.0, -14.0, 21.0)}
SMALL = (15, 19, 13)
SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"
# A decimal string of 16 characters holds micrometres.
EXACT_MM = 1e-4


def expected_points(written: Written, label: int) -> np.ndarray:
    """LPS millimetres of a finding, from the mask and its affine, sorted."""
    centre = written.report.findings[label - 1].centroid_mm
    points = affines.apply_affine(written.result.affine, np.argwhere(written.result.mask))
    other = next(f.centroid_mm for f in written.report.findings if f.label != label)
    nearer = np.linalg.norm(points - centre, axis=1) < np.linalg.norm(points - other, axis=1)
    return by_place(affines.apply_affine(RAS_TO_LPS, points[nearer]))


def by_place(points: np.ndarray) -> np.ndarray:
    return points[np.lexsort(np.round(points, 2).T)]


def check_place(written: Written) -> None:
    """Every voxel of every segment, and the lesions' centres as they were put into the patient."""
    found = segment_points(written.segmentation)
    assert sorted(found) == [1, 2]
    for label, (centre, _) in zip((1, 2), BALLS, strict=True):
        np.testing.assert_allclose(by_place(found[label]), expected_points(written, label), atol=EXACT_MM)
        # A ball's voxels are not quite symmetric about its centre.
        np.testing.assert_allclose(found[label].mean(axis=0), RAS_TO_LPS[:3, :3] @ centre, atol=0.7)


# ---- place -------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("plane", get_args(Plane))
@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_a_lesion_lies_where_it_was_put(tmp_path: Path, plane: Plane, turn: str, modality: str) -> None:
    scan = scan_of(tmp_path, Series(plane=plane, modality=modality), oblique(*TURNS[turn]))  # type: ignore[arg-type]
    written = write(tmp_path / "out", scan)
    assert written.absent == {}
    check_place(written)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "".join(orientations.ornt2axcodes(layout)))
def test_a_lesion_lies_where_it_was_put_in_every_axis_layout(tmp_path: Path, layout: Any) -> None:
    """Rows, columns and slices along any axes and in any sense, oblique."""
    whole = brain(SMALL, tilted(grid(SMALL, 11.0), *TURNS["oblique"]))
    array = orientations.apply_orientation(whole.array, layout)
    volume = Volume(array, whole.affine @ orientations.inv_ornt_aff(layout, whole.shape))
    save(tmp_path / "s", datasets(volume, Series(plane=None)))
    written = write(tmp_path / "out", read(tmp_path / "s", scratch=tmp_path / "scratch"))
    assert written.absent == {}
    found = segment_points(written.segmentation)
    for label in (1, 2):
        np.testing.assert_allclose(by_place(found[label]), expected_points(written, label), atol=EXACT_MM)
        centre = RAS_TO_LPS[:3, :3] @ written.report.findings[label - 1].centroid_mm
        np.testing.assert_allclose(found[label].mean(axis=0), centre, atol=EXACT_MM)


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("plane", get_args(Plane))
def test_another_toolkit_puts_it_there_too(tmp_path: Path, plane: Plane, turn: str) -> None:
    """dcmqi: ITK and DCMTK, nothing of what wrote it."""
    segimage2itkimage = require_tool("segimage2itkimage")
    written = write(tmp_path / "out", scan_of(tmp_path, Series(plane=plane), oblique(*TURNS[turn])))
    arguments = ("--inputDICOM", written.segmentation, "--outputDirectory", tmp_path, "-t", "nii", "-p", "seg")
    segimage2itkimage(*arguments)
    for label, (centre, _) in zip((1, 2), BALLS, strict=True):
        image = nib.load(tmp_path / f"seg-{label}.nii.gz")
        assert isinstance(image, nib.Nifti1Image)
        voxels = np.argwhere(np.asarray(image.dataobj) > 0)
        points = affines.apply_affine(RAS_TO_LPS @ image.affine, voxels)
        np.testing.assert_allclose(points.mean(axis=0), expected_points(written, label).mean(axis=0), atol=1e-3)
        np.testing.assert_allclose(points.mean(axis=0), RAS_TO_LPS[:3, :3] @ centre, atol=0.7)


def enhanced(slices: list[FileDataset]) -> LegacyConvertedEnhancedMRImage:
    """The slices as one multi-frame image, frames in an order that says nothing, made by highdicom."""
    for dataset in slices:  # what its module asks for
        dataset.BurnedInAnnotation, dataset.VolumetricProperties = "NO", "VOLUME"
        dataset.ContentDate, dataset.ContentTime = "20200102", "130000"
        dataset.AcquisitionDate, dataset.AcquisitionTime, dataset.AcquisitionNumber = "20200102", "130000", 1
    shuffled = [slices[i] for i in np.random.default_rng(4).permutation(len(slices))]
    uid = generate_uid(entropy_srcs=["enhanced"])
    with quiet():
        made = LegacyConvertedEnhancedMRImage(shuffled, generate_uid(entropy_srcs=["enhanced series"]), 1, uid, 1)
    del made.ClinicalTrialTimePointID  # highdicom's own addition: there is no trial
    return made


def multi_frame(folder: Path, *, changed: bool = False) -> Scan:
    image = enhanced(datasets(brain(SHAPE, oblique(*TURNS["oblique"])), Series(plane="sagittal")))
    if changed:  # measures and orientation with every frame, in place of once for all
        shared = image.SharedFunctionalGroupsSequence[0]
        for frame in image.PerFrameFunctionalGroupsSequence:
            frame.PixelMeasuresSequence = shared.PixelMeasuresSequence
            frame.PlaneOrientationSequence = shared.PlaneOrientationSequence
        del shared.PixelMeasuresSequence, shared.PlaneOrientationSequence
    image.save_as(folder / "image", enforce_file_format=True)
    return read(folder / "image", scratch=folder / "scratch")


@pytest.mark.parametrize("changed", [False, True], ids=["shared", "per frame"])
def test_an_enhanced_image_is_referred_to_frame_by_frame(tmp_path: Path, changed: bool) -> None:  # noqa: FBT001
    written = write(tmp_path / "out", multi_frame(tmp_path, changed=changed))
    assert written.absent == {}
    check_place(written)
    source, made = pydicom.dcmread(tmp_path / "image"), pydicom.dcmread(written.segmentation)
    for frame in made.PerFrameFunctionalGroupsSequence:
        (reference,) = frame.DerivationImageSequence[0].SourceImageSequence
        assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
        group = source.PerFrameFunctionalGroupsSequence[reference.ReferencedFrameNumber - 1]
        assert frame.PlanePositionSequence == group.PlanePositionSequence


@pytest.mark.parametrize("mirrored", [(), (0,), (2,), (0, 1)])
def test_a_resampled_scan_is_segmented_on_its_own_grid(tmp_path: Path, mirrored: tuple[int, ...]) -> None:
    """Where slices were resampled, none of the source's is claimed to be one of them; the place is right."""
    scan = scan_of(tmp_path, Series(), oblique(*TURNS["oblique"]))
    flip = np.eye(4)
    for axis in mirrored:
        flip[axis, axis], flip[axis, 3] = -1, SHAPE[axis] - 1
    written = write(tmp_path / "out", resampled(scan, oblique(1.0, 2.0, 3.0) @ flip))
    assert written.absent == {}
    check_place(written)
    made = pydicom.dcmread(written.segmentation)
    assert not any(frame.get("DerivationImageSequence") for frame in made.PerFrameFunctionalGroupsSequence)
    assert len(made.SourceImageSequence) == SHAPE[2]


@pytest.mark.parametrize(
    "fault", [tilt, lambda s: s.pop(9), lambda s: shift(s, 12, (0, 0, 2.3))], ids=["tilt", "gap", "uneven"]
)
def test_irregular_slices_that_were_resampled_are_segmented_in_place(tmp_path: Path, fault: Change) -> None:
    slices = datasets(brain(SHAPE, oblique(*TURNS["oblique"])), Series())
    fault(slices)
    save(tmp_path / "series", slices)
    scan = read(tmp_path / "series", scratch=tmp_path / "scratch", geometry="resample")
    assert scan.source.resampled
    written = write(tmp_path / "out", scan)
    assert written.absent == {}
    check_place(written)


def test_slices_that_were_resampled_are_not_those_that_lie_beside_them(tmp_path: Path) -> None:
    """A fifth of a millimetre off its place: too much for the reader, near enough to be taken for the source's."""
    slices = datasets(brain(SHAPE, oblique(0, 0, 0)), Series())
    shift(slices, 16, (0, 0, 0.2))
    save(tmp_path / "series", slices)
    written = write(tmp_path / "out", read(tmp_path / "series", scratch=tmp_path / "scratch", geometry="resample"))
    check_place(written)
    made = pydicom.dcmread(written.segmentation)
    assert not any(frame.get("DerivationImageSequence") for frame in made.PerFrameFunctionalGroupsSequence)


@pytest.mark.parametrize("downwards", [False, True])
def test_a_mosaic_is_segmented_where_its_tiles_lie(tmp_path: Path, *, downwards: bool) -> None:
    (path,) = save(tmp_path, [mosaic(brain(SHAPE, oblique(*TURNS["oblique"])), Series(), downwards=downwards)])
    written = write(tmp_path / "out", read(path, scratch=tmp_path / "scratch"))
    assert written.absent == {}
    check_place(written)
    made, source = pydicom.dcmread(written.segmentation), pydicom.dcmread(path)
    assert (made.Columns, made.Rows) == SHAPE[:2]
    assert (source.Columns, source.Rows) != SHAPE[:2]
    assert [item.ReferencedSOPInstanceUID for item in made.SourceImageSequence] == [source.SOPInstanceUID]
    assert not any(frame.get("DerivationImageSequence") for frame in made.PerFrameFunctionalGroupsSequence)


def test_of_two_echoes_the_one_that_was_read_is_segmented_and_named(tmp_path: Path) -> None:
    volume, echoes = brain(SHAPE, oblique(*TURNS["oblique"])), (10.0, 80.0)
    (path,) = save(tmp_path, [with_echoes(volume, Series(), echoes)])
    source = pydicom.dcmread(path)
    named = {}
    for number in (1, 2):
        series = f"{source.SeriesInstanceUID}/{number}"
        scan = read(path, scratch=tmp_path / "scratch", series=series)
        assert len(set(scan.source.frames)) == SHAPE[2]
        written = write(tmp_path / f"out{number}", scan)
        assert written.absent == {}
        check_place(written)
        found = set()
        for frame in pydicom.dcmread(written.segmentation).PerFrameFunctionalGroupsSequence:
            (reference,) = frame.DerivationImageSequence[0].SourceImageSequence
            group = source.PerFrameFunctionalGroupsSequence[reference.ReferencedFrameNumber - 1]
            assert frame.PlanePositionSequence == group.PlanePositionSequence
            found.add(group.MREchoSequence[0].EffectiveEchoTime)
        named[number] = found
    assert sorted(map(list, named.values())) == [[10.0], [80.0]]


# ---- what it refers to -------------------------------------------------------------------------


def test_it_belongs_to_the_study_and_refers_to_the_slices(written: Written) -> None:
    sources = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, written.scan.source.instances)}
    first = next(iter(sources.values()))
    made = pydicom.dcmread(written.segmentation)
    assert (made.SOPClassUID, made.Modality, made.SegmentationType) == (SEGMENTATION_STORAGE, "SEG", "BINARY")
    assert made.StudyInstanceUID == first.StudyInstanceUID
    assert made.FrameOfReferenceUID == first.FrameOfReferenceUID
    assert made.SeriesInstanceUID != first.SeriesInstanceUID
    assert made.ReferencedSeriesSequence[0].SeriesInstanceUID == first.SeriesInstanceUID
    assert {i.ReferencedSOPInstanceUID for i in made.ReferencedSeriesSequence[0].ReferencedInstanceSequence} == set(
        sources
    )
    shared = made.SharedFunctionalGroupsSequence[0]
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == first.ImageOrientationPatient
    assert shared.PixelMeasuresSequence[0].PixelSpacing == first.PixelSpacing
    assert shared.PixelMeasuresSequence[0].SpacingBetweenSlices == pytest.approx(SPACING[2])
    frames = made.PerFrameFunctionalGroupsSequence
    assert len(frames) == sum(
        len({round(z, 3) for z in p[:, 2]}) for p in segment_points(written.segmentation).values()
    )
    for frame in frames:
        (reference,) = frame.DerivationImageSequence[0].SourceImageSequence
        source = sources[reference.ReferencedSOPInstanceUID]
        assert frame.PlanePositionSequence[0].ImagePositionPatient == source.ImagePositionPatient


def test_segments_are_coded_and_say_what_made_them(written: Written) -> None:
    made = pydicom.dcmread(written.segmentation)
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
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("Counterpart", written.report.code_version)
        assert f"bundle=tiny-0.0.1,bundle_sha256={'5a' * 32},seed=7" in algorithm.AlgorithmParameters
    assert made.ContentQualification == "RESEARCH"
    assert made.ContentDescription == "Research use only. Not a medical device. Not for diagnosis."
    assert made.DeviceSerialNumber == "5a" * 32


# ---- nothing more of the patient ---------------------------------------------------------------


def talkative(slices: list[FileDataset]) -> None:
    """A header full of what results have no use for."""
    for dataset in slices:
        for name in (
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
        ):
            setattr(dataset, name, f"{SECRET} {name}"[:16])
        dataset.PatientAge, dataset.PatientWeight, dataset.PatientSize = "119Y", "80", "1.8"
        dataset.EthnicGroup, dataset.PatientIdentityRemoved, dataset.PregnancyStatus = SECRET, "NO", 4
        other = Dataset()
        other.PatientID, other.IssuerOfPatientID = SECRET, SECRET
        dataset.OtherPatientIDsSequence = [other]
        dataset.add_new(0x00091001, "LO", SECRET)
        dataset.add_new(0x00090010, "LO", SECRET)


@pytest.mark.parametrize("name", ["segmentation", "structured_report"])
def test_nothing_is_copied_but_what_is_required(tmp_path: Path, name: str) -> None:
    written = write(tmp_path / "out", scan_of(tmp_path, Series(), change=talkative))
    made = pydicom.dcmread(getattr(written, name))
    secret = {e.keyword for e in made.iterall() if SECRET in str(e.value) and e.VR != "SQ"}
    assert secret == {"PatientName", "PatientID", "ReferringPhysicianName"}
    source = pydicom.dcmread(written.scan.source.instances[0])
    for keyword in (*PATIENT, *STUDY):
        assert made[keyword].value == source[keyword].value, keyword
    required = {*PATIENT, *STUDY}
    of_patient = {e.keyword for e in made if e.keyword.startswith(("Patient", "Other", "Study", "Clinical", "Ethnic"))}
    assert of_patient <= required
    assert [e.ManufacturerModelName for e in made.ContributingEquipmentSequence] == ["highdicom"]  # and no scanner


def test_nothing_of_the_patient_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def strange(slices: list[FileDataset]) -> None:
        talkative(slices)
        for dataset in slices:
            dataset.PatientName = f"{SECRET} Alberta"  # no caret: highdicom warns, with the name

    caplog.set_level(logging.DEBUG)
    scan = scan_of(tmp_path, Series(), change=strange)
    caplog.clear()
    capfd.readouterr()
    written = write(tmp_path / "out", scan)
    assert written.absent == {}
    assert SECRET not in caplog.text
    assert capfd.readouterr() == ("", "")


# ---- headers as they come ----------------------------------------------------------------------


def every(**values: object) -> Change:
    """Set attributes in every slice; None deletes."""

    def change(slices: list[FileDataset]) -> None:
        for dataset in slices:
            for name, value in values.items():
                delattr(dataset, name) if value is None else setattr(dataset, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (every(PatientSex="U"), {"PatientSex": ""}),
        (every(PatientBirthDate="1900"), {"PatientBirthDate": ""}),
        (every(StudyDate="", StudyTime=""), {"StudyDate": "", "ContentDate": "20200101"}),
        (every(StudyDate="", StudyTime="", SeriesDate=None), {"ContentDate": "19000101", "ContentTime": "000000"}),
        (
            every(PatientName=None, PatientID=None, AccessionNumber=None, StudyID=None),
            {"PatientName": "", "StudyID": ""},
        ),
        (every(SliceThickness=None), {}),
        (every(ReferringPhysicianName=None), {"ReferringPhysicianName": ""}),
        (
            every(SpecificCharacterSet="ISO_IR 192", PatientName="山田^太郎"),
            {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "山田^太郎"},
        ),
        (
            every(SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName="Yamada^Tarou=山田^太郎"),
            {"PatientName": "Yamada^Tarou=山田^太郎"},
        ),
        (every(SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Jörg"), {"PatientName": "Müller^Jörg"}),
        (every(LossyImageCompression="01", LossyImageCompressionRatio="10"), {"LossyImageCompression": "01"}),
        (
            every(ContentDate="20211231", ContentTime="235959.5", AcquisitionDate="20200303", AcquisitionTime="1"),
            {"ContentDate": "20211231", "ContentTime": "235959.5"},
        ),
    ],
)
def test_headers_as_they_come(tmp_path: Path, change: Change, expected: dict[str, str]) -> None:
    with quiet():
        written = write(tmp_path / "out", scan_of(tmp_path, Series(), change=change))
        assert written.absent == {}
        for path in (written.segmentation, written.structured_report):
            made = pydicom.dcmread(path)
            for name, value in expected.items():
                if path == written.segmentation or not name.startswith("Lossy"):
                    assert str(made[name].value or "") == value, name
    check_place(written)


def test_slices_that_lean_a_little_keep_their_own_positions(tmp_path: Path) -> None:
    """As far as ingest takes them: cosines that differ in the fourth decimal, positions rounded to 0.1 mm."""

    def rough(slices: list[FileDataset]) -> None:
        for k, dataset in enumerate(slices):
            dataset.ImagePositionPatient = [round(float(v), 1) for v in dataset.ImagePositionPatient]
            tilt = 4e-4 * (k % 2)
            dataset.ImageOrientationPatient = [1, tilt, 0, -tilt, 1, 0]

    written = write(tmp_path / "out", scan_of(tmp_path, Series(), change=rough))
    assert written.absent == {}
    made = pydicom.dcmread(written.segmentation)
    sources = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, written.scan.source.instances)}
    for frame in made.PerFrameFunctionalGroupsSequence:
        source = sources[frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID]
        assert frame.PlanePositionSequence[0].ImagePositionPatient == source.ImagePositionPatient
    for label in (1, 2):
        found = segment_points(written.segmentation)[label].mean(axis=0)
        np.testing.assert_allclose(found, expected_points(written, label).mean(axis=0), atol=0.1)


def bad_ratio(slices: list[FileDataset]) -> None:
    for dataset in slices:
        dataset.LossyImageCompression = "01"
        dataset.add_new("LossyImageCompressionRatio", "LO", SECRET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (every(FrameOfReferenceUID=None), "does not state FrameOfReferenceUID in every image"),
        (every(StudyInstanceUID=None), "does not state StudyInstanceUID"),
        (every(SOPClassUID=SecondaryCaptureImageStorage), "of the kind Secondary Capture Image Storage"),
        (every(SOPClassUID="1.2.840.113619.4.2"), "of the kind"),
        (lambda s: setattr(s[3], "StudyInstanceUID", "1.2.3"), "name 2 studies"),
        (bad_ratio, "a value that DICOM does not allow"),
    ],
)
def test_a_series_that_nothing_can_refer_to(tmp_path: Path, change: Change, message: str) -> None:
    with quiet():
        # Implicit: the value is taken for what the attribute should be.
        written = write(tmp_path / "out", scan_of(tmp_path, Series(syntax=ImplicitVRLittleEndian), change=change))
    assert set(written.absent) == {"segmentation.dcm", "report.dcm"}
    for reason in written.absent.values():
        assert reason.code == "unsuitable_source"
        assert message in reason.found
        assert SECRET not in str(reason)
    assert list((tmp_path / "out").iterdir()) == []


def test_two_multi_frame_images_are_refused(tmp_path: Path) -> None:
    slices = datasets(brain(SHAPE, oblique(0, 0, 0)), Series())
    for number, part in enumerate((slices[:20], slices[20:])):
        image = enhanced(part)
        image.SOPInstanceUID = f"1.2.{number}"
        (tmp_path / "s").mkdir(exist_ok=True)
        image.save_as(tmp_path / "s" / str(number), enforce_file_format=True)
    written = write(tmp_path / "out", read(tmp_path / "s", scratch=tmp_path / "scratch"))
    assert "spread over 2 multi-frame images" in written.absent["segmentation.dcm"].found
