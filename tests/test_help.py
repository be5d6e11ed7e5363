"""Where to read more: each error names a page, and each page is one that the site has."""
import ast
import re
from pathlib import Path

import pytest

from replaceme.core import ReplaceMeError, _TUTORIALS, help_page
from replaceme.data import load_texts

ROOT = Path(__file__).parents[1]
MODULES = sorted(p.stem for p in (ROOT / "replaceme").glob("[a-z]*.py"))
PAGES = {re.sub(r"^\d\d_", "", p.stem): p for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts}


@pytest.mark.parametrize("module", MODULES)
def test_the_page_of_a_module_exists(module):
    page = help_page(f"replaceme.{module}").split("/replaceme/")[1]
    nb = PAGES[Path(page).stem]
    assert (nb.parent.name == "tutorials") == page.startswith("tutorials/") and page.endswith(".html")


def test_every_module_that_is_named_is_there():
    named = " ".join(_TUTORIALS.values()).split()
    assert set(named) <= set(MODULES) and len(named) == len(set(named))


def test_an_error_says_where_to_read_more():
    with pytest.raises(ReplaceMeError) as e:
        load_texts("no/such/file.txt", tokenizer=None, size=2)
    assert e.value.page.endswith("/tutorials/your_data.html") and e.value.__notes__ == [f"Help: {e.value.page}"]


def test_errors_are_raised_where_they_are_made():
    "The page follows from the module that makes the error: none is made in a room that only others know"
    for m in MODULES:
        tree = ast.parse((ROOT / f"replaceme/{m}.py").read_text(encoding="utf-8"))
        made = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "ReplaceMeError"]
        assert not made or help_page(m) != help_page("nowhere"), m
