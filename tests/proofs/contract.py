"""Proof: the answers of a running service conform to its OpenAPI document, as tested by schemathesis.

    python -m tests.proofs.contract --examples 50

No call may end in a 5xx, or in a status or a body that the document does not contain.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.proofs.deployment import deploy, run_proof

CHECKOUT = Path(__file__).resolve().parents[2]
# The check for negative answers is left out, because random bytes can begin like a scan and then fail as jobs.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
)


def prove(folder: Path, *, examples: int = 50, seed: int = 0) -> bool:
    """Run schemathesis against one process with an empty store, and return whether all checks passed."""
    with deploy(folder / "contract", queue_limit="100000") as deployment:
        service = deployment.start("serve")
        service.wait_until_ready()
        command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{service.url}/openapi.json"]
        options = ["--checks", ",".join(CHECKS), "--max-examples", str(examples), "--seed", str(seed)]
        phases = ["--phases", "examples,coverage,fuzzing", "--request-timeout", "120", "--no-color"]
        environ = os.environ | {"SCHEMATHESIS_HOOKS": "tests.proofs.schemathesis_hooks", "PYTHONPATH": str(CHECKOUT)}
        return subprocess.run([*command, *options, *phases], cwd=folder, env=environ, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(run_proof(prove, __doc__))
