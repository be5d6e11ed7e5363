"Batches: how many texts are in one, which ones, and what may not depend on that."
import json

import pytest
import torch

from replaceme import cli
from replaceme.arch import layers_of
from replaceme.config import make_config
from replaceme.core import ReplaceMeError
from replaceme.data import grouped_by_length
from replaceme.feed import fitting_batch, token_bytes
from replaceme.models import tiny_model, tiny_tokenizer
from replaceme.pipeline import feed_of, prune, run
from replaceme.search import hold_out

LENGTHS = [3, 40, 7, 31, 12, 29, 5, 38, 21, 4, 17, 33]


def jsonl(path, texts):
    path.write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts))
    return str(path)


def rows_of(bs): return [tuple(i[m.bool()].tolist()) for b in bs for i, m in zip(b["input_ids"], b["attention_mask"])]
def padding(bs): return sum(int((b["attention_mask"] == 0).sum()) for b in bs)


def some(lengths=LENGTHS, size=4, left=False):
    out = []
    for j in range(0, len(lengths), size):
        part = lengths[j:j + size]
        m = torch.arange(max(part)) < torch.tensor(part)[:, None]
        m = (m.flip(1) if left else m).long()
        out.append(dict(input_ids=torch.randint(3, 60, m.shape, generator=torch.Generator().manual_seed(j)) * m, attention_mask=m))
    return out


@pytest.mark.parametrize("left", [False, True])
def test_texts_of_like_length_go_together_and_none_is_lost(left):
    bs = some(left=left)
    near = grouped_by_length(bs)
    assert sorted(rows_of(near)) == sorted(rows_of(bs)) and [len(b["input_ids"]) for b in near] == [4, 4, 4]
    assert (padding(near) < padding(bs) / 2) is not left  # what stands in front of a text stays with it
    first = [min(rows_of(bs).index(r) for r in rows_of([b])) for b in near]
    assert first == sorted(first)  # the first batches are no other kind of text than all


def test_what_is_not_padded_or_no_text_stays_as_it_is():
    whole, pictures = some([6] * 8), [dict(pixel_values=torch.zeros(2, 3, 4, 4), attention_mask=torch.ones(2, 5))]
    assert grouped_by_length(whole) is whole and grouped_by_length(pictures) is pictures


def test_hidden_tokens_stay_hidden():
    bs = some()
    for b in bs: b["attention_mask"][:, 1] = 0
    assert sorted(rows_of(grouped_by_length(bs))) == sorted(rows_of(bs))


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "gpt2"])
def test_the_states_of_a_text_do_not_depend_on_its_neighbours(family):
    "What the sums are made of, text by text"
    model = tiny_model(family)
    def states(bs):
        out = {}
        for b in bs:
            h = model(**b, output_hidden_states=True).hidden_states[2]
            out |= {tuple(i[m.bool()].tolist()): x[m.bool()] for i, m, x in zip(b["input_ids"], b["attention_mask"], h)}
        return out
    with torch.no_grad(): a, b = states(some()), states(grouped_by_length(some()))
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5


@pytest.mark.parametrize("method", ["lstsq", "auto", "uidl"])
def test_the_pruned_model_does_not_depend_on_how_texts_are_put_together(method, tmp_path):
    model, words = tiny_model("llama", layers=6), tiny_tokenizer()
    for m in (model, words): m.save_pretrained(tmp_path / "tiny")
    data = jsonl(tmp_path / "texts.jsonl", ["word " * n + str(n) for n in (1, 9, 3, 14, 5, 8, 2, 11, 6, 4, 13, 7, 10, 12, 1, 15)])
    kw = dict(model_path=str(tmp_path / "tiny"), dataset=data, dataset_size=16, max_length=64, method=method, layers_to_skip=2, eval_dataset=None, prompt=None, speed=False)
    for b in (1, 5, "auto"): run(make_config(**kw, batch_size=b, save_path=str(tmp_path / str(b))))
    from transformers import AutoModelForCausalLM
    saved = [AutoModelForCausalLM.from_pretrained(tmp_path / str(b), dtype=torch.float32).state_dict() for b in (1, 5, "auto")]
    for other in saved[1:]:
        assert all((saved[0][k] - other[k]).abs().max() < 1e-4 for k in saved[0])


