"""What must travel to a machine without a network: the wheels that its Python lacks, and a scan with a lesion."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np

from app.export.nifti import write_nifti
from app.pipeline.synthetic_lesion import insert_lesion

# Beside torch, onnx, onnxruntime, numpy, scipy, pillow, packaging and tqdm, which the machine is expected to have.
NEEDED = ("nibabel", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection", "monai")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MIB = 1 << 20
# Of the lesion, beside the middle of the brain; a mask that is empty would agree with anything.
RADIUS_MM, ASIDE_MM, CONTRAST = 8.0, 30.0, 0.5


def pack(scan: Path, out: Path, python: str) -> None:
    """Write `out`/wheels, in this environment's versions for another Python on x86-64, and `out`/scan.nii.gz.

    Raises
    ------
    subprocess.CalledProcessError
        pip found none.
    """
    wheels = out / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", python, "--dest", str(wheels)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, *(f"{name}=={version(name)}" for name in NEEDED)], check=True)  # noqa: S603
    write_lesioned(scan, out / "scan.nii.gz")
    for path in sorted(out.rglob("*.*")):
        sys.stdout.write(f"{path.stat().st_size / MIB:6.1f} MiB  {path.relative_to(out)}\n")
    total = sum(path.stat().st_size for path in out.rglob("*.*"))
    sys.stdout.write(f"{total / MIB:6.1f} MiB  in all; beside it travel app, benchmarks, training and models\n")


def write_lesioned(scan: Path, path: Path) -> None:
    """Write a skull-stripped scan with a bright ball in it, in the type of its voxels."""
    image = nib.load(scan)
    assert isinstance(image, nib.Nifti1Image)
    assert image.affine is not None
    array = np.asarray(image.dataobj, dtype=np.float32)
    brain = array > 0
    voxels = np.indices(array.shape).reshape(3, -1)
    places = image.affine[:3, :3] @ voxels + image.affine[:3, 3:]  # (3, X Y Z), RAS+ mm
    middle = places[:, brain.ravel()].mean(axis=1, keepdims=True) + np.array([[ASIDE_MM], [0], [0]])
    ball = (np.linalg.norm(places - middle, axis=0) < RADIUS_MM).reshape(array.shape).astype(np.float32)
    spacing_mm = np.linalg.norm(image.affine[:3, :3], axis=0)
    changed, _ = insert_lesion(array, brain, ball, spacing_mm, CONTRAST)
    stored = changed.round().astype(np.int16)
    write_nifti(path, stored, image.affine, int(image.header["sform_code"]), "counterpart: scan with a synthetic ball")
