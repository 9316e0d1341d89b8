"""House rules that can be counted: parameters, docstrings of kernels, sizes of files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "nsa"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_PARAMETERS, MAX_OF_PARTITION, MAX_LINES = 15, 12, 420


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(SOURCE)}: {node.name}", node


def num_parameters(function: ast.FunctionDef) -> int:
    names = [x.arg for x in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len(names) - (names[:1] == ["self"])


def is_compiled(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_no_function_has_more_parameters_than_a_reader_can_hold() -> None:
    """The entry points of kernels take what a launch can pass, which is numbers and pointers alone."""
    for name, function in functions():
        if not (is_compiled(function) and function.name.endswith("_kernel")):
            limit = MAX_OF_PARTITION if function.name.endswith("_partition") else MAX_PARAMETERS
            assert num_parameters(function) <= limit, name


def test_all_that_is_compiled_for_a_gpu_says_what_it_does() -> None:
    compiled = [(name, function) for name, function in functions() if is_compiled(function)]
    assert len(compiled) > 100
    for name, function in compiled:
        assert ast.get_docstring(function), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
