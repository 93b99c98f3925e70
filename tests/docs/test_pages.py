"""The pages: every command is run by the program that it names, on tiny files, and the Architecture page's walks go
where the program goes. In one file, so that the reader's folder is made once.
"""

import re
import shutil
import tomllib
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


# ---- the walks of the Architecture page: files that exist, each once, in the order in which the program enters them

FILE = r"`([a-z_]+/[a-z_/]+\.py)`"


def section(title: str) -> str:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return re.split(r"^## ", text.partition(f"## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def walk(title: str) -> list[str]:
    """The files of a walk: the first that each item of its list names."""
    return re.findall(rf"^\d+\. {FILE}", section(title), re.MULTILINE)


def serving() -> set[str]:
    """The files that serve every step and are in no walk."""
    return set(re.findall(FILE, section("Layers")))


WALKS = {"The way of an image": "segmented", "The way of a crop": "trained"}


@pytest.mark.parametrize("title", WALKS)
def test_every_file_of_a_walk_exists_and_is_named_once(title):
    named = re.findall(FILE, section(title))
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).is_file()] == []
    assert len(named) == len(set(named))
    assert named == walk(title)  # each at the head of its own item


@pytest.mark.filterwarnings("default")  # what a tiny network deserves
@pytest.mark.parametrize("title", WALKS)
def test_a_walk_goes_where_the_program_goes(title, workplace):
    entered = getattr(workplace, WALKS[title])
    named = walk(title)
    assert [name for name in entered if name in named] == named
    elsewhere = serving() | (set(walk("The way of an image")) if title == "The way of a crop" else set())
    assert set(entered) - set(named) - elsewhere == set()


def test_the_layers_are_those_of_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract.get("exhaustive"))
    listed = [re.findall(r"`(\w+)`", line.split("|")[2]) for line in re.findall(r"^\|.*`.*$", section("Layers"), re.M)]
    assert listed == [layer.split(" | ") for layer in layers if layer != "__main__"]


def test_files_that_the_page_names_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:neuronet_jax|experiments|data_prep|tests)/[a-z_/.]*)`", text)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []
