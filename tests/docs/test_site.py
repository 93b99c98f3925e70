"""The site is built as `make docs` builds it, whole and without a network."""

import dataclasses
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("video", "src")}


class Resources(HTMLParser):
    """Collects what a browser fetches to show a page; links that a reader may follow are not among it."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if (tag, name) in LOADED]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    alone = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def test_every_page_is_there(site):
    pages = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.name for path in site.iterdir()}


def test_a_browser_fetches_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    for page in pages:
        resources = Resources()
        resources.feed(page.read_text(encoding="utf-8"))
        assert len(resources.found) > 2  # a style sheet, a script and an icon
        assert [url for url in resources.found if re.match("(https?:)?//", url)] == [], page.name
    for sheet in site.rglob("*.css"):
        fetched = re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")]*)", sheet.read_text(encoding="utf-8"))
        assert fetched == [], sheet.name


def test_the_api_page_describes_the_public_names(site):
    import neuronet_jax

    text = (site / "api.html").read_text(encoding="utf-8")
    for name in set(neuronet_jax.__all__) - {"PROTOCOLS"}:
        assert re.search(rf'id="neuronet_jax\.([a-z_.]+\.)?{name}"', text), name


def test_the_api_page_lists_the_options():
    from neuronet_jax import Options

    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", text, re.MULTILINE)
    assert listed == [(field.name, str(field.default)) for field in dataclasses.fields(Options)]


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_links_of_the_front_page_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(targets) > 8
    assert [target for target in targets if not (ROOT / target).exists()] == []
