"""Tokens never become text again: streams, pieces, BOS, long rows, folders of texts, and ids that a model has no embedding for."""
import bz2
import copy
import gzip
import io
import json
import lzma
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from replaceme import data
from replaceme.feed import judged_seed
from replaceme.compare import eval_pieces, text_losses
from replaceme.core import ReplaceMeError
from replaceme.data import batches, check_ids, cut_stream, first_id, first_tokens, load_texts, own_texts, token_ids
from replaceme.evaluate import continuation, cut_pieces, eval_tasks, perplexity, prompt_ids
from replaceme.models import check_tokenizer, tiny_model, tiny_tokenizer
from replaceme.pipeline import (calibration_batches, eval_text, evaluate, make_config, prune, run, training_batches)
from replaceme.sidebyside import divergence, kept_perplexity, token_times

TOK, BOS = tiny_tokenizer(), tiny_tokenizer(add_bos=True)
RNG = random.Random(0)
CHINESE = "".join("天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往"[RNG.randrange(20)] + "，" * (RNG.random() < .1) for _ in range(900))


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    "A cache of its own for each test."
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


# Tokenizers of every kind, those that cannot be undone among them, and texts that are hard to cut


def docs():
    from pydoc_data.topics import topics
    return "\n\n".join(topics[k] for k in sorted(topics))


EMOJI = "👩‍🔬🏳️‍🌈👨‍👩‍👧‍👦 café naïve e\u0301 a\u0328\u0301 ก็ नि 🇫🇮 "
MIXED = "".join(RNG.choice([docs()[i:i + 37], CHINESE[i % 900:][:13], EMOJI[i % 20:], "\n\n", "   ", "aaaa" * RNG.randrange(9)]) for i in range(0, 3000, 3))
HARD = {"docs": docs()[:76_000], "chinese": CHINESE * 10, "emoji": EMOJI * 300, "mixed": MIXED, "one letter": "a" * 20_001, "aaab": "aaab" * 7000,
        "letters": "".join(RNG.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(20_000)), "spaces": ("x" + " " * 700 + "\n" * 300) * 20,
        "marks": "e\u0301" * 9000, "lines": "One\r\n Two\tthree\r\n" * 1500, "short": "Zoë 👩‍🔬", "nothing": ""}
TRAIN = [docs()[:30_000], CHINESE, EMOJI * 9, "a" * 300, MIXED[:9000]]


def byte_level(prefix=False):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>"])
    tok.train_from_iterator(TRAIN, trainer)
    return tok


def trimmed():
    tok = byte_level()
    tok.post_processor = processors.ByteLevel(trim_offsets=True)
    return tok


def unigram(split=True, normalizer=None, seed="0"):
    """Of the most frequent parts of words. The trainer adds up in an order of chance, and once in many runs the best cut of the first
    letters of a word of 20,000 depends on how it ends, which no window sees; of these seeds one in thirteen does so ("")"""
    tok = Tokenizer(models.Unigram())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(split=split, prepend_scheme="always"), decoders.Metaspace()
    if normalizer:
        tok.normalizer = normalizer
    plain = normalizer.normalize_str if normalizer else str
    words = Counter(w for t in TRAIN for line in t.split("\n") for w, _ in tok.pre_tokenizer.pre_tokenize_str(plain(line)))
    parts = Counter()
    for word, n in words.items():
        for i in range(len(word)):
            for j in range(i + 1, min(i + 12, len(word)) + 1):
                parts[word[i:j]] += n * (j - i)
    letters = [p for p in parts if len(p) == 1]
    chosen = {p: parts[p] * random.Random(p + seed).uniform(.9, 1) for p in [*letters, *sorted(parts, key=lambda p: (-parts[p], p))[:900]]}
    scores = {p: math.log(n / sum(chosen.values())) for p, n in chosen.items()}
    tok.model = models.Unigram([("<unk>", 0.), ("<s>", 0.), *scores.items()], unk_id=0)
    return tok


