"""Numbers and sentences of evaluations and comparisons, against direct computations, and against what changed in between."""
import json
import os
import random
import statistics
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from replaceme import compare, evaluate, run
from replaceme.blocks import joined
from replaceme.compare import ahead, ahead_text
from replaceme.core import ReplaceMeError, ReplaceMeWarning
from replaceme.doors import read_result, result_table
from replaceme.evaluate import read_tasks
from replaceme.keys import key
from replaceme.merge import cut
from replaceme.methods import METHODS, Method, Removed, add_method
from replaceme.stats import n_tokens
from replaceme.tasks import question_pairs

TEXT = dict(eval_dataset="judge.txt", eval_size=4, eval_length=32)
FIT = dict(dataset="calib.txt", dataset_size=4, max_length=48)
BENCH = dict(model_path="tiny", methods=["remove"], layers=[2], **FIT, **TEXT)
QUIET = dict(prompt=None, speed=False)
FRACTION = "def fraction(doc, res):\n    import numpy as np\n    p = np.exp([r[0] for r in res])\n    return dict(acc=float(p[:2].sum() / p.sum()))\n"


@pytest.fixture(autouse=True)
def place(tmp_path, save_tiny, monkeypatch):
    monkeypatch.chdir(save_tiny(tmp_path))
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    warnings.simplefilter("ignore", ReplaceMeWarning)
    draw, words = random.Random(0), "the cat sat on a mat and dogs ran over green hills while birds sang of rivers".split()
    for name in ("calib", "judge"):
        Path(f"{name}.txt").write_text("\n\n".join(" ".join(draw.choices(words, k=60)) + "." for _ in range(40)))


