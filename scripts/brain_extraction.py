"""What brain extraction does on real heads: numbers for decision 11, and a picture to look at.

    python -m scripts.brain_extraction OUT [--changed | --alone]

Every T1 with skull of the data, then other images; with --alone, how much of each scan lies outside the outline of the
first network, by which a brain that stands alone is told; with --changed, three of the heads turned, cropped, thinned
out or with a lesion painted at the brain's surface, compared with what the whole head gave.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from scipy import ndimage
from scipy.spatial.transform import Rotation

from app.errors import BrainNotExtracted
from app.pipeline.brain_extraction import (
    BrainExtraction,
    ExtractionNetworks,
    extract_brain,
    locate_brain,
    outside_fraction,
)
from app.pipeline.findings import dice
from app.runtime.bundle import shipped_models
from app.runtime.extractor import EXTRACTOR, load_extractor
from app.volume import BoolArray, Volume
from training.config import data_root
from training.data import load_volume
from training.foreign import heads

plt.switch_backend("Agg")

OTHER = ("clinical_scct_ct_template", "clinical_stroke_T2", "M2208_T2w", "clinical_gg_flair_template", "CT_pitch")
CHANGED = ("IXI335", "IXI481", "IXI174")
LESION_MM = 14.0


def others() -> Iterator[tuple[str, Volume]]:
    """What is no T1 with skull: other sequences, CT, brains that stand alone."""
    for name in OTHER:
        yield name, load_volume(data_root() / "nifti_misc" / f"{name}.nii.gz")
    for path in (
        *sorted((data_root() / "t1_ds002748").glob("sub-*.nii.gz")),
        *sorted((data_root() / "t1_ds002748" / "volumes").glob("*.nii.gz"))[:3],
        *sorted((data_root() / "ms_open_ms_data").glob("*_T1_mni_brain_u16.nii.gz")),
        *sorted((data_root() / "brats2013").glob("*_t1c_u8.nii.gz")),
    ):
        yield path.name.removesuffix(".nii.gz"), load_volume(path)


def tell(name: str, volume: Volume, networks: ExtractionNetworks) -> BrainExtraction | None:
    """One line a scan."""
    start, used = time.perf_counter(), time.process_time()
    try:
        result = extract_brain(volume, networks)
    except BrainNotExtracted as error:
        what = "refused: " + error.found.partition(": ")[2]
        result = None
    else:
        what = "left as it is"
        if isinstance(result, BrainExtraction):
            what = f"{result.volume_ml:.0f} ml, agreement {result.agreement:.3f}, cut {result.cut_cm2:.1f} cm2"
    seconds = f"{time.perf_counter() - start:.1f} s, {time.process_time() - used:.1f} s of CPU"
    sys.stdout.write(f"{name}: {what} ({seconds})\n")
    sys.stdout.flush()
    return result if isinstance(result, BrainExtraction) else None


def tell_shares(networks: ExtractionNetworks) -> None:
    """How much lies outside the outline: brains that stand alone, then heads."""
    for kind, folder in (("alone", data_root() / "t1_ds002748" / "volumes"), ("head", data_root() / "ixi_2mm" / "t1")):
        shares = []
        for path in sorted(folder.glob("*.nii.gz")):
            cube, located, low, high = locate_brain(load_volume(path), networks)[1:]
            shares.append(outside_fraction(cube, located, low, high))
        sys.stdout.write(f"{kind}: {len(shares)} scans, {min(shares):.3f} to {max(shares):.3f} outside\n")


def changed(volume: Volume, mask: BoolArray) -> Iterator[tuple[str, Volume]]:
    """The same head seen otherwise."""
    for degrees in (10, 20):
        turn = np.eye(4)
        turn[:3, :3] = Rotation.from_euler("xyz", (degrees, -degrees / 2, degrees / 2), degrees=True).as_matrix()
        middle = nib.affines.apply_affine(volume.affine, np.array(volume.shape) / 2)
        about = np.eye(4)
        about[:3, 3] = middle
        affine = about @ turn @ np.linalg.inv(about) @ volume.affine
        image = nib.Nifti1Image(volume.array, volume.affine)
        yield (
            f"turned by {degrees} degrees",
            Volume(resample_from_to(image, (volume.shape, affine), order=1).get_fdata(dtype=np.float32), affine),
        )
    top = int(np.flatnonzero(mask.any(axis=(0, 2)))[-1])  # the second axis of IXI runs from inferior to superior
    for cut_mm in (10, 40):
        yield (
            f"upper {cut_mm} mm missing",
            Volume(volume.array[:, : top + 1 - int(cut_mm / volume.spacing[1])], volume.affine),
        )
    thin = volume.affine.copy()
    thin[:, 1] *= 3
    yield "every third slice", Volume(volume.array[:, ::3], thin)
    inner = ndimage.distance_transform_edt(mask, sampling=volume.spacing)
    at = np.argwhere((inner > 1) & (inner < 4))
    at = at[np.argmin(np.linalg.norm(at - np.argwhere(mask).mean(axis=0) - (0, 25, 25), axis=1))]
    apart = np.linalg.norm((np.indices(volume.shape).T - at) * volume.spacing, axis=-1).T
    for what, percentile in (("dark", 10), ("bright", 99)):
        level = np.percentile(volume.array[mask], percentile)
        painted = np.where((apart < LESION_MM) & mask, level, volume.array)
        yield f"{what} lesion of {LESION_MM:.0f} mm at the surface", Volume(painted, volume.affine)


def on_grid_of(brain: BrainExtraction, volume: Volume) -> BoolArray:
    """A mask at the places of another grid."""
    image = nib.Nifti1Image(brain.mask.astype(np.float32), brain.volume.affine)
    there = resample_from_to(image, (volume.shape, volume.affine), order=1, mode="constant", cval=np.nan)
    return np.asarray(there.get_fdata())


def picture(shown: list[tuple[str, Volume, BoolArray]], path: Path) -> None:
    """Three planes of each head with the outline."""
    figure, axes = plt.subplots(len(shown), 6, figsize=(9, 1.5 * len(shown)), facecolor="black", squeeze=False)
    figure.subplots_adjust(0, 0, 1, 1, 0, 0)
    for row, (name, volume, mask) in zip(axes, shown, strict=True):
        turned = nib.orientations.io_orientation(volume.affine)
        array, inside = (nib.orientations.apply_orientation(a, turned) for a in (volume.array, mask))
        sizes = nib.affines.voxel_sizes(volume.affine @ nib.orientations.inv_ornt_aff(turned, volume.shape))
        for place, (axis, share) in zip(row, ((2, 0.2), (2, 0.5), (2, 0.8), (0, 0.5), (0, 0.7), (1, 0.5)), strict=True):
            planes = np.flatnonzero(inside.any(axis=tuple(i for i in range(3) if i != axis)))
            index = int(planes[0] + share * (planes[-1] - planes[0]))
            across, up = (i for i in range(3) if i != axis)
            seen, drawn = (np.take(a, index, axis=axis).T for a in (array, inside))
            brightest, aspect = np.percentile(array, 99.7), sizes[up] / sizes[across]
            place.imshow(seen, cmap="gray", origin="lower", vmax=brightest, aspect=aspect)
            place.contour(drawn, [0.5], colors="red", linewidths=0.7)
            place.axis("off")
        row[0].text(0, 1, name, color="white", fontsize=6, transform=row[0].transAxes, va="top")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(out: Path, which: str) -> None:
    """Everything, in the order of the docstring."""
    out.mkdir(parents=True, exist_ok=True)
    networks = load_extractor(shipped_models() / EXTRACTOR).networks
    if which == "--alone":
        tell_shares(networks)
        return
    if which != "--changed":
        found = [(name, volume, tell(name, volume, networks)) for _, name, volume in heads()]
        shown = [(name, volume, brain.mask) for name, volume, brain in found if brain]
        for start in range(0, len(shown), 7):
            picture(shown[start : start + 7], out / f"heads-{start // 7}.png")
        for name, volume in others():
            tell(name, volume, networks)
        return
    for _, name, volume in heads():
        if name not in CHANGED or not (whole := tell(name, volume, networks)):
            continue
        for what, other in changed(volume, whole.mask):
            brain = tell(f"{name}, {what}", other, networks)
            if brain:
                there = on_grid_of(brain, volume)
                seen = np.isfinite(there)
                sys.stdout.write(f"    Dice with the whole head's: {dice(there[seen] > 0.5, whole.mask[seen]):.4f}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
