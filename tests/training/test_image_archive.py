"""Tests of image archives: stacks of images, healthy slices, tumour outlines, and the committed lists."""

import io
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from app.manifest import Preprocessing
from app.pipeline.preprocess import to_slices
from tests.support.phantom import brain, grid
from training import data, image_archive
from training.config import ROOT, Config
from training.data import Split, cached_slices, data_hash, load_scan, load_split
from training.image_archive import (
    SUBJECT_FILES,
    block_name,
    load_tumour_scan,
    open_archive,
    read_exclusions,
    read_lgg,
    read_mednist,
    tumour_scans,
)

CONFIGS = ROOT / "training" / "configs"
HEADS = brain((64, 64, 26), grid((64, 64, 26), (3.8, 3.8, 5.0))).array / 900  # (X, Y, Z) in [0, 1)


def image_of(z: int, low: int, high: int) -> np.ndarray:
    """Return one axial slice as an image: rows run to posterior, columns to the left."""
    return np.round(low + (high - low) * np.clip(HEADS[::-1, ::-1, z].T, 0, 1)).astype(np.uint8)


@pytest.fixture
def headct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Write two subjects. Every second image of the first is empty."""
    folder = tmp_path / "mednist"
    folder.mkdir()
    with tarfile.open(folder / "heads.tar", "w") as archive:
        for number in range(2 * SUBJECT_FILES):
            is_empty = number < SUBJECT_FILES and number % 2
            image = Image.fromarray(image_of(0 if is_empty else 6 + number % 14, 25, 255))
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=95)
            member = tarfile.TarInfo(f"HeadCT/{number:06d}.jpeg")
            member.size = stream.tell()
            archive.addfile(member, io.BytesIO(stream.getvalue()))
    return with_archive(tmp_path, monkeypatch, "headct", "heads.tar")


@pytest.fixture
def flair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Write two patients of ten slices. The first has a tumour in its sixth slice."""
    folder = tmp_path / "lgg_flair"
    folder.mkdir()
    tumour = np.zeros(20, dtype=np.int32)
    tumour[5] = 99
    np.savez(
        folder / "slices.npz",
        images=np.stack([image_of(6 + i % 10, 0, 200) for i in range(20)]),
        patient=np.repeat(["a", "b"], 10),
        slice_no=np.tile(np.arange(10, dtype=np.int16), 2),
        rel_pos=((np.tile(np.arange(10), 2) - 0.5) / 10).astype(np.float32),
        tumour_px_256=tumour,
    )
    return with_archive(tmp_path, monkeypatch, "flair", "slices.npz", pixel_mm=3.8, series_spacing_mm=None)


def with_archive(root: Path, monkeypatch: pytest.MonkeyPatch, name: str, pattern: str, **settings: object) -> Config:
    """Return a shipped configuration on other data, with its run in another folder."""
    monkeypatch.setenv("COUNTERPART_DATA", str(root))
    monkeypatch.setattr("training.config.ROOT", root)
    config = Config.load(CONFIGS / f"{name}.toml")
    assert config.data.image_archive is not None
    archive = config.data.image_archive.model_copy(update={"exclusions": "", **settings})
    changed = config.data.model_copy(update={"pattern": pattern, "image_archive": archive})
    return config.model_copy(update={"data": changed})


def test_ct_image_has_hounsfield_units(headct: Config) -> None:
    scan = load_scan(headct, block_name(SUBJECT_FILES))
    assert scan.volume.shape == (64, 64, SUBJECT_FILES)
    # 25 is the lower end of the window and 255 its upper end; JPEG is off by a grey value or two.
    assert scan.volume.array.max() == pytest.approx(80 * HEADS.max(), abs=2)
    assert np.median(scan.volume.array[:8]) == 0
    assert scan.volume.spacing == pytest.approx([3.8, 3.8, 5.0])


