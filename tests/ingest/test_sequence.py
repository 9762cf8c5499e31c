"""Classification of the MR sequence, with names and times as scanners of several vendors write them."""

from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

from app.dicom_attributes import silence_libraries
from app.ingest.dicom.sequence import SequenceInfo, classify_sequence, read_scanner
from app.volume import Scanner, Volume
from tests.ingest.conftest import Read
from tests.support.dicom import SECRET, Series, make_datasets, save, write_series
from tests.support.enhanced import make_enhanced


def make_header(**values: object) -> Dataset:
    dataset = Dataset()
    dataset.Modality = "MR"
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("t1_mprage_sag_p2_iso", "T1"),
        ("T1w", "T1"),
        ("anat-T1w", "T1"),
        ("Sag 3D BRAVO", "T1"),
        ("Ax FSPGR 3D", "T1"),
        ("MP2RAGE UNI", "T1"),
        ("*tfl3d1_16ns", "T1"),
        ("T1TFE", "T1"),
        ("AX T1 FLAIR", "T1"),
        ("t2_tse_tra_448", "T2"),
        ("T2W_TSE", "T2"),
        ("t2_tirm_tra_dark-fluid", "FLAIR"),
        ("Sag CUBE T2 FLAIR", "FLAIR"),
        ("3D_FLAIR", "FLAIR"),
        ("t2_fl2d_tra_hemo T2*", "T2*"),
        ("Ax T2 STAR", "T2*"),
        ("SWI_Images", "T2*"),
        ("PDW_TSE", "PD"),
        ("pd_tse_fs", "PD"),
        ("Cor STIR", "STIR"),
        ("ep2d_diff_3scan_trace_p2", "DWI"),
        ("ADC (10^-6 mm2/s)", "DWI"),
        ("ep2d_bold_moco", "EPI"),
        ("*epfid2d1_64", "EPI"),
        ("tof_fl3d_tra", "TOF"),
        ("ep2d_perf ASL", "perfusion"),
    ],
)
def test_names_are_classified(name: str, expected: str) -> None:
    assert classify_sequence(make_header(SeriesDescription=name)).weightings == (expected,)


@pytest.mark.parametrize(
    "name",
    ["", "Localizer", "Head", "survey", "t10", "WATT2000", "prostate", "PDA", "ax_asc_35sl", "different", "perfect"],
)
def test_other_names_are_not_classified(name: str) -> None:
    assert classify_sequence(make_header(SeriesDescription=name)) == SequenceInfo()


@pytest.mark.parametrize(
    ("kinds", "echo", "repetition", "inversion", "expected"),
    [
        (["SE"], 12, 500, None, ("T1",)),
        (["SE"], 100, 4000, None, ("T2",)),
        (["SE"], 20, 2500, None, ("PD",)),
        (["SE"], 50, 2500, None, ()),  # between the ranges
        (["SE"], 20, 1400, None, ()),
        (["GR", "IR"], 3.1, 7.25, 750, ("T1",)),  # of the UIH scan
        (["SE", "IR"], 394, 6000, 2200, ("FLAIR",)),  # Siemens SPACE
        (["SE", "IR"], 30, 5000, 150, ("STIR",)),
        (["SE", "IR"], 90, 9000, 900, ()),
        (["GR"], 20, 600, None, ("T2*",)),
        (["GR"], 4, 25, None, ()),  # T1, PD and angiography look alike
        (["EP", "GR"], 30, 3000, None, ("EPI",)),
        ([], 3, 10, None, ()),
    ],
)
def test_times_are_classified(
    kinds: list[str], echo: float, repetition: float, inversion: float | None, expected: tuple[str, ...]
) -> None:
    dataset = make_header(ScanningSequence=kinds, EchoTime=echo, RepetitionTime=repetition)
    if inversion is not None:
        dataset.InversionTime = inversion
    assert classify_sequence(dataset).weightings == expected


def test_contradicting_sources_give_several_weightings() -> None:
    times = {"ScanningSequence": ["SE"], "EchoTime": 100, "RepetitionTime": 4000}
    assert classify_sequence(make_header(SeriesDescription="t2_tse", **times)).weightings == ("T2",)
    assert classify_sequence(make_header(SeriesDescription="t1_se", **times)).weightings == ("T1", "T2")
    assert classify_sequence(make_header(SeriesDescription="t1 and stir")).weightings == ("T1", "STIR")
    # EPI is a readout, not another weighting.
    assert classify_sequence(make_header(ProtocolName="dwi", ScanningSequence=["EP"], EchoTime=90)).weightings == (
        "DWI",
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"ContrastBolusAgent": "Gadovist"}, True),
        ({"ContrastBolusAgent": "NO"}, False),
        ({"ContrastBolusAgent": ""}, False),
        ({"ContrastBolusAgentSequence": [Dataset()]}, True),
        ({"SeriesDescription": "t1_mprage_sag +C"}, True),
        ({"SeriesDescription": "T1 post Gd"}, True),
        ({"SeriesDescription": "t1 posterior fossa"}, False),
        ({"ContrastBolusAgent": "Iomeron", "Modality": "CT"}, True),
    ],
)
def test_a_contrast_agent_is_recognised(values: dict[str, object], expected: bool) -> None:  # noqa: FBT001
    assert classify_sequence(make_header(**values)).contrast_agent is expected


