"""`python -m training.float16 models/t1-1.6.0 -o FOLDER`: the same bundle for a GPU, its denoiser in float16.

Inputs and outputs stay float32, and so do encoder and decoder: they are a hundredth of the work, and in float16 one
latent in ten would fall on another code. Thresholds stay those of the bundle; a denoiser in int8 is left out.
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
    """Write the bundle's copy below `out` and return its folder; its golden pair is compared as any bundle's.

    Raises
    ------
    DamagedBundle
        The golden pair comes out too far off (`app.runtime.bundle.FLOAT16_TOLERANCE`): nothing is kept.
    """
    manifest = read_manifest(bundle)
    name = manifest.name + SUFFIX
    folder = out / f"{name}-{manifest.version}"
    shutil.copytree(bundle, folder)
    if (in_int8 := manifest.files.denoiser_int8) is not None:
        (folder / in_int8.name).unlink()
    path = folder / manifest.files.denoiser.name
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of weights too small for float16
        onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)
    denoiser = manifest.files.denoiser.model_copy(update={"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    files = manifest.files.model_copy(update={"denoiser": denoiser, "denoiser_int8": None})
    written = Manifest.model_validate(
        manifest.model_copy(update={"name": name, "files": files, "precision": "float16"}).model_dump()
    )
    (folder / MANIFEST).write_text(written.model_dump_json(indent=1) + "\n")
    try:
        load_bundle(folder)
    except DamagedBundle:
        shutil.rmtree(folder)
        raise
    return folder


def main() -> None:
    """Read the options and convert."""
    parser = argparse.ArgumentParser(prog="python -m training.float16", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the new bundle's folder")
    options = parser.parse_args()
    convert(options.bundle, options.out)


if __name__ == "__main__":
    main()
