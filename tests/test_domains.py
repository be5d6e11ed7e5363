"""Several kinds of text to be judged by: equal say, intervals drawn within each, and what a run, a table, a page and a command say."""
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from replaceme.core import ReplaceMeError, ReplaceMeWarning
from replaceme.domains import compare_domains
from replaceme.pipeline import EvaluateConfig, evaluate, make_config, run
from replaceme.compare import CompareConfig, compare

SHORT = dict(model_path="./tiny", dataset="a.txt", dataset_size=8, max_length=32, layers_to_skip=2, method="lstsq", ridge=.1, prompt=None,
             eval_size=3, eval_length=32)


@pytest.fixture
def place(save_tiny, tmp_path, monkeypatch):
    "A tiny model, texts of three kinds, one of them a table of chats, one of them with a short twin of the same name in another folder"
    monkeypatch.chdir(save_tiny(tmp_path))
    Path("a.txt").write_text("The map stands in for the layers that went, one two three. " * 60)
    Path("b.txt").write_text("def f(x): return [x, x]\n\n" * 80)
    rows = [dict(messages=[dict(role="user", content=f"What is {i} and {i}?"), dict(role="assistant", content=f"It is {2*i}.")]) for i in range(99)]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("other").mkdir(), Path("other/b.txt").write_text("Nothing but these words, again and again. " * 3)
    return tmp_path


def losses_of(folder, name):
    "The losses of a model on one text alone"
    cfg = make_config(EvaluateConfig, model_path=str(folder), eval_dataset=name, eval_size=3, eval_length=32, cache=False)
    return evaluate(cfg)["perplexity"]["losses"]


def test_a_run_says_what_each_kind_lost(place):
    "Each kind as if it stood alone, the mean over kinds, an interval that a direct bootstrap within each kind gives, and a page that shows them"
    kinds = ["a.txt", "chats.jsonl", "b.txt"]
    with pytest.warns(ReplaceMeWarning, match="scored on a.txt, which it is calibrated on"):
        result, path = run(make_config(**SHORT, eval_dataset=kinds, save_path="out"))
    said = json.loads((path / "replaceme.json").read_text())
    assert [d["text"] for d in said["domains"]] == [*kinds, "mean of 3"]
    assert said["perplexity"]["text"] == ", ".join(kinds) and said["perplexity"]["tokens"] == 3 * 3 * 31
    for d, name in zip(said["domains"], kinds):
        before, after = losses_of("tiny", name), losses_of("out", name)
        assert d["before"] == pytest.approx(np.mean(before), rel=1e-5) and d["after"] == pytest.approx(np.mean(after), rel=1e-5)
        assert d["above"][0] == pytest.approx(np.mean(np.subtract(after, before)), abs=1e-5)
        assert d["above"][1] <= d["above"][0] <= d["above"][2]
    mean = said["domains"][-1]
    assert mean["above"][0] == pytest.approx(np.mean([d["above"][0] for d in said["domains"][:-1]]), abs=1e-9)
    assert said["perplexity"]["after"]["loss"] == pytest.approx(mean["after"], rel=1e-9)
    page = (path / "report.html").read_text()
    assert "By kind of text" in page and all(k in page for k in kinds) and "Calibrated on a.txt" in page
    card = (path / "README.md").read_text()
    assert "loss, chats.jsonl" in card and (path / "domains.png").is_file() and "domains.png" in card


def test_the_interval_is_that_of_a_direct_bootstrap():
    "Ten thousand draws by hand, within each kind; pooled draws would give a wider one"
    rng = random.Random(0)
    before = [rng.gauss(2, .1) for _ in range(40)]
    after = [x + (.1 if i < 20 else 1.) + rng.gauss(0, .05) for i, x in enumerate(before)]
    gone = np.subtract(after, before)
    draw = lambda x: np.mean([rng.choice(x) for _ in x])
    draws = np.sort([(draw(gone[:20]) + draw(gone[20:])) / 2 for _ in range(10000)])
    mean = compare_domains(before, after, ["a", "b"])[-1]
    assert mean.above[1:] == pytest.approx([draws[250], draws[9750]], abs=.003)
    pooled = compare_domains(before, after, ["all"])[0]
    assert pooled.above[2] - pooled.above[1] > 4 * (mean.above[2] - mean.above[1])


