"""Whether a file of a folder of weights is the one that its manifest names."""

import hashlib
from pathlib import Path

from app.errors import DamagedBundle
from app.manifest import File


def check_hash(folder: Path, file: File, advice: str) -> None:
    """See that a file is there and unchanged.

    Raises
    ------
    DamagedBundle
        It is missing, or another one.
    """
    path = folder / file.name
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    if found != file.sha256:
        raise DamagedBundle(
            f"{folder.name}/{file.name} " + ("is missing." if found is None else "is not the file of the manifest."),
            expected=f"SHA-256 {file.sha256[:12]}...",
            advice=advice,
        )
