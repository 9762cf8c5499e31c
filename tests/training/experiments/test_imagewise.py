"""A score is chosen by pictures of both kinds; heads of another modality are what it is shown beside the near ones."""

from pathlib import Path

import pytest

from app.runtime.bundle import load_bundle
from training.config import ROOT, Config
from training.experiments.imagewise import choose_score, other_heads
from training.splits import load_split


def test_a_score_that_sees_both_kinds_is_chosen() -> None:
    aurocs = {"near": {"high percentile": 0.95, "mean": 0.94}, "heads": {"high percentile": 0.70, "mean": 0.98}}
    assert choose_score(aurocs) == "mean"
    assert choose_score({"near": aurocs["near"]}) == "high percentile"


@pytest.mark.data
def test_heads_of_another_modality_can_be_prepared(real_scans: Path) -> None:
    assert real_scans.exists()
    config = Config.load(ROOT / "training" / "configs" / "headct.toml")
    heads = other_heads(config, load_bundle(config.bundle_folder).manifest)
    assert len(set(heads.subjects)) >= 10, "patients of the validation part"
    assert not set(heads.subjects) & set(load_split("lgg_flair.json").test)
    assert heads.refused <= len(heads.x) / 10
    assert 0.1 < heads.foreground.mean() < 0.9
    assert 0.05 < heads.x[:, 0][heads.foreground].mean() < 0.95
