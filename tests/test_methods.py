"""Every method is a `method:` of the one config and goes through the one run: chosen, saved, loaded again, reported, or refused by name."""
import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from replaceme import cli
from replaceme.activations import capture
from replaceme.arch import layers_of
from replaceme.baselines import BASELINES
from replaceme.blocks import Block
from replaceme.core import ReplaceMeError
from replaceme.data import batches
from replaceme.evaluate import batch_loss
from replaceme.models import load_model, tiny_model, tiny_vision
from replaceme.pipeline import Config, calibration_texts, make_config, prune, read_config, run, training_batches
from replaceme.registry import METHODS, peers
from replaceme.report import report_html
from replaceme.streamline import place_network

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
OWN = {"laco": dict(threshold=-1.0)}  # what a method needs on random weights


@pytest.fixture(scope="module")
def place(tmp_path_factory, save_tiny):
    "A tiny checkpoint and texts of unequal length"
    folder = save_tiny(tmp_path_factory.mktemp("methods"))
    lines = [("line %d of many, about the layers that went and what stands in for them" % i)[: 12 + 5 * (i % 9)] for i in range(16)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in lines))
    return folder


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch):
    "Code of checkpoints goes to a folder of the test's own."
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))


def keys(place, method, **more):
    texts = {} if more.get("simple") else dict(dataset=str(place / "texts.jsonl"), dataset_size=16, max_length=48)  # which reads none
    return {**texts, **dict(layers_to_skip=2, method=method), **OWN.get(method, {}), **more}


def both(place, tmp_path, method, **more):
    "The pruned model in memory and the one that came back from a folder, both with their results"
    k = keys(place, method, **more)
    model, tok = load_model(place / "tiny")
    small, r = prune(model, tok, **k)
    saved, path = run(make_config(model_path=str(place / "tiny"), eval_size=2, eval_length=32, save_path=str(tmp_path / "out"), **k))
    return model, small, r, saved, path


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def states(model, tok, cfg):
    "What enters each layer and what leaves the last, of each text by itself, `(S,d)` in float64"
    for text in calibration_texts(model, tok, cfg):
        b = batches([text], tok, 1, cfg.max_length)[0]
        S = capture(model, b).S
        yield [S[i].double() for i in range(len(S))]


def check_saved(saved, r, path, small, own_code=False):
    again = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=own_code)
    assert torch.equal(logits(again), logits(small))
    for k in ("blocks", "n_layers", "fit", "peer", "method"):
        assert saved.get(k) == r.get(k)
    kept = json.loads((path / "replaceme.json").read_text())
    assert kept["blocks"] == r["blocks"] and kept["config"]["method"] == r["method"] and kept["perplexity"]["after"]["value"] > 0
    assert again.config.num_hidden_layers == r["n_layers"]["after"]
    return again


@pytest.mark.parametrize("method, more", [("uidl", {}), ("uidl", dict(simple=True)), ("shortgpt", {}), ("laco", dict(C=2, I=1)), ("laco", {}), ("linearpatch", {})], ids=str)
def test_a_peer_goes_through_the_whole_run(place, tmp_path, method, more):
    model, small, r, saved, path = both(place, tmp_path, method, **more)
    again = check_saved(saved, r, path, small, method == "linearpatch")
    gone = [i for s, e in r["blocks"] for i in range(s, e)]
    stay = [i for i in range(6) if i not in gone]
    assert len(gone) == 2 and r["n_layers"] == dict(before=6, after=4)
    took = {t["layer"] for t in r["peer"].get("tries", []) if t["accepted"]}
    for i, layer in zip(stay, layers_of(again)):
        same = torch.equal(layer.self_attn.q_proj.weight, layers_of(model)[i].self_attn.q_proj.weight)
        assert same == (i not in took)
    assert bool(took) == (method == "laco")
    page, card = (path / "report.html").read_text(encoding="utf-8"), (path / "README.md").read_text(encoding="utf-8")
    assert f"arXiv {METHODS[method].paper}" in page and f"arxiv.org/abs/{METHODS[method].paper}" in card
    assert "2505.02819" not in card and "is folded into" not in card + page and "now holds the map" not in page
    assert ("trust_remote_code=True" in card) == (method == "linearpatch")
    assert "method: auto" in page


