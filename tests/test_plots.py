"""Every result can be looked at: labelled axes, and the numbers that are in it."""
import importlib
import inspect
import pkgutil

import matplotlib
import pytest
import torch

import replaceme
from replaceme.methods import Method
from replaceme.blocks import Block, candidates
from replaceme.contract import contract
from replaceme.distance import Profile
from replaceme.evaluate import perplexity
from replaceme.merge import cut
from replaceme.models import tiny_model, tiny_tokenizer
from replaceme.optimize import Loss, Solved
from replaceme.pipeline import Result, prune
from replaceme.recover import Rung
from replaceme.result import Record
from replaceme.search import Pruned
from replaceme.sidebyside import Speed, Speeds, divergence, memory_of, side_by_side
from replaceme.solve import Fit
from replaceme.stats import Measured, rank
from replaceme.train import Trained

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
    assert ax.lines or ax.patches
    matplotlib.pyplot.close("all")


def test_what_is_drawn_is_what_was_measured(found):
    ax = found["perplexity"].plot()
    assert ax.lines[0].get_ydata() == pytest.approx(found["perplexity"].losses)
    ax = found["divergence"].plot()
    assert ax.lines[0].get_ydata() == pytest.approx(found["divergence"].kl)
    ax, checks = found["contract"].plot(), [v for v in found["contract"].checks.values() if isinstance(v, float)]
    assert len(checks) >= 4 and [b.get_width() for b in ax.patches] == pytest.approx([max(v, 1e-10) for v in checks])
    shares = [r[3] for r in found["side"].rows() if r[3] is not None]
    ax = found["side"].plot()
    assert sorted(x for l in ax.lines if l.get_marker() == "o" for x in l.get_xdata()) == pytest.approx(sorted(shares)) and len(shares) >= 3
    ax = found["memory"].plot()
    assert [b.get_width() for b in ax.patches] == pytest.approx([found["memory"].weights / 1e6, found["memory"].cache / 1e6])
    matplotlib.pyplot.close("all")


def test_the_parts_of_a_result_draw_themselves():
    "What is handed out on the way: a fit with and without a ridge that was sought, a solver's history, a rung, a pair of speeds, what calibration measured"
    T = torch.eye(3).double()
    assert [b.get_width() for b in Fit(T, .2, .7, 9).plot().patches] == [.7, .2]
    assert Fit(T, .2, .7, 9, curve=dict(values=[.1, 1.], errors=[.5, .4], chosen=1.)).plot().lines[0].get_ydata().tolist() == [.5, .4]
    assert Solved(T, [dict(step=0, loss=3., held=.1), dict(step=1, loss=2., held=.4)], "irls", Loss("cosine"), 1).plot().lines[0].get_ydata().tolist() == [.1, .4]
    for r in (Rung("cut", 9, 9, 1., .5, 1., [dict(step=1, loss=.7), dict(step=2, eval_loss=.5)]), Trained(9, 1., .5, 1., 9, [dict(step=1, loss=.7), dict(step=2, eval_loss=.5)])):
        assert [l.get_ydata().tolist() for l in r.plot().lines] == [[.7], [.5]]
    speeds = Speeds(Speed(1, [2.], [10., 12.]), Speed(1, [1.], [20., 24.]), (1, 1, 1), (2, 2, 2))
    assert [b.get_width() for b in speeds.plot().patches] == [11, 22]
    done = Pruned(None, [Block(1, 2)], [], choice=[dict(block=[1, 2], distance=.1, loss=3., chosen=True), dict(block=[2, 3], distance=.2, loss=2.9)])
    assert [t.get_text() for t in done.plot().texts] == ["[1,2)", "[2,3)"]
    profile = Profile(5)
    profile.add(torch.randn(6, 9, 8, generator=torch.Generator().manual_seed(0)).cumsum(0))
    ranked, avoided = rank(profile, candidates(5, 2), {1: .9})
    ax = Measured(profile, ranked, avoided, {1: .9}).plot()
    assert ax.get_legend_handles_labels()[1][0].startswith(f"chosen {ranked[0][1]}:") and not ranked[0][1].holds(1)
    ax = profile.plot(2, sinks={1: .9})
    assert ax.get_legend_handles_labels()[1][0].startswith(f"chosen {ranked[0][1]}:")  # a block that holds a sink is not what would be chosen
    matplotlib.pyplot.close("all")


def test_all_blocks_of_a_result_are_marked():
    r = Result(block=[1, 3], blocks=[[1, 3], [4, 6]], distance=dict(metric="angular", profile={"2": [.1, .3, .4, .2, .5]}))
    assert [l.split(":")[0] for l in r.plot().get_legend_handles_labels()[1]] == ["chosen [1,3)", "chosen [4,6)", "next [2,4)"]
    matplotlib.pyplot.close("all")


INNER = """About Acts AnalyseConfig Answer Asked Asking Bench Bits Block Borrowed Budget Budgeted Calibration Call Case
         Choosing Closed Common CompareConfig Comparing Config Cost Cut Distances Divergence Domain Drafting
         DraftRun Drafts Ends Equivalence EvaluateConfig Exported Features Feed FFN FileRow FileRows FoldPoint Gains Gram
         Group Headers HeldOut InMemory Iterating Job Journal Judged Kept Keys Known LaCoKeys Layer Layerwise Line
         LinearConfig LinearMap LinearModel LLMPrunerKeys Loading LogLine Loss MapConfig Mapping Meter Method
         Mix Nearest Network Neurons Norm NormBehind Part Parted Pass Patched Piece Place Plan Point Probed
         PruneConfig Pupil Race Recipe Refit Removed Reread Reserved Resuming Rounds Row Rows Saving Shape Share Shares SizedConfig
         SizedModel Speed Stages States Step Stream Streamed StreamlineKeys SwiGLU Takes Targets Taught Text
         TextRows Texts Traced Training UIDLKeys Unmerged Ways Widths Work Writer Writes Writing Written""".split()


def test_no_public_result_is_without_a_plot():
    "A dataclass that hands out results has `plot`; what is only used on the way is listed above"
    without = []
    for m in pkgutil.iter_modules(replaceme.__path__):
        if m.name.startswith("_"):
            continue
        mod = importlib.import_module("replaceme." + m.name)
        for name, c in inspect.getmembers(mod, inspect.isclass):
            if c.__module__ == mod.__name__ and not name.startswith("_") and not issubclass(c, (Exception, torch.nn.Module, tuple, Method, Record)) and name not in INNER and not hasattr(c, "plot"):
                without.append(f"{m.name}.{name}")
    assert without == []
