"""What people call in a notebook with what they have at hand: it is read as it was meant, or refused, and never measured as something else."""
import contextlib
import re
from fractions import Fraction
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from replaceme.blocks import Block
from replaceme.compare import CompareConfig
from replaceme.config import read_config
from replaceme.core import ReplaceMeError, exists
from replaceme.data import batches, load_texts
from replaceme.evaluate import continuation, perplexity, prompt_ids
from replaceme.merge import cut, replace_block, save_checkpoint
from replaceme.models import load_model, tiny_model, tiny_tokenizer
from replaceme.pipeline import EvaluateConfig, _told, make_config, prune
from replaceme.feed import scored_and_fitted
from replaceme.save import check_own
from replaceme.sidebyside import kept_perplexity, side_by_side

TOK = tiny_tokenizer()
TEXT = "The quick brown fox jumps over the lazy dog, and then the dog jumps over the fox. " * 12
ROWS = [f"{i} layers went and {i * i} are left over for the rest of us" for i in range(12)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model():
    return tiny_model("llama", layers=6)


@torch.no_grad()
def loss(m):
    ids = TOK(TEXT, return_tensors="pt").input_ids[:, :200]
    return m(ids, labels=ids).loss.item()


# a model that was changed without a word in its weights or config

def slower(m): m.model.rotary_emb.inv_freq.mul_(.25)
def without_a_layer(m): m.model.layers[3].forward = lambda h, *args, **kw: h
def sharper(m): [setattr(layer.self_attn, "scaling", 3 * layer.self_attn.scaling) for layer in m.model.layers]


@pytest.mark.parametrize("change", [slower, without_a_layer, sharper])
def test_scores_and_texts_are_those_of_the_model_that_was_asked(model, change):
    kept_perplexity(model, TOK, TEXT, 32, 4)
    own = load_texts("self", tokenizer=TOK, model=model, size=4, max_length=24)
    change(model)
    assert kept_perplexity(model, TOK, TEXT, 32, 4)["value"] == pytest.approx(perplexity(model, TOK, TEXT, 32, 4).value)
    assert load_texts("self", tokenizer=TOK, model=model, size=4, max_length=24) != own
    dense = tiny_model("llama", layers=6)
    assert kept_perplexity(dense, TOK, TEXT, 32, 4)["value"] == pytest.approx(perplexity(dense, TOK, TEXT, 32, 4).value)  # and nothing else stayed behind


def test_a_forward_that_a_copy_would_call_on_the_dense_model_is_refused(model):
    inner, calls = model.forward, []
    model.forward = lambda *args, **kw: calls.append(1) or inner(*args, **kw)
    with pytest.raises(ReplaceMeError, match="del model.forward"):
        prune(model, TOK, 2, method="lstsq", dataset=[dict(text=t) for t in ROWS], dataset_size=8, max_length=32)
    del model.forward
    small, _ = prune(model, TOK, 2, method="lstsq", dataset=[dict(text=t) for t in ROWS], dataset_size=8, max_length=32)
    assert loss(small) != loss(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing(model, dtype):
    keys = dict(method="lstsq", dataset=[dict(text=t) for t in ROWS], dataset_size=8, max_length=32, ridge=.1)
    want, _ = prune(model, TOK, 2, **keys)
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got, _ = prune(model, TOK, 2, **keys)
    finally:
        torch.set_default_dtype(old)
    assert all(torch.equal(a, b) for a, b in zip(want.state_dict().values(), got.state_dict().values()))


@pytest.mark.parametrize("method", ["lstsq", "cosine"])
@pytest.mark.parametrize("around", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode, torch.no_grad])
def test_what_is_on_around_a_call_changes_nothing(model, around, method):
    keys = dict(method=method, dataset=[dict(text=t) for t in ROWS], dataset_size=8, max_length=32)
    want, _ = prune(model, TOK, 2, **keys)
    with around():
        got, _ = prune(model, TOK, 2, **keys)
        lost = perplexity(model, TOK, TEXT, length=64).losses
    assert lost == perplexity(model, TOK, TEXT, length=64).losses
    assert all(torch.equal(a, b) for a, b in zip(want.state_dict().values(), got.state_dict().values()))


def on_their_own(model):
    "What trains and is called by itself, and what reads or writes text: `{name: what comes out}`"
    from replaceme.evaluate import batch_loss
    from replaceme.export import logits_of
    from replaceme.llm_pruner import llm_pruner
    from replaceme.recover import recover
    from replaceme.streamline import streamline
    whole = torch.ones(2, 24).long()
    bs = [dict(input_ids=torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(i)), attention_mask=whole) for i in range(4)]
    blocks = [Block(2, 4)]
    few = dict(texts=bs, held=bs[:1], tokens=400, seed=0, learning_rate=1e-2)  # enough for the weights to move
    made = {rung: lambda rung=rung: recover(model, cut(model, blocks), blocks, rungs=[rung], rank=2, **few)[0] for rung in ("fold", "lora")}
    made |= dict(streamline=lambda: streamline(model, bs, 2, **few)[0], llm_pruner=lambda: llm_pruner(model, bs, 1)[0])
    said = dict(loss=lambda: batch_loss(model, bs), logits=lambda: logits_of(model, bs[0]["input_ids"][:1]), text=lambda: continuation(model, TOK, "The map", 8),
                own=lambda: prune(model, TOK, 2, method="lstsq", dataset="self", dataset_size=4, max_length=16)[0])
    return made | said


