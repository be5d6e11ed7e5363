"""The pruned model as a draft: what one pass says is what drafting token by token says, and the text stays the dense model's."""
import copy
import dataclasses
import json

import numpy as np
import pytest
import scipy.stats
import torch

from replaceme.blocks import Block
from replaceme.compare import CompareConfig, compare
from replaceme.core import ReplaceMeError
from replaceme.draft import (KS, accepted, cost_of_pace, draft_rows, draft_table, draft_words, drafting, emitted, guesses, pays_below,
                             speed_up)
from replaceme.merge import cut
from replaceme.models import tiny_model, tiny_tokenizer
from replaceme.pipeline import EvaluateConfig, evaluate, make_config, run
from replaceme.report import report_html
from replaceme.result import Result
from replaceme.writing import greedy_texts, let_write

WORDS = ["Once upon a time", "a", "the river runs", "Once upon a tide", "b", "layers of a model", "zzzz"]
SHORT = dict(model_path="./tiny", dataset="a.txt", dataset_size=8, max_length=32, layers_to_skip=2, method="lstsq", ridge=.1, prompt=None,
             eval_dataset="b.txt", eval_size=6, eval_length=48)
FEW = dict(writing="text", writing_prompts=4, writing_tokens=12, draft=True)


@pytest.fixture(scope="module")
def pair():
    "A model, and one that says most of the same: the cut layers do a little"
    dense, tok = tiny_model(layers=6).double(), tiny_tokenizer()
    for layer in dense.model.layers[2:4]:
        for w in (layer.self_attn.o_proj, layer.mlp.down_proj):
            w.weight.data *= .6
    return dense, cut(dense, [Block(2, 4)]), tok


@pytest.fixture(scope="module")
def prompts(pair):
    return [pair[2](w)["input_ids"] for w in WORDS]


@pytest.fixture(scope="module")
def texts(pair, prompts):
    return greedy_texts(pair[0], pair[2], prompts, 24)


def next_token(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].argmax().item()


def draft_by_hand(model, ids, k):
    "What a model says next, token by token behind its own tokens"
    out = []
    for _ in range(k):
        out.append(next_token(model, ids + out))
    return out


# by hand

def test_runs_by_hand():
    hits = [1, 1, 0, 1, 1, 1, 1, 0]
    assert accepted(hits, 1) == hits
    assert accepted(hits, 2) == [2, 1, 0, 2, 2, 2, 1]
    assert accepted(hits, 4) == [2, 1, 0, 4, 3]
    assert accepted(hits, 9) == []
    assert emitted(hits, 1) == [2, 1, 2, 2]  # 11| 0| 11| 11, and the last token has no room for a draft and one more
    assert emitted(hits, 2) == [3, 3] and emitted(hits, 4) == [3, 5]
    assert emitted([0] * 4, 2) == [1, 1] and emitted([1] * 9, 2) == [3, 3, 3] and emitted([], 1) == [] and emitted([1], 1) == []


def test_the_record_by_hand():
    "Three texts; a draft at a quarter of the cost"
    d = drafting([[1] * 10, [0] * 10, [1, 0] * 5], [.25, .2, .3])
    assert (d.texts, d.tokens, d.guessed[0], d.cost) == (3, 30, .5, [.25, .2, .3]) and [r.k for r in d.runs] == [*KS]
    two = d.runs[1]  # at nine places of each: 2 each, 0, and 1 at the five ones of which all have whole runs but none is full
    assert two.accepted[0] == pytest.approx((18 + 0 + 5) / 27) and two.share[0] == pytest.approx(two.accepted[0] / 2)
    # steps that have room for three: 3 3 3 | eight times 1 | 2 2 2 2
    assert two.emitted[0] == pytest.approx((9 + 8 + 8) / (3 + 8 + 4)) and two.gain[0] == pytest.approx(two.emitted[0] / 1.5)
    assert two.below == pytest.approx((two.emitted[0] - 1) / 2)
    assert d.best == max(d.runs, key=lambda r: r.gain[0]).k
    assert json.loads(json.dumps(dataclasses.asdict(d))) == dataclasses.asdict(d)


