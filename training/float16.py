"""Conversion of a bundle for GPUs: its denoiser computes in float16.

Inputs and outputs stay in float32. The encoder and the decoder also stay in float32, because rounding in float16 would
assign some latents to another code. The thresholds are those of the bundle. A denoiser in int8 is removed.
"""

import argparse
import hashlib
import shutil
import warnings
from pathlib import Path

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16

from app.errors import DamagedBundle
from app.manifest import Manifest
from app.runtime.bundle import MANIFEST, load_bundle, read_manifest

SUFFIX = "-f16"


def convert(bundle: Path, out: Path) -> Path:
    """Write the copy into `out`, check its golden pair, and return its folder.

    Raises
    ------
    DamagedBundle
        The golden pair differs by more than the tolerance of float16. The copy is removed.
    """
    manifest = read_manifest(bundle)
    name = manifest.name + SUFFIX
    folder = out / f"{name}-{manifest.version}"
    shutil.copytree(bundle, folder)
    if (int8 := manifest.files.denoiser_int8) is not None:
        (folder / int8.name).unlink()
    path = folder / manifest.files.denoiser.name
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # weights below the range of float16
        onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)
    denoiser = manifest.files.denoiser.model_copy(update={"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    files = manifest.files.model_copy(update={"denoiser": denoiser, "denoiser_int8": None})
    written = Manifest.model_validate(
        manifest.model_copy(update={"name": name, "files": files, "precision": "float16"}).model_dump()
    )
    (folder / MANIFEST).write_text(written.to_json())
    try:
        load_bundle(folder)
    except DamagedBundle:
        shutil.rmtree(folder)
        raise
    return folder


def main() -> None:
    """Convert the bundle named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="folder, e.g. models/t1-1.6.0")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the new bundle's folder")
    options = parser.parse_args()
    convert(options.bundle, options.out)


if __name__ == "__main__":
    main()
