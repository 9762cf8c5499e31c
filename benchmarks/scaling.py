"""Time against slices, resolution and scans at once: over HTTP, one and two workers."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.processing import resample_to_output
from tqdm import tqdm

from app.ingest import read
from app.volume import Volume
from benchmarks.series import make_series, measure_series
from benchmarks.served import Served, serve

SHARES = (0.25, 0.5, 0.75, 1.0)
SPACINGS_MM = (0.6, 0.8, 1.0, 1.5, 2.0)
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


def measure_scaling(scan: Path, models: Path, data: Path, repeats: int) -> dict[str, Any]:
    """Each measurement in turns, the services being started anew for memory's sake.

    Parameters
    ----------
    scan : Path
        A whole T1 volume.
    models : Path
        Folder of bundles.
    data : Path
        Root of the data: the CT series is made from it.
    repeats : int
        Turns.
    """
    with TemporaryDirectory() as made:
        folder = Path(made)
        volume = read(scan, scratch=folder).volume
        whole = write(volume, folder / "whole.nii.gz")
        several = [
            (kind, value, v.shape, write(v, folder / f"{kind}-{value}.nii.gz")) for kind, value, v in variants(volume)
        ]
        series = make_series(data, folder)
        found: dict[str, Any] = {"series_mb": series.stat().st_size / 1e6, "series": _alone(series, models, repeats)}
        found["volume"] = _alone(whole, models, repeats)
        found |= {"slices": [], "resolution": [], "together": []}
        with serve(models) as served:
            served.analyse(whole)  # opens the networks
            for kind, value, shape, path in tqdm(several, desc="slices and resolution"):
                runs = [served.analyse(path) for _ in range(repeats)]
                found[kind].append({"value": value, "shape": shape, "runs": runs, "peak_bytes": served.peak_bytes()})
        for workers in WORKERS:
            found["together"] += _together(whole, models, workers, repeats)
    return found


def _alone(scan: Path, models: Path, repeats: int) -> list[dict[str, object]]:
    """A service that has just started, then the same scan again: the first one opens the networks."""
    with serve(models) as served:
        return [measure_series(served, scan) for _ in range(repeats + 1)]


def _together(scan: Path, models: Path, workers: int, repeats: int) -> list[dict[str, Any]]:
    """Several scans at once, for so many workers that share the cores."""
    found = []
    with ExitStack() as stack:
        served: Served = stack.enter_context(serve(models, workers, threads=max(1, 2 // workers)))
        served.together([scan] * workers)
        for count in tqdm(AT_ONCE, desc=f"{workers} workers"):
            runs = [served.together([scan] * count) for _ in range(repeats)]
            found.append({"workers": workers, "scans": count, "seconds": runs, "peak_bytes": served.peak_bytes()})
    return found