def test_the_formula():
    "Independent hits give the published expectation, (1-a^(k+1))/(1-a), and a sure draft at cost c the limit (k+1)/(kc+1)"
    a, rng = .8, np.random.default_rng(0)
    hits = [(rng.random(4000) < a).astype(int).tolist() for _ in range(10)]
    for r in drafting(hits, [.3] * 3).runs:
        want = (1 - a**(r.k + 1)) / (1 - a)
        assert r.emitted[0] == pytest.approx(want, rel=.02) and r.gain[0] == pytest.approx(want / (.3 * r.k + 1), rel=.02)
        assert r.accepted[0] == pytest.approx(want - 1, rel=.02) and r.emitted[1] < r.emitted[0] < r.emitted[2]
    sure = drafting([[1] * 50], [.5] * 3)
    assert [r.gain[0] for r in sure.runs] == pytest.approx([(k + 1) / (.5 * k + 1) for k in KS]) and sure.best == 8
    assert speed_up(1 + 4 * pays_below(3.2, 4), 4, pays_below(3.2, 4)) == 1


def test_no_cut_pays_at_the_price_of_the_dense_model():
    d = drafting([[1, 0, 0, 1, 1, 0] * 6] * 3, [1.] * 3)
    assert all(r.gain[0] < 1 for r in d.runs) and "No run pays" in draft_words(d)
    assert "times the dense model's speed" in draft_words(drafting([[1, 1, 1, 0] * 8] * 3, [.1] * 3))


def test_the_interval_is_a_bootstrap_over_texts():
    rng = np.random.default_rng(1)
    hits = [(rng.random(n) < p).astype(int).tolist() for n, p in zip(rng.integers(12, 60, 14), rng.random(14))]
    r = drafting(hits, [.5] * 3, seed=2).runs[3]
    sums = np.array([[sum(accepted(h, 4)), len(accepted(h, 4)), sum(emitted(h, 4)), len(emitted(h, 4))] for h in hits], float)
    drawn = np.array([sums[rng.integers(14, size=14)].sum(0) for _ in range(20000)])
    wider = (14 / 13)**.5 * scipy.stats.t.ppf(.975, 13) / scipy.stats.norm.ppf(.975)
    for have, want in ((r.accepted, drawn[:, 0] / drawn[:, 1]), (r.gain, drawn[:, 2] / drawn[:, 3] / 3)):
        low, high = have[0] + wider * (np.quantile(want, [.025, .975]) - have[0])
        assert have[1:] == pytest.approx([low, high], abs=.04 * (high - low))


def test_two_drafts_are_drawn_from_the_same_texts():
    "So that of two drafts one of which is always better, the better one's interval lies above, end by end"
    rng = np.random.default_rng(3)
    good = [(rng.random(30) < .7).astype(int).tolist() for _ in range(9)]
    less = [[h * int(rng.random() < .8) for h in t] for t in good]
    a, b = drafting(good), drafting(less)
    assert all(x > y for x, y in zip(a.guessed, b.guessed))


# one pass is what drafting is

def test_one_pass_says_what_drafting_token_by_token_says(pair, prompts, texts):
    dense, pruned, _ = pair
    hits = guesses(pruned, prompts, texts)
    assert 0 < sum(map(sum, hits)) < sum(map(len, hits))  # else it would be too easy
    seen = set()
    for p, t, h in zip(prompts, texts, hits):
        for k in (1, 2, 4, 8):
            for i, n in enumerate(accepted(h, k)):
                drafted = draft_by_hand(pruned, p + t[:i], k)
                assert n == next((j for j in range(k) if drafted[j] != t[i + j]), k)
                seen.add((k, n))
    assert {(4, 0), (4, 1)} <= seen and any(n > 1 for _, n in seen)


