"""Search path of external programs, without virtual environments.

pynetdicom installs `storescu`, `echoscu` and others into the environment of the developer. If this environment is
active, the search path finds them before those of dcmtk, which the tests are written for.
"""

import os
from pathlib import Path


def without_environments(path: str) -> str:
    """Return a search path without the folders of virtual environments."""
    folders = path.split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not (Path(folder).parent / "pyvenv.cfg").is_file())


def leave_environments() -> None:
    """Remove the folders of virtual environments from the search path of this process and of its children."""
    os.environ["PATH"] = without_environments(os.environ.get("PATH", os.defpath))
