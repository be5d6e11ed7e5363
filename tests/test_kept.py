"""What is kept is found again by what it depends on, one process at a time, and whole or not at all."""
import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from replaceme import data, kept
from replaceme.arch import fold_points, layers_of
from replaceme.blocks import Block
from replaceme.core import ReplaceMeError
from replaceme.data import batches, load_texts, own_texts
from replaceme.kept import (check_facts, fingerprint, identity, is_whole, kept_folder, keepable, locked, read_kept,
                            text_digests, tokenizer_key, words_sum)
from replaceme.models import load_model, tiny_model, tiny_tokenizer
from replaceme.pipeline import Config, analyse, prune
from replaceme.shards import open_rows, write_rows
from replaceme.sidebyside import kept_perplexity
from replaceme.streamline import streamline

ROOT = Path(__file__).parents[1]
ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=500000.0))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))


def differ(a, b):
    return [k for k in {**a, **b} if a.get(k) != b.get(k)]


# what a model is

CHANGES = dict(
    rope=("llama", ROPE), eps=("llama", dict(rms_norm_eps=1e-3)), activation=("llama", dict(hidden_act="gelu")),
    window=("mistral", dict(sliding_window=5)), residual=("granite", dict(residual_multiplier=.3)),
    attention_scale=("granite", dict(attention_multiplier=.3)), embedding_scale=("granite", dict(embedding_multiplier=3.)),
    logits_scale=("granite", dict(logits_scaling=3.)), softcap=("gemma2", dict(final_logit_softcapping=5.)),
    query_scale=("gemma2", dict(query_pre_attn_scalar=64)), experts=("mixtral", dict(num_experts_per_tok=1)),
    gelu=("gpt2", dict(activation_function="relu")), bos=("llama", dict(bos_token_id=5)))


@pytest.mark.parametrize("name", CHANGES)
def test_the_same_weights_with_another_config_are_another_model(name):
    family, change = CHANGES[name]
    plain, other = tiny_model(family, layers=3), tiny_model(family, layers=3, **change)
    assert fingerprint(plain) == fingerprint(other)
    assert "config" in differ(identity(plain), identity(other))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "mamba", "mixtral"])
def test_a_model_elsewhere_is_the_same_model(family, tmp_path):
    "Saved and loaded, its config respelt and renamed"
    model = tiny_model(family, layers=3)
    model.save_pretrained(tmp_path / "here")
    path = tmp_path / "here/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "_name_or_path": "someone/else", "transformers_version": "4.0", "use_cache": False}))
    (tmp_path / "here").rename(tmp_path / "there")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    assert identity(again) == identity(model)
    again.config.architectures = ["Another"]
    assert identity(again) == identity(model)


def test_what_is_done_to_a_model_in_memory_counts():
    model = tiny_model()
    me = identity(model)
    for change in (lambda m: m.bfloat16(), lambda m: m.model.layers[1].mlp.down_proj.weight.data.mul_(2),
                   lambda m: m.model.layers[1].mlp.down_proj.weight.detach().numpy().__setitem__((0, 0), 7),
                   lambda m: setattr(m.model.layers[1].mlp, "act_fn", nn.GELU()), lambda m: setattr(m.model.norm, "variance_epsilon", 1.),
                   lambda m: m.set_attn_implementation("eager"), lambda m: m.model.layers.pop(-1)):
        other = copy.deepcopy(model)
        assert identity(other) == me
        change(other)
        assert differ(identity(other), me), change


def test_a_head_of_another_kind_is_another_model():
    from transformers import LlamaForSequenceClassification
    model = tiny_model()
    other = LlamaForSequenceClassification(model.config)
    assert "kind" in differ(identity(model), identity(other))


def test_hooks_of_strangers_make_a_model_like_nothing_else(tmp_path):
    model = tiny_model()
    model(torch.arange(4)[None], output_hidden_states=True)  # transformers leaves hooks of its own
    assert keepable(model)
    first = own_texts(model, tiny_tokenizer(), size=2, max_length=12)
    h = model.model.layers[0].register_forward_hook(lambda m, a, out: (out[0] * 0,) if isinstance(out, tuple) else out * 0)
    assert identity(model) != identity(model)
    assert own_texts(model, tiny_tokenizer(), size=2, max_length=12) != first
    h.remove()
    assert own_texts(model, tiny_tokenizer(), size=2, max_length=12) == first
    assert len(list((tmp_path / "cache/self").iterdir())) == 1


def test_what_a_tokenizer_does():
    tok = tiny_tokenizer()
    me = tokenizer_key(tok)

    def changed(f):
        t = copy.deepcopy(tok)
        f(t)
        return tokenizer_key(t) != me
    assert not changed(lambda t: setattr(t, "name_or_path", "else")) and not changed(lambda t: t(["a"], padding=True, truncation=True, max_length=3))
    for f in (lambda t: t.add_tokens(["new"]), lambda t: setattr(t, "chat_template", "other"), lambda t: setattr(t, "eos_token", "<s>"),
              lambda t: t.add_special_tokens(dict(additional_special_tokens=["<x>"]))):
        assert changed(f)


def test_a_tokenizer_elsewhere_is_the_same(tmp_path):
    tok = tiny_tokenizer()
    tok.save_pretrained(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    a, b = [AutoTokenizer.from_pretrained(tmp_path / "b") for _ in range(2)]
    assert tokenizer_key(a) == tokenizer_key(b)
    b.chat_template = "other"
    assert tokenizer_key(a) != tokenizer_key(b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_the_sum_of_the_words_sees_every_change(dtype):
    "What stands for a hash on an accelerator"
    x = (torch.randn(13, 7, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    told = {words_sum(x)}
    for i in range(x.numel()):
        y = x.clone().flatten()
        y[i] = ~y[i] if dtype == torch.bool else y[i] + 1
        told.add(words_sum(y))
    assert len(told) == x.numel() + 1


# what data are

def test_texts_are_known_by_what_the_model_gets():
    tok, texts = tiny_tokenizer(), ["one", "two and more", "three"]
    all_, one = [text_digests(batches(texts, tok, n, 64)) for n in (3, 1)]
    assert all_ == one and len(set(all_)) == 3
    b = batches(texts, tok, 3, 64)[0]
    for place in ((1, 4), (0, 0), (1, 0)):
        mask = b["attention_mask"].clone()
        mask[place] = 0
        assert text_digests([dict(b, attention_mask=mask)]) != all_


# the model's own texts

@pytest.fixture()
def folder(tmp_path):
    tiny_model(layers=6).save_pretrained(tmp_path / "tiny")
    tiny_model(layers=6, **ROPE).save_pretrained(tmp_path / "rope")
    for name in ("tiny", "rope"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "texts.txt").write_text("The map stands in for the layers that went. " * 60)
    return tmp_path


def test_the_text_of_one_model_does_not_serve_another(folder):
    "The same weights, a config with another rope base"
    made = {name: load_texts(tokenizer=tok, model=model, size=3, max_length=24)
            for name in ("tiny", "rope") for model, tok in [load_model(folder / name)]}
    assert made["tiny"] != made["rope"]
    model, tok = load_model(folder / "rope")
    assert data.sample_texts(model, tok, size=3, max_length=24) == made["rope"]


def kept_texts():
    return {p.name for p in (kept.cache_dir() / "self").iterdir()}


def test_what_the_text_of_a_model_depends_on(folder, monkeypatch):
    model, tok = load_model(folder / "tiny")
    ask = lambda m=model, t=tok, **kw: own_texts(m, t, **{**dict(size=2, max_length=8), **kw})
    first, n = ask(), 1
    talk = copy.deepcopy(tok)
    talk.chat_template = "other"
    for args, kw in [((tiny_model(layers=6, **ROPE),), {}), ((copy.deepcopy(model).bfloat16(),), {}), ((model, talk), {}), ((), dict(seed=1)),
                     ((), dict(size=3)), ((), dict(max_length=9))]:
        ask(*args, **kw)
        n += 1
        assert len(kept_texts()) == n, (args, kw)
    (folder / "tiny").rename(folder / "moved")
    assert ask(*load_model(folder / "moved")) == first and len(kept_texts()) == n
    monkeypatch.setattr(data, "RECIPE", 1000)
    ask()
    assert len(kept_texts()) == n + 1


@pytest.mark.parametrize("damage", ["", "{}", '{"text": "cut o', None])
def test_damaged_texts_are_written_again(folder, damage):
    model, tok = load_model(folder / "tiny")
    first = own_texts(model, tok, size=2, max_length=12)
    place, = (kept.cache_dir() / "self").iterdir()
    for f in place.iterdir():
        if damage is None:
            f.unlink()
        else:
            f.write_text(damage)
        assert not is_whole(place)
        assert own_texts(model, tok, size=2, max_length=12) == first and is_whole(place)


# profiles

def profile_config(folder, **kw):
    return Config(**{**dict(model_path=str(folder / "tiny"), dataset=str(folder / "texts.txt"), dataset_size=8, max_length=48, layers_to_skip=2,
                            distances_path=str(folder / "p.json"), method="lstsq", eval_dataset=None, prompt=None), **kw})


def pruned(folder, name="tiny", **kw):
    keys = dict(dataset=str(folder / "texts.txt"), dataset_size=8, max_length=48, layers_to_skip=2, distances_path=str(folder / "p.json"), method="lstsq")
    return prune(*load_model(folder / name, dtype=kw.pop("dtype", None)), **{**keys, **kw})[1]


@pytest.mark.parametrize("change, word", [
    (dict(name="rope"), "model.config"), (dict(dtype="bfloat16"), "model.dtype"), (dict(max_length=32), "data"), (dict(mask=.25), "mask"),
    (dict(metric="cosine"), "metric"), (dict(dataset="python-docs"), "data")])
def test_a_profile_of_something_else_is_refused(folder, change, word):
    analyse(profile_config(folder))
    with pytest.raises(ReplaceMeError, match=f"belongs to another {word}"):
        pruned(folder, **change)


def test_a_profile_of_the_same_data_is_taken_wherever_they_lie(folder):
    analyse(profile_config(folder))
    first = pruned(folder)
    (folder / "texts.txt").rename(folder / "moved.txt")
    (folder / "tiny").rename(folder / "elsewhere")
    for size in (4, 8, 12):  # of fewer texts, or of more
        r = pruned(folder, "elsewhere", dataset=str(folder / "moved.txt"), dataset_size=size)
        assert r["distance"]["profile"] == first["distance"]["profile"]


def test_a_profile_of_a_file_that_changed_is_refused(folder):
    analyse(profile_config(folder))
    (folder / "texts.txt").write_text("Something else is written here now, and has the same name. " * 60)
    with pytest.raises(ReplaceMeError, match="belongs to another data .8 texts, of which 0 are among the 8 of this run"):
        pruned(folder)


def test_a_profile_measured_with_other_tokens_hidden_is_refused(folder):
    analyse(profile_config(folder, mask=.25))
    pruned(folder, mask=.25)
    with pytest.raises(ReplaceMeError, match="belongs to another mask.seed"):
        pruned(folder, mask=.25, seed=1)


@pytest.mark.parametrize("damage, word", [
    ("", "not a profile"), ("{}", "not a profile"), ("[]", "not a profile"), ('{"format": "replaceme profile 1"}', "another version"),
    ('{"format": "replaceme profile 2"}', "damaged"), (lambda d: dict(d, distances={"1": []}), "damaged"), (lambda d: dict(d, sinks=[1]), "damaged"),
    (lambda d: dict(d, distances={**d["distances"], "2": ["x"] * 4}), "damaged"), (lambda d: {k: v for k, v in d.items() if k != "texts"}, "another data")])
def test_a_profile_in_disorder_is_refused_in_one_line(folder, damage, word):
    analyse(profile_config(folder))
    path = folder / "p.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))) if callable(damage) else damage)
    for _ in range(2):
        with pytest.raises(ReplaceMeError, match=word):
            pruned(folder)


def test_a_profile_of_the_last_version_can_be_written_over(folder):
    (folder / "p.json").write_text('{"format": "replaceme profile 1", "distances": {}}')
    analyse(profile_config(folder))
    pruned(folder)


# rows

TEXTS = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 7, 11, 8)]


def padded(texts, hide=()):
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in texts], batch_first=True)
    for at in hide:
        mask[at] = 0
    return [dict(input_ids=ids, attention_mask=mask)]