def wordpiece():
    tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.normalizer, tok.pre_tokenizer, tok.decoder = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tok.train_from_iterator(TRAIN, trainers.WordPieceTrainer(vocab_size=1500, show_progress=False, special_tokens=["[UNK]", "<s>"]))
    return tok


def sentencepiece():
    "As Llama 2 and Gemma: one word, spaces as letters of it, bytes for what is not known"
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    specials = ["<unk>", "<s>", *("<0x%02X>" % i for i in range(256))]
    tok.train_from_iterator(docs()[:20_000].split(" "), trainers.BpeTrainer(vocab_size=900, show_progress=False, special_tokens=specials))
    return tok


KINDS = {"byte level": byte_level, "prefix space": lambda: byte_level(True), "trimmed": trimmed, "unigram": unigram, "one word": lambda: unigram(False),
         "lower case": lambda: unigram(True, normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])), "wordpiece": wordpiece,
         "sentencepiece": sentencepiece}


def wrapped(tok, bos=False):
    if bos:
        tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return wrapped(KINDS[request.param]())


def ids_of(tok, text):
    return tok(text, add_special_tokens=False, verbose=False)["input_ids"]


def ties_apart(ids, whole, tok):
    """`whole` with the ties of `ids`. Unigram adds probabilities up from the first letter of a word: of two ways to cut the same
    letters into the same tokens in another order, rounding decides, and a text that is one long word rounds by where it began"""
    if not isinstance(tok.backend_tokenizer.model, models.Unigram):
        return whole
    letters = lambda part: "".join(tok.convert_ids_to_tokens(part))
    out = list(whole)
    for i in range(min(len(ids), len(out))):
        for n in range(2, 9):
            here, there = ids[i:i + n], out[i:i + n]
            if here[0] != there[0] and sorted(here) == sorted(there) and letters(here) == letters(there):
                out[i:i + n] = here
                break
    return out


def test_a_tie_is_the_same_letters_in_the_same_tokens():
    tok = Tokenizer(models.Unigram([("<s>", 0.), ("a", -1.), ("aaa", -1.5), ("b", -1.)]))
    tok = PreTrainedTokenizerFast(tokenizer_object=tok)
    s, a, aaa, b = range(4)
    assert ties_apart([b, a, aaa, b], [b, aaa, a, b], tok) == [b, a, aaa, b]
    for ids in [b, a, a], [b, b, a], [a, b], [aaa]:  # other tokens, other letters, another order of letters, another length
        assert ties_apart(ids, [b, a, b][:len(ids) + 1], tok) == [b, a, b][:len(ids) + 1]
    assert ties_apart([a, b], [b, a], tok) == [b, a]
    assert ties_apart([a, aaa], [aaa, a], TOK) == [aaa, a]  # other models add nothing up


@pytest.mark.parametrize("name", HARD)
def test_windows_tell_what_the_whole_tells(tokenizer, name):
    text = HARD[name]
    ids = first_tokens(io.StringIO(text), tokenizer)
    whole = ties_apart(ids, ids_of(tokenizer, text), tokenizer)
    assert ids == whole
    assert first_tokens(text, tokenizer, 300) == whole[:300]


