"""A quantised model only measures, also where several blocks go: later maps are fitted on the stream that the earlier ones make."""
import json
import random

import pytest
import torch
from safetensors.torch import load_file

from replaceme import pipeline
from replaceme.arch import hooks, layers_of
from replaceme.blocks import Block
from replaceme.data import batches, load_texts
from replaceme.kept import fingerprint
from replaceme.models import load_model, tiny_model, tiny_tokenizer
from replaceme.pipeline import make_config, read_config, run
from replaceme.search import beside, fit_beside, fit_blocks, stand_ins

WORDS = "the map stands in for layers that went and what it adds is written here or there by one who reads of numbers".split()
TEXT = " ".join(random.Random(0).choices(WORDS, k=1500))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    tiny_model("llama", layers=8, d=64).save_pretrained("wide")  # NF4 has blocks of 64
    tiny_tokenizer().save_pretrained("wide")
    (tmp_path / "texts.txt").write_text(TEXT)
    return tmp_path


def keys(**more):
    return {**dict(model_path="./wide", method="lstsq", dataset="texts.txt", dataset_size=24, max_length=48, batch_size=4, eval_dataset=None, prompt=None), **more}


def same(a, b, tol):
    x, y = [load_file(f"{d}/model.safetensors") for d in (a, b)]
    assert x.keys() == y.keys()
    for k in x:
        assert (x[k] - y[k]).norm() <= tol * y[k].norm(), (k, (x[k] - y[k]).norm() / y[k].norm())


WAYS = [dict(num_A=2, layers_to_skip=2), dict(max_blocks=2, layers_to_skip=3), dict(blocks=[[1, 2], [3, 5], [6, 7]])]


@pytest.mark.parametrize("kind", [dict(), dict(map="wide"), dict(affine=True), dict(method="auto", select="distance", refit=0, borrow=False), dict(merge=False), dict(method="remove")], ids=str)
def test_maps_beside_the_weights_are_the_maps_in_them(kind):
    "In float64 to nine digits: the same maps, and the same model, as where every map is folded before the next is fitted"
    model = tiny_model("llama", layers=8).double()
    bs = batches([TEXT[i:i + 120] for i in range(0, 2400, 60)], tiny_tokenizer(), 4, 48)
    r = pipeline.recipe_of(make_config(**{**dict(method="lstsq"), **kind}))
    fit, held = (bs[:-2], bs[-2:]) if r.needs_held else (bs, [])
    blocks = [Block(1, 2), Block(3, 5), Block(6, 7)]
    folded, beside_ = fit_blocks(model, fit, held, blocks, r), fit_beside(model, fit, held, blocks, r)
    for a, b in zip(folded.fits, beside_.fits):
        assert a.kind == b.kind and torch.allclose(a.T, b.T, atol=1e-8 * a.T.abs().max().item()) and a.error == pytest.approx(b.error, rel=1e-8)
    x = bs[0]
    with torch.no_grad():
        want, got = [m(**x).logits for m in (folded.model, stand_ins(model, blocks, beside_.fits))]
        with beside(model, blocks, beside_.fits) as small:
            hooked = small(**x).logits
    assert torch.allclose(got, want, atol=1e-8 * want.abs().max().item()) and torch.allclose(hooked, want, atol=1e-8 * want.abs().max().item())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_quantisation_that_changes_nothing_gives_the_run_without(place, monkeypatch, way):
    real = pipeline.load_model
    names = real.__code__.co_varnames[:real.__code__.co_argcount]

    def floats(*args, **kw):  # 4 bit weights that are the original ones
        kw = {**dict(zip(names, args)), **kw}
        return real(**{**kw, "use_4bit": False})

    monkeypatch.setattr(pipeline, "load_model", floats)
    way = dict(way, ridge=.01)  # well conditioned, so that the rounding of float32 stays what it is
    a, _ = run(make_config(**keys(save_path="few", use_4bit=True, **way)))
    b, _ = run(make_config(**keys(save_path="all", **way)))
    assert a["blocks"] == b["blocks"] and len(a["blocks"]) >= 1 and a["n_layers"] == b["n_layers"]
    same("few", "all", 1e-6)


