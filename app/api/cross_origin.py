"""Cross-origin resource sharing: the web pages of listed origins may call the API.

The pages send their token in the header Authorization. Cookies are not accepted from another origin.
"""

from collections.abc import Collection

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

ALLOWED_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
REQUEST_HEADERS = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "If-None-Match",
    "If-Range",
    "Last-Event-ID",
    "Prefer",
    "Range",
)
RESPONSE_HEADERS = (
    "Accept-Ranges",
    "Content-Disposition",
    "Content-Range",
    "ETag",
    "Location",
    "Preference-Applied",
    "Retry-After",
    "WWW-Authenticate",
)
# Seconds that a browser keeps the answer to a preflight request.
PREFLIGHT_SECONDS = 600


def allow_origins(app: FastAPI, origins: Collection[str]) -> None:
    """Let browsers give the answers of an application to the pages of these origins."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=sorted(origins),
        allow_methods=ALLOWED_METHODS,
        allow_headers=REQUEST_HEADERS,
        expose_headers=RESPONSE_HEADERS,
        max_age=PREFLIGHT_SECONDS,
    )