def rows(folder, model=None, texts=TEXTS, hide=(), **kw):
    model = model or tiny_model(layers=5)
    return write_rows(model, padded(texts, hide), Block(2, 4), fold_points(model, [1]), folder, **{**dict(belongs=dict(model=identity(model))), **kw})


@pytest.mark.parametrize("change, word", [
    (dict(model=tiny_model(layers=5, **ROPE)), "belongs.model.config"), (dict(texts=TEXTS[:3] + [TEXTS[3] + 1]), "data"),
    (dict(hide=[(0, 3)]), "data"), (dict(dtype=torch.bfloat16), "dtype"), (dict(wide=True), "wide")])
def test_rows_of_something_else_are_refused(tmp_path, change, word):
    rows(tmp_path / "r")
    rows(tmp_path / "r")
    with pytest.raises(ReplaceMeError, match=f"holds rows of another {word}"):
        rows(tmp_path / "r", **change)


def test_hidden_tokens_are_not_tokens_that_are_not_there(tmp_path):
    "The visible tokens are the same; what the model computes is not"
    short = [torch.cat([TEXTS[0][:3], TEXTS[0][4:]]), *TEXTS[1:]]
    rows(tmp_path / "r", hide=[(0, 3)])
    with pytest.raises(ReplaceMeError, match="holds rows of another data"):
        rows(tmp_path / "r", texts=short)


