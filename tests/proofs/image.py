"""Build of the image with buildah, and its run under runc with the limits of docker-compose.yml. No registry is needed.

    sudo .venv-dev/bin/python -m tests.proofs.image --scan var/sample/scan.nii.gz --out result
    sudo .venv-dev/bin/python -m tests.proofs.image --scan var/sample/scan.nii.gz --out result --base debian:trixie-slim

Without --base, mmdebstrap makes the base from Debian's archive. The container has a read-only root, no capability, a
private network with loopback only, and its token in a file. It must become healthy, analyse a scan, deliver the mask,
and end after SIGTERM. The mask is compared with that of `counterpart detect` on this machine.

Needs root and the Debian packages buildah, mmdebstrap and runc. It does not test a GPU.
"""

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

CHECKOUT = Path(__file__).resolve().parents[2]
RELEASE = "trixie"
ARCHIVES = (
    f"deb http://deb.debian.org/debian {RELEASE} main",
    f"deb http://deb.debian.org/debian {RELEASE}-updates main",
    f"deb http://deb.debian.org/debian-security {RELEASE}-security main",
)
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
READY_SECONDS = 600
JOB_SECONDS = 1200
PROGRAMS = ("buildah", "mmdebstrap", "runc")
STOP_SECONDS = 60
# Limits of docker-compose.yml.
MEMORY_BYTES, PROCESSES = 6 << 30, 512
STORE = "/var/lib/counterpart"
# Programs and packages that install others. None may be in the image.
INSTALLERS = (
    "pip",
    "pip3",
    "pip-*",
    "pip[0-9]*",
    "setuptools",
    "setuptools-*",
    "ensurepip",
    "wheel-*",
    "easy_install*",
)


@dataclass(frozen=True)
class Buildah:
    """buildah with a storage of its own, so that nothing is left on this machine.

    Attributes
    ----------
    folder : Path
        Folder of the storage.
    """

    folder: Path

    def __call__(self, *words: str) -> str:
        """Run a command and return its standard output."""
        storage = ("--root", str(self.folder / "storage"), "--runroot", str(self.folder / "run"))
        done = subprocess.run(["buildah", *storage, *words], stdout=subprocess.PIPE, check=True, text=True)
        return done.stdout.strip()

    def make_base(self) -> str:
        """Make an image of a minimal Debian and return its name."""
        if "localhost/base" in self("images", "--format", "{{.Name}}").split():
            return "localhost/base"
        archive = self.folder / "base.tar"
        if not archive.exists():
            mmdebstrap = ["mmdebstrap", "--variant=minbase", RELEASE, str(archive), *ARCHIVES]
            subprocess.run(mmdebstrap, check=True)
        container = self("from", "scratch")
        self("add", container, str(archive), "/")
        self("config", "--cmd", "bash", container)
        self("commit", "--rm", container, "localhost/base")
        return "localhost/base"

    def build(self, base: str, provider: str) -> str:
        """Build the image from the Dockerfile and return its name."""
        name = f"localhost/counterpart:{provider}"
        # This machine may reach its package index only with its own certificates.
        pip = self.folder / "pip.conf"
        pip.write_text("[global]\ncert = /run/host/certificates\n")
        volumes = (f"{pip}:/etc/pip.conf:ro", f"{CERTIFICATES}:/run/host/certificates:ro")
        options = [word for volume in volumes for word in ("--volume", volume)]
        arguments = ("--build-arg", f"BASE={base}", "--build-arg", f"PROVIDER={provider}")
        # Docker's format, because that of OCI has no HEALTHCHECK.
        form = ("--isolation", "chroot", "--format", "docker", "--layers")
        self("build", *form, "--tag", name, *options, *arguments, str(CHECKOUT))
        return name


def check_contents(root: Path) -> None:
    """Exit with an error if the image contains an installer of packages or a writable program."""
    installers = [str(path.relative_to(root)) for pattern in INSTALLERS for path in root.rglob(pattern)]
    writable = [path for path in (root / "opt").rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o022]
    size = sum(path.lstat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"image               {size / 1e6:.0f} MB, {len(installers)} installers, {len(writable)} writable programs")
    if installers or writable:
        sys.exit(f"FAILED: expected neither, found {(installers + list(map(str, writable)))[:5]}.")


