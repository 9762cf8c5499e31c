"""/, /scans/{id}, /models, /embed/{id} and /web/{path}: the dashboard. Its files contain no patient data.

The pages need no token: they get all data from the API, which checks it. The files are served as they are, and their
URLs are relative, so that they work under every path prefix of a proxy.
"""

import gzip
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from os.path import isfile
from pathlib import Path

from fastapi import APIRouter, Request, Response

from app.api.dependencies import ServicesDependency
from app.errors import NotFound

WEB_FOLDER = Path(__file__).resolve().parents[1] / "web"
# Types of the files of the dashboard. The table of the operating system is not used, because it may name others.
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".md": "text/markdown; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
    ".woff2": "font/woff2",
}
# Files that are compressed already.
INCOMPRESSIBLE = frozenset({".png", ".woff2"})
# Compressed assets in memory: more than the dashboard has.
CACHED_ASSETS = 256

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors {ancestors}"
)
PAGE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class Asset:
    """A file of the dashboard.

    Attributes
    ----------
    content : bytes
    compressed : bytes or None
        The content as a gzip stream. None if that is not smaller.
    media_type : str
    etag : str
        Hash of the content.
    """

    content: bytes
    compressed: bytes | None
    media_type: str
    etag: str


@router.api_route("/", methods=["GET", "HEAD"])
def show_worklist(request: Request) -> Response:
    """Show the worklist."""
    return _send_page(request, "index.html")


@router.api_route("/scans/{job}", methods=["GET", "HEAD"])
def show_viewer(request: Request) -> Response:
    """Show the viewer. Its script gets the job from the API, and shows an error if the job does not exist."""
    return _send_page(request, "viewer.html")


@router.api_route("/scans/{job}/print", methods=["GET", "HEAD"])
def show_printable_report(request: Request) -> Response:
    """Show the report of a scan for printing."""
    return _send_page(request, "print.html")


@router.api_route("/embed/{job}", methods=["GET", "HEAD"])
def show_embedded_viewer(request: Request, services: ServicesDependency) -> Response:
    """Show the viewer inside a page of one of the listed origins."""
    return _send_page(request, "viewer.html", services.settings.allowed_origins)


@router.api_route("/models", methods=["GET", "HEAD"])
def show_models(request: Request) -> Response:
    """Show the installed models."""
    return _send_page(request, "models.html")


@router.api_route("/web/{path:path}", methods=["GET", "HEAD"])
def send_asset(request: Request, path: str) -> Response:
    """Send a script, a style sheet or an image of the pages."""
    return _send(request, path, {})


def _send_page(request: Request, name: str, ancestors: Iterable[str] = ()) -> Response:
    policy = CONTENT_SECURITY_POLICY.format(ancestors=" ".join(sorted(ancestors)) or "'none'")
    return _send(request, name, PAGE_HEADERS | {"Content-Security-Policy": policy})


def _send(request: Request, name: str, headers: dict[str, str]) -> Response:
    """Return the response with a file, compressed if the caller accepts that, or 304 if the caller has it.

    Raises
    ------
    NotFound
        The dashboard has no such file.
    """
    asset = find_asset(name)
    headers = {**headers, "ETag": asset.etag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
    known = re.split(r"\s*,\s*", request.headers.get("if-none-match", "").replace("W/", ""))
    if asset.etag in known:
        return Response(status_code=304, headers=headers)
    if asset.compressed is not None and _accepts_gzip(request.headers.get("accept-encoding", "")):
        # The ETag is weak: it is that of both forms of the content.
        headers |= {"Content-Encoding": "gzip", "ETag": f"W/{asset.etag}"}
        return Response(asset.compressed, headers=headers, media_type=asset.media_type)
    return Response(asset.content, headers=headers, media_type=asset.media_type)


def _accepts_gzip(accepted: str) -> bool:
    return re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", accepted) is not None


def find_asset(name: str) -> Asset:
    """Return a file of the dashboard.

    Parameters
    ----------
    name : str
        Path below the folder of the dashboard, from the URL.

    Raises
    ------
    NotFound
        No file of the dashboard has this name.
    """
    # `Path.is_file` raises an error for a name that is too long.
    path = (WEB_FOLDER / name).resolve()
    if path.suffix not in MEDIA_TYPES or not path.is_relative_to(WEB_FOLDER) or not isfile(path):  # noqa: PTH113
        raise NotFound("The dashboard has no such file.", expected="a path of its pages.", advice="Check the URL.")
    return _read_asset(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=CACHED_ASSETS)
def _read_asset(path: Path, changed: int) -> Asset:  # noqa: ARG001  # a changed file is another key of the cache
    content = path.read_bytes()
    compressed = None if path.suffix in INCOMPRESSIBLE else gzip.compress(content, mtime=0)
    if compressed is not None and len(compressed) >= len(content):
        compressed = None
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return Asset(content, compressed, MEDIA_TYPES[path.suffix], etag)
