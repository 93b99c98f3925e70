"""Every command in README.md and the pages is run by the program that it names, on tiny files."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"bash", "python", "text"}  # of fenced blocks: run, run, and shown only


@pytest.mark.filterwarnings("default")  # what a tiny network deserves
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_tells_to_run_runs(page, workplace, shell, read_blocks, tmp_path, monkeypatch):
    place = tmp_path / "place"
    shutil.copytree(workplace.folder, place)
    monkeypatch.chdir(place)
    names: dict = {}
    for block in read_blocks(page.read_text(encoding="utf-8")):
        assert block.language in LANGUAGES, f"{page.name}:{block.line}: a block is one of {LANGUAGES}"
        if block.language == "python":
            exec(compile(block.text, f"{page.name}:{block.line}", "exec"), names)
        if block.language == "bash":
            for command in block.commands():
                try:
                    shell(command)
                except BaseException as error:
                    error.add_note(f"{page.name}:{block.line}: {command}")
                    raise


def test_the_pages_show_commands(read_blocks):
    shown = [command for page in PAGES for block in read_blocks(page.read_text()) for command in block.commands()]
    assert len(shown) > 40
