"""Writing, not only choosing: what two models write, by hand and by another program; tasks whose answers are written; and whether two models are equal."""
import copy
import dataclasses
import json
import math
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import replaceme.evaluate as ev
from replaceme.blocks import Block
from replaceme.compare import CompareConfig, compare
from replaceme.core import ReplaceMeError, ReplaceMeWarning
from replaceme.data import repeats
from replaceme.intervals import equivalence, missed, verdict_of
from replaceme.merge import cut
from replaceme.models import tiny_model, tiny_tokenizer
from replaceme.pipeline import EvaluateConfig, evaluate, make_config, run, scores_table
from replaceme.tasks import equivalences, task_records
from replaceme.writing import (Written, answer_losses, beginnings, compare_writing, greedy_texts, let_write, prompts_of, same_start, same_until,
                               until_end, writing_rows)

WORDS = ["Once upon a time", "a", "the river runs", "Once upon a tide", "b", "layers of a model", "zzzz"]


@pytest.fixture(scope="module")
def pair():
    dense, tok = tiny_model(layers=6), tiny_tokenizer()
    return dense, cut(dense, [Block(2, 4)]), tok


@pytest.fixture(scope="module")
def prompts(pair):
    return [pair[2](w)["input_ids"] for w in WORDS]


SHORT = dict(model_path="./tiny", dataset="a.txt", dataset_size=8, max_length=32, layers_to_skip=2, method="lstsq", ridge=.1, prompt=None,
             eval_dataset="b.txt", eval_size=6, eval_length=48)
FEW = dict(writing="text", writing_prompts=4, writing_tokens=10)


# what is counted

@pytest.mark.parametrize("ids, want", [([1] * 9, 5 / 6), ([1, 2, 3, 4, 5, 6], 0), ([1, 2] * 4, 3 / 5), ([], 0), ([1, 2, 3], 0), ([1, 2, 3, 4], 0)])
def test_repeats_by_hand(ids, want):
    "Nine times the same: six 4-grams, five of which were there; 1212 1212: five, of two kinds"
    assert repeats(ids) == pytest.approx(want)
    grams = Counter(tuple(ids[i:i + 4]) for i in range(len(ids) - 3))
    assert repeats(ids) == pytest.approx(sum(n - 1 for n in grams.values()) / max(1, sum(grams.values())))


def test_starts_by_hand():
    assert [same_until([1, 2, 3], b) for b in ([1, 2, 3], [1, 2, 3, 4], [1, 9, 3], [], [9])] == [3, 3, 1, 0, 0]
    assert same_start([1, 2, 3], [1, 2, 9], 2) and not same_start([1, 2, 3], [1, 2, 9], 3)
    assert same_start([1, 2], [1, 2], 128) and not same_start([1, 2], [1, 2, 3], 128) and same_start([1, 2], [1, 2, 3], 2)
    assert until_end([4, 9, 2, 5, 2], {2}) == [4, 9, 2] and until_end([2], [2]) == [2] and until_end([4], [2]) == [4]


# what a model writes

@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "bloom"])
def test_texts_are_greedy_whatever_is_in_the_batch(family):
    "Token by token without a cache, alone; a taste in sampling that the checkpoint brings is put aside, and comes back"
    model, tok = tiny_model(family), tiny_tokenizer()
    model.generation_config.update(do_sample=True, temperature=3., repetition_penalty=30.)
    ps = [tok(w)["input_ids"] for w in WORDS]

    def alone(p, n=9):
        new = []
        with torch.no_grad():
            while len(new) < n and new[-1:] != [tok.eos_token_id]:
                new.append(model(torch.tensor([p + new])).logits[0, -1].argmax().item())
        return new
    want = [alone(p) for p in ps]
    for size in (1, 2, 7):
        assert greedy_texts(model, tok, ps, 9, size) == want
    assert greedy_texts(model, tok, ps[::-1], 9) == want[::-1] and model.generation_config.repetition_penalty == 30.


