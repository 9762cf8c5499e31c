"""Build and run of the Docker image without Docker: the Dockerfile's own steps in throw-away copies of a root folder.

Each stage runs in an overlay on a root folder: that of a bare Debian (`--root`, made by debootstrap) or that of this
machine. Nothing that is written outlives the program. Then the image's command runs as the image's user, in a network
namespace with only loopback. It must become healthy and analyse a scan.

    sudo unshare --mount python3 -m tests.proofs.image --scan var/sample/scan.nii.gz
    sudo debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm /srv/bare
    sudo unshare --mount python3 -m tests.proofs.image --root /srv/bare --scan var/sample/scan.nii.gz

This proves that the steps work, that the service needs no network, and that its user has the file permissions that it
needs. It does not test the base image, the layers or a GPU.
"""

# run by hand, as root, on the project's own files

import argparse
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
READY_SECONDS = 180
STOP_SECONDS = 30
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1


@dataclass
class Stage:
    """Stage of the build.

    Attributes
    ----------
    root : Path
    path : str
        PATH of the base image, which contains `python`.
    env, workdir, user, commands
        Values that the instructions have set so far.
    """

    root: Path
    path: str
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "root"
    commands: dict[str, list[str]] = field(default_factory=dict)

    def command(self, words: list[str], **extra: str) -> list[str]:
        """Return the command line that runs `words` in this root, as this user, with only this environment."""
        env = {**self.env, "PATH": self.env.get("PATH", self.path), **extra}
        # chroot looks users and their groups up in the new root.
        enter = ["chroot", f"--userspec={self.user}:{self.user}", str(self.root), "env", "-i"]
        return [*enter, *(f"{k}={v}" for k, v in env.items()), "sh", "-ec", 'cd "$0"; exec "$@"', self.workdir, *words]

    def inside(self, path: str) -> Path:
        """Return a path of the image as a path of this machine."""
        absolute = path if path.startswith("/") else f"{self.workdir}/{path}"
        return self.root / os.path.normpath(absolute).lstrip("/")


def parse_dockerfile(text: str) -> list[tuple[str, str]]:
    """Split a Dockerfile into (keyword, arguments), with continuation lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\s*\n\s*", " ", "\n".join(lines))
    return [(k.upper(), rest.strip()) for k, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


class Build:
    """Build in overlays.

    Parameters
    ----------
    lower : Path
        Root folder that the overlays cover.
    work : Path
        Folder of the overlays.
    provider : {"cpu", "gpu"}
        Build argument PROVIDER.

    Attributes
    ----------
    stages : dict of str to Stage
    """

    def __init__(self, lower: Path, work: Path, provider: str) -> None:
        self._lower, self._work = lower, work
        self._arguments = {"PROVIDER": provider}
        self.stages: dict[str, Stage] = {}
        # The real path, because a virtual environment that is made through a link searches the library in the folder of
        # the link.
        self._python = Path(sys.executable).resolve() if lower == Path("/") else Path("/usr/bin/python3")
        self._path = f"{self._python.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        self._stage = Stage(lower, self._path)

    def execute(self, keyword: str, rest: str) -> None:
        """Execute one instruction."""
        print(f"--> {keyword} {rest[:140]}", flush=True)
        if keyword == "FROM":
            self._start_stage(*re.fullmatch(r"(\S+) AS (\S+)", rest).groups())  # type: ignore[union-attr]
        elif keyword == "RUN":
            # This machine may reach its package index in another way than the image would.
            pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
            command = self._stage.command(["sh", "-ec", rest], HOME="/root", **self._arguments, **pip)
            subprocess.run(command, check=True)
        elif keyword == "COPY":
            self._copy(rest.split())
        elif keyword == "ENV":
            for name, value in re.findall(r"(\w+)=(\S+)", rest):
                self._stage.env[name] = value.replace("$PATH", self._stage.path)
        elif keyword == "WORKDIR":
            self._stage.workdir = rest
            self._stage.inside(rest).mkdir(parents=True, exist_ok=True)
        elif keyword == "USER":
            self._stage.user = rest
        elif keyword in {"ENTRYPOINT", "CMD", "HEALTHCHECK"}:
            self._stage.commands[keyword] = json.loads(rest[rest.index("[") :])
        elif keyword not in {"ARG", "LABEL", "VOLUME", "EXPOSE"}:
            sys.exit(f"The instruction {keyword} is not supported.")

    def _start_stage(self, image: str, name: str) -> None:
        parent = self.stages.get(image.replace("${PROVIDER}", self._arguments["PROVIDER"]))
        root = parent.root if parent else self._mount_overlay(name)
        self._stage = self.stages[name] = Stage(root, self._path, dict(parent.env) if parent else {})

    def _mount_overlay(self, name: str) -> Path:
        """Mount a copy-on-write root with a `python`, as in the base image, and return it."""
        upper, scratch, root = (self._work / name / part for part in ("upper", "work", "root"))
        for folder in (upper, scratch, root):
            folder.mkdir(parents=True)
        options = f"lowerdir={self._lower},upperdir={upper},workdir={scratch}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(root)], check=True)
        subprocess.run(["mount", "--bind", "/dev", str(root / "dev")], check=True)
        subprocess.run(["mount", "-t", "proc", "proc", str(root / "proc")], check=True)
        # The image's user must reach the interpreter, which may be in a home folder.
        for parent in self._python.parents:
            inside = root / parent.relative_to("/")
            inside.chmod(inside.stat().st_mode | 0o111)
        python = root / self._python.relative_to("/").with_name("python")
        if not python.exists():
            python.symlink_to(self._python.name)
        if self._lower != Path("/"):
            shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
        return root

    def _copy(self, words: list[str]) -> None:
        source_root = CHECKOUT
        if words[0].startswith("--from="):
            source_root = self.stages[words.pop(0).removeprefix("--from=")].root
        *sources, target = words
        for source in sources:
            here, there = source_root / source.lstrip("/"), self._stage.inside(target)
            if here.is_dir():
                ignore = shutil.ignore_patterns("__pycache__") if source_root == CHECKOUT else None
                shutil.copytree(here, there, symlinks=True, ignore=ignore, dirs_exist_ok=True)
            else:
                shutil.copy(here, there / here.name if target.endswith("/") else there)


def enable_loopback() -> None:
    """Enable the interface `lo` of a new network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


