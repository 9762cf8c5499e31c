#!/usr/bin/env python3
"""Replay the Dockerfile without an engine: its own RUN and COPY lines, in throw-away copies of a root.

Every stage gets an overlay over a root folder: of a bare Debian (`--root`, as debootstrap makes it),
or of this machine, where nothing that is written outlives the replay. Then the image's own command
runs as its own user, in a network namespace with nothing but loopback; its health check is asked,
and a scan is posted.

    sudo unshare --mount python3 scripts/replay_image.py --scan var/sample/scan.nii.gz
    sudo debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm /srv/bare
    sudo unshare --mount python3 scripts/replay_image.py --root /srv/bare --scan var/sample/scan.nii.gz

It shows that the steps work, that the service needs no network, and that its user may read and write
what it must. It shows nothing of the base image, of layers, or of a GPU.
"""

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

CHECKOUT = Path(__file__).resolve().parents[1]
READY_SECONDS = 180
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1


@dataclass
class Stage:
    """A stage of the build: its root and what the instructions set so far."""

    root: Path
    path: str  # of the base image, where `python` is found
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "root"
    commands: dict[str, list[str]] = field(default_factory=dict)

    def run(self, words: list[str], **extra: str) -> list[str]:
        """Make the command line that runs words in this root, as this user, with this environment alone."""
        path = self.env.get("PATH", self.path)
        env = {**self.env, "PATH": path, **extra}
        # chroot knows users of the new root by name, and their groups.
        enter = ["chroot", f"--userspec={self.user}:{self.user}", str(self.root), "env", "-i"]
        return [*enter, *(f"{k}={v}" for k, v in env.items()), "sh", "-ec", 'cd "$0"; exec "$@"', self.workdir, *words]


def instructions(text: str) -> list[tuple[str, str]]:
    """Split a Dockerfile into (keyword, rest), continuation lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\s*\n\s*", " ", "\n".join(lines))
    return [(k.upper(), rest.strip()) for k, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


class Replay:
    """The state of a replay: stages by name, and build arguments."""

    def __init__(self, lower: Path, work: Path, provider: str) -> None:
        self.lower, self.work = lower, work
        self.arguments = {"PROVIDER": provider}
        self.stages: dict[str, Stage] = {}
        # Its own folder, not a link elsewhere: an environment made through a link looks for its library beside it.
        self.python = Path(sys.executable).resolve() if lower == Path("/") else Path("/usr/bin/python3")
        self.path = f"{self.python.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        self.stage = Stage(lower, self.path)

    def step(self, keyword: str, rest: str) -> None:
        """Carry out one instruction."""
        sys.stdout.write(f"--> {keyword} {rest[:140]}\n")
        sys.stdout.flush()
        if keyword == "FROM":
            self._from(*re.fullmatch(r"(\S+) AS (\S+)", rest).groups())  # type: ignore[union-attr]
        elif keyword == "RUN":
            arguments = self.arguments | _pip_environment()
            subprocess.run(self.stage.run(["sh", "-ec", rest], HOME="/root", **arguments), check=True)
        elif keyword == "COPY":
            self._copy(rest.split())
        elif keyword == "ENV":
            for name, value in re.findall(r"(\w+)=(\S+)", rest):
                self.stage.env[name] = value.replace("$PATH", self.stage.path)
        elif keyword == "WORKDIR":
            self.stage.workdir = rest
            self._inside(rest).mkdir(parents=True, exist_ok=True)
        elif keyword == "USER":
            self.stage.user = rest
        elif keyword in {"ENTRYPOINT", "CMD", "HEALTHCHECK"}:
            self.stage.commands[keyword] = json.loads(rest[rest.index("[") :])
        elif keyword not in {"ARG", "LABEL", "VOLUME", "EXPOSE"}:
            sys.exit(f"{keyword}: this replay does not know it")

    def _from(self, image: str, name: str) -> None:
        image = image.replace("${PROVIDER}", self.arguments["PROVIDER"])
        parent = self.stages.get(image)
        root = parent.root if parent else self._overlay(name)
        self.stage = self.stages[name] = Stage(root, self.path, dict(parent.env) if parent else {})

    def _overlay(self, name: str) -> Path:
        """A copy-on-write root in which `python` is what the base image has under that name."""
        upper, scratch, root = (self.work / name / part for part in ("upper", "work", "root"))
        for folder in (upper, scratch, root):
            folder.mkdir(parents=True)
        options = f"lowerdir={self.lower},upperdir={upper},workdir={scratch}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(root)], check=True)
        subprocess.run(["mount", "--bind", "/dev", str(root / "dev")], check=True)
        subprocess.run(["mount", "-t", "proc", "proc", str(root / "proc")], check=True)
        for parent in self.python.parents:  # an interpreter in a home folder: let the image's user reach it
            inside = root / parent.relative_to("/")
            inside.chmod(inside.stat().st_mode | 0o111)
        python = root / self.python.relative_to("/").with_name("python")
        if not python.exists():
            python.symlink_to(self.python.name)
        if self.lower != Path("/"):
            shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
        return root

    def _copy(self, words: list[str]) -> None:
        source_root = CHECKOUT
        if words[0].startswith("--from="):
            source_root = self.stages[words.pop(0).removeprefix("--from=")].root
        *sources, target = words
        for source in sources:
            here, there = source_root / source.lstrip("/"), self._inside(target)
            if here.is_dir():
                ignore = shutil.ignore_patterns("__pycache__") if source_root == CHECKOUT else None
                shutil.copytree(here, there, symlinks=True, ignore=ignore, dirs_exist_ok=True)
            else:
                shutil.copy(here, there / here.name if target.endswith("/") else there)

    def _inside(self, path: str) -> Path:
        return self.stage.root / os.path.normpath(f"{self.stage.workdir}/{path}" if path[0] != "/" else path).lstrip(
            "/"
        )


def _pip_environment() -> dict[str, str]:
    """How this machine's pip reaches its index; the image would use the default."""
    return {name: value for name, value in os.environ.items() if name.startswith("PIP_")}