def test_a_text_ends_with_its_end_token(pair, prompts):
    "One row of a batch ends early; what is filled up behind it is none of its text, and other ends than the tokenizer's count too"
    model, tok = copy.deepcopy(pair[0]), pair[2]
    plain = greedy_texts(model, tok, prompts, 12)
    end = plain[0][3]  # a token that comes early in one of them
    model.generation_config.eos_token_id = [tok.eos_token_id, end]
    got = greedy_texts(model, tok, prompts, 12)
    assert got == [p[:p.index(end) + 1] if end in p else p for p in plain] and len(got[0]) <= 4 and len({len(g) for g in got}) > 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_the_loss_on_given_answers_is_the_definitions(family):
    "In float64, one token at a time; padding, batch size and chunks of the log-softmax change nothing"
    model, tok = tiny_model(family), tiny_tokenizer()
    ps = [tok(w)["input_ids"] for w in WORDS]
    answers = [tok(w)["input_ids"][1:] + [tok.eos_token_id] for w in ("x", "a long answer, longer than all others", "yes", "no", "why", "1 2 3", "?")]
    m = copy.deepcopy(model).double()
    with torch.no_grad():
        want = [np.mean([-m(torch.tensor([p + a[:i]])).logits[0, -1].log_softmax(-1)[t].item() for i, t in enumerate(a)]) for p, a in zip(ps, answers)]
    assert answer_losses(model, ps, answers) == pytest.approx(want, rel=1e-4)
    m = m.float().double()
    exact = answer_losses(m, ps, answers, 1)
    for size, rows in ((2, 128), (7, 128), (3, 2), (7, 1)):
        assert answer_losses(m, ps, answers, size, rows) == pytest.approx(exact, rel=1e-6)
    longer = [*answers[:-1], answers[-1] * 20]  # one more pad for all the others
    assert answer_losses(m, ps, longer, 7)[:-1] == pytest.approx(exact[:-1], rel=1e-6)


def test_what_does_not_fit_is_said(pair, prompts):
    dense, _, tok = pair
    with pytest.raises(ReplaceMeError, match="250 new tokens do not fit the model's 256 positions: lower writing_tokens"):
        greedy_texts(dense, tok, prompts, 250)
    broken = copy.deepcopy(dense)
    broken.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ReplaceMeError, match="overflow"):
        let_write(broken, tok, prompts, 4)


# two models

def test_two_models_by_another_program(pair, prompts):
    "Each number out of the texts themselves; the interval is that of a direct bootstrap over texts"
    dense, pruned, tok = pair
    a = let_write(dense, tok, prompts, 40)
    b = let_write(pruned, tok, prompts, 40, dense=a)
    w = compare_writing(a, b, seed=3)
    assert (w.kind, w.texts, w.tokens, [s[0] for s in w.same]) == ("text", 7, 40, [8, 32])
    for n, share, low, high in w.same:
        assert share == pytest.approx(sum(x[:n] == y[:n] for x, y in zip(a.answers, b.answers)) / 7) and low <= share <= high
    assert w.repeats == pytest.approx([np.mean([*map(repeats, s.answers)]) for s in (a, b)]) and w.more[0] == pytest.approx(w.repeats[1] - w.repeats[0])
    n = np.array([len(x) for x in a.answers])
    own, others = np.array(answer_losses(dense, prompts, a.answers)), np.array(answer_losses(pruned, prompts, a.answers))
    assert w.loss == pytest.approx([own @ n / n.sum(), others @ n / n.sum()], rel=1e-5) and w.above[0] == pytest.approx(w.loss[1] - w.loss[0])
    rng = np.random.default_rng(0)
    draws = [rng.integers(7, size=7) for _ in range(20000)]
    above = np.quantile([(others - own)[i] @ n[i] / n[i].sum() for i in draws], [.025, .975])
    wider = math.sqrt(7 / 6) * scipy.stats.t.ppf(.975, 6) / scipy.stats.norm.ppf(.975)
    above = w.above[0] + wider * (above - w.above[0])
    assert w.above[1:] == pytest.approx(above, abs=.12 * (above[1] - above[0]))


