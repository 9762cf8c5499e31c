"""Files of weights: whether each is the one that its manifest names; several at once."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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


def side_by_side(provider: str, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the tasks give, or the error of the first of them that has one.

    Hashing, opening and evaluating let go of the interpreter's lock. On CUDA one after the other: while one thread
    captures a CUDA graph, none may allocate.
    """
    with ThreadPoolExecutor(1 if provider == "cuda" else len(tasks)) as pool:
        return [done.result() for done in [pool.submit(task) for task in tasks]]