def write_bundle(folder: Path, root: Path, config: dict[str, Any], token: str) -> None:
    """Write the configuration of a container (OCI runtime specification) with the limits of docker-compose.yml."""
    subprocess.run(["runc", "spec"], cwd=folder, check=True)
    spec = json.loads((folder / "config.json").read_text())
    user, group = map(int, config["User"].split(":"))
    assert user != 0
    for name in ("secrets", "store"):
        (folder / name).mkdir()
        os.chown(folder / name, user, group)
    (folder / "secrets" / "counterpart_token").write_text(f"{token}\n")
    spec["root"] = {"path": str(root), "readonly": True}
    spec["process"] |= {
        "terminal": False,
        "user": {"uid": user, "gid": group},
        "args": [*config["Entrypoint"], *config["Cmd"]],
        "env": [*config["Env"], "COUNTERPART_SECRETS=/run/secrets"],
        "cwd": config["WorkingDir"],
        "capabilities": {},
        "noNewPrivileges": True,
    }
    spec["mounts"] += [
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]},
        {
            "destination": STORE,
            "type": "bind",
            "source": str(folder / "store"),
            "options": ["rbind", "nosuid", "nodev"],
        },
        {"destination": "/run/secrets", "type": "bind", "source": str(folder / "secrets"), "options": ["rbind", "ro"]},
    ]
    # A network namespace of its own has only loopback.
    spec["linux"]["namespaces"] = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]
    spec["linux"]["resources"] |= {"memory": {"limit": MEMORY_BYTES}, "pids": {"limit": PROCESSES}}
    (folder / "config.json").write_text(json.dumps(spec))


@dataclass(frozen=True)
class Container:
    """Container that runc runs.

    Attributes
    ----------
    name : str
    process : Popen
        runc itself.
    log : Path
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Process id of the service on this machine."""
        state = subprocess.run(["runc", "state", self.name], capture_output=True, check=True).stdout
        return int(json.loads(state)["pid"])

    def execute(self, *words: str) -> int:
        """Run a command in the container and return its exit status."""
        command = ["runc", "exec", self.name, *words]
        return subprocess.run(command, check=False, capture_output=True).returncode

    def wait_until_healthy(self, check: list[str]) -> float:
        """Return the seconds until the health check of the image succeeded."""
        start = time.monotonic()
        while self.execute(*check):
            if self.process.poll() is not None or time.monotonic() - start > READY_SECONDS:
                sys.exit(f"The service did not become healthy. The end of its log:\n{self.log.read_text()[-4000:]}")
            time.sleep(1)
        return time.monotonic() - start

    def stop(self) -> int:
        """Send SIGTERM and return the exit status of the service."""
        subprocess.run(["runc", "kill", self.name, "TERM"], check=True)
        return self.process.wait(STOP_SECONDS)


@contextmanager
def run_container(bundle: Path) -> Iterator[Container]:
    """Start the container of a bundle, and kill it at the end."""
    name, log = f"counterpart-{secrets.token_hex(4)}", bundle / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(["runc", "run", "--bundle", str(bundle), name], stdout=output, stderr=output)
    try:
        yield Container(name, process, log)
    finally:
        subprocess.run(["runc", "delete", "--force", name], check=False, capture_output=True)
        process.wait(STOP_SECONDS)


