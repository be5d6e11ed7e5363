"""Each mistake: one clear line on standard error, exit code 2, no traceback, nothing written."""
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
import yaml

from replaceme import cli
from replaceme.config import PruneConfig, read_config
from replaceme.core import help_page
from replaceme.export import export_model
from replaceme.models import tiny_model, tiny_tokenizer

TEXTS = ["The map stands in for the layers that went, line %d of many. " % i * 3 for i in range(20)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A tiny model on disk, as a user would have one"
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_model("llama", layers=6)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, checkpoint):
    "An empty working folder with a config and a data file that work; what a test changes is the mistake"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in TEXTS))
    return tmp_path


def config(checkpoint, **keys):
    good = dict(model_path=str(checkpoint), dataset="texts.jsonl", max_length=64, layers_to_skip=2, eval_dataset=None,
                prompt=None, save_path="out")
    return {k: v for k, v in {**good, **keys}.items() if v != "DROP"}


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "cache" not in p.parts[len(folder.parts):][:1])


def fails(capsys, place, argv, *parts, command=cli.run_replaceme):
    "The command ends with code 2 and one line that holds `parts`; the folder is as it was"
    before = files(place)
    with pytest.raises(SystemExit) as e:
        command([str(a) for a in argv])
    err = capsys.readouterr().err
    lines = [l for l in err.splitlines() if l.startswith(command.__name__ + ": error: ")]
    assert e.value.code == 2 and len(lines) == 1 and "Traceback" not in err, err
    for part in parts:
        assert part in lines[0]
    assert files(place) == before


def write(place, keys):
    (place / "c.yaml").write_text(keys if isinstance(keys, str) else yaml.safe_dump(keys))
    return ["--config", "c.yaml"]


def test_the_config_of_these_tests_works(place, checkpoint, capsys):
    cli.run_replaceme(write(place, config(checkpoint)))
    assert (place / "out/model.safetensors").exists() and "model    out" in capsys.readouterr().out


