"""Stability: the formula by hand, numbers that do not overflow, and the same questions put to both models."""
import copy
import json
import logging
import math
import os

import numpy as np
import pytest
import torch

from replaceme.core import ReplaceMeError
from replaceme.evaluate import (SCORES, Answer, eval_tasks, item_weights, option_scores, stability, task_samples,
                                task_stability)
from replaceme.models import fingerprint, tiny_model, tiny_tokenizer

WORDS = ["red", "blue", "sky", "moon", "cow", "door", "tea"]
ROWS = [dict(q=f"{a} and {b}", options=[WORDS[(a*k+b+2*k) % 7] for k in range(3)], answer=(a+b) % 3)
        for a in range(4) for b in range(4)]
ASK = dict(doc_to_text="{{q}} =", doc_to_choice="{{options}}", doc_to_target="{{answer}}")


def write_task(folder, name, rows, metrics=("acc", "acc_norm"), **kw):
    (folder/f"{name}.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    task = dict(task=name, dataset_path="json", output_type="multiple_choice", validation_split="validation",
                dataset_kwargs=dict(data_files=dict(validation=str(folder/f"{name}.jsonl"))),
                metric_list=[dict(metric=m, aggregation="mean", higher_is_better=True) for m in metrics])
    (folder/f"{name}.yaml").write_text(json.dumps({**task, **ASK, **kw}))


def answer(ppl, right, tokens=None, asked=""):
    "An answer whose options have these perplexities"
    tokens = tokens or [1]*len(ppl)
    return Answer([-n*math.log(p) for p, n in zip(ppl, tokens)], tokens, dict(acc=right), asked)


@pytest.fixture(scope="module")
def tok():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp("tasks")
    write_task(d, "sums", ROWS)
    write_task(d, "mutual", ROWS, ("acc", "acc_mutual_info"))
    swapped = dict(doc_to_text="{{answer}}", doc_to_choice=["{{q}} one", "{{q}} two", "{{q}} three"], doc_to_target="q")
    write_task(d, "inputs", ROWS, ("acc",), **swapped)
    said = [dict(metric="exact_match", aggregation="mean", higher_is_better=True)]
    write_task(d, "says", ROWS, output_type="generate_until", doc_to_choice=None, doc_to_target="{{options[0]}}",
               metric_list=said, generation_kwargs=dict(until=["\n"], max_gen_toks=2))
    return d


@pytest.fixture(scope="module")
def dense_and_pruned(tok, folder):
    dense, pruned = tiny_model(), tiny_model()
    pruned.model.layers = pruned.model.layers[:1]
    return [(m, task_samples(m, tok, "sums", include_path=folder)) for m in (dense, pruned)]


# the formula

def slow(dense, pruned, score, metric="acc"):
    "From the definition, one number after the other, without the maximum taken off"
    sigmas, same = [], []
    for i, a in dense.items():
        p = [-l/n for l, n in zip(a.loglik, a.tokens)]
        if score == "perplexity":
            p = [math.exp(x) for x in p]
        mean = sum(p)/len(p)
        sigmas.append(math.sqrt(sum((x-mean)**2 for x in p)/len(p)))
        same.append(a.right[metric] is pruned[i].right[metric])
    total = sum(math.exp(s) for s in sigmas)
    return sum(math.exp(s)/total for s, ok in zip(sigmas, same) if ok)


def test_three_questions_by_hand():
    # spreads 1, 3 and 0: weights as e, e^3 and 1; the tokens of an option divide its log-likelihood
    dense = {0: answer([2, 4], True, [3, 5]), 1: answer([3, 9], False, [2, 7]), 2: answer([6, 6], True)}
    e, total = math.e, math.e + math.e**3 + 1
    for flips, expected in (((), 1.), ((0,), (e**3+1)/total), ((1,), (e+1)/total), ((2,), (e+e**3)/total),
                            ((0, 1), 1/total), ((0, 1, 2), 0.)):
        pruned = {i: answer([9, 2], a.right["acc"] ^ (i in flips)) for i, a in dense.items()}
        res = task_stability({"t": dense}, {"t": pruned})["t"]
        assert res["stability"] == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert res["unweighted"] == pytest.approx(1-len(flips)/3)
        assert res["effective"] == pytest.approx(total**2/(e**2+e**6+1)) and res["samples"] == 3


