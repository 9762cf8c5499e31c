#!/usr/bin/env python3
"""Schemathesis over the OpenAPI document of a running service: what it answers is what the document says.

    python -m scripts.prove_contract --examples 50

No call may end in a 5xx, in a status or a body that the document does not name, or in an answer where a
negative one was due.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.fleet import fleet

# Bytes that happen to begin as a scan does are analysed and fail as jobs: not what this looks at.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
)


def prove(folder: Path, examples: int, seed: int) -> bool:
    """Run it against one process with an empty store; its report goes to standard output."""
    with fleet(folder / "contract", queue_limit="100000") as service:
        node = service.start("serve")
        node.wait_until_ready()
        command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{node.base}/openapi.json"]
        options = ["--checks", ",".join(CHECKS), "--max-examples", str(examples), "--seed", str(seed)]
        phases = ["--phases", "examples,coverage,fuzzing", "--request-timeout", "120", "--no-color"]
        return subprocess.run([*command, *options, *phases], cwd=folder, check=False).returncode == 0


def main() -> int:
    """Parse, prove, leave with 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="counterpart-contract-") as folder:
        well = prove(Path(folder), wanted.examples, wanted.seed)
    print("PROVED" if well else "FAILED")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
