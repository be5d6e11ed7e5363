"""The page of guarantees names a test for each; here are those that stand nowhere else, and the one that reads the page."""
import ast
import json
import re
from pathlib import Path

import pytest

from replaceme.models import tiny_model, tiny_tokenizer
from replaceme.pipeline import prune

ROOT = Path(__file__).parents[1]
PAGE = json.loads((ROOT / "nbs/tutorials/guarantees.ipynb").read_text(encoding="utf-8"))


def names_in(file):
    return {n.name for n in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)}


def test_every_guarantee_names_tests_that_exist():
    tables = ["".join(c["source"]) for c in PAGE["cells"] if c["cell_type"] == "markdown" and "| what holds |" in "".join(c["source"])]
    assert len(tables) == 3  # before, during, after
    rows = [line for t in tables for line in t.splitlines() if line.startswith("| ") and not line.startswith("| what holds")]
    named = [re.findall(r"`(tests/\w+\.py)::(\w+)`", line) for line in rows]
    assert len(rows) >= 15 and all(named)
    assert [f"{f}::{t}" for row in named for f, t in row if t not in names_in(f)] == []


def folded(texts, **kw):
    "The weights of a model pruned on these texts"
    small, res = prune(tiny_model("llama", layers=6), tiny_tokenizer(), blocks=[[2, 4]], dataset=[dict(text=t) for t in texts], dataset_size=len(texts), max_length=48, **kw)
    return {k: v.double() for k, v in small.state_dict().items()}, res["calibration"]["tokens"]


@pytest.mark.parametrize("method, more", [("lstsq", {}), ("lstsq", dict(map="wide", weights="inv_norm", ridge=.01)), ("lstsq", dict(merge=False, affine=True))])
def test_padding_batch_size_and_order_reach_no_statistic(method, more):
    "Texts of 2 to 47 tokens: one at a time there is no padding, eight at a time more than half of it is"
    texts = ["The map stands in for the layers. "[:n] for n in (2, 34, 7, 19, 3, 28, 11, 33)]*3
    alone, n = folded(texts, batch_size=1, method=method, **more)
    for other in (folded(texts, batch_size=8, method=method, **more), folded(texts[::-1], batch_size=5, method=method, **more)):
        assert other[1] == n
        for k, v in alone.items():
            assert (other[0][k]-v).norm() <= 1e-5*v.norm(), k
