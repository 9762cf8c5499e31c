"""The command line. Each command imports what it needs when it runs, so that --help is quick."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from app import __version__
from app.errors import CannotAnalyse, CounterpartError, InternalError, UnreadableScan, UploadError

INPUT_ERRORS = (UploadError, UnreadableScan, CannotAnalyse)
STATUS_OTHER, STATUS_INPUT = 1, 2

app = typer.Typer(
    name="counterpart",
    help="A brain scan in, a mask of what differs from its imagined healthy counterpart out. Research use only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # it prints local variables, and those can hold patient data
)


@contextmanager
def errors_told(given: Mapping[str, Path | None] | None = None) -> Iterator[None]:
    """Tell an error as `code: sentence` on standard error, and leave with its exit status.

    Parameters
    ----------
    given : mapping of str to Path, optional
        Paths of the caller by the names of their parameters, which stand for them: they can name a patient.

    Raises
    ------
    typer.Exit
        With 2 where the scan cannot be analysed, with 1 for anything else.
    """
    try:
        yield
    except CounterpartError as error:
        typer.echo(f"{error.code}: {error}", err=True)
        raise typer.Exit(STATUS_INPUT if isinstance(error, INPUT_ERRORS) else STATUS_OTHER) from error
    except OSError as error:
        typer.echo(f"{error.strerror or type(error).__name__}: {_place(error, given or {})}", err=True)
        raise typer.Exit(STATUS_OTHER) from error
    except Exception as error:
        from app.jobs.runner import where

        # No traceback: the text of an exception may hold a patient's data, or a database's password.
        fault = InternalError(
            "Counterpart met an unexpected {exception} in {where}.".format(**where(error)),
            expected="a result or a reason.",
            advice="Report this line: it holds nothing of the scan.",
        )
        typer.echo(f"{fault.code}: {fault}", err=True)
        raise typer.Exit(STATUS_OTHER) from error


def _place(error: OSError, given: Mapping[str, Path | None]) -> str:
    if error.filename is None:
        return "no file named"
    for name, path in given.items():
        if path is not None and Path(str(error.filename)).is_relative_to(path):
            return f"{name}, or a file in it"
    return str(error.filename)


def _there(path: Path | None) -> Path | None:
    """The path of something that exists; typer's own check repeats the path."""
    if path is not None and not path.exists():
        raise typer.BadParameter("there is no such file or folder.")
    return path


def _a_folder(path: Path) -> Path:
    """The path of a folder that is there or can be made."""
    if path.exists() and not path.is_dir():
        raise typer.BadParameter("this is no folder.")
    return path


def _tell_version(*, wanted: bool) -> None:
    if wanted:
        typer.echo(f"counterpart {__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=lambda v: _tell_version(wanted=v), is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Take the options that belong to no command."""


@app.command()
def detect(  # noqa: PLR0913 - one parameter an option, and typer knows no other way
    scan: Annotated[Path, typer.Argument(help="NIfTI or MGH file, zip, DICOM file or folder.", callback=_there)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.", callback=_a_folder)],
    *,
    model: Annotated[str | None, typer.Option(help="Bundle, by name or id; else by modality and sequence.")] = None,
    series: Annotated[
        str | None, typer.Option(help="SeriesInstanceUID, where there are several; UID/2 for its second stack.")
    ] = None,
    geometry: Annotated[
        Literal["refuse", "resample"], typer.Option(help="Missing, tilted or unevenly spaced slices.")
    ] = "refuse",
    seed: Annotated[int | None, typer.Option(help="Of the noise; else the bundle's.", min=0)] = None,
    truth: Annotated[
        Path | None,
        typer.Option(help="Known lesion mask; else truth.nii.gz beside the scan.", callback=_there),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write mask, anomaly map, counterpart, report and preview of one scan."""
    from app.slim import import_nibabel

    import_nibabel()
    from app.analysis import AnalysisRequest
    from app.cli_detect import beside, run, tell, tell_dice
    from app.settings import read_settings

    with errors_told({"SCAN": scan, "--out": out, "--truth": truth}):
        report = run(scan, out, AnalysisRequest(model, series, seed, geometry), read_settings())
        if as_json:
            typer.echo(report.model_dump_json(indent=1))
        else:
            tell(report, out, Console())
        known = truth or beside(scan)
        if known:
            tell_dice(out, known, Console(stderr=as_json))


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; else COUNTERPART_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; else COUNTERPART_PORT.")] = None,
    *,
    no_worker: Annotated[bool, typer.Option("--no-worker", help="Leave the analysis to `counterpart worker`.")] = False,
) -> None:
    """Start the HTTP service and its worker."""
    from app import main as service
    from app.settings import read_settings

    with errors_told():
        service.serve(read_settings(host=host, port=port), worker=not no_worker)


@app.command()
def worker(
    host: Annotated[str | None, typer.Option(help="Where to tell health and metrics; else COUNTERPART_HOST.")] = None,
    port: Annotated[int, typer.Option(help="Port for them; 0 takes a free one.", min=0, max=65535)] = 0,
) -> None:
    """Analyse the scans that `counterpart serve --no-worker` takes, one at a time. It owns its GPU."""
    from app import main as service
    from app.settings import read_settings

    with errors_told():
        service.work(read_settings(host=host, port=port))


@app.command()
def sample(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write to.", file_okay=False)],
    seed: Annotated[int, typer.Option(help="Of the noise and of the lesion's place.", min=0)] = 0,
) -> None:
    """Make a scan to try things with: a template brain with a lesion of known shape."""
    with errors_told():
        from app.sample import make_sample

        made = make_sample(out, seed)
    typer.echo(f"{made.scan}: a template brain with a lesion of {made.lesion_ml:.1f} ml ({made.truth.name}).")
    typer.echo(f"Now: counterpart detect {made.scan} -o {out / 'result'}")


@app.command()
def models() -> None:
    """List the model bundles that scans can be sent to."""
    from app.runtime.bundle import find_bundles, read_manifest, shipped_models
    from app.settings import read_settings

    with errors_told():
        folder = read_settings().models or shipped_models()
        manifests = [read_manifest(bundle) for bundle in find_bundles(folder)]
    if not manifests:
        typer.echo(f"No model in {folder}.", err=True)
        raise typer.Exit(STATUS_OTHER)
    for manifest in manifests:
        typer.echo(f"{manifest.id}: {manifest.title}")
        typer.echo(f"  {manifest.modality}, {manifest.sequence}; {manifest.preparation.subject}")
        typer.echo(f"  {manifest.intended_use}")
        typer.echo(f"  {manifest.licence.licence}; trained on {manifest.licence.data}")


@app.command()
def doctor() -> None:
    """Check this installation, and say how to mend what is wrong."""
    from app.doctor import examine, tell
    from app.settings import read_settings

    with errors_told():
        settings = read_settings()
        checks = examine(settings)
    tell(checks, settings, Console())
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(STATUS_OTHER)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
