"""Command line. Each command imports what it needs when it runs, so that --help is fast."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from app import __version__
from app.errors import CannotAnalyse, CounterpartError, InternalError, InvalidSettings, UnreadableScan, UploadError

if TYPE_CHECKING:
    from app.api.tokens import TokenFile

# Folders that MONAI Deploy (Holoscan) and mercure give to a container: docs/integrations.md.
INPUT_VARIABLES = ["HOLOSCAN_INPUT_PATH", "MONAI_INPUTPATH", "MERCURE_IN_DIR"]
OUTPUT_VARIABLES = ["HOLOSCAN_OUTPUT_PATH", "MONAI_OUTPUTPATH", "MERCURE_OUT_DIR"]
INPUT_ERRORS = (UploadError, UnreadableScan, CannotAnalyse)
STATUS_OTHER, STATUS_INPUT = 1, 2

app = typer.Typer(
    name="counterpart",
    help="Detect what differs between a brain scan and its generated healthy counterpart. Research use only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # it prints local variables, which may contain patient data
)


token_commands = typer.Typer(no_args_is_help=True, help="Manage the named tokens of COUNTERPART_TOKENS.")
app.add_typer(token_commands, name="token")


@contextmanager
def report_errors(paths: Mapping[str, Path | None] | None = None) -> Iterator[None]:
    """Print an error as `code: sentences` on standard error, and exit with its status.

    Parameters
    ----------
    paths : mapping of str to Path, optional
        The caller's paths by parameter name. Messages contain the name instead of the path, because a path may
        contain a patient's name.

    Raises
    ------
    typer.Exit
        With status 2 if the scan cannot be analysed, with status 1 for any other error.
    """
    try:
        yield
    except CounterpartError as error:
        typer.echo(f"{error.code}: {error}", err=True)
        raise typer.Exit(STATUS_INPUT if isinstance(error, INPUT_ERRORS) else STATUS_OTHER) from error
    except OSError as error:
        typer.echo(f"{error.strerror or type(error).__name__}: {_describe_path(error, paths or {})}", err=True)
        raise typer.Exit(STATUS_OTHER) from error
    except Exception as error:
        from app.errors import error_location

        # No traceback: the text of an exception may contain patient data or a database password.
        fault = InternalError(
            "Counterpart met an unexpected {exception} in {where}.".format(**error_location(error)),
            expected="a result or a known error.",
            advice="Report this line. It contains no patient data.",
        )
        typer.echo(f"{fault.code}: {fault}", err=True)
        raise typer.Exit(STATUS_OTHER) from error


def import_nibabel() -> None:
    """Import nibabel without pydicom, requests and GDCM.

    nibabel imports pydicom, if it is installed, for DICOM headers inside NIfTI files. Counterpart does not read
    these. Without them, `detect` on a NIfTI file needs a sixth less CPU time before the first network evaluation.
    """
    if "nibabel" in sys.modules or "pydicom" in sys.modules:
        return
    sys.modules["pydicom"] = None  # type: ignore[assignment]  # documented: the import then fails
    try:
        import nibabel  # noqa: F401
    finally:
        del sys.modules["pydicom"]


def _describe_path(error: OSError, paths: Mapping[str, Path | None]) -> str:
    if error.filename is None:
        return "the error names no file"
    for name, path in paths.items():
        if path is not None and Path(str(error.filename)).is_relative_to(path):
            return f"{name}, or a file in it"
    return str(error.filename)


def _check_exists(path: Path | None) -> Path | None:
    """Check that a path exists. The error does not repeat the path, as typer's own check does."""
    if path is not None and not path.exists():
        raise typer.BadParameter("no such file or folder.")
    return path


def _check_folder(path: Path) -> Path:
    """Check that a path is a folder or does not exist."""
    if path.exists() and not path.is_dir():
        raise typer.BadParameter("not a folder.")
    return path