@pytest.mark.parametrize("bos", [False, True])
def test_pieces_joined_are_the_file(tokenizer, tmp_path, bos):
    "Of whatever script: the tokens of the pieces are those of the whole file, in calibration, in a mixture and in scoring"
    tok = wrapped(copy.deepcopy(tokenizer.backend_tokenizer), bos)
    for name in "chinese", "emoji", "mixed", "docs":
        text = HARD[name][:9000].strip()
        (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
        pieces = load_texts(tmp_path / "a.txt", tokenizer=tok, size=None, max_length=37)
        whole = ties_apart([i for p in pieces for i in p.ids], ids_of(tok, text), tok)
        assert [i for p in pieces for i in p.ids] == whole
        bs = batches(pieces, tok, 5, 37)
        assert all(w == 37 for b in bs[:-1] for w in b["attention_mask"].sum(1).tolist())
        rows = [ids[m.bool()].tolist() for b in bs for ids, m in zip(b["input_ids"], b["attention_mask"])]
        assert {r[0] for r in rows} == {tok.bos_token_id} if bos else tok.bos_token_id not in rows[0]
        joined = [i for r in rows for i in r[bos:]]
        assert joined == whole[:len(joined)] and len(whole) - len(joined) <= 1  # a last piece of one token predicts nothing
        step = 37 - bos
        expected = [[tok.bos_token_id] * bos + whole[i * step:][:step] for i in range(4)]
        for t in text, pieces, [text], load_texts(tmp_path / "a.txt", tokenizer=tok, size=9, max_length=64):
            assert cut_pieces(tok, t, 37, 4).tolist() == expected


def test_a_piece_is_a_text_to_who_reads_it(tmp_path):
    (tmp_path / "a.txt").write_text("Zoë said: 語")
    pieces = load_texts(tmp_path / "a.txt", tokenizer=TOK, size=None, max_length=3)
    assert pieces[0] == "Zo\ufffd" and pieces[2] == "aid" and [len(p.ids) for p in pieces] == [3, 3, 3, 3, 2]
    assert all(isinstance(p, str) for p in pieces) and json.loads(json.dumps(pieces)) == pieces
    again = copy.deepcopy(pieces)
    assert [p.ids for p in again] == [p.ids for p in pieces] and again == pieces
    other = wrapped(byte_level())
    with pytest.raises(ReplaceMeError, match="was cut by another tokenizer: read the data set with this one"):
        batches(pieces, other)
    assert batches([str(p) for p in pieces], other)


# What is scored and calibrated on is the file


def save(folder, tok):
    model = tiny_model(vocab=320)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder / "tiny")
    tok.save_pretrained(folder / "tiny")
    return model


@torch.no_grad()
def loss_of(model, rows):
    return float(np.mean([torch.nn.functional.cross_entropy(model(r[None]).logits[0, :-1].double(), r[1:]).item() for r in rows]))


