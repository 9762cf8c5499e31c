"""Orthanc as the PACS of tests and proofs, in a network namespace that has only the loopback device.

Debian's Orthanc listens on every address. In the namespace, no other machine can reach it.
"""

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from tests.support.external_tools import NOT_INSTALLED
from tests.support.servers import free_port

# `app.settings` accepts this variable.
NAMESPACE_VARIABLE = "COUNTERPART_ORTHANC_NAMESPACE"
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
PROGRAMS = ("Orthanc", "storescu", "storescp", "echoscu", "findscu", "unshare")
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1
START_SECONDS = 60
TITLE = "ORTHANC"


def enter_namespace(module: str) -> None:
    """Restart a module in a network namespace with only the loopback device, or exit with `NOT_INSTALLED`."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if missing or not PLUGIN.is_file():
        text = f"not installed: {', '.join(missing) or PLUGIN} (Debian: orthanc, orthanc-dicomweb, dcmtk)"
        print(text)  # noqa: T201 - the output of a command
        raise SystemExit(NOT_INSTALLED)
    if not os.environ.get(NAMESPACE_VARIABLE):
        options = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        os.environ[NAMESPACE_VARIABLE] = "yes"
        command = ["unshare", *options, "--net", sys.executable, "-m", module, *sys.argv[1:]]
        os.execvp("unshare", command)  # noqa: S606, S607 - without a shell on purpose
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))


def _path() -> str:
    return os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"


@dataclass
class Orthanc:
    """One Orthanc with its folder. It keeps its data when it is killed and started again.

    Attributes
    ----------
    folder : Path
    http_port, dicom_port : int
    options : dict
        Further entries of its configuration.
    """

    folder: Path
    http_port: int = field(default_factory=free_port)
    dicom_port: int = field(default_factory=free_port)
    options: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Base URL of its REST API."""
        return f"http://127.0.0.1:{self.http_port}"

    def start(self, *, wait: bool = True) -> None:
        """Start Orthanc, and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        configuration = {
            "Name": "tests",
            "StorageDirectory": str(self.folder / "store"),
            "IndexDirectory": str(self.folder / "store"),
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "DicomPort": self.dicom_port,
            "DicomAet": TITLE,
            "DicomCheckCalledAet": True,
            "DicomAlwaysAllowStore": True,
            "OverwriteInstances": False,
            **self.options,
        }
        (self.folder / "orthanc.json").write_text(json.dumps(configuration))
        program = shutil.which("Orthanc", path=_path())
        assert program is not None
        with (self.folder / "log").open("ab") as log:
            command = [program, str(self.folder / "orthanc.json")]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until Orthanc answers."""
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                httpx2.get(f"{self.url}/system", timeout=5).raise_for_status()
            except httpx2.TransportError:
                time.sleep(0.1)
            else:
                return
        raise RuntimeError(f"Orthanc did not start: {(self.folder / 'log').read_text(errors='replace')}")

    def kill(self) -> None:
        """Kill Orthanc with SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Stop Orthanc."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)

    def instances(self) -> list[dict[str, str]]:
        """Return modality, SOPInstanceUID, SeriesInstanceUID and id of each stored instance."""
        found = []
        with httpx2.Client(base_url=self.url, timeout=60) as client:
            for series in client.get("/series?expand").json():
                modality = series["MainDicomTags"]["Modality"]
                for identifier in series["Instances"]:
                    tags = client.get(f"/instances/{identifier}").json()["MainDicomTags"]
                    found.append({"modality": modality, "uid": tags["SOPInstanceUID"], "id": identifier})
        return found


@contextmanager
def orthanc(folder: Path, **options: Any) -> Iterator[Orthanc]:
    """Start an Orthanc, and stop it at the end."""
    running = Orthanc(folder, options=options)
    running.start()
    try:
        yield running
    finally:
        running.stop()
