"""The files of the page, as a browser gets them."""

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from distributed_llm.api.page import files
from distributed_llm.api.page.files import page_routes

FIRST_VIEW_BYTES = 200_000


@pytest.fixture
def browser() -> Iterator[TestClient]:
    with TestClient(Starlette(routes=page_routes())) as client:
        yield client


def test_the_page_names_only_files_that_are_there(browser: TestClient) -> None:
    page = browser.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["cache-control"] == "no-cache"
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(named) >= 3
    for path in named:
        assert path.startswith("/"), "nothing comes from elsewhere"
        assert browser.get(path).status_code == 200
    assert "<style" not in page.text
    assert re.findall(r"<script(?![^>]* src=)", page.text) == []


def test_every_file_comes_with_strict_headers(browser: TestClient) -> None:
    for path in files.page_files():
        got = browser.get(path)
        policy = got.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert got.headers["x-content-type-options"] == "nosniff"
        assert got.headers["referrer-policy"] == "no-referrer"
        kept = got.headers["cache-control"]
        assert ("immutable" in kept) == path.startswith("/assets/")


def test_files_come_packed_and_whole(browser: TestClient) -> None:
    for path, file in files.page_files().items():
        plain = browser.get(path, headers={"Accept-Encoding": "identity"})
        packed = browser.get(path, headers={"Accept-Encoding": "gzip"})
        assert plain.content == packed.content == file.content
        assert "content-encoding" not in plain.headers
        assert packed.headers.get("content-encoding") == ("gzip" if file.packed else None)
        if file.packed:
            assert gzip.decompress(file.packed) == file.content


def test_a_browser_that_has_a_file_gets_it_no_second_time(browser: TestClient) -> None:
    first = browser.get("/")
    again = browser.get("/", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = browser.get("/", headers={"If-None-Match": '"other"'})
    assert other.status_code == 200


@pytest.mark.parametrize(
    "path", ["/index.htm", "/files.py", "/assets/", "/assets/../../files.py", "/%2e%2e/files.py"]
)
def test_nothing_else_is_served(browser: TestClient, path: str) -> None:
    assert browser.get(path, follow_redirects=False).status_code == 404


def test_the_first_view_is_small() -> None:
    served = files.page_files()
    named = re.findall(r'(?:src|href)="([^"]+)"', served["/"].content.decode())
    fonts = [path for path in served if path.endswith(".woff2")]
    first = [served[path] for path in ["/", *named, *fonts]]
    assert sum(len(file.packed or file.content) for file in first) < FIRST_VIEW_BYTES


def test_an_unbuilt_page_says_how_to_build_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(files, "STATIC", tmp_path)
    with pytest.raises(FileNotFoundError, match="npm ci && npm run build"):
        files.page_files.__wrapped__()