@pytest.mark.parametrize("method", ["uidl", "shortgpt", "linearpatch"])
def test_the_layers_are_those_of_the_published_rule(place, method):
    "Computed once more, text by text in float64"
    model, tok = load_model(place / "tiny")
    _, r = prune(model, tok, **keys(place, method))
    S = list(states(model, tok, make_config(**keys(place, method))))
    cos = lambda a, b: torch.cosine_similarity(a, b, dim=-1).clamp(-1, 1)
    tokens = sum(len(s[0]) for s in S)
    if method == "uidl":
        D = [sum(torch.arccos(cos(s[i][-1], s[i + 2][-1])) / torch.pi for s in S).item() / len(S) for i in range(1, 5)]
    else:
        n = 1 if method == "shortgpt" else 2
        D = [1 - sum(cos(s[i], s[i + n]).sum() for s in S).item() / tokens for i in range(1, 7 - n)]
    assert len({len(s[0]) for s in S}) > 5
    if method == "shortgpt":
        best = sorted(sorted(range(1, 6), key=lambda i: D[i - 1])[:2])
        assert r["peer"]["influence"][1:] == pytest.approx(D, rel=1e-5) and len(r["peer"]["influence"]) == 6
        assert r["distance"]["value"] == pytest.approx(sum(D[i - 1] for i in best), rel=1e-5)
    else:
        s = 1 + D.index(min(D))
        best = [s, s + 1]
        assert r["distance"]["profile"]["2"] == pytest.approx(D, rel=1e-5) and r["distance"]["value"] == pytest.approx(min(D), rel=1e-5)
    assert [i for s, e in r["blocks"] for i in range(s, e)] == best
    assert r["calibration"]["tokens"] == tokens and r["calibration"]["texts"] == 16


def test_the_simple_variant_needs_no_text(place, monkeypatch):
    monkeypatch.setattr("replaceme.feed.calibration_batches", None)
    model, tok = load_model(place / "tiny")
    small, r = prune(model, tok, **keys(place, "uidl", simple=True))
    assert r["blocks"] == [[3, 5]] and r["calibration"]["tokens"] == r["calibration"]["texts"] == 0
    assert "Measured on" not in report_html(r) and "wrote itself" not in report_html(r)


def test_laco_is_judged_on_its_ten_texts(place):
    model, tok = load_model(place / "tiny")
    small, r = prune(model, tok, **keys(place, "laco"))
    S = list(states(model, tok, make_config(**keys(place, "laco"))))[:10]
    assert r["calibration"]["texts"] == 10 and r["calibration"]["tokens"] == sum(len(s[0]) for s in S)
    assert r["peer"]["threshold"] == -1 and [t["accepted"] for t in r["peer"]["tries"]] == [True]
    with pytest.raises(ReplaceMeError, match="LaCo's threshold 0.999999"):
        prune(model, tok, **keys(place, "laco", threshold=0.999999))


def test_a_peer_leaves_the_dense_model_alone(place):
    model, tok = load_model(place / "tiny")
    before = logits(model)
    for m in BASELINES:
        prune(model, tok, **keys(place, m))
    assert torch.equal(logits(model), before)


BAD = dict(map="wide", affine=True, weights="inv_norm", structure="diag", diag=True, two_vectors=True, thri=True, alpha=.1, ridge=.1, refit=1, borrow=True,
           save_transform_only=True, mask=.1, blocks=[[1, 3]], num_A=2, max_blocks=2, min_distance_layer=2, metric="cosine", distance_tokens="all",
           sinks="allow", distances_path="p.json", select="loss", top_k=3, use_4bit=True, use_8bit=True, merge=False, solver="cg", loss="mse",
           accurate=True, l1=.1, epochs=3, lr=.1, activations_save_path="acts")