def test_a_model_and_itself(pair, prompts):
    dense, _, tok = pair
    a = let_write(dense, tok, prompts, 12)
    w = compare_writing(a, let_write(dense, tok, prompts, 12, dense=a))
    few = 1 - .025 ** (1 / w.texts)  # so many texts may be otherwise that none of these is
    assert w.same == [[8, 1., pytest.approx(1 - few), 1.]] and w.above == [0., 0., 0.] and w.loss[0] == w.loss[1]
    assert w.more == [0., pytest.approx(-few), pytest.approx(few)]
    assert w.until[0] == pytest.approx(np.mean([len(x) for x in a.answers]))
    assert json.loads(json.dumps(dataclasses.asdict(w))) == dataclasses.asdict(w)
    assert writing_rows(w) == writing_rows(dataclasses.asdict(w))


def test_a_model_that_repeats_itself_is_seen():
    said = [[*range(20)], [*range(40, 60)]]
    dense, loop = Written([[1], [2]], said, [1., 1.]), Written([[1], [2]], [[5] * 20, [*range(40, 60)]], [2., 2.])
    w = compare_writing(dense, loop)
    assert w.repeats == [0., pytest.approx((16 / 17) / 2)] and w.same[0][:2] == [8, .5] and w.until[0] == 10 and w.above == [1., 1., 1.]


@pytest.mark.parametrize("alike", [0, 1, 16])
def test_intervals_of_shares_and_of_tokens_are_possible(alike):
    "Of 16 texts none, one or all begin as the dense model's: that is a share, with a share's interval, and no difference"
    dense = Written([[i] for i in range(16)], [[*range(40)]] * 16, [1.] * 16)
    other = Written(dense.prompts, [[*range(40)]] * alike + [[99] * 40] * (16 - alike), [1.] * 16)
    w = compare_writing(dense, other)
    for _, share, low, high in w.same:
        exact = scipy.stats.binomtest(alike, 16).proportion_ci(.95, "exact")
        assert 0 <= low <= exact.low+1e-9 and exact.high-1e-9 <= high <= 1 and low <= share <= high
    assert 0 <= w.until[1] <= w.until[0] <= w.until[2] <= 128
    assert not any(span[0] in "+-" for label, *_, span in writing_rows(w) if label.startswith(("first", "tokens")))


def test_prompts(pair):
    tok, plain = pair[2], tiny_tokenizer()
    plain.chat_template = None
    ids = torch.arange(60).view(6, 10)
    assert beginnings(ids, 3, 4) == [ids[i, :4].tolist() for i in (0, 2, 4)]  # spread over all kinds of text
    assert prompts_of(tok, True, ids, 2) == prompts_of(tok, "chat", None, 2) != prompts_of(tok, "text", ids, 2) == prompts_of(plain, True, ids, 2)
    assert all("[user]" in tok.decode(p) for p in prompts_of(tok, True, None, 24))
    for call, said in ((lambda: prompts_of(plain, "chat", ids), "no chat template"), (lambda: prompts_of(plain, True, None), "eval_dataset is null"),
                       (lambda: prompts_of(tok, "chat", None, 25), "24 questions")):
        with pytest.raises(ReplaceMeError, match=said):
            call()


# the doors

def test_it_is_off_unless_asked_for(two_kinds, monkeypatch):
    monkeypatch.setattr("replaceme.writing.greedy_texts", lambda *a, **k: pytest.fail("something was written"))
    result, path = run(make_config(**SHORT, save_path="out"))
    assert "writing" not in result and "<h2>Writing" not in (path / "report.html").read_text()


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_run_says_what_became_of_writing(two_kinds, kind):
    "The numbers are those of the two saved models, and stand in the record, the page, the card and the table"
    result, path = run(make_config(**SHORT, **{**FEW, "writing": kind}, save_path="out"))
    said = json.loads((path / "replaceme.json").read_text())["writing"]
    from replaceme.models import load_model
    from replaceme.pipeline import eval_text
    cfg = make_config(**SHORT)
    (dense, tok), (pruned, _) = [load_model(m) for m in ("./tiny", path)]
    ps = prompts_of(tok, kind, eval_text(cfg, tok, dense), 4)
    a = let_write(dense, tok, ps, 10, kind=kind)
    want = dataclasses.asdict(compare_writing(a, let_write(pruned, tok, ps, 10, dense=a)))
    assert said["kind"] == kind and said["repeats"] == want["repeats"] and said["same"] == want["same"] and said["until"] == want["until"]
    assert said["loss"] == pytest.approx(want["loss"], rel=1e-5) and said["above"] == pytest.approx(want["above"], abs=1e-5)
    page, card = (path / "report.html").read_text(), (path / "README.md").read_text()
    assert "<h2>Writing" in page and "repeated 4-grams" in page and ("chat template" in page.split("How to do it again")[0]) == (kind == "chat")
    assert "first 8 tokens the same" in card and "loss on the dense model" in card and "repeated 4-grams" in repr(result)