@pytest.mark.parametrize("name", ["fold", "lora", "streamline", "llm_pruner", "loss", "logits", "text", "own"])
@pytest.mark.parametrize("around", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode])
def test_what_is_on_around_a_part_changes_nothing(model, around, name):
    want = on_their_own(model)[name]()
    with around():
        got = on_their_own(model)[name]()
    want, got = [x.state_dict() if hasattr(x, "state_dict") else {"it": x} for x in (want, got)]
    assert all(torch.equal(a, got[k]) if torch.is_tensor(a) else a == got[k] for k, a in want.items())


@pytest.mark.parametrize("method", ["cosine", "streamline"])
def test_a_run_within_inference_mode_trains(method, tmp_path):
    from replaceme import run
    save_checkpoint(tiny_model("llama"), tmp_path / "m", inputs=TOK)
    (tmp_path / "t.txt").write_text("\n".join(ROWS))
    keys = dict(model_path=str(tmp_path / "m"), method=method, layers_to_skip=2, dataset=str(tmp_path / "t.txt"), dataset_size=8, max_length=32, eval_dataset=None, prompt=None)
    run(**keys, save_path=str(tmp_path / "plain"))
    with torch.inference_mode():
        run(**keys, save_path=str(tmp_path / "within"))
    a, b = [AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("plain", "within")]
    assert all(torch.equal(a[k], b[k]) for k in a)