@pytest.mark.parametrize("tok", [TOK, BOS], ids=["no BOS", "BOS"])
def test_a_chinese_file_is_scored_as_itself(tmp_path, tok):
    "The loss of the file's own first tokens, before and after the pruning, and by the evaluation"
    model = save(tmp_path, tok)
    (tmp_path / "zh.txt").write_text(CHINESE, encoding="utf-8")
    keys = dict(model_path=str(tmp_path / "tiny"), eval_dataset=str(tmp_path / "zh.txt"), eval_size=6, eval_length=128)
    bos = tok("")["input_ids"]
    step, ids = 128 - len(bos), ids_of(tok, CHINESE)
    rows = torch.tensor([bos + ids[i * step:][:step] for i in range(6)])
    result, _ = run(make_config(**keys, layers_to_skip=2, method="lstsq", dataset=str(tmp_path / "zh.txt"), dataset_size=9, max_length=100, prompt=None,
                                save_path=str(tmp_path / "out")))
    before = result["perplexity"]["before"]
    assert before["loss"] == pytest.approx(loss_of(model, rows), rel=1e-4) and before["tokens"] == 6 * 127
    assert evaluate(read(keys))["perplexity"]["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert result["calibration"]["tokens"] == 9 * 100
    assert eval_text(make_config(**keys), tok).tolist() == rows.tolist()


def read(keys):
    from replaceme.pipeline import EvaluateConfig
    return make_config(EvaluateConfig, **keys, cache=False)


def real(bs):
    return [ids[m.bool()].tolist() for b in bs for ids, m in zip(b["input_ids"], b["attention_mask"])]


@pytest.mark.parametrize("tok", [TOK, BOS], ids=["no BOS", "BOS"])
def test_calibration_and_training_on_a_stream(tmp_path, tok):
    (tmp_path / "zh.txt").write_text(CHINESE, encoding="utf-8")
    ids, bos = ids_of(tok, CHINESE), tok("")["input_ids"]
    step = 32 - len(bos)
    expected = [bos + ids[i * step:][:step] for i in range(60)]
    cfg = make_config(dataset=str(tmp_path / "zh.txt"), dataset_size=12, max_length=32, layers_to_skip=2, recover="cut", train_size=20)
    assert real(calibration_batches(tiny_model(), tok, cfg)) == expected[:12]
    learn, held = training_batches(tiny_model(), tok, cfg)
    assert real(learn) == expected[:20] and [r for r in real(held) if r not in expected[20:22]] == []
    small, result = prune(tiny_model(), tok, 2, dataset=str(tmp_path / "zh.txt"), dataset_size=12, max_length=32)
    assert result["calibration"]["tokens"] == 12 * 32
    mixed = load_texts([tmp_path / "zh.txt", Dataset.from_list([dict(text=CHINESE)] * 3)], tokenizer=tok, size=6, max_length=32)
    rows = real(batches(mixed, tok, 6, 32))
    assert rows[::2] == [(bos + ids)[:32]] * 3 or rows[1::2] == [(bos + ids)[:32]] * 3
    assert expected[1] in rows and expected[2] in rows


@pytest.mark.parametrize("tok", [TOK, BOS], ids=["no BOS", "BOS"])
def test_what_a_model_writes_is_measured_as_it_was_written(tok):
    "Ids that no text would give: bytes that are no character, and special tokens; from the cache too, and as evaluation"
    model = tiny_model()
    u = torch.rand(5, 40, generator=torch.Generator().manual_seed(judged_seed(2)))
    starts = [data.first_ids(i, model, tok, 20) for i in range(5)]
    assert len({tuple(s) for s in starts}) == 5 and all(s.count(tok.bos_token_id) == 1 for s in starts)
    wrote = data.sample_ids(model, u, starts).tolist()
    for _ in range(2):
        texts = own_texts(model, tok, size=5, max_length=40, seed=judged_seed(2))
        assert real(batches(texts, tok, 2, 40)) == wrote
        assert all(t.startswith("<s>") for t in texts)
    assert any(ids_of(tok, t) != r for t, r in zip(texts, wrote))  # the text would not do
    cfg = make_config(eval_dataset="self", eval_size=5, eval_length=40, seed=2)
    assert eval_text(cfg, tok, model).tolist() == wrote


# BOS before each piece, in whatever is measured on pieces


def test_bos_is_context_and_not_predicted():
    model, text = tiny_model(), "BOS is context, and each token of the text is predicted once. " * 4
    ids = cut_pieces(BOS, text, 32, 5)
    bare = torch.tensor(ids_of(BOS, text))
    assert (ids[:, 0] == BOS.bos_token_id).all() and ids[:, 1:].flatten().tolist() == bare[:5 * 31].tolist()
    one = perplexity(model, BOS, text, 32, 5)
    assert one.tokens == 5 * 31 and one.loss == pytest.approx(loss_of(model, ids), rel=1e-5)
    assert one.loss != pytest.approx(perplexity(model, TOK, text, 32, 5).loss, rel=1e-3)
    assert perplexity(model, BOS, ids).losses == one.losses  # what is cut already is left as it is
    assert divergence(model, tiny_model(seed=1), BOS, text, 32, 5).losses == pytest.approx(one.losses, rel=1e-4)
    assert kept_perplexity(model, BOS, text, 32, 5)["losses"] == pytest.approx(one.losses)
    assert kept_perplexity(model, TOK, text, 32, 5)["loss"] == pytest.approx(perplexity(model, TOK, text, 32, 5).loss)
    assert perplexity(model, BOS, "x", 32).tokens == 1  # predicted from BOS
    assert perplexity(model, BOS, text * 3, length=256, pieces=1).tokens == 255  # all positions, and not one more
    for bad in dict(text="x", length=1), dict(text="", length=32):
        with pytest.raises(ReplaceMeError, match="two tokens or more"):
            perplexity(model, BOS, **bad)


def test_a_text_that_begins_with_bos_has_one():
    assert cut_pieces(BOS, "<s>abcdef", 4, 2).tolist() == cut_pieces(BOS, "abcdef", 4, 2).tolist()


@pytest.mark.parametrize("pack", [False, True])
def test_bos_of_a_chat_is_not_predicted(tmp_path, pack):
    "Chats that a model is judged on follow each other in a piece, and each begins with the template's BOS"
    chats = [[dict(role="user", content=f"Question {i}?"), dict(role="assistant", content=f"Answer {i}.")] for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(dict(messages=c)) for c in chats))
    keys = dict(eval_dataset=dict(path=str(tmp_path / "chats.jsonl"), pack=pack), eval_size=4, eval_length=64)
    ids = eval_text(make_config(model_path="a", layers_to_skip=1, **keys), BOS)
    assert ids.shape == (4, 64) and (ids[:, 0] == 1).all() and not (ids[:, 1:] == 1).any()
    said = BOS.decode(ids[:, 1:].flatten())
    assert said.startswith("[user] Question 0?\n[assistant] Answer 0.\n" + "\n\n" * (not pack) + "[user] Question 1?")


