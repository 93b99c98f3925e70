"""The table of codes holds exactly the codes in use, and the documentation shows it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from neuronet_jax.codes import CODES, explain, page

ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r"[EW]_[A-Z]+(?:_[A-Z]+)*")


def used(source: str) -> Iterator[str]:
    """Yields the codes with which a string begins, except in docstrings and comparisons."""
    tree = ast.parse(source)
    skipped = {id(part) for node in ast.walk(tree) if isinstance(node, ast.Compare) for part in ast.walk(node)}
    skipped |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and id(node) not in skipped else None
        if isinstance(text, str) and (found := re.match(rf"({CODE.pattern})(?=:|$)", text)):
            yield found[1]


def _sources() -> list[Path]:
    folders = ("neuronet_jax", "experiments", "data_prep")
    return [path for name in folders for path in (ROOT / name).rglob("*.py") if path.name != "codes.py"]


def test_the_search_finds_codes_that_are_used():
    source = '''
def f():
    """E_DOC: said of it."""
    if error.code != "E_COMPARED" or "no E_INSIDE":
        raise RejectError("E_RAISED", f"E_PART_{x}")
    return f"W_SAID: {x}", ("W_TUPLE",)
'''
    assert sorted(used(source)) == ["E_RAISED", "W_SAID", "W_TUPLE"]


def test_the_table_holds_exactly_the_codes_in_use():
    found = {code: path for path in _sources() for code in used(path.read_text(encoding="utf-8"))}
    assert {code: path.name for code, path in found.items() if code not in CODES} == {}
    assert set(CODES) - set(found) == set()


@pytest.mark.parametrize("code", CODES)
def test_a_row_is_a_sentence_of_meaning_and_one_of_remedy(code):
    assert CODE.fullmatch(code)
    for sentence in CODES[code][:2]:
        assert re.fullmatch(r"[A-Z].*[^.]\.", sentence) and "|" not in sentence
    assert explain(code).startswith(CODES[code].meaning)


def test_a_code_of_a_different_release_has_no_explanation():
    assert explain("E_NOBODY_KNOWS") == ""


def test_the_page_of_the_documentation_is_current():
    assert (ROOT / "docs" / "codes.md").read_text(encoding="utf-8") == page(), "run `make codes`"