@pytest.mark.parametrize("k", [1, 3, 4])
def test_real_speculative_decoding_takes_these_steps_and_writes_the_dense_text(pair, prompts, k):
    "Draft, check, keep what stands and one token of the dense model: the steps in which it writes are those that are counted"
    dense, pruned, tok = pair
    hits = guesses(pruned, prompts, texts := greedy_texts(dense, tok, prompts, 24))
    for p, t, h in zip(prompts, texts, hits):
        out, steps = [], []
        while len(out) + k < len(t):
            drafted = draft_by_hand(pruned, p + out, k)
            own = [next_token(dense, p + out + drafted[:j]) for j in range(k + 1)]
            n = next((j for j in range(k) if drafted[j] != own[j]), k)
            out += [*drafted[:n], own[n]]
            steps.append(n + 1)
        assert out == t[:len(out)] and steps == emitted(h, k)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_the_dense_model_as_its_own_draft_is_never_wrong(family):
    dense, tok = tiny_model(family).double(), tiny_tokenizer()
    ps = [tok(w)["input_ids"] for w in WORDS]
    texts = greedy_texts(dense, tok, ps, 16)
    hits = guesses(dense, ps, texts)
    assert hits == [[1] * len(t) for t in texts]
    assert [r.emitted[0] for r in drafting(hits).runs] == [r.k + 1 for r in drafting(hits).runs]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_batch_order_and_padding_do_not_matter(family):
    dense, tok = tiny_model(family, layers=6).double(), tiny_tokenizer()
    pruned = cut(dense, [Block(1, 3)])
    ps = [tok(w)["input_ids"] for w in WORDS]
    texts = [t[:5 + 3 * i] for i, t in enumerate(greedy_texts(dense, tok, ps, 24))]  # of all lengths
    alone = [guesses(pruned, [p], [t])[0] for p, t in zip(ps, texts)]
    assert all(guesses(pruned, ps, texts, size) == alone for size in (1, 2, 7, 100))
    assert guesses(pruned, ps[::-1], texts[::-1]) == alone[::-1]


def test_what_cannot_be_read_is_said(pair, prompts, texts):
    with pytest.raises(ReplaceMeError, match="prompt is empty"):
        guesses(pair[1], [[]], [[3, 4]])
    broken = copy.deepcopy(pair[1])
    broken.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ReplaceMeError, match="overflow"):
        guesses(broken, prompts, texts)


def test_texts_that_are_too_short_for_a_run():
    d = drafting([[1, 1, 1], [1]], [.5] * 3)
    assert [r.k for r in d.runs] == [1, 2] and d.best == 2 and draft_table(d)[0][1][0] == "2"
    none = drafting([[1], [0]], [.5] * 3)
    assert none.runs == [] and none.best is None and "too short" in draft_words(none) and len(draft_rows(none)) == 2
    assert drafting([[1, 0, 1, 1]]).runs[0].gain is None and cost_of_pace(None) is None


# the doors

def test_it_is_off_unless_asked_for(two_kinds, monkeypatch):
    for door in "pipeline", "sidebyside", "compare", "scores":
        monkeypatch.setattr(f"replaceme.{door}.guesses", lambda *a, **k: pytest.fail("something was drafted"), raising=False)
    result, path = run(make_config(**SHORT, **{**FEW, "draft": False}, speed=False, save_path="out"))
    assert "draft" not in result and "As a draft" not in (path / "report.html").read_text()


@pytest.mark.parametrize("speed", [True, False])
def test_a_run_says_what_the_pruned_model_is_worth_as_a_draft(two_kinds, speed):
    "The numbers are those of the two saved models; the cost is that of the seconds in the same record, where there are any"
    from replaceme.models import load_model
    from replaceme.pipeline import eval_text
    from replaceme.writing import prompts_of
    result, path = run(make_config(**SHORT, **FEW, speed=speed, **(dict(speed_seconds=.1) if speed else {}), save_path="out"))
    said = json.loads((path / "replaceme.json").read_text())
    cfg = make_config(**SHORT)
    (dense, tok), (pruned, _) = [load_model(m) for m in ("./tiny", path)]
    ps = prompts_of(tok, "text", eval_text(cfg, tok, dense), 4)
    rate = said["speed"]["batches"][0]["rate_ratio"] if speed else None
    want = dataclasses.asdict(drafting(guesses(pruned, ps, let_write(dense, tok, ps, 12).answers), cost_of_pace(rate)))
    assert said["draft"] == json.loads(json.dumps(want)) and (said["draft"]["cost"] is not None) == speed
    page = (path / "report.html").read_text()
    assert "<h2>As a draft" in page and ("Nothing was timed" in page) != speed
    assert result.draft.runs[0].k == 1 and report_html(Result(said)).count("As a draft") == 1