def task(folder, name, n=8, **kw):
    f = Path(folder).resolve()
    f.mkdir(exist_ok=True)
    rows = [dict(q=f"What is {i} and {i}?", c=[str(2 * i), str(2 * i + 1), str(2 * i + 2)]) for i in range(1, n + 1)]
    (f / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    data = str(f / f"{name}.jsonl")
    about = dict(task=name, dataset_path="json", dataset_kwargs=dict(data_files=dict(train=data, validation=data)), output_type="multiple_choice",
                 validation_split="validation", fewshot_split="train", doc_to_text="{{q}}", doc_to_target=0, doc_to_choice="{{c}}", metric_list=[dict(metric="acc")])
    (f / f"{name}.yaml").write_text(yaml.safe_dump({**about, **kw}).replace("process_results: FRACTION", "process_results: !function fraction.fraction"))


def test_tasks_that_are_not_right_or_wrong_are_compared_all_the_same():
    task("normed", "normed", metric_list=[dict(metric="acc_norm")])
    task("mc2", "mc2", process_results="FRACTION", metric_list=[dict(metric="acc", aggregation="mean", higher_is_better=True)])
    Path("mc2/fraction.py").write_text(FRACTION)
    c, _ = compare(**BENCH, tasks=["normed", "mc2"], save_path="out")
    assert c.failures() == []
    dense, small = c.rows
    assert set(small.stability) == {"normed"} and set(small.right) == {"normed", "mc2"}
    alone = evaluate(model_path="tiny", eval_dataset=None, tasks=["mc2"])["tasks"]["mc2"]["acc"]
    assert np.mean(dense.right["mc2"]["acc"]) == pytest.approx(alone) and set(small.right["normed"]["acc_norm"]) <= {0, 1}
    s = evaluate(compare=["tiny", "tiny"], eval_dataset=None, tasks=["mc2", "normed"], **QUIET)
    assert set(s.stability) == {"normed"} and s.stability["normed"]["stability"] == pytest.approx(1)
    assert (question_pairs(*(r["mc2"] for r in s.records), "acc")[:, 2] == 0).all()  # what a guess is worth is not known
    assert (question_pairs(*(r["normed"] for r in s.records), "acc_norm")[:, 2] == 1 / 3).all()


def test_one_question_has_no_interval_and_that_is_said_at_once():
    task("sums", "sums")
    with pytest.raises(ReplaceMeError, match="limit is 1: one question of a task has no interval"):
        compare(**BENCH, tasks="sums", limit=1, save_path="out")


def test_a_dense_row_depends_on_how_the_questions_are_put():
    task("sums", "sums")
    plain, _ = compare(**BENCH, tasks="sums", save_path="out")
    chat, _ = compare(**BENCH, tasks="sums", apply_chat_template=True, save_path="out")
    fresh, _ = compare(**BENCH, tasks="sums", apply_chat_template=True, save_path="fresh")
    assert chat.failures() == [] and [r.right for r in chat.rows] == [r.right for r in fresh.rows]
    assert plain.rows[0].right != fresh.rows[0].right


def mine(first, helper=lambda i: i, more=0):
    @dataclass
    class Own:
        absent = "method {method} has nothing of it"
        twice: int = key(1, "a key of its own", "run map compare")

    class Mine(Method):
        name = title = "mine"
        keys = (Own,)

        def __init__(self, more=0):
            self.more = more

        def remove(self, model, batches, job):
            gone = [helper(first + i) + self.more for i in range(job.n)]
            return cut(model, joined((i, i + 1) for i in gone)), Removed(gone, n_tokens(batches))
    add_method(Mine(more))


def test_a_row_depends_on_the_program_of_a_method():
    try:
        blocks = []
        for first in (1, 3, 1):
            mine(first)
            blocks.append(compare(**{**BENCH, "methods": ["mine"]}, save_path="out")[0].rows[1].blocks)
        assert blocks == [[[1, 3]], [[3, 5]], [[1, 3]]]
        with pytest.MonkeyPatch.context() as m:
            m.setattr("replaceme.compare.prune", None)  # what is there is found again
            mine(1)
            assert compare(**{**BENCH, "methods": ["mine"]}, save_path="out")[0].rows[1].blocks == [[1, 3]]
        for other, want in ((dict(helper=lambda i: i + 2), [[3, 5]]), (dict(more=1), [[2, 4]])):
            mine(1, **other)
            assert compare(**{**BENCH, "methods": ["mine"]}, save_path="out")[0].rows[1].blocks == want
    finally:
        METHODS.pop("mine", None)


def test_kept_scores_depend_on_the_file_of_a_group():
    task("grouped", "few", 2, doc_to_target=1)
    task("grouped", "many", 10)
    found = []
    for weigh, cache in ((False, True), (True, True), (True, False)):
        Path("grouped/g.yaml").write_text(f"group: both\ntask: [few, many]\naggregate_metric_list: [{{metric: acc, aggregation: mean, weight_by_size: {weigh}}}]\n")
        found.append(evaluate(model_path="tiny", eval_dataset=None, tasks=["both", "grouped"], cache=cache)["tasks"]["both"]["acc"])
    assert found[0] != found[1] == found[2]


def test_the_standard_error_of_kinds_is_not_their_distance():
    Path("prose.txt").write_text("the cat sat on a mat. " * 400), Path("signs.txt").write_text("xq zv kj 93 #@ " * 400)
    two = dict(eval_dataset=["prose.txt", "signs.txt"], eval_size=8, eval_length=64)
    for _ in range(2):  # the second is found
        p = evaluate(model_path="tiny", **two)["perplexity"]
        a, b = np.array(p["losses"]).reshape(2, 8)
        want = np.sqrt(a.var(ddof=1) / 8 + b.var(ddof=1) / 8) / 2
        assert p["stderr"] == pytest.approx(want) and want < .5 * statistics.stdev(p["losses"]) / 4
    result, _ = run(model_path="tiny", layers_to_skip=2, method="remove", save_path="out", **QUIET, **FIT, **two)
    assert result.perplexity.before.stderr == pytest.approx(want)
    s = evaluate(compare=["tiny", "out"], **two, **QUIET)
    kl = np.array(s.divergence.kl).reshape(2, 8)
    assert s.divergence.stderr == pytest.approx(np.sqrt(kl.var(1, ddof=1).sum() / 8) / 2)


def row(m, losses, seed, **k):
    return dict(method=m, n=2, seed=seed, blocks=[[1, 3]], losses=losses, right={}, stability={}, parameters=9, trained_tokens=0, seconds=1., peak_memory=1, **k)


def test_who_is_ahead_is_told_by_the_seeds_that_all_have():
    rows = [row("a", [5., 5.1, 5.2, 5.05], 0), row("a", [3., 3.1, 3.2, 3.05], 1), row("b", [4.5, 4.6, 4.7, 4.65], 0), dict(method="b", n=2, seed=1, error="out of memory")]
    (best,) = ahead(rows)
    assert best["best"] == "b" and best["against"][0]["nats"] == pytest.approx(.475) and "holds zero" not in ahead_text(rows)


def test_records_that_are_sound_are_read():
    keys = dict(layers_to_skip=2, method="remove", **QUIET, **FIT)
    run(model_path="tiny", save_path="one", **keys, **{**TEXT, "eval_size": 1})
    assert read_result("one").perplexity.after.stderr is None and "dense" in result_table("one")
    run(model_path="tiny", save_path="a", **keys, **TEXT), run(model_path=os.path.abspath("tiny"), save_path="b", **keys, **TEXT)
    assert result_table("a", "b").count("remove (") == 2
    run(model_path="tiny", save_path="bare", **keys, eval_dataset=None)
    assert read_result("bare").n_layers.after == 4
    with pytest.raises(ReplaceMeError, match="bare was not scored on a text: run with eval_dataset"):
        result_table("a", "bare")


def test_intervals_say_what_they_are_of():
    task("sums", "sums", 40)
    s = evaluate(compare=["tiny", "tiny"], **TEXT, speed=False, prompt=None, writing="text", writing_prompts=3, writing_tokens=12, tasks="sums")
    lines = str(s).splitlines()
    assert "(90% where equality is tested)" in lines[-1]
    assert all("[difference " in line for line in lines if line.startswith(("repeated 4-grams", "loss on the dense")))


def test_a_task_is_asked_once():
    task("asked", "sums", 12)
    for tasks in ({"sums": 2, "./asked": 0}, {"./asked": 0, "sums": 2}, ["./asked", {"sums": 2}]):
        assert evaluate(model_path="tiny", eval_dataset=None, tasks=tasks)["tasks"]["sums"]["shots"] == 2
    for tasks in ([{"piqa": 0}, {"piqa": 5}], [{"asked": 0}, {"./asked": 5}]):
        with pytest.raises(ReplaceMeError, match="is named with 0 shots and with 5 shots: it is asked once"):
            evaluate(model_path="tiny", eval_dataset=None, tasks=tasks)
    assert read_tasks(["piqa", "piqa"]) == {"piqa": None}


def test_a_program_is_the_same_in_every_process():
    "Sets have another order in each"
    code = "def f(x): return x in {'a', 'b', 'c', 'd', 'e'}, g\ng = {'one', 'two', 'three', 'four'}\nfrom replaceme.kept import program_of\nprint(program_of(f))"
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": str(i)}).stdout for i in range(3)}
    assert len(said) == 1 and len(said.pop()) > 50
