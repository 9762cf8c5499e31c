"""Conversion of the brain-extraction networks of deepbet to ONNX graphs (decision 11).

The service then needs no torch.

    pip download --no-deps --dest var deepbet==1.0.2
    python -m training.extractor var/deepbet-1.0.2-py3-none-any.whl

Fisch et al. 2024, deepbet: Fast brain extraction of T1-weighted MRI using Convolutional Neural Networks,
Computers in Biology and Medicine 179, 108845. Code and weights: MIT.
"""

import argparse
import hashlib
import io
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from scipy import ndimage

from app.manifest import ExtractorFiles, ExtractorManifest, File
from app.runtime.extractor import CARD, EXTRACTOR, MANIFEST, load_extractor
from app.volume import FloatArray
from training.config import ROOT
from training.export import strip_debug

# Networks in the wheel: the first locates the brain in the whole field of view, the second segments it.
PARTS = {"coarse": "data/models/bbox_model.pt", "fine": "data/models/model.pt"}
LICENCE = "deepbet-1.0.2.dist-info/LICENSE"
OPSET = 17
# Side of the golden pair's cube: the smallest that the networks can halve at every level.
GOLDEN_SIDE = 64


def example_head() -> FloatArray:
    """Return a synthetic head in the intensities of the networks, (1, 1, 64, 64, 64)."""
    axis = np.linspace(-1, 1, GOLDEN_SIDE)
    radius = np.sqrt(sum(g**2 for g in np.meshgrid(axis, axis / 1.1, axis, indexing="ij")))
    texture = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(radius.shape), 2)
    head = np.where(radius < 0.6, 0.6 + texture, np.where((radius > 0.7) & (radius < 0.8), 0.9, 0.05))
    scaled = 0.226 * (head - head.mean()) / head.std() + 0.449
    # Rounded to 1/128 to keep the file small.
    result: FloatArray = (np.round(scaled * 128) / 128).astype(np.float32)[None, None]
    return result


def write_graph(module: torch.jit.ScriptModule, path: Path) -> None:
    """Export a TorchScript network for any volume size, with one output of log odds in place of two classes."""
    sizes = {2: "i", 3: "j", 4: "k"}
    with warnings.catch_warnings():
        # Only the deprecated exporter accepts TorchScript.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.from_numpy(example_head()),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["x"],
            output_names=["log_odds"],
            dynamic_axes={"x": sizes, "log_odds": sizes},
        )
    fold_softmax(path)
    strip_debug(path)


def fold_softmax(path: Path) -> None:
    """Replace the softmax over (background, brain) by their difference, computed by the last convolution.

    The softmax of brain exceeds 1/2 exactly if the difference is positive. The difference of two linear maps is linear.
    """
    model = onnx.load(path)
    graph = model.graph
    softmax = graph.node[-1]
    last = next(node for node in graph.node if node.output[0] == softmax.input[0])
    assert softmax.op_type == "Softmax", softmax.op_type
    assert last.op_type == "ConvTranspose", last.op_type
    for tensor in graph.initializer:
        if tensor.name in last.input[1:]:
            values = numpy_helper.to_array(tensor)
            axis = 1 if values.ndim > 1 else 0  # (in, out, i, j, k) and (out,)
            assert values.shape[axis] == 2, values.shape
            tensor.CopyFrom(numpy_helper.from_array(np.diff(values, axis=axis), tensor.name))
    last.output[0] = softmax.output[0]
    graph.node.remove(softmax)
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.checker.check_model(model)
    onnx.save(model, path)


def log_odds(module: torch.jit.ScriptModule, x: FloatArray) -> FloatArray:
    """Return the log odds of the torch network."""
    with torch.no_grad():
        p = module(torch.from_numpy(x)).double()
    result: FloatArray = torch.log(p[:, 1:] / p[:, :1]).numpy().astype(np.float32)
    return result


def convert(wheel: Path, models: Path = ROOT / "models") -> Path:
    """Write both graphs, the golden pair of torch, licence and manifest, and load them as serving does."""
    folder = models / EXTRACTOR
    folder.mkdir(parents=True, exist_ok=True)
    x = example_head()
    golden = {"x": x}
    with zipfile.ZipFile(wheel) as archive:
        (folder / "LICENSE").write_bytes(archive.read(LICENCE))
        for name, part in PARTS.items():
            module = torch.jit.load(io.BytesIO(archive.read(part)), map_location="cpu").eval()
            write_graph(module, folder / f"{name}.onnx")
            golden[name] = log_odds(module, x)
    np.savez_compressed(folder / "golden.npz", allow_pickle=False, **golden)

    def file(name: str) -> File:
        return File(name=name, sha256=hashlib.sha256((folder / name).read_bytes()).hexdigest())

    manifest = ExtractorManifest(
        method="deepbet",
        version="1.0.2",
        licence="MIT",
        attribution="L. Fisch et al., deepbet, Computers in Biology and Medicine 179 (2024) 108845",
        source_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        files=ExtractorFiles(coarse=file("coarse.onnx"), fine=file("fine.onnx"), golden=file("golden.npz")),
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
    load_extractor(folder)
    assert (folder / CARD).is_file(), f"{CARD} is written by hand"
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    sys.stdout.write(f"{convert(parser.parse_args().wheel)}\n")