@pytest.mark.parametrize("text, parts", [
    ("layers_to_skp: 2", ["unknown key 'layers_to_skp'", "Did you mean 'layers_to_skip'?"]),
    ("blah_blah: 2", ["unknown key 'blah_blah'", "--help"]),
    ("alpha: 1\nalpha: 2", ["'alpha' stands twice", "lines 1 and 2"]),
    ("model_path: {{ model }}", ["c.yaml", "a key must be a word", "line 1", "quotes"]),
    ("alpha: 1\n? [a, b]\n: 2", ["a key must be a word", "line 2", "sequence"]),
    ("layers_to_skip: six", ["layers_to_skip is 'six'", "whole number"]),
    ("layers_to_skip: 2.5", ["layers_to_skip is 2.5", "whole number"]),
    ("use_4bit: 1", ["use_4bit is 1", "true or false"]),
    ("- a\n- b", ["c.yaml", "list"]),
    ("a: [", ["c.yaml", "YAML"]),
    ("method: lstq", ["method is 'lstq'", "Did you mean 'lstsq'?"]),
    ("solver: cg", ["solver is 'cg'", "belongs to method cosine", "the method is auto"]),
    ("method: lstsq\nloss: mse", ["loss is 'mse'", "belongs to method cosine"]),
    ("method: lstsq\naccurate: true", ["accurate is True", "belongs to method cosine"]),
    ("method: lstsq\nactivations_save_path: acts", ["activations_save_path", "belongs to method cosine"]),
    ("method: auto\ndiag: true", ["diag is True", "method: lstsq"]),
    ("method: lstsq\ndiag: true\nthri: true", ["diag and thri", "which structure"]),
    ("method: lstsq\nstructure: diag\ntwo_vectors: true", ["two_vectors and structure", "keep one"]),
    ("method: lstsq\nstructure: daig", ["structure is 'daig'", "Did you mean 'diag'?"]),
    ("method: lstsq\nstructure: rank", ["needs a rank"]),
    ("method: lstsq\nrank: 4", ["rank is 4", "structure: rank"]),
    ("method: lstsq\nmap: wide\nthri: true", ["thri is True", "narrow map"]),
    ("method: lstsq\naffine: true\ndiag: true", ["affine is True", "diag map with a bias"]),
    ("method: lstsq\nmap: wide\nalpha: 0.1", ["alpha", "narrow map", "ridge"]),
    ("method: lstsq\nalpha: 0.1\nridge: 0.1", ["alpha is 0.1 and ridge is 0.1", "keep one"]),
    ("method: lstsq\nalpha: auto\ndiag: true", ["alpha auto", "diag"]),
    ("method: cosine\nalpha: auto", ["alpha auto", "closed form"]),
    ("method: cosine\nalpha: 0.1\nl2: 0.1", ["alpha is 0.1 and l2 is 0.1", "keep one"]),
    ("method: cosine\nweights: inv_norm", ["weights is 'inv_norm'", "iterative solvers"]),
    ("method: cosine\nselect: loss", ["select is 'loss'", "iterative solvers"]),
    ("method: cosine\nsolver: irls\nloss: mse", ["solver irls", "loss mse"]),
    ("method: cosine\nsolver: irls\nthri: true", ["solver irls", "lower"]),
    ("method: cosine\nsolver: irls\nalpha: 0.1", ["alpha is 0.1", "irls"]),
    ("method: cosine\nsolver: cg\nlr: 0.1", ["lr is 0.1", "finds its own steps"]),
    ("method: cosine\nloss: mse\naccurate: true", ["accurate goes with the loss cosine"]),
    ("method: cosine\nloss: elasticnet", ["elasticnet without a penalty"]),
    ("method: cosine\nsolver: sgd", ["solver is 'sgd'", "irls"]),
    ("method: lstsq\ntop_k: 3", ["top_k is 3", "select is distance"]),
    ("method: lstsq\nstructure: orthonormal\nalpha: 0.1", ["alpha is 0.1", "orthonormal"]),
    ("blocks: [[1, 2]]\nsinks: allow", ["sinks is 'allow'", "the blocks are given"]),
    ("select: distance\ntop_k: 3", ["top_k is 3", "select is distance"]),
    ("select: best", ["select is 'best'", "distance, fit, loss"]),
    ("num_A: 2\nmax_blocks: 2", ["num_A, max_blocks and blocks", "keep one"]),
    ("num_A: 2\nselect: loss", ["select is 'loss'", "max_blocks"]),
    ("max_blocks: 2\nselect: fit", ["select fit", "single blocks"]),
    ("blocks: [[1, 2]]\nlayers_to_skip: 2", ["layers_to_skip is 2", "the blocks are given"]),
    ("blocks: [[1, 3], [2, 4]]", ["[1,3) and [2,4)", "overlap"]),
    ("blocks: [[1, 3], [3, 4]]\nmerge_consecutive: false", ["[1,3) and [3,4)", "touch"]),
    ("blocks: [1, 3]", ["blocks is [1, 3]", "pairs of layers"]),
    ("blocks: [[0, 3]]", ["[0,3)", "starts at 1 or later"]),
    ("use_4bit: true\nrefit: 1", ["refit is 1", "4 bit"]),
    ("use_4bit: true\nselect: loss", ["select is 'loss'", "4 bit"]),
    ("save_transform_only: true\nrefit: 1", ["refit is 1", "no refitted layers"]),
    ("mask: 1.0", ["mask is 1.0", "between 0 and 1"]),
    ("refit: -1", ["refit is -1", "at least 0"]),
    ("weights: inv", ["weights is 'inv'", "inv_norm"]),
    ("sinks: maybe", ["sinks is 'maybe'", "avoid, allow"]),
    ("distance_tokens: first", ["distance_tokens is 'first'", "last, all"]),
    ("dataset: [self, self]", ["self"]),
    ("dataset: [self, python-docs]\ndataset_shares: [1, -1]", ["-1"]),
    ("dataset: []", ["dataset"]),
    ("dataset_shares: [1, 2]", ["shares [1, 2]", "one for each data set"]),
    ("metric: anglar", ["metric is 'anglar'", "Did you mean 'angular'?"]),
    ("alpha: -1", ["alpha is -1.0", "zero or positive"]),
    ("batch_size: 0", ["batch_size is 0", "at least 1"]),
    ("max_length: 1", ["max_length is 1", "at least 2"]),
    ("dtype: int8", ["dtype 'int8'", "float32"]),
])
def test_config(place, capsys, text, parts):
    fails(capsys, place, write(place, text), *parts)