@pytest.mark.parametrize("method", peers())
@pytest.mark.parametrize("key", BAD)
def test_keys_that_a_peer_would_ignore_are_refused_by_name(method, key):
    with pytest.raises(ReplaceMeError, match=key if key != "top_k" else "top_k|select"):
        make_config(method=method, **{key: BAD[key]})


@pytest.mark.parametrize("key, value, method", [("simple", True, "uidl"), ("C", 3, "laco"), ("I", 1, "laco"), ("threshold", .5, "laco"),
                                               ("network", "'ffn'", "streamline"), ("train_loss", "'lm'", "streamline")])
def test_keys_of_one_method_are_refused_elsewhere(key, value, method):
    given = value.strip("'") if isinstance(value, str) else value
    make_config(method=method, **{key: given})
    for other in {"auto", "lstsq", "cosine", "remove", *peers()} - {method}:
        with pytest.raises(ReplaceMeError, match=f"{key} is {value}, but it belongs to method {method}, and the method is {other}"):
            make_config(method=other, **{key: given})


@pytest.mark.parametrize("more, word", [(dict(C=1), "C is 1"), (dict(I=0), "I is 0"), (dict(threshold=1.), "threshold is 1.0"), (dict(threshold=-2.), "threshold is -2.0")])
def test_values_of_laco(more, word):
    with pytest.raises(ReplaceMeError, match=word):
        make_config(method="laco", **more)


def test_a_class_with_more_keys(tmp_path):
    from dataclasses import dataclass, field

    @dataclass
    class More(Config):
        methods: list | None = field(default=None, metadata=dict(help="methods to compare"))

    path = tmp_path / "c.yaml"
    path.write_text("methods: [auto, uidl]\nlayers_to_skip: 2")
    cfg = read_config(path, cls=More)
    assert type(cfg) is More and cfg.methods == ["auto", "uidl"] and make_config(More, methods=["a"]).methods == ["a"]
    with pytest.raises(ReplaceMeError, match="unknown key 'methods'"):
        read_config(path)
    with pytest.raises(ReplaceMeError, match="unknown key 'cls'"):
        make_config(cls=3)


