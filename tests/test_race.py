"""Who leaves the race leaves it by differences, text by text; nobody's layers are run then; and sums in float32 are those in float64."""
import copy
import warnings

import pytest
import torch

from replaceme import stats
from replaceme.activations import hooks
from replaceme.arch import fold_points, layers_of
from replaceme.blocks import Block, candidates
from replaceme.core import ReplaceMeWarning
from replaceme.distance import Profile
from replaceme.merge import replace_block
from replaceme.models import tiny_model, tiny_tokenizer
from replaceme.search import Recipe, fit_blocks
from replaceme.solve import lstsq_map
from replaceme.stats import Features, collect_between, measure, one_by_one


def batches(n, size=4, length=24, seed=0):
    ids = torch.randint(3, 300, (n, length), generator=torch.Generator().manual_seed(seed))
    return [dict(input_ids=b, attention_mask=torch.ones_like(b)) for b in ids.split(size)]


@torch.no_grad()
def calm(*idle):
    "Six layers, some of which add next to nothing"
    model = tiny_model("llama", layers=6)
    for i in idle:
        for p in (layers_of(model)[i].mlp.down_proj.weight, layers_of(model)[i].self_attn.o_proj.weight):
            p.mul_(1e-3)
    return model


def texts_through(model, run):
    "{layer: texts that went through it}"
    seen = dict.fromkeys(range(6), 0)
    def count(i, x):
        seen[i] += len(x) if x.shape[1] == 24 else 0  # a probe is another text
    on = [m.register_forward_hook(lambda m, a, x, i=i: count(i, x)) for i, m in enumerate(layers_of(model))]
    with hooks(*on):
        found = run()
    return found, seen


@pytest.mark.parametrize("idle,k,until", [((2, 3), 1, 4), ((4, 5), 1, 6), ((2, 3), 4, 6)])
def test_no_text_goes_further_than_the_last_contender(idle, k, until):
    model, bs = calm(*idle), batches(40)
    fold_points(model, range(5))  # proved, which runs layers too
    found, seen = texts_through(model, lambda: measure(model, bs, candidates(6, 2), Profile(6), k=k))
    alone = measure(model, one_by_one(bs[:2]) + bs[2:], candidates(6, 2), Profile(6), k=0)  # rounded as the first texts of a race are
    behind = [seen[i] - seen[5] for i in range(6)]
    assert found.block == alone.block == Block(*idle[:1], idle[0] + 2)
    assert [b > 0 for b in behind] == [i < until < 6 for i in range(6)]
    if until < 6:
        assert behind[until - 1] == 40 - 8 and found.profile.counts[0].tolist() == [40.] * 5 + [8.] * 2
    D, whole = found.profile.mean, alone.profile.mean
    assert torch.equal(D[:until + 1, :until + 1], whole[:until + 1, :until + 1])
    assert all(found.sums[b].n == 40 * 24 for b in found.sums) and len(found.sums) == k
    few = measure(model, bs[:2], candidates(6, 2), Profile(6), k=0).profile.mean
    assert torch.allclose(D[:, until + 1:], few[:, until + 1:], atol=1e-12)


def test_who_left_comes_behind_who_stayed_though_its_texts_were_calmer():
    "The distance of who left is over the first texts, and would win beside that of all texts"
    model = calm(2, 3)
    quiet, loud = batches(8), batches(32, seed=1)
    with torch.no_grad():
        emb = model.model.embed_tokens.weight
        new = copy.deepcopy(model)
        new.model.embed_tokens.weight = torch.nn.Parameter(emb.clone(), requires_grad=False)
        used = torch.cat([b["input_ids"].flatten() for b in quiet]).unique()
        new.model.embed_tokens.weight[used] *= 1e4  # what the layers add is little beside it
    found = measure(new, quiet + loud, candidates(6, 2), Profile(6))
    by_number = sorted((d, b) for d, b in found.ranked)
    assert found.block == Block(2, 4) == found.ranked[0][1]
    assert {b for _, b in found.ranked} == set(candidates(6, 2)) and [d for d, _ in found.ranked[1:]] == sorted(d for d, _ in found.ranked[1:])
    assert by_number[0][1] != found.block  # by the numbers alone another would be first


def test_held_out_texts_go_no_further_either():
    model, bs = calm(2, 3), batches(40)
    fold_points(model, range(5))
    found, seen = texts_through(model, lambda: measure(model, bs[:5], candidates(6, 2), Profile(6), held=bs[5:]))
    assert found.profile.counts[0, -1] == 8 and found.held[found.block].n == 20 * 24 and seen[4] == seen[5] < seen[3]


