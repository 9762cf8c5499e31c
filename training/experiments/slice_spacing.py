"""Estimate of the slice spacing of TCGA-LGG, whose archive states none, from the shape of the heads.

`python -m training.experiments.slice_spacing CONFIG` writes docs/evaluation/NAME-slice-spacing.md. The configuration
has the values that are used (`series_spacing_mm`, `above_stack_mm`).

Above its largest axial section, a head becomes narrower towards the vertex. The height at which the area of the section
is a certain share of the largest area is known from heads with a known spacing (IXI). The number of slices between two
such heights gives the spacing of a stack. The area of its highest slice gives the height of the head above the stack.
The pixel size is not needed. Only patients of the training and of the validation are used.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from tqdm import tqdm

from app.volume import FloatArray, Volume
from training.config import ROOT, Config, data_root, parse_config
from training.data import load_split, load_volume
from training.experiments.markdown import table
from training.image_archive import archive_settings, load_stack, open_archive

Float64Array = npt.NDArray[np.float64]

# Shares of the largest area, from the widest part of the head to near the vertex.
AREA_SHARES = (0.92, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35)
# Fewer shares in the stack do not determine a slope.
MIN_SHARES = 3
# The largest section of a reference head is searched down to here below the vertex, above nose, jaw and neck.
REFERENCE_HEIGHT_MM = 110.0
# The vertex is the highest section with a larger share.
VERTEX_SHARE = 0.03
# Pixels above this share of the 98th percentile belong to the head.
HEAD_LEVEL = 0.12


def section_areas(slices: FloatArray) -> Float64Array:
    """Return the area of the head in axial slices (Z, H, W), as a share of the largest area."""
    level = HEAD_LEVEL * np.percentile(slices[slices > 0], 98)
    areas = np.zeros(len(slices))
    for z, image in enumerate(slices):
        head = ndimage.binary_fill_holes(ndimage.gaussian_filter(image, 1) > level)
        labels, count = ndimage.label(head)
        areas[z] = np.bincount(labels.ravel())[1:].max() if count else 0
    shares: Float64Array = areas / areas.max()
    return shares


def heights_of_shares(heights: Float64Array, areas: Float64Array) -> Float64Array:
    """Return the heights above the largest section at which the area falls to each of `AREA_SHARES`.

    Parameters
    ----------
    heights : (Z,) ndarray
        Ascending heights of the slices.
    areas : (Z,) ndarray
        Result of `section_areas`.

    Returns
    -------
    (len(AREA_SHARES),) ndarray
        NaN for a share that lies outside of the stack.
    """
    widest = int(areas.argmax())
    falling = np.minimum.accumulate(areas[widest:])
    return np.interp(AREA_SHARES, falling[::-1], heights[widest:][::-1], left=np.nan, right=np.nan)


def head_profile(volume: Volume) -> Float64Array:
    """Return the heights of `AREA_SHARES` in a whole head relative to its vertex, in mm."""
    image = nib.as_closest_canonical(nib.Nifti1Image(volume.array, volume.affine))
    slices = np.asarray(image.dataobj, np.float32).transpose(2, 1, 0)
    spacing = float(image.header.get_zooms()[2])
    vertex = int(np.flatnonzero(section_areas(slices) > VERTEX_SHARE)[-1])
    lowest = max(0, vertex - round(REFERENCE_HEIGHT_MM / spacing))
    # The head ends between the highest section that shows it and the next one.
    heights = (np.arange(lowest, vertex + 1, dtype=np.float64) - vertex - 0.5) * spacing
    return heights_of_shares(heights, section_areas(slices[lowest : vertex + 1]))


def reference_profile() -> Float64Array:
    """Return the median of `head_profile` over the heads of IXI that have a skull."""
    paths = tqdm(sorted((data_root() / "ixi_2mm").rglob("*.nii.gz")), desc="reference heads", unit="head")
    typical: Float64Array = np.nanmedian([head_profile(load_volume(path)) for path in paths], axis=0)
    return typical


@dataclass(frozen=True)
class Estimate:
    """Estimate for one stack.

    Attributes
    ----------
    series_slices : int
        Number of slices of the whole series.
    spacing_mm : float
        NaN if the stack shows too little of the head.
    above_mm : float
        Height of the head above the highest slice of the stack.
    """

    series_slices: int
    spacing_mm: float
    above_mm: float


def estimate(slices: FloatArray, series_slices: int, reference: Float64Array) -> Estimate:
    """Estimate the spacing of axial slices (Z, H, W), inferior to superior, and the height of the head above them."""
    areas = section_areas(slices)
    above = -float(np.interp(areas[-1], AREA_SHARES[::-1], reference[::-1]))
    numbers = heights_of_shares(np.arange(len(slices), dtype=np.float64), areas)
    shown = np.isfinite(numbers)
    # If the lowest slice is the largest one, the head may be larger below the stack.
    if shown.sum() < MIN_SHARES or areas.argmax() == 0:
        return Estimate(series_slices, float("nan"), above)
    return Estimate(series_slices, float(np.polyfit(numbers[shown], reference[shown], 1)[0]), above)


def estimates(config: Config, subjects: Sequence[str]) -> Iterator[Estimate]:
    """Yield the estimate for the stack of each subject."""
    reference, series = reference_profile(), open_archive(config).series_slices
    for subject in tqdm(subjects, desc="stacks", unit="stack"):
        yield estimate(load_stack(config, subject).volume.array.transpose(2, 1, 0), series[subject], reference)


def page(config: Config, found: Sequence[Estimate]) -> str:
    """Return the page."""
    settings, rows, smallest = archive_settings(config), [], 0
    for largest, used in settings.series_spacing_mm or ():
        every = [each.spacing_mm for each in found if smallest < each.series_slices <= largest]
        known = [spacing for spacing in every if np.isfinite(spacing)]
        quartiles = [f"{value:.1f}" for value in np.percentile(known, (25, 50, 75))] if known else ["", "", ""]
        rows.append([f"{smallest + 1} to {largest}", f"{len(known)} of {len(every)}", *quartiles, f"{used:g}"])
        smallest = largest
    header = ["slices of the series", "patients", "25th percentile, mm", "median", "75th percentile", "used, mm"]
    low, middle, high = np.percentile([each.above_mm for each in found], (25, 50, 75))
    above = (
        f"Height of the head above the highest stored slice: {middle:.0f} mm in the median, {low:.0f} and {high:.0f} "
        f"mm at the quartiles. Used: {settings.above_stack_mm:g} mm."
    )
    parts = [f"# Estimated slice spacing of the scans of `{config.name}`", INTRODUCTION, table(header, rows), above]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """Written by `python -m training.experiments.slice_spacing CONFIG`.

The archive of TCGA-LGG states the number of slices of each series, but not their spacing. The spacing is estimated from
the shape of the heads: above the widest part of a head, the area of an axial section decreases towards the vertex. The
height of this decrease is known from 20 heads of IXI. The estimate for one patient is uncertain, because heads have
different shapes and the skin is dark in FLAIR. So all series with a similar number of slices get one spacing, close to
the median of their estimates. Only training and validation patients are used. "Patients" has the number of patients
with an estimate, of all patients of the row."""


def main() -> None:
    """Estimate the spacing of the stacks of a configuration, and write the page."""
    config = parse_config(__doc__)
    split = load_split(config.data.splits)
    found = list(estimates(config, [*split.train, *split.validation]))
    path = ROOT / "docs" / "evaluation" / f"{config.name}-slice-spacing.md"
    path.write_text(page(config, found))


if __name__ == "__main__":
    main()
