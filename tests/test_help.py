"""Where to read more: each error names a page, and each page is one that the site has."""
import re
from pathlib import Path

import pytest
import yaml

from replaceme.core import ReplaceMeError, _TUTORIALS, help_page
from replaceme.data import load_texts
from replaceme.pipeline import read_config

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


@pytest.mark.parametrize("keys, page", [(dict(dataset=["self"], dataset_shares=[1, 2]), "your_data"), (dict(tasks={"piqa": {"shots": 2}}), "evaluate_and_publish"),
                                        (dict(trainer={"lr": 1}, recover="cut"), "many_machines"), (dict(recover="rope"), "which_method"), (dict(layers_to_skp=1), "config")])
def test_a_wrapped_error_keeps_its_page(tmp_path, keys, page):
    "A config's error is told by its file, and helped by the page of the stage that found it"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(keys))
    with pytest.raises(ReplaceMeError, match="config .*c.yaml: ") as e:
        read_config(tmp_path / "c.yaml")
    assert Path(e.value.page).stem == page and e.value.__notes__ == [f"Help: {e.value.page}"]