WAYS = {m: dict(method=m) for m in ("lstsq", "remove", "auto", "cosine", "uidl", "shortgpt", "linearpatch", "llm_pruner", "slicegpt", "streamline")}
WAYS |= dict(laco=dict(method="laco", threshold=-1), unmerged=dict(method="lstsq", merge=False), plain=dict(method="slicegpt", plain=True),
             fold=dict(method="lstsq", recover="fold"), lora=dict(method="lstsq", recover="lora"))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_done_to_the_pruned_model_is_not_done_to_the_dense_one(model, way):
    keys = dict(WAYS[way])
    if "recover" in keys or way == "streamline":
        keys |= dict(train_tokens=256)
    want = {k: v.clone() for k, v in model.state_dict().items()}
    small, _ = prune(model, TOK, 2, dataset=[dict(text=t) for t in ROWS], dataset_size=8, max_length=32, **keys)
    shared = {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert shared or way in ("slicegpt", "plain", "lora")  # what stays as it is, is not copied
    small.requires_grad_(False).half()
    assert model.dtype == torch.float32 and all(p.requires_grad for p in model.parameters())
    small.float()
    assert all(torch.equal(v, want[k]) for k, v in model.state_dict().items())


# blocks

def test_blocks_are_pairs_and_nothing_else(model):
    want = loss(cut(model, [Block(2, 5)]))
    for same in ([range(2, 5)], [(2, 5)], [[np.int64(2), np.int64(5)]], (range(2, 5),)):
        assert loss(cut(model, same)) == want
    assert loss(replace_block(model, range(2, 5), None)) == loss(replace_block(model, (2, 5), None)) == want
    for bad in ([[2, 3, 4]], [range(1, 6, 2)], [Block(3, 3)], [Block(4, 2)], [Block(1, 3), Block(2, 4)], Block(2, 4), [(0, 2)], [(2, 7)]):
        with pytest.raises(ReplaceMeError):
            cut(model, bad)


# a folder that holds another model

@pytest.mark.parametrize("first, second", [("5GB", "50KB"), ("50KB", "5GB"), ("50KB", "90KB")])
def test_what_was_saved_last_is_what_loads(model, tmp_path, first, second):
    a, b = cut(model, [Block(1, 3)]), cut(model, [Block(3, 5)])
    (tmp_path / "notes.bin").write_bytes(b"mine")
    save_checkpoint(a, tmp_path, max_shard_size=first, inputs=TOK)
    save_checkpoint(b, tmp_path, max_shard_size=second, inputs=TOK)
    assert loss(AutoModelForCausalLM.from_pretrained(tmp_path)) == pytest.approx(loss(b))
    assert loss(load_model(tmp_path)[0]) == pytest.approx(loss(b)) and (tmp_path / "notes.bin").read_bytes() == b"mine"


def test_a_tilde_is_somebodys_home(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    save_checkpoint(model, "~/small", inputs=TOK)
    assert (tmp_path / "home/small/model.safetensors").exists() and not Path("~").exists()


# what is no text

def wrongs(folder):
    (folder / "x.txt").write_text(TEXT)
    rows = dict(text=[TEXT, TEXT])
    return ["python-docs", str(folder / "x.txt"), folder / "x.txt", pd.DataFrame(rows), rows, datasets.Dataset.from_dict(rows), [dict(text=TEXT)],
            TOK(TEXT, return_tensors="pt"), [[1, 2, 3]], TEXT.encode(), None]


@pytest.mark.parametrize("i", range(11))
def test_what_is_no_text_is_not_measured(model, tmp_path, i):
    text = wrongs(tmp_path)[i]
    for call in (lambda: perplexity(model, TOK, text, 32, 4), lambda: batches(text, TOK, 4, 32)):
        with pytest.raises(ReplaceMeError, match="load_texts makes texts"):
            call()


def test_a_text_alone_and_ids_of_any_kind(model):
    assert [b["input_ids"].tolist() for b in batches(TEXT, TOK, 4, 32)] == [b["input_ids"].tolist() for b in batches([TEXT], TOK, 4, 32)]
    ids = torch.tensor(TOK(TEXT).input_ids[:64]).view(2, 32)
    assert perplexity(model, TOK, ids.int()).value == perplexity(model, TOK, ids).value
    for bad in (ids[0], ids.float()):
        with pytest.raises(ReplaceMeError, match="pieces, length"):
            perplexity(model, TOK, bad)


def test_rows_that_name_files_are_no_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x.jsonl", "y.jsonl"):
        Path(name).write_text('{"text": "a text of the table"}\n' * 4)
    for bad in ([dict(file="x.jsonl"), dict(file="y.jsonl")], dict(path=["x.jsonl", "y.jsonl"]), [dict(name="x.jsonl", pack=True)]):
        with pytest.raises(ReplaceMeError, match="names of files"):
            load_texts(bad, tokenizer=TOK, size=2)
    assert load_texts([dict(path="x.jsonl", column="text")], tokenizer=TOK, size=2) == ["a text of the table"] * 2


@pytest.mark.parametrize("kind", [pd.Series, np.array, lambda rows: datasets.Dataset.from_dict(dict(text=rows))["text"], tuple])
def test_texts_come_in_many_lists(kind):
    assert load_texts(kind(ROWS), tokenizer=TOK, size=None) == ROWS


def test_a_generator_is_refused_wherever_it_is_given():
    with pytest.raises(ReplaceMeError, match="generator"):
        load_texts((t for t in ROWS), tokenizer=TOK, size=4)


# prompts

def test_a_prompt_is_a_text_or_a_chat(model):
    chat = [dict(role="user", content="What is A?"), dict(role="assistant", content="B."), dict(role="user", content="And C?")]
    assert TOK.decode(prompt_ids(TOK, chat)["input_ids"][0]).count("[user]") == 2
    assert isinstance(continuation(model, TOK, chat, 4), str)
    for bad, ask in ((["What?", "And?"], True), (["What?", "And?"], False), (chat, False), (None, True), (3, True)):
        with pytest.raises(ReplaceMeError, match="a prompt is one text"):
            continuation(model, TOK, bad, 4, chat=ask)
    one = side_by_side(model, model, TOK, prompts="Hello you", speed=False)
    assert [a["prompt"] for a in one.answers] == ["Hello you"]


# one file, spelt in several ways; two models of one name

def test_a_text_is_known_however_it_is_spelt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for name in ("same.txt", "other.txt"):
        Path(name).write_text(TEXT)
    for spelt, found in (("same.txt", 1), ("./same.txt", 1), (str(tmp_path / "same.txt"), 1), ("d/../same.txt", 1), ("other.txt", 0)):
        assert len(scored_and_fitted(make_config(model_path="m", layers_to_skip=1, dataset="same.txt", eval_dataset=spelt))) == found


def scored_on(**keys):
    return scored_and_fitted(make_config(model_path="m", layers_to_skip=1, **keys))


@pytest.fixture
def kinds(tmp_path, monkeypatch):
    "One table in a file, in a folder, saved and on the hub; and texts"
    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_list([dict(text=r) for r in ROWS])
    Path("d").mkdir()
    rows.to_json("x.jsonl"), rows.to_json("y.jsonl"), rows.to_json("d/train.jsonl"), rows.to_json("d/test.jsonl")
    rows.save_to_disk("s"), datasets.DatasetDict(train=rows, test=rows).save_to_disk("t")
    Path("notes").mkdir()
    for name in ("train.txt", "test.txt"):
        (Path("notes") / name).write_text(TEXT)
    return rows


@pytest.mark.parametrize("d", ["x.jsonl", "d", "s", "t", "org/texts", "wikitext"])
@pytest.mark.parametrize("a, b, found", [
    (None, "train", 1), ("train", None, 1), ("train[:3]", "train", 1), ("train[:3]", None, 1), ("train[:80%]", "train[50%:]", 1), ("train[2:5]", "train[4:9]", 1),
    ("train[:5%]+train[50%:]", "train[60%:70%]", 1), ("train[:50%]", "train[50%:]", 0), ("train[:6]", "train[6:]", 0), ("train[80%:]", "train[:20%]+train[70%:75%]", 0),
    ("train[:3]", "train[50%:]", 0), ("train[-3:]", "train[:5]", 0)])
def test_the_same_rows_are_known_by_any_split(kinds, d, a, b, found):
    assert len(scored_on(dataset=d, dataset_split=a, eval_dataset=d, eval_split=b)) == found
    if "/" not in d or exists(d):
        assert len(scored_on(dataset=dict(path=d, split=a or "train"), eval_dataset=[dict(path=d, split=b or "train"), "python-docs"])) == found


def test_slices_of_a_short_table_here_are_counted(kinds):
    for a, b, found in (("train[:8]", "train[50%:]", 1), ("train[-8:]", "train[:5]", 1), ("train[-7:]", "train[:5]", 0)):
        assert len(scored_on(dataset="x.jsonl", dataset_split=a, eval_dataset="x.jsonl", eval_split=b)) == found


@pytest.mark.parametrize("fitted, judged, found", [
    (dict(dataset="d"), dict(eval_dataset="d/train.jsonl"), 1), (dict(dataset="d/train.jsonl"), dict(eval_dataset="d", eval_split="train"), 1),
    (dict(dataset="d"), dict(eval_dataset="d", eval_split="train"), 1), (dict(dataset="d"), dict(eval_dataset="d/test.jsonl"), 0),
    (dict(dataset="d"), dict(eval_dataset="d", eval_split="test"), 0), (dict(dataset="d", dataset_split="test"), dict(eval_dataset="./d/../d/test.jsonl"), 1),
    (dict(dataset="x.jsonl"), dict(eval_dataset="y.jsonl"), 0), (dict(dataset="t"), dict(eval_dataset="t/train"), 1),
    (dict(dataset="t"), dict(eval_dataset="t", eval_split="test"), 0), (dict(dataset="notes"), dict(eval_dataset="notes/train.txt"), 1),
    (dict(dataset="notes", dataset_split="train"), dict(eval_dataset="notes", eval_split="test"), 0), (dict(dataset="notes"), dict(eval_dataset="notes/test.txt"), 0),
    (dict(dataset=["self", "x.jsonl", "d"]), dict(eval_dataset=["self", "d/train.jsonl", "d/test.jsonl", "x.jsonl"], eval_split="train"), 2),
    (dict(dataset="python-docs"), dict(eval_dataset="python-docs"), 1), (dict(dataset="python-docs"), dict(eval_dataset="x.jsonl"), 0),
    (dict(dataset="org/texts", dataset_subset="a"), dict(eval_dataset="org/texts", eval_subset="b"), 0),
    (dict(dataset="org/texts", dataset_subset="train"), dict(eval_dataset="org/texts"), 1), (dict(dataset="org/texts"), dict(eval_dataset="Org/Texts"), 1),
    (dict(dataset="org/texts", dataset_split="val"), dict(eval_dataset="org/texts", eval_split="validation"), 1),
    (dict(dataset="fineweb_and_orca"), dict(eval_dataset="Open-Orca/SlimOrca"), 1), (dict(dataset="x.jsonl"), dict(eval_dataset="org/texts"), 0)])
def test_the_same_rows_are_known_in_a_folder_and_by_any_name(kinds, fitted, judged, found):
    assert len(scored_on(**fitted, **judged)) == found


def test_the_same_rows_are_known_in_memory(kinds):
    both = datasets.DatasetDict(train=kinds, test=kinds.select(range(3)))
    stream = kinds.to_iterable_dataset()
    for a, b, found in ((kinds, kinds, 1), (list(kinds), list(kinds), 1), (list(kinds)[:6], list(kinds)[6:], 0), (both, kinds, 1), (stream, stream, 1)):
        assert len(scored_on(dataset=a, eval_dataset=b)) == found
    assert len(scored_on(dataset=both, eval_dataset=both, eval_split="test")) == 0
    assert len(scored_on(dataset=kinds, dataset_split="train[:4]", eval_dataset=kinds, eval_split="train[4:]")) == 0


def test_a_split_that_is_not_there_is_said_when_it_is_read(kinds):
    assert scored_on(dataset="d", eval_dataset="d", eval_split="nowhere") == [] == scored_on(dataset="d", dataset_split="x[:3]", eval_dataset="d")


def test_two_models_of_one_name_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m1", "y/m1"):
        Path(name).mkdir(parents=True)
    for now, was, fine in (("m1", "m1", True), ("./m1", "m1", True), (str(tmp_path / "m1"), "m1", True), ("y/m1", "m1", False), ("m1", "y/m1", False),
                           (str(tmp_path / "gone/m2"), "m2", True), ("org/m3", "org/m3", True), ("org/m3", "org/m4", False)):
        with contextlib.nullcontext() if fine else pytest.raises(ReplaceMeError, match="give save_path"):
            check_own(now, "pruned/m1", was)


@pytest.mark.parametrize("inputs", [None, "a/folder", 3])
def test_a_language_model_wants_its_tokenizer(inputs):
    with pytest.raises(ReplaceMeError, match=f"a {type(inputs).__name__} is no tokenizer"):
        prune(tiny_model("llama", layers=4), inputs, 1, dataset="python-docs")


# the library's own values, and those of Python, numpy and torch

def test_a_result_s_own_blocks_are_given_to_the_next_prune(tmp_path):
    model, small = tiny_model("llama", layers=6), dict(method="remove", dataset="python-docs", dataset_size=4, max_length=32)
    pruned, result = prune(model, TOK, np.int64(2), **small)
    assert result.config["layers_to_skip"] == 2
    ways = [result.block], result.block, result.blocks, tuple(result.blocks), [tuple(result.block)], [range(*result.block)], np.array([[*result.block]])
    for blocks in ways:
        again = prune(tiny_model("llama", layers=6), TOK, blocks=blocks, **small)[1]
        assert again.block == result.block and again.config["blocks"] == [[*result.block]]
        assert yaml.safe_load(yaml.safe_dump(again.config)) == again.config


def test_values_of_python_are_written_as_plain_yaml(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    given = dict(model_path=tmp_path / "m", save_path=tmp_path / "out", distances_path=tmp_path / "d.json", layers_to_skip=np.int32(2),
                 ridge=np.float32(.5), max_length=np.uint8(64), mask=Fraction(1, 4), dtype=torch.bfloat16, device_map={"": torch.device("cpu")},
                 trust_remote_code=np.bool_(False), dataset_size=torch.tensor(8), dataset=["self", tmp_path / "a.txt"], dataset_shares=(1, np.float64(.5)),
                 eval_dataset=dict(path=tmp_path / "b.csv", column="x"), tasks=("a", "b"))
    cfg = make_config(**given)
    assert (cfg.model_path, cfg.save_path, cfg.distances_path) == tuple(str(tmp_path / n) for n in ("m", "out", "d.json"))
    assert (cfg.layers_to_skip, cfg.ridge, cfg.max_length, cfg.mask, cfg.dataset_size, cfg.dataset_shares) == (2, .5, 64, .25, 8, [1, .5])
    assert (cfg.dtype, cfg.device_map, cfg.tasks) == ("bfloat16", {"": "cpu"}, ["a", "b"]) and cfg.trust_remote_code is False
    said = {k: v for k, v in _told(cfg).items() if v != cfg.__dataclass_fields__[k].default}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(said))
    assert read_config(tmp_path / "c.yaml") == cfg and yaml.safe_load(yaml.safe_dump(said)) == said
    mixed = make_config(dataset=[dict(path="self", share=np.float64(.25)), dict(path=tmp_path / "a.txt", share=np.int64(3))])
    assert yaml.safe_load(yaml.safe_dump(_told(mixed)))["dataset"][1] == dict(path=str(tmp_path / "a.txt"), share=3)
    compared = make_config(CompareConfig, model_path=tmp_path, methods=["lstsq"], layers=range(1, 3), seeds=np.arange(2))
    assert (compared.layers, compared.seeds) == ([1, 2], [0, 1])
    assert make_config(EvaluateConfig, compare=[tmp_path / "a", tmp_path / "b"]).compare == [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.mark.parametrize("keys, why", [
    (dict(layers_to_skip=np.bool_(True)), "layers_to_skip is True: it must be a whole number"), (dict(layers_to_skip=np.float64(2)), "layers_to_skip is 2.0"),
    (dict(seed=Fraction(1, 2)), "seed is 0.5: it must be a whole number"), (dict(dtype=torch.int8), "dtype 'int8' is not a floating point type"),
    (dict(dtype=np.float32), "it must be text or null"), (dict(layers_to_skip=np.arange(2)), "must be a whole number"),
    (dict(blocks=[(True, 3)]), "give pairs of layers"), (dict(blocks=range(1, 7, 2)), "give two layer numbers"), (dict(model_path=3), "model_path is 3: it must be text")])
def test_what_is_no_such_value_is_still_refused(keys, why):
    with pytest.raises(ReplaceMeError, match=re.escape(why)):
        make_config(**keys)