def test_empty_and_excluded_images_are_left_out_of_a_stack(headct: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_archive(headct).subjects.count(block_name(0)) == SUBJECT_FILES
    assert load_scan(headct, block_name(0)).volume.shape == (64, 64, SUBJECT_FILES // 2)
    excluded = read_mednist(image_archive.archive_path(headct), frozenset({"000000.jpeg", "000002.jpeg"}))
    monkeypatch.setattr(image_archive, "open_archive", lambda _: excluded)
    assert load_scan(headct, block_name(0)).volume.shape == (64, 64, SUBJECT_FILES // 2 - 2)


def test_every_image_is_a_slice_scaled_to_the_head_box(headct: Config) -> None:
    scan = load_scan(headct, block_name(SUBJECT_FILES))
    slices = to_slices(scan.volume, headct.training_preprocessing)
    assert len(slices.x) == SUBJECT_FILES
    head_box = headct.preprocessing.head_box
    assert head_box is not None
    largest = slices.foreground[slices.foreground.sum(axis=(1, 2)).argmax()]
    rows, columns = largest.any(axis=1).sum(), largest.any(axis=0).sum()
    assert (rows, columns) == pytest.approx(
        (head_box.rows, head_box.columns), abs=3
    )  # the box leaves the outermost lines out


def test_front_and_left_of_an_image_are_kept(headct: Config) -> None:
    """The ventricles of the phantom lie in front of its centre, so a rotated image correlates less."""
    x = to_slices(load_scan(headct, block_name(SUBJECT_FILES)).volume, headct.training_preprocessing).x
    phantom = to_slices(brain((64, 64, 26), grid((64, 64, 26), (3.8, 3.8, 5.0))), without_window(headct)).x
    best = max(float(np.corrcoef(x[6, 0].ravel(), p[0].ravel())[0, 1]) for p in phantom)
    rotated = max(float(np.corrcoef(x[6, 0, ::-1, ::-1].ravel(), p[0].ravel())[0, 1]) for p in phantom)
    assert best > 0.97
    assert best > rotated


def without_window(config: Config) -> Preprocessing:
    """Return the preprocessing with a percentile in place of the CT window, for the units of the phantom."""
    update = {"window": None, "intensity_percentile": 98.0, "intensity_level": 0.5}
    return config.preprocessing.model_copy(update=update)


def test_slices_beside_a_tumour_are_not_used(flair: Config) -> None:
    scan = load_scan(flair, "a")
    assert scan.healthy is not None
    assert np.flatnonzero(~scan.healthy).tolist() == [4, 5, 6]
    slices = to_slices(scan.volume, flair.training_preprocessing)
    assert len(slices.x) == 10  # the tumour slices still determine the head box
    assert scan.usable_slices(slices, flair.training_preprocessing).tolist() == [0, 1, 2, 3, 7, 8, 9]


def test_excluded_image_is_not_healthy(flair: Config) -> None:
    read = read_lgg(image_archive.archive_path(flair), frozenset({"b_03"}))
    assert [n for n, h in zip(read.names, read.healthy, strict=True) if not h] == ["a_04", "a_05", "a_06", "b_03"]


def test_cache_contains_healthy_slices_only(flair: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    none: dict[str, tuple[str, ...]] = dict.fromkeys(("shapes_validation", "shapes_test", "shapes_test_small"), ())
    split = Split(source="synthetic", seed=0, train=("a", "b"), validation=(), test=(), **none)
    monkeypatch.setattr(data, "load_split", lambda _: split)
    stack = cached_slices(flair, "train")
    assert stack.shape == (17, 96, 80)
    assert 0.3 < np.median(stack[stack > 0]) / 65535 < 0.5
    np.testing.assert_array_equal(cached_slices(flair, "train"), stack)


def test_hash_depends_on_the_healthy_images(flair: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = data_hash(flair, ("a", "b"))
    assert data_hash(flair, ("a", "b")) == before
    assert data_hash(flair, ("a",)) != before
    fewer = read_lgg(image_archive.archive_path(flair), frozenset({"b_03"}))
    monkeypatch.setattr(image_archive, "open_archive", lambda _: fewer)
    assert data_hash(flair, ("a", "b")) != before


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"series_spacing_mm": ((30, 5.0), (20, 7.5))}, "ascending"),
        ({"series_spacing_mm": ((30, 0.0),)}, "greater than 0"),
        ({"kind": "mednist", "series_spacing_mm": ((30, 5.0),)}, "TCGA-LGG"),
    ],
)
def test_invalid_spacings_are_refused(update: dict[str, object], message: str) -> None:
    settings = image_archive.archive_settings(Config.load(CONFIGS / "flair.toml"))
    with pytest.raises(ValidationError, match=message):
        type(settings).model_validate(settings.model_dump() | update)


@pytest.mark.data
def test_every_series_of_tcga_lgg_has_a_spacing(real_scans: Path) -> None:
    assert real_scans.exists()
    config = Config.load(CONFIGS / "flair.toml")
    series = open_archive(config).series_slices
    assert (min(series.values()), max(series.values())) == (20, 88)
    coverage = [image_archive.slice_spacing(config, s) * n for s, n in series.items()]
    assert min(coverage) > 120, "a series covers a head"
    assert max(coverage) < 220


def test_images_cannot_have_tilted_copies() -> None:
    config = Config.load(CONFIGS / "headct.toml")
    with pytest.raises(ValidationError, match="tilted_copies"):
        type(config.data).model_validate({**config.data.model_dump(), "tilted_copies": 3})


# ---- tumours -----------------------------------------------------------------------------------


@pytest.fixture
def tumours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Write two patients of four images of 16 x 24 pixels in random order. The tumour is bright."""
    monkeypatch.setenv("COUNTERPART_DATA", str(tmp_path))
    masks = np.zeros((8, 16, 24), dtype=np.bool_)
    masks[2, 3:6, 10:20] = True
    (tmp_path / "lgg_flair").mkdir()
    numbers = np.array([9, 3, 7, 4, 8, 5, 6, 6], dtype=np.int16)
    np.savez(
        tmp_path / "lgg_flair" / "lgg_flair_192_u8.npz",
        images=np.where(masks, 200, np.arange(24)).astype(np.uint8),
        masks=np.packbits(masks.reshape(8, -1), axis=1),
        patient=np.array(list("abababab")),
        slice_no=numbers,
        rel_pos=((numbers - 0.5) / 20).astype(np.float32),
        tumour_px_256=masks.sum(axis=(1, 2)).astype(np.int32),
    )
    return Config.load(CONFIGS / "flair.toml")


def test_truth_lies_on_the_images(tumours: Config) -> None:
    scan = load_tumour_scan(tumours, "a")
    assert scan.volume.shape == scan.truth.shape == (24, 16, 4)
    assert np.flatnonzero(scan.truth.any(axis=(0, 1))).tolist() == [1]  # the second image from below
    np.testing.assert_array_equal(scan.truth, scan.volume.array > 100)
    assert scan.healthy.tolist() == [False, False, False, True]


def with_spacing(config: Config, series_spacing_mm: tuple[tuple[int, float], ...] | None) -> Config:
    """Return the configuration with a slice spacing by the number of slices of a series."""
    archive = image_archive.archive_settings(config).model_copy(update={"series_spacing_mm": series_spacing_mm})
    return config.model_copy(update={"data": config.data.model_copy(update={"image_archive": archive})})


@pytest.mark.parametrize(
    ("by_number", "spacing"), [(None, 5.0), (((19, 7.5), (20, 3.0)), 3.0), (((20, 7.5), (30, 3.0)), 7.5)]
)
def test_slice_spacing_of_a_tumour_depends_on_the_number_of_slices_of_the_series(
    tumours: Config, by_number: tuple[tuple[int, float], ...] | None, spacing: float
) -> None:
    assert open_archive(tumours).series_slices == {"a": 20, "b": 20}
    spaced = with_spacing(tumours, by_number)
    assert load_tumour_scan(spaced, "a").volume.spacing == pytest.approx([1.25, 1.25, spacing])
    assert load_scan(spaced, "a").volume.spacing == pytest.approx([1.25, 1.25, 5.0]), "healthy images are slices"


def test_series_that_is_longer_than_all_spacings_is_an_error(tumours: Config) -> None:
    with pytest.raises(ValueError, match="no spacing for 20 slices of a"):
        load_tumour_scan(with_spacing(tumours, ((19, 7.5),)), "a")


def test_patient_without_a_tumour_has_an_empty_truth(tumours: Config) -> None:
    (scan,) = tumour_scans(tumours, ["b"])
    assert not scan.truth.any()
    assert scan.healthy.all()


@pytest.mark.data
def test_every_test_patient_has_a_tumour_and_healthy_slices(real_scans: Path) -> None:
    assert real_scans.exists()
    config = Config.load(CONFIGS / "flair.toml")
    scans = list(tumour_scans(config, load_split(config.data.splits).test))
    assert len(scans) == 27
    assert all(scan.truth.any() for scan in scans)
    assert sum(scan.volume.shape[2] for scan in scans) == 513
    assert sum(int(scan.truth.any(axis=(0, 1)).sum()) for scan in scans) == 340
    # FLAIR shows a tumour brighter than the rest of the head.
    is_brighter = [s.volume.array[s.truth].mean() > s.volume.array[s.volume.array > 0].mean() for s in scans]
    assert np.mean(is_brighter) > 0.9


# ---- committed lists ---------------------------------------------------------------------------


def test_parts_of_the_mednist_split_are_further_apart_than_a_patient() -> None:
    """The files of a patient lie within 33 of each other."""
    split = load_split("headct.json")
    part = {name: p for p in ("train", "validation", "test") for name in getattr(split, p)}
    for one, other in pairwise(sorted(part)):
        if part[one] != part[other]:
            assert int(other[:6]) - int(one[-6:]) > SUBJECT_FILES
    assert (len(split.train), len(split.validation), len(split.test)) == (162, 29, 28)


def test_lgg_split_has_its_published_sizes() -> None:
    split = load_split("lgg_flair.json")
    assert (len(split.train), len(split.validation), len(split.test)) == (49, 12, 27)


@pytest.mark.parametrize(("name", "count"), [("headct-excluded.csv", 225), ("lgg-excluded.csv", 2)])
def test_exclusions_have_names_and_reasons(name: str, count: int) -> None:
    assert len(read_exclusions(name)) == count
