"""Record of the results of scans, through the command line and over HTTP, to compare them later byte for byte.

Run before a refactoring: ``python -m tests.proofs.golden record FOLDER SCAN[?QUERY]...``,
for example ``... record /tmp/golden scan.nii.gz 'series.zip?geometry=resample'``.
Run afterwards, in the changed checkout: ``python -m tests.proofs.golden compare FOLDER``.

Every result file must be identical. In `report.json` the times of the run are ignored. Keys that were renamed can be
given as ``--renamed old=new``. DICOM objects are compared byte for byte too: their UIDs are hashes of their content.
"""

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-c", "from app.cli import main; main()")
# Keys of a report that depend on the run and not on the scan.
VOLATILE = {"seconds"}
START_SECONDS = 180


def run_all(scans: list[str], out: Path) -> None:
    """Analyse every scan in both ways and keep all results below `out`."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "COUNTERPART_ALLOW_NONCOMMERCIAL": "true"}
    for number, scan in enumerate(scans):
        path, _, query = scan.partition("?")
        folder = out / "cli" / str(number)
        folder.mkdir(parents=True)
        options = [word for pair in filter(None, query.split("&")) for word in f"--{pair}".split("=")]
        command = [*COMMAND, "detect", path, "-o", str(folder), *options]
        done = subprocess.run(command, check=False, cwd=ROOT, env=environ, capture_output=True)
        (folder / "exit-status").write_text(str(done.returncode))
    with TemporaryDirectory() as store, socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        free.close()
        environ |= {"COUNTERPART_STORE": store}
        service = subprocess.Popen(
            [*COMMAND, "serve", "--port", url.rpartition(":")[2]], cwd=ROOT, env=environ, stderr=subprocess.DEVNULL
        )
        try:
            _wait_until_ready(url)
            for number, scan in enumerate(scans):
                _post(url, scan, out / "http" / str(number))
        finally:
            service.terminate()
            service.wait()


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz"):
                return
        except OSError:
            time.sleep(0.3)
    raise SystemExit("The service did not become ready.")


def _post(url: str, scan: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    path, _, query = scan.partition("?")
    request = urllib.request.Request(
        f"{url}/v1/scans?{query}", Path(path).read_bytes(), {"Prefer": "wait=280"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request) as answer:
            job = json.load(answer)
    except urllib.error.HTTPError as error:
        (folder / "problem-code").write_text(json.load(error)["code"])
        return
    for link in job["links"].values():
        if "." in link.rpartition("/")[2]:
            with urllib.request.urlopen(url + link) as answer, (folder / link.rpartition("/")[2]).open("wb") as file:
                shutil.copyfileobj(answer, file)


def differences(before: Path, after: Path, renamed: dict[str, str]) -> Iterator[str]:
    """Yield the relative path of each file that is missing on one side or differs."""
    names = {path.relative_to(root) for root in (before, after) for path in root.rglob("*") if path.is_file()}
    for name in sorted(names):
        old, new = before / name, after / name
        if not (old.is_file() and new.is_file()):
            yield f"{name} (on one side only)"
        elif name.name == "report.json":
            if _stable(json.loads(old.read_text()), renamed) != _stable(json.loads(new.read_text()), {}):
                yield str(name)
        elif not filecmp.cmp(old, new, shallow=False):
            yield str(name)


def _stable(value: Any, renamed: dict[str, str]) -> Any:
    """Return a report without its times, with renamed keys."""
    if isinstance(value, dict):
        return {renamed.get(key, key): _stable(v, renamed) for key, v in value.items() if key not in VOLATILE}
    return [_stable(v, renamed) for v in value] if isinstance(value, list) else value


def main() -> None:
    """Read the options, then record or compare."""
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.golden", description=__doc__)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("scans", nargs="*", help="for record: path, and ?model=...&geometry=... if needed")
    parser.add_argument("--renamed", nargs="*", default=[], metavar="OLD=NEW")
    options = parser.parse_args()
    listed = options.folder / "scans.json"
    if options.action == "record":
        run_all(options.scans, options.folder / "results")
        listed.write_text(json.dumps(options.scans))
        return
    with TemporaryDirectory() as scratch:
        run_all(json.loads(listed.read_text()), Path(scratch))
        renamed = dict(pair.split("=") for pair in options.renamed)
        found = list(differences(options.folder / "results", Path(scratch), renamed))
    sys.exit("\n".join(["Different:", *found]) if found else None)


if __name__ == "__main__":
    main()
