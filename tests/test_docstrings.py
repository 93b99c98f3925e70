"""Docstrings follow one style: functions start with a verb in the third person, everything else with a noun.

Properties are data, so they start with a noun too. Tests state facts, in any form.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["neuronet_jax", "experiments", "data_prep"]
# The form of the third person, and plural nouns of the same form that would start a docstring without a verb.
VERB = re.compile("[A-Z][a-z]*[a-rt-z]s")
NOUNS = """
Arrays Axes Batches Bytes Channels Classes Crops Devices Features Gradients Heads Ids Lines Logits Nats Parameters Paths
Points Positions Probabilities Protocols Rows Scans Seconds Slots Structures Subjects Tensors Values Variables Volumes
Voxels Warnings Weights Words
"""
# No docstring starts with one of these: a clause or half a sentence would stand in place of a verb or noun.
CLAUSES = "As How If Of What When Where Whether Which Who Whose Why"


def _docstrings(package: str) -> Iterator[tuple[ast.AST, str, str]]:
    """Yields each documented module, class and function, its place and the first word of its docstring."""
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield node, f"{name}:{getattr(node, 'lineno', 1)}", text.split(maxsplit=1)[0].rstrip(".,:;")


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and not any("property" in ast.unparse(d) for d in node.decorator_list)


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_start_with_a_verb(package: str) -> None:
    nouns = set(NOUNS.split())
    found = [(place, word) for node, place, word in _docstrings(package) if _is_function(node)]
    wrong = [f"{place}: {word}" for place, word in found if not VERB.fullmatch(word) or word in nouns]
    assert found, f"{package} has no docstrings: was it moved?"
    assert not wrong, "start with a verb in the third person, such as Returns:\n" + "\n".join(wrong)


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_no_docstring_starts_with_a_clause(package: str) -> None:
    clauses = set(CLAUSES.split())
    wrong = [f"{place}: {word}" for _, place, word in _docstrings(package) if word in clauses]
    assert not wrong, "name the thing, or what it does:\n" + "\n".join(wrong)
