"""Damaged files: those of other series are left out, and one of the series is refused."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEGLSLossless

from app.errors import CounterpartError, IrregularSlices, TruncatedFile
from app.volume import Volume
from tests.ingest.conftest import Read
from tests.proofs.fuzz_ingest import resident_mb
from tests.support.dicom import SECRET, Series, make_datasets, reorient, write_series, zip_files
from tests.support.encoded import store_pixels

# First bytes of the elements Rows, PixelSpacing and PixelData in a file, little endian.
ROWS, SPACING, PIXELS = b"\x28\0\x10\0US", b"\x28\0\x30\0DS", b"\xe0\x7f\x10\0"
LEFT_OUT = "Left out: 1 damaged DICOM files."


def cut(path: Path, at: bytes | int) -> None:
    """Truncate a file before an element, or after some bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: at if isinstance(at, int) else content.index(at)])


def invalidate(path: Path) -> None:
    """Replace Rows by a text with the patient's name."""
    dataset = dcmread(path)
    dataset["Rows"].VR = "LO"
    dataset.Rows = SECRET
    dataset.save_as(path)


def add_slice_of_another_series(folder: Path, volume: Volume) -> Path:
    """Write a slice of another series to the series in `folder`/s."""
    first = write_series(folder / "other", volume, Series(name="other"))[0]
    return first.rename(folder / "s" / "stray")


@pytest.mark.parametrize("at", [0x90, 200, ROWS, SPACING])
def test_a_truncated_file_of_another_series_is_left_out_and_counted(
    tmp_path: Path, read_scan: Read, volume: Volume, at: bytes | int
) -> None:
    write_series(tmp_path / "s", volume)
    stray = add_slice_of_another_series(tmp_path, volume)
    cut(stray, at)
    scan = read_scan(tmp_path / "s")
    np.testing.assert_array_equal(scan.volume.array, reorient(volume, "axial")[0])
    assert scan.source.notes == (LEFT_OUT,)
    packed = zip_files(tmp_path / "s.zip", [path for path in (tmp_path / "s").rglob("*") if path.is_file()])
    assert read_scan(packed).source.notes == (LEFT_OUT,)


