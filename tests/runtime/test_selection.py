"""Selection of the bundle for a scan."""

from dataclasses import replace

import pytest

from app.errors import UnknownModel, WrongModality, WrongSequence
from app.manifest import Manifest
from app.runtime.selection import select_model, trained_sequences
from app.volume import Source
from tests.support.bundle import tiny_manifest


def named(name: str, version: str = "1.0.0", modality: str = "MR", sequence: str = "T1") -> Manifest:
    update = {"name": name, "version": version, "modality": modality, "sequence": sequence}
    return tiny_manifest().model_copy(update=update)


T1_SCAN, NO_SEQUENCE, CT, NIFTI = (
    Source("dicom", "MR", ("T1",)),
    Source("dicom", "MR"),
    Source("dicom", "CT"),
    Source("nifti"),
)
HOUNSFIELD = Source("nifti", looks_hounsfield=True)
FLAIR_SCAN = Source("dicom", "MR", ("FLAIR",))
T1, FLAIR = named("t1"), named("flair", sequence="FLAIR")
HEAD = [named("t1", "1.9.0"), named("t1", "1.10.0"), named("ct", modality="CT", sequence="head")]


# ---- certain -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "model", "expected", "by"),
    [
        (T1_SCAN, None, "t1-1.10.0", "sequence"),
        (NO_SEQUENCE, None, "t1-1.10.0", "modality"),
        (CT, None, "ct-1.0.0", "modality"),
        (NIFTI, "t1", "t1-1.10.0", "caller"),
        (NIFTI, "t1-1.9.0", "t1-1.9.0", "caller"),
        (T1_SCAN, "t1-1.9.0", "t1-1.9.0", "caller"),
        (NIFTI, "ct", "ct-1.0.0", "caller"),
        (NIFTI, None, "t1-1.10.0", "default"),
        (HOUNSFIELD, None, "ct-1.0.0", "default"),
    ],
)
def test_bundle_is_selected_for_a_scan(source: Source, model: str | None, expected: str, by: str) -> None:
    selection = select_model(HEAD, source, model)
    assert (selection.manifest.id, selection.by) == (expected, by)


@pytest.mark.parametrize(("source", "expected"), [(T1_SCAN, "t1"), (FLAIR_SCAN, "flair")])
def test_sequence_selects_among_models_of_one_modality(source: Source, expected: str) -> None:
    selection = select_model([T1, FLAIR], source, None)
    assert (selection.manifest.name, selection.by, selection.warning) == (expected, "sequence", "")


def test_release_is_newer_than_its_candidates() -> None:
    versions = [named("t1", v) for v in ("1.0.0", "1.0.0-rc1", "0.9.9")]
    assert select_model(versions, T1_SCAN, None).manifest.version == "1.0.0"


@pytest.mark.parametrize("source", [NIFTI, NO_SEQUENCE, T1_SCAN])
def test_named_model_gives_no_warning_if_the_sequence_fits_or_is_unstated(source: Source) -> None:
    assert select_model([T1, FLAIR], source, "t1").warning == ""


# ---- uncertain ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "by"), [(NIFTI, "default"), (NO_SEQUENCE, "modality")])
def test_only_model_is_selected_with_a_warning_if_the_sequence_is_unstated(source: Source, by: str) -> None:
    selection = select_model([T1], source, None)
    assert (selection.manifest.id, selection.by) == ("t1-1.0.0", by)
    assert "T1 was assumed" in selection.warning


def test_file_in_hounsfield_units_is_ct() -> None:
    assert "CT was assumed" in select_model(HEAD, HOUNSFIELD, None).warning
    with pytest.raises(WrongModality):
        select_model([T1], HOUNSFIELD, None)
    assert select_model(HEAD, HOUNSFIELD, "t1").manifest.name == "t1"


def test_file_of_unknown_modality_may_be_ct_if_there_is_no_other_model() -> None:
    """A CT without air is not recognised by its values."""
    assert select_model(HEAD[2:], NIFTI, None).manifest.id == "ct-1.0.0"


def test_most_trusted_sequence_is_assumed_if_a_series_contradicts_itself() -> None:
    selection = select_model([T1, FLAIR], replace(T1_SCAN, sequences=("STIR", "FLAIR", "T1")), None)
    assert selection.manifest.name == "flair"
    assert "STIR or FLAIR or T1" in selection.warning


def test_contrast_agent_of_scan_and_model_must_agree() -> None:
    with_agent, both = replace(T1_SCAN, contrast_agent=True), [T1, named("t1c", sequence="T1c")]
    for models, source in (([T1], with_agent), (HEAD, replace(CT, contrast_agent=True)), (both[1:], T1_SCAN)):
        assert "contrast agent" in select_model(models, source, None).warning
    selection = select_model(both, with_agent, None)
    assert (selection.manifest.name, selection.warning) == ("t1c", "")
    assert select_model(both, T1_SCAN, None).manifest.name == "t1"


def test_named_model_of_another_sequence_gives_a_warning() -> None:
    warning = select_model([T1], FLAIR_SCAN, "t1").warning
    assert "FLAIR" in warning
    assert "T1" in warning


# ---- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [NIFTI, NO_SEQUENCE])
def test_unstated_sequence_is_not_guessed_among_several_models(source: Source) -> None:
    with pytest.raises(UnknownModel) as caught:
        select_model([T1, FLAIR], source, None)
    assert "flair-1.0.0 (MR, FLAIR), t1-1.0.0 (MR, T1)" in caught.value.expected


def test_sequence_without_a_model_is_refused() -> None:
    with pytest.raises(WrongSequence, match="FLAIR") as caught:
        select_model(HEAD, FLAIR_SCAN, None)
    assert "t1-1.9.0 (MR, T1), t1-1.10.0 (MR, T1)" in caught.value.expected


def test_sequences_are_those_of_models_that_can_be_selected() -> None:
    licence = T1.licence.model_copy(update={"non_commercial": True})
    restricted = named("t2", sequence="T2").model_copy(update={"licence": licence})
    models = [*HEAD, FLAIR, restricted]
    assert trained_sequences(models, None) == {"T1", "FLAIR"}
    assert trained_sequences(models, "t2") == {"T2"}
    assert trained_sequences(models, "ct") == set()


def test_early_version_is_selected_only_by_name() -> None:
    usual = named("ct", "9.0.0", "CT", "head")
    early = named("newct", "0.1.0", "CT", "head").model_copy(update={"named_only": True})
    assert select_model([usual, early], CT, None).manifest is usual
    assert select_model([usual, early], CT, "newct").manifest is early
    with pytest.raises(UnknownModel, match=r"newct-0.1.0 \(CT, head; only if named\)"):
        select_model([early], CT, None)
    with pytest.raises(UnknownModel, match="Several models"):
        select_model([usual, early.model_copy(update={"named_only": False})], CT, None)


def test_unknown_model_is_refused() -> None:
    with pytest.raises(UnknownModel, match="'flair'") as caught:
        select_model(HEAD, T1_SCAN, "flair")
    assert "t1-1.10.0" in caught.value.expected
    with pytest.raises(UnknownModel, match="none is installed"):
        select_model([], T1_SCAN, None)


def test_modality_without_a_model_is_refused() -> None:
    with pytest.raises(WrongModality, match="CT") as caught:
        select_model([T1], CT, None)
    assert "t1-1.0.0 (MR, T1)" in caught.value.expected


def test_named_model_of_another_modality_is_refused() -> None:
    with pytest.raises(WrongModality, match="CT"):
        select_model(HEAD, CT, "t1")