def test_run_uidl(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    (place / "c.yaml").write_text(yaml.safe_dump({k: v for k, v in keys(place, "uidl").items() if k != "method"} | dict(model_path="./tiny", eval_dataset=None, prompt=None)))
    cli.run_uidl(["--config", "c.yaml", "--save_path", "by-command"])
    assert json.loads((place / "by-command/replaceme.json").read_text())["method"] == "uidl" and "by-command" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.run_uidl(["--config", "c.yaml", "--method", "lstsq"])
    assert "run_uidl is for method uidl; use run_replaceme" in capsys.readouterr().err


TRAIN = dict(train_tokens=1200, trainer=dict(learning_rate="1e-2", per_device_train_batch_size=4))


@pytest.mark.parametrize("network", ["layer", "ffn", "swiglu", "none"])
def test_streamline_goes_through_the_whole_run(place, tmp_path, network):
    "The network comes back from disk as it was trained; every other weight is the dense model's"
    more = dict(network=network, **(TRAIN if network != "none" else {}))
    model, small, r, saved, path = both(place, tmp_path, "streamline", **more)
    own_code = network in ("ffn", "swiglu")
    again = check_saved(saved, r, path, small, own_code)
    gone = [i for s, e in r["blocks"] for i in range(s, e)]
    assert len(gone) == (3 if own_code else 2)  # a small network stands for one layer more, which goes too
    stay = [i for i in range(6) if i not in gone]
    changed = [i for i, layer in zip(stay, layers_of(again)) if not torch.equal(layer.mlp.down_proj.weight, layers_of(model)[i].mlp.down_proj.weight)]
    assert changed == ([gone[0] - 1] if network == "layer" else [])
    assert (len(r["distance"]["profile"]["2" if network == "none" else "3"])) == (4 if network == "none" else 3)
    page, card = (path / "report.html").read_text(encoding="utf-8"), (path / "README.md").read_text(encoding="utf-8")
    assert "arXiv 2403.19135" in page and "arxiv.org/abs/2403.19135" in card and "is folded into" not in page + card
    assert ("trust_remote_code=True" in card) == own_code
    if network == "none":
        assert "training" not in r and "Nothing was trained" in card
        return
    assert r["training"]["after"] < r["training"]["before"] and 600 < r["training"]["tokens"] < 2400 and r["training"]["network"] == network
    assert "What was trained" in page and "Nothing was trained" not in card and "training-free" not in card
    r.plot(), saved.plot()


def test_streamline_by_the_loss_of_the_next_token(place):
    model, tok = load_model(place / "tiny")
    k = keys(place, "streamline", train_loss="lm", **TRAIN)
    small, r = prune(model, tok, **k)
    held = training_batches(model, tok, make_config(**k))[1]
    start = place_network(model, Block(*r["distance"]["block"]))[0]
    assert r["training"]["loss"] == "lm" and r["training"]["before"] == pytest.approx(batch_loss(start, held), rel=1e-4)
    assert r["training"]["after"] == pytest.approx(batch_loss(small, held), rel=1e-4) and r["training"]["after"] < r["training"]["before"]


@pytest.mark.parametrize("method, more, rungs", [("auto", dict(borrow=False, trainer=dict(learning_rate=1e-3, cut=dict(learning_rate=3e-4))), ["fold", "cut"]), ("lstsq", dict(merge=False), "fold"), ("uidl", {}, "lora"), ("shortgpt", {}, "layer"),
                                                 ("streamline", dict(network="ffn"), "layer")], ids=str)
def test_recovery_goes_through_the_whole_run(place, tmp_path, method, more, rungs):
    "What was trained is what is saved, scored and reported; the budget is one for all"
    model, small, r, saved, path = both(place, tmp_path, method, recover=rungs, **{**TRAIN, **more})
    check_saved(saved, r, path, small, own_code=not more.get("merge", True) or "network" in more)
    untrained = {**TRAIN, **more} if method == "streamline" else {k: v for k, v in more.items() if k != "trainer"}
    plain, _ = prune(model, load_model(place / "tiny")[1], **keys(place, method, **untrained))
    assert not torch.equal(logits(plain), logits(small))
    names = [rungs] if isinstance(rungs, str) else rungs
    assert [g["name"] for g in saved["recovery"]] == names
    parts = len(names) + (method == "streamline")
    for g in saved["recovery"]:
        assert 0.5 * 1200 / parts < g["trained"] < 2 * 1200 / parts and g["loss_after"] <= g["loss_before"] and g["seconds"] > 0
    assert saved["training"]["tokens"] == sum(g["trained"] for g in saved["recovery"]) + (r["training"]["tokens"] - sum(g["trained"] for g in r["recovery"]))
    page, card = (path / "report.html").read_text(encoding="utf-8"), (path / "README.md").read_text(encoding="utf-8")
    assert "What was trained" in page and "without any training" not in card and "training-free" not in card and "Nothing was trained" not in card


def test_the_dense_model_teaches_and_does_not_learn(place):
    model, tok = load_model(place / "tiny")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prune(model, tok, **keys(place, "auto", recover=["fold", "layer", "cut", "lora"], **TRAIN))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and all(p.requires_grad for p in model.parameters())


def test_texts_to_train_on(place):
    "As many as the tokens need, or as many as are asked for, the first of the same data set; those that judge lie behind them and behind the fit's"
    model, tok = load_model(place / "tiny")
    ids = lambda bs: [ids[mask.bool()].tolist() for b in bs for ids, mask in zip(b["input_ids"], b["attention_mask"])]
    k = dict(dataset=str(place / "texts.jsonl"), dataset_size=4, max_length=48, recover="cut")
    both = lambda **more: [ids(bs) for bs in training_batches(model, tok, make_config(**{**k, **more}))]
    whole, held = both()
    assert len(whole) == 15 and len(held) == 1  # all there are, though 131072 tokens are more
    every = whole + held
    few, judge = both(train_tokens=48 * 5)
    assert few == every[:len(few)] and .95 * 240 <= sum(map(len, few)) < 2 * 240  # the texts are shorter than 48 tokens, so it takes more than five
    assert judge == every[len(few):len(few) + 1]
    nine, judge = both(train_tokens=48 * 5, train_size=9)
    assert nine == every[:9] and judge == every[9:10]
    _, judge = both(train_tokens=48 * 5, train_size=3, dataset_size=10)
    assert judge == every[10:11]  # the fit has seen the ten before it


def test_a_training_goes_on_from_its_folder(place, tmp_path):
    "The second call finds everything trained; a folder of another training is refused"
    model, tok = load_model(place / "tiny")
    k = keys(place, "lstsq", recover="cut", train_path=str(tmp_path / "ladder"), **TRAIN)
    a, r = prune(model, tok, **k)
    assert list((tmp_path / "ladder/recover").glob("*-cut/checkpoint-*"))
    b, q = prune(model, tok, **k)
    assert torch.equal(logits(a), logits(b)) and r["recovery"][0]["loss_after"] == q["recovery"][0]["loss_after"]
    with pytest.raises(ReplaceMeError, match="another"):
        prune(model, tok, **{**k, "train_tokens": 2400})


@pytest.mark.parametrize("more, words", [
    (dict(recover="loro"), ["recover", "loro", "Did you mean 'lora'"]),
    (dict(recover=["cut", "fold"]), ["cut, fold", "no ladder"]),
    (dict(recover=["cut", "cut"]), ["no ladder"]),
    (dict(recover=[]), []),
    (dict(train_tokens=100), ["train_tokens is 100", "nothing is trained"]),
    (dict(train_size=4), ["train_size is 4", "nothing is trained"]),
    (dict(train_path="x"), ["train_path is 'x'", "nothing is trained"]),
    (dict(trainer=dict(learning_rate=1.)), ["trainer is", "nothing is trained"]),
    (dict(method="streamline", network="none", trainer={}), ["trainer is", "nothing is trained"]),
    (dict(method="streamline", network="none", train_loss="lm"), ["train_loss is 'lm'", "nothing is trained"]),
    (dict(method="streamline", network="fnn"), ["network is 'fnn'", "Did you mean 'ffn'"]),
    (dict(method="streamline", train_loss="kd"), ["train_loss is 'kd'", "mse, lm"]),
    (dict(recover="cut", train_tokens=0), ["train_tokens is 0", "at least 1"]),
    (dict(recover="cut", trainer=dict(learning_rat=1.)), ["trainer", "learning_rat", "Did you mean 'learning_rate'"]),
    (dict(recover="cut", trainer=dict(seed=1)), ["trainer", "seed"]),
    (dict(recover="cut", trainer=dict(lora=dict(learning_rate=1.))), ["trainer", "lora", "no such rung"]),
    (dict(recover="lora", trainer=dict(lora=dict(learning_rat=1.))), ["trainer", "learning_rat"]),
    (dict(recover="cut", use_4bit=True), ["recover is 'cut'", "only measures"]),
    (dict(recover="cut", method="lstsq", save_transform_only=True), ["recover is 'cut'", "save_transform_only"]),
])
def test_keys_of_the_trainings(more, words):
    if not words:
        assert not make_config(**more).trains
        return
    with pytest.raises(ReplaceMeError) as e:
        make_config(**more)
    assert all(w in str(e.value) for w in words), e.value


def test_what_cannot_be_trained_is_said_before_any_text_is_made(place, monkeypatch):
    monkeypatch.setattr("replaceme.feed.calibration_batches", None)
    model, tok = load_model(place / "tiny")
    with pytest.raises(ReplaceMeError, match="layers_to_skip is 5: with a network one more layer goes"):
        prune(model, tok, **keys(place, "streamline", layers_to_skip=5))
    with pytest.raises(ReplaceMeError, match="train on texts, and this is an image encoder"):
        prune(tiny_vision("vit", layers=6), None, **keys(place, "auto", recover="cut"))
    with pytest.raises(ReplaceMeError, match="fold trains the weight that would take a map"):
        prune(tiny_model("bert", layers=6), tok, **keys(place, "remove", recover="fold"))
    with pytest.raises(ReplaceMeError, match="no plain linear layer for lora"):
        prune(tiny_model("gpt2", layers=6), tok, **keys(place, "uidl", recover="lora"))


def test_run_streamline(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    common = {k: v for k, v in keys(place, "streamline").items() if k != "method"} | dict(model_path="./tiny", eval_dataset=None, prompt=None)
    (place / "s.yaml").write_text(yaml.safe_dump(common))
    cli.run_streamline(["--config", "s.yaml", "--save_path", "light", "--network", "ffn", "--train_tokens", "300", "--trainer", "{learning_rate: 1e-3}"])
    r = json.loads((place / "light/replaceme.json").read_text())
    assert r["method"] == "streamline" and r["peer"]["network"] == "ffn" and r["config"]["trainer"] == dict(learning_rate=1e-3)
    cli.run_streamline(["--config", "s.yaml", "--save_path", "nothing", "--network", "none"])
    assert json.loads((place / "nothing/replaceme.json").read_text())["peer"]["network"] == "none" and "What was trained" not in capsys.readouterr().out


@pytest.mark.parametrize("method, words", [("slicegpt", "turned into its principal components"), ("llm_pruner", "heads with their queries and")])
@pytest.mark.parametrize("plain", [False, True])
def test_what_makes_layers_narrower_is_a_method_like_the_others(place, monkeypatch, method, words, plain):
    "From the YAML to a folder that loads, and a report that says what became of the layers"
    monkeypatch.chdir(place)
    keys = dict(model_path="./tiny", method=method, plain=plain, layers_to_skip=2, dataset_size=8, max_length=32, eval_dataset=None, prompt=None)
    r, path = run(make_config(**keys, dataset="texts.jsonl", save_path=f"narrow-{method}-{plain}"))
    assert (r["block"], r["blocks"], r["n_layers"]["before"]) == (None, [], r["n_layers"]["after"])
    dense = AutoModelForCausalLM.from_pretrained("tiny")
    layer = sum(p.numel() for p in dense.model.layers[0].parameters())
    gone = r["parameters"]["before"] - r["parameters"]["after"]
    assert abs(gone - 2 * layer) < layer  # as many as two layers have, as near as whole channels come
    again = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=not plain)
    assert again.num_parameters() == r["parameters"]["after"] and (path / "modeling_replaceme.py").exists() != plain
    page, card = (path / "report.html").read_text(), (path / "README.md").read_text()
    assert words in page and words in card and "All layers became narrower" in page
    assert ("trust_remote_code=True" in card) != plain and "simple: false" not in card  # a key of another method
    with pytest.raises(ReplaceMeError, match="no layer went, all became narrower"):
        r.plot()
    with pytest.raises(ReplaceMeError, match=f"recover: cut trains what stands at a cut, and method {method} cuts no layer out: use lora"):
        make_config(**keys, recover="cut")


@pytest.mark.parametrize("name", [*METHODS])
def test_a_method_says_what_it_does_and_when_to_take_it(name):
    "What the pages of the methods are made from"
    m = METHODS[name]
    for clause in (m.does, m.use):
        assert 10 < len(clause) < 110 and not clause.endswith(".") and "|" not in clause and not clause[0].isupper()
    assert m.formula and "$" not in m.formula