@pytest.fixture
def ending():
    "A tokenizer that puts BOS before a text and EOS behind it"
    tok = tiny_tokenizer()
    tok._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return tok


@pytest.mark.parametrize("template", [True, False])
def test_a_prompt_is_begun_once_and_not_ended(ending, template):
    "What goes on behind EOS is another text"
    model, written = tiny_model("llama"), "[user] Hi\n" if template else "Hi"
    ids = prompt_ids(ending, "Hi", chat=template)["input_ids"]
    assert ending.decode(ids[0]) == "<s>" + written
    assert torch.equal(prompt_ids(ending, "<s>Hi", chat=False)["input_ids"], prompt_ids(ending, "Hi", chat=False)["input_ids"])
    assert continuation(model, ending, "Hi", 6, chat=template) == continuation(model, BOS, "Hi", 6, chat=template)


def test_a_text_that_ends_with_eos_has_one(ending):
    ending.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}</s>"
    chats = [[dict(role="user", content="Hi")], [dict(role="user", content="Ho")]]
    text = load_texts(chats, tokenizer=ending, size=1)[0]
    assert token_ids(text, ending) == ending("[user] Hi")["input_ids"]
    assert token_ids("Hi", ending) == ending("Hi")["input_ids"]


def test_a_model_that_needs_bos(tmp_path):
    "One that without BOS predicts the wrong letter: it is scored with BOS, in the run, in the comparison and in the report"
    model = save(tmp_path, BOS)
    (tmp_path / "a.txt").write_text("All work and no play makes Jack a dull boy.\n" * 40)
    keys = dict(model_path=str(tmp_path / "tiny"), eval_dataset=str(tmp_path / "a.txt"), eval_size=4, eval_length=48)
    ids = eval_pieces(model, BOS, make_config(**keys))
    assert ids.shape == (4, 48) and (ids[:, 0] == 1).all()
    assert np.mean(text_losses(model, ids)) == pytest.approx(loss_of(model, ids), rel=1e-4)
    result, _ = run(make_config(**keys, layers_to_skip=2, method="lstsq", dataset="python-docs", dataset_size=9, max_length=100, prompt=None, save_path=str(tmp_path / "out")))
    assert result["errors"]["words"][0][0] == "<s>" and result["errors"]["tokens"] == 4 * 48


