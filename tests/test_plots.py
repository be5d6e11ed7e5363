"""Every result can be looked at: labelled axes, and the numbers that are in it."""
import dataclasses
import importlib
import inspect
import pkgutil

import matplotlib
import pytest
import torch

import replaceme
from replaceme.blocks import Block
from replaceme.contract import contract
from replaceme.evaluate import perplexity
from replaceme.merge import cut
from replaceme.models import tiny_model, tiny_tokenizer
from replaceme.pipeline import prune
from replaceme.sidebyside import divergence, memory_of, side_by_side

matplotlib.use("agg")
TEXT = "The map stands in for the layers that went. " * 60


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "Results of every kind that a user is handed"
    folder = tmp_path_factory.mktemp("plots")
    (folder / "t.txt").write_text(TEXT)
    model, tok = tiny_model(layers=6, seed=1), tiny_tokenizer()
    small, pair = cut(model, [Block(2, 4)]), {}
    keys = dict(dataset=str(folder / "t.txt"), dataset_size=12, max_length=64)
    for method in ("lstsq", "auto", "uidl", "shortgpt", "linearpatch"):
        pair[method] = prune(model, tok, 2, method=method, **keys)[1]
    return dict(pair, contract=contract(model), perplexity=perplexity(model, tok, TEXT, 32, 4), divergence=divergence(model, small, tok, TEXT, 32, 4), memory=memory_of(model, 64),
                side=side_by_side(model, small, tok, TEXT, length=32, pieces=4, speed=False, cache=False))


KINDS = ("lstsq", "auto", "uidl", "shortgpt", "linearpatch", "contract", "perplexity", "divergence", "memory", "side")


@pytest.mark.parametrize("kind", KINDS)
def test_results_draw_themselves(found, kind):
    ax = found[kind].plot()
    assert ax.get_xlabel() and (ax.get_ylabel() or len(ax.get_yticklabels()) > 0)
    assert ax.lines or ax.patches or ax.collections
    matplotlib.pyplot.close("all")


def test_what_is_drawn_is_what_was_measured(found):
    ax = found["perplexity"].plot()
    assert ax.lines[0].get_ydata() == pytest.approx(found["perplexity"].losses)
    ax = found["divergence"].plot()
    assert ax.lines[0].get_ydata() == pytest.approx(found["divergence"].kl)
    ax = found["memory"].plot()
    assert [b.get_width() for b in ax.patches] == pytest.approx([found["memory"].weights / 1e6, found["memory"].cache / 1e6])
    matplotlib.pyplot.close("all")


INNER = """Acts Answer Block Bench Calibrated CompareConfig Config Cut Divergence EvaluateConfig FFN Features FoldPoint Gram Kept Line LinearConfig LinearMap LinearModel Loss Mix Network
           Patched Plan Probed Pupil Recipe Removed Reserved Rows Speed Stages States Streamed SwiGLU Targets TextRows Traced Writer""".split()


def test_no_public_result_is_without_a_plot():
    "A dataclass that hands out results has `plot`; what is only used on the way is listed above"
    without = []
    for m in pkgutil.iter_modules(replaceme.__path__):
        if m.name.startswith("_"):
            continue
        mod = importlib.import_module("replaceme." + m.name)
        for name, c in inspect.getmembers(mod, inspect.isclass):
            if c.__module__ == mod.__name__ and not name.startswith("_") and not issubclass(c, (Exception, torch.nn.Module, tuple)) and name not in INNER and not hasattr(c, "plot"):
                without.append(f"{m.name}.{name}")
    assert without == []
