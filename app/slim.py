"""Imports that a command line need not wait for."""

import sys


def import_nibabel() -> None:
    """Import nibabel as if pydicom were not installed: it would import it, and requests and GDCM through it.

    A sixth of what the processor does before the first network evaluation of a NIfTI file. It wants it for DICOM
    headers inside NIfTI files, which nothing here looks at; DICOM files are read by pydicom itself, imported then.
    """
    if "nibabel" in sys.modules or "pydicom" in sys.modules:
        return
    sys.modules["pydicom"] = None  # type: ignore[assignment]  # documented: an import of it fails
    try:
        import nibabel  # noqa: F401, PLC0415
    finally:
        del sys.modules["pydicom"]
