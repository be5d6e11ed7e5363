"""What a run costs, told before a weight is loaded: counts known by hand, nothing written, nothing read but headers."""
import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
import warm
from torch.utils.flop_counter import FlopCounterMode

from replaceme import cli, data, stats
from replaceme.arch import layer_configs, layers_of, stack_config
from replaceme.blocks import candidates
from replaceme.compare import CompareConfig
from replaceme.config import AnalyseConfig, Config, MapConfig, make_config, read_config
from replaceme.core import ReplaceMeError
from replaceme.cost import (Headers, Speed, Text, attention_width, cost_of, dry_run, expected, file_bytes, header, layer_of, routed, shape_of, sums,
                            text_of, walk, weight_files)
from replaceme.models import tiny_model, tiny_tokenizer, tiny_vision
from replaceme.pipeline import EvaluateConfig, run
from replaceme.speed import _cached_bytes
from replaceme.stats import Gram

ROOT = Path(__file__).parents[1]
SPEED = Speed("a machine", 1e12, 1e12, 1e11, 1e10, 1e11, 1e9, .1)
LITTLE = dict(dataset="python-docs", dataset_size=8, max_length=32, batch_size=4, eval_size=2, eval_length=32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", layers=6).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    "Whoever loads a weight fails"
    def fail(*a, **kw):
        raise AssertionError("a weight was read")
    import safetensors
    import safetensors.torch
    import transformers
    from replaceme import models, pipeline

    class Closed:
        "A file of which the names alone may be had"
        def __init__(self, path, *a, **kw):
            self.names = list(header(path))
        def __enter__(self):
            return self
        def __exit__(self, *a):
            return False
        def keys(self):
            return self.names
        get_tensor = get_slice = fail
    monkeypatch.setattr(models, "safe_open", Closed)
    monkeypatch.setattr(safetensors, "safe_open", Closed)
    monkeypatch.setattr(models, "load_file", fail)
    monkeypatch.setattr(models, "from_checkpoint", fail)
    monkeypatch.setattr(pipeline, "load_model", fail)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", fail)


def one(cfg, **kw):
    return dry_run(cfg, SPEED, **kw)


def test_bytes_of_the_headers_are_those_of_the_files(tmp_path):
    model = tiny_model("llama", layers=4)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    for name in "one", "many":
        files = weight_files(tmp_path / name)
        assert len(files) == 1 or name == "many"
        told = [header(f) for f in files]
        size = sum(b for h in told for *_, b in h.values())
        assert size == sum(p.numel() * p.element_size() for p in model.parameters())
        assert file_bytes(tmp_path / name) == sum(f.stat().st_size for f in files)
        assert 0 < file_bytes(tmp_path / name) - size < 8192 * len(files)


def test_bytes_of_sums_are_those_that_a_run_allocates(tiny):
    cost = one(make_config(model_path=str(tiny), method="lstsq", layers_to_skip=2, **LITTLE))
    g = Gram(32)
    one_fit = g.XtX.nbytes + g.XtR.nbytes + g.E.nbytes
    assert cost.held["calibrate"][f"sums of {len(candidates(6, 2))} fits, narrow"] == 4 * one_fit
    wide = one(make_config(model_path=str(tiny), method="auto", layers_to_skip=2, **LITTLE))
    g = Gram(64, 32, E=torch.zeros(64, 32))
    assert wide.held["fit"]["sums while the wide map is solved"] == 4 * (g.XtX.nbytes + g.XtR.nbytes + g.E.nbytes)


def test_flops_of_a_layer_by_hand():
    "d=32, two of four heads for keys, MLP of 64: q and o 32x32, k and v 16x32, three matrices of 64x32"
    model = tiny_model("llama", layers=2)
    l = layer_of(layers_of(model)[0], 1., attention_width(model.config)[:2])
    assert l.active == 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 == 9216
    text = text_of(expected(2, 2), length=10)
    w = walk(shape_of(model), text)
    assert w.flops == 2 * 9216 * 20 * 2 and w.pairs == 2 * (4 * 32 * 10 * 10) * 2
    assert sums(shape_of(model), 20, 32).double == 2 * 32 * 64 * 20


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3", "opt", "gemma2", "falcon", "qwen3_moe", "mixtral", "llama4_text", "jetmoe"])
def test_flops_are_those_that_torch_counts(family):
    model = tiny_model(family, layers=4)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # torch does not count grouped products
    ids = torch.arange(48).view(2, 24) % 300
    with FlopCounterMode(display=False) as count, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    w = walk(shape_of(model), Text([(2, 24, 48)]), head=True)
    share = (w.flops + w.pairs) / count.get_total_flops()
    assert abs(share - 1) < .02, share


def test_a_token_is_sent_to_some_wherever_the_config_says_so():
    model = tiny_model("dbrx", layers=2)
    said = model.config.ffn_config
    assert routed(model.config) == said.moe_top_k / said.moe_num_experts < 1
    experts = sum(p.numel() for n, p in layers_of(model)[0].named_parameters() if ".experts." in n)
    assert shape_of(model).layers[0].experts == 4 * experts


def test_of_experts_a_token_sees_a_few_and_memory_all():
    model = tiny_model("mixtral", layers=3)
    assert routed(model.config) == .5
    shape = shape_of(model)
    assert shape.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    experts = 4 * (128 * 32 + 32 * 64)
    dense = 2 * 32 * 32 + 2 * 16 * 32 + 4 * 32
    assert shape.layers[0].active == dense + experts / 2 and shape.layers[0].experts == 4 * experts
    few, many = (walk(shape, Text([(1, n, n)])).weights for n in (1, 1000))
    assert few == pytest.approx(3 * 4 * (dense + 2 * 32 + experts / 2)) and many == pytest.approx(sum(l.bytes for l in shape.layers))


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3", "gemma2", "mamba", "bloom", "gpt_oss", "qwen3_5_text", "jamba"])
def test_any_family_is_counted(family, tmp_path, no_weights):
    try:
        model = tiny_model(family, layers=6)
    except ReplaceMeError as e:
        pytest.skip(str(e))
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    cost = one(make_config(model_path=str(tmp_path / "m"), layers_to_skip=1, save_path=str(tmp_path / "out"), **LITTLE))
    assert cost.parameters == model.num_parameters() and cost.seconds > 0 and cost.peak > 4 * model.num_parameters()
    assert cost.bytes == (tmp_path / "m/model.safetensors").stat().st_size


@pytest.mark.parametrize("family", ["falcon", "deepseek_v2", "deepseek_v3", "minicpm3", "bamba", "nemotron_h", "qwen3_next", "kimi_linear", "gpt_bigcode"])
def test_what_the_cache_keeps_of_a_token_is_what_a_cache_grows_by(family):
    model = tiny_model(family, layers=6)
    kept = [sum(_cached_bytes(model, n)[1]) for n in (16, 24)]
    shape = shape_of(model)
    assert shape.kept * len(shape.layers) * shape.item == (kept[1] - kept[0]) / 8


def test_weights_that_layers_share_are_held_once():
    for family in "zamba", "zamba2":
        model = tiny_model(family, layers=6)
        assert shape_of(model).bytes == sum(p.numel() * p.element_size() for p in model.parameters())


def test_layers_whose_heads_differ_are_counted(tmp_path, no_weights):
    model = tiny_model("gemma4_unified_text", layers=6)
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    cost = one(make_config(model_path=str(tmp_path / "m"), layers_to_skip=1, save_path=str(tmp_path / "out"), **LITTLE))
    assert cost.parameters == model.num_parameters()
    kept = [2 * 2 * c.head_dim for c in layer_configs(model.config)]
    assert shape_of(model).kept == sum(kept) / 6 and len(set(kept)) == 2
    assert data.rows_at_once(model, 20, 100, memory=4 * 100 * sum(kept) * 10) == 10


def test_an_image_encoder_is_counted(tmp_path, no_weights):
    from transformers import ViTImageProcessor
    model = tiny_vision("vit", layers=6)
    model.save_pretrained(tmp_path / "m")
    ViTImageProcessor(size=dict(height=32, width=32)).save_pretrained(tmp_path / "m")
    (tmp_path / "pictures").mkdir()
    cost = one(make_config(model_path=str(tmp_path / "m"), layers_to_skip=1, dataset=str(tmp_path / "pictures"), dataset_size=8,
                           save_path=str(tmp_path / "out")))
    rows = (32 // stack_config(model).patch_size) ** 2 + 1
    assert cost.texts["calibration"].tokens + cost.texts["held_out"].tokens == 8 * rows
    assert not any(s.what.startswith("an answer") for s in cost.steps)


def test_nothing_is_written_and_no_weight_is_read(tiny, tmp_path, no_weights, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(dict(model_path=str(tiny), layers_to_skip=2, **LITTLE)))
    for command in cli.run_replaceme, cli.get_lt_with_lstsq, cli.get_lt_with_solvers, cli.run_uidl, cli.run_streamline, cli.get_distance_analysis:
        command(["--dry-run", "--config", "r.yaml"])
        out = capsys.readouterr().out
        assert "it fits" in out and "calibrate" in out and "Gflop/s" in out
    cli.run_replaceme(["--config", "r.yaml", "--save_path", "out/model", "--dry_run"])
    cli.evaluate_model(["--model", str(tiny), "--eval_length", "32", "--dry-run"])
    assert "24 pieces, the dense model" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.yaml"]


def test_nothing_is_written_by_the_command_itself(tiny, tmp_path):
    p = warm.run([sys.executable, "-c", "from replaceme.cli import run_replaceme; run_replaceme()", "--dry-run", "--model", str(tiny),
                        "--layers", "2", "--dataset", "python-docs", "--dataset_size", "4", "--max_length", "32", "--eval_size", "2", "--eval_length", "32"],
                       cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    assert "peak" in p.stdout and list(tmp_path.iterdir()) == []


WRONG = {"no model": [], "no such folder": ["--model", "./nowhere", "--layers", "2"], "too many layers": ["--model", "TINY", "--layers", "6"],
         "unknown key": ["--model", "TINY", "--layers", "2", "--dataset_sizes", "3"],
         "no such file": ["--model", "TINY", "--layers", "2", "--dataset", "./no.txt"],
         "keys that contradict": ["--model", "TINY", "--layers", "2", "--alpha", "1", "--map", "wide"],
         "a file in the way": ["--model", "TINY", "--layers", "2", "--save_path", "file"],
         "pieces too long": ["--model", "TINY", "--layers", "2", "--eval_length", "100000"]}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_run_refuses_is_refused_in_the_same_words(name, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    words = [str(tiny) if w == "TINY" else w for w in WRONG[name]]
    said = []
    for more in [], ["--dry-run"]:
        with pytest.raises(SystemExit) as e:
            cli.run_replaceme([*words, *more])
        said.append((e.value.code, capsys.readouterr().err))
    assert said[0] == said[1] and said[0][0] == 2


def test_a_command_of_one_method_refuses_others(tiny, capsys):
    for command, method in (cli.run_uidl, "lstsq"), (cli.get_lt_with_lstsq, "cosine"), (cli.get_lt_with_solvers, "lstsq"):
        with pytest.raises(SystemExit) as e:
            command(["--dry-run", "--model", str(tiny), "--layers", "2", "--method", method])
        assert e.value.code == 2 and "use " in capsys.readouterr().err


EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_every_example_has_a_cost(path, tiny, tmp_path, no_weights, monkeypatch):
    "With a small model in the place of its own, and without data that lies elsewhere"
    monkeypatch.chdir(tmp_path)
    said = yaml.safe_load(path.read_text())
    pictures = said.get("dataset") == "./pictures"
    cls = (CompareConfig if "methods" in said else EvaluateConfig if path.stem == "evaluate" else
           AnalyseConfig if path.stem == "distance_analysis" else Config)
    folder = tmp_path / "model"
    if pictures:
        from transformers import ViTImageProcessor
        tiny_vision("dinov2", layers=6).save_pretrained(folder)
        ViTImageProcessor(size=dict(height=32, width=32)).save_pretrained(folder)
        (tmp_path / "pictures").mkdir()
    else:
        tiny_model("llama", layers=32, max_position_embeddings=4096).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    over = dict(model_path=str(folder))
    if "tasks" in said:
        over["tasks"] = None
    before = sorted(tmp_path.rglob("*"))
    try:
        cost = one(read_config(path, cls=cls, **over))
    except ReplaceMeError as e:
        if "bitsandbytes" not in str(e):
            raise
        pytest.skip(str(e))
    assert cost.seconds > 0 and cost.peak > 0 and cost.fits and sorted(tmp_path.rglob("*")) == before
    assert cost.command == cls.command


def test_what_would_fit_where_it_does_not(tiny):
    cfg = make_config(model_path=str(tiny), layers_to_skip=2, **LITTLE)
    roomy = one(cfg, free=10**9)
    tight = one(cfg, free=roomy.peak - 1)
    assert roomy.fits and not roomy.advice and not tight.fits
    words = {w: b for w, b in tight.advice}
    assert words["batch_size: 1"] < tight.peak and words["map: narrow"] <= tight.peak and words["dtype: bfloat16"] < tight.peak
    assert "it does not fit" in tight.table() and "batch_size: 1: peak" in tight.table()
    small = one(replace(cfg, batch_size=1), free=10**9)
    assert words["batch_size: 1"] == pytest.approx(small.peak, rel=.2)


def test_several_processes_share_the_memory_of_their_machine(tiny, monkeypatch):
    "And the cost of one of them is laid against its share"
    cfg = make_config(model_path=str(tiny), layers_to_skip=2, device_map="cpu", **LITTLE)
    monkeypatch.setattr(stats.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**7))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    one_alone = one(cfg)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    of_four = one(cfg)
    assert (one_alone.free, of_four.free) == (10**7, 2_500_000) and of_four.peak == one_alone.peak
    assert "4 processes share the memory" in of_four.table() and "processes share" not in one_alone.table()


@pytest.mark.parametrize("method", ["laco", "llm_pruner"])
def test_a_few_texts_are_as_long_whatever_the_batches(tiny, method):
    "Of a method that reads ten: a batch may be larger than there are texts"
    def read(size):
        with warnings.catch_warnings(action="ignore"):
            return one(make_config(model_path=str(tiny), method=method, layers_to_skip=2, **{**LITTLE, "batch_size": size, "dataset_size": 12}))
    sizes = 1, 5, 12, 64, "auto"
    assert [(t.texts, t.tokens) for n in sizes for t in [read(n).texts["calibration"]]] == [(10, 320)] * len(sizes)


ASKED = {"nine tenths": (dict(dataset=["self", "python-docs"], dataset_shares=[9, 1], dataset_size=20), [(18, 32)]),
         "a tenth": (dict(dataset=["self", "python-docs"], dataset_shares=[1, 9], dataset_size=20), [(2, 32)]),
         "judged": (dict(eval_dataset="self"), [(2, 24)]),
         "judged, of several kinds": (dict(dataset="self", eval_dataset=["python-docs", "self"]), [(2, 24), (8, 32)]),
         "trained": (dict(dataset=["self", "python-docs"], dataset_shares=[3, 1], recover="cut", train_size=16, train_tokens=64), [(6, 32), (12, 32)]),
         "trained on the same": (dict(dataset="self", recover="cut", train_tokens=64), [(8, 32)]),
         "none": (dict(dataset="python-docs"), [])}


@pytest.mark.parametrize("name", ASKED)
def test_own_texts_are_those_that_a_run_has_written(name, tiny, tmp_path, monkeypatch):
    "How many, and of how many tokens: as told before, as asked of the model"
    more, want = ASKED[name]
    keys = dict(model_path=str(tiny), method="lstsq", layers_to_skip=2, save_path=str(tmp_path / "out"), prompt=None, speed=False)
    cfg = make_config(**{**keys, **LITTLE, "eval_length": 24, **more})
    asked, plain = set(), data.own_texts

    def noting(model, tokenizer, size, length, *a, **kw):
        asked.add((size, length))
        return plain(model, tokenizer, size, length, *a, **kw)
    monkeypatch.setattr(data, "own_texts", noting)
    with warnings.catch_warnings(action="ignore"):
        cost = one(cfg)
        assert not asked
        run(cfg)
    told = [s for s in cost.steps if s.stage == "texts"]
    assert sorted(asked) == sorted(s.of[:2] for s in told) == want
    assert all(f"{s.of[0]} texts written" in s.what and s.work.weights > 0 for s in told)
    caches = [n * t for n, t in want]  # all of them at once here, 2 heads of 8 numbers for keys and for values in each of 6 layers
    assert cost.held.get("texts", {}).get("KV cache") == (max(caches) * 4 * 32 * 6 if want else None)


def test_other_doors_and_rows_count_own_texts_too(tiny, tmp_path):
    def told(cfg):
        cost = one(cfg)
        return [s.of[:2] for s in cost.steps if s.stage == "texts"], "texts" in cost.held
    own = dict(model_path=str(tiny), max_length=32, batch_size=4, dataset="self", dataset_size=8)
    assert told(make_config(AnalyseConfig, **own)) == ([(8, 32)], True)
    assert told(make_config(EvaluateConfig, model_path=str(tiny), eval_dataset="self", eval_size=3, eval_length=24)) == ([(3, 24)], True)
    rows = make_config(CompareConfig, methods=["shortgpt", "lstsq", dict(method="streamline", train_size=12)], layers=[1, 2], seeds=[0, 1], eval_dataset="self", eval_size=3, eval_length=24,
                       save_path=str(tmp_path / "rows"), **own)
    assert sorted(told(rows)[0]) == [(3, 24), (8, 32), (8, 32), (12, 32), (12, 32)]  # for each seed, but the pieces that all are judged by


def test_the_recipe_decides(tiny):
    def what(**kw):
        return [s.what for s in one(make_config(model_path=str(tiny), layers_to_skip=2, **LITTLE, **kw)).steps]
    assert any("5 candidates" in w or "4 candidates" in w for w in what(method="auto") if "held-out" in w)
    assert any("2 candidates" in w for w in what(method="auto", top_k=2) if "held-out" in w)
    assert not any("refitted" in w for w in what(method="auto", refit=0)) and any("1 layers behind" in w for w in what(method="auto", refit=1))
    assert any("solver adam" in w for w in what(method="cosine"))
    assert any("texts written" in w for w in [s.what for s in one(make_config(
        model_path=str(tiny), layers_to_skip=2, **{**LITTLE, "dataset": "self"})).steps])
    twice = [sum(s.work.flops for s in one(make_config(model_path=str(tiny), method="lstsq", layers_to_skip=2, **{**LITTLE, "dataset_size": n})).steps
                 if s.stage == "calibrate") for n in (8, 16)]
    assert twice[1] == 2 * twice[0]


def test_a_map_alone_is_neither_scored_nor_saved(tiny, tmp_path):
    keys = {k: v for k, v in LITTLE.items() if not k.startswith("eval")}
    cost = one(make_config(MapConfig, model_path=str(tiny), method="lstsq", layers_to_skip=2, save_path=str(tmp_path / "m"), **keys))
    assert not {"score", "save", "reload"} & {s.stage for s in cost.steps}


def test_four_bits_hold_a_quarter_and_fold_into_all():
    shape, whole = (shape_of(tiny_model("llama", layers=6, d=128), bits) for bits in (4, None))
    assert shape.layers[0].bytes < whole.layers[0].bytes / 6 and shape.embedding == whole.embedding


def test_a_large_model_needs_no_memory():
    "Llama-3-8B and what is known of it"
    from transformers import AutoConfig, AutoModelForCausalLM
    from replaceme.cost import empty_model
    config = AutoConfig.for_model("llama", dtype="bfloat16", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                  num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192)
    h = Headers(empty_model(AutoModelForCausalLM, config))
    cfg = make_config(model_path="meta/llama", method="lstsq", layers_to_skip=8, dataset="a/b", dataset_size=10, max_length=1024, eval_dataset=None,
                      prompt=None)
    cost = cost_of(cfg, h, SPEED, free=80 * 10**9)
    assert cost.parameters == 8_030_261_248 and cost.bytes == 2 * cost.parameters and not cost.known
    assert cost.texts["calibration"].tokens == 10240 and not cost.texts["calibration"].exact
    assert json.dumps(cost.record()) and "<table>" in cost._repr_html_()


def test_a_damaged_checkpoint_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m/model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ReplaceMeError, match="Git LFS"):
        one(make_config(model_path=str(tmp_path / "m"), layers_to_skip=2, **LITTLE))


def test_what_is_measured_in_four_bits_is_scored_and_saved_whole(tiny):
    "The files are read whole, twice; what is saved has the bytes of the original weights, and four bits hold less until then"
    pytest.importorskip("bitsandbytes")
    keys = dict(model_path=str(tiny), layers_to_skip=2, method="lstsq", **LITTLE)
    few, whole = one(make_config(use_4bit=True, **keys)), one(make_config(**keys))
    def of(c, stage, field):
        return sum(getattr(s.work, field) for s in c.steps if s.stage == stage)
    assert of(few, "save", "written") == of(whole, "save", "written") and few.bytes == whole.bytes
    assert of(few, "load", "read") == 2 * of(whole, "load", "read")
    for moment in "score", "save":
        assert sum(few.held[moment].values()) == sum(whole.held[moment].values())
    assert sum(few.held["load"].values()) < sum(whole.held["load"].values()) < sum(few.held["fold"].values())