def test_auto_is_bounded_by_work_and_by_memory():
    model = tiny_model("llama")
    M = token_bytes(model)
    assert [fitting_batch(model, n, free=1e15) for n in (16, 512, 1000, 10**6)] == [256, 8, 4, 1]
    assert fitting_batch(model, 512, "cuda", free=1e15) == 32
    for room in (1, 3, 4, 1000):
        assert fitting_batch(model, 16, free=4 * room * 16 * M) == 2 ** min(8, room.bit_length() - 1)
    assert fitting_batch(model, 512, free=0) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "mamba", "opt"])
def test_the_bytes_of_a_token_cover_what_a_layer_makes_of_it(family):
    "The widest output of any part of a layer, measured with hooks"
    model, seen = tiny_model(family), []
    look = lambda m, a, out: seen.append(out.shape[-1]) if torch.is_tensor(out) and out.ndim == 3 else None
    for l in layers_of(model):
        for m in l.modules(): m.register_forward_hook(look)
    with torch.no_grad(): model(torch.arange(3, 9)[None])
    assert token_bytes(model) >= 4 * 4 * max(seen)


def test_batch_size_is_a_number_or_auto():
    assert make_config(batch_size="auto").batch_size == "auto" and make_config(batch_size=3).batch_size == 3
    assert cli.parse("x", "", ["--batch_size", "auto"], {})[0].batch_size == "auto"
    assert cli.parse("x", "", ["--batch_size", "3"], {})[0].batch_size == 3
    for bad, words in (("atuo", "Did you mean 'auto'"), (0, "must be at least 1"), (1.5, "must be a whole number"), (True, "must be a whole number"), (None, "must be a whole number")):
        with pytest.raises(ReplaceMeError, match=words): make_config(batch_size=bad)


def test_each_text_is_held_out_for_its_own_data_set(tmp_path):
    "Texts of one token are left out, and so are their origins"
    a = jsonl(tmp_path / "a.jsonl", ["x"] * 5 + [f"alpha {i}" for i in range(11)])
    b = jsonl(tmp_path / "b.jsonl", [f"beta {i}" for i in range(16)])
    words = tiny_tokenizer()
    feed = feed_of(tiny_model("llama"), words, make_config(dataset=[a, b], dataset_size=32, max_length=32))
    bs = feed.calibration()
    fit, held = hold_out(bs, origins=feed.origins)
    said = [[words.decode(r) for r in rows_of(p)] for p in held.parts]
    assert said == [["alpha 10"], ["beta 14", "beta 15"]] and len(rows_of(fit)) == 24
    with pytest.raises(ReplaceMeError, match="origins are of 32 texts, and there are 27"): hold_out(bs, origins=[0, 1] * 16)


def test_the_cost_counts_the_batches_of_auto(tmp_path):
    from replaceme.cost import dry_run
    for m in (tiny_model("llama", layers=6), tiny_tokenizer()): m.save_pretrained(tmp_path / "tiny")
    data = jsonl(tmp_path / "texts.jsonl", ["word " * 9] * 16)
    kw = dict(model_path=str(tmp_path / "tiny"), dataset=data, dataset_size=16, max_length=512, layers_to_skip=2, method="lstsq", eval_dataset=None)
    one, many, auto = [dry_run(make_config(**kw, batch_size=b)) for b in (1, 8, "auto")]
    assert auto.peak == many.peak != one.peak


@pytest.mark.parametrize("family, layers, n, keys", [("gemma2", 5, 1, dict(refit=0)), ("glm4", 5, 1, dict(refit=0)), ("llama", 6, 2, dict(refit=0, mask=.3))])
def test_what_auto_chooses_does_not_depend_on_the_batches(family, layers, n, keys):
    "Behind a norm, whose weight is fitted on some of the texts for a trial, and with hidden tokens"
    texts = [" ".join(chr(97 + (i * j) % 26) * (1 + j % 5) for j in range(10 + (i * 7) % 40)) for i in range(17)]
    model, got = tiny_model(family, layers=layers, seed=0), []
    for size in (1, 8):
        _, r = prune(model, tiny_tokenizer(), n, method="auto", dataset=texts, dataset_size=17, max_length=40, batch_size=size, **keys)
        got.append((r.block, [row["loss"] for row in r.choice], r.fit["error"]))
    (a, losses, error), (b, others, other) = got
    assert a == b and losses == pytest.approx(others, abs=1e-4) and error == pytest.approx(other, rel=1e-4), got
