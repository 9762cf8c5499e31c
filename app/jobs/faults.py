"""Faults of the service: errors that a scan did not cause, so that its job is tried again later."""

import errno

from app.errors import (
    CounterpartError,
    DamagedBundle,
    DatabaseUnavailable,
    NotReady,
    ProviderUnavailable,
    StoreFull,
    StoreUnavailable,
)

# Errors whose cause is the service and not the scan.
SERVICE_ERRORS = (DamagedBundle, DatabaseUnavailable, NotReady, ProviderUnavailable, StoreFull, StoreUnavailable)

FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
NO_FILES = {errno.EMFILE, errno.ENFILE}
BROKEN_DISK = {
    *(errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENODEV, errno.ENXIO),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH),  # of a network file system
}


class ServiceFault(BaseException):
    """Stop of an attempt by a fault of the service.

    Not an Exception, so that DBOS does not record it as the outcome of a step or a job.

    Parameters
    ----------
    error : CounterpartError
        The fault.
    """

    def __init__(self, error: CounterpartError) -> None:
        super().__init__(error.code)
        self.error = error


def find_service_fault(error: BaseException) -> CounterpartError | None:
    """Return the fault of the service that caused an exception, or None if the scan may be the cause.

    A reader may replace the error of a disk by "the file is damaged", so the exceptions that an exception replaced
    count, too.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and (fault := _fault_of_system(seen)) is not None:
            return fault
        seen = seen.__cause__ or seen.__context__
    return error if isinstance(error, SERVICE_ERRORS) else None


def _fault_of_system(error: OSError) -> CounterpartError | None:
    name = errno.errorcode.get(error.errno or 0, "")
    if error.errno in FULL_DISK:
        return StoreFull(
            f"A file of the job could not be written ({name}).",
            expected="free disk space.",
            advice="Free disk space. The scan is tried again.",
        )
    if error.errno in NO_FILES:
        return NotReady(
            f"The process could not open a file ({name}).",
            expected="a limit on open files that is higher than the number of open files.",
            advice="Raise the limit on open files (ulimit -n, LimitNOFILE=). The scan is tried again.",
        )
    if error.errno in BROKEN_DISK:
        return StoreUnavailable(
            f"A file of the job could not be read or written ({name}).",
            expected="a disk that this user can read and write.",
            advice="Check COUNTERPART_STORE, COUNTERPART_SCRATCH and their disk. The scan is tried again.",
        )
    return None
