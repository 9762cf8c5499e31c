#!/usr/bin/env python3
"""Send DICOM files to a real Orthanc, by STOW-RS and by C-STORE, and take them back by WADO-RS and C-GET.

    apt-get install orthanc orthanc-dicomweb dcmtk
    counterpart detect SERIES -o OUT
    python scripts/orthanc_round_trip.py SERIES OUT

Prints one JSON line: how many instances each way in took, how each way out gave them back, what
Orthanc makes of them (one study, its series). Leaves with 0 if every instance came back identical:
each element but the file's meta information, which belongs to whoever wrote the file.

Debian's Orthanc listens on every address. It is started in a network namespace that has nothing
but loopback, and this script with it; it ends with the script, by its own process id, and its store
is a temporary folder.
"""

import argparse
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import FileDataset

INSIDE = "COUNTERPART_ORTHANC_NAMESPACE"
NEEDED = ("Orthanc", "storescu", "getscu", "unshare")
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1
HTTP_PORT, DICOM_PORT = 8042, 4242
URL = f"http://127.0.0.1:{HTTP_PORT}"
TITLE = "ORTHANC"
START_SECONDS = 60
BOUNDARY = "counterpart-round-trip"

Instances = dict[str, FileDataset]


def main() -> int:
    """Start Orthanc twice, once for each way in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="DICOM files, or folders with some in them")
    paths = parser.parse_args().paths
    missing = [name for name in NEEDED if not shutil.which(name, path=_path())]
    if missing or not PLUGIN.is_file():
        print(f"not installed: {', '.join(missing) or PLUGIN} (Debian: orthanc, orthanc-dicomweb, dcmtk)")
        return 3
    if not os.environ.get(INSIDE):
        _enter_namespace()
    _raise_loopback()
    files = _dicom_files(paths)
    sent = {str(dataset.SOPInstanceUID): dataset for dataset in map(pydicom.dcmread, files)}
    outcome: dict[str, Any] = {"instances": len(sent)}
    for name, send in (("STOW-RS", _stow), ("C-STORE", _store)):
        with tempfile.TemporaryDirectory() as folder, _orthanc(Path(folder)):
            send(files)
            outcome[name] = {
                "WADO-RS": _compare(sent, _wado(sent)),
                "C-GET": _compare(sent, _get(sent, Path(folder))),
                **_seen(),
            }
    print(json.dumps(outcome))
    ways = [outcome[way] for way in ("STOW-RS", "C-STORE")]
    return 0 if all(way[back] == "identical" for way in ways for back in ("WADO-RS", "C-GET")) else 1


# ---- Orthanc -----------------------------------------------------------------------------------


def _enter_namespace() -> None:
    """Start again where there is no network but loopback."""
    own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    os.environ[INSIDE] = "yes"
    again = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
    os.execvp("unshare", ["unshare", *own, "--net", *again])  # noqa: S606 - no shell is what is wanted


def _raise_loopback() -> None:
    """`ip link set lo up`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))


def _path() -> str:
    return os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"


@contextmanager
def _orthanc(folder: Path) -> Iterator[None]:
    configuration = {
        "Name": "round trip",
        "StorageDirectory": str(folder / "store"),
        "IndexDirectory": str(folder / "store"),
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        "HttpPort": HTTP_PORT,
        "RemoteAccessAllowed": False,
        "DicomPort": DICOM_PORT,
        "DicomAet": TITLE,
        "DicomAlwaysAllowStore": True,
        "DicomAlwaysAllowGet": True,
        "DicomAlwaysAllowFind": True,
        "OverwriteInstances": False,
    }
    (folder / "orthanc.json").write_text(json.dumps(configuration))
    program = shutil.which("Orthanc", path=_path())
    assert program is not None
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        _wait(process, folder / "log")
        yield
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            _ask("/dicom-web/studies")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
        else:
            return
    raise SystemExit(f"Orthanc does not answer:\n{log.read_text(errors='replace')}")


