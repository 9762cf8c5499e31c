#!/usr/bin/env python3
"""Round trip of DICOM files through Orthanc: by STOW-RS and C-STORE, and back by WADO-RS and C-GET.

    apt-get install orthanc orthanc-dicomweb dcmtk
    counterpart detect SERIES -o OUT
    python tests/proofs/orthanc_round_trip.py SERIES OUT

The script prints one JSON line: the number of instances, the result of each retrieval, and the patients, studies and
series that Orthanc indexed. It exits with 0 if every instance is returned identical, with 1 if not, and with 3 if a
program is not installed. All elements are compared except the file meta information, which each writer sets itself.

Debian's Orthanc listens on every address, so script and Orthanc run in a network namespace with only the loopback
device. Orthanc stores its data in a temporary folder and is stopped when the script ends.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import FileDataset

NAMESPACE_VARIABLE = "COUNTERPART_ORTHANC_NAMESPACE"
REQUIRED_PROGRAMS = ("Orthanc", "storescu", "getscu", "unshare")
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1
HTTP_PORT, DICOM_PORT = 8042, 4242
URL = f"http://127.0.0.1:{HTTP_PORT}"
TITLE = "ORTHANC"
START_SECONDS = 60
# getscu 3.6.7 does not propose parametric maps. Orthanc refuses a C-GET that would need another class.
UNKNOWN_TO_GETSCU = ("1.2.840.10008.5.1.4.1.1.30",)
BOUNDARY = "counterpart-round-trip"
# Exit status for `tests.support.external_tools.run_or_skip`. This script runs without the package `tests`.
NOT_INSTALLED = 3

Instances = dict[str, FileDataset]


def main() -> int:
    """Run the round trip with a new Orthanc for each way of sending."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="DICOM files, or folders that contain some")
    parser.add_argument("--web-only", action="store_true", help="send and retrieve by DICOMweb only")
    arguments = parser.parse_args()
    missing = [name for name in REQUIRED_PROGRAMS if not shutil.which(name, path=_path())]
    if missing or not PLUGIN.is_file():
        print(f"not installed: {', '.join(missing) or PLUGIN} (Debian: orthanc, orthanc-dicomweb, dcmtk)")
        return NOT_INSTALLED
    if not os.environ.get(NAMESPACE_VARIABLE):
        enter_namespace()
    raise_loopback()
    files = _dicom_files(arguments.paths)
    sent = {str(dataset.SOPInstanceUID): dataset for dataset in map(pydicom.dcmread, files)}
    outcome: dict[str, Any] = {"instances": len(sent)}
    senders = {"STOW-RS": send_stow} if arguments.web_only else {"STOW-RS": send_stow, "C-STORE": _send_c_store}
    for name, send in senders.items():
        with tempfile.TemporaryDirectory() as folder, orthanc(Path(folder)):
            send(files)
            ways = {"WADO-RS": _compare(sent, _retrieve_wado(sent))}
            if not arguments.web_only:
                known = {uid: dataset for uid, dataset in sent.items() if dataset.SOPClassUID not in UNKNOWN_TO_GETSCU}
                ways["C-GET"] = _compare(known, _retrieve_c_get(known, Path(folder)))
            outcome[name] = {**ways, **indexed()}
    print(json.dumps(outcome))
    return 0 if all(outcome[name][way] == "identical" for name in senders for way in ways) else 1


# ---- Orthanc -----------------------------------------------------------------------------------


def enter_namespace() -> None:
    """Restart the script in a network namespace with only the loopback device."""
    options = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    os.environ[NAMESPACE_VARIABLE] = "yes"
    os.environ["PYTHONPATH"] = f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), *sys.argv[1:]]
    os.execvp("unshare", ["unshare", *options, "--net", *command])  # noqa: S606 - without a shell on purpose


def raise_loopback() -> None:
    """Do the same as `ip link set lo up`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))


def _path() -> str:
    return os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"


@contextmanager
def orthanc(folder: Path, servers: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Run Orthanc with its DICOMweb plugin, which knows some DICOMweb servers by name."""
    configuration = {
        "Name": "round trip",
        "StorageDirectory": str(folder / "store"),
        "IndexDirectory": str(folder / "store"),
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "Servers": dict(servers or {})},
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
            request("/dicom-web/studies")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
        else:
            return
    raise SystemExit(f"Orthanc did not start:\n{log.read_text(errors='replace')}")


