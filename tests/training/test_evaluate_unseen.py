"""Tests of the evaluation on other scanners, with the phantom and the tiny bundle in place of scans and networks."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from app.errors import BrainNotExtracted
from app.pipeline.preprocess import foreground_mask_of
from app.pipeline.risk_control import FACTORS
from app.runtime.bundle import Bundle, load_bundle
from app.volume import Volume
from tests.support.phantom import brain, grid, head
from training import evaluate_unseen
from training.bundle_runs import insert_into_head
from training.config import ROOT, Config
from training.data import HealthyScan, Split
from training.evaluate_unseen import Pathology, evaluate_heads, evaluate_pathology, evaluate_unseen_lesions
from training.lesion_insertion import insert_lesion
from training.unseen_scans import HealthyHead, UnseenList, UnseenScan

pytestmark = pytest.mark.training

# The networks of the phantom find strong lesions only, because its tissues differ little.
STRONG = 2.5
CONFIG = Config.load(ROOT / "training" / "configs" / "t1.toml")
SPLIT = Split(
    source="phantom",
    seed=0,
    train=(),
    validation=(),
    test=("home 1", "home 2"),
    shapes_validation=(),
    shapes_test=("a", "b", "c"),
    shapes_test_small=(),
)
UNSEEN = UnseenList(
    source="phantom",
    scans=(
        UnseenScan(scanner="S", person="p", path="p.nii.gz"),
        UnseenScan(scanner="S", person="q", path="q.nii.gz"),
        UnseenScan(scanner="S, DICOM", person="q", path="q.tar.xz", counted=False),
    ),
    patch_shapes=("d", "e"),
    stroke_shapes=("f",),
)


def ball(radius_mm: float = 15.0) -> Volume:
    """Return a ball in MNI space, to the right of the middle."""
    affine = grid((60, 60, 60))
    points = np.indices((60, 60, 60)).reshape(3, -1).T * 3 + affine[:3, 3]
    inside = np.linalg.norm(points - [25, -10, 10], axis=1) < radius_mm
    return Volume(inside.reshape(60, 60, 60).astype(np.float32), affine)


@pytest.fixture
def bundle(tiny_models: Path) -> Bundle:
    return load_bundle(tiny_models / "tiny-0.0.1", threads=1)


@pytest.fixture(autouse=True)
def _phantoms(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(scan: UnseenScan) -> HealthyHead:
        return HealthyHead(scan.scanner, scan.path, scan.person, False, "", scan.counted, brain())

    monkeypatch.setattr(evaluate_unseen, "CONTRASTS", (STRONG, -STRONG))
    monkeypatch.setattr(evaluate_unseen, "load_unseen_list", lambda: UNSEEN)
    monkeypatch.setattr(evaluate_unseen, "load_unseen_head", load)
    for name in ("load_lesion_shape", "load_stroke_shape"):
        monkeypatch.setattr(evaluate_unseen, name, lambda _: ball())
    monkeypatch.setattr(evaluate_unseen, "load_scan", lambda *_: HealthyScan(brain()))


def test_healthy_heads_have_their_findings_or_the_reason_of_a_refusal(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def heads() -> Iterator[HealthyHead]:
        yield HealthyHead("S", "p", "p", False, "decision 1", True, brain())
        yield HealthyHead("T", "r", "r", True, "", True, brain(scale=0.5))

    monkeypatch.setattr(evaluate_unseen, "healthy_heads", heads)
    healthy, refused = evaluate_heads(CONFIG, bundle, SPLIT)
    assert healthy["outcome"] == "analysed"
    assert healthy["found_ml"] == healthy["findings"] == 0
    assert healthy["volumes_ml"] == [0.0] * len(FACTORS)
    assert (healthy["voxel_mm"], healthy["known_from"], healthy["skull_stripped"]) == ([3.0] * 3, "decision 1", True)
    assert refused["outcome"] == "wrong_field_of_view"
    assert "found_ml" not in refused


def test_each_person_gets_each_family_and_each_scan_at_home_a_foreign_patch(bundle: Bundle) -> None:
    rows = evaluate_unseen_lesions(CONFIG, bundle, SPLIT)
    assert Counter((r["group"], r["family"]) for r in rows) == {
        ("not in training", "intensity"): 2 * 2 * 2,
        ("not in training", "foreign patch"): 2,
        ("home", "foreign patch"): 2,
    }
    assert {(r["subject"], r["shape"]) for r in rows if r["family"] == "intensity"} == {
        ("p", "a"),
        ("p", "b"),
        ("q", "c"),
        ("q", "a"),
    }
    bright = next(r for r in rows if r["contrast"] == STRONG)
    assert bright["truth_ml"] == pytest.approx(14, rel=0.3)
    assert [hit for _, hit in bright["lesions"]] == [True]
    assert bright["dice"] > 0.5


def test_lesions_of_a_head_without_a_brain_are_missed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Volume:
        raise BrainNotExtracted("found", expected="expected", advice="advice")

    monkeypatch.setattr(evaluate_unseen, "extract_brain_if_needed", fail)
    rows = evaluate_unseen_lesions(CONFIG, bundle, SPLIT)
    assert len(rows) == 12
    assert {(r["outcome"], r["dice"]) for r in rows} == {("brain_not_extracted", 0.0)}


def test_lesion_in_a_head_changes_its_brain_only() -> None:
    shape, affine = (70, 80, 70), grid((70, 80, 70))
    whole, inside = head(shape, affine), brain(shape, affine)
    lesioned = insert_into_head(whole, inside, insert_lesion(inside, ball(), STRONG, seed=1))
    change = lesioned.volume.array - whole.array
    assert change[lesioned.truth].min() > 0
    assert not change[~foreground_mask_of(inside)].any()


def test_each_outline_of_a_scan_has_a_row(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    lesioned = insert_lesion(brain(), ball(), STRONG, seed=1)

    def scans(_config: Config, _split: Split) -> Iterator[Pathology]:
        yield Pathology("tumour", "a", lesioned.volume, {"whole": lesioned.truth, "none": ~lesioned.truth})
        yield Pathology("tumour", "b", brain(scale=0.5), {"whole": lesioned.truth})

    monkeypatch.setattr(evaluate_unseen, "pathology_scans", scans)
    whole, none, refused = evaluate_pathology(CONFIG, bundle, SPLIT)
    assert (whole["outline"], whole["outcome"], none["outline"]) == ("whole", "analysed", "none")
    assert whole["dice"] > none["dice"]
    assert (refused["outcome"], refused["dice"], refused["lesions"][0][1]) == ("wrong_field_of_view", 0.0, False)
