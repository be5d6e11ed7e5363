"""An option is read or refused: each key says beside its definition when it is read, and one check holds all of them to it."""
import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from replaceme import cli, data, optimize, pipeline, train
from replaceme.baselines import distances
from replaceme.blocks import Block
from replaceme.compare import CompareConfig
from replaceme.core import ReplaceMeError, ReplaceMeWarning
from replaceme.data import batches, load_texts
from replaceme.distance import METRICS, cosine
from replaceme.models import load_model
from replaceme.methods import peers
from replaceme.pipeline import (AnalyseConfig, Config, EvaluateConfig, MapConfig, PruneConfig, analyse, evaluate, make_config, prune, read_by,
                                read_config, recipe_of, run)
from replaceme.recover import RUNGS
from replaceme.solve import MAPS, STRUCTURES
from replaceme.stats import WEIGHTS

ROOT = Path(__file__).parents[1]
METHODS = ["auto", "lstsq", "cosine", "remove", *peers()]
FIELDS = {f.name: f for f in dataclasses.fields(Config)}


@pytest.fixture(scope="module")
def place(tmp_path_factory, save_tiny):
    folder = save_tiny(tmp_path_factory.mktemp("options"))
    (folder / "texts.txt").write_text("The map stands in for the layers that went. " * 60)
    return folder


# an option that would be ignored is refused, with its value and the reason

@pytest.mark.parametrize("keys, words", [
    (dict(limit=5), "limit is 5, but no tasks are asked"),
    (dict(eval_dataset=None, eval_size=9), "eval_size is 9, but eval_dataset is null"),
    (dict(eval_dataset=None, eval_length=99), "eval_length is 99, but eval_dataset is null"),
    (dict(eval_dataset=None, eval_column="text"), "eval_column is 'text', but eval_dataset is null"),
    (dict(eval_dataset=None, eval_subset="test"), "eval_subset is 'test', but eval_dataset is null"),
    (dict(eval_dataset=None, eval_split="test"), "eval_split is 'test', but eval_dataset is null"),
    (dict(private=False), "private is False, but nothing is pushed"),
    (dict(merge_consecutive=False), "merge_consecutive is False, but there is one block"),
    (dict(max_blocks=2, merge_consecutive=False), "merge_consecutive is False, but there is one block"),
    (dict(threshold=0.), "threshold is 0.0, but it belongs to method laco"),
    (dict(method="uidl", simple=True, dataset="x.txt"), "dataset is 'x.txt', but simple takes the deepest layers"),
    (dict(method="uidl", simple=True, dataset_size=None), "dataset_size is None, but simple takes the deepest layers"),
    (dict(method="cosine", solver="irls", l1=.1), "l1 is 0.1, but solver irls"),
    (dict(method="cosine", ridge="auto"), "ridge is 'auto', but the iterative solvers"),
    (dict(method="uidl", ridge="auto"), "ridge is 'auto', but method uidl fits no map"),
    (dict(method="lstsq", ridge="auto", structure="diag"), "ridge auto is for a full map, not diag"),
    (dict(method="lstsq", ridge="much"), "ridge is much: a ridge is zero or positive, or auto"),
    (dict(method="lstsq", rank=3), "rank is 3, but it goes with structure: rank")])
def test_what_would_be_ignored_is_refused(keys, words):
    with pytest.raises(ReplaceMeError) as e:
        make_config(**keys)
    assert words in str(e.value)


def test_ridge_auto_is_what_alpha_auto_sets():
    a, b = [recipe_of(make_config(method="lstsq", **{k: "auto"})) for k in ("ridge", "alpha")]
    assert a == b and a.ridge == "auto" and a.alpha == 0
    assert recipe_of(make_config(ridge="auto")) == recipe_of(make_config())  # which is what method auto does
    assert recipe_of(make_config(ridge=.1)).ridge == .1


def test_values_that_ask_for_nothing_are_allowed_everywhere():
    "Defaults written down, such as those in every replaceme.json, and the release's words for nothing"
    nothing = dict(num_A=1, diag=False, two_vectors=False, thri=False, accurate=False, alpha=0, merge_consecutive=True, solver="adam", loss="cosine",
                   activations_save_path=None, distances_path=None, save_path=None, token=None, save_transform_only=False, lr=1e-4, weights=None, limit=None)
    for method in METHODS:
        make_config(method=method, **nothing)
        spelled = dataclasses.asdict(make_config(method=method, layers_to_skip=2))
        assert make_config(**spelled) == make_config(method=method, layers_to_skip=2)
        assert make_config(**{**spelled, "eval_dataset": None, "prompt": None}).eval_size == 24