def test_the_report_says_which_distances_are_over_fewer_texts(tmp_path, monkeypatch):
    from replaceme.pipeline import prune
    from replaceme.report import report_html
    (tmp_path / "t.txt").write_text(" ".join(f"The map number {i} stands in for {i * i} layers that went, nearly." for i in range(400)))
    model, tok = calm(2, 3), tiny_tokenizer()
    said = {}
    for n in (24, 6):
        _, result = prune(model, tok, 2, method="lstsq", dataset=str(tmp_path / "t.txt"), dataset_size=n, max_length=32, batch_size=2, prompt=None)
        said[n] = result.distance.texts, "Runs that end behind layer 3 are over fewer texts, down to 8 of 24" in report_html(result)
    assert said == {24: ([24] * 5 + [8] * 2, True), 6: ([], False)}


# sums in float32

@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(stats, "slow_float64", lambda device: True)


@pytest.mark.parametrize("feats", [Features(), Features(wide=True, affine=True, weights="inv_norm"), Features(state=True)], ids=str)
def test_maps_from_single_precision(monkeypatch, feats):
    model, bs = calm(2, 3), batches(40)
    points = {} if feats.state else fold_points(model, [1])
    def both():
        a = measure(model, bs, candidates(6, 2), Profile(6), feats)
        return a, collect_between(model, model, bs, [*points.values()], 2, 4, feats)
    (a, x), _ = both(), monkeypatch.setattr(stats, "slow_float64", lambda device: True)
    b, y = both()
    assert b.block == a.block and b.sums[b.block].dtype == y.dtype == torch.float32
    for g, h in ((a.sums[a.block], b.sums[b.block]), (x, y)):
        T, U = lstsq_map(g, ridge=1e-3).T, lstsq_map(h, ridge=1e-3).T
        assert 0 < (T - U).norm() < 1e-3 * T.norm()


@pytest.mark.parametrize("wide", [False, True])
def test_columns_that_are_too_much_alike_are_added_up_in_float64(slow, wide):
    model, bs = calm(2, 3), batches(40)
    mlp = layers_of(model)[1].mlp
    with torch.no_grad():
        for m in (mlp.up_proj, mlp.gate_proj):
            m.weight[1] = m.weight[0] * (1 + 1e-6)  # two neurons fire as one
        if not wide:
            mlp.down_proj.weight[1] = mlp.down_proj.weight[0] * (1 + 1e-5) + 1e-7 * torch.arange(mlp.down_proj.in_features)
    feats = Features(wide=wide)
    with pytest.warns(ReplaceMeWarning, match="taken again in float64"):
        found = measure(model, bs, [Block(2, 4)], Profile(6), feats)
    g = found.sums[Block(2, 4)]
    assert g.dtype == torch.float64 and g.n == 40 * 24
    with pytest.warns(ReplaceMeWarning, match="taken again in float64"):
        assert collect_between(model, model, bs, [fold_points(model, [1])[1]], 2, 4, feats).dtype == torch.float64


def test_a_whole_recipe_ends_nearly_where_it_does_in_float64(monkeypatch):
    model, bs, held = calm(2, 3), batches(40), batches(8, seed=3)
    r = Recipe(map="wide", ridge=.1, refit=2, weights="inv_norm")
    ids, outs = torch.arange(3, 43).view(2, 20), []
    for single in (False, True):
        monkeypatch.setattr(stats, "slow_float64", lambda device, single=single: single)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ReplaceMeWarning)
            outs.append(fit_blocks(model, bs, held, [Block(2, 4)], r).model(ids).logits)
    removed = replace_block(model, Block(2, 4), None)(ids).logits
    assert 0 < (outs[0] - outs[1]).norm() < 1e-2 * (outs[0] - removed).norm()


# no waiting: an accelerator has the next layer's work before the last one's is done

@pytest.mark.parametrize("tokens,k,feats", [("last", 1, Features()), ("all", 4, Features(wide=True, weights="inv_norm")), ("last", 2, Features(state=True))], ids=str)
def test_nothing_is_asked_of_the_device_while_a_batch_goes_through_the_layers(monkeypatch, tokens, k, feats):
    from torch.utils._python_dispatch import TorchDispatchMode
    events, cpu = [], torch.Tensor.cpu

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asks = func is torch.ops.aten._local_scalar_dense.default
            asks |= func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
            if asks:
                events.append(str(func))
            return func(*args, **(kwargs or {}))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: (events.append("cpu"), cpu(t))[1])
    model, bs = calm(2, 3), batches(20)
    layers = layers_of(model)
    on = [layers[0].register_forward_hook(lambda m, a, x: events.append("begin" if x.shape[1] == 24 else "probe")), layers[3].register_forward_pre_hook(lambda *a: events.append("end"))]
    with hooks(*on), Watching():
        measure(model, bs, candidates(6, 2), Profile(6, tokens=tokens), feats, k=k)
    between, inside = [], False
    for e in events:
        inside = e == "begin" or inside and e != "end"
        between += [e] if inside and e != "begin" else []
    assert between == [] and events.count("begin") >= 20 / 4 and "cpu" in events
