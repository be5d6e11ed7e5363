"""Layer by layer from the disk: the same block, sums, weights and scores as in memory, at most two layers held, and what cannot be done so is refused."""
import gc
import json
import warnings
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from replaceme import layerwise, pipeline, stats
from replaceme.arch import fold_points, layers_of
from replaceme.blocks import Block, candidates
from replaceme.core import ReplaceMeError
from replaceme.data import batches, load_texts
from replaceme.distance import Profile
from replaceme.evaluate import batch_loss, perplexity
from replaceme.layerwise import ends, open_layerwise, run_layerwise, taps
from replaceme.merge import save_checkpoint
from replaceme.models import load_model, tiny_model, tiny_tokenizer
from replaceme.pipeline import AnalyseConfig, MapConfig, PruneConfig, analyse, make_config, run
from replaceme.stats import Features, collect, collect_between, measure

# dense, with norms of queries and keys, learned positions, one block for attention and MLP, experts, two kinds of layers
FAMILIES = ["llama", "qwen3", "opt", "phi", "mixtral", "qwen3_next", "tied"]
SUMS = ("XtX", "XtR", "RtR")


def texts_of(n=13):
    "Texts of many lengths, some longer than a batch is wide"
    words = "The map stands in for the layers that went and the stream goes on as if nothing had happened to it".split()
    return [" ".join(words[i % 7:][: 2 + (5 * i) % 17]) for i in range(n)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    "A checkpoint in several files, with the text to calibrate on"
    folder = tmp_path_factory.mktemp(request.param)
    kw = dict(model_type="llama", tie_word_embeddings=True) if request.param == "tied" else dict(model_type=request.param)
    model = tiny_model(layers=6, **kw)
    save_checkpoint(model, folder / "dense", max_shard_size="60KB", inputs=tiny_tokenizer())
    assert len(list((folder / "dense").glob("*.safetensors"))) > 3
    with (folder / "t.jsonl").open("w") as f:
        f.writelines(json.dumps(dict(text=t)) + "\n" for t in texts_of())
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_checkpoint(tiny_model("llama", layers=6), folder / "dense", max_shard_size="60KB", inputs=tiny_tokenizer())
    with (folder / "t.jsonl").open("w") as f:
        f.writelines(json.dumps(dict(text=t)) + "\n" for t in texts_of())
    (folder / "t.txt").write_text("The map stands in for the layers that went. " * 60)
    return folder


def keys(folder, **more):
    base = dict(model_path=str(folder / "dense"), layers_to_skip=2, method="lstsq", dataset=str(folder / "t.jsonl"), dataset_size=None, max_length=64,
                batch_size=4, eval_dataset=None, prompt=None, speed=False)
    return {**base, **more}


def both(folder, tokens=200, **kw):
    "The folder pruned in memory, and from the disk"
    plain, _ = run(make_config(**keys(folder, **kw), save_path=str(folder / "plain")))
    streamed, _ = run(make_config(**keys(folder, **kw), save_path=str(folder / "streamed"), stream_weights=True, stream_tokens=tokens))
    return plain, streamed


def loaded(folder):
    return [AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("plain", "streamed")]


@torch.no_grad()
def logits(model):
    ids = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    return model(ids, attention_mask=torch.ones_like(ids)).logits


def calibration(folder, size=4):
    tok = AutoTokenizer.from_pretrained(folder / "dense")
    return batches(load_texts(str(folder / "t.jsonl"), tokenizer=tok, size=None, max_length=64), tok, size, 64)


def test_a_run_from_the_disk_is_the_run_in_memory(family):
    plain, streamed = both(family)
    for k in ("blocks", "n_layers", "parameters", "choice"):
        assert streamed[k] == plain[k], k
    assert streamed["fit"]["error"] == pytest.approx(plain["fit"]["error"], rel=1e-10)
    assert streamed["distance"]["profile"] == plain["distance"]["profile"]
    assert streamed["calibration"] == plain["calibration"]
    a, b = loaded(family)
    one, two = [{k: v for k, v in m.config.to_dict().items() if k != "_name_or_path"} for m in (a, b)]
    assert one == two and len(layers_of(b)) == 4
    for (n, p), (m, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert n == m and p.dtype == q.dtype and (p - q).abs().max() <= 1e-6 * p.abs().max(), n
    assert torch.equal(logits(a), logits(b))
    files = [{f.name for f in (family / d).iterdir() if f.suffix != ".safetensors"} - {"model.safetensors.index.json"} for d in ("plain", "streamed")]
    assert files[0] == files[1]
    record = json.loads((family / "streamed/replaceme.json").read_text())
    assert record["config"]["stream_weights"] is True and record["config"]["stream_tokens"] == 200


@pytest.mark.parametrize("size", [1, 4, 13])
@pytest.mark.parametrize("tokens", [1, 90, 10**6])
def test_sums_and_profile_do_not_depend_on_the_chunk(llama, tokens, size):
    "A chunk of one batch, of some, of all; texts alone, in padded batches of which the last is short, in one batch"
    model, _ = load_model(llama / "dense")
    away, _ = open_layerwise(llama / "dense", tokens=tokens)
    bs, blocks, points, other = calibration(llama, size), candidates(6, 2), fold_points(model, range(5)), fold_points(away, range(5))
    a, b = [measure(m, bs, blocks, Profile(6), k=2) for m in (model, away)]
    assert [x for _, x in a.ranked] == [x for _, x in b.ranked] and a.sinks == b.sinks
    assert torch.equal(a.profile.mean, b.profile.mean) and torch.equal(a.profile.stderr, b.profile.stderr)
    for feats in (Features(), Features(wide=True, affine=True, weights="inv_norm"), Features(state=True)):
        ref, got = collect(model, bs, blocks, points, feats=feats), collect(away, bs, blocks, other, feats=feats)
        for block in blocks:
            assert got[block].n == ref[block].n
            for k in SUMS:
                x, y = getattr(ref[block], k), getattr(got[block], k)
                assert (x - y).norm() <= 1e-10 * x.norm(), (block, k)
    g, ref = collect_between(away, away, bs, [other[1]], 2, 4), collect(model, bs, [Block(2, 4)], points)[Block(2, 4)]
    assert (g.XtR - ref.XtR).norm() <= 1e-10 * ref.XtR.norm()


@pytest.mark.parametrize("more", [dict(method="remove"), dict(method="auto", refit=0, borrow=False), dict(ridge="auto", select="fit", top_k=2), dict(map="wide", weights="inv_norm"),
                                  dict(structure="diag", mask=.2), dict(blocks=[[2, 4]], layers_to_skip=None), dict(sinks="allow", metric="cosine", alpha=.1)],
                         ids=lambda m: "-".join(m))
def test_every_recipe_of_one_walk_is_the_one_in_memory(llama, more):
    plain, streamed = both(llama, 150, **more)
    assert streamed["blocks"] == plain["blocks"]
    a, b = loaded(llama)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-6 * p.abs().max()
    for x, y in zip(plain["choice"], streamed["choice"], strict=True):
        assert {**x, "blocks": str(x["blocks"])} == pytest.approx({**y, "blocks": str(y["blocks"])})


def test_neurons_and_layers_behind_the_cut_come_from_the_disk(family):
    plain, streamed = both(family, 150, method="auto", refit=2)
    assert streamed["blocks"] == plain["blocks"] and streamed["choice"] == plain["choice"]
    assert streamed["fit"].get("borrowed") == plain["fit"].get("borrowed")
    experts = family.name.startswith(("mixtral", "qwen3_next"))  # which are left as they are
    assert bool(plain["refits"]) is not experts
    assert bool(plain["fit"].get("borrowed")) or experts or family.name.startswith("phi")  # an MLP beside attention
    for x, y in zip(plain["refits"], streamed["refits"], strict=True):
        assert x == {k: v if isinstance(v, str) else pytest.approx(v, rel=1e-5) for k, v in y.items()}
    a, b = loaded(family)
    for (n, p), (m, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert n == m and (p - q).abs().max() <= 1e-5 * p.abs().max(), n


@pytest.mark.parametrize("more", [dict(top_k=3), dict(map="narrow"), dict(map="wide", weights="none", borrow=True), dict(borrow=False)],
                         ids=lambda m: "-".join(m))
def test_every_recipe_with_refits_is_the_one_in_memory(llama, more):
    plain, streamed = both(llama, 150, method="auto", refit=2, **more)
    assert streamed["refits"] == plain["refits"] and streamed["blocks"] == plain["blocks"]
    a, b = loaded(llama)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_layers_that_are_refitted_are_not_read_for_each_batch(llama, tmp_path, monkeypatch):
    read, plain = [], layerwise.fetch
    monkeypatch.setattr(layerwise, "fetch", lambda layer: (read.append(1), plain(layer))[1])
    def reads(size, refit=2):
        read.clear()
        base = keys(llama, method="auto", refit=refit, blocks=[[1, 3]], layers_to_skip=None, batch_size=size)
        run(make_config(**base, save_path=str(tmp_path / "x"), stream_weights=True))
        return len(read)
    one, many = reads(13), reads(1)
    assert one == many > reads(4, refit=0)


def test_both_models_are_scored_in_walks(llama):
    "The held-out loss of whole pieces, before and after, and of padded batches text by text"
    plain, streamed = both(llama, 100, eval_dataset=str(llama / "t.txt"), eval_length=24, eval_size=5)
    for when in ("before", "after"):
        assert streamed["perplexity"][when]["losses"] == pytest.approx(plain["perplexity"][when]["losses"], rel=1e-6)
    model, tok = load_model(llama / "dense")
    away, _ = open_layerwise(llama / "dense", tokens=40)
    assert batch_loss(away, calibration(llama)) == pytest.approx(batch_loss(model, calibration(llama)), rel=1e-6)
    ids = torch.randint(3, 250, (5, 24), generator=torch.Generator().manual_seed(1))
    assert perplexity(away, tok, ids, 24, 5).losses == pytest.approx(perplexity(model, tok, ids, 24, 5).losses, rel=1e-6)


def test_bfloat16_files_are_walked_in_their_dtype_or_another(llama, tmp_path):
    save_checkpoint(tiny_model("llama", layers=6).bfloat16(), tmp_path / "dense", max_shard_size="30KB", inputs=tiny_tokenizer())
    (tmp_path / "t.jsonl").write_text((llama / "t.jsonl").read_text())
    for kw in ({}, dict(dtype="float32")):
        plain, streamed = both(tmp_path, **kw)
        a, b = loaded(tmp_path)
        assert streamed["blocks"] == plain["blocks"] and b.dtype == (torch.float32 if kw else torch.bfloat16)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_profile_and_a_map_alone_come_from_walks(llama, tmp_path):
    from safetensors.torch import load_file
    profiles, maps = [], []
    for s in (False, True):
        more = dict(stream_weights=True, stream_tokens=120) if s else {}
        base = {k: v for k, v in keys(llama).items() if k not in ("prompt", "speed", "eval_dataset", "method")}
        profiles.append(analyse(make_config(AnalyseConfig, **base, **more, distances_path=str(tmp_path / f"{s}.json")))[0])
        _, path = run(make_config(MapConfig, **{k: v for k, v in keys(llama).items() if k not in ("prompt", "speed", "eval_dataset")}, **more,
                                  save_path=str(tmp_path / f"map{s}")))
        maps.append(load_file(path / "transform.safetensors")["T"])
    assert torch.equal(profiles[0].mean, profiles[1].mean)
    assert torch.allclose(maps[0], maps[1], rtol=1e-10)


# what is held

def counted(monkeypatch):
    "A list of bytes of layers' weights that are alive, whenever one more layer was read"
    stores, held, plain = [], [], layerwise.fetch

    def fetch(layer):
        weights = plain(layer)
        stores.extend(weakref.ref(v.untyped_storage()) for vs in weights.values() for v in vs.values())
        held.append(sum(s.nbytes() for r in stores if (s := r()) is not None))
        return weights
    monkeypatch.setattr(layerwise, "fetch", fetch)
    return stores, held


@pytest.mark.parametrize("tokens", [60, 10**6])
def test_two_layers_are_held_at_most(llama, monkeypatch, tokens):
    away, _ = open_layerwise(llama / "dense", tokens=tokens)
    layer = sum(p.numel() * 4 for p in layers_of(away)[0].parameters())
    points = fold_points(away, range(5))
    stores, held = counted(monkeypatch)
    collect(away, calibration(llama), candidates(6, 2), points, Profile(6))
    gc.collect()
    assert layer <= max(held) <= 2 * layer and len(held) % 6 == 0
    assert all(r() is None for r in stores) and all(p.is_meta for p in layers_of(away).parameters())


def test_each_layer_is_read_once_a_chunk_and_those_behind_the_last_end_never(llama, monkeypatch):
    away, _ = open_layerwise(llama / "dense")
    points, read, plain = fold_points(away, [0]), [], layerwise.fetch
    number = {id(layer): i for i, layer in enumerate(layers_of(away))}
    monkeypatch.setattr(layerwise, "fetch", lambda layer: (read.append(number[id(layer)]), plain(layer))[1])
    collect(away, calibration(llama), [Block(1, 3)], points)
    assert read == [0, 1, 2]
    read.clear()
    collect(away, calibration(llama), [], {}, Profile(6))
    assert read == [0, 1, 2, 3, 4, 5]


def test_states_that_wait_stay_within_the_tokens_of_a_chunk(llama, monkeypatch):
    "Candidates keep states of their own, so that chunks are shorter while many of them are in the race"
    away, _ = open_layerwise(llama / "dense", tokens=400)
    seen, plain = [], stats.add_chunk
    def noting(model, chunk, sums, *a, **k):
        seen.append((sum(b["attention_mask"].numel() for _, b in chunk), len(chunk), stats.waiting(sums)))
        return plain(model, chunk, sums, *a, **k)
    monkeypatch.setattr(stats, "add_chunk", noting)
    bs = calibration(llama, 1) * 3
    measure(away, bs, candidates(6, 2), Profile(6))
    assert len(seen) > 2 and all(n <= 400 / w or few == 1 for n, few, w in seen)
    assert len({w for *_, w in seen}) > 1  # candidates dropped out


def test_nothing_hangs_on_the_model_after_an_interruption(llama):
    away, _ = open_layerwise(llama / "dense")
    before = [layer.forward for layer in layers_of(away)]
    def stop(k, i, x):
        if i == 3:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        taps(away, calibration(llama), stop)
    for k in ends(away, calibration(llama)):
        break
    gc.collect()
    assert [layer.forward for layer in layers_of(away)] == before and all(p.is_meta for p in layers_of(away).parameters())


# what is refused

REFUSED = [(dict(method="cosine"), "the solvers of method cosine"),
           (dict(method="laco"), "method laco needs the whole model"), (dict(method="slicegpt"), "method slicegpt needs the whole model"),
           (dict(merge=False), "merge is false"), (dict(num_A=2, layers_to_skip=1), "each of several blocks"), (dict(max_blocks=2), "each of several blocks"),
           (dict(blocks=[[1, 2], [3, 4]], layers_to_skip=None), "each of several blocks"), (dict(layers_to_skip="auto", budget="loss 9"), "layers_to_skip is auto"),
           (dict(dataset="self"), "a data set is self"), (dict(use_4bit=True), "few bits"), (dict(device_map="cpu"), "device_map places layers"),
           (dict(distance_tokens="all"), "distance_tokens is all"), (dict(recover="cut"), "recover trains"), (dict(tasks="piqa"), "tasks has whole models"),
           (dict(prompt="Why?"), "prompt has whole models"), (dict(eval_dataset="x.txt", writing="text"), "writing has whole models")]


@pytest.mark.parametrize("more, words", REFUSED, ids=lambda o: "-".join(o) if isinstance(o, dict) else "")
def test_what_takes_more_than_a_walk_is_refused_before_anything_is_loaded(more, words):
    base = {**dict(model_path="no/such", layers_to_skip=2, method="lstsq", dataset="python-docs"), **more}
    with pytest.raises(ReplaceMeError) as e:
        make_config(**base, stream_weights=True)
    assert str(e.value).startswith("stream_weights is true, but ") and words in str(e.value) and "\n" not in str(e.value)
    make_config(**base)  # which the same without it is not


def test_weights_that_do_not_fit_stay_on_the_disk(llama, tmp_path, monkeypatch):
    "By themselves, where all that is asked for allows it, and with a word; `false` forbids it"
    import replaceme.pipeline as p
    size, to = sum(f.stat().st_size for f in (llama / "dense").glob("*.safetensors")), iter(range(9))

    def go(free, **kw):
        monkeypatch.setattr(p, "free_memory", lambda device: free)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            record, folder = run(make_config(**keys(llama, **kw), save_path=str(tmp_path / f"{next(to)}")))
        said = [str(w.message) for w in said if "of memory are free" in str(w.message)]
        return record["config"]["stream_weights"], said, {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}, record
    plain, streamed = go(10 * size), go(size // 2)
    assert plain[:2] == (None, []) and streamed[0] is True and len(streamed[1]) == 1
    assert "they stay on the disk and are read layer by layer (stream_weights: true)" in streamed[1][0]
    assert all(torch.allclose(plain[2][k], w, rtol=1e-6, atol=1e-7) for k, w in streamed[2].items()) and plain[2].keys() == streamed[2].keys()
    assert go(size // 2, stream_weights=False)[:2] == (False, []) == go(10 * size, stream_weights=False)[:2]
    assert go(size // 2, dtype="bfloat16")[0] is True and go(.7 * size, dtype="bfloat16")[0] is None  # half of it fits
    stays = go(size // 2, method="cosine")
    assert stays[0] is None and "could stay on the disk (stream_weights: true), but the solvers of method cosine" in stays[1][0]


def test_processes_decide_alike_by_the_one_that_has_the_least_memory(llama, monkeypatch):
    import replaceme.pipeline as p
    size = sum(f.stat().st_size for f in (llama / "dense").glob("*.safetensors"))
    monkeypatch.setattr(p, "free_memory", lambda device: 10 * size)
    assert p.streamed_where_needed(make_config(**keys(llama))).stream_weights is None
    monkeypatch.setattr(p, "everybody", lambda mine: [mine, size // 2])
    with pytest.warns(UserWarning, match="they stay on the disk"):
        assert p.streamed_where_needed(make_config(**keys(llama))).stream_weights is True


def test_keys_that_would_be_ignored_are_refused():
    with pytest.raises(ReplaceMeError, match="stream_tokens is 9, but no weights are streamed"):
        make_config(stream_tokens=9)
    with pytest.raises(ReplaceMeError, match="stream_tokens is 0: it must be at least 1"):
        make_config(stream_weights=True, method="lstsq", dataset="python-docs", stream_tokens=0)
    with pytest.raises(ReplaceMeError, match="stream_weights means nothing for a model in memory"):
        make_config(PruneConfig, stream_weights=True, layers_to_skip=1)


def test_a_norm_behind_the_mlp_is_refused_before_any_text(tmp_path):
    save_checkpoint(tiny_model("gemma2", layers=4), tmp_path / "dense", inputs=tiny_tokenizer())
    (tmp_path / "t.jsonl").write_text(json.dumps(dict(text="a b c")) + "\n")
    with pytest.raises(ReplaceMeError, match="a norm follows mlp.down_proj"):
        run(make_config(**keys(tmp_path), save_path=str(tmp_path / "out"), stream_weights=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "t.jsonl"]
    run(make_config(**keys(tmp_path, method="remove"), save_path=str(tmp_path / "out"), stream_weights=True))


def test_layers_that_hand_on_more_than_the_state_are_refused():
    model = tiny_model("llama", layers=4)

    class Remembers(type(layers_of(model)[0])):
        given = [0.]

        def forward(self, hidden_states, *args, **kwargs):
            out = super().forward(hidden_states, *args, **kwargs) + .01 * Remembers.given[0]
            Remembers.given[0] = hidden_states
            return out
    for layer in layers_of(model):
        layer.__class__ = Remembers
    with pytest.raises(ReplaceMeError, match="computes something else layer by layer"):
        run_layerwise(model)


def test_layers_that_hand_their_weights_to_another_module_are_refused(tmp_path):
    "The experts of DBRX get theirs as arguments, which accelerate leaves on the disk: one line, and nothing is left behind"
    save_checkpoint(tiny_model("dbrx", layers=4), tmp_path / "dense", inputs=tiny_tokenizer())
    with pytest.raises(ReplaceMeError, match="DbrxForCausalLM computes something else layer by layer .* leave stream_weights out") as e:
        open_layerwise(tmp_path / "dense")
    assert "a module reads weights that another one has" in str(e.value) and "\n" not in str(e.value)


def test_a_number_that_is_not_finite_is_blamed_on_its_text(llama):
    away, _ = open_layerwise(llama / "dense")
    bs = calibration(llama)
    bs[2]["input_ids"][1, 1] = 310  # a token no other text has
    with torch.no_grad():
        away.model.embed_tokens.weight[310] = torch.nan
    with pytest.raises(ReplaceMeError, match="NaN or infinity in the embeddings, text 9"):
        collect(away, bs, [], {}, Profile(6))


# what is written

@pytest.mark.parametrize("where, e", [("calibrate", KeyboardInterrupt), ("calibrate", OSError), ("save_checkpoint", KeyboardInterrupt), ("reload", OSError)])
def test_an_interruption_leaves_no_folder(llama, tmp_path, monkeypatch, where, e):
    plain = getattr(pipeline, where)

    def broken(*args, **kw):
        if where == "save_checkpoint":
            plain(*args, **kw)  # the files are there, the folder is not in its place
        raise e("stop")
    monkeypatch.setattr(pipeline, where, broken)
    with pytest.raises(e):
        run(make_config(**keys(llama), save_path=str(tmp_path / "out"), stream_weights=True))
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_larger_than_a_layer_or_what_stands_beside(llama, tmp_path, monkeypatch):
    written, plain = [], pipeline.save_checkpoint
    monkeypatch.setattr(pipeline, "save_checkpoint", lambda *a, **k: (written.append(k["max_shard_size"]), plain(*a, **k)))
    _, path = run(make_config(**keys(llama), save_path=str(tmp_path / "out"), stream_weights=True))
    layer = sum(p.nbytes for p in layers_of(tiny_model("llama", layers=6))[0].parameters())
    vocab = tiny_model("llama", layers=6).lm_head.weight.nbytes
    assert written == [max(layer, vocab)]
    assert max(f.stat().st_size for f in path.glob("*.safetensors")) < max(layer, vocab) + 4096


def test_layers_that_share_weights_are_written_as_in_memory(tmp_path):
    "Zamba 2: one block in many layers"
    save_checkpoint(tiny_model("zamba2", layers=6), tmp_path / "dense", inputs=tiny_tokenizer())
    with (tmp_path / "t.jsonl").open("w") as f:
        f.writelines(json.dumps(dict(text=t)) + "\n" for t in texts_of())
    both(tmp_path)
    written = [{k: v for f in (tmp_path / name).glob("*.safetensors") for k, v in load_file(f).items()} for name in ("plain", "streamed")]
    assert set(written[0]) == set(written[1]) and sum(v.nbytes for v in written[0].values()) == sum(v.nbytes for v in written[1].values())
    assert torch.equal(*map(logits, loaded(tmp_path)))