# the public release's words: one table, applied before anything is checked

WORDS = dict(diag=dict(structure="diag"), two_vectors=dict(structure="rank", rank=1), thri=dict(structure="lower"))


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("method", ["lstsq", "cosine"])
def test_a_word_of_the_release_is_ours_from_a_file_a_flag_and_python(tmp_path, word, method):
    ours = make_config(method=method, layers_to_skip=2, **WORDS[word])
    (tmp_path / "c.yaml").write_text(f"method: {method}\nlayers_to_skip: 2\n{word}: true\n")
    read = cli.parse("x", "", ["--config", str(tmp_path / "c.yaml")], {})[0]
    flag = cli.parse("x", "", ["--method", method, "--layers_to_skip", "2", f"--{word}", "true"], {})[0]
    assert make_config(method=method, layers_to_skip=2, **{word: True}) == read == flag == ours
    assert make_config(method=method, **{word: False}) == make_config(method=method)
    off = cli.parse("x", "", ["--config", str(tmp_path / "c.yaml"), f"--{word}", "false"], {})[0]
    assert off.structure is None and off.rank is None  # a flag wins over the file's word
    assert word not in FIELDS and make_config(**dataclasses.asdict(ours)) == ours


@pytest.mark.parametrize("keys, words", [
    (dict(diag=True, thri=True), "diag and thri all say which structure one map has: keep one"),
    (dict(thri=True, structure="lower"), "thri and structure all say which structure one map has: keep one"),
    (dict(two_vectors=True, rank=4), "two_vectors and rank all say which structure one map has: keep one"),
    (dict(thri=True, map="wide"), "thri is True, but it is for a narrow map"),
    (dict(diag=True, method="uidl"), "diag is True, but method uidl fits no map"),
    (dict(diag=1), "diag is 1: it must be true or false")])
def test_a_word_of_the_release_is_refused_by_its_own_name(keys, words):
    with pytest.raises(ReplaceMeError) as e:
        make_config(**{"method": "lstsq", **keys})
    assert words in str(e.value)


