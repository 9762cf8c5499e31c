"""Checks of `counterpart doctor`: each one reports its result and a fix."""

import shutil
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from app.check_output import Check, Status
from app.connection_checks import check_connections
from app.errors import CounterpartError
from app.runtime.bundle import find_bundles, load_bundle, read_manifest, shipped_models
from app.runtime.session import open_session
from app.settings import PREFIX, Settings

MIN_PYTHON = (3, 11)
# A scan of 512 x 512 x 400 voxels and its three images take about one gigabyte before compression.
ONE_SCAN_GB = 1.0
COMFORTABLE_GB = 10.0
GIGABYTE = 10**9

# Both packages write the folder `onnxruntime`, so the last one installed overwrites the other.
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")

# Transfer syntaxes in clinical use (DICOM PS3.5 annex A.4) by compression method.
SYNTAXES = {
    "JPEG": ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"),
    "JPEG lossless": ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"),
    "JPEG-LS": ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"),
    "JPEG 2000": ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"),
    "HTJ2K": ("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203"),
    "RLE": ("1.2.840.10008.1.2.5",),
}
DECODER_FIX = "pip install python-gdcm pyjpegls pylibjpeg pylibjpeg-openjpeg pillow, then run doctor again."


def run_checks(settings: Settings) -> list[Check]:
    """Run every check, including a real inference with each model. No check depends on another."""
    installed = (check_python(), check_runtime(settings), *check_provider(settings), *check_decoders())
    own = (*check_bundles(settings), check_store(settings), *check_shared(settings))
    return [*installed, *own, *check_connections(settings)]


def check_python() -> Check:
    """Check the version of the interpreter."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < MIN_PYTHON:
        return Check("python", "fail", found, "Install Python 3.11 or newer, then install counterpart again with it.")
    return Check("python", "ok", found)


def check_runtime(settings: Settings) -> Check:
    """Check that exactly one onnxruntime package is installed."""
    installed = {name: version for name in RUNTIMES if (version := _version(name))}
    found = ", ".join(f"{name} {version}" for name, version in installed.items()) or "not installed"
    extra = "gpu" if settings.provider == "cuda" else "cpu"
    if len(installed) > 1:
        fix = f"pip uninstall {' '.join(RUNTIMES)}, then pip install 'counterpart[{extra}]'. They share a folder."
        return Check("runtime", "fail", found, fix)
    if not installed:
        return Check("runtime", "fail", found, f"pip install 'counterpart[{extra}]'.")
    return Check("runtime", "ok", found)


def check_provider(settings: Settings) -> Iterator[Check]:
    """Check the provider of a real session, because onnxruntime also lists providers that it cannot use."""
    for path in find_bundles(settings.models or shipped_models())[:1]:
        try:
            session = open_session(path / read_manifest(path).files.encoder.name, settings.provider, settings.threads)
        except CounterpartError as error:
            yield Check("provider", "fail", f"{error.code}: {error.found}", error.advice)
        else:
            yield Check("provider", "ok", f"{settings.provider}: {', '.join(session.get_providers())}")


def check_decoders() -> Iterator[Check]:
    """Check that each compressed transfer syntax in clinical use has a decoder."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    from app.ingest.dicom import pixels

    assert pixels  # importing it selects among pydicom's decoders
    for name, syntaxes in SYNTAXES.items():
        decoders = [get_decoder(UID(syntax)) for syntax in syntaxes]
        plugins = sorted({plugin for decoder in decoders for plugin in decoder.available_plugins})
        if all(decoder.is_available for decoder in decoders):
            yield Check(f"decoder {name}", "ok", ", ".join(plugins))
        else:
            yield Check(f"decoder {name}", "warn", "DICOM files with this compression cannot be read", DECODER_FIX)


def check_bundles(settings: Settings) -> Iterator[Check]:
    """Check the hashes, the provider and the golden pair of each bundle."""
    folder = settings.models or shipped_models()
    bundles = find_bundles(folder)
    if not bundles:
        fix = f"Unset {PREFIX}MODELS to use the shipped bundles, or install counterpart again."
        yield Check("models", "fail", f"none in {folder}", fix)
    for path in bundles:
        name = f"model {path.name}"
        start = time.perf_counter()
        try:
            bundle = load_bundle(path, settings.provider, settings.threads, settings.gpu_batch)
        except CounterpartError as error:
            yield Check(name, "fail", f"{error.code}: {error.found}", error.advice)
            continue
        seconds = time.perf_counter() - start
        found = f"hashes and golden pair match ({bundle.provider}, {bundle.precision}, {seconds:.1f} s)"
        yield Check(name, "ok", found)


def check_store(settings: Settings) -> Check:
    """Check that the local folder is writable and has free space."""
    from app.jobs.store import is_open_to_others

    store = settings.folder
    # A check must not create the folder, so the nearest existing parent is tested.
    existing = next(p for p in (store, *store.parents) if p.exists())
    try:
        with TemporaryFile(dir=existing):
            pass
    except OSError as error:
        fix = f"Make the folder writable for this user, or set {PREFIX}STORE to another folder."
        return Check("store", "fail", f"{store}: {error.strerror}", fix)
    free = shutil.disk_usage(existing).free / GIGABYTE
    if is_open_to_others(store):
        return Check("store", "warn", f"{store}: open to other users of this machine", f"chmod -R go= {store}")
    status: Status = "ok" if free >= COMFORTABLE_GB else "warn" if free >= ONE_SCAN_GB else "fail"
    fix = "" if status == "ok" else f"Free some disk space, or set {PREFIX}STORE to a folder on another disk."
    return Check("store", status, f"{store}: writable, {free:.1f} GB free", fix)


def check_shared(settings: Settings) -> Iterator[Check]:
    """Check the bucket, if the store is one, and the database, if it exists."""
    if settings.bucket:
        from app.jobs.bucket import BucketStore

        with TemporaryDirectory() as scratch:
            try:
                BucketStore(settings.bucket, Path(scratch)).check()
            except CounterpartError as error:
                yield Check("bucket", "fail", error.found, error.advice)
            else:
                yield Check("bucket", "ok", settings.format_value("store"))
    if settings.database or (settings.folder / "jobs.sqlite").exists():
        yield check_jobs(settings)


def check_jobs(settings: Settings) -> Check:
    """Check that the job database answers, and that a SQLite file is sound."""
    from app.jobs.database import check_database, connect
    from app.jobs.maintenance import WorkerRegistry

    try:
        check_database(settings.database_url)
        if settings.database:
            database = connect(settings.database_url)
            try:
                WorkerRegistry(database).create_tables()
            finally:
                database.dispose()
    except CounterpartError as error:
        return Check("database", "fail", error.found, error.advice)
    except Exception as error:  # noqa: BLE001  # any class of the driver; its text may contain the password
        fix = f"Check {PREFIX}DATABASE, and that its user may log in and create tables."
        return Check("database", "fail", f"no answer ({type(error).__name__})", fix)
    return Check("database", "ok", settings.format_value("database") if settings.database else "the file is sound")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
