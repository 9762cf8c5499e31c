"""Which bundle a scan is for, and when that is not sure."""

from dataclasses import replace

import pytest

from app.errors import UnknownModel, WrongModality, WrongSequence
from app.manifest import Manifest
from app.runtime.selection import select_model
from app.volume import Source
from tests.support.bundle import tiny_manifest


def named(name: str, version: str = "1.0.0", modality: str = "MR", sequence: str = "T1") -> Manifest:
    update = {"name": name, "version": version, "modality": modality, "sequence": sequence}
    return tiny_manifest().model_copy(update=update)


T1_SCAN, SILENT, CT, NIFTI = (
    Source("dicom", "MR", ("T1",)),
    Source("dicom", "MR"),
    Source("dicom", "CT"),
    Source("nifti"),
)
HOUNSFIELD = Source("nifti", looks_hounsfield=True)
FLAIR_SCAN = Source("dicom", "MR", ("FLAIR",))
T1, FLAIR = named("t1"), named("flair", sequence="FLAIR")
HEAD = [named("t1", "1.9.0"), named("t1", "1.10.0"), named("ct", modality="CT", sequence="head")]


@pytest.mark.parametrize(
    ("source", "model", "expected", "by"),
    [
        (T1_SCAN, None, "t1-1.10.0", "sequence"),
        (SILENT, None, "t1-1.10.0", "modality"),
        (CT, None, "ct-1.0.0", "modality"),
        (NIFTI, "t1", "t1-1.10.0", "caller"),
        (NIFTI, "t1-1.9.0", "t1-1.9.0", "caller"),
        (T1_SCAN, "t1-1.9.0", "t1-1.9.0", "caller"),
        (NIFTI, "ct", "ct-1.0.0", "caller"),
        (NIFTI, None, "t1-1.10.0", "default"),
        (HOUNSFIELD, None, "ct-1.0.0", "default"),
    ],
)
def test_the_bundle_for_a_scan(source: Source, model: str | None, expected: str, by: str) -> None:
    choice = select_model(HEAD, source, model)
    assert (choice.manifest.id, choice.by) == (expected, by)


@pytest.mark.parametrize(("source", "expected"), [(T1_SCAN, "t1"), (FLAIR_SCAN, "flair")])
def test_the_sequence_decides_among_models_of_one_modality(source: Source, expected: str) -> None:
    choice = select_model([T1, FLAIR], source, None)
    assert (choice.manifest.name, choice.by, choice.warning) == (expected, "sequence", "")


def test_a_release_is_newer_than_its_candidates() -> None:
    versions = [named("t1", v) for v in ("1.0.0", "1.0.0-rc1", "0.9.9")]
    assert select_model(versions, T1_SCAN, None).manifest.version == "1.0.0"


# ---- unsure ------------------------------------------------------------------------------------


def test_one_bundle_alone_is_taken_for_a_scan_that_says_nothing_and_that_is_said() -> None:
    choice = select_model([T1], NIFTI, None)
    assert (choice.manifest.id, choice.by) == ("t1-1.0.0", "default")
    assert choice.warning == "The file says neither its modality nor its sequence: it was taken for MR, T1."
    assert select_model([T1], SILENT, None).warning == "The series does not say its sequence: it was taken for T1."


def test_a_file_in_hounsfield_units_is_taken_for_ct_and_any_other_for_mr() -> None:
    choice = select_model(HEAD, HOUNSFIELD, None)
    assert choice.warning == (
        "The file does not say its modality: its values look like Hounsfield units, so it was taken for CT."
    )
    # Not recognised: a CT without air; the only model there is may be meant.
    assert select_model(HEAD[2:], NIFTI, None).manifest.id == "ct-1.0.0"
    with pytest.raises(WrongModality, match="its values look like Hounsfield units: it is CT"):
        select_model([T1], HOUNSFIELD, None)
    assert select_model(HEAD, HOUNSFIELD, "t1").manifest.name == "t1"


def test_a_series_that_contradicts_itself_is_taken_for_what_is_trusted_most() -> None:
    choice = select_model([T1, FLAIR], replace(T1_SCAN, sequences=("STIR", "FLAIR", "T1")), None)
    assert choice.manifest.name == "flair"
    assert choice.warning == "The series contradicts itself (STIR or FLAIR or T1): it was taken for FLAIR."


def test_a_contrast_agent_makes_a_model_without_one_unsure() -> None:
    with_agent, with_and_without = replace(T1_SCAN, contrast_agent=True), [T1, named("t1c", sequence="T1c")]
    doubt = "The series states a contrast agent, and the model knows scans without one."
    assert select_model([T1], with_agent, None).warning == doubt
    assert select_model(HEAD, replace(CT, contrast_agent=True), None).warning == doubt
    chosen = select_model(with_and_without, with_agent, None)
    assert (chosen.manifest.name, chosen.warning) == ("t1c", "")
    assert select_model(with_and_without, T1_SCAN, None).manifest.name == "t1"
    lone = select_model(with_and_without[1:], T1_SCAN, None)
    assert lone.warning == "The series states no contrast agent, and the model knows scans with one."


def test_who_names_a_model_vouches_for_a_silent_scan_and_is_told_of_another() -> None:
    assert select_model([T1, FLAIR], NIFTI, "t1").warning == ""
    assert select_model([T1, FLAIR], SILENT, "t1").warning == ""
    assert select_model([T1, FLAIR], T1_SCAN, "t1").warning == ""
    assert select_model([T1], FLAIR_SCAN, "t1").warning == "The series says that it is FLAIR, and the model knows T1."


# ---- refused -----------------------------------------------------------------------------------


def test_a_scan_that_says_nothing_is_not_guessed_at() -> None:
    with pytest.raises(UnknownModel, match="2 models fit") as caught:
        select_model([T1, FLAIR], NIFTI, None)
    assert "flair-1.0.0 (MR, FLAIR), t1-1.0.0 (MR, T1)" in caught.value.expected
    with pytest.raises(UnknownModel, match="2 models fit"):
        select_model([T1, FLAIR], SILENT, None)


def test_a_sequence_that_no_model_knows() -> None:
    with pytest.raises(WrongSequence, match="says that it is FLAIR, and no model knows that") as caught:
        select_model(HEAD, FLAIR_SCAN, None)
    assert caught.value.expected == "a scan for one of t1-1.9.0 (MR, T1), t1-1.10.0 (MR, T1)."
    assert "?model=" in caught.value.advice


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownModel, match="'flair'") as caught:
        select_model(HEAD, T1_SCAN, "flair")
    assert "t1-1.10.0" in caught.value.expected
    with pytest.raises(UnknownModel, match="none is installed"):
        select_model([], T1_SCAN, None)


def test_a_scan_of_a_modality_that_no_model_knows() -> None:
    with pytest.raises(WrongModality, match="modality is CT, and no model knows it") as caught:
        select_model([T1], CT, None)
    assert "t1-1.0.0 (MR, T1)" in caught.value.expected


def test_a_model_of_another_modality_is_refused() -> None:
    with pytest.raises(WrongModality, match="The scan's modality is CT"):
        select_model(HEAD, CT, "t1")
