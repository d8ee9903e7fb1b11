"""Serves the files of the page from memory, with the headers that keep a browser strict."""

import gzip
import mimetypes
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

STATIC = Path(__file__).parent / "static"
"""What `npm run build` in `web/` has made of it."""

HASHED = "assets"
"""Folder of the files whose names change with their content: a browser may keep them for ever."""

SECURITY_HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'self'",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
            "object-src 'none'",
        )
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every file: nothing from elsewhere, no inline scripts, in nobody's frame."""

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
"""Not what the machine's registry says: on some a script is `text/plain`, which browsers refuse."""

_PACKED = frozenset({".css", ".html", ".js", ".svg"})


@dataclass(frozen=True)
class PageFile:
    """One file of the page.

    Attributes:
        packed: its content as gzip; None if it is as small without.
        etag: changes with the content.
    """

    media_type: str
    content: bytes
    packed: bytes | None
    etag: str
    cache_control: str


@cache
def page_files() -> dict[str, PageFile]:
    """Return the files by their path in URLs, with "/" for the page itself.

    Raises:
        FileNotFoundError: the page was not built.
    """
    if not (STATIC / "index.html").is_file():
        raise FileNotFoundError(
            f"There is no page in {STATIC}: it was not built. "
            "Run `npm ci && npm run build` in web/."
        )
    found = sorted(path for path in STATIC.rglob("*") if path.is_file())
    files = {f"/{path.relative_to(STATIC).as_posix()}": _read(path) for path in found}
    files["/"] = files.pop("/index.html")
    return files


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    guessed = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    is_hashed = path.parent.name == HASHED
    return PageFile(
        media_type=_TYPES.get(path.suffix, guessed),
        content=content,
        packed=gzip.compress(content, mtime=0) if path.suffix in _PACKED else None,
        etag=f'"{sha256(content).hexdigest()[:32]}"',
        cache_control="public, max-age=31536000, immutable" if is_hashed else "no-cache",
    )


def page_routes() -> list[BaseRoute]:
    """Return one route for each file of the page; they need no key, for they hold no secret.

    Raises:
        FileNotFoundError: the page was not built.
    """
    return [
        Route(path, _serve, methods=["GET"], name=f"page:{path}", include_in_schema=False)
        for path in page_files()
    ]


async def _serve(request: Request) -> Response:
    file = page_files()[request.url.path]
    headers = {**SECURITY_HEADERS, "Cache-Control": file.cache_control, "ETag": file.etag}
    if file.packed is not None:
        headers["Vary"] = "Accept-Encoding"
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    content = file.content
    if file.packed is not None and "gzip" in request.headers.get("accept-encoding", ""):
        headers["Content-Encoding"] = "gzip"
        content = file.packed
    return Response(content, headers=headers, media_type=file.media_type)