def test_one_model_and_two(two_kinds, capsys, monkeypatch):
    "Of one its repeats, of two everything; both from the cache the second time; a flag does it too"
    from replaceme.cli import evaluate_model
    run(make_config(**{**SHORT, "eval_dataset": None, "eval_size": 24, "eval_length": 512}, save_path="out"))
    keys = dict(eval_dataset="b.txt", eval_size=6, eval_length=48, **FEW)
    one = evaluate(make_config(EvaluateConfig, model_path="out", **keys))
    assert one["writing"].keys() == {"kind", "texts", "tokens", "repeats"} and "repeated 4-grams (%), 4 texts of 10 tokens" in scores_table(one)
    both = make_config(EvaluateConfig, compare=["./tiny", "out"], speed=False, prompt=None, **keys)
    pair = evaluate(both)
    assert pair.writing.repeats[1] == pytest.approx(one["writing"]["repeats"]) and pair.writing.texts == 4
    labels = [r[0] for r in pair.rows()]
    assert {"repeated 4-grams", "first 8 tokens the same", "tokens until the first other", "loss on the dense model's texts"} <= set(labels)
    assert "first 8 tokens the same" in pair.table() and pair.to_dict()["writing"]["texts"] == 4
    monkeypatch.setattr("replaceme.writing.greedy_texts", lambda *a, **k: pytest.fail("it was written again"))
    assert evaluate(both).writing == pair.writing
    monkeypatch.undo()
    monkeypatch.chdir(two_kinds)
    evaluate_model(["--model_path", "out", "--eval_dataset", "null", "--writing", "chat", "--writing_prompts", "2", "--writing_tokens", "5", "--cache", "false"])
    assert "repeated 4-grams (%), 2 texts of 5 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("keys, said", [
    (dict(writing="novel"), "writing is 'novel'"), (dict(writing_prompts=4), "writing_prompts is 4, but nothing is written"),
    (dict(writing_tokens=4), "writing_tokens is 4, but nothing is written"), (dict(writing="text", eval_dataset=None), "eval_dataset, and that is null"),
    (dict(writing=True, writing_prompts=1), "at least 2")])
def test_keys_that_mean_nothing_are_refused(keys, said):
    with pytest.raises(ReplaceMeError, match=said):
        make_config(model_path="x", layers_to_skip=2, **keys)


def test_what_cannot_be_written_is_said_before_anything_is_pruned(two_kinds, monkeypatch):
    monkeypatch.setattr("replaceme.pipeline.calibrate", lambda *a, **k: pytest.fail("it was pruned"))
    with pytest.raises(ReplaceMeError, match="lower writing_tokens"):
        run(make_config(**SHORT, **{**FEW, "writing_tokens": 500}, save_path="out"))
    with pytest.raises(ReplaceMeError, match="24 questions"):
        run(make_config(**SHORT, writing="chat", writing_prompts=99, save_path="out"))
    assert not Path("out").exists()


# equal, worse, or not known

def test_verdicts():
    assert [verdict_of(low, high, 2) for low, high in ((-1, 1), (-1.9, -.1), (-2, 0), (-9, -2.1), (-3, -1), (-1, 2.5), (.1, 3))] == [
        "equal", "equal", "undecided", "worse", "worse", "undecided", "better"]


def test_few_questions_prove_nothing():
    "Without one answer that differs the bootstrap has no spread; a kind of question that none of N is may be as common as 3/N"
    assert equivalence([0] * 8, [0] * 8).verdict == "undecided" and equivalence([1] * 1000, [1] * 1000).verdict == "equal"
    e = equivalence([0] * 100, [0] * 100)
    assert (1 - e.high) ** 100 == pytest.approx(.05) and e.low == -e.high == -missed(100)
    assert equivalence([1, 0] * 300, [1, 1] * 300).verdict == "worse" and equivalence([1, 1] * 300, [1, 0] * 300).verdict == "better"


