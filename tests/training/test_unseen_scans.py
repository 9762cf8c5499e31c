"""Tests of the frozen list of scans and lesion shapes that no training uses."""

from pathlib import Path

import pytest

pytest.importorskip("torch")

from training.config import ROOT, Config, data_root
from training.data import load_split
from training.unseen_scans import healthy_heads, load_stroke_shape, load_unseen_list

pytestmark = pytest.mark.training

CONFIG = Config.load(ROOT / "training" / "configs" / "t1.toml")


def test_no_training_reads_a_listed_folder() -> None:
    folders = {CONFIG.data.folder, *(source.folder for source in CONFIG.data.additional)}
    for scan in load_unseen_list().scans:
        assert not [folder for folder in folders if scan.path.startswith(folder)], scan.path


def test_a_second_file_of_a_person_is_not_counted() -> None:
    unseen = load_unseen_list()
    assert len(unseen.people) == 15
    again = [scan.person for scan in unseen.scans if not scan.counted]
    assert sorted(again) == ["MNI152", "studyforrest", "uih"]


def test_lesion_shapes_are_in_no_part_of_the_split() -> None:
    split, unseen = load_split(CONFIG.data.splits), load_unseen_list()
    used = {*split.shapes_validation, *split.shapes_test, *split.shapes_test_small}
    assert not used & {*unseen.patch_shapes, *unseen.stroke_shapes}


def test_files_exist(real_scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTERPART_DATA", str(real_scans))
    unseen = load_unseen_list()
    assert not [scan.path for scan in unseen.scans if not (data_root() / scan.path).is_file()]
    ml = [float(shape.array.sum()) * shape.voxel_ml for shape in map(load_stroke_shape, unseen.stroke_shapes)]
    assert ml == pytest.approx([35, 102, 296], abs=1)
    first = next(iter(healthy_heads()))
    assert (first.person, first.in_training, first.volume.array.ndim) == ("IBSR_01", False, 3)