def test_the_weights_are_the_matching_ones():
    "One match of two: the first weight is not its own where the second question matches"
    dense = {0: answer([1, 1], True), 1: answer([1, 5], True)}
    pruned = {0: answer([1, 1], False), 1: answer([1, 5], True)}
    w = item_weights(np.array([0., 2.]))
    assert stability({"t": dense}, {"t": pruned}) == pytest.approx(w[1]) and w[1] > .8


def test_only_the_dense_model_weighs():
    dense = {0: answer([2, 4], True), 1: answer([3, 9], True)}
    for ppl in ([1, 1], [1, 500]):
        pruned = {0: answer(ppl, True), 1: answer([2, 2], False)}
        assert stability({"t": dense}, {"t": pruned}) == pytest.approx(math.e/(math.e+math.e**3))


@pytest.mark.parametrize("score", SCORES)
def test_random_answers_against_the_slow_program(score):
    rng = np.random.default_rng(0)
    def some(n): return {i: answer(rng.uniform(1, 20, k := int(rng.integers(2, 6))), bool(rng.integers(2)),
                                   [int(t) for t in rng.integers(1, 9, k)]) for i in range(n)}
    dense = some(50)
    pruned = {i: Answer(a.loglik, a.tokens, dict(acc=bool(rng.integers(2)))) for i, a in dense.items()}
    got = stability({"t": dense}, {"t": pruned}, score)
    assert got == pytest.approx(slow(dense, pruned, score), rel=1e-10) and 0 < got < 1


def test_order_of_questions_changes_nothing():
    dense = {i: answer([2, 2+i], True) for i in range(4)}
    pruned = {i: answer([2, 2], i % 2 == 0) for i in range(4)}
    backwards = dict(reversed(pruned.items()))
    assert stability({"t": dense}, {"t": backwards}) == stability({"t": dense}, {"t": pruned})


def test_tasks_count_alike():
    one, two = {0: answer([2, 4], True)}, {i: answer([2, 2], True) for i in range(4)}
    flipped = {i: answer([2, 2], i > 0) for i in range(4)}
    assert stability({"a": one, "b": two}, {"b": flipped, "a": one}) == pytest.approx((1+.75)/2)


def test_the_score_is_what_it_says():
    a = Answer([-6., -2., -9.], [3, 1, 3], {})
    assert option_scores(a, "loss") == pytest.approx([2, 2, 3])
    assert option_scores(a) == pytest.approx(np.exp([2, 2, 3]))
    with pytest.raises(ReplaceMeError, match="'losses': Did you mean 'loss'"):
        option_scores(a, "losses")


# numbers

def test_weights_do_not_overflow():
    w = item_weights(np.array([1e4, 1e4-1, 0.]))
    assert w == pytest.approx([math.e/(1+math.e), 1/(1+math.e), 0]) and w.sum() == pytest.approx(1)
    assert item_weights(np.array([1e300, 1e300])) == pytest.approx([.5, .5])


