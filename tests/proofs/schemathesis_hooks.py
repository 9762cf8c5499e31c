"""Extension of schemathesis for `tests.proofs.contract`: bodies of multipart/related are sent as they are."""

import schemathesis


@schemathesis.serializer("multipart/related")
def send_bytes(_context: object, value: object) -> bytes:
    """Return a generated body as bytes."""
    return value if isinstance(value, bytes) else str(value).encode()
