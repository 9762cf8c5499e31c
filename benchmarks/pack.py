"""What must travel to a machine without a network: the wheels that its Python lacks, and the scan."""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

# Beside torch, onnx, onnxruntime, numpy, scipy, pillow, packaging and tqdm, which the machine is expected to have.
NEEDED = ("nibabel", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection", "monai")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MIB = 1 << 20


def pack(scan: Path, out: Path, python: str) -> None:
    """Write `out`/wheels and `out`/scan.nii.gz, in this environment's versions, for another Python on x86-64.

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
    shutil.copyfile(scan, out / "scan.nii.gz")
    for path in sorted(out.rglob("*.*")):
        sys.stdout.write(f"{path.stat().st_size / MIB:6.1f} MiB  {path.relative_to(out)}\n")
    total = sum(path.stat().st_size for path in out.rglob("*.*"))
    sys.stdout.write(f"{total / MIB:6.1f} MiB  in all; beside it travel app, benchmarks, training and models\n")