def test_one_text_is_what_it_was(place):
    "A list of one and the text itself give the same numbers, and no kinds are spoken of"
    one = run(make_config(**SHORT, eval_dataset="b.txt", save_path="one"))[0]
    same = run(make_config(**SHORT, eval_dataset=["b.txt"], save_path="same"))[0]
    assert one["perplexity"]["after"] == same["perplexity"]["after"] and "domains" not in one and "domains" not in same
    assert "By kind of text" not in Path("one/report.html").read_text()


def test_the_shortest_kind_says_how_many_pieces(place):
    "Equal say means as many pieces of each, which is told; names that are the same keep their folders"
    with pytest.warns(ReplaceMeWarning, match=r"b.txt \(other\) gives . pieces? where another gives 8"):
        result = run(make_config(**{**SHORT, "eval_size": 8}, eval_dataset=["b.txt", "other/b.txt"], save_path="out"))[0]
    n = len(result["perplexity"]["after"]["losses"])
    assert n % 2 == 0 and n < 16 and [d["text"] for d in result["domains"]] == ["b.txt", "b.txt (other)", "mean of 2"]


@pytest.mark.parametrize("wrong, said", [
    ([], "empty"), (["b.txt", "b.txt"], "eval_dataset b.txt stands twice"), (["b.txt", dict(path="a.txt", share=2)], "has a share"),
    (["b.txt", "none.txt"], "none.txt"), (["b.txt", ["a.txt"]], "no lists within the list"), (["b.txt", 3], "3")])
def test_lists_that_mean_nothing_are_refused(place, wrong, said):
    with pytest.raises(ReplaceMeError, match=said):
        run(make_config(**SHORT, eval_dataset=wrong, save_path="out"))
    assert not Path("out").exists()


@pytest.mark.parametrize("key", ["dataset", "eval_dataset"])
def test_a_file_that_is_not_there_is_told_before_the_model_is_loaded(place, monkeypatch, key):
    import replaceme.pipeline as pipeline
    from replaceme.pipeline import AnalyseConfig, analyse
    monkeypatch.setattr(pipeline, "load", lambda *a, **k: pytest.fail("it was loaded"))
    monkeypatch.setattr("replaceme.compare.load", lambda *a, **k: pytest.fail("it was loaded"))
    said = pytest.raises(ReplaceMeError, match=f"^{key} none.txt: no such file")
    keys = {k: v for k, v in SHORT.items() if k not in ("layers_to_skip", "method", "prompt", "ridge")}
    with said:
        run(make_config(**{**SHORT, key: "none.txt"}, save_path="out"))
    with said:
        compare(make_config(CompareConfig, **{**keys, key: "none.txt"}, methods=["lstsq"], layers=[2], save_path="rows"))
    if key == "dataset":
        with said:
            analyse(make_config(AnalyseConfig, model_path="./tiny", dataset="none.txt", distances_path="d.json"))
    else:
        with said:
            evaluate(make_config(EvaluateConfig, model_path="./tiny", eval_dataset="none.txt"))
        with said:
            evaluate(make_config(EvaluateConfig, compare=["./tiny", "./tiny"], eval_dataset="none.txt"))
    assert not Path("out").exists() and not Path("rows").exists()


def test_a_text_that_is_too_short_for_a_piece_is_refused(place):
    Path("tiny.txt").write_text("Too short.")
    with pytest.raises(ReplaceMeError, match="eval_dataset tiny.txt has .* lower eval_length"):
        run(make_config(**SHORT, eval_dataset=["b.txt", "tiny.txt"], save_path="out"))
    assert not Path("out").exists()


def test_images_have_one_kind(tmp_path):
    from replaceme.feed import load_pictures
    with pytest.raises(ReplaceMeError, match="one set of images"):
        load_pictures(make_config(model_path="x", dataset="images", eval_dataset=["a", "b"], layers_to_skip=1))


