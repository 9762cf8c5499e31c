"""The ways to be fast that this run switches off, each with what it was expected to gain, and why."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from app.export.nifti import write_nifti
from app.pipeline.detect import network_evaluations
from app.runtime.bundle import CPU_BATCH, load_bundle
from benchmarks.bench import THINNED, Bench
from benchmarks.gains import Switch
from benchmarks.paper import DDIM_50
from benchmarks.profile import feeds, profile_network
from benchmarks.startup import help_seconds

# Of a call beside its arithmetic: some 300 operators, some 5 microseconds each.
CALL_SECONDS = 1.5e-3
# A convolution whose channels do not lie together copies each pixel for its 9 neighbours, before it multiplies.
LAYOUT = 1.5
# Python with typer and rich starts in a quarter of a second; numpy, nibabel, fastapi and DBOS take two more.
SLIM = 8.0
# Of float32, in int16.
BYTES = 2.0
MAPS = 3
EVERYTHING = "import app.main, app.analysis, app.jobs"


def skips(bench: Bench) -> Iterator[Switch]:
    """Work that is not done."""
    everything, known = np.arange(len(bench.slices.x)), bench.known
    seen, manifest = bench.seen, bench.bundle.manifest
    yield Switch(
        "slices without a brain are skipped",
        f"slices of the scan / those with a brain: {len(everything)} / {len(known)}",
        len(everything) / len(known),
        lambda: bench.mask(bench.look(everything)),
        lambda: bench.mask(bench.look(known)),
    )
    mask = bench.mask(seen)
    found = np.flatnonzero(mask.any(axis=(1, 2)))
    if len(found):
        yield Switch(
            "only slices with something to imagine are reversed",
            f"analysed slices / those with a latent above the threshold: {len(known)} / {len(found)}",
            len(known) / len(found),
            lambda: bench.reverse(seen, seen.latents, np.arange(len(known))),
            lambda: bench.reverse(seen, mask, found),
        )
    theirs = DDIM_50.evaluations * len(known)
    ours = network_evaluations(manifest, len(known), [len(found)] * len(manifest.views))
    yield Switch(
        f"{len(manifest.kl.timesteps)} + {len(manifest.reverse.timesteps)} noise levels in {len(manifest.views)} "
        "views, not 200 + 50 in one",
        f"evaluations of the denoiser over the scan: {theirs} / {ours}",
        theirs / ours,
        bench.papers,
        bench.ours,
        times=THINNED * len(known) / min(CPU_BATCH, len(known)),
    )


def evaluations(bench: Bench, gigaflop: float, ceiling: dict[str, float]) -> Iterator[Switch]:
    """How the denoiser is evaluated, on one batch: in float32, and last in int8, where the bundle has that."""
    folder, manifest, cores = bench.bundle.folder, bench.bundle.manifest, len(os.sched_getaffinity(0))
    feed = feeds(manifest)["denoiser"]
    inputs, denoise = tuple(feed.values()), load_bundle(folder, quantised=False).models.denoise
    path = folder / manifest.files.denoiser.name
    work = gigaflop / ceiling["float32"]

    def batch(network: Any) -> Callable[[], object]:
        return lambda: network(*inputs)

    yield Switch(
        f"{CPU_BATCH} slices in an evaluation, not one",
        f"(call + work) / (call / {CPU_BATCH} + work) of a slice: a call takes {CALL_SECONDS * 1e3:.1f} ms, the work, "
        f"at the ceiling, {work * 1e3:.1f} ms",
        (CALL_SECONDS + work) / (CALL_SECONDS / CPU_BATCH + work),
        lambda: [denoise(*(a[i : i + 1] for a in inputs)) for i in range(CPU_BATCH)],
        batch(denoise),
    )
    alone = load_bundle(folder, "cpu", 1, quantised=False).models.denoise
    yield Switch(f"{cores} threads, not one", "the number of cores", float(cores), batch(alone), batch(denoise))
    plain = without_layout(path)
    yield Switch(
        "channels in blocks (NCHWc)",
        "a constant: neighbours are not copied out of rows before each product",
        LAYOUT,
        lambda: plain.run(None, feed),
        batch(denoise),
    )
    if manifest.files.denoiser_int8 is not None:
        profile = profile_network(path, feed)
        share = sum(o["seconds"] for o in profile if o["operator"] == "Conv") / sum(o["seconds"] for o in profile)
        faster = ceiling["int8"] / ceiling["float32"]
        yield Switch(
            "the denoiser's convolutions in int8",
            f"Amdahl: {share:.0%} of its time are convolutions, and the int8 ceiling is {faster:.1f} times float32's",
            1 / (1 - share + share / faster),
            batch(denoise),
            batch(bench.bundle.models.denoise),
        )


def without_layout(path: Path) -> Any:
    """A session as the service's, whose optimiser leaves the layout of the channels as it is."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def files(bench: Bench, folder: Path) -> Iterator[Switch]:
    """How maps are written: three of them, of the size of the scan."""
    image = bench.slices.placement.to_volume(bench.slices.x[:, 0])
    cores = len(os.sched_getaffinity(0))
    whole = np.round(np.nan_to_num(image) * np.iinfo(np.int16).max).astype(np.int16)

    def write(array: Any, name: str) -> None:
        write_nifti(folder / f"{name}.nii.gz", array, np.eye(4), 1, "benchmark")

    def in_turns() -> None:
        for name in "abc":
            write(image, name)

    def together() -> None:
        with ThreadPoolExecutor(MAPS) as pool:
            list(pool.map(lambda name: write(image, name), "abc"))

    yield Switch(
        "three maps are compressed side by side",
        f"the lesser of maps and cores: {MAPS}, {cores}",
        float(min(MAPS, cores)),
        in_turns,
        together,
    )
    yield Switch(
        "a map in int16, not float32 (not done: int16 has no NaN for what was not analysed)",
        "half of the bytes",
        BYTES,
        lambda: write(image, "float32"),
        lambda: write(whole, "int16"),
    )


def imports() -> Iterator[Switch]:
    """What the command line does not load."""
    command = [sys.executable, "-c", EVERYTHING]
    yield Switch(
        "slim imports: `counterpart --help`, against loading the whole service",
        "a constant: a quarter of a second of typer and rich, two more of everything else",
        SLIM,
        lambda: subprocess.run(command, check=True, capture_output=True),  # noqa: S603
        help_seconds,
    )