def test_the_interval_is_that_of_the_normal_approximation():
    rng = np.random.default_rng(1)
    x, y = (rng.random(3000) < .6).astype(float), (rng.random(3000) < .55).astype(float)
    e, d = equivalence(y, x), y - x
    half = 1.6449 * d.std(ddof=1) / 3000**.5
    assert e.difference == pytest.approx(d.mean()) and [e.low, e.high] == pytest.approx([d.mean() - half, d.mean() + half], abs=.1 * half)


def test_equal_is_said_wrongly_in_one_of_twenty_cases():
    "Where the true difference is the margin, on few questions and on many, also where a difference is rare"
    rng = np.random.default_rng(0)
    for n, worse in ((150, .02), (400, .02), (400, .06)):
        drawn = rng.choice([-1., 0., 1.], (120, n), p=[worse, 1 - worse - (worse - .02), worse - .02])
        said = [equivalence(d, 0 * d, .02).verdict for d in drawn]
        assert said.count("equal") <= .05 * 120 + 3 * (120 * .05 * .95)**.5


@pytest.mark.parametrize("n, margin", [(200, .02), (250, .02), (400, .02), (600, .02), (500, .01)])
def test_models_that_only_lose_are_seldom_called_equal(n, margin):
    "The probability, counted out, of all numbers of lost questions that are called equal where the true share is the margin"
    lost = [k for k in range(n // 10) if equivalence([0] * k + [1] * (n - k), [1] * n, margin).verdict == "equal"]
    assert lost and sum(math.comb(n, k) * margin**k * (1 - margin)**(n - k) for k in lost) <= .05


# tasks whose answers are written

def write_task(folder, name="says", n=8, **more):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(dict(q=f"{i} and {i} is" + " now" * i, a=str(2 * i))) for i in range(n)))
    (folder / f"{name}.yaml").write_text(json.dumps({**dict(
        task=name, dataset_path="json", dataset_kwargs=dict(data_files=dict(validation=str(folder / f"{name}.jsonl"))), validation_split="validation",
        output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a}}", generation_kwargs=dict(until=["\n"], max_gen_toks=6),
        metric_list=[dict(metric="exact_match", aggregation="mean", higher_is_better=True)]), **more}))
    return str(folder)


def test_written_answers_are_paired_and_compared(pair, tmp_path):
    "What lm-eval is told to write is what the model writes; the target of half of the questions is the dense model's own answer"
    dense, pruned, tok = pair
    rows = [f"{i} and {i} is" + " now" * i for i in range(8)]
    own = [tok.decode(t, skip_special_tokens=True) for t in greedy_texts(dense, tok, [tok(q)["input_ids"] for q in rows], 6)]
    folder = write_task(tmp_path / "t")
    targets = [o.split("\n")[0] if i % 2 else "never" for i, o in enumerate(own)]
    (tmp_path / "t/says.jsonl").write_text("\n".join(json.dumps(dict(q=q, a=t)) for q, t in zip(rows, targets)))
    records = [task_records(m, tok, folder, batch_size=4) for m in (dense, pruned)]
    right = [[q["scores"]["exact_match"] for q in r["says"]["questions"]] for r in records]
    assert right[0] == [i % 2 for i in range(8)] and records[0]["says"]["scores"]["exact_match"] == .5
    theirs = [tok.decode(t, skip_special_tokens=True) for t in greedy_texts(pruned, tok, [tok(q)["input_ids"] for q in rows], 6)]
    assert right[1] == [float(t.split("\n")[0] == a) for t, a in zip(theirs, targets)]
    e = equivalences(*records)["says"]["exact_match"]
    assert e == equivalence(right[1], right[0]) and e.difference == np.mean(right[1]) - .5
    assert equivalences(records[0], records[0], .5)["says"]["exact_match"].verdict == "equal"
    (tmp_path / "t/says.jsonl").write_text(json.dumps(dict(q="other", a="x")))
    with pytest.raises(ReplaceMeError, match="put differently"):
        equivalences(records[0], task_records(pruned, tok, folder))


