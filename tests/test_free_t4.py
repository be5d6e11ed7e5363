"""The notebooks for a free T4: what both have is the same, nothing is too wide, and one cell decides where they run."""
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "nbs/tutorials"
NAMES = "free_t4_colab", "free_t4_kaggle"
CELLS = {n: json.loads((FOLDER / f"{n}.ipynb").read_text(encoding="utf-8"))["cells"] for n in NAMES}


def source(cell):
    return "".join(cell["source"])


def test_cells_that_both_have_are_the_same():
    "Those whose id begins with f4, in one order; a change of one belongs into the other"
    ours, theirs = ([(c["id"], source(c)) for c in CELLS[n] if c["id"].startswith("f4")] for n in NAMES)
    assert len(ours) > 20 and ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_lines_fit_the_page(name):
    assert [(c["id"], line) for c in CELLS[name] if c["id"] not in ("open-in", "install")
            for line in source(c).split("\n") if len(line) > 110] == []


@pytest.mark.parametrize("name", NAMES)
def test_one_cell_decides(name):
    "No token, no other model, and whether there are a GPU and a hub is asked once"
    code = [source(c) for c in CELLS[name] if c["cell_type"] == "code"]
    for said in "FULL =", "MODEL, LAYERS =", "UPLOAD =", "DOSE =", "LITTLE =", "WORK =", "cuda.is_available":
        assert len([s for s in code if said in s]) == 1, said
    assert len({i for i, s in enumerate(code) for said in ("FULL =", "UPLOAD =", "DOSE =", "LITTLE =") if said in s}) == 1
    assert not any("hf_" in s or "token=" in s for s in code)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_kept_and_name_no_place_of_the_machine_that_made_them(name):
    outputs = json.dumps([c["outputs"] for c in CELLS[name] if c["cell_type"] == "code"])
    assert "8,030,261,248 parameters" in outputs and "4 bits, narrow map" in outputs and "<iframe" in outputs
    assert not any(place in outputs for place in ("/tmp", "/root", "/home", "/work/"))