def test_each_frame_of_an_enhanced_image_is_classified() -> None:
    dataset, groups = make_header(EchoPulseSequence="SPIN"), []
    for contrast, echo in (("PROTON_DENSITY", 15), ("T2", 90), ("UNKNOWN", 90), ("T1", 90)):
        group, frame_type, times, echoes = Dataset(), Dataset(), Dataset(), Dataset()
        frame_type.AcquisitionContrast, times.RepetitionTime, echoes.EffectiveEchoTime = contrast, 3000, echo
        group.MRImageFrameTypeSequence, group.MRTimingAndRelatedParametersSequence = [frame_type], [times]
        group.MREchoSequence = [echoes]
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = groups
    assert [classify_sequence(dataset, frame).weightings for frame in range(4)] == [
        ("PD",),
        ("T2",),
        ("T2",),
        ("T1", "T2"),
    ]


def test_the_selected_stack_is_classified(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    dataset = make_enhanced(volume, Series(description="dual echo"), echoes_ms=(15.0, 90.0))
    dataset.EchoPulseSequence = "SPIN"
    times = Dataset()
    times.RepetitionTime = 3000
    dataset.SharedFunctionalGroupsSequence[0].MRTimingAndRelatedParametersSequence = [times]
    (path,) = save(tmp_path, [dataset])
    uid = dataset.SeriesInstanceUID
    found = {read_scan(path, series=f"{uid}/{number}").source.sequences for number in (1, 2)}
    assert found == {("PD",), ("T2",)}


def test_a_series_is_classified_without_repeating_its_text(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    write_series(tmp_path / "s", volume, Series(description=f"t2_flair\nax {SECRET}"))
    source = read_scan(tmp_path / "s").source
    assert (source.sequences, source.contrast_agent) == (("FLAIR",), False)
    assert SECRET not in repr(source)
    write_series(tmp_path / "ct", volume, Series(modality="CT", description="t1 with gd"))
    source = read_scan(tmp_path / "ct").source
    assert (source.sequences, source.contrast_agent) == ((), True)


def test_an_invalid_time_is_accepted(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = make_datasets(volume, Series(description="Head"))
    for dataset in slices:
        dataset.ScanningSequence, dataset.EchoTime = ["SE"], 12
        dataset.add_new("RepetitionTime", "LO", "soon")
    save(tmp_path / "s", slices)
    scan = read_scan(tmp_path / "s")
    assert scan.source.sequences == ()
    assert scan.volume.array.sum(dtype=np.float64) == volume.array.sum(dtype=np.float64)


REAL = {
    "uih/uih_umr770_t1_sag": ("T1",),
    "studyforrest/studyforrest_t1": ("T1",),
    "dicom2nifti/dicom2nifti/philips_enhanced/anatomical/001": ("T1",),
    "dicom2nifti/dicom2nifti/hyperfine/anatomical/001": ("FLAIR",),
    "dicom2nifti/dicom2nifti/generic/compressed_rle/001": ("FLAIR",),
    "siemens/transfer_syntax/1.dcm": ("EPI",),
    "pydicom/pydicom/MR_small.dcm": ("T2",),
}


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_real_series_are_classified(archives: Path, read_scan: Read, name: str) -> None:
    assert read_scan(archives / name).source.sequences == REAL[name]


# ---- scanner -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("Siemens", " Prisma_fit ", "2.89362"), Scanner("SIEMENS", "PRISMA_FIT", 2.9)),
        (("GE MEDICAL SYSTEMS", "Revolution CT", None), Scanner("GE MEDICAL SYSTEMS", "REVOLUTION CT", None)),
        (("Philips", "Ingenia", "three"), Scanner("PHILIPS", "INGENIA", None)),
        (("Philips", "", "3"), None),
        (("", "Ingenia", "3"), None),
    ],
)
def test_the_scanner_is_read_from_the_header(
    values: tuple[str, str, str | None], expected: Scanner | None, volume: Volume, tmp_path: Path
) -> None:
    dataset = make_datasets(volume)[0]
    dataset.Manufacturer, dataset.ManufacturerModelName = values[:2]
    if values[2] is not None:
        with silence_libraries():
            dataset.add_new("MagneticFieldStrength", "LO", values[2])
    (path,) = save(tmp_path, [dataset])
    assert read_scanner(path) == expected