def check_process(container: Container) -> None:
    """Exit with an error if the service has a right that it does not need."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{container.pid}/status").read_text().splitlines())
    user, capabilities = status["Uid"].split()[0], int(status["CapBnd"], 16) | int(status["CapEff"], 16)
    read_only = all(container.execute("python", "-c", f"open('{folder}/x', 'w')") for folder in ("", "/opt", "/etc"))
    networks = Path(f"/proc/{container.pid}/net/dev").read_text().count(":")
    print(f"process             user {user}, capabilities {capabilities}, networks {networks}, read-only {read_only}")
    if user == "0" or capabilities or status["NoNewPrivs"].strip() != "1" or not read_only or networks != 1:
        sys.exit("FAILED: expected a user that is not root, no capability, loopback only and a read-only root.")


def post_scan(token: str, scan: Path, out: Path) -> None:
    """Post a scan and save its mask and preview. This function runs in the network namespace of the container."""
    url = "http://127.0.0.1:8000/v1/scans"
    headers = {"Authorization": f"Bearer {token}", "Prefer": "wait=300"}
    with urllib.request.urlopen(urllib.request.Request(url, scan.read_bytes(), headers)) as answer:
        job = json.load(answer)
    deadline = time.monotonic() + JOB_SECONDS
    while job["state"] in {"queued", "running"} and time.monotonic() < deadline:  # on a busy machine
        time.sleep(1)
        with urllib.request.urlopen(urllib.request.Request(f"{url}/{job['id']}", headers=headers)) as answer:
            job = json.load(answer)
    if job["state"] != "succeeded":
        sys.exit(f"FAILED: expected a job that succeeded, found {job['state']}: {job['problem']}")
    for name in ("mask.nii.gz", "preview.png", "report.json"):
        with urllib.request.urlopen(urllib.request.Request(f"{url}/{job['id']}/{name}", headers=headers)) as answer:
            (out / name).write_bytes(answer.read())
    print(f"job                 {job['state']}, {len(job['findings'])} findings, model {job['model']}")


def check_mask(scan: Path, out: Path) -> None:
    """Compare the mask with that of this machine."""
    detect = [sys.executable, "-c", "from app.cli import main; main()", "detect", str(scan), "-o", str(out / "host")]
    environ = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    subprocess.run(detect, env=environ, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    mask, host = (nib.load(folder / "mask.nii.gz") for folder in (out, out / "host"))
    assert isinstance(mask, nib.Nifti1Image)
    assert isinstance(host, nib.Nifti1Image)
    ours, theirs = (np.asarray(image.dataobj) > 0 for image in (mask, host))
    print(f"mask                {ours.sum()} voxels, {(ours != theirs).sum()} differ from this machine's")
    if not np.array_equal(ours, theirs) or not np.array_equal(mask.affine, host.affine):
        sys.exit("FAILED: expected the mask of this machine.")


def prove(buildah: Buildah, folder: Path, options: argparse.Namespace) -> None:
    """Build the image, run it, and check its results."""
    scan, out = options.scan.resolve(), options.out.resolve()
    image = buildah.build(options.base or buildah.make_base(), options.provider)
    config = json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"]
    container = buildah("from", image)
    root = Path(buildah("mount", container))
    check_contents(root)
    token, bundle = secrets.token_hex(16), folder / "bundle"
    bundle.mkdir()
    write_bundle(bundle, root, config, token)
    with run_container(bundle) as running:
        seconds = running.wait_until_healthy(config["Healthcheck"]["Test"][1:])
        print(f"healthy             after {seconds:.0f} s", flush=True)
        check_process(running)
        again = [sys.executable, __file__, "--scan", str(scan), "--out", str(out), "--token", token]
        enter = ["nsenter", f"--net=/proc/{running.pid}/ns/net"]
        subprocess.run([*enter, *again], env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, check=True)
        status = running.stop()
        print(f"stopped             status {status}")
        if status:  # the kernel ignores a signal that the first process of a container sends itself
            sys.exit("FAILED: expected the status 0.")
    shutil.copy(running.log, out / "log")
    check_mask(scan, out)
    print("PASSED")


def main() -> None:
    """Build the image and run it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.proofs.image", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="base image (default: made by mmdebstrap)")
    parser.add_argument("--provider", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--scan", type=Path, required=True, help="scan to post")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--work", type=Path, help="folder that keeps the base and the layers (default: temporary)")
    parser.add_argument("--token", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.token:  # this program calls itself in the network namespace of the container
        post_scan(options.token, options.scan, options.out)
        return
    if os.geteuid() != 0:
        sys.exit("This program needs root. See --help.")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="image-") as temporary:
        buildah = Buildah((options.work or Path(temporary)).resolve())
        buildah.folder.mkdir(parents=True, exist_ok=True)
        try:
            prove(buildah, Path(temporary), options)
        finally:
            buildah("rm", "--all")


if __name__ == "__main__":
    main()