def test_tokens_behind_a_text():
    "A tokenizer that closes texts: a text that is not cut is closed, and a piece holds as many tokens as it may"
    tok = tiny_tokenizer()
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    assert data.special_ids(tok) == ([1], [2])
    assert token_ids("ab", tok) == tok("ab")["input_ids"] == [1, *ids_of(tok, "ab"), 2]
    assert token_ids("abcdef", tok, 4) == [1, *ids_of(tok, "abc")]
    assert [len(token_ids(p, tok, 4)) for p in cut_stream("abcdefgh", tok, 4)] == [4, 4, 4]


# Long rows


class Counting:
    "A tokenizer that notes how many characters it is given"
    def __init__(self, tok):
        self.tok, self.given = tok, []
    def __call__(self, text, **kw):
        self.given.append(len(text))
        return self.tok(text, **kw)
    def __getattr__(self, name):
        return getattr(self.tok, name)


LONG = {"words": "half a megabyte of words, and then some more; " * 4000, "no spaces": "abcdefghijklmnopqrstuvwxyz" * 8000, "chinese": CHINESE * 100}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("tok", [TOK, BOS], ids=["no BOS", "BOS"])
def test_of_a_long_row_only_the_beginning_is_tokenized(name, tok):
    counting, row = Counting(tok), LONG[name]
    assert token_ids(row, counting, 512) == tok(row)["input_ids"][:512]
    assert sum(counting.given) < 20_000
    counting.given.clear()
    table = Dataset.from_list([dict(text=row)] * 3)
    bs = batches(load_texts(table, tokenizer=counting, size=3), counting, 3, 512)
    assert real(bs) == [tok(row)["input_ids"][:512]] * 3 and sum(counting.given) < 60_000
    counting.given.clear()
    assert cut_pieces(counting, [row, row], 64, 4).shape == (4, 64) and sum(counting.given) < 20_000


def test_of_a_long_chat_only_the_beginning_is_tokenized():
    chat = [dict(role="user", content=LONG["no spaces"]), dict(role="assistant", content="Too long.")]
    for tok in TOK, BOS:
        counting = Counting(tok)
        text, = load_texts(Dataset.from_list([dict(messages=chat)]), tokenizer=counting)
        row, = real(batches([text], counting, 1, 100))
        assert row == ids_of(tok, text)[:100] and row.count(1) == 1 and sum(counting.given) < 20_000


def test_the_first_tokens_of_a_word_without_end(tokenizer):
    for name in "letters", "chinese", "one letter", "aaab":
        assert token_ids(HARD[name], tokenizer, 50) == ids_of(tokenizer, HARD[name])[:50]


def test_a_tokenizer_that_cannot_tell_characters():
    "A slow one knows no offsets: windows grow until their beginning stays"
    class Slow(Counting):
        is_fast = False
        def __call__(self, text, return_offsets_mapping=False, **kw):
            assert not return_offsets_mapping
            return super().__call__(text, **kw)
    slow = Slow(TOK)
    assert first_tokens(LONG["words"], slow, 2000) == ids_of(TOK, LONG["words"])[:2000] and sum(slow.given) < 40_000
    assert first_tokens(HARD["emoji"], slow) == ids_of(TOK, HARD["emoji"])


# Streams


def test_a_stream_is_read_and_tokenized_in_windows(tmp_path):
    "However much is asked for, the tokenizer is given a little at a time, each part hardly more than once"
    file = tmp_path / "a.txt"
    file.write_text("lorem ipsum dolor sit amet, " * 20_000)
    counting = Counting(TOK)
    pieces = load_texts(file, tokenizer=counting, size=None, max_length=512)
    assert sum(len(p.ids) for p in pieces) == 28 * 20_000
    assert max(counting.given) < 100_000 and sum(counting.given) < 1.1 * 28 * 20_000 + 10_000
    counting.given.clear()
    assert len(load_texts(file, tokenizer=counting, size=4, max_length=512)) == 4 and sum(counting.given) < 100_000


