"""Ways to use the machine's cores, done or not, each with what it was expected to gain, and why."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless

from app.ingest.dicom.pixels import Frame, read_frames
from app.pipeline.placement import MOST_THREADS
from app.runtime.bundle import load_bundle
from app.volume import FloatArray, Volume
from benchmarks.bench import Bench
from benchmarks.gains import Switch
from benchmarks.profile import feeds
from tests.support.dicom import Series, write_series

FRAMES = 32
# The top of a scanner's twelve bits.
TOP = 4095
# Of a JPEG 2000 slice: entropy coding, block by block, which OpenJPEG shares out. The rest is one thread's.
BLOCKS = 0.87
# Of the time of two threads in one session: the one waits for the other at the end of each operator.
WAITING = 0.1
# A hundredth of a pixel a pixel: no axis of the scan runs along one of the slices.
LEAN = np.eye(4) + 0.01 * np.eye(4, k=1)

# Of a process of the pool: the denoiser, and one batch for it.
_batches: list[Callable[[], object]] = []


def hosts(bench: Bench, folder: Path) -> Iterator[Switch]:
    """All of them, one after the other."""
    image = np.nan_to_num(bench.slices.placement.to_volume(bench.slices.x[:, 0]))
    yield from decoding(Volume(np.round(image * TOP)[:, :, -FRAMES:], np.eye(4)), folder)
    yield from denoising(bench)
    placement = replace(bench.slices.placement, affine=bench.slices.placement.affine @ LEAN)
    several = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    yield Switch(
        "a leaning scan brought back by slabs side by side, not one after the other",
        f"the threads: {several}",
        float(several),
        lambda: placement.to_volume(bench.slices.x[:, 0], 1),
        lambda: placement.to_volume(bench.slices.x[:, 0]),
    )


def decoding(volume: Volume, folder: Path) -> Iterator[Switch]:
    """Compressed slices on every core."""
    cores = len(os.sched_getaffinity(0))
    columns, rows, _ = volume.shape
    paths = write_series(folder / "jpeg-ls", volume, Series(plane=None, syntax=JPEGLSLossless))
    frames = [Frame(path, 0) for path in paths]

    def read(some: list[Frame]) -> FloatArray:
        return read_frames(some, rows, columns)[0]

    def in_threads() -> list[FloatArray]:
        with ThreadPoolExecutor(cores) as pool:
            return list(pool.map(read, (frames[i::cores] for i in range(cores))))

    yield Switch(
        f"slices in JPEG-LS decoded in {cores} threads (not done: CharLS, as GDCM and pydicom's RLE, keeps the lock)",
        "the number of cores, if the decoder let go of the interpreter's lock",
        float(cores),
        lambda: read(frames),
        in_threads,
    )
    paths = write_series(folder / "jpeg-2000", volume, Series(plane=None, syntax=JPEG2000Lossless))
    decoder, slices = get_decoder(JPEG2000Lossless), [pydicom.dcmread(path) for path in paths]

    def decode(plugin: str) -> Callable[[], object]:
        return lambda: [decoder.as_array(s, raw=True, decoding_plugin=plugin) for s in slices]

    yield Switch(
        f"a slice in JPEG 2000 shared out among {cores} cores by GDCM, not decoded by one thread of pylibjpeg",
        f"Amdahl: {BLOCKS:.0%} of a slice is entropy coding in blocks of their own",
        1 / (1 - BLOCKS + BLOCKS / cores),
        decode("pylibjpeg"),
        decode("gdcm"),
    )


def denoising(bench: Bench) -> Iterator[Switch]:
    """Batches of the denoiser: its threads on cores of their own, and in processes of their own."""
    cores, path = sorted(os.sched_getaffinity(0)), bench.bundle.folder / bench.bundle.manifest.files.denoiser.name
    feed = feeds(bench.bundle.manifest)["denoiser"]
    denoise = bench.bundle.models.denoise

    def batch() -> object:
        return denoise(*feed.values())

    pinned = pinned_session(path, cores)

    def batch_pinned() -> object:
        with on_core(cores[0]):
            return pinned.run(None, feed)[0]

    yield Switch(
        f"{len(cores)} threads pinned to as many cores (not done: other processes share them)",
        "nothing: there are as many threads as cores, and the scheduler leaves them where they are",
        1.0,
        batch,
        batch_pinned,
    )
    with ProcessPoolExecutor(len(cores), get_context("spawn"), open_denoiser, (bench.bundle.folder,)) as pool:
        yield Switch(
            f"{len(cores)} batches in {len(cores)} processes of one thread, not in turns in all threads of one (not "
            "done: one scan is to be fast, and each process holds a model)",
            f"a constant: threads of one session wait for each other for {WAITING:.0%} of the time",
            1 / (1 - WAITING),
            lambda: [batch() for _ in cores],
            lambda: list(pool.map(run_batch, cores)),
        )


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """The calling thread runs on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pinned_session(path: Path, cores: list[int]) -> Any:
    """A session as the service's, with each thread of its own on another core than the first, the caller's."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(cores)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    if len(cores) > 1:  # onnxruntime counts cores from 1
        others = ";".join(str(core + 1) for core in cores[1:])
        options.add_session_config_entry("session.intra_op_thread_affinities", others)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def open_denoiser(folder: Path) -> None:
    """In a process of the pool: the denoiser with one thread."""
    bundle = load_bundle(folder, "cpu", 1)
    inputs = tuple(feeds(bundle.manifest)["denoiser"].values())
    _batches[:] = [lambda: bundle.models.denoise(*inputs)]


def run_batch(_: int) -> None:
    """One batch there; its result stays."""
    _batches[0]()