def run_image(stage: Stage, scan: Path) -> None:
    """Run the image's command until it is healthy, analyse a scan, and stop it."""
    enable_loopback()
    token = secrets.token_hex(16)
    words = stage.commands["ENTRYPOINT"] + stage.commands["CMD"]
    with tempfile.TemporaryFile() as log:
        command = stage.command(words, COUNTERPART_TOKEN=token, HOME=stage.workdir)
        service = subprocess.Popen(command, stdout=log, stderr=log)
        check = stage.command(stage.commands["HEALTHCHECK"])
        try:
            start = time.monotonic()
            while subprocess.run(check, check=False, capture_output=True).returncode:
                if service.poll() is not None or time.monotonic() - start > READY_SECONDS:
                    log.seek(0)
                    sys.exit(f"The service did not become ready. The end of its log:\n{log.read().decode()[-4000:]}")
                time.sleep(1)
            print(f"healthy after {time.monotonic() - start:.0f} s, without a network")
            post_scan(stage, service.pid, token, scan)
        finally:
            service.terminate()
            service.wait(STOP_SECONDS)


def post_scan(stage: Stage, pid: int, token: str, scan: Path) -> None:
    """Post a scan and exit with an error if it is not analysed or the service runs as root."""
    headers = {"Authorization": f"Bearer {token}", "Prefer": "wait=300"}
    url = f"http://127.0.0.1:{stage.env['COUNTERPART_PORT']}/v1/scans"
    with urllib.request.urlopen(urllib.request.Request(url, scan.read_bytes(), headers)) as answer:
        job = json.load(answer)
    user = Path(f"/proc/{pid}/status").read_text().split("Uid:")[1].split()[0]
    print(f"user id {user}, job {job['state']}, {len(job.get('findings') or [])} findings")
    if job["state"] != "succeeded" or user == "0":
        sys.exit("FAILED: expected a job that succeeded and a user that is not root.")


def main() -> None:
    """Build the image and run it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.proofs.image", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("/"), help="root of a bare Debian (default: this machine)")
    parser.add_argument("--provider", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--scan", type=Path, required=True, help="scan to post")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:  # this program calls itself in a new network namespace
        stage = json.loads(options.run)
        run_image(Stage(**{**stage, "root": Path(stage["root"])}), options.scan)
        return
    if os.geteuid() != 0:
        sys.exit("This program needs root and a separate mount namespace. See --help.")
    with tempfile.TemporaryDirectory(prefix="image-") as work:
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", work], check=True)
        build = Build(options.root.resolve(), Path(work), options.provider)
        try:
            for keyword, rest in parse_dockerfile((CHECKOUT / "Dockerfile").read_text()):
                build.execute(keyword, rest)
            runtime = build.stages["runtime"]
            stage = json.dumps({**vars(runtime), "root": str(runtime.root)})
            again = [sys.executable, __file__, "--scan", str(options.scan), "--run", stage]
            subprocess.run(["unshare", "--net", *again], check=True)
        finally:
            subprocess.run(["umount", "--recursive", "--lazy", work], check=False)


if __name__ == "__main__":
    main()