def test_files_are_opened_when_their_turn_comes(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"This is file {i}. " * 9)
    (tmp_path / "9.txt").write_bytes(b"\0")
    assert len(load_texts(tmp_path, tokenizer=TOK, size=6, max_length=64)) == 6
    with pytest.raises(ReplaceMeError, match="9.txt is not UTF-8 text"):
        load_texts(tmp_path, tokenizer=TOK, size=None, max_length=64)


# Folders of texts


def parts(where, **kw):
    return load_texts(where, **{**dict(tokenizer=TOK, size=None, max_length=40), **kw})


def test_a_folder_of_texts_is_cut_as_a_text_is(tmp_path):
    "Files in the order of their names, each a stream, whatever their kind; line breaks and empty lines are part of it"
    text = {"b.txt": "First line.\n\nSecond line, of another paragraph, which is longer.\n" * 3, "a.md": "# A title\n\n- one\n- two\n" * 5,
            "c/d.rst": "Title\n=====\n\nSome words.\n" * 4, "e.txt.gz": "Once compressed.\n" * 9, "f.TXT": "Capitals.\n" * 9,
            "g.md.bz2": "And again.\n" * 9, "h.txt.xz": "And again, otherwise.\n" * 9}
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    for name, t in text.items():
        (tmp_path / "books" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / name).write_bytes(pack.get(Path(name).suffix, bytes)(t.encode()))
    (tmp_path / "books/.hidden.txt").write_text("Not this.")
    (tmp_path / "books/picture.png").write_bytes(b"\x89PNG")
    got = parts(tmp_path / "books")
    assert got == [p for name in sorted(text) for p in parts(tmp_path / "books" / name)]
    assert "".join(got) == "".join(text[name] for name in sorted(text))
    assert got[:3] == parts(str(tmp_path / "books"), size=3, column="text", subset="train")
    (tmp_path / "books").rename(tmp_path / "one")
    cfg = make_config(eval_dataset=str(tmp_path / "one"), eval_size=20, eval_length=40)
    whole = "".join(text[name] for name in sorted(text))
    n = len(ids_of(TOK, whole)) // 40
    assert eval_text(cfg, TOK).flatten().tolist() == ids_of(TOK, whole)[:min(n, 20) * 40]


def test_a_folder_of_short_files_fills_the_evaluation(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.md").write_text("A short note.")
    cfg = make_config(eval_dataset=str(tmp_path), eval_size=4, eval_length=64)
    assert eval_text(cfg, TOK).shape == (4, 64)


def test_splits_of_a_folder_of_texts(tmp_path):
    for name, t in {"train.txt": "To learn from.", "test.txt": "To be asked."}.items():
        (tmp_path / name).write_text(t)
    assert parts(tmp_path) == parts(tmp_path, split="train") == ["To learn from."]
    assert parts(tmp_path, split="test") == parts(tmp_path, subset="test") == ["To be asked."]
    with pytest.raises(ReplaceMeError, match="no split 'tset': the data set has test, train. Did you mean 'test'"):
        parts(tmp_path, split="tset")
    (tmp_path / "other.txt").write_text("Neither.")
    assert parts(tmp_path) == ["Neither.", "To be asked.", "To learn from."]
    with pytest.raises(ReplaceMeError, match="plain text and has no split 'test'"):
        parts(tmp_path, split="test")


def test_a_text_beside_a_table_describes_it(tmp_path):
    Dataset.from_list([dict(text="A row.")] * 3).to_parquet(tmp_path / "train.parquet")
    for name in "README.md", "LICENSE.txt":
        (tmp_path / name).write_text("About the data.")
    assert parts(tmp_path) == ["A row."] * 3


# Ids that the model has no embedding for


@pytest.fixture
def grown():
    "Tokens were added to the tokenizer, its padding token among them, and not to the model"
    tok = tiny_tokenizer()
    tok.add_special_tokens(dict(pad_token="<pad me>"))
    assert tok.pad_token_id == 259
    return tok, tiny_model(vocab=259)


def test_a_padding_token_that_the_model_does_not_have(grown, tmp_path):
    tok, model = grown
    usual = tiny_tokenizer()
    texts = Dataset.from_list([dict(text="x" * n) for n in range(4, 30)])
    texts.to_json(tmp_path / "a.jsonl")
    keys = dict(layers_to_skip=2, dataset=str(tmp_path / "a.jsonl"), batch_size=4, max_length=32, method="auto")
    small, _ = prune(model, tok, **keys)
    same, _ = prune(model, usual, **keys)
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), same.state_dict().values()))
    prune(model, tok, **keys, recover="cut", train_tokens=300)
    assert continuation(model, tok, "Hi", 5) == continuation(model, usual, "Hi", 5)
    assert len(token_times(model, tok, torch.tensor([[5, 6], [7, 8]]), 4)) == 4
    assert perplexity(model, tok, CHINESE, 32, 2).loss == pytest.approx(perplexity(model, usual, CHINESE, 32, 2).loss)