def request(path: str, body: bytes | None = None, **headers: str) -> tuple[bytes, str]:
    """Return the body of a response and its Content-Type."""
    request = urllib.request.Request(URL + path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read(), response.headers.get("Content-Type", "")


def indexed() -> dict[str, Any]:
    """Return the number of patients and studies that Orthanc indexed, and modality and size of each series."""
    counts = {kind: len(json.loads(request(f"/{kind}")[0])) for kind in ("patients", "studies")}
    series = [json.loads(request(f"/series/{i}")[0]) for i in json.loads(request("/series")[0])]
    return {**counts, "series": sorted([one["MainDicomTags"]["Modality"], len(one["Instances"])] for one in series)}


# ---- send --------------------------------------------------------------------------------------


def send_stow(files: Sequence[Path]) -> None:
    """Send all files in one multipart/related request (STOW-RS, PS3.18 10.5)."""
    head = f"\r\n--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    body = b"".join(head + file.read_bytes() for file in files) + f"\r\n--{BOUNDARY}--".encode()
    kind = f'multipart/related; type="application/dicom"; boundary={BOUNDARY}'
    answer = json.loads(request("/dicom-web/studies", body, Content_Type=kind, Accept="application/dicom+json")[0])
    stored, failed = (answer.get(tag, {}).get("Value", []) for tag in ("00081199", "00081198"))
    if len(stored) != len(files) or failed:
        raise SystemExit(f"STOW-RS stored {len(stored)} of {len(files)} files; {len(failed)} failed.")


def _send_c_store(files: Sequence[Path]) -> None:
    """Send all files by C-STORE.

    `--required` proposes the SOP classes of the files. Without it, storescu does not send SEG and SR.
    """
    peer = ("-aec", TITLE, "127.0.0.1", str(DICOM_PORT))
    subprocess.run(["storescu", "--required", *peer, *map(str, files)], check=True)


# ---- retrieve ----------------------------------------------------------------------------------


def _retrieve_wado(sent: Instances) -> Instances:
    """Retrieve each study in the transfer syntax in which it was stored (WADO-RS, PS3.18 10.4)."""
    retrieved: Instances = {}
    for study in {str(dataset.StudyInstanceUID) for dataset in sent.values()}:
        accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
        body, kind = request(f"/dicom-web/studies/{study}", Accept=accept)
        message = message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + body, policy=policy.HTTP)
        assert isinstance(message, EmailMessage)
        for part in message.iter_parts():
            content = part.get_payload(decode=True)
            assert isinstance(content, bytes)
            dataset = pydicom.dcmread(BytesIO(content))
            retrieved[str(dataset.SOPInstanceUID)] = dataset
    return retrieved


def _retrieve_c_get(sent: Instances, folder: Path) -> Instances:
    """Retrieve each series by C-GET."""
    target = folder / "retrieved"
    target.mkdir()
    for study, series in {(str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID)) for dataset in sent.values()}:
        keys = (
            "-k",
            "QueryRetrieveLevel=SERIES",
            "-k",
            f"StudyInstanceUID={study}",
            "-k",
            f"SeriesInstanceUID={series}",
        )
        peer = ("-aec", TITLE, "127.0.0.1", str(DICOM_PORT))
        subprocess.run(["getscu", "--study", "-od", str(target), *keys, *peer], check=True, stdout=subprocess.DEVNULL)
    return {str(dataset.SOPInstanceUID): dataset for dataset in map(pydicom.dcmread, target.iterdir())}


def _compare(sent: Instances, retrieved: Instances) -> str:
    """Return `identical`, or the numbers of absent and different instances."""
    absent = sent.keys() - retrieved.keys()
    different = [uid for uid in sent.keys() & retrieved.keys() if sent[uid] != retrieved[uid]]
    if not absent and not different and len(sent) == len(retrieved):
        return "identical"
    return f"{len(absent)} absent, {len(different)} different, {len(retrieved)} in total"


def _dicom_files(paths: Sequence[Path]) -> list[Path]:
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return [file for file in files if file.is_file() and file.read_bytes()[128:132] == b"DICM"]


if __name__ == "__main__":
    sys.exit(main())