def _print_version(*, requested: bool) -> None:
    if requested:
        typer.echo(f"counterpart {__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=lambda v: _print_version(requested=v), is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Define the options that belong to no command."""


@app.command()
def detect(  # noqa: PLR0913 - typer needs one parameter for each option
    scan: Annotated[
        Path,
        typer.Argument(
            help="NIfTI or MGH file, zip, DICOM file or folder.", callback=_check_exists, envvar=INPUT_VARIABLES
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="Folder for the results.", callback=_check_folder, envvar=OUTPUT_VARIABLES),
    ],
    *,
    model: Annotated[
        str | None, typer.Option(help="Name or id of a model. Default: selected by modality and sequence.")
    ] = None,
    series: Annotated[
        str | None, typer.Option(help="SeriesInstanceUID of the series to analyse; UID/2 for its second stack.")
    ] = None,
    geometry: Annotated[
        Literal["refuse", "resample"],
        typer.Option(help="Refuse or resample missing, tilted or unevenly spaced slices."),
    ] = "refuse",
    seed: Annotated[int | None, typer.Option(help="Seed of the noise. Default: the seed of the model.", min=0)] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            help="Known lesion mask, to print the Dice. Default: truth.nii.gz beside the scan.", callback=_check_exists
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Analyse one scan: write mask, anomaly map, counterpart, report and preview."""
    import_nibabel()
    from app.analysis import AnalysisRequest
    from app.console import find_truth, print_dice, print_report, run_analysis
    from app.settings import read_settings

    with report_errors({"SCAN": scan, "--out": out, "--truth": truth}):
        report = run_analysis(scan, out, AnalysisRequest(model, series, seed, geometry), read_settings())
        if as_json:
            typer.echo(report.model_dump_json(indent=1))
        else:
            print_report(report, out, Console())
        known_mask = truth or find_truth(scan)
        if known_mask:
            print_dice(out, known_mask, Console(stderr=as_json))


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: COUNTERPART_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. Default: COUNTERPART_PORT.")] = None,
    *,
    no_worker: Annotated[
        bool, typer.Option("--no-worker", help="Do not analyse scans; `counterpart worker` does.")
    ] = False,
) -> None:
    """Start the HTTP service and its worker."""
    from app import main as service
    from app.settings import read_settings

    with report_errors():
        service.serve(read_settings(host=host, port=port), worker=not no_worker)


@app.command()
def worker(
    host: Annotated[str | None, typer.Option(help="Address for health and metrics. Default: COUNTERPART_HOST.")] = None,
    port: Annotated[
        int, typer.Option(help="Port for health and metrics. 0 selects a free port.", min=0, max=65535)
    ] = 0,
) -> None:
    """Analyse the scans that `counterpart serve --no-worker` receives, one at a time.

    Start one worker for each GPU.
    """
    from app import main as service
    from app.settings import read_settings

    with report_errors():
        service.run_worker(read_settings(host=host, port=port))


@app.command()
def node(
    host: Annotated[str | None, typer.Option(help="Address for health and metrics. Default: COUNTERPART_HOST.")] = None,
    port: Annotated[
        int, typer.Option(help="Port for health and metrics. 0 selects a free port.", min=0, max=65535)
    ] = 0,
) -> None:
    """Receive series from DICOM peers (C-STORE) and put them into the queue.

    COUNTERPART_NODE_AE_TITLE, COUNTERPART_NODE_HOST and COUNTERPART_NODE_PORT are its DICOM address.
    """
    from app import main as service
    from app.settings import read_settings

    with report_errors():
        service.run_node(read_settings(host=host, port=port))


@app.command()
def sample(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the sample.", file_okay=False)],
    seed: Annotated[int, typer.Option(help="Seed of the noise and of the position of the lesion.", min=0)] = 0,
) -> None:
    """Create a sample scan: a template brain with a lesion of known shape."""
    with report_errors():
        from app.sample import make_sample

        made = make_sample(out, seed)
    typer.echo(f"{made.scan}: a template brain with a lesion of {made.lesion_ml:.1f} ml ({made.truth.name}).")
    typer.echo(f"Next: counterpart detect {made.scan} -o {out / 'result'}")


@app.command()
def calibrate(
    folder: Annotated[
        Path, typer.Argument(help="Folder with ten or more healthy scans of one scanner.", callback=_check_exists)
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="File for the site profile, *.json.", dir_okay=False)],
    *,
    target_ml: Annotated[
        float, typer.Option(help="Largest expected false-positive volume of a healthy scan, in ml.", min=0.05)
    ] = 1.0,
    model: Annotated[
        str | None, typer.Option(help="Name or id of a model. Default: selected by modality and sequence.")
    ] = None,
) -> None:
    """Calibrate a model on healthy scans of one scanner and write a site profile."""
    import_nibabel()
    from app.analysis import AnalysisRequest
    from app.calibration_console import calibrate_site, print_profile
    from app.settings import read_settings

    with report_errors({"FOLDER": folder, "--out": out}):
        profile = calibrate_site(folder, out, AnalysisRequest(model), target_ml, read_settings(), Console(stderr=True))
        print_profile(profile, out, Console())


@app.command()
def drift(
    profile: Annotated[Path, typer.Argument(help="Site profile.", callback=_check_exists, dir_okay=False)],
    reports: Annotated[
        Path,
        typer.Argument(
            help="Folder with report.json files of later scans, searched in subfolders.", callback=_check_exists
        ),
    ],
) -> None:
    """Compare the scores of later scans with those of a site profile. Exit with status 1 if they have drifted."""
    from app.calibration_console import print_drift
    from app.settings import read_settings
    from app.site_calibration import measure_drift, read_reports
    from app.site_profile import read_profile

    with report_errors({"PROFILE": profile, "REPORTS": reports}):
        key = read_settings().profile_key
        checked = read_profile(profile, key.get_secret_value() if key else None)
        measured = measure_drift(checked, read_reports(reports, checked))
        print_drift(measured, Console())
    if measured.has_drifted:
        raise typer.Exit(STATUS_OTHER)


@app.command()
def models() -> None:
    """List the installed models."""
    from app.runtime.bundle import find_bundles, read_manifest, shipped_models
    from app.settings import read_settings

    with report_errors():
        folder = read_settings().models or shipped_models()
        manifests = [read_manifest(bundle) for bundle in find_bundles(folder)]
    if not manifests:
        typer.echo(f"The folder {folder} contains no model bundle.", err=True)
        raise typer.Exit(STATUS_OTHER)
    for manifest in manifests:
        typer.echo(f"{manifest.id}: {manifest.title}")
        typer.echo(f"  {manifest.modality}, {manifest.sequence}; {manifest.preprocessing.subject}")
        typer.echo(f"  {manifest.intended_use}")
        typer.echo(f"  {manifest.licence.licence}; trained on {manifest.licence.data}")


@app.command()
def doctor() -> None:
    """Check this installation, and print a fix for each problem."""
    from app.check_output import print_checks, print_settings
    from app.doctor import run_checks
    from app.settings import read_settings

    with report_errors():
        settings = read_settings()
        checks = run_checks(settings)
    print_checks(checks, Console())
    print_settings(settings, Console())
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(STATUS_OTHER)


@app.command("audit-log")
def audit_log(
    after: Annotated[int, typer.Option(help="Only rows with a larger id.", min=0)] = 0,
) -> None:
    """Print the audit trail as JSON lines."""
    with report_errors():
        from app.jobs.audit import AuditTrail
        from app.jobs.database import check_database, connect
        from app.settings import read_settings

        settings = read_settings()
        check_database(settings.database_url)
        for row in AuditTrail(connect(settings.database_url)).read_all(after):
            typer.echo(row.to_line(), nl=False)


@token_commands.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="Name of the system or person that uses the token.")],
    scope: Annotated[list[str], typer.Option(help="send, read, erase, metrics or admin. The option may be repeated.")],
) -> None:
    """Create a token and print it. Only its hash is stored, so that it cannot be printed again."""
    with report_errors():
        typer.echo(_open_token_file().create(name, scope))


@token_commands.command("list")
def list_tokens() -> None:
    """List the tokens with their scopes, without their values."""
    with report_errors():
        for token in _open_token_file().read():
            state = f"revoked {token.revoked:%Y-%m-%d %H:%M} UTC" if token.revoked else "valid"
            scopes = ",".join(sorted(token.scopes))
            typer.echo(f"{token.name}\t{scopes}\tcreated {token.created:%Y-%m-%d %H:%M} UTC\t{state}")


@token_commands.command("revoke")
def revoke_token(name: Annotated[str, typer.Argument(help="Name of the token.")]) -> None:
    """Revoke a token. Running services refuse it, and its sessions, at their next request."""
    with report_errors():
        _open_token_file().revoke(name)


def _open_token_file() -> "TokenFile":
    from app.api.tokens import TokenFile
    from app.settings import read_settings

    path = read_settings().tokens
    if path is None:
        raise InvalidSettings(
            "COUNTERPART_TOKENS is not set.",
            expected="the path of the file of tokens, in the environment of the service and of this command.",
            advice="Set it, for example to /etc/counterpart/tokens.",
        )
    return TokenFile(path.expanduser())


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