def test_config_missing_or_unreadable(place, capsys):
    fails(capsys, place, ["--config", "nothing.yaml"], "nothing.yaml", "No such file")
    (place / "c.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    fails(capsys, place, ["--config", "c.yaml"], "c.yaml", "cannot be read")
    fails(capsys, place, ["--config", str(place)], "cannot be read")


def test_flags(place, checkpoint, capsys):
    args = write(place, config(checkpoint))
    fails(capsys, place, args + ["--layer_to_skip", "2"], "--layer_to_skip", "Did you mean 'layers_to_skip'?")
    fails(capsys, place, args + ["--layers_to_skip", "two"], "layers_to_skip is 'two'")
    fails(capsys, place, args + ["--layers_to_skip"], "expected one argument")
    fails(capsys, place, args + ["stray"], "stray")


@pytest.mark.parametrize("keys, parts", [
    (dict(layers_to_skip=0), ["layers_to_skip is 0", "at least 1"]),
    (dict(layers_to_skip=-3), ["layers_to_skip is -3", "at least 1"]),
    (dict(layers_to_skip=6), ["layers_to_skip is 6", "6 layers", "at most 5"]),
    (dict(layers_to_skip="DROP"), ["layers_to_skip is missing"]),
    (dict(layers_to_skip="DROP", save_path="DROP"), ["layers_to_skip is missing"]),
    (dict(model_path="DROP"), ["model_path is missing"]),
    (dict(method="lstsq", structure="rank", rank=33), ["rank is 33", "width of 32"]),
    (dict(min_distance_layer=5), ["min_distance_layer is 5", "no candidate is left"]),
    (dict(dataset="nowhere.jsonl"), ["nowhere.jsonl"]),
    (dict(dataset_column="txt"), ["txt", "Did you mean 'text'?"]),
    (dict(model_path="./nothing"), ["./nothing", "no such folder"]),
    (dict(model_path="package:nobody_ships_this"), ["nobody_ships_this", "pip install"]),
    (dict(distances_path="nothing.json"), ["distances_path nothing.json", "get_distance_analysis"]),
])
def test_values(place, checkpoint, capsys, keys, parts):
    fails(capsys, place, write(place, config(checkpoint, **keys)), *parts)


PLACES = sorted({f.name for f in dataclasses.fields(PruneConfig) if f.metadata.get("path")} | {"save_path"})


@pytest.mark.parametrize("value", ["x" * 400, "a text of words, not a path " * 20, "x/" * 3000], ids=["name", "text", "path"])
@pytest.mark.parametrize("key", PLACES)
def test_what_is_too_long_to_be_a_path(place, checkpoint, capsys, key, value):
    "Whichever key should name a place"
    fails(capsys, place, write(place, config(checkpoint, **{key: value})))


@pytest.mark.parametrize("flag", ["--eval_dataset", "--model_path"])
def test_what_is_too_long_to_be_scored_or_exported(place, checkpoint, capsys, flag):
    fails(capsys, place, ["--model_path", checkpoint, "--prompt", "null", flag, "x" * 400], command=cli.evaluate_model)
    fails(capsys, place, ["x" * 400, "--to", "vllm"], command=export_model)


def test_data_without_content(place, checkpoint, capsys):
    args = write(place, config(checkpoint))
    (place / "texts.jsonl").write_text("")
    fails(capsys, place, args, "texts.jsonl")
    (place / "texts.jsonl").write_text(json.dumps(dict(text="a")) + "\n" + json.dumps(dict(text="")) + "\n")
    fails(capsys, place, args, "two tokens")


def test_fewer_tokens_than_the_width(place, checkpoint, capsys):
    """Below the width the system is singular: an error with the numbers. A ridge makes it solvable: a warning with them."""
    (place / "texts.jsonl").write_text(json.dumps(dict(text="only thirteen")) + "\n")
    args = write(place, config(checkpoint, method="lstsq"))
    fails(capsys, place, args, "singular", "13 calibration tokens for a width of 32")
    cli.run_replaceme(args + ["--alpha", "0.1"])
    assert "warning: 13 calibration tokens for a width of 32" in capsys.readouterr().err


def test_not_a_decoder(place, capsys):
    from transformers import BertConfig, BertLMHeadModel, BertModel, T5Config, T5Model
    bert = BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=320)
    for cls, cfg, why in ((BertModel, bert, "without a head that predicts tokens"),
                          (BertLMHeadModel, bert, "is not a decoder"),
                          (T5Model, T5Config(d_model=32, num_layers=2, num_heads=4, d_ff=64, d_kv=8, vocab_size=320),
                           "neither a causal language model nor an image encoder")):
        folder = place / cls.__name__
        cls(cfg).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        fails(capsys, place, write(place, config(folder)), why)


