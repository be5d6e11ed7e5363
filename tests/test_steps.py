"Layers behind the cut are moved as far as texts say that neither they nor the map have seen."
import copy

import pytest
import torch

from replaceme import search
from replaceme.arch import layers_of
from replaceme.blocks import Block
from replaceme.models import tiny_model
from replaceme.ours import fit_words
from replaceme.search import HeldOut, Recipe, fit_blocks, line_search, outcome

BLOCK, KINDS = Block(3, 5), dict(attention="self_attn.o_proj", MLP="mlp.down_proj")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield


def batches(n, seed=0, size=4, length=20):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (n, length), generator=g)
    return [dict(input_ids=x, attention_mask=torch.ones_like(x)) for x in ids.split(size)]


def recipe(**keys): return Recipe(**{**dict(map="wide", weights="inv_norm", ridge=.1, refit=2), **keys})


def between(a, b, steps, first=3, n=2):
    "The model `a` with the refitted matrices of `b`, so much of each kind, made by hand"
    new = copy.deepcopy(a)
    for i in range(first, first + n):
        for kind, name in KINDS.items():
            w, x, y = [layers_of(m)[i].get_submodule(name).weight for m in (new, a, b)]
            w.copy_(x + steps[kind] * (y - x))
    return new


@pytest.mark.parametrize("ridge", [.1, "auto"])
def test_how_far_is_what_texts_say_that_no_fit_has_seen(ridge):
    dense, fit, held = tiny_model("llama", layers=8), batches(40), HeldOut([batches(6, 1), batches(3, 2, length=12)])
    done = fit_blocks(dense, fit, held, [BLOCK], recipe(ridge=ridge))
    steps = {r["matrix"]: r["step"] for r in done.refits}
    found = recipe(ridge=done.fits[0].ridge)
    plain, full = (fit_blocks(dense, fit, [], [BLOCK], recipe(ridge=found.ridge, refit=n)).model for n in (0, 2))
    mine = dict(attention=1., MLP=1.)
    for kind in ("MLP", "attention"):
        mine[kind] = line_search(lambda s: outcome(dense, between(plain, full, {**mine, kind: s}), held))
    assert steps == pytest.approx({KINDS[k]: s for k, s in mine.items()}, abs=.021)
    assert ridge == "auto" or any(0 < s < 1 for s in steps.values())


def test_the_saved_weights_are_so_far_on_the_way_of_all_texts():
    dense, fit, held = tiny_model("llama", layers=8), batches(40), batches(6, 1)
    done = fit_blocks(dense, fit, held, [BLOCK], recipe())
    plain, full = (fit_blocks(dense, fit + held, [], [BLOCK], recipe(refit=n)).model for n in (0, 2))
    steps = {k: next(r["step"] for r in done.refits if r["matrix"] == name) for k, name in KINDS.items()}
    for a, b in zip(done.model.parameters(), between(plain, full, steps).parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(r["step"] == 1 for r in fit_blocks(dense, fit, [], [BLOCK], recipe()).refits)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("sign,step", [(1, 0.), (-1, 1.)])
def test_what_does_harm_is_not_done_at_all(monkeypatch, kind, sign, step):
    dense, fit, held = tiny_model(kind, layers=8), batches(24), batches(4, 1)
    first = [layers_of(dense)[i].get_submodule(n).weight.clone() for i in (5, 6) for n in KINDS.values()]

    def moved(dense, model, batches, *_):
        now = [layers_of(model)[i].get_submodule(n).weight for i in (3, 4) for n in KINDS.values()]
        return sign * sum((a - b).norm().item() for a, b in zip(first, now))
    monkeypatch.setattr(search, "outcome", moved)
    done = fit_blocks(dense, fit, held, [BLOCK], recipe())
    assert {r["step"] for r in done.refits} == {step}
    assert fit_words(recipe(), done)["behind"] == ([] if step == 0 else [5, 6])  # what the report calls corrected
    same = [torch.equal(layers_of(done.model)[i].get_submodule(n).weight, w) for (i, n), w in
            zip([(i, n) for i in (3, 4) for n in KINDS.values()], first)]
    assert all(same) if step == 0 else not any(same)


def test_the_dense_model_and_the_texts_are_left_alone():
    dense, fit, held = tiny_model("llama", layers=8), batches(24), batches(4, 1)
    before = copy.deepcopy(dense)
    fit_blocks(dense, fit, held, [BLOCK], recipe())
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), dense.parameters()))