def test_a_file_and_a_flag_say_the_same(place, capsys):
    "YAML with a mapping for one of them, and a flag"
    from replaceme.cli import evaluate_model
    Path("c.yaml").write_text("model_path: ./tiny\neval_dataset:\n- b.txt\n- {path: chats.jsonl, column: messages}\neval_size: 2\neval_length: 32\n")
    scores = evaluate(make_config(EvaluateConfig, model_path="./tiny", eval_dataset=["b.txt", dict(path="chats.jsonl", column="messages")],
                                  eval_size=2, eval_length=32))
    assert [*scores["domains"]] == ["b.txt", "chats.jsonl"]
    assert np.mean([*scores["domains"].values()]) == pytest.approx(scores["perplexity"]["loss"])
    evaluate_model(["--config", "c.yaml"])
    out = capsys.readouterr().out
    assert "loss, chats.jsonl (nats/token)" in out and f"{scores['domains']['b.txt']:.4f}" in out
    evaluate_model(["--model_path", "./tiny", "--eval_dataset", "[b.txt, chats.jsonl]", "--eval_size", "2", "--eval_length", "32"])
    assert "loss, b.txt (nats/token)" in capsys.readouterr().out


def test_two_models_side_by_side_by_kind(place):
    run(make_config(**{k: v for k, v in SHORT.items() if not k.startswith("eval_")}, eval_dataset=None, save_path="out"))
    pair = evaluate(make_config(EvaluateConfig, compare=["./tiny", "out"], eval_dataset=["b.txt", "chats.jsonl"], eval_size=2, eval_length=32,
                                speed=False, prompt=None))
    labels = [r[0] for r in pair.rows()]
    assert [x for x in labels if x.startswith("perplexity")] == ["perplexity (b.txt)", "perplexity (chats.jsonl)", "perplexity (mean of 2)"]
    d = pair.divergence
    row = pair.rows()[labels.index("perplexity (chats.jsonl)")]
    assert float(row[1]) == pytest.approx(np.exp(np.mean(d.losses[2:])), abs=.006)
    assert row[3] == pytest.approx(100 * np.exp(np.mean(np.subtract(d.other_losses, d.losses)[2:])))


def test_methods_are_compared_by_the_mean_of_all_kinds(place):
    "Who is ahead, the table, the sheet and the picture; another order of the kinds gives the same mean"
    keys = {k: v for k, v in SHORT.items() if k not in ("layers_to_skip", "method", "prompt", "ridge")}
    kinds = ["b.txt", "chats.jsonl"]
    comparison, path = compare(make_config(CompareConfig, **keys, eval_dataset=kinds, methods=["lstsq", "remove"], layers=[2], save_path="rows"))
    for row in comparison.rows[1:]:
        above = np.subtract(row["losses"], comparison.rows[0]["losses"])
        assert row["above_dense"][0] == pytest.approx((above[:3].mean() + above[3:].mean()) / 2)
    table = (path / "comparison.md").read_text()
    assert "## By kind of text" in table and "mean of 2" in table and (path / "domains.png").is_file()
    assert "loss, chats.jsonl" in (path / "comparison.csv").read_text().splitlines()[0]
    again, _ = compare(make_config(CompareConfig, **keys, eval_dataset=kinds[::-1], methods=["lstsq"], layers=[2], save_path="turned"))
    assert again.rows[1]["loss"][0] == pytest.approx(comparison.rows[1]["loss"][0], rel=1e-6)
    assert again.rows[1]["kinds"] == kinds[::-1]


def test_a_column_is_for_the_tables(place):
    "A text beside them has none, and is no error; where there is no table at all it is one"
    keys = dict(model_path="./tiny", eval_size=2, eval_length=32, eval_column="messages", cache=False)
    both = evaluate(make_config(EvaluateConfig, **keys, eval_dataset=["b.txt", "chats.jsonl"]))["domains"]
    assert both["b.txt"] == pytest.approx(np.mean(losses_of("tiny", "b.txt")[:2]), rel=1e-5)
    with pytest.raises(ReplaceMeError, match="column"):
        evaluate(make_config(EvaluateConfig, **keys, eval_dataset=["b.txt", "a.txt"]))


