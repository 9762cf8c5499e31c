"""`python -m benchmarks.gpu --scan SCAN --out FOLDER`: time one T1 scan from file to mask, on a GPU and on the CPU.

The networks run in torch and, if it was built for CUDA, in onnxruntime, with and without CUDA graphs, in float32 and
float16. Each result is compared with that of onnxruntime on the CPU and written to FOLDER/gpu.json.

A machine without a network needs the output of `--pack FOLDER` in addition to the checkout:

    python3 -m pip install --no-index --no-deps --target /tmp/site FOLDER/wheels/*.whl
    PYTHONPATH=/tmp/site python3 -m benchmarks.gpu --scan FOLDER/scan.nii.gz --out OUT

`--provider cpu` runs the same code without a GPU.
"""

import argparse
import importlib
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.runtime.bundle import Bundle

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("numpy", "scipy", "PIL", "packaging", "tqdm", "nibabel", "pydantic", "onnxruntime", "onnx", "torch", "monai")
# Another order of summation moves single voxels across a threshold. A fault changes whole lesions.
MIN_DICE = 0.95
# Largest difference of 99.9 % of the voxels of two anomaly maps, whose range is 1. float16 is the coarsest.
MAX_DIFFERENCE = 0.02


@dataclass(frozen=True)
class Variant:
    """One way to run the networks."""

    runtime: str
    precision: str = "float32"
    graphs: bool = False
    channels_last: bool = False

    @property
    def name(self) -> str:
        """Name on the terminal."""
        extras = ("graphs" * self.graphs, "channels last" * self.channels_last)
        return " ".join(word for word in (self.runtime, self.precision, *extras) if word)


VARIANTS = (
    Variant("torch"),
    Variant("torch", graphs=True),
    Variant("torch", "float16"),
    Variant("torch", "float16", graphs=True),
    Variant("torch", "float16", graphs=True, channels_last=True),
    Variant("onnxruntime"),
    Variant("onnxruntime", graphs=True),
    Variant("onnxruntime", "float16", graphs=True),
)


def reason_to_skip(variant: Variant, provider: str) -> str | None:
    """Return why a variant cannot run here, or None if it can."""
    import onnxruntime
    import torch

    if variant.graphs and provider == "cpu":
        return "CUDA graphs need a GPU"
    if variant.runtime == "torch":
        return "torch finds no CUDA device" if provider == "cuda" and not torch.cuda.is_available() else None
    if provider == "cpu":
        return "the CPU result is the reference"
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return f"onnxruntime {onnxruntime.__version__} was built without CUDA: install onnxruntime-gpu"
    return None


def load(variant: Variant, options: argparse.Namespace, reference: "Bundle", scratch: Path) -> "Bundle":
    """Load the bundle with the networks of a variant. The brain extractor stays in onnxruntime."""
    from app.runtime.bundle import load_bundle

    if variant.runtime == "onnxruntime":
        folder = options.bundle
        if variant.precision == "float16":
            from training.float16 import convert

            folder = convert(folder, scratch)
        return load_bundle(folder, options.provider, 0, options.batch if variant.graphs else 0)
    from benchmarks.device import move_to_device
    from training.config import Config
    from training.networks import load_networks

    networks = move_to_device(
        load_networks(options.bundle, Config.load(options.config)),
        options.provider,
        options.batch,
        graphs=variant.graphs,
        float16=variant.precision == "float16",
        channels_last=variant.channels_last,
    )
    return replace(reference, networks=networks, batch=options.batch)