def test_padding_in_the_tasks(grown, tmp_path):
    "Questions of unlike lengths that the model answers by writing: lm-eval pads them with the tokenizer's token"
    tok, model = grown
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(dict(q="?" * n, a="x")) for n in (2, 9, 30)))
    (tmp_path / "asks.yaml").write_text(json.dumps(dict(
        task="asks", dataset_path="json", dataset_kwargs=dict(data_files=dict(validation=str(tmp_path / "q.jsonl"))), validation_split="validation",
        output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a}}", generation_kwargs=dict(until=["\n"], max_gen_toks=4),
        metric_list=[dict(metric="exact_match", aggregation="mean", higher_is_better=True)])))
    for pad in "<pad me>", None:
        tok.pad_token = pad
        got = eval_tasks(model, tok, str(tmp_path), batch_size=3)["asks"]
        assert got["samples"] == 3 and tok.pad_token == pad


def test_a_first_token_that_the_model_does_not_have(grown):
    tok, model = grown
    tok.add_special_tokens(dict(bos_token="<begin>"))
    assert tok.bos_token_id == 260 and first_id(model, tok) == model.config.bos_token_id
    assert own_texts(model, tok, size=2, max_length=8)[0].ids[0] == model.config.bos_token_id


def test_a_text_with_a_token_that_the_model_does_not_have(grown, tmp_path):
    "No other token will do in its place"
    tok, model = grown
    tok.add_tokens(["<new>"])
    (tmp_path / "a.txt").write_text("This is a <new> word. " * 20)
    say = "makes token 260 of the text, and the model has embeddings for 259 tokens"
    for call in (lambda: prune(model, tok, 2, dataset=str(tmp_path / "a.txt"), max_length=32),
                 lambda: perplexity(model, tok, (tmp_path / "a.txt").read_text(), 32), lambda: continuation(model, tok, "a <new> word"),
                 lambda: divergence(model, model, tok, (tmp_path / "a.txt").read_text(), 32)):
        with pytest.raises(ReplaceMeError, match=say):
            call()


def test_a_model_that_does_not_say_where_its_embedding_is():
    "Somebody's own architecture: its config says how many tokens it knows"
    model = tiny_model("llama", layers=2)
    model.get_input_embeddings = lambda: (_ for _ in ()).throw(NotImplementedError())
    check_ids(model, torch.tensor([[model.config.vocab_size - 1]]))
    with pytest.raises(ReplaceMeError, match=f"embeddings for {model.config.vocab_size} tokens"):
        check_ids(model, torch.tensor([[model.config.vocab_size]]))
    check_tokenizer(model, tiny_tokenizer(), "mine")