def _ask(path: str, body: bytes | None = None, **headers: str) -> tuple[bytes, str]:
    """An answer and its Content-Type."""
    request = urllib.request.Request(URL + path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read(), answer.headers.get("Content-Type", "")


def _seen() -> dict[str, Any]:
    """What Orthanc indexed: how many patients and studies, and of each series modality and size."""
    counts = {kind: len(json.loads(_ask(f"/{kind}")[0])) for kind in ("patients", "studies")}
    series = [json.loads(_ask(f"/series/{i}")[0]) for i in json.loads(_ask("/series")[0])]
    return {**counts, "series": sorted([one["MainDicomTags"]["Modality"], len(one["Instances"])] for one in series)}


# ---- ways in -----------------------------------------------------------------------------------


def _stow(files: Sequence[Path]) -> None:
    """STOW-RS (PS3.18 10.5): one multipart/related request."""
    head = f"\r\n--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    body = b"".join(head + file.read_bytes() for file in files) + f"\r\n--{BOUNDARY}--".encode()
    kind = f'multipart/related; type="application/dicom"; boundary={BOUNDARY}'
    answer = json.loads(_ask("/dicom-web/studies", body, Content_Type=kind, Accept="application/dicom+json")[0])
    stored, failed = (answer.get(tag, {}).get("Value", []) for tag in ("00081199", "00081198"))
    if len(stored) != len(files) or failed:
        raise SystemExit(f"STOW-RS: {len(stored)} of {len(files)} were stored, {len(failed)} failed.")


def _store(files: Sequence[Path]) -> None:
    """C-STORE. `--required` proposes the files' own SOP classes, else SEG and SR are left out."""
    peer = ("-aec", TITLE, "127.0.0.1", str(DICOM_PORT))
    subprocess.run(["storescu", "--required", *peer, *map(str, files)], check=True)


# ---- ways out ----------------------------------------------------------------------------------


def _wado(sent: Instances) -> Instances:
    """WADO-RS (PS3.18 10.4): each study whole, in the transfer syntax that it was stored in."""
    back: Instances = {}
    for study in {str(dataset.StudyInstanceUID) for dataset in sent.values()}:
        accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
        body, kind = _ask(f"/dicom-web/studies/{study}", Accept=accept)
        message = message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + body, policy=policy.HTTP)
        assert isinstance(message, EmailMessage)
        for part in message.iter_parts():
            content = part.get_payload(decode=True)
            assert isinstance(content, bytes)
            dataset = pydicom.dcmread(BytesIO(content))
            back[str(dataset.SOPInstanceUID)] = dataset
    return back


def _get(sent: Instances, folder: Path) -> Instances:
    """C-GET of each study."""
    target = folder / "got"
    target.mkdir()
    for study in {str(dataset.StudyInstanceUID) for dataset in sent.values()}:
        keys = ("-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={study}")
        peer = ("-aec", TITLE, "127.0.0.1", str(DICOM_PORT))
        subprocess.run(["getscu", "--study", "-od", str(target), *keys, *peer], check=True, stdout=subprocess.DEVNULL)
    return {str(dataset.SOPInstanceUID): dataset for dataset in map(pydicom.dcmread, target.iterdir())}


def _compare(sent: Instances, back: Instances) -> str:
    """`identical`, or in how many instances something differs."""
    absent = sent.keys() - back.keys()
    different = [uid for uid in sent.keys() & back.keys() if sent[uid] != back[uid]]
    if not absent and not different and len(sent) == len(back):
        return "identical"
    return f"{len(absent)} absent, {len(different)} different, {len(back)} in all"


def _dicom_files(paths: Sequence[Path]) -> list[Path]:
    every = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return [file for file in every if file.is_file() and file.read_bytes()[128:132] == b"DICM"]


if __name__ == "__main__":
    sys.exit(main())