def test_a_run_and_two_models_side_by_side_say_what_is_equal(two_kinds):
    folder = write_task(two_kinds / "t", n=5)
    result, path = run(make_config(**SHORT, tasks=folder, equal_within=60., save_path="out"))
    e = json.loads((path / "replaceme.json").read_text())["equivalence"]["says"]["exact_match"]
    assert e["margin"] == .6 and e["verdict"] == ("equal" if -.6 < e["low"] and e["high"] < .6 else "undecided")
    assert result["tasks"]["before"]["says"]["samples"] == 5
    words = dict(equal="equal within ±60 points", undecided="undecided (±60 points)")[e["verdict"]]
    assert words in (path / "report.html").read_text() and words in (path / "README.md").read_text()
    pair = evaluate(make_config(EvaluateConfig, compare=["./tiny", "out"], eval_dataset=None, tasks=folder, speed=False, prompt=None, equal_within=60.))
    assert dataclasses.asdict(pair.equal["says"]["exact_match"]) == e
    assert any(words in r[2] for r in pair.rows()) and pair.to_dict()["equal"]["says"]["exact_match"] == e


# the set that is called generation

def local_set(two_kinds):
    "Four tasks of these names, of which one runs programs"
    for name in ev.GENERATION:
        more = dict(generation_kwargs=dict(until=["\n"])) if name != "ifeval" else {}
        write_task(two_kinds / "t", name, 3, **more, **(dict(unsafe_code=True) if name == "humaneval_plus" else {}))
    return str(two_kinds / "t")


@pytest.fixture
def fresh():
    ev._say_left_out.cache_clear()
    yield
    ev._say_left_out.cache_clear()


def test_generation_goes_without_programs_and_says_so(tmp_path, fresh, pair):
    folder = local_set(tmp_path)
    with pytest.warns(ReplaceMeWarning, match="goes without humaneval_plus, which runs the programs that the model writes: set run_code to true"):
        tasks = ev.load_tasks("generation", folder)["tasks"]
    assert list(tasks) == ["gsm8k_platinum_cot_llama", "ifeval", "minerva_math500"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReplaceMeWarning)  # once is enough
        ev.load_tasks(["generation"], folder)
    room = {n: t.get_config("generation_kwargs")["max_gen_toks"] for n, t in tasks.items()}
    assert room == dict(gsm8k_platinum_cot_llama=1024, ifeval=6, minerva_math500=1024)  # its own, or enough
    with pytest.raises(ReplaceMeError, match="humaneval_plus runs programs that the model writes: set run_code"):
        ev.load_tasks("humaneval_plus", folder)
    with pytest.raises(ReplaceMeError, match="gsm8k_platinum_cot_llama may have 1024 tokens, and the model has 256 positions: set max_gen_toks"):
        ev.eval_tasks(pair[0], pair[2], "generation", include_path=folder)
    got = ev.eval_tasks(pair[0], pair[2], "generation", include_path=folder, chat=dict(max_gen_toks=5))
    assert {n: s["samples"] for n, s in got.items()} == dict.fromkeys(tasks, 3)


def test_programs_are_run_where_that_is_asked_for(tmp_path, fresh, pair, monkeypatch):
    "Inside, the metric finds the permission that it looks for; outside there is none"
    import os
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    folder = local_set(tmp_path)
    (tmp_path / "t/utils.py").write_text("import os\n\ndef judge(doc, results):\n    return dict(allowed=float(os.environ.get('HF_ALLOW_CODE_EVAL') == '1'))\n")
    spec = json.loads((tmp_path / "t/humaneval_plus.yaml").read_text())
    spec["metric_list"] = [dict(metric="allowed", aggregation="mean", higher_is_better=True)]
    (tmp_path / "t/humaneval_plus.yaml").write_text(json.dumps(spec) + "\n")
    text = (tmp_path / "t/humaneval_plus.yaml").read_text()
    (tmp_path / "t/humaneval_plus.yaml").write_text(text.rstrip().rstrip("}") + ', "process_results": !function utils.judge}')
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReplaceMeWarning)
        got = ev.eval_tasks(pair[0], pair[2], "generation", include_path=folder, chat=dict(max_gen_toks=5, run_code=True))
    assert set(got) == set(ev.GENERATION) and got["humaneval_plus"]["allowed"] == 1. and "HF_ALLOW_CODE_EVAL" not in os.environ