def test_files_of_one_name_are_two_kinds(place):
    "In the comparison, its table and its picture too, and on the page; no folder of this machine is named whole"
    Path("x").mkdir(), Path("y").mkdir()
    Path("x/t.txt").write_text(Path("b.txt").read_text()), Path("y/t.txt").write_text(Path("a.txt").read_text())
    kinds = [str(place / "x/t.txt"), str(place / "y/t.txt")]
    keys = {k: v for k, v in SHORT.items() if k not in ("layers_to_skip", "method", "prompt", "ridge")}
    comparison, path = compare(make_config(CompareConfig, **keys, eval_dataset=kinds, methods=["remove"], layers=[2], save_path="rows"))
    (_, domains), = comparison.by_kind()
    assert [d.text for d in domains] == ["t.txt (x)", "t.txt (y)", "mean of 2"]
    above = np.subtract(comparison.rows[1]["losses"], comparison.rows[0]["losses"])
    assert [d.above[0] for d in domains[:2]] == pytest.approx([above[:3].mean(), above[3:].mean()])
    result, out = run(make_config(**SHORT, eval_dataset=kinds, save_path="out"))
    page = (out / "report.html").read_text()
    assert "t.txt (x)" in page and "t.txt (y)" in page and str(place) not in page.split("How to do it again")[0]


def test_ten_kinds_with_long_names_that_look_like_mathematics(place):
    "More letters than a path may have, dollars between which matplotlib reads TeX, and a method that a legend would leave out"
    kinds = [f"held_out_costs_$5_to_$6^_of_kind_{i}.txt" for i in range(10)]
    for k in kinds:
        Path(k).write_text(Path("b.txt").read_text())
    asked = {**SHORT, "prompt": "Is it input/output or read/write? " * 9}
    result, out = run(make_config(**asked, eval_dataset=kinds, save_path="out"))
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert all(k in page for k in kinds) and "perplexity" in card and (out / "domains.png").exists()
    assert json.loads((out / "replaceme.json").read_text())["config"]["prompt"] == asked["prompt"] and asked["prompt"].strip() in page
    assert result.perplexity.text == ", ".join(kinds)
    keys = {k: v for k, v in SHORT.items() if k not in ("layers_to_skip", "method", "prompt", "ridge")}
    names = ["_mine", "of $1^"]
    comparison, path = compare(make_config(CompareConfig, **keys, eval_dataset=kinds, methods=[dict(name=n, method="remove") for n in names], layers=[2], save_path="rows"))
    assert {"pareto.png", "domains.png"} <= {f.name for f in path.iterdir()}
    shown = [t.get_text() for t in comparison.plot().legends[0].get_texts()]
    assert sum("mine" in t for t in shown) == 1 and any("of" in t and "1^" in t for t in shown)


def test_memory_of_scores_does_not_mix_kinds(place):
    "The same tokens under other names are found again under the present names"
    keys = dict(model_path="./tiny", eval_size=2, eval_length=32)
    first = evaluate(make_config(EvaluateConfig, **keys, eval_dataset=["b.txt", "a.txt"]))
    Path("c.txt").write_text(Path("a.txt").read_text())
    second = evaluate(make_config(EvaluateConfig, **keys, eval_dataset=["b.txt", "c.txt"]))
    assert [*second["domains"]] == ["b.txt", "c.txt"] and [*first["domains"].values()] == [*second["domains"].values()]
    assert torch.isfinite(torch.tensor([*second["domains"].values()])).all()


# --- what decides is the mean over the parts of the calibration ---