def test_spreads_of_ten_thousand():
    dense = {0: answer([1, 20001], True), 1: answer([1, 20003], True), 2: answer([1, 5], True)}
    pruned = {0: answer([1, 1], True), 1: answer([1, 1], False), 2: answer([1, 1], True)}
    assert stability({"t": dense}, {"t": pruned}) == pytest.approx(1/(1+math.e), rel=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_a_hopeless_option_is_still_a_number(score):
    dense = {0: Answer([-1e6, -1.], [1, 1], dict(acc=True)), 1: answer([2, 4], True)}
    pruned = {0: answer([1, 1], False), 1: answer([1, 1], True)}
    assert stability({"t": dense}, {"t": pruned}, score) == 0
    assert stability({"t": dense}, {"t": dense}, score) == 1


@pytest.mark.parametrize("n", [1, 3, 7, 1000])
def test_identical_is_exactly_one(n):
    rng = np.random.default_rng(n)
    same = {i: answer(rng.uniform(1, 9, 4), bool(rng.integers(2))) for i in range(n)}
    for score in SCORES:
        got = stability({"t": same}, {"t": copy.deepcopy(same)}, score)
        assert got <= 1 and got == pytest.approx(1, abs=1e-12)


# what cannot be compared

def test_what_cannot_be_compared():
    good = {0: answer([2, 4], True, asked="x"), 1: answer([3, 9], True, asked="y")}
    def fails(match, dense, pruned, **kw):
        with pytest.raises(ReplaceMeError, match=match):
            stability(dense, pruned, **kw)
    fails("no task to compare", {}, {})
    fails("was asked t, the pruned one u", {"t": good}, {"u": good})
    fails("was asked t, the pruned one nothing", {"t": good}, {})
    fails("the pruned one t, u", {"t": good}, {"t": good, "u": good})
    fails("t has no questions", {"t": {}}, {"t": {}})
    fails("question 1 of t .2 against 1 questions", {"t": good}, {"t": {0: good[0]}})
    fails("question 1 of t .1 against 2 questions", {"t": {0: good[0]}}, {"t": good})
    fails("question 1 of t was put differently", {"t": good}, {"t": {0: good[0], 1: answer([3, 9], True, asked="z")}})
    fails("question 0 of t was put differently", {"t": good}, {"t": {**good, 0: answer([2, 4, 4], True, asked="x")}})
    one = {0: answer([2], True)}
    fails("1 option.s., which is not", {"t": one}, {"t": one})
    fails("by 'acc_norm': give a metric of acc", {"t": good}, {"t": good}, metric="acc_norm")
    none = {0: Answer([-1., -2.], [1, 1], {})}
    fails("give a metric of another task", {"t": none}, {"t": none})


# models

@torch.no_grad()
def direct(model, tok, row):
    "Log-likelihoods of the options, token by token in float64, and their lengths"
    model, out, lengths = copy.deepcopy(model).double(), [], []
    n = len(tok(f"{row['q']} =")["input_ids"])
    for o in row["options"]:
        ids = tok(f"{row['q']} = {o}", return_tensors="pt").input_ids
        logp = model(ids).logits[0].log_softmax(-1)
        out.append(sum(logp[t-1, ids[0, t]].item() for t in range(n, ids.shape[1])))
        lengths.append(ids.shape[1]-n)
    return out, lengths


def test_samples_are_the_direct_computation(tok, dense_and_pruned):
    for model, got in dense_and_pruned:
        assert list(got["sums"]) == list(range(len(ROWS)))
        for row, a in zip(ROWS, got["sums"].values(), strict=True):
            ll, lengths = direct(model, tok, row)
            assert a.loglik == pytest.approx(ll, rel=1e-5) and a.tokens == lengths
            assert a.right["acc"] is bool(np.argmax(ll) == row["answer"])
            assert a.right["acc_norm"] is bool(np.argmax(np.array(ll)/[len(o) for o in row["options"]]) == row["answer"])


def test_samples_agree_with_the_score(tok, folder, dense_and_pruned):
    for model, got in dense_and_pruned:
        score = eval_tasks(model, tok, "sums", include_path=folder)["sums"]
        for metric in ("acc", "acc_norm"):
            assert np.mean([a.right[metric] for a in got["sums"].values()]) == pytest.approx(score[metric])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_dense_against_pruned(dense_and_pruned, score, metric):
    (_, dense), (_, pruned) = dense_and_pruned
    got = task_stability(dense, pruned, score, metric)["sums"]
    # the spread of losses is small; that of perplexities is not, so the slow program takes its largest off
    expected = slow(dense["sums"], pruned["sums"], score, metric) if score == "loss" else None
    if expected is None:
        sigma = [np.std(np.exp([-l/n for l, n in zip(a.loglik, a.tokens)])) for a in dense["sums"].values()]
        w = [math.exp(s-max(sigma)) for s in sigma]
        same = [a.right[metric] is b.right[metric] for a, b in zip(dense["sums"].values(), pruned["sums"].values())]
        expected = sum(x for x, ok in zip(w, same) if ok)/sum(w)
    assert got["stability"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert got["samples"] == len(ROWS) and 1 <= got["effective"] <= len(ROWS)
    assert stability(dense, dense, score, metric) == pytest.approx(1, abs=1e-12)


def test_some_answers_do_change(dense_and_pruned):
    "Otherwise the comparison above shows little"
    (_, dense), (_, pruned) = dense_and_pruned
    assert any(0 < task_stability(dense, pruned, metric=m)["sums"]["unweighted"] < 1 for m in ("acc", "acc_norm"))


def test_batches_and_limits(tok, folder, dense_and_pruned):
    model, got = dense_and_pruned[0]
    some = task_samples(model, tok, {"sums": 0}, limit=5, include_path=folder, batch_size=3)["sums"]
    assert list(some) == list(range(5))
    for i, a in some.items():
        assert a.loglik == pytest.approx(got["sums"][i].loglik, rel=1e-5)
        assert (a.tokens, a.right, a.asked) == (got["sums"][i].tokens, got["sums"][i].right, got["sums"][i].asked)
    with pytest.raises(ReplaceMeError, match="question 5 of sums"):
        stability({"sums": some}, got)
    with pytest.raises(ReplaceMeError, match="limit is 0"):
        task_samples(model, tok, "sums", limit=0, include_path=folder)


def test_shots_are_another_question(tok, folder, dense_and_pruned):
    model = dense_and_pruned[0][0]
    zero, one = (task_samples(model, tok, {"sums": n}, limit=3, include_path=folder) for n in (0, 1))
    with pytest.raises(ReplaceMeError, match="put differently"):
        stability(zero, one)


def test_mutual_information_keeps_the_options(tok, folder, dense_and_pruned):
    "lm-eval asks for each option twice there: after the question, and alone"
    model, got = dense_and_pruned[0]
    mutual = task_samples(model, tok, "mutual", include_path=folder)["mutual"]
    for i, a in mutual.items():
        assert a.loglik == pytest.approx(got["sums"][i].loglik, rel=1e-5) and a.tokens == got["sums"][i].tokens
        assert set(a.right) == {"acc", "acc_mutual_info"}


def test_a_task_that_is_not_multiple_choice(tok, folder, dense_and_pruned):
    model = dense_and_pruned[0][0]
    for tasks in ("says", ["sums", "says"]):
        with pytest.raises(ReplaceMeError, match="says is not multiple choice but generate_until.*Leave it out"):
            task_samples(model, tok, tasks, include_path=folder)


def test_several_tasks_by_a_pattern_of_tokens(tok, folder):
    "With a BOS token the count is still that of the option alone"
    bos = tiny_tokenizer(add_bos=True)
    got = task_samples(tiny_model(), bos, ["sums", "mutual"], limit=2, include_path=folder)
    assert set(got) == {"sums", "mutual"}
    for task in got.values():
        for i, a in task.items():
            assert a.tokens == [len(o)+1 for o in ROWS[i]["options"]]


def test_a_broken_model_is_said(tok, folder):
    model = tiny_model()
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(ReplaceMeError, match="question 0 of sums has the log-likelihood nan"):
        task_samples(model, tok, "sums", limit=2, include_path=folder)


def test_everything_is_left_as_it_was(tok, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_model().train()
    before, pad = fingerprint(model), tok.pad_token
    torch.manual_seed(3)
    state = torch.get_rng_state()
    task_samples(model, tok, "sums", limit=2, include_path=folder)
    assert fingerprint(model) == before and model.training and tok.pad_token == pad
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.getLogger("lm_eval").level == 0 and "DISABLE_MULTIPROC" not in os.environ
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_a_group_counts_once_and_has_an_interval(tmp_path):
    "Its questions are those of its tasks, which are not counted again beside it"
    from replaceme.tasks import equivalences, retained, task_records
    rng = np.random.default_rng(0)
    for k, n in dict(x=12, y=30, z=20).items():
        rows = [dict(q=f"What {k} is {i}?", c=[*map(str, rng.permutation(WORDS)[:3])], a=int(rng.integers(3))) for i in range(n)]
        (tmp_path / f"{k}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / f"{k}.yaml").write_text(f"""
task: sub_{k}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/{k}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{c}}}}"
doc_to_target: a
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    (tmp_path / "g.yaml").write_text("group: some\ntask: [sub_x, sub_y]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n")
    a, b = [task_records(tiny_model("llama", layers=4, seed=n, initializer_range=1.), tiny_tokenizer(), ["some", "sub_z"], None, str(tmp_path)) for n in (0, 1)]
    found = retained(a, b)
    mean, one = found["mean"], lambda r, t: r[t]["scores"]["acc"]
    assert mean.tasks == 2 and mean.before == (one(a, "some") + one(a, "sub_z")) / 2 and mean.low < mean.percent < mean.high
    assert found["tasks"]["some"]["acc"].questions == 42 and one(a, "some") == pytest.approx((12 * one(a, "sub_x") + 30 * one(a, "sub_y")) / 42)
    assert set(equivalences(a, b)) == {"some", "sub_x", "sub_y", "sub_z"}
