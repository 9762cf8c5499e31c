"""What `counterpart doctor` looks at: each check says what was found, and how to mend it."""

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Literal

from rich.console import Console
from rich.table import Table

from app.errors import CounterpartError
from app.runtime.bundle import find_bundles, load_bundle, read_manifest, shipped_models
from app.runtime.session import open_session
from app.settings import PREFIX, SETTINGS_FILE, Settings

Status = Literal["ok", "warn", "fail"]
COLOURS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "red"}

OLDEST_PYTHON = (3, 11)
# A 512 x 512 x 400 scan and its three results take about a gigabyte before compression.
ONE_SCAN_GB = 1.0
COMFORTABLE_GB = 10.0
GIGABYTE = 10**9

# Both write the same folder `onnxruntime`, and the last one installed wins.
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")

# Transfer syntaxes in clinical use (DICOM PS3.5 annex A.4), and the parts that decode them here.
SYNTAXES = {
    "JPEG": ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"),
    "JPEG lossless": ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"),
    "JPEG-LS": ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"),
    "JPEG 2000": ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"),
    "HTJ2K": ("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203"),
    "RLE": ("1.2.840.10008.1.2.5",),
}
MEND_DECODER = "pip install python-gdcm pyjpegls pylibjpeg pylibjpeg-openjpeg pillow, then run doctor again."


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes
    ----------
    name : str
        What.
    status : {"ok", "warn", "fail"}
        A warning leaves the service usable.
    found : str
        What was there.
    mend : str
        What to do about it; empty where all is well.
    """

    name: str
    status: Status
    found: str
    mend: str = ""


def examine(settings: Settings) -> list[Check]:
    """Run every check, the real inference included; each is independent of the others' outcome."""
    installed = (check_python(), check_runtime(settings), *check_provider(settings), *check_decoders())
    return [*installed, *check_bundles(settings), check_store(settings), *check_shared(settings)]


def check_python() -> Check:
    """The interpreter's version."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Check("python", "fail", found, "Install Python 3.11 or newer, and counterpart again with it.")
    return Check("python", "ok", found)


def check_runtime(settings: Settings) -> Check:
    """Which onnxruntime is installed, and that it is one."""
    installed = {name: version for name in RUNTIMES if (version := _version(name))}
    found = ", ".join(f"{name} {version}" for name, version in installed.items()) or "not installed"
    extra = "gpu" if settings.provider == "cuda" else "cpu"
    if len(installed) > 1:
        remedy = f"pip uninstall {' '.join(RUNTIMES)}, then pip install 'counterpart[{extra}]': they share a folder."
        return Check("runtime", "fail", found, remedy)
    if not installed:
        return Check("runtime", "fail", found, f"pip install 'counterpart[{extra}]'.")
    return Check("runtime", "ok", found)


def check_provider(settings: Settings) -> Iterator[Check]:
    """Where a real session runs: onnxruntime also lists providers that it then falls back from."""
    for path in find_bundles(settings.models or shipped_models())[:1]:
        try:
            session = open_session(path / read_manifest(path).files.encoder.name, settings.provider, settings.threads)
        except CounterpartError as error:
            yield Check("provider", "fail", f"{error.code}: {error.found}", error.advice)
        else:
            yield Check("provider", "ok", f"{settings.provider}: {', '.join(session.get_providers())}")


def check_decoders() -> Iterator[Check]:
    """That every compressed transfer syntax in use has a decoder."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    from app.ingest import pixels

    assert pixels  # it chooses among pydicom's decoders
    for name, syntaxes in SYNTAXES.items():
        decoders = [get_decoder(UID(syntax)) for syntax in syntaxes]
        plugins = sorted({plugin for decoder in decoders for plugin in decoder.available_plugins})
        if all(decoder.is_available for decoder in decoders):
            yield Check(f"decoder {name}", "ok", ", ".join(plugins))
        else:
            yield Check(f"decoder {name}", "warn", "such DICOM files cannot be read", MEND_DECODER)


def check_bundles(settings: Settings) -> Iterator[Check]:
    """Hashes, the provider of the real session, and the golden pair of every bundle."""
    folder = settings.models or shipped_models()
    bundles = find_bundles(folder)
    if not bundles:
        mend = f"Unset {PREFIX}MODELS to use the shipped bundles, or install counterpart again."
        yield Check("models", "fail", f"none in {folder}", mend)
    for path in bundles:
        name = f"model {path.name}"
        start = time.perf_counter()
        try:
            bundle = load_bundle(path, settings.provider, settings.threads, settings.gpu_batch)
        except CounterpartError as error:
            yield Check(name, "fail", f"{error.code}: {error.found}", error.advice)
            continue
        seconds = time.perf_counter() - start
        yield Check(
            name, "ok", f"hashes, {bundle.provider} session in {bundle.precision} and golden pair in {seconds:.1f} s"
        )


def check_store(settings: Settings) -> Check:
    """That the store can be written to, and has room."""
    store = settings.folder
    existing = next(p for p in (store, *store.parents) if p.exists())
    try:
        with TemporaryFile(dir=existing):  # the folder itself is made by the service, not by a check
            pass
    except OSError as error:
        mend = f"Make it writable for this user, or set {PREFIX}STORE to another folder."
        return Check("store", "fail", f"{store}: {error.strerror}", mend)
    free = shutil.disk_usage(existing).free / GIGABYTE
    status: Status = "ok" if free >= COMFORTABLE_GB else "warn" if free >= ONE_SCAN_GB else "fail"
    mend = "" if status == "ok" else f"Free some space, or set {PREFIX}STORE to a folder on another disk."
    return Check("store", status, f"{store}: writable, {free:.1f} GB free", mend)


def check_shared(settings: Settings) -> Iterator[Check]:
    """The bucket and the database, where they are not in the local folder."""
    if settings.bucket:
        from app.jobs.bucket import BucketStore

        with TemporaryDirectory() as scratch:
            try:
                BucketStore(settings.bucket, Path(scratch)).check()
            except CounterpartError as error:
                yield Check("bucket", "fail", error.found, error.advice)
            else:
                yield Check("bucket", "ok", settings.bucket)
    if settings.database:
        from app.jobs.database import connect
        from app.jobs.recovery import WorkerRegistry

        database = connect(settings.database_url)
        try:
            WorkerRegistry(database).create_tables()
        except Exception as error:  # noqa: BLE001  # whatever the driver raises, with the password in its text
            mend = f"Check {PREFIX}DATABASE, and that the server lets this user in and create tables."
            yield Check("database", "fail", f"it does not answer ({type(error).__name__})", mend)
        else:
            yield Check("database", "ok", settings.shown("database"))
        finally:
            database.dispose()


def tell(checks: list[Check], settings: Settings, console: Console) -> None:
    """Checks and settings for a person, secrets hidden."""
    for check in checks:
        console.print(f"[{COLOURS[check.status]}]{check.status:4}[/] [bold]{check.name}[/]: ", end="")
        console.print(check.found, markup=False, highlight=False, soft_wrap=True)
        if check.mend:
            console.print(f"     mend: {check.mend}", markup=False, highlight=False, soft_wrap=True)
    table = Table(title=f"Settings (environment, or the file that {SETTINGS_FILE} names)", title_justify="left")
    table.add_column("variable", no_wrap=True)
    for heading in ("value", "from", "what"):
        table.add_column(heading, overflow="fold")
    for name, field in type(settings).model_fields.items():
        table.add_row(f"{PREFIX}{name.upper()}", settings.shown(name), settings.origin(name), field.description)
    console.print(table)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