def test_rows_of_a_second_block_depend_on_both_models(folder):
    "The target is a state of the dense model, of whose removed layers the pruned one says nothing"
    from replaceme.merge import cut
    from replaceme.search import Recipe, fit_between
    dense = tiny_model(layers=6)
    model = cut(tiny_model(layers=6), [Block(4, 5)])
    r = Recipe(solver="irls", options=dict(sweeps=1), rows_path=str(folder / "acts"))
    bs = padded(TEXTS)
    fit_between(dense, model, bs, [], Block(4, 5), 4, r)
    other = tiny_model(layers=6)
    layers_of(other)[4].mlp.down_proj.weight.data.mul_(2)
    with pytest.raises(ReplaceMeError, match="rows of another belongs.dense.weights"):
        fit_between(other, model, bs, [], Block(4, 5), 4, r)


def shorten(path, n=-8):
    path.write_bytes(path.read_bytes()[:n])


def head(folder, **kw):
    d = json.loads((folder / "rows.json").read_text())
    (folder / "rows.json").write_text(json.dumps({k: v for k, v in {**d, **kw}.items() if v is not None}))


DISORDER = dict(
    truncated=lambda d: shorten(d / "Y.bin"), longer=lambda d: (d / "A.bin").write_bytes((d / "A.bin").read_bytes() + b"more"),
    gone=lambda d: (d / "X.bin").unlink(), no_map=lambda d: shorten(d / "E.bin"), foreign=lambda d: (d / "thesis.tex").write_text("years"),
    subfolder=lambda d: (d / "more").mkdir(), empty=lambda d: (d / "rows.json").write_text(""), braces=lambda d: (d / "rows.json").write_text("{}"),
    listed=lambda d: (d / "rows.json").write_text("[]"), half=lambda d: shorten(d / "rows.json", 60), headless=lambda d: (d / "rows.json").unlink(),
    no_count=lambda d: head(d, texts=None), words=lambda d: head(d, rows="many"), more_than_all=lambda d: head(d, rows=1000),
    negative=lambda d: head(d, rows=-1), no_widths=lambda d: head(d, widths=None), odd_dtype=lambda d: head(d, dtype="float46"),
    older=lambda d: head(d, format="replaceme rows, version 1"))


@pytest.mark.parametrize("name", DISORDER)
def test_rows_in_disorder_are_refused_ever_after(tmp_path, name):
    rows(tmp_path / "r", wide=True)
    DISORDER[name](tmp_path / "r")
    before = {p.name: p.stat().st_size for p in (tmp_path / "r").iterdir()}
    for _ in range(2):
        with pytest.raises(ReplaceMeError, match="folder|version") as e:
            rows(tmp_path / "r", wide=True)
        assert "\n" not in str(e.value) and str(tmp_path / "r") in str(e.value)
    with pytest.raises(ReplaceMeError):
        open_rows(tmp_path / "r")
    assert {p.name: p.stat().st_size for p in (tmp_path / "r").iterdir()} == before


def test_a_place_for_rows_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/inside"):
        with pytest.raises(ReplaceMeError, match="is a file, or lies in one"):
            rows(place)


