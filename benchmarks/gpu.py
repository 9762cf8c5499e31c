"""`python -m benchmarks.gpu --out FOLDER`: one whole T1, from its file to its written mask, on a GPU and on the CPU.

Torch and, where it was built for CUDA, onnxruntime; with and without CUDA graphs, in float32 and float16. Each answer
is compared with onnxruntime's on the CPU. Nothing is fetched: `--pack FOLDER` on a machine with a network writes what
the other one lacks. There, in the checkout, with FOLDER beside it:

    python3 -m pip install --no-index --no-deps --target /tmp/site FOLDER/wheels/*.whl
    PYTHONPATH=/tmp/site python3 -m benchmarks.gpu --scan FOLDER/scan.nii.gz --out OUT

`--provider cpu` runs the same code without a GPU. Torch's networks are made from the bundle's graphs, which takes onnx.
"""

import argparse
import importlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.runtime.bundle import Bundle

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("numpy", "scipy", "PIL", "packaging", "tqdm", "nibabel", "pydantic", "onnxruntime", "onnx", "torch", "monai")
# Of a variant's answer. Another order of summation moves single voxels across a threshold; a fault moves lesions.
LEAST_DICE = 0.95
# A share of 1, the range of an anomaly map; 99.9 % of the voxels differ by less. float16 is the coarsest.
MOST_OFF = 0.02


@dataclass(frozen=True)
class Variant:
    """A way to run the networks."""

    runtime: str
    precision: str = "float32"
    graphs: bool = False
    channels_last: bool = False

    @property
    def name(self) -> str:
        """For the table."""
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


def missing() -> list[str]:
    """Modules that this Python does not have."""
    absent = []
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            absent.append(name)
    return absent


def why_not(variant: Variant, provider: str) -> str | None:
    """Why a variant cannot run here, where it cannot."""
    import onnxruntime
    import torch

    if variant.graphs and provider == "cpu":
        return "CUDA graphs need a GPU"
    if variant.runtime == "torch" and provider == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if variant.runtime == "onnxruntime" and provider == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return f"onnxruntime {onnxruntime.__version__} was built without CUDA: onnxruntime-gpu is needed"
    elif variant.runtime == "onnxruntime":
        return "it is the reference"
    return None


def load(variant: Variant, options: argparse.Namespace, reference: "Bundle", scratch: Path) -> "Bundle":
    """The bundle with its networks where the variant wants them; the brain's extractor stays onnxruntime's."""
    from app.runtime.bundle import load_bundle

    if variant.runtime == "onnxruntime":
        folder = options.bundle
        if variant.precision == "float16":
            from training.float16 import convert

            folder = convert(folder, scratch)
        return load_bundle(folder, options.provider, 0, options.batch if variant.graphs else 0)
    from benchmarks.device import on_device
    from training.config import Config
    from training.restore import load_networks

    networks = load_networks(options.bundle, Config.load(options.config))
    models = on_device(
        networks,
        options.provider,
        options.batch,
        graphs=variant.graphs,
        float16=variant.precision == "float16",
        channels_last=variant.channels_last,
    )
    return replace(reference, models=models, batch=options.batch)