def run(bundle: "Bundle", scan: Path, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the times from file to mask and the last result. The first run is not one of the repeats."""
    from benchmarks.trace import median_trace, sum_phases, trace_scan

    with TemporaryDirectory() as folder:
        first, *traces = [trace_scan(bundle, scan, Path(folder)) for _ in range(repeats + 1)]
        result = read_result(Path(folder))
    seconds = sorted(spans[-1].end for spans in traces)
    times = {"first": first[-1].end, "seconds": seconds, "median": median(seconds)}
    return times | {"phases": sum_phases(median_trace(traces))}, result


def read_result(out: Path) -> dict[str, Any]:
    """Read the mask and the anomaly map of a run."""
    import numpy as np
    from nibabel.nifti1 import Nifti1Image

    images = {name: Nifti1Image.from_filename(out / f"{name}.nii.gz") for name in ("mask", "anomaly")}
    return {name: np.asarray(image.dataobj) for name, image in images.items()}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Compare a result with the reference. It agrees if the difference can come from rounding."""
    import numpy as np

    from app.pipeline.findings import dice

    masks = [result["mask"] > 0 for result in (found, expected)]
    maps = [np.nan_to_num(result["anomaly"]) for result in (found, expected)]
    difference = np.abs(maps[0] - maps[1])
    overlap, quantile = dice(*masks), float(np.quantile(difference, 0.999))
    same_extent = bool((np.isnan(found["anomaly"]) == np.isnan(expected["anomaly"])).all())
    return {
        "dice": overlap,
        "voxels": [int(mask.sum()) for mask in masks],
        "difference_999": quantile,
        "difference_max": float(difference.max()),
        "same_extent": same_extent,
        "agrees": same_extent and overlap >= MIN_DICE and quantile <= MAX_DIFFERENCE,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the reference and all variants one after the other, and print a line for each."""
    import onnxruntime
    import torch

    from app.runtime.bundle import load_bundle

    # TF32 has the 10 bits of float16, so it must not replace float32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    on_gpu = options.provider == "cuda" and torch.cuda.is_available()
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
        "bundle": options.bundle.name,
        "scan": options.scan.name,
        "batch": options.batch,
        "threads": torch.get_num_threads(),
    }
    reference = load_bundle(options.bundle, "cpu", quantised=False)
    document["reference"], expected = run(reference, options.scan, 1)
    _print_line("onnxruntime on the CPU", f"{document['reference']['median']:7.3f} s")
    document["variants"] = []
    for variant in VARIANTS:
        measured = _measure_variant(variant, options, reference, expected)
        document["variants"].append(asdict(variant) | measured)
        _print_line(variant.name, _describe(measured))
    return document


def _measure_variant(
    variant: Variant, options: argparse.Namespace, reference: "Bundle", expected: dict[str, Any]
) -> dict[str, Any]:
    import torch

    if reason := reason_to_skip(variant, options.provider):
        return {"skipped": reason}
    if options.provider == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        with TemporaryDirectory() as scratch:
            start = time.perf_counter()
            bundle = load(variant, options, reference, Path(scratch))
            loaded = time.perf_counter() - start
            times, result = run(bundle, options.scan, options.repeats)
    except Exception as error:  # noqa: BLE001 - the other variants must still be measured
        return {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
    peak = torch.cuda.max_memory_allocated() if options.provider == "cuda" and variant.runtime == "torch" else None
    return {"load": loaded, **times, "torch_peak_bytes": peak, **compare(result, expected)}


def _print_line(name: str, text: str) -> None:
    print(f"{name:45} {text}", flush=True)  # noqa: T201


def _describe(measured: dict[str, Any]) -> str:
    if "median" not in measured:
        return f"skipped: {measured['skipped']}" if "skipped" in measured else f"FAILED: {measured['failed']}"
    network = sum(phase["network"] for phase in measured["phases"].values())
    verdict = "agrees" if measured["agrees"] else "DIFFERS"
    return f"{measured['median']:7.3f} s, networks {network:.3f}; Dice {measured['dice']:.4f}, {verdict}"


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scan", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder of gpu.json")
    parser.add_argument("--pack", type=Path, help="write wheels and scan for another machine into this folder and exit")
    parser.add_argument("--python", default="3.12", help="Python version of that machine")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bundle", type=Path, default=ROOT / "models" / "t1-1.6.0")
    parser.add_argument("--config", type=Path, default=ROOT / "training" / "configs" / "t1.toml")
    return parser.parse_args(arguments)


def find_problems(options: argparse.Namespace) -> Iterator[str]:
    """Yield what this machine or the command lacks."""
    missing = []
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        yield f"Missing modules: {', '.join(missing)}. Use --pack on another machine and install them as in --help."
    for path in (options.scan, options.bundle / "manifest.json", options.config):
        if not path.is_file():
            yield f"{path.name} does not exist. Copy it together with the checkout."
    if options.out is None:
        yield "--out is missing. Expected a folder for gpu.json."


def main(arguments: list[str]) -> int:
    """Pack, or measure and write gpu.json. Return 1 if something is missing or no variant ran and agreed."""
    options = _parse(arguments)
    if options.pack:
        from benchmarks.pack import pack

        pack(options.scan, options.pack, options.python)
        return 0
    if problems := list(find_problems(options)):
        sys.stderr.write("\n".join(problems) + "\n")
        return 1
    document = measure(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
    return int(not any(variant.get("agrees") for variant in document["variants"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