# scores

def test_what_a_score_depends_on(tmp_path):
    model, tok, text = tiny_model(), tiny_tokenizer(), "scored, piece by piece. " * 20
    ask = lambda m=model, t=tok, s=text, **kw: kept_perplexity(m, t, s, **{**dict(length=24, pieces=4), **kw})
    first, n = ask(), 1
    talk = tiny_tokenizer()
    talk.chat_template = "other"
    for args, kw in [((tiny_model(**ROPE),), {}), ((model, talk), {}), ((model, tok, text.upper()), {}), ((copy.deepcopy(model).bfloat16(),), {}),
                     ((), dict(length=32)), ((), dict(pieces=3))]:
        ask(*args, **kw)
        n += 1
        assert len(list((tmp_path / "cache/scores").iterdir())) == n, (args, kw)
    assert ask(tiny_model(), tiny_tokenizer()) == first and len(list((tmp_path / "cache/scores").iterdir())) == n


def test_a_score_that_was_tampered_with_is_made_again(tmp_path):
    ask = lambda: kept_perplexity(tiny_model(), tiny_tokenizer(), "scored, piece by piece. " * 20, length=24, pieces=4)
    first = ask()
    path, = (tmp_path / "cache/scores").iterdir()
    d = json.loads(path.read_text())
    for result in ({}, [], {**d["result"], "loss": 0.}):
        path.write_text(json.dumps({**d, "result": result}))
        assert read_kept(path) is None and ask() == first


# trainings

def train(folder, dense=None, texts=TEXTS, **kw):
    return streamline(dense or tiny_model(layers=5), padded(texts), 1, block=Block(2, 4), folder=folder,
                      **{**dict(tokens=200, learning_rate=1e-2, eval_steps=2), **kw})


@pytest.fixture(scope="module")
def a_training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "t"
    train(folder)
    return folder


@pytest.fixture()
def training(a_training, tmp_path):
    "A folder of a finished training, moved to another place"
    import shutil
    return Path(shutil.copytree(a_training, tmp_path / "t"))


def last(folder):
    return max(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))


@pytest.mark.parametrize("change, word", [
    (dict(dense=tiny_model(layers=5, **ROPE)), "dense.config"), (dict(texts=TEXTS[:3] + [TEXTS[3] + 1]), "texts"), (dict(seed=1), "seed|model"),
    (dict(tokens=400), "steps"), (dict(learning_rate=1e-3), "trainer.learning_rate")])
def test_a_training_of_something_else_is_refused(training, change, word):
    with pytest.raises(ReplaceMeError, match=f"holds a training of another ({word})"):
        train(training, **change)


def test_a_training_that_was_moved_has_its_best_weights(a_training, training):
    a, b = [train(f)[0].state_dict() for f in (a_training, training)]
    assert all(torch.equal(a[k], b[k]) for k in a)


TORN = dict(
    empty_note=lambda d: (d / "training.json").write_text(""), braces=lambda d: (d / "training.json").write_text("{}"),
    older=lambda d: (d / "training.json").write_text('{"format": "replaceme training 1"}'), no_note=lambda d: (d / "training.json").unlink(),
    weights=lambda d: shorten(last(d) / "model.safetensors"), no_weights=lambda d: (last(d) / "model.safetensors").unlink(),
    optimizer=lambda d: shorten(last(d) / "optimizer.pt"), no_optimizer=lambda d: (last(d) / "optimizer.pt").unlink(),
    random=lambda d: shorten(next(last(d).glob("rng_state*"))),
    empty_state=lambda d: (last(d) / "trainer_state.json").write_text("[]"))


@pytest.mark.parametrize("name", TORN)
def test_a_training_in_disorder_is_refused_ever_after(training, name):
    TORN[name](training)
    for _ in range(2):
        with pytest.raises(ReplaceMeError) as e:
            train(training)
        assert str(training) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("left", [0, 1, 40, None])
def test_a_checkpoint_that_a_kill_left_unfinished_is_passed_over(a_training, training, left):
    "Its state is written last: half of it, or none, and the training goes on from the checkpoint before, or from the start"
    state = last(training) / "trainer_state.json"
    state.unlink() if left is None else state.write_text(state.read_text()[:left])
    a, b = [train(f)[0].state_dict() for f in (a_training, training)]
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_other_folders_beside_the_checkpoints_are_no_matter(a_training, training):
    for name in ("checkpoint-best", "checkpoint-3-old", "runs"):
        (training / name).mkdir()
    train(training)


