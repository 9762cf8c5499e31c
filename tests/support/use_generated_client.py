"""Use a generated API client as an integrator would: send a scan, and fetch every result.

Runs in the environment of the generator: it imports nothing but the client and what the client needs.

    COUNTERPART_TOKEN=... python use_generated_client.py BASE_URL SCAN OUT

Writes each result to OUT, and `answers.json` with the other answers.
"""

import json
import os
import sys
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

RESULT_PREFIX, RESULT_SUFFIXES = "get_", ("_nii_gz", "_json", "_png", "_dcm")
SECONDS = 300


def main(url: str, scan: Path, out: Path) -> None:
    """Send a scan in both forms, fetch its results, and use the other operations."""
    types, models = import_module("counterpart_client.types"), import_module("counterpart_client.models")
    client = import_module("counterpart_client").AuthenticatedClient(
        base_url=url, token=os.environ["COUNTERPART_TOKEN"], timeout=SECONDS, raise_on_unexpected_status=True
    )

    def call(name: str, *arguments: object, tag: str = "scans", **options: object) -> Any:
        operation = import_module(f"counterpart_client.api.{tag}.{name}")
        return operation.sync(*arguments, client=client, **options)

    file = types.File(payload=BytesIO(scan.read_bytes()), file_name="scan.zip")
    job = call("send_scan", body=models.SendScanFilesBody(file=[file]), prefer=f"wait={SECONDS}")
    answers: dict[str, Any] = {"job": job.to_dict(), "results": {}}
    raw = types.File(payload=BytesIO(scan.read_bytes()))
    answers["same job"] = call("send_scan", body=raw, prefer=f"wait={SECONDS}").to_dict()
    answers["shown"] = call("get_scan", job.id).to_dict()
    answers["listed"] = [scan.id for scan in call("list_scans", limit=5).scans]
    answers["events"] = call("follow_scan", job.id)
    answers["unknown job"] = call("get_scan", "00000000-0000-4000-8000-000000000000").to_dict()
    answers["bad limit"] = call("list_scans", limit=0).to_dict()
    answers["cancelled"] = call("cancel_scan", job.id).to_dict()
    answers["model"] = call("get_model", job.model, tag="models").manifest.name
    answers["ready"] = call("get_readiness", tag="health").status
    answers["metrics"] = call("get_metrics", tag="health")
    for module in sorted(Path(import_module("counterpart_client.api.scans").__path__[0]).glob("get_*.py")):
        suffix = next((suffix for suffix in RESULT_SUFFIXES if module.stem.endswith(suffix)), None)
        if suffix:
            name = module.stem.removeprefix(RESULT_PREFIX).removesuffix(suffix) + suffix.replace("_", ".")
            answers["results"][name] = store(call(module.stem, job.id), out / name)
    answers["erased"] = call("erase_scan", job.id)
    (out / "answers.json").write_text(json.dumps(answers))


def store(answer: Any, path: Path) -> str:
    """Write a result, and return the name of its class, or the code of a problem."""
    kind = type(answer).__name__
    if kind == "Problem":
        return str(answer.code)
    path.write_bytes(answer.payload.read() if kind == "File" else json.dumps(answer.to_dict()).encode())
    return kind


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
