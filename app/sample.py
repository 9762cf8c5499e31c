"""Sample scan for a first try: a template brain with a synthetic lesion of known shape.

No real scan ships with Counterpart. The template is part of the nilearn package, so nothing is downloaded.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel import affines

from app.errors import MissingExtra
from app.export.outputs import write_nifti
from app.pipeline.synthetic_lesion import insert_lesion
from app.volume import Affine, FloatArray

TEMPLATE = Path("datasets", "data", "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")
MNI_SPACE = 4  # NIfTI code

# The template is an average of 152 heads in a space that is larger than a head. Its brain has 1.89 litres, the healthy
# scans of ds002748 have 1.1 to 1.55. This factor reduces it to 1.47 litres.
SCALE = 0.92
# The template has less tissue contrast than a scan. With this exponent its percentiles 2, 10, 25, 50, 75 and 90, as
# fractions of the 98th, are within 0.06 of those of ds002748.
GAMMA = 2.1
BRIGHT = 98  # percentile
# Standard deviation of the noise in each quadrature channel, as a fraction of the 98th percentile. The scan minus
# the scan after a 1 mm Gaussian has a standard deviation of 5.7 % of the robust range, as in ds002748 (5.3 to 6.0 %).
NOISE_SD = 0.02

# An ellipsoid of about 6 ml in the centrum semiovale. At least 90 % of it is white matter.
CENTRE_MM = (23.0, 0.0, 33.0)
SEMI_AXES_MM = (9.0, 16.0, 10.0)
JITTER_MM = 1.5
# Fraction of the brain's robust range. Positive, because the shipped `t1` rarely detects dark lesions.
CONTRAST = 0.35

MARGIN_VOXELS = 4
GREY_LEVELS = 1000  # int16 value of the 98th percentile

NOTE = """A synthetic scan for trying Counterpart. It is not the head of a real person.

scan.nii.gz   MNI152 T1 template as shipped with nilearn, scaled by {scale}, intensities to the power
              of {gamma}, Rician noise with a standard deviation of {noise:.0%} of the 98th percentile (seed {seed}),
              and a lesion: an ellipsoid in the white matter, its edge smoothed over about 1 mm, its
              intensity changed by {contrast:+.2f} of the brain's robust range (2nd to 98th percentile).
truth.nii.gz  1 where that change exceeds half of its size: {volume:.2f} ml.

What to expect: the template is an average of 152 heads and smoother than any scan. The model t1 finds the lesion, and
also marks other regions, in which the template differs from a scan, with lower peaks.

Template: Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological
Institute, McGill University. Permission to use, copy, modify, and distribute this software and its
documentation for any purpose and without fee is hereby granted, provided that the above copyright
notice appear in all copies.
"""


@dataclass(frozen=True)
class Sample:
    """Files of a sample scan.

    Attributes
    ----------
    scan, truth : Path
        The scan and the mask of its lesion, on the same grid.
    lesion_ml : float
        Volume of the lesion.
    """

    scan: Path
    truth: Path
    lesion_ml: float


def make_sample(out: Path, seed: int = 0) -> Sample:
    """Write a template brain with a lesion of known shape. The same seed gives the same bytes.

    Parameters
    ----------
    out : Path
        Folder for scan.nii.gz, truth.nii.gz and README.txt. It is created if it does not exist.
    seed : int
        Determines the noise, and the side and position of the lesion.

    Raises
    ------
    MissingExtra
        nilearn, which contains the template, is not installed.
    """
    rng = np.random.default_rng(seed)
    brain, affine = _template()
    changed, lesion = insert_lesion(
        brain, brain > 0, _ellipsoid(brain.shape, affine, rng), affines.voxel_sizes(affine), CONTRAST
    )
    noisy = np.where(brain > 0, _rician(changed, rng), 0)
    truth = lesion.astype(np.uint8)

    out.mkdir(parents=True, exist_ok=True)
    sample = Sample(
        scan=out / "scan.nii.gz",
        truth=out / "truth.nii.gz",
        lesion_ml=float(truth.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000),
    )
    grey = np.round(noisy * GREY_LEVELS).astype(np.int16)
    write_nifti(sample.scan, grey, affine, MNI_SPACE, "counterpart: synthetic sample, nobody's head")
    write_nifti(sample.truth, truth, affine, MNI_SPACE, "counterpart: lesion of the synthetic sample")
    note = NOTE.format(scale=SCALE, gamma=GAMMA, noise=NOISE_SD, seed=seed, contrast=CONTRAST, volume=sample.lesion_ml)
    (out / "README.txt").write_text(note, encoding="utf-8")
    return sample


def _template() -> tuple[FloatArray, Affine]:
    """Return the skull-stripped template with the size and contrast of a scan. Its 98th percentile is 1."""
    package = find_spec("nilearn")  # not imported, because that imports scikit-learn and takes two seconds
    if package is None or not package.submodule_search_locations:
        raise MissingExtra(
            "nilearn, which contains the template brain, is not installed.",
            expected="the optional dependency `sample`.",
            advice="Run: pip install 'counterpart[sample]'.",
        )
    image = nib.load(Path(package.submodule_search_locations[0]) / TEMPLATE)
    assert isinstance(image, nib.Nifti1Image)
    whole = np.asarray(image.dataobj, dtype=np.float32)
    corner, box = _bounding_box(whole > 0)
    array = whole[box]
    bright = np.percentile(array[array > 0], BRIGHT)
    assert image.affine is not None
    affine = np.diag([SCALE, SCALE, SCALE, 1.0]) @ image.affine
    affine[:3, 3] = affines.apply_affine(affine, corner)
    return np.asarray((array / bright) ** GAMMA, dtype=np.float32), affine


def _bounding_box(inside: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], tuple[slice, ...]]:
    """Return the first voxel and the slices of the box around a mask, with a margin."""
    where = np.argwhere(inside)
    low = np.maximum(where.min(axis=0) - MARGIN_VOXELS, 0)
    high = np.minimum(where.max(axis=0) + 1 + MARGIN_VOXELS, inside.shape)
    return low, tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def _ellipsoid(shape: tuple[int, ...], affine: Affine, rng: np.random.Generator) -> FloatArray:
    """Return 1 inside the lesion's ellipsoid and 0 outside, (X, Y, Z)."""
    side = np.array([rng.choice((-1.0, 1.0)), 1.0, 1.0])
    centre = side * CENTRE_MM + rng.uniform(-JITTER_MM, JITTER_MM, 3)
    steps, origin = np.diag(affine)[:3], affine[:3, 3]  # the template's axes are parallel to RAS+
    along = [o + d * i for o, d, i in zip(origin, steps, np.ogrid[tuple(slice(n) for n in shape)], strict=True)]
    sharp = sum(((a - c) / r) ** 2 for a, c, r in zip(along, centre, SEMI_AXES_MM, strict=True)) <= 1
    return np.asarray(sharp, dtype=np.float32)


def _rician(signal: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Return the magnitude of a complex signal with Gaussian noise in both channels (Rician noise)."""
    real = signal + NOISE_SD * rng.standard_normal(signal.shape, dtype=np.float32)
    imaginary = NOISE_SD * rng.standard_normal(signal.shape, dtype=np.float32)
    magnitude: FloatArray = np.hypot(real, imaginary)
    return magnitude