def test_an_invalid_file_of_another_series_is_left_out_and_counted(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    write_series(tmp_path / "s", volume)
    for path in write_series(tmp_path / "s" / "stray", volume, Series(name="stray")):
        invalidate(path)
    scan = read_scan(tmp_path / "s")
    assert scan.source.notes == ("Left out: 14 damaged DICOM files.",)


@pytest.mark.parametrize("left", [0, 100, "zeros"])
def test_files_without_content_are_counted_and_warned_of(
    tmp_path: Path, read_scan: Read, volume: Volume, left: int | str
) -> None:
    """An interrupted copy leaves empty files, or files of zeros. At an end of the head they leave no gap."""
    paths = write_series(tmp_path / "s", volume)
    for path in paths[-3:]:
        content = path.read_bytes()
        path.write_bytes(content[:left] if isinstance(left, int) else bytes(4096) + content[4096:])
    packed = zip_files(tmp_path / "s.zip", paths)
    for scan in (read_scan(tmp_path / "s"), read_scan(packed)):
        assert scan.volume.shape[2] == 11
        assert scan.source.notes == ("Left out: 3 damaged DICOM files.",)
        assert scan.source.warnings == (
            "Damaged or empty files were left out: 3. If they belong to this series, a part of the head is missing.",
        )


def test_empty_files_that_are_not_named_like_the_images_need_no_warning(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    """Programs leave empty marks and locks beside the images, and folders as names that end with a backslash."""
    paths = write_series(tmp_path / "s", volume)
    for path in paths:
        path.rename(path.with_name(f"1.2.{path.stem}.7"))
    files = [*(tmp_path / "s").iterdir(), tmp_path / "s" / "viewer.lock"]
    files[-1].touch()
    packed = zip_files(tmp_path / "s.zip", files)
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("images\\", b"")
    for scan in (read_scan(tmp_path / "s"), read_scan(packed)):
        assert (scan.volume.shape[2], scan.source.notes, scan.source.warnings) == (14, (), ())


def test_an_empty_file_with_another_uid_as_its_name_is_counted(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    paths = write_series(tmp_path / "s", volume)
    for number, path in enumerate(paths):
        path.rename(path.with_name(f"1.2.{number}"))
    (tmp_path / "s" / "1.2.13").write_bytes(b"")
    assert read_scan(tmp_path / "s").source.notes == (LEFT_OUT,)


def test_an_empty_file_in_the_middle_of_the_head_is_named_as_a_possible_slice(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    cut(write_series(tmp_path / "s", volume)[7], 0)
    with pytest.raises(IrregularSlices) as refused:
        read_scan(tmp_path / "s")
    assert "1 damaged DICOM files" in refused.value.found


def test_a_damaged_file_of_another_known_series_needs_no_warning(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    write_series(tmp_path / "s", volume)
    cut(add_slice_of_another_series(tmp_path, volume), SPACING)
    scan = read_scan(tmp_path / "s")
    assert (scan.source.notes, scan.source.warnings) == ((LEFT_OUT,), ())


@pytest.mark.parametrize(("k", "gap"), [(7, "Slice 8 of 14 is missing"), (0, ""), (13, "")])
@pytest.mark.parametrize("at", [ROWS, SPACING, None])
def test_a_damaged_file_of_the_series_is_refused_with_its_number(
    tmp_path: Path, read_scan: Read, volume: Volume, k: int, gap: str, *, at: bytes | None
) -> None:
    """A damaged first or last slice leaves no gap: it is found by its SeriesInstanceUID."""
    paths = write_series(tmp_path / "s", volume)
    if at is None:
        invalidate(paths[k])
    else:
        cut(paths[k], at)
    with pytest.raises(TruncatedFile) as refused:
        read_scan(tmp_path / "s")
    assert refused.value.found.startswith("1 of 14 files of the series")
    assert gap in refused.value.found
    assert SECRET not in str(refused.value)


def test_the_remaining_slices_are_resampled_on_request(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    paths = write_series(tmp_path / "s", volume)
    cut(paths[7], ROWS)
    scan = read_scan(tmp_path / "s", geometry="resample")
    assert scan.volume.shape == (32, 34, 14)
    assert len(scan.source.instances) == 13
    assert scan.source.notes[0] == LEFT_OUT
    assert scan.source.notes[1].startswith("Slice 8 of 14 is missing")
    expected = reorient(volume, "axial")[0]
    np.testing.assert_allclose(scan.volume.array[..., 6], expected[..., 6], atol=1e-3)
    np.testing.assert_allclose(scan.volume.array[..., 7], (expected[..., 6] + expected[..., 8]) / 2, atol=1e-3)


def test_a_gap_is_refused_with_the_number_of_unreadable_files(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    cut(write_series(tmp_path / "s", volume)[7], 200)
    with pytest.raises(IrregularSlices) as refused:
        read_scan(tmp_path / "s")
    assert refused.value.found.startswith("Slice 8 of 14 is missing")
    assert "1 damaged DICOM files" in refused.value.found


def test_damaged_pixels_are_refused_with_the_number_of_their_slice(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    paths = write_series(tmp_path / "s", volume)
    content = paths[8].read_bytes()
    paths[8].write_bytes(content[: content.index(PIXELS) + 100])
    with pytest.raises(TruncatedFile, match="slice 9 of 14"):
        read_scan(tmp_path / "s")


def test_damaged_pixels_of_another_series_are_not_decoded(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    write_series(tmp_path / "s", volume)
    cut(add_slice_of_another_series(tmp_path, volume), -1000)
    scan = read_scan(tmp_path / "s")
    assert scan.source.notes == ("Left out: 1 stacks of fewer than 10 slices (1 slices, axial, z -42 mm).",)


@pytest.mark.parametrize("count", [1, 3])
def test_only_damaged_files_are_refused_with_their_number(
    tmp_path: Path, read_scan: Read, volume: Volume, count: int
) -> None:
    paths = write_series(tmp_path / "s", volume)
    for path in paths[:count]:
        cut(path, ROWS)
    for path in paths[count:]:
        path.unlink()
    with pytest.raises(TruncatedFile) as refused:
        read_scan(tmp_path / "s")
    assert refused.value.found.startswith(f"{count} of {count} DICOM files")


def test_a_slice_truncated_anywhere_never_shortens_the_scan_silently(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    last = write_series(tmp_path / "s", volume)[-1]
    content = last.read_bytes()
    ends, series_at = content.index(PIXELS), content.index(b"\x20\0\x0e\0UI")
    codes = set()
    for length in range(132, ends, 37):
        last.write_bytes(content[:length])
        try:
            notes = read_scan(tmp_path / "s").source.notes
        except CounterpartError as error:
            codes.add(error.code)
            assert length > series_at
        else:
            assert notes == (LEFT_OUT,)
            assert length < series_at + 80  # its series is not readable yet
    # A file that ends right before its pixel data is a slice without pixels.
    assert codes == {"truncated_file", "no_image_in_archive"}


def test_a_truncated_codestream_leaks_no_memory(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    dataset = make_datasets(volume)[0]
    store_pixels(dataset, np.random.default_rng(0).integers(0, 4096, (1, 512, 512))[0], 12, signed=False)
    dataset.compress(JPEGLSLossless, generate_instance_uid=False)
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = encapsulate([frame[: len(frame) // 2]])
    dataset.save_as(tmp_path / "broken.dcm")

    def memory_after(reads: int) -> float:
        for _ in range(reads):
            with pytest.raises(CounterpartError):
                read_scan(tmp_path / "broken.dcm")
        return resident_mb()

    before = memory_after(10)
    # GDCM would keep the 200 kB of each: 8 MB.
    assert memory_after(40) - before < 2
