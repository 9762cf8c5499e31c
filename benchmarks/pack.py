"""Package for a machine without a network: the wheels that its Python lacks, and a scan with a lesion."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np

from app.export.outputs import write_nifti
from app.pipeline.synthetic_lesion import insert_lesion

# The machine is expected to have torch, onnx, onnxruntime, numpy, scipy, pillow, packaging and tqdm.
NEEDED = ("nibabel", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection", "monai")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MIB = 1 << 20
# Ball near the centre of the brain. Without a lesion, two empty masks would agree.
RADIUS_MM, OFFSET_MM, CONTRAST = 8.0, 30.0, 0.5


def pack(scan: Path, out: Path, python: str) -> None:
    """Write `out`/wheels, in the versions of this environment for another Python on x86-64, and `out`/scan.nii.gz.

    Raises
    ------
    subprocess.CalledProcessError
        pip did not find a wheel.
    """
    wheels = out / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", python, "--dest", str(wheels)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, *(f"{name}=={version(name)}" for name in NEEDED)], check=True)  # noqa: S603
    write_scan_with_lesion(scan, out / "scan.nii.gz")
    total = sum(path.stat().st_size for path in out.rglob("*.*"))
    sys.stdout.write(f"{total / MIB:.1f} MiB. Copy app, benchmarks, training and models as well.\n")


def write_scan_with_lesion(scan: Path, path: Path) -> None:
    """Write a skull-stripped scan with a bright ball in it, as int16."""
    image = nib.load(scan)
    assert isinstance(image, nib.Nifti1Image)
    assert image.affine is not None
    array = np.asarray(image.dataobj, dtype=np.float32)
    brain = array > 0
    voxels = np.indices(array.shape).reshape(3, -1)
    points = image.affine[:3, :3] @ voxels + image.affine[:3, 3:]  # (3, X Y Z), RAS+ mm
    centre = points[:, brain.ravel()].mean(axis=1, keepdims=True) + np.array([[OFFSET_MM], [0], [0]])
    ball = (np.linalg.norm(points - centre, axis=0) < RADIUS_MM).reshape(array.shape).astype(np.float32)
    spacing_mm = np.linalg.norm(image.affine[:3, :3], axis=0)
    changed, _ = insert_lesion(array, brain, ball, spacing_mm, CONTRAST)
    stored = changed.round().astype(np.int16)
    write_nifti(path, stored, image.affine, int(image.header["sform_code"]), "counterpart: scan with a synthetic ball")