def test_a_folder_of_something_else_is_no_place_for_a_training(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years")
    with pytest.raises(ReplaceMeError, match="was not written as a folder of a training"):
        train(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


# rows of a comparison

def bench_key(folder, name="tiny", talk=None, dataset=None, entry="lstsq", **kw):
    from replaceme.compare import Bench, CompareConfig, plans
    cfg = CompareConfig(**{**dict(model_path=str(folder / name), methods=[entry], layers=[2], dataset=dataset or str(folder / "texts.txt"), dataset_size=4,
                                  max_length=32, eval_dataset="python-docs", eval_size=2, eval_length=32), **kw})
    model, tok = load_model(folder / name)
    tok.chat_template = talk or tok.chat_template
    bench = Bench(model, tok, cfg, folder / "compared")
    return bench.key(), bench.key(plans(cfg)[0])


def test_what_a_row_of_a_comparison_depends_on(folder):
    first = bench_key(folder)
    for change in (dict(name="rope"), dict(talk="other")):
        assert not set(bench_key(folder, **change)) & set(first), change
    for change in (dict(max_length=24), dict(dataset_size=5), dict(dataset="python-docs"), dict(seeds=[1])):
        dense, row = bench_key(folder, **change)
        assert dense == first[0] and row != first[1], change
    (folder / "tiny").rename(folder / "moved")
    assert bench_key(folder, "moved") == first


@pytest.mark.parametrize("kw, at", [
    (dict(), 0), (dict(dataset=["self", "texts.txt"]), 0),  # a part of a mixture with what the model writes
    (dict(entry=dict(method="lstsq", recover="cut", train_tokens=640)), 400)])  # behind the texts of the calibration
def test_a_file_that_changed_makes_another_row(folder, monkeypatch, kw, at):
    monkeypatch.chdir(folder)
    first, text = bench_key(folder, **kw), (folder / "texts.txt").read_text()
    (folder / "texts.txt").write_text(text[:at] + "Another " + text[at:])
    assert bench_key(folder, **kw)[0] == first[0] and bench_key(folder, **kw)[1] != first[1]


# several at once

def start(code, *args):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return warm.Popen([sys.executable, "-c", code, *map(str, args)], **pipes, text=True)


def ends(*ps):
    "What they said, when all have ended well"
    said = [p.communicate(timeout=300) for p in ps]
    assert [p.returncode for p in ps] == [0] * len(ps), [err[-2000:] for _, err in said]
    return [out for out, _ in said], [err for _, err in said]


WRITES = """
import sys, hashlib
from pathlib import Path
from replaceme import data
from replaceme.models import load_model
real = data.sample_texts
def counted(*a, **k): print('made', flush=True); return real(*a, **k)
data.sample_texts = counted
print('ready', flush=True); sys.stdin.readline()
print(hashlib.sha256(repr(data.own_texts(*load_model(sys.argv[1]), size=4, max_length=64)).encode()).hexdigest())
"""


def test_two_that_want_the_same_text_write_it_once(folder):
    ps = [start(WRITES, folder / "tiny") for _ in range(2)]
    assert [p.stdout.readline() for p in ps] == ["ready\n"] * 2
    for p in ps:
        p.stdin.write("\n")
        p.stdin.flush()
    out, _ = ends(*ps)
    assert sum(o.count("made") for o in out) == 1 and len({o.split()[-1] for o in out}) == 1
    place, = (folder / "cache/self").iterdir()
    assert is_whole(place)


ROWS = """
import sys, time, warnings
sys.path.insert(0, sys.argv[1])
from test_kept import *
from replaceme import shards
real, slow = shards.batch_rows, sys.argv[3]
def batch_rows(*a, **k):
    global slow
    print('at work', flush=True)
    if slow=='stop': time.sleep(600)
    if slow=='gate': sys.stdin.readline(); slow = ''
    return real(*a, **k)
shards.batch_rows = batch_rows
m = tiny_model(layers=5, **(ROPE if sys.argv[4:] else {}))
bs = [b for t in TEXTS for b in padded([t])]
try: r = write_rows(m, bs, Block(2, 4), fold_points(m, [1]), sys.argv[2], belongs=dict(model=identity(m)))
except ReplaceMeError as e: print('refused', e)
else: print('sum', float(r.Y.double().sum()), len(r))
"""


def waits(p):
    "The second process has come to the lock"
    said = ""
    while "waiting" not in said:
        said += p.stderr.readline()
        assert p.poll() is None, said
    return said


def test_two_that_write_the_same_rows_write_them_once(tmp_path):
    a = start(ROWS, ROOT / "tests", tmp_path / "acts/2-4", "gate")
    assert a.stdout.readline() == "at work\n"
    b = start(ROWS, ROOT / "tests", tmp_path / "acts/2-4", "fast")
    assert f"in use by process {a.pid}: waiting for it to end" in waits(b)
    a.stdin.write("\n")
    a.stdin.flush()
    (one, two), _ = ends(a, b)
    assert one.count("at work") == 3 and two.count("at work") == 0  # the first word of `a` is read already
    assert one.split("sum")[1] == two.split("sum")[1]
    assert sorted(os.listdir(tmp_path / "acts")) == ["2-4"]
    assert open_rows(tmp_path / "acts/2-4").Y.shape == (35, 32)


def test_the_second_of_two_with_other_rows_is_refused(tmp_path):
    a = start(ROWS, ROOT / "tests", tmp_path / "r", "gate")
    assert a.stdout.readline() == "at work\n"
    b = start(ROWS, ROOT / "tests", tmp_path / "r", "fast", "rope")
    waits(b)
    a.stdin.write("\n")
    a.stdin.flush()
    (one, two), _ = ends(a, b)
    assert "sum" in one and "refused" in two and "holds rows of another belongs.model.config" in two


def test_a_lock_falls_with_the_process_that_held_it(tmp_path):
    a = start(ROWS, ROOT / "tests", tmp_path / "r", "stop")
    assert a.stdout.readline() == "at work\n"
    assert (tmp_path / ".r.lock").exists()
    a.send_signal(signal.SIGKILL)
    a.wait()
    (out,), (err,) = ends(start(ROWS, ROOT / "tests", tmp_path / "r", "fast"))
    assert "sum" in out and "waiting" not in err
    assert sorted(os.listdir(tmp_path)) == ["r"]


def test_who_waits_for_a_process_that_is_killed_goes_on(tmp_path):
    a = start(ROWS, ROOT / "tests", tmp_path / "r", "stop")
    assert a.stdout.readline() == "at work\n"
    b = start(ROWS, ROOT / "tests", tmp_path / "r", "fast")
    waits(b)
    a.send_signal(signal.SIGKILL)
    (out,), _ = ends(b)
    assert "sum" in out


TURN = """
import os, sys
from replaceme.kept import locked
for _ in range(100):
    with locked(sys.argv[1] + '/x'):
        os.mkdir(sys.argv[1] + '/inside')  # fails where another one is inside
        os.rmdir(sys.argv[1] + '/inside')
"""


def test_never_two_inside(tmp_path):
    ends(*[start(TURN, tmp_path) for _ in range(4)])
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_needs_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "open", lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "no")), raising=False)
    with locked(tmp_path / "x"):
        pass


def test_a_folder_is_made_once_and_whole(tmp_path):
    calls = []

    def make(folder):
        calls.append(1)
        (folder / "sub").mkdir()
        (folder / "sub/a.bin").write_bytes(b"x" * 9)
    for damage in (lambda f: None, lambda f: shorten(f, 3), lambda f: f.unlink(), lambda f: f.write_bytes(b"y" * 9)):
        damage(tmp_path / "k/sub/a.bin") if calls else None
        assert (kept_folder(tmp_path / "k", make) / "sub/a.bin").read_bytes() == b"x" * 9
    assert len(calls) == 4 and os.listdir(tmp_path) == ["k"]


def test_facts_that_differ_are_named():
    with pytest.raises(ReplaceMeError, match=r"holds rows of another a.b \(1, now 2\)"):
        check_facts("x", "rows", dict(a=dict(b=1), c=3), dict(a=dict(b=2), c=4))
    check_facts("x", "rows", dict(a=(1, 2), d=torch.float32), dict(a=[1, 2], d="torch.float32"))
