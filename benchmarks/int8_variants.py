"""`python -m benchmarks.int8_variants`: what int8 costs and buys, layer by layer that stays float32.

Writes docs/evaluation/NAME-int8.md: time of an evaluation of each network, the error of the predicted noise on healthy
validation slices, and accuracy on synthetic lesions.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from app.runtime.bundle import Bundle, load_bundle
from app.runtime.session import as_callable, open_session
from benchmarks.accuracy import judge
from benchmarks.rows import ROWS, SERVICE
from benchmarks.run import SCAN, machine, newest_bundle
from benchmarks.statistics import Summary
from benchmarks.worker import Job, Measured
from training.config import ROOT, Config, data_root
from training.quantise import KEPT, Feed, Healthy, Kept, healthy, noise_error, quantise

BATCH, REPEATS = 16, 9
VALIDATION_SLICES = 16
CALLS = {"encoder": "encode", "denoiser": "denoise", "decoder": "decode"}


@dataclass(frozen=True)
class Settings:
    """How a bundle is quantised: its convolutions, for everything between them stays float32.

    Attributes
    ----------
    encoder, denoiser, decoder : Kept or None
        None leaves the whole network in float32.
    method : str
        Of onnxruntime's calibration: MinMax, Percentile or Entropy.
    """

    encoder: Kept | None = None
    denoiser: Kept | None = KEPT
    decoder: Kept | None = None
    method: str = "MinMax"

    @property
    def networks(self) -> dict[str, Kept]:
        """Those in int8."""
        asked = {"encoder": self.encoder, "denoiser": self.denoiser, "decoder": self.decoder}
        return {name: kept for name, kept in asked.items() if kept is not None}


VARIANTS: dict[str, Settings | None] = {
    "float32": None,
    "denoiser, 1 + 1 layers kept": Settings(denoiser=Kept(1, 1)),
    "denoiser, 1 + 1, percentile": Settings(denoiser=Kept(1, 1), method="Percentile"),
    "denoiser, 1 + 4": Settings(denoiser=Kept(1, 4)),
    f"denoiser, {KEPT.first} + {KEPT.last}: as served": Settings(),
    f"denoiser {KEPT.first} + {KEPT.last}, encoder 1 + 1": Settings(encoder=Kept(1, 1)),
    f"all three: {KEPT.first} + {KEPT.last}, 1 + 1, 1 + 1": Settings(encoder=Kept(1, 1), decoder=Kept(1, 1)),
}
HEADS = ("variant", "encode, ms", "denoise, ms", "decode, ms", "error of the noise", "best Dice", "AUPRC", "refused")
EXPLAINED = """`1 + 4`: the first convolution and the last four stay float32, as does all that is no convolution.
Milliseconds of one evaluation of 16 slices: median, least and largest of nine in turns. Error of the noise: mean
squared difference of the noise predicted for healthy validation slices from float32's, as a share of float32's own
error, at the noise level of the KL map and the worst one. Accuracy as in `benchmarks`; a refused case counts as
empty.""".replace("\n", " ")


def in_int8(exact: Bundle, settings: Settings, seen: Healthy, folder: Path) -> Bundle:
    """The bundle, with some of its networks quantised into a folder."""
    folder.mkdir()
    calls = {}
    for name, kept in settings.networks.items():
        path = folder / f"{name}.onnx"
        quantise(exact.folder / getattr(exact.manifest.files, name).name, path, seen.feeds(name), kept, settings.method)
        calls[CALLS[name]] = as_callable(open_session(path, exact.provider))
    return replace(exact, networks=replace(exact.networks, **calls))


def batch_of(feeds: list[Feed]) -> list[Any]:
    """The first slices, as one batch."""
    return [np.concatenate([feed[name] for feed in feeds])[:BATCH] for name in feeds[0]]


def milliseconds(bundles: dict[str, Bundle], seen: Healthy) -> dict[str, dict[str, Summary]]:
    """Of an evaluation, by variant and network; variants take turns."""
    found: dict[str, dict[str, Summary]] = {variant: {} for variant in bundles}
    for network, call in tqdm(CALLS.items(), desc="time"):
        inputs = batch_of(seen.feeds(network))
        spent: dict[str, list[float]] = {variant: [] for variant in bundles}
        for _ in range(REPEATS + 1):
            for variant, bundle in bundles.items():
                start = time.perf_counter()
                getattr(bundle.networks, call)(*inputs)
                spent[variant].append(1000 * (time.perf_counter() - start))
        for variant, values in spent.items():
            found[variant][network] = Summary.of(values[1:])  # the first allocates
    return found


def judged(bundle: Bundle, job: Job) -> dict[str, Any]:
    """Accuracy of a variant, in this process."""
    measured = Measured(next(row for row in ROWS if row.name == SERVICE), job)
    measured.whole(bundle.networks)
    return judge(measured)


def line(name: str, times: dict[str, Summary], errors: dict[int, float], kl: int, found: dict[str, Any]) -> str:
    """One variant."""
    cells = [name, *(f"{s.median:.0f} ({s.low:.0f} to {s.high:.0f})" for s in times.values())]
    cells.append(f"{errors[kl]:.1%}; {max(errors.values()):.1%}")
    cells += [f"{np.mean(found[key]):.3f}" for key in ("dice", "auprc")]
    return f"| {' | '.join([*cells, str(found['refused'])])} |"


def main() -> None:
    """Measure every variant and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8_variants", description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "training" / "configs" / "t1.toml")
    parser.add_argument("--bundle", type=Path, help="folder of the bundle; else the newest of the configuration's name")
    parser.add_argument("--cases", type=int, help="synthetic lesions; all of them by default")
    options = parser.parse_args()
    config = Config.load(options.config)
    folder = options.bundle or newest_bundle(config.name)
    scan = data_root() / config.data.folder / config.data.pattern.format(subject=SCAN)
    job = Job(folder, options.config, scan, cases=options.cases)
    exact = load_bundle(folder, quantised=False)
    trained = healthy(config, exact.networks.encode, "train")
    seen = healthy(config, exact.networks.encode, "validation", VALIDATION_SLICES)
    with TemporaryDirectory() as made:
        bundles = {
            name: in_int8(exact, settings, trained, Path(made, str(number))) if settings else exact
            for number, (name, settings) in enumerate(tqdm(VARIANTS.items(), desc="quantising"))
        }
        times = milliseconds(bundles, seen)
        kl = exact.manifest.kl.timesteps[0]
        lines = [f"| {' | '.join(HEADS)} |", "| --- " * len(HEADS) + "|"]
        for name in tqdm(VARIANTS, desc="accuracy"):
            errors = noise_error(bundles[name].networks.denoise, exact.networks.denoise, seen)
            lines.append(line(name, times[name], errors, kl, judged(bundles[name], job)))
    written = (
        f"Written by `python -m benchmarks.int8_variants` on {machine()}, "
        f"`{folder.name}`, {options.cases or 'all'} synthetic lesions. {EXPLAINED}"
    )
    page = "\n".join([f"# {config.name} in int8", "", written, "", *lines]) + "\n"
    (ROOT / "docs" / "evaluation" / f"{config.name}-int8.md").write_text(page)


if __name__ == "__main__":
    main()
