"""`python -m benchmarks.int8_variants`: what int8 costs and buys, layer by layer that stays float32.

Writes docs/evaluation/NAME-int8.md: time of an evaluation of each network, the error of the predicted noise on healthy
validation slices, and accuracy on synthetic lesions.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from app.pipeline.models import Denoise
from app.runtime.bundle import Bundle, load_bundle
from benchmarks import int8
from benchmarks.int8 import CALLS, Feed, Healthy, Kept, Settings
from benchmarks.rows import ROWS, SERVICE
from benchmarks.run import SCAN, machine, newest_bundle
from benchmarks.statistics import Summary
from benchmarks.worker import Job, Measured
from training.config import ROOT, Config, data_root

BATCH, REPEATS = 16, 9
SUBJECTS, SLICES = 4, 4
VARIANTS: dict[str, Settings | None] = {
    "float32": None,
    "denoiser, 1 + 1 layers kept": Settings(None, Kept(1, 1), None),
    "denoiser, 1 + 1, percentile": Settings(None, Kept(1, 1), None, method="Percentile"),
    "denoiser, 1 + 4": Settings(None, Kept(1, 4), None),
    "denoiser, 4 + 7": Settings(None, Kept(4, 7), None),
    "denoiser 1 + 4, encoder 1 + 1": Settings(decoder=None),
    "all three: 1 + 4, 1 + 1, 1 + 1": Settings(),
}
HEADS = ("variant", "encode, ms", "denoise, ms", "decode, ms", "error of the noise", "best Dice", "AUPRC", "refused")
EXPLAINED = """`1 + 4`: the first convolution and the last four stay float32, as does all that is no convolution.
Milliseconds of one evaluation of 16 slices: median, least and largest of nine in turns. Error of the noise: mean
squared difference of the noise predicted for healthy validation slices from float32's, as a share of float32's own
error, at the noise level of the KL map and the worst one. Accuracy as in `benchmarks`; a refused case counts as
empty.""".replace("\n", " ")


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
                getattr(bundle.models, call)(*inputs)
                spent[variant].append(1000 * (time.perf_counter() - start))
        for variant, values in spent.items():
            found[variant][network] = Summary.of(values[1:])  # the first allocates
    return found


def noise_error(denoise: Denoise, exact: Denoise, seen: Healthy) -> dict[int, float]:
    """Squared difference from float32's noise as a share of float32's own squared error, by noise level."""
    added: dict[int, list[float]] = {}
    own: dict[int, list[float]] = {}
    for z_t, t, epsilon in zip(seen.z_t, seen.t, seen.epsilon, strict=True):
        expected = exact(z_t, t)
        added.setdefault(int(t[0]), []).append(float(np.mean((denoise(z_t, t) - expected) ** 2)))
        own.setdefault(int(t[0]), []).append(float(np.mean((expected - epsilon) ** 2)))
    return {t: float(np.mean(added[t]) / np.mean(own[t])) for t in added}


def judged(bundle: Bundle, job: Job) -> dict[str, Any]:
    """Accuracy of a variant, in this process."""
    measured = Measured(next(row for row in ROWS if row.name == SERVICE), job)
    measured.whole(bundle.models)
    return int8.judge_both(measured)


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
    exact = load_bundle(folder)
    seen = int8.healthy(exact, options.config, "validation", SUBJECTS, SLICES)
    with TemporaryDirectory() as cache:
        bundles = {
            name: int8.in_int8(exact, int8.int8_graphs(folder, options.config, settings, Path(cache)))
            if settings
            else exact
            for name, settings in tqdm(VARIANTS.items(), desc="quantising")
        }
        times = milliseconds(bundles, seen)
        kl = exact.manifest.kl.timesteps[0]
        lines = [f"| {' | '.join(HEADS)} |", "| --- " * len(HEADS) + "|"]
        for name in tqdm(VARIANTS, desc="accuracy"):
            errors = noise_error(bundles[name].models.denoise, exact.models.denoise, seen)
            lines.append(line(name, times[name], errors, kl, judged(bundles[name], job)))
    written = (
        f"Written by `python -m benchmarks.int8_variants` on {machine()}, "
        f"`{folder.name}`, {options.cases or 'all'} synthetic lesions. {EXPLAINED}"
    )
    page = "\n".join([f"# {config.name} in int8", "", written, "", *lines]) + "\n"
    (ROOT / "docs" / "evaluation" / f"{config.name}-int8.md").write_text(page)


if __name__ == "__main__":
    main()