def direct_maps(model, bs, blocks):
    "Each narrow map by least squares in float64 on the stream of a model whose earlier blocks hand on what they are given and whose earlier maps multiply what the MLP writes"
    layers, maps = layers_of(model), []
    hand_on = lambda layer, args, kwargs, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0]

    def states(b, active):
        got = {}
        hs = [layers[b.start - 1].mlp.register_forward_hook(lambda m, i, o: got.__setitem__("M", o)),
              layers[b.start].register_forward_pre_hook(lambda m, a: got.__setitem__("S", a[0]))]
        if active:
            hs += [layers[i].register_forward_hook(hand_on, with_kwargs=True) for c, _ in active for i in range(*c)]
            hs += [layers[c.start - 1].mlp.register_forward_hook(lambda m, i, o, T=T: (o.double() @ T).to(o)) for c, T in active]
        if b.end < len(layers):
            hs.append(layers[b.end].register_forward_pre_hook(lambda m, a: got.__setitem__("Y", a[0])))
        else:
            hs.append(layers[-1].register_forward_hook(lambda m, a, o: got.__setitem__("Y", o[0] if isinstance(o, tuple) else o)))
        rows = {k: [] for k in "MSY"}
        with torch.no_grad(), hooks(*hs):
            for x in bs:
                model(**x)
                for k in rows:
                    rows[k].append(got[k].reshape(-1, got[k].shape[-1])[x["attention_mask"].reshape(-1).bool()].double())
        return {k: torch.cat(v) for k, v in rows.items()}

    for b in blocks:
        dense, ours = states(b, []), states(b, list(zip(blocks, maps)))
        maps.append(torch.linalg.lstsq(ours["M"], dense["Y"] - ours["S"] + ours["M"]).solution)
    return maps


@pytest.mark.parametrize("bits", [4, 8])
def test_each_map_is_least_squares_on_the_quantised_stream(place, bits):
    "Real bitsandbytes on this machine; then the maps are in the original weights, and nothing else has changed"
    pytest.importorskip("bitsandbytes")
    blocks = [Block(2, 4), Block(5, 6)]
    way = dict(blocks=[list(b) for b in blocks], **{f"use_{bits}bit": True})
    _, maps = run(make_config(**keys(save_path="map", save_transform_only=True, **way)))
    model, tok = load_model("./wide", **{f"use_{bits}bit": True})
    bs = batches(load_texts("texts.txt", tokenizer=tok, size=24, max_length=48), tok, 4, 48)
    want, got = direct_maps(model, bs, blocks), load_file(maps / "transform.safetensors")
    for i, T in enumerate(want):
        assert torch.allclose(got[f"T{i}"].double(), T, atol=1e-4 * T.abs().max().item()), (got[f"T{i}"].double() - T).abs().max()
    result, path = run(make_config(**keys(save_path="small", **way)))
    dense, small = load_file("wide/model.safetensors"), load_file(path / "model.safetensors")
    stay = [i for i in range(8) if not any(b.holds(i) for b in blocks)]
    for j, i in enumerate(stay):
        for k in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"):
            a, b = dense[f"model.layers.{i}.{k}.weight"], small[f"model.layers.{j}.{k}.weight"]
            T = want[[1, 4].index(i)] if i in (1, 4) and k == "mlp.down_proj" else None
            assert torch.equal(a, b) if T is None else torch.allclose(b.double(), T.T @ a.double(), atol=1e-4)
    assert result["blocks"] == [[2, 4], [5, 6]] and result["n_layers"]["after"] == 5


def test_the_release_s_example_with_two_blocks(place):
    "num_A: 2 with use_4bit, as its files have it, from YAML to a checkpoint"
    pytest.importorskip("bitsandbytes")
    (place / "c.yaml").write_text(json.dumps(keys(num_A=2, layers_to_skip=1, merge_consecutive=True, use_4bit=True, alpha=0, diag=False, save_path="out", min_distance_layer=2)))
    r, path = run(read_config("c.yaml"))
    assert sum(e - s for s, e in r["blocks"]) == 2 and load_model(str(path))[0].config.num_hidden_layers == 6


def test_what_a_quantised_model_cannot_judge_is_still_refused():
    for k, v in dict(select="loss", refit=1, recover="cut").items():
        with pytest.raises(Exception, match=f"{k} is {v!r}, but the 4 bit model only measures"):
            make_config(method="lstsq", use_4bit=True, num_A=1, **{k: v})


@pytest.mark.parametrize("bits", [4, 8])
def test_a_hash_leaves_the_model_as_it_is(place, bits):
    "On some CPUs the state_dict of NF4 weights turns them into something else; whatever is kept is found by such a hash"
    pytest.importorskip("bitsandbytes")
    model, tok = load_model("./wide", **{f"use_{bits}bit": True})
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        before = model(ids).logits
        found = [fingerprint(model) for _ in range(3)]
        assert torch.equal(model(ids).logits, before) and len(set(found)) == 1
        other, _ = load_model("./wide", **{f"use_{bits}bit": True})
        other(ids)
        assert fingerprint(other) == found[0]
        model.model.layers[0].self_attn.q_proj.weight.data.view(torch.uint8)[0] += 1
        assert fingerprint(model) != found[0]