def two_parts(place, **keys):
    "A calibration of many long texts and few short ones"
    Path("long.jsonl").write_text("\n".join(json.dumps(dict(text=f"The map stands in for the layers that went, {i} of them. " * 9)) for i in range(24)))
    Path("short.jsonl").write_text("\n".join(json.dumps(dict(text=f"x = [{i}]")) for i in range(24)))
    return make_config(**{**SHORT, "max_length": 64, "dataset_size": 24, "dataset": ["long.jsonl", "short.jsonl"], "ridge": None, "method": "auto",
                          "eval_dataset": None, "eval_size": 24, "eval_length": 512, **keys})


def test_each_part_is_held_out_and_has_equal_say(place):
    "The held-out loss is the mean of the two parts' losses, by the loss of each model on each text in a loop of its own"
    from replaceme.arch import input_device
    from replaceme.evaluate import piece_losses
    from replaceme.models import load_model
    from replaceme.pipeline import feed_of
    from replaceme.search import hold_out, outcome
    model, tokenizer = load_model("./tiny")
    feed = feed_of(model, tokenizer, two_parts(place))
    bs = feed.calibration()
    fit, held = hold_out(bs, origins=feed.origins)
    assert [sum(len(b["input_ids"]) for b in p) for p in held.parts] == [2, 2]  # the default eighth of twelve each
    assert sum(len(b["input_ids"]) for b in fit) == 20
    lengths = [[int(m.sum()) for b in p for m in b["attention_mask"]] for p in held.parts]
    assert min(lengths[0]) > 3 * max(lengths[1])
    def loss(part):
        rows = [i[m.bool()].to(input_device(model)) for b in part for i, m in zip(b["input_ids"], b["attention_mask"])]
        with torch.no_grad():
            return sum(piece_losses(model, r[None])[0] * (len(r) - 1) for r in rows) / sum(len(r) - 1 for r in rows)
    assert outcome(model, model, held) == pytest.approx(np.mean([loss(p) for p in held.parts]), rel=1e-6)
    assert abs(loss(held.parts[0]) - loss(held.parts[1])) > 1e-3  # the parts differ, or the mean would say nothing


def test_the_ridge_is_the_best_on_the_mean_of_the_parts():
    "Held-out errors of every ridge by hand in float64, one part having fifty times the tokens of the other"
    from replaceme.solve import auto_ridge, lstsq_map
    from replaceme.stats import Gram, equal_say
    g0 = torch.Generator().manual_seed(0)
    d, true = 6, torch.randn(6, 6, generator=g0).double()
    def sums(n, noise, T):
        X = torch.randn(n, d, generator=g0).double()
        R = X @ (T - torch.eye(d)) + noise * torch.randn(n, d, generator=g0).double()
        g = Gram(d)
        g.add(X, R)
        return g, X, X + R
    fit = sums(12, 1., true)[0]
    many, few = sums(500, .1, true), sums(10, .1, torch.eye(d).double())  # the few would rather have no map at all
    values = [1e-3, 1e-2, 1e-1, 1., 10.]
    chosen, curve = auto_ridge(fit, equal_say([many[0], few[0]]), values=values)
    def error(V, part): return ((part[1] @ V - part[2]).pow(2).sum() / part[2].pow(2).sum()).item()
    by_hand = [np.mean([error(lstsq_map(fit, ridge=v).T, p) for p in (many, few)]) for v in values]
    assert curve["errors"] == pytest.approx(by_hand, rel=1e-4)
    assert chosen == pytest.approx(values[int(np.argmin(by_hand))])
    assert auto_ridge(fit, many[0] + few[0], values=values)[0] != chosen  # what the sum of all tokens would have taken


def test_batches_and_order_change_no_choice(place):
    "The same block and the same ridge, however the texts are batched and whichever data set is named first"
    results = [run(two_parts(place, save_path=f"o{i}", **kw))[0] for i, kw in enumerate(
        (dict(batch_size=8), dict(batch_size=3), dict(dataset=["short.jsonl", "long.jsonl"])))]
    assert len({json.dumps([r["block"], r["fit"]["ridge"]]) for r in results}) == 1
    losses = [[row["loss"] for row in sorted(r["choice"], key=lambda row: row["blocks"])] for r in results]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-3)