def test_the_room_for_answers_is_a_key(two_kinds, monkeypatch):
    "It reaches what is written, at each door, and scores of two lengths are kept apart"
    folder = write_task(two_kinds / "t", n=2)
    seen, inner = [], ev._lm_eval

    def noted(model, tok, loaded, *a, **k):
        seen.extend(t.get_config("generation_kwargs")["max_gen_toks"] for t in loaded["tasks"].values())
        return inner(model, tok, loaded, *a, **k)
    monkeypatch.setattr(ev, "_lm_eval", noted)
    monkeypatch.setattr("replaceme.tasks._lm_eval", noted)
    run(make_config(**SHORT, tasks=folder, max_gen_toks=3, save_path="out"))
    assert seen == [3, 3]
    for most in (3, 4, 3):
        evaluate(make_config(EvaluateConfig, model_path="./tiny", eval_dataset=None, tasks=folder, max_gen_toks=most))
    assert seen == [3, 3, 3, 4]  # the third was kept
    with pytest.raises(ReplaceMeError, match="max_gen_toks is 0"):
        make_config(model_path="x", tasks=folder, max_gen_toks=0)


def test_a_task_that_is_not_on_disk(fresh):
    "One error in one line, before anything is loaded"
    with pytest.raises(ReplaceMeError) as e, pytest.warns(ReplaceMeWarning):
        ev.load_tasks("generation")
    said = str(e.value)
    assert "gsm8k_platinum_cot_llama (data set madrylab/gsm8k-platinum) could not be loaded" in said and "\n" not in said
    assert "connect once" in said


def test_a_task_that_needs_a_package(tmp_path):
    write_task(tmp_path / "t", process_results="X")
    p = tmp_path / "t/says.yaml"
    p.write_text(p.read_text().replace('"X"', "!function utils.judge"))
    (tmp_path / "t/utils.py").write_text("import no_such_package_at_all\n\ndef judge(doc, results): return {}\n")
    with pytest.raises(ReplaceMeError, match="says needs a package that is not installed .*no_such_package_at_all.*pip install") as e:
        ev.load_tasks(str(tmp_path / "t"))
    assert "hub" not in str(e.value)


def test_methods_are_compared_by_what_they_write(two_kinds, monkeypatch):
    "Columns of the table and the sheet; found again the second time, and nothing of it where it is not asked for"
    keys = dict(model_path="./tiny", dataset="a.txt", dataset_size=8, max_length=32, eval_dataset="b.txt", eval_size=4, eval_length=32,
                methods=["lstsq", "remove"], layers=[2], save_path="rows")
    comparison, path = compare(make_config(CompareConfig, **keys, **FEW))
    dense, *rows = comparison.rows
    assert dense["writing"]["same"][0][:2] == [8, 1.] and dense["writing"]["above"][0] == 0 and "written" not in dense
    for r in rows:
        assert r["writing"]["repeats"][0] == dense["writing"]["repeats"][0] and r["writing"]["loss"][0] == pytest.approx(dense["writing"]["loss"][0])
        assert r["writing"]["loss"][1] == pytest.approx(r["writing"]["loss"][0] + r["writing"]["above"][0])
    table, sheet = (path / "comparison.md").read_text(), (path / "comparison.csv").read_text().splitlines()
    for word in "repeated 4-grams", "first 8 tokens the same", "loss on dense's texts":
        assert word in table and word in sheet[0]
    assert f"{rows[0]['writing']['loss'][1]:.3f}" in table
    monkeypatch.setattr("replaceme.writing.greedy_texts", lambda *a, **k: pytest.fail("it was written again"))
    again, _ = compare(make_config(CompareConfig, **keys, **FEW))
    assert [r["writing"] for r in again.rows] == [r["writing"] for r in comparison.rows]
    plain, path = compare(make_config(CompareConfig, **keys))
    assert "repeated 4-grams" not in (path / "comparison.md").read_text() and not any("writing" in r for r in plain.rows)
