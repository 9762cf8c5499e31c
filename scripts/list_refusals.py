#!/usr/bin/env python3
"""What each real file and series of the DICOM archives is answered with, as a Markdown table.

    python -m scripts.list_refusals

Below COUNTERPART_DATA (default ../shared/data). A folder of one series is one row, and so is every file
of a folder that holds examples of all sorts.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from app.errors import CounterpartError
from app.ingest import read
from training.archives import unpack

# Folders whose files have nothing to do with each other.
OF_ALL_SORTS = ("pydicom", "pydicom-data", "transfer_syntax")


def inputs(root: Path) -> Iterator[Path]:
    """What is sent: the folders of series, and single files."""
    for folder in sorted(path for path in root.rglob("*") if path.is_dir()):
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if folder.name in OF_ALL_SORTS:
            yield from files
        elif files and folder.parent != root:
            yield folder


def main() -> None:
    """Print the table."""
    data = Path(os.environ.get("COUNTERPART_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    print("| input | answer | what was found |")
    print("| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        root, scratch = Path(folder) / "archives", Path(folder) / "scratch"
        for path in sorted((data / "dicom").glob("*.tar.xz")):
            unpack(path, root / path.name.split("_")[0])
        for path in inputs(root):
            try:
                shape = read(path, scratch=scratch).volume.shape
                code, found = "read", " x ".join(map(str, shape))
            except CounterpartError as error:
                code, found = f"`{error.code}`", error.found
            print(f"| {path.relative_to(root)} | {code} | {found} |", flush=True)


if __name__ == "__main__":
    main()
