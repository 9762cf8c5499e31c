"""The first candidate is what is served, each of the others changes one thing, and the page tells what it gains."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from app.manifest import Manifest
from app.pipeline.networks import Networks
from app.volume import FloatArray, IntArray
from training.experiments import ablation, candidates, methods
from training.experiments.ablation_page import ablation_section
from training.experiments.candidates import AS_SHIPPED, Candidate, Remembering
from training.experiments.cases import GRADES, Case, make_case, sprites
from training.experiments.experiment import Experiment
from training.experiments.segmentation import judged
from training.splits import load_split

pytestmark = pytest.mark.training


def test_networks_are_asked_once_of_the_same_arrays() -> None:
    asked: list[int] = []

    def denoise(z_t: FloatArray, t: IntArray) -> FloatArray:
        asked.append(int(t[0]))
        return 2 * z_t

    remembering = Remembering(Networks(lambda x: x, denoise, lambda z: z))
    z = np.ones((2, 3, 4, 4), np.float32)
    first = remembering.networks.denoise(z, np.full(2, 5, np.int64))
    first += 1  # whoever asks may write into what is told
    again = remembering.networks.denoise(z.copy(), np.full(2, 5, np.int64))
    np.testing.assert_array_equal(again, 2 * z)
    assert asked == [5]
    remembering.networks.denoise(z, np.full(2, 20, np.int64))
    remembering.networks.denoise(z[:1], np.full(1, 5, np.int64))
    remembering.forget()
    remembering.networks.denoise(z, np.full(2, 5, np.int64))
    assert asked == [5, 20, 5, 5]


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return Experiment("headct")


@pytest.fixture(scope="module")
def case(experiment: Experiment, real_scans: Path) -> Case:
    assert real_scans.exists()
    subject = load_split(experiment.config.data.splits).validation[0]
    made = sprites(experiment.config)(subject, GRADES["grade 3"], 0)
    return make_case(subject, "grade 3", made.volume, made.truth, experiment.manifest)


@pytest.fixture
def tried(experiment: Experiment, real_scans: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Candidate]:
    assert real_scans.exists()
    split = load_split(experiment.config.data.splits)
    # Thresholds of one healthy scan, for time.
    monkeypatch.setattr(
        candidates, "load_split", lambda _: split.model_copy(update={"validation": split.validation[:1]})
    )
    return candidates.candidates(experiment.manifest, experiment.config, experiment.networks)


@pytest.mark.data
def test_the_first_candidate_is_what_is_served(experiment: Experiment, case: Case, tried: dict[str, Candidate]) -> None:
    served = methods.ours(experiment.networks, experiment.manifest)(case)
    found = tried[AS_SHIPPED].map(case, experiment.networks)
    np.testing.assert_allclose(judged(found, case), judged(served, case), atol=1e-5)


@pytest.mark.data
def test_every_other_candidate_gives_another_map(
    experiment: Experiment, case: Case, tried: dict[str, Candidate]
) -> None:
    asked = Remembering(experiment.networks)
    maps = {name: judged(candidate.map(case, asked.networks), case) for name, candidate in tried.items()}
    own = maps.pop(AS_SHIPPED)
    for name, other in maps.items():
        assert np.isfinite(other[case.judged]).all(), name
        assert not np.array_equal(other[case.judged], own[case.judged]), name
    # A sprite of grade 3 stands out in all of them but where bright ones alone do, or the paper's levels see nothing.
    inside, beside = case.truth & case.judged, case.judged & ~case.truth
    for name in ("everything may change", "a second look at the counterpart", "1 - SSIM in place of the residual"):
        assert maps[name][inside].mean() > 3 * maps[name][beside].mean(), name
    more = maps["a second look at the counterpart"]
    assert (more[case.judged] > 0).sum() >= (own[case.judged] > 0).sum()


@pytest.mark.data
def test_a_stricter_rule_has_a_higher_threshold_and_the_shipped_one_is_told(experiment: Experiment, case: Case) -> None:
    rng = np.random.default_rng(1)
    shape = (6, *experiment.manifest.preprocessing.shape)
    healthy = [np.abs(rng.standard_normal(shape)).astype(np.float32) for _ in range(3)]
    found = judged(np.where(case.truth, 10.0, 0.0).astype(np.float32), case)
    rows = ablation.thresholds(experiment.config, experiment.manifest, healthy, [case], [found])
    at = {(r["false_positive_ml"], r["extent_share"]): r for r in rows}
    assert len(at) == len(ablation.FALSE_POSITIVE_ML) * len(ablation.EXTENT_SHARES)
    assert at[0.5, 0.6]["threshold"] >= at[2.0, 0.6]["threshold"]
    assert all(r["dice"]["grade 3"]["value"] > 0.8 for r in rows)
    assert [key for key, r in at.items() if r["shipped"]] == [(shipped_ml(experiment.manifest), 0.6)]


def shipped_ml(manifest: Manifest) -> float:
    return manifest.residual.healthy_false_positive_ml


def test_the_page_has_a_row_for_each_candidate() -> None:
    number = {"value": 0.5, "low": 0.4, "high": 0.6}
    own: dict[str, Any] = {"auprc": number, "dice": number, "cases": 6}
    better = own | {"gain": {"auprc": {"value": 0.1, "low": 0.05, "high": 0.2}, "dice": number | {"low": -0.1}}}
    kinds = {kind: {AS_SHIPPED: own, "changed": better} for kind in (*GRADES, "grade 2 and grade 3")}
    rule = {"false_positive_ml": 1.0, "extent_share": 0.6, "threshold": 0.5, "dice": {"grade 3": number}}
    hashes = dict.fromkeys(("bundle_sha256", "detection_sha256", "split_sha256", "data_sha256"), "0" * 64)
    told = {"bundle": "t1-9.9.9", "split": "s.json", "seed": 1, "code": "abc", "threads": 1, **hashes}
    document = {"provenance": told, "kinds": kinds, "thresholds": [rule | {"shipped": True}]}
    lines = ablation_section([document])
    (row,) = [line for line in lines if line.startswith("| changed |")]
    assert row.endswith("| **+0.10 (+0.05 to +0.20)** | +0.50 (-0.10 to +0.60) |")
    assert any(line.startswith("| **1** | 0.6 of it | 0.500 |") for line in lines)
    tables = [line.count("|") for line in lines if line.startswith("|")]
    assert tables == [7] * 4 + [5] * 3
    assert ablation_section([]) == []