def loopback_up() -> None:
    """Bring up `lo` in a fresh network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


def serve_and_post(stage: Stage, scan: Path) -> None:
    """Start the image's command, wait until it is healthy, post a scan, print the answer, stop it."""
    loopback_up()
    token = secrets.token_hex(16)
    command = stage.commands["ENTRYPOINT"] + stage.commands["CMD"]
    with tempfile.TemporaryFile() as log:
        words = stage.run(command, COUNTERPART_TOKEN=token, HOME=stage.workdir)
        service = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            start = time.monotonic()
            while subprocess.run(stage.run(stage.commands["HEALTHCHECK"]), check=False, capture_output=True).returncode:
                if service.poll() is not None or time.monotonic() - start > READY_SECONDS:
                    log.seek(0)
                    sys.exit(f"the service did not become ready:\n{log.read().decode()[-4000:]}")
                time.sleep(1)
            sys.stdout.write(f"healthy after {time.monotonic() - start:.0f} s, with no network but loopback\n")
            post(stage, service.pid, token, scan)
        finally:
            service.terminate()
            service.wait(30)


def post(stage: Stage, pid: int, token: str, scan: Path) -> None:
    """Send a scan as any client would, and leave with an error where the answer is no result."""
    headers = {"Authorization": f"Bearer {token}", "Prefer": "wait=300"}
    url = f"http://127.0.0.1:{stage.env['COUNTERPART_PORT']}"
    request = urllib.request.Request(f"{url}/v1/scans", scan.read_bytes(), headers)
    with urllib.request.urlopen(request) as answer:
        job = json.load(answer)
    user = Path(f"/proc/{pid}/status").read_text().split("Uid:")[1].split()[0]
    sys.stdout.write(f"uid {user}; job {job['state']}; {len(job.get('findings') or [])} findings\n")
    if job["state"] != "succeeded" or user == "0":
        sys.exit("not what the image promises")


def main() -> None:
    """Replay the build, then run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("/"), help="bare Debian root; this machine's by default")
    parser.add_argument("--provider", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--scan", type=Path, required=True, help="posted when it is ready")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:  # the second life, in its own network namespace
        serve_and_post(Stage(**{**(state := json.loads(options.serve)), "root": Path(state["root"])}), options.scan)
        return
    if os.geteuid() != 0:
        sys.exit("needs root, and a mount namespace of its own: see --help")
    with tempfile.TemporaryDirectory(prefix="replay-") as work:
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", work], check=True)
        replay = Replay(options.root.resolve(), Path(work), options.provider)
        try:
            for keyword, rest in instructions((CHECKOUT / "Dockerfile").read_text()):
                replay.step(keyword, rest)
            state = json.dumps({**vars(replay.stages["runtime"]), "root": str(replay.stages["runtime"].root)})
            again = [sys.executable, __file__, "--scan", str(options.scan), "--serve", state]
            subprocess.run(["unshare", "--net", *again], check=True)
        finally:
            subprocess.run(["umount", "--recursive", "--lazy", work], check=False)


if __name__ == "__main__":
    main()