def test_a_norm_behind_the_mlp_is_refused_before_any_text_is_made(place, capsys, monkeypatch):
    model = tiny_model("bert", layers=6)
    model.save_pretrained(place / "bert")
    tiny_tokenizer().save_pretrained(place / "bert")
    monkeypatch.setattr("replaceme.feed.load_texts", lambda *a, **k: pytest.fail("texts were made"))
    fails(capsys, place, write(place, config(place / "bert")), "cannot be folded", "norm")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(place, checkpoint, capsys, value):
    """The layer and the text: only texts with a '~' meet the broken embedding row; the tenth text has one."""
    model = tiny_model("llama", layers=6)
    tok = tiny_tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tok("~").input_ids[-1]] = value
    model.save_pretrained(place / "broken")
    tok.save_pretrained(place / "broken")
    lines = [t + ("~ again" if i == 10 else "") for i, t in enumerate(["short text, %d of them" % i for i in range(20)])]
    (place / "texts.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in lines))
    fails(capsys, place, write(place, config(place / "broken", batch_size=4)), "NaN or infinity in the embeddings, text 10")


def test_profile_of_something_else(place, checkpoint, capsys):
    args = write(place, config(checkpoint, distances_path="p.json"))
    cli.get_distance_analysis(args)
    saved = json.loads((place / "p.json").read_text())
    capsys.readouterr()
    cli.run_replaceme(args)  # its own profile is taken
    shutil.rmtree(place / "out")
    other = place / "other"
    tiny_model("llama", layers=6, seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    fails(capsys, place, args + ["--model_path", other], "belongs to another model")
    fails(capsys, place, args + ["--metric", "cosine"], "belongs to another metric")
    fails(capsys, place, args + ["--max_length", "32"], "belongs to another data")
    del saved["distances"]["2"]
    (place / "p.json").write_text(json.dumps(saved))
    fails(capsys, place, args, "no distances for n=2 layers", "n in 1, 3")
    (place / "p.json").write_bytes(b"\x80\x04pickle")
    fails(capsys, place, args, "pickled files are not read")
    fails(capsys, place, args, "pickled files are not read", command=cli.get_distance_analysis)  # nor written over


def test_output_folder_of_somebody_else(place, checkpoint, capsys):
    (place / "out").mkdir()
    (place / "out/thesis.tex").write_text("do not lose me")
    fails(capsys, place, write(place, config(checkpoint)), "save_path", "was not written by replaceme")


def test_output_folder_of_ours_is_replaced(place, checkpoint):
    args = write(place, config(checkpoint))
    cli.run_replaceme(args)
    cli.run_replaceme(args + ["--layers_to_skip", "3"])
    assert json.loads((place / "out/config.json").read_text())["num_hidden_layers"] == 3
    assert [f for f in os.listdir(place) if "partial" in f] == []


def test_no_disk_space(place, checkpoint, capsys, monkeypatch):
    """Seen coming, where the numbers are known; and when the disk fills up all the same while writing."""
    args = write(place, config(checkpoint))
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda p: namedtuple("usage", "total used free")(10**6, 10**6 - 5000, 5000))
        fails(capsys, place, args, "save_path", "0.00 GB are free")

    def full(*a, **k):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    fails(capsys, place, args, "the disk ran full", "nothing was kept")


def test_texts_longer_than_the_positions(place, capsys):
    tiny_model("gpt2", layers=6).save_pretrained(place / "gpt2")
    tiny_tokenizer().save_pretrained(place / "gpt2")
    (place / "long.txt").write_text("word " * 400)
    args = write(place, config(place / "gpt2", dataset="long.txt", max_length=512))
    fails(capsys, place, args, "max_length is 512", "256 positions")
    fails(capsys, place, args + ["--max_length", "64", "--eval_dataset", "python-docs"], "pieces of 512 tokens", "256 positions")


def test_odd_places(place, checkpoint, capsys):
    args = write(place, config(checkpoint))
    fails(capsys, place, args + ["--save_path", "texts.jsonl/out"], "texts.jsonl, which is a file")
    fails(capsys, place, args + ["--distances_path", "p.csv"], "must end in .json", command=cli.get_distance_analysis)
    fails(capsys, place, args + ["--distances_path", "texts.jsonl/p.json"], "which is a file", command=cli.get_distance_analysis)
    fails(capsys, place, args + ["--device_map", "warp9"], "device_map names 'warp9', which is no place")
    fails(capsys, place, args + ["--seed", str(2**70)], "seed is")


def test_as_a_user_sees_it(place):
    "One of them as a real process"
    exe = os.path.join(os.path.dirname(sys.executable), "run_replaceme")
    (place / "c.yaml").write_text("layers_to_skp: 6\n")
    p = subprocess.run([exe, "--config", "c.yaml"], capture_output=True, text=True)
    assert (p.returncode, p.stdout) == (2, "")
    assert p.stderr == ("run_replaceme: error: config c.yaml: unknown key 'layers_to_skp'. Did you mean 'layers_to_skip'? "
                        f"The known keys are listed by --help.\nhelp: {help_page('config')}\n")


# what YAML takes for a number or a date, and cannot make into one

@pytest.mark.parametrize("text, parts", [
    ("seed: 0b_", ["'0b_' in line 1 is read as YAML's int", "quotes"]),
    ("alpha: 1\nseed: !!int abc", ["'abc' in line 2 is read as YAML's int", "quotes"]),
    ("seed: !!int ''", ["'' in line 1 is read as YAML's int"]),
    ("use_4bit: !!bool si", ["'si' in line 1 is read as YAML's bool"]),
    ("alpha: !!float six", ["'six' in line 1 is read as YAML's float"]),
    ("eval_split: !!timestamp soon", ["'soon' in line 1 is read as YAML's timestamp"]),
    ("seed: " + "1" * 5000, ["in line 1 is read as YAML's int"]),
    ("seed: 2024-02-30", ["seed is '2024-02-30'", "whole number"]),
    ("2024-02-30: 1", ["unknown key '2024-02-30'"]),
    ("blocks: " + "[" * 3000 + "]" * 3000, ["c.yaml", "nested too deep"])])
def test_a_value_that_yaml_cannot_build_is_one_line(place, capsys, text, parts):
    fails(capsys, place, write(place, text), "config c.yaml", *parts)


@pytest.mark.parametrize("flag, value, parts", [
    ("--ridge", "2024-02-30", ["ridge is 2024-02-30", "zero or positive, or auto"]),
    ("--layers", "2024-13-01", ["layers_to_skip is '2024-13-01'"]),
    ("--seed", "0b_", ["seed is '0b_'", "whole number"]),
    ("--seed", "!!int abc", ["seed is '!!int abc'", "whole number"]),
    ("--blocks", "[0b_, 3]", ["--blocks '[0b_, 3]' cannot be read", "'0b_' in line 1 is read as YAML's int"]),
    ("--blocks", "[" * 3000, ["--blocks", "cannot be read", "nested too deep"]),
    ("--tasks", "{a: 1, a: 2}", ["--tasks '{a: 1, a: 2}' cannot be read", "the key 'a' stands twice"]),
    ("--dataset", "2024-02-30", ["dataset 2024-02-30", "no such data set"])])
def test_a_flag_that_yaml_cannot_build_is_one_line(place, checkpoint, capsys, flag, value, parts):
    fails(capsys, place, [*write(place, config(checkpoint)), flag, value], *parts)


def test_a_date_is_the_text_that_it_is(place):
    (place / "c.yaml").write_text("eval_split: 2024-13-45\ndataset_split: 2024-02-03\ndataset: [2024-02-03, 2024-02-30]\n")
    cfg, _ = cli.parse("x", "", ["--config", "c.yaml", "--dataset_subset", "2024-02-03"], {})
    assert (cfg.eval_split, cfg.dataset_split, cfg.dataset_subset) == ("2024-13-45", "2024-02-03", "2024-02-03")
    assert cfg.dataset == ["2024-02-03", "2024-02-30"]
    again = yaml.safe_dump(dataclasses.asdict(cfg))
    (place / "again.yaml").write_text(again)
    assert read_config("again.yaml") == cfg
