"""An upload while it is received."""

import hashlib
from pathlib import Path
from typing import IO

# What a format is can be told from this many leading bytes (DICOM's magic ends at 132, NIfTI's at 348).
HEAD_BYTES = 1024


class Incoming:
    """An upload while it is received: files of unknown names, hashed on their way to the disk.

    Attributes
    ----------
    folder : Path
        Holds 000000, 000001, ...
    heads : list of bytes
        First bytes of each file.
    size : int
        Bytes of all files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.heads: list[bytes] = []
        self.size = 0
        self._digests: list[str] = []
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()

    def begin(self) -> None:
        """Start the next file."""
        self._file = (self.folder / f"{len(self.heads):06d}").open("wb")
        self._hash = hashlib.sha256()
        self.heads.append(b"")

    def write(self, data: bytes) -> None:
        """Add to the current file."""
        assert self._file is not None
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)
        missing = HEAD_BYTES - len(self.heads[-1])
        if missing > 0:
            self.heads[-1] += data[:missing]

    def end(self) -> None:
        """Finish the current file."""
        self.close()
        self._digests.append(self._hash.hexdigest())

    def close(self) -> None:
        """Let go of the current file, finished or not."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def digest(self) -> str:
        """SHA-256 over the files' own, whatever their order: slices may be sent in any."""
        return hashlib.sha256("".join(sorted(self._digests)).encode()).hexdigest()