def test_a_word_of_the_release_that_another_door_does_not_read_is_named(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model_path: m\ntwo_vectors: true\nthri: true\n")
    with pytest.warns(ReplaceMeWarning, match="two_vectors and thri are left alone: evaluate_model does not read them here"):
        read_config(tmp_path / "c.yaml", cls=EvaluateConfig)
    with pytest.raises(SystemExit):
        cli.evaluate_model(["--thri", "true"])
    assert "unknown argument '--thri': it belongs to run_replaceme, get_lt_with_lstsq and get_lt_with_solvers" in capsys.readouterr().err.replace("run_uidl, run_streamline, ", "")


def test_help_lists_our_keys_and_names_the_words_of_the_release_below(capsys):
    with pytest.raises(SystemExit):
        cli.run_replaceme(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for word, ours in WORDS.items():
        assert f"--{word} VALUE" not in said
        assert f"--{word} true: the public release's word for " + ", ".join(f"{k}: {v}" for k, v in ours.items()) in said


@pytest.mark.parametrize("path", sorted(p for p in (ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_every_key_of_the_examples_is_read(path):
    "Nothing in them is dropped, and nothing said about them"
    name = path.name
    cls = CompareConfig if name.startswith("compare_") else AnalyseConfig if name.startswith("distance") else EvaluateConfig if name.startswith("evaluate") else Config
    with warnings.catch_warnings(action="error", category=ReplaceMeWarning):
        cfg = read_config(path, cls=cls)
    for k, v in yaml.safe_load(path.read_text()).items():
        assert k == "trainer" or getattr(cfg, k) == v


# what other commands do not read

RUN_ONLY = dict(layers_to_skip=2, method="lstsq", ridge=.1, num_A=2, refit=1, dataset="x.txt", save_path="out", push_to_hub="me/x", recover="cut", metric="cosine")


@pytest.mark.parametrize("key", RUN_ONLY)
def test_a_key_of_a_run_is_refused_by_an_evaluation(key):
    with pytest.raises(ReplaceMeError, match=f"{key} is .*, but evaluate_model does not read it; leave it out"):
        make_config(EvaluateConfig, model_path="m", **{key: RUN_ONLY[key]})


def test_one_config_serves_several_doors(place, monkeypatch):
    "As one file does"
    monkeypatch.chdir(place)
    cfg = make_config(model_path="./tiny", dataset="texts.txt", dataset_size=4, max_length=32, method="uidl", layers_to_skip=2, eval_dataset="texts.txt", eval_size=2, eval_length=32)
    with pytest.warns(ReplaceMeWarning, match="method, eval_dataset, eval_size and eval_length are left alone: get_distance_analysis does not read them here"):
        assert analyse(cfg)[0].texts == 4
    with pytest.warns(ReplaceMeWarning, match="method, layers_to_skip, dataset, dataset_size and max_length are left alone: evaluate_model"):
        assert evaluate(cfg)["perplexity"]["tokens"] == 62


@pytest.mark.parametrize("cls, keys, words", [
    (AnalyseConfig, dict(method="lstsq"), "method is 'lstsq', but get_distance_analysis does not read it"),
    (AnalyseConfig, dict(eval_size=3), "eval_size is 3, but get_distance_analysis does not read it"),
    (AnalyseConfig, dict(min_distance_layer=3), "min_distance_layer is 3, but without layers_to_skip no block is chosen"),
    (EvaluateConfig, dict(prompt="Hello?"), "prompt is 'Hello?', but one model is scored"),
    (EvaluateConfig, dict(speed=False), "speed is False, but nothing is timed where one model is scored"),
    (EvaluateConfig, dict(limit=3), "limit is 3, but no tasks are asked"),
    (MapConfig, dict(tasks="piqa"), "tasks is 'piqa', but a command that saves a map alone does not read it"),
    (MapConfig, dict(eval_dataset="x.txt"), "eval_dataset is 'x.txt', but a command that saves a map alone"),
    (MapConfig, dict(save_transform_only=False), "save_transform_only is False, but a command that saves a map alone"),
    (PruneConfig, dict(dtype="float16"), "dtype means nothing for a model in memory: it is loaded already"),
    (PruneConfig, dict(private=False), "private means nothing for a model in memory: save it with save_checkpoint")])
def test_a_door_refuses_what_it_does_not_read(cls, keys, words):
    with pytest.raises(ReplaceMeError) as e:
        make_config(cls, **keys)
    assert words in str(e.value)


SHARED = """model_path: ./tiny
method: uidl
layers_to_skip: 2
dataset: texts.txt
metric: cosine
prompt: Hello?
eval_dataset: texts.txt
eval_size: 2
eval_length: 32
methods: [lstsq, uidl]
layers: [1, 2]
compare: [./tiny, ./tiny]
"""


def test_one_file_serves_several_commands(place, monkeypatch, recwarn):
    "What a command has no use for is named in one line and has no effect"
    monkeypatch.chdir(place)
    (place / "all.yaml").write_text(SHARED.replace("metric: cosine\n", "").replace("prompt: Hello?\n", ""))

    def read(command, cls, *flags):
        recwarn.clear()
        cfg, _ = cli.parse(command, "", ["--config", "all.yaml", *flags], {}, cls=cls)
        (w,) = [str(w.message) for w in recwarn.list if w.category is ReplaceMeWarning]
        return cfg, w.removeprefix("config all.yaml: ")

    cfg, said = read("run_replaceme", Config)
    assert (cfg.method, cfg.eval_size, said) == ("uidl", 2, "methods, layers and compare are left alone: run_replaceme does not read them here.")
    cfg, said = read("evaluate_model", EvaluateConfig, "--model_path", "null")
    assert cfg.compare == ["./tiny", "./tiny"] and said.startswith("method, layers_to_skip, dataset, methods and layers are left alone: evaluate_model")
    cfg, said = read("get_distance_analysis", AnalyseConfig, "--metric", "cosine")
    assert (cfg.metric, cfg.layers_to_skip, cfg.method) == ("cosine", 2, "auto") and said.startswith("method, eval_dataset, eval_size, eval_length, methods, layers and compare are")
    cfg, said = read("compare_methods", CompareConfig)
    assert cfg.layers == [1, 2] and cfg.layers_to_skip is None and said == "method, layers_to_skip and compare are left alone: compare_methods does not read them here."


def test_a_key_that_contradicts_its_own_file_is_refused_by_every_command(place, tmp_path):
    (tmp_path / "c.yaml").write_text("model_path: m\nlimit: 5\n")
    with pytest.raises(ReplaceMeError, match="limit is 5, but no tasks are asked"):
        read_config(tmp_path / "c.yaml", cls=EvaluateConfig)
    (tmp_path / "c.yaml").write_text("model_path: m\nprompt: Hello?\n")  # a run asks it
    with pytest.warns(ReplaceMeWarning, match="prompt is left alone: evaluate_model does not read it here"):
        assert read_config(tmp_path / "c.yaml", cls=EvaluateConfig).prompt == FIELDS["prompt"].default


@pytest.mark.parametrize("command, flag, words", [
    ("evaluate_model", "--ridge", "it belongs to run_replaceme, run_uidl"), ("get_distance_analysis", "--method", "it belongs to run_replaceme"),
    ("get_lt_with_lstsq", "--tasks", "it belongs to run_replaceme"), ("run_replaceme", "--methods", "it belongs to compare_methods"),
    ("run_replaceme", "--cache", "it belongs to evaluate_model"), ("compare_methods", "--ridge", "it belongs to run_replaceme")])
def test_a_flag_that_a_command_does_not_read_is_refused_whatever_its_value(command, flag, words, capsys):
    name = flag[2:]
    default = next(f.default for c in (Config, EvaluateConfig, CompareConfig) for f in dataclasses.fields(c) if f.name == name)
    for value in ("0.5", str(default)):
        with pytest.raises(SystemExit) as e:
            getattr(cli, command)([flag, value])
        assert e.value.code == 2 and f"unknown argument '{flag}': {words}" in capsys.readouterr().err


# the construction itself: what is accepted is read

VALUES = dict(model_path="./tiny", budget="loss 9", merge=False, layers_to_skip=2, use_4bit=True, use_8bit=True, dtype="float32", device_map="auto", revision="main", max_memory={"cpu": "8GB"}, token="hf_x",
              trust_remote_code=True, dataset="texts.txt", dataset_shares=[1.], dataset_column="text", dataset_subset="train", dataset_split="train", dataset_size=8,
              batch_size=4, max_length=48, mask=.1, min_distance_layer=2, metric="cosine", distance_tokens="all", sinks="allow", distances_path="p.json",
              select="loss", top_k=2, num_A=2, merge_consecutive=False, max_blocks=2, blocks=[[2, 3]], map="wide", affine=True, weights="inv_norm",
              structure="diag", rank=2, alpha=.1, ridge=.1, refit=1, borrow=True, diag=True, two_vectors=True, thri=True, solver="irls", loss="mse", accurate=True, l1=.1, l2=.1,
              epochs=1, lr=1e-3, activations_save_path="acts", simple=True, C=3, I=1, threshold=-.9, network="ffn", train_loss="lm", plain=True, taylor="element", recover="fold",
              train_tokens=64, train_size=4, train_path="training", trainer=dict(learning_rate=1e-3), save_path="out", save_transform_only=True,
              push_to_hub="me/x", private=False, eval_dataset="texts.txt", eval_column="text", eval_subset="train", eval_split="train", eval_size=2,
              eval_length=32, tasks="say", limit=2, apply_chat_template=True, fewshot_as_multiturn=True, system_instruction="Be brief.", max_gen_toks=8,
              run_code=True, equal_within=3., writing="text", writing_prompts=2, writing_tokens=9, draft=True, speed=False, speed_seconds=1., prompt="Hello?", seed=1, stream_weights=True, stream_tokens=64, resume_every=9)


def test_a_flag_may_switch_off_what_a_file_asks_for(tmp_path):
    "A flag that contradicts the file leaves the rest of the file idle, which is said; flags that contradict each other are refused"
    (tmp_path / "c.yaml").write_text("method: cosine\nsolver: cg\neval_size: 2\ntasks: piqa\nlimit: 5\n")
    with pytest.warns(ReplaceMeWarning, match="solver, eval_size and limit are left alone: run_replaceme does not read them here"):
        cfg = read_config(tmp_path / "c.yaml", method="lstsq", eval_dataset=None, tasks=None)
    assert (cfg.solver, cfg.eval_size, cfg.limit) == ("adam", 24, None)
    with pytest.raises(ReplaceMeError, match="solver is 'cg', but it belongs to method cosine"):
        read_config(tmp_path / "c.yaml", method="lstsq", solver="cg")


# a registry is the implementation: a row that is added works, everywhere, or its name is refused

def city(x, y):
    "Distance in the city blocks, which no other metric is"
    return (y - x).abs().sum(-1)


KEYS = dict(dataset="texts.txt", dataset_size=4, max_length=32, layers_to_skip=2)


@pytest.fixture
def tiny(place, monkeypatch):
    monkeypatch.chdir(place)
    return load_model(place / "tiny")


def states(model, tok):
    from replaceme.activations import capture
    return [torch.stack(list(capture(model, b).S.values())).double() for b in batches(load_texts("texts.txt", tokenizer=tok, size=4, max_length=32), tok, 1, 32)]


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_a_metric_that_is_added_is_what_is_measured(tiny, monkeypatch, tokens):
    "In a run, for peers, in a saved profile that is used again, and in the picture's words"
    monkeypatch.setitem(METRICS, "city", city)
    model, tok = tiny
    S = states(model, tok)
    rows = [s if tokens == "all" else s[:, -1:] for s in S]
    want = [(sum(city(r[s], r[s + 2]).sum() for r in rows) / sum(r.shape[1] for r in rows)).item() for s in range(1, 5)]
    _, r = prune(model, tok, **KEYS, method="remove", metric="city", distance_tokens=tokens, sinks="allow")
    assert r["distance"]["profile"]["2"] == pytest.approx(want, rel=1e-5) and r["distance"]["metric"] == "city"
    assert r["blocks"] == [[1 + want.index(min(want)), 3 + want.index(min(want))]]
    assert r.plot().get_ylabel() == "city"
    D = distances(model, batches(load_texts("texts.txt", tokenizer=tok, size=4, max_length=32), tok, 4, 32), 2, "city", tokens)
    assert [D[b] for b in sorted(D)] == pytest.approx(want, rel=1e-5)
    with pytest.raises(ReplaceMeError, match="metric is 'twon', not one of angular, cosine, relative_l2, influence, city"):
        make_config(metric="twon")


def test_a_metric_in_the_place_of_another_is_taken(tiny, monkeypatch):
    "Also for the peers, which name theirs"
    model, tok = tiny
    before = prune(model, tok, **KEYS, method="linearpatch")[1]["distance"]["profile"]
    monkeypatch.setitem(METRICS, "cosine", lambda x, y: 1 / (1e-3 + cosine(x, y)))
    after = prune(model, tok, **KEYS, method="linearpatch")[1]["distance"]["profile"]
    assert after["2"] != pytest.approx(before["2"], rel=.1)


def test_a_weight_that_is_added_weighs(tiny, monkeypatch):
    monkeypatch.setitem(WEIGHTS, "loud", 3)
    fit = lambda w: prune(*tiny, **KEYS, method="lstsq", alpha=.1, weights=w)[1]["fit"]["error"]
    assert fit("loud") != pytest.approx(fit("none"), rel=1e-6)


def test_a_structure_that_is_added_is_fitted_and_refused_where_nothing_can_iterate_it(tiny, monkeypatch):
    half = lambda g, alpha, ridge: dataclasses.replace(STRUCTURES["full"](g, alpha=1.), T=torch.eye(len(g.E)).double() / 2, structure="half")
    monkeypatch.setitem(STRUCTURES, "half", half)
    model, tok = tiny
    small, r = prune(model, tok, **KEYS, method="lstsq", structure="half")
    at = r["blocks"][0][0] - 1
    a, b = [m.model.layers[at].mlp.down_proj.weight for m in (model, small)]
    assert torch.allclose(b, a / 2) and r["fit"]["structure"] == "half"
    with pytest.raises(ReplaceMeError, match="structure for solver adam is 'half': known are full, diag"):
        make_config(method="cosine", structure="half")


def test_a_map_that_is_added_is_what_is_folded(tiny, monkeypatch):
    twice = lambda g, structure, rank, alpha, ridge: dataclasses.replace(STRUCTURES["full"](g, alpha=1.), T=2 * torch.eye(len(g.E)).double())
    monkeypatch.setitem(MAPS, "twice", twice)
    model, tok = tiny
    small, r = prune(model, tok, **KEYS, method="lstsq", map="twice")
    at = r["blocks"][0][0] - 1
    a, b = [m.model.layers[at].mlp.down_proj.weight for m in (model, small)]
    assert torch.allclose(b, 2 * a) and r["fit"]["map"] == "twice"
    with pytest.raises(ReplaceMeError, match="ridge 'auto' with map 'twice'"):
        prune(model, tok, **KEYS, method="lstsq", map="twice", ridge="auto")


def test_a_loss_and_a_solver_that_are_added_are_used(tiny, monkeypatch):
    seen = []
    monkeypatch.setitem(optimize.LOSSES, "far", lambda P, Q: seen.append(len(P)) or (P - Q).abs().mean(1))
    prune(*tiny, **KEYS, method="cosine", loss="far", epochs=1)
    assert seen
    def still(rows, structure, **options):
        seen.append("still")
        return optimize.adam_map(rows, epochs=1)
    monkeypatch.setitem(optimize.SOLVERS, "still", still)
    prune(*tiny, **KEYS, method="cosine", solver="still")
    assert seen[-1] == "still"


def test_a_rung_and_a_training_loss_that_are_added_train(tiny, monkeypatch):
    monkeypatch.setitem(RUNGS, "norm", lambda model, cuts: [n for n, _ in model.named_parameters() if n.endswith("model.norm.weight")])
    model, tok = tiny
    small, r = prune(model, tok, **KEYS, method="remove", recover="norm", train_tokens=64, trainer=dict(learning_rate=.05))
    assert [x["name"] for x in r["recovery"]] == ["norm"] and r["recovery"][0]["parameters"] == 32
    calls = []
    monkeypatch.setitem(train.LOSSES, "kd", lambda *a, real=train.kd_loss: calls.append(1) or real(*a))
    prune(model, tok, **KEYS, method="remove", recover="norm", train_tokens=64)
    assert calls


def test_a_score_that_is_added_is_the_spread():
    from replaceme import evaluate as ev
    a = ev.Answer([-2., -8.], [1, 2], {})
    ev.SCORES["squared"] = lambda loss: loss ** 2
    try:
        assert ev.option_scores(a, "squared").tolist() == [4., 16.]
    finally:
        del ev.SCORES["squared"]


def test_a_source_and_a_mix_that_are_added_are_read(tiny, place, monkeypatch):
    (place / "rows.jsonl").write_text("".join(json.dumps(dict(text="row %d of the table, long enough" % i)) + "\n" for i in range(6)))
    monkeypatch.setitem(data.SOURCES, "mine", data.Source(str(place / "rows.jsonl")))
    monkeypatch.setitem(data.MIXES, "both", ("mine", "mine"))
    assert data.load_texts("mine", tokenizer=tiny[1], size=2, max_length=64)[0].startswith("row 0 of")


@pytest.mark.parametrize("key", ["method", "network", "train_loss", "select", "sinks", "distance_tokens"])
def test_a_name_without_an_implementation_is_refused(key):
    with pytest.raises(ReplaceMeError, match=f"{key} is 'toy', not one of"):
        make_config(**{key: "toy"})


def test_a_network_that_is_only_a_name_is_refused(tiny):
    from replaceme.streamline import place_network
    with pytest.raises(ReplaceMeError, match="'toy' is no kind of network"):
        place_network(tiny[0], Block(2, 4), "toy")


# seen from outside: a configuration that notes what is read of it

class Noting:
    "Notes the names of the keys that are read, once it is switched on"
    def __getattribute__(self, k):
        if k in FIELDS and object.__getattribute__(self, "__dict__").get("noted") is not None:
            object.__getattribute__(self, "__dict__")["noted"].add(k)
        return object.__getattribute__(self, k)


def noting(cfg):
    "The same configuration, noting"
    cls = type("Noted" + type(cfg).__name__, (Noting, type(cfg)), {})
    new = cls.__new__(cls)
    vars(new).update(vars(cfg), noted=set())
    return new


BASE = dict(model_path="./tiny", dataset="texts.txt", dataset_size=12, max_length=32, batch_size=4, layers_to_skip=2, eval_dataset="texts.txt", eval_size=2,
            eval_length=32, tasks="say", prompt="Hello?")
GOES_WITH = dict(**{t: dict(stream_weights=True, tasks=None, prompt=None) for t in ("stream_weights", "stream_tokens")}, writing_prompts=dict(writing="text"), writing_tokens=dict(writing="text"), rank=dict(structure="rank"), budget=dict(layers_to_skip="auto"), draft=dict(writing="text"), borrow=dict(map="wide"), top_k=dict(select="loss"), private=dict(push_to_hub="me/x"), merge_consecutive=dict(num_A=2, layers_to_skip=1),
                 num_A=dict(layers_to_skip=1), fewshot_as_multiturn=dict(apply_chat_template=True), blocks=dict(layers_to_skip=None), max_memory=dict(device_map="auto"), dataset_subset=dict(dataset_split=None), eval_subset=dict(eval_split=None), lr=dict(solver="adam"),
                 simple=dict.fromkeys(("dataset", "dataset_size", "max_length")), **{t: dict(recover="fold") for t in ("train_tokens", "train_size", "train_path", "trainer")})


def accepts(keys):
    try:
        return make_config(**{k: v for k, v in keys.items() if v is not None})
    except ReplaceMeError:
        return None


def few_configs(method):
    "The keys that a method accepts, as many in one configuration as go together"
    bins, base = [], {**BASE, "method": method, **(dict(threshold=VALUES["threshold"]) if method == "laco" else {})}
    for k in [k for k in FIELDS if k not in BASE and k != "method"]:
        more = {**GOES_WITH.get(k, {}), k: VALUES[k]}  # a key that is added needs a value there
        if not accepts({**base, **more}):
            continue
        for b in bins:
            if not any(n in b and b[n] != v for n, v in more.items()) and accepts({**b, **more}):
                b.update(more)
                break
        else:
            bins.append({**base, **more})
    return bins


@pytest.mark.parametrize("method", METHODS)
def test_every_key_that_a_run_accepts_is_read(place, monkeypatch, tmp_path, method):
    "What is loaded, trained, asked and pushed is stood in for; the rest is a run"
    monkeypatch.chdir(place)
    for name in ("load_tasks", "check_hub", "push_folder", "check_chat"):
        monkeypatch.setattr(pipeline, name, lambda *a, **k: None)
    monkeypatch.setattr(pipeline, "task_records", lambda *a, **k: {"say": {"scores": {"acc": 1.}, "better": ["acc"], "questions": []}})
    monkeypatch.setattr(pipeline, "load_model", lambda *a, **k: load_model("./tiny"))
    monkeypatch.setattr(pipeline, "recover", lambda dense, pruned, *a, **k: (pruned, []))
    for i, keys in enumerate(few_configs(method)):
        if "distances_path" in keys:
            shared = {k: v for k, v in keys.items() if v is not None and read_by(AnalyseConfig, FIELDS[k])}
            analyse(make_config(AnalyseConfig, **{**shared, "distances_path": str(tmp_path / f"{i}.json")}))
            keys["distances_path"] = str(tmp_path / f"{i}.json")
        for k in ("activations_save_path", "train_path", "save_path"):
            if k in keys or k == "save_path":
                keys[k] = str(tmp_path / f"{k}{i}")
        cfg = noting(accepts(keys))
        run(cfg)
        asked = {k for k, v in keys.items() if v is not None}
        assert asked <= cfg.noted, (method, sorted(asked - cfg.noted))


@pytest.mark.parametrize("door, cls, keys", [(analyse, AnalyseConfig, dict(layers_to_skip=2, distances_path="p2.json")), (evaluate, EvaluateConfig, {})], ids=["analyse", "evaluate"])
def test_other_doors_read_their_keys_and_no_others(place, monkeypatch, door, cls, keys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(pipeline, "load_model", lambda *a, **k: load_model("./tiny"))
    monkeypatch.setattr(pipeline, "kept_tasks", lambda *a, **k: {"say": {"scores": {"acc": 1.}}})
    cfg = noting(make_config(cls, **{**{k: v for k, v in BASE.items() if read_by(cls, FIELDS[k]) and k != "prompt"}, **keys}))
    door(cfg)
    mine = {k for k, f in FIELDS.items() if read_by(cls, f)}
    assert cfg.noted - mine <= {"blocks", "num_A"} - mine | set(), cfg.noted - mine
    assert mine - cfg.noted <= ({"prompt", "equal_within", "writing_prompts", "writing_tokens", "draft"} if cls is EvaluateConfig else set()), mine - cfg.noted  # of two models, and of writing
