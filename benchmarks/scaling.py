"""Time against slices, resolution and scans at once: over HTTP, one and two workers."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.processing import resample_to_output
from tqdm import tqdm

from app.ingest.reader import read_scan
from app.volume import Volume
from benchmarks.served import serve

SHARES = (0.25, 0.5, 0.75, 1.0)
SPACINGS_MM = (0.7, 1.0, 1.5, 2.0)
AT_ONCE = (1, 2, 4)
WORKERS = (1, 2)


def fewer_slices(volume: Volume, share: float) -> Volume:
    """The middle of a scan along its third axis nearest to foot-head; a share of its slices."""
    codes = nib.orientations.io_orientation(volume.affine)[:, 0]
    axis = int(np.flatnonzero(codes == 2)[0])
    count = volume.shape[axis]
    kept = max(1, round(count * share))
    first = (count - kept) // 2
    image = nib.Nifti1Image(volume.array, volume.affine)
    window = [slice(None)] * 3
    window[axis] = slice(first, first + kept)
    cut = image.slicer[tuple(window)]
    return Volume(np.asarray(cut.dataobj), cut.affine)


def at_spacing(volume: Volume, spacing_mm: float) -> Volume:
    """The same scan in cubes of another size."""
    there = resample_to_output(nib.Nifti1Image(volume.array, volume.affine), (spacing_mm,) * 3, order=1)
    return Volume(np.asarray(there.dataobj), there.affine)


def variants(volume: Volume) -> Iterator[tuple[str, float, Volume]]:
    """What is varied, its value, and the scan."""
    for share in SHARES:
        yield "slices", share, fewer_slices(volume, share)
    for spacing in SPACINGS_MM:
        yield "resolution", spacing, at_spacing(volume, spacing)


def write(volume: Volume, path: Path) -> Path:
    """A NIfTI to upload, as scanners' converters write it: whole numbers."""
    top = float(volume.array.max())
    array = np.clip(volume.array / top * 4095, 0, 4095).astype(np.int16)
    nib.save(nib.Nifti1Image(array, volume.affine), path)
    return path


def measure_scaling(scan: Path, models: Path, repeats: int, *, quick: bool = False) -> dict[str, Any]:
    """Each measurement in turns.

    Parameters
    ----------
    scan : Path
        A whole T1 volume.
    models : Path
        Folder of bundles.
    repeats : int
        Turns.
    quick : bool
        The least of everything: to see that it works.
    """
    found: dict[str, Any] = {"slices": [], "resolution": [], "together": []}
    with TemporaryDirectory() as made:
        folder = Path(made)
        volume = read_scan(scan, scratch=folder).volume
        whole = write(volume, folder / "whole.nii.gz")
        several = list(variants(volume))[:: len(SHARES)] if quick else list(variants(volume))
        files = [(kind, value, v.shape, write(v, folder / f"{kind}-{value}.nii.gz")) for kind, value, v in several]
        del several, volume
        with serve(models) as served:
            served.analyse(whole)  # opens the networks
            for kind, value, shape, path in tqdm(files, desc="slices and resolution"):
                runs = [served.analyse(path) for _ in range(repeats)]
                found[kind].append({"value": value, "shape": shape, "runs": runs, "peak_bytes": served.peak_bytes()})
        for workers in WORKERS:
            found["together"] += _together(whole, models, workers, repeats, AT_ONCE[: 1 if quick else None])
    return found


def _together(scan: Path, models: Path, workers: int, repeats: int, at_once: Sequence[int]) -> list[dict[str, Any]]:
    """Several scans at once, for so many workers that share the cores."""
    found = []
    with serve(models, workers, threads=max(1, len(os.sched_getaffinity(0)) // workers)) as served:
        # Each worker opens its networks; which of them takes a scan is not ours to say.
        served.together([scan] * (2 * workers))
        for scans in tqdm(at_once, desc=f"{workers} workers"):
            runs = [served.together([scan] * scans) for _ in range(repeats)]
            found.append({"workers": workers, "scans": scans, "seconds": runs, "peak_bytes": served.peak_bytes()})
    return found
