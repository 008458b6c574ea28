"""The built-in data set: pairs of function source and docstring."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from lsp_ray.data.stdlib_docstrings import MAX_SOURCE_CHARS, PROMPT, DocstringPair, stdlib_pairs


@pytest.fixture(scope="module")
def pairs() -> list[DocstringPair]:
    return stdlib_pairs()


def pairs_of(folder: Path, source: str, name: str = "module.py") -> list[DocstringPair]:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(source), encoding="utf-8")
    return stdlib_pairs(folder)


def test_this_python_has_thousands_of_pairs(pairs: list[DocstringPair]) -> None:
    assert len(pairs) > 3000


def test_no_prompt_occurs_twice(pairs: list[DocstringPair]) -> None:
    assert len({pair.prompt for pair in pairs}) == len(pairs)


def test_about_one_pair_in_ten_is_held_out(pairs: list[DocstringPair]) -> None:
    share = sum(pair.is_held_out for pair in pairs) / len(pairs)
    assert 0.08 < share < 0.12


def test_reading_again_gives_the_same_pairs_in_the_same_order(tmp_path: Path) -> None:
    source = '''
        def first(x):
            """Return what was given."""
            return x

        def second(x):
            """Return nothing at all."""
            x += 1
    '''
    assert pairs_of(tmp_path, source) == stdlib_pairs(tmp_path)


def test_the_prompt_is_the_source_without_its_docstring(tmp_path: Path) -> None:
    source = '''
        class Shop:
            @property
            def price(self) -> float:
                """Return the price in euros.

                Taxes included.
                """

                return self._price
    '''
    [pair] = pairs_of(tmp_path, source)
    assert pair.prompt == PROMPT.format(source="@property\ndef price(self) -> float:\n    return self._price")
    assert pair.completion == "Return the price in euros."


def test_a_paragraph_over_several_lines_becomes_one_line(tmp_path: Path) -> None:
    source = '''
        def longer(x):
            """Return what was given,
            and nothing else.
            """
            return x
    '''
    assert [pair.completion for pair in pairs_of(tmp_path, source)] == ["Return what was given, and nothing else."]


def test_methods_nested_functions_and_conditional_ones_are_found(tmp_path: Path) -> None:
    source = '''
        try:
            import fast
        except ImportError:
            async def one(x):
                """The first of the functions."""
                def two(y):
                    """The second of the functions."""
                    return y
                return two
    '''
    found = [pair.completion for pair in pairs_of(tmp_path, source)]
    assert found == ["The first of the functions.", "The second of the functions."]


@pytest.mark.parametrize(
    "source",
    [
        "def plain(x):\n    return x\n",
        'def only(x):\n    """Do nothing but be documented."""\n',
        'def short(x):\n    """Do."""\n    return x\n',
        f'def long(x):\n    """{"very " * 100}long."""\n    return x\n',
        'def broken(:\n    """Is no Python at all."""\n',
        '"""A module without functions."""\n',
    ],
)
def test_a_function_without_a_useful_docstring_makes_no_pair(tmp_path: Path, source: str) -> None:
    assert pairs_of(tmp_path, source) == []


def test_a_long_function_keeps_its_first_lines(tmp_path: Path) -> None:
    body = "".join(f"    value_{index} = {index}\n" for index in range(100))
    [pair] = pairs_of(tmp_path, f'def long():\n    """Assign a hundred values."""\n{body}')
    assert "value_0 = 0" in pair.prompt
    assert pair.prompt.endswith("\n    ...\n\nDocstring:\n")
    assert len(pair.prompt) < MAX_SOURCE_CHARS + len(PROMPT)


def test_tests_and_installed_packages_are_no_library_sources(tmp_path: Path) -> None:
    source = 'def f(x):\n    """Return what was given."""\n    return x\n'
    for name in ("test/test_f.py", "site-packages/f.py", "json/tests/f.py"):
        assert pairs_of(tmp_path, source, name) == []


def test_a_file_in_another_encoding_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(
        'def f(x):\n    """Schön und gut, das hier."""\n    return x\n'.encode("latin-1")
    )
    assert stdlib_pairs(tmp_path) == []