def run(bundle: "Bundle", scan: Path, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds from file to mask, the phases of the median run, and the last answer; the first run is not counted."""
    from app.analysis import AnalysisRequest, analyse
    from app.pipeline.models import Models
    from benchmarks.trace import NETWORKS, Tracer, totals

    def loaded(_: object) -> "Bundle":
        return traced

    traces = []
    with TemporaryDirectory() as folder:
        out = Path(folder)
        for repeat in range(repeats + 1):
            start = time.perf_counter()
            tracer = Tracer()
            models = Models(*(tracer.wrap(getattr(bundle.models, name), name) for name in NETWORKS))
            traced = replace(bundle, models=models)
            with tracer.attached():
                analyse(scan, out, loaded, (bundle.manifest,), AnalysisRequest(), lambda *_: None)
            seconds = time.perf_counter() - start
            if repeat:
                traces.append((seconds, totals(tracer.finish())))
            else:
                first = seconds
        answer = read_answer(out)
    traces.sort(key=lambda trace: trace[0])
    seconds_each = [seconds for seconds, _ in traces]
    phases = traces[(len(traces) - 1) // 2][1]
    return {"first": first, "seconds": seconds_each, "median": median(seconds_each), "phases": phases}, answer


def read_answer(out: Path) -> dict[str, Any]:
    """What a run wrote."""
    import numpy as np
    from nibabel.nifti1 import Nifti1Image

    images = {name: Nifti1Image.from_filename(out / f"{name}.nii.gz") for name in ("mask", "anomaly")}
    return {name: np.asarray(image.dataobj) for name, image in images.items()}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """How far an answer is from the reference, and whether that is what rounding makes."""
    import numpy as np

    from app.pipeline.findings import dice

    masks = [answer["mask"] > 0 for answer in (found, expected)]
    maps = [np.nan_to_num(answer["anomaly"]) for answer in (found, expected)]
    off = np.abs(maps[0] - maps[1])
    told: dict[str, Any] = {
        "dice": dice(*masks),
        "voxels": [int(mask.sum()) for mask in masks],
        "off_999": float(np.quantile(off, 0.999)),
        "off_worst": float(off.max()),
    }
    same_extent = bool((np.isnan(found["anomaly"]) == np.isnan(expected["anomaly"])).all())
    agrees = same_extent and told["dice"] >= LEAST_DICE and told["off_999"] <= MOST_OFF
    return told | {"same_extent": same_extent, "agrees": agrees}


def measure(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """The reference and every variant, one after the other."""
    import onnxruntime
    import torch

    from app.runtime.bundle import load_bundle

    # float32 means float32: TF32 has the 10 bits of float16.
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
    tell(f"{'onnxruntime on the CPU':45} {document['reference']['median']:7.3f} s")
    document["variants"] = []
    for variant in VARIANTS:
        told = asdict(variant) | _try(variant, options, reference, expected)
        document["variants"].append(told)
        tell(f"{variant.name:45} {_line(told)}")
    return document


def _try(
    variant: Variant, options: argparse.Namespace, reference: "Bundle", expected: dict[str, Any]
) -> dict[str, Any]:
    import torch

    if reason := why_not(variant, options.provider):
        return {"left_out": reason}
    if options.provider == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        with TemporaryDirectory() as scratch:
            start = time.perf_counter()
            bundle = load(variant, options, reference, Path(scratch))
            loaded = time.perf_counter() - start
            times, answer = run(bundle, options.scan, options.repeats)
    except Exception as error:  # noqa: BLE001 - one variant's fault must not cost the lease the others' numbers
        return {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
    peak = torch.cuda.max_memory_allocated() if options.provider == "cuda" and variant.runtime == "torch" else None
    return {"load": loaded, **times, "torch_peak_bytes": peak, **compare(answer, expected)}


def _line(told: dict[str, Any]) -> str:
    if "median" not in told:
        return f"left out: {told['left_out']}" if "left_out" in told else f"FAILED: {told['failed']}"
    network = sum(phase["network"] for phase in told["phases"].values())
    verdict = "agrees" if told["agrees"] else "DIFFERS"
    return f"{told['median']:7.3f} s, networks {network:.3f}; Dice {told['dice']:.4f}, {verdict}"


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scan", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder of gpu.json")
    parser.add_argument("--pack", type=Path, help="write what must travel into this folder, and end")
    parser.add_argument("--python", default="3.12", help="of the machine that it is packed for")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bundle", type=Path, default=ROOT / "models" / "t1-1.6.0")
    parser.add_argument("--config", type=Path, default=ROOT / "training" / "configs" / "t1.toml")
    return parser.parse_args(arguments)


def faults(options: argparse.Namespace) -> Iterator[str]:
    """What this machine lacks, in words."""
    if absent := missing():
        yield f"Missing here: {', '.join(absent)}. Pack them elsewhere with --pack, and install them as --help says."
    for path in (options.scan, options.bundle / "manifest.json", options.config):
        if not path.is_file():
            yield f"There is no {path.name}: it must travel with the checkout."
    if options.out is None:
        yield "--out is needed: a folder for gpu.json."


def main(arguments: list[str]) -> int:
    """Pack, or measure and write gpu.json; 1 where something is missing, or no variant both ran and agreed."""
    options = _options(arguments)
    if options.pack:
        from benchmarks.pack import pack

        pack(options.scan, options.pack, options.python)
        return 0
    if found := list(faults(options)):
        sys.stderr.write("\n".join(found) + "\n")
        return 1
    document = measure(options, lambda line: print(line, flush=True))  # noqa: T201
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
    return int(not any(told.get("agrees") for told in document["variants"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