def test_two_models_side_by_side(two_kinds, monkeypatch):
    "Both orders of a model and a cut of it; what was read is kept, seconds are not"
    tiny = tiny_model("llama", layers=6)
    cut(tiny, [Block(2, 4)]).save_pretrained("out")
    tiny_tokenizer().save_pretrained("out")
    keys = dict(eval_dataset="b.txt", eval_size=6, eval_length=48, prompt=None, **FEW)
    pair = evaluate(make_config(EvaluateConfig, compare=["./tiny", "out"], speed=False, **keys))
    labels = [r[0] for r in pair.rows()]
    assert pair.draft.cost is None and "drafts that stand, of 4" in labels and not any("speed-up" in x for x in labels)
    assert "dense's tokens that it finds likeliest" in pair.table() and pair.to_dict()["draft"]["texts"] == 4
    monkeypatch.setattr("replaceme.scores.guesses", lambda *a, **k: pytest.fail("it was read again"))
    timed = evaluate(make_config(EvaluateConfig, compare=["./tiny", "out"], **keys))
    assert timed.draft.guessed == pair.draft.guessed and timed.draft.cost[0] == pytest.approx(1 / timed.speeds[0].rate_ratio[0])
    assert any(x.startswith("speed-up as a draft, best k=") for x in (r[0] for r in timed.rows()))
    monkeypatch.undo()
    monkeypatch.chdir(two_kinds)
    itself = evaluate(make_config(EvaluateConfig, compare=["./tiny", "./tiny"], speed=False, **keys))
    assert itself.draft.guessed[0] == 1


def test_methods_are_compared_as_drafts(two_kinds):
    "Columns of the table and the sheet, found again the second time, and nothing of it where it is not asked for"
    keys = dict(model_path="./tiny", dataset="a.txt", dataset_size=8, max_length=32, eval_dataset="b.txt", eval_size=4, eval_length=32,
                methods=["lstsq", "remove"], layers=[2], save_path="rows")
    comparison, path = compare(make_config(CompareConfig, **keys, **FEW))
    dense, *rows = comparison.rows
    assert "draft" not in dense and all(r.draft.texts == 4 and r.draft.cost[0] > 0 and r.draft.best for r in rows)
    table, sheet = (path / "comparison.md").read_text(), (path / "comparison.csv").read_text().splitlines()
    for word in "drafts that stand, of 4", "speed-up as a draft":
        assert word in table and word in sheet[0]
    again, _ = compare(make_config(CompareConfig, **keys, **FEW))
    assert [r["draft"] for r in again.rows[1:]] == [r["draft"] for r in rows]
    plain, path = compare(make_config(CompareConfig, **keys, **{**FEW, "draft": False}))
    assert "as a draft" not in (path / "comparison.md").read_text() and not any("draft" in r for r in plain.rows)


@pytest.mark.parametrize("cls, keys, said", [
    (None, dict(draft=True), "draft is True, but nothing is written: that takes writing"),
    (None, dict(draft=True, writing="chat", writing_tokens=8), "writing_tokens is 8, and draft looks at runs of 8: give 9 at least"),
    (None, dict(draft="much", writing="chat"), "draft is 'much': it must be true or false"),
    (EvaluateConfig, dict(draft=True, writing="chat"), "draft is True, but it takes two models")])
def test_keys_that_mean_nothing_are_refused(cls, keys, said):
    with pytest.raises(ReplaceMeError, match=said):
        make_config(*([cls] if cls else []), model_path="x", **({} if cls else dict(layers_to_skip=2)), **keys)
