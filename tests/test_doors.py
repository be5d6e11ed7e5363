"""What `from replaceme import ...` opens, in whatever order, and the command that brings the examples to whoever has no clone."""
import itertools
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def python(code, cwd=ROOT, **env):
    p = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})
    assert p.returncode == 0, p.stderr
    return p.stdout


def test_importing_the_package_loads_nothing():
    "Neither torch nor any room; the names are there to be seen all the same"
    out = python("import sys, replaceme; print([m for m in sys.modules if m.startswith(('torch', 'transformers', 'replaceme.'))]); print(dir(replaceme))")
    loaded, names = out.splitlines()
    assert loaded == "[]" and all(f"'{n}'" in names for n in ("prune", "load_model", "run", "compare", "evaluate", "__version__"))


def test_doors_are_those_of_their_rooms():
    "And a result that is read back has all that one has which was just made"
    python("from replaceme.doors import Result; assert callable(Result.plot) and callable(Result.save_report)")
    python("from replaceme import *; import replaceme.models as m, replaceme.pipeline as p, replaceme.doors as d\n"
           "assert load_model is m.load_model and prune is p.prune and run is d.run and callable(compare) and callable(evaluate)")


FOUND = {  # how a name is come by, and what must then hold
    "door": "from replaceme import NAME as door; assert callable(door)",
    "attribute": "import replaceme; assert callable(replaceme.NAME)",
    "room": "import replaceme.NAME; assert replaceme.NAME.SOMETHING",
    "renamed": "import replaceme.NAME as room; assert room.SOMETHING and callable(room)",
    "inside": "from replaceme.NAME import SOMETHING",
    "above": "import replaceme.compare",  # which imports the other one by itself
}
WHOLE = "import replaceme.NAME, sys; assert replaceme.NAME is sys.modules['replaceme.NAME'] and callable(replaceme.NAME) and replaceme.NAME.SOMETHING"


@pytest.mark.parametrize("name, something", [("evaluate", "perplexity"), ("compare", "Comparison")])
def test_a_door_and_a_room_of_one_name_stand_in_any_order(name, something):
    "All orders of two ways, each in a process of its own that has seen nothing (a fork, so that what the rooms stand on is imported once)"
    def written(*ways):
        return "\n".join([FOUND.get(w, w) for w in ways]).replace("NAME", name).replace("SOMETHING", something)
    codes = [written(*pair, WHOLE) for pair in itertools.permutations(FOUND, 2)]
    code = f"""
import os, sys
for code in {codes!r}:
    if (child := os.fork()) == 0:
        try: exec(code, {{}})
        except BaseException as e: print(code, repr(e), file=sys.stderr, flush=True); os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, code
"""
    p = warm.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, fresh=True)
    assert p.returncode == 0, p.stderr


def test_a_door_that_becomes_a_room_stays_a_door(tmp_path):
    "Of any name, not of those two alone"
    code = "import sys, types, replaceme; replaceme.run = types.ModuleType('replaceme.run'); assert callable(replaceme.run)"
    python(code + "; replaceme.other = types.ModuleType('other'); assert not callable(replaceme.other)")


def test_the_doors_take_keys_a_file_or_both(save_tiny, tmp_path, monkeypatch):
    import yaml

    from replaceme import compare, evaluate, run
    from replaceme.config import read_config
    from replaceme.core import ReplaceMeError
    monkeypatch.chdir(save_tiny(tmp_path))
    words = "The map stands in for the layers that went, one two three. " * 60
    Path("a.txt").write_text(words), Path("b.txt").write_text(words[7:])
    text = dict(model_path="./tiny", dataset="a.txt", dataset_size=8, max_length=32, eval_dataset="b.txt", eval_size=2, eval_length=32)
    Path("run.yaml").write_text("# mine\nlayers_to_skip: 2\nmethod: remove\n")
    result, path = run("run.yaml", save_path="out", prompt=None, **text)
    assert (path / "replaceme.yaml").is_file() and result["method"] == "remove"
    assert read_config(path / "replaceme.yaml").dataset == "a.txt" and "# mine" not in (path / "replaceme.yaml").read_text()
    Path("whole.yaml").write_text(Path("run.yaml").read_text() + yaml.safe_dump(dict(text, prompt=None, speed=False, save_path="flags")))
    assert "# mine" in (run("whole.yaml")[1] / "replaceme.yaml").read_text()  # it alone is what ran
    cfg = run("whole.yaml", layers_to_skip=3, method="lstsq", alpha=.1)[0].config
    cfg = {k: cfg[k] for k in ("layers_to_skip", "method", "alpha", "dataset")}
    again = read_config("flags/replaceme.yaml")  # keys have won over it
    assert cfg == dict(layers_to_skip=3, method="lstsq", alpha=.1, dataset="a.txt") == {k: getattr(again, k) for k in cfg}
    result, again = run(dict(text, prompt=None), layers_to_skip=2, method="remove", save_path="again")
    pair = evaluate(compare=["out", "again"], eval_dataset="b.txt", eval_size=2, eval_length=32, speed=False, prompt=None)
    assert pair.names
    Path("score.yaml").write_text("eval_dataset: b.txt\neval_size: 2\neval_length: 32\n")
    scores = evaluate(Path("score.yaml"), model_path="out")
    assert scores["perplexity"]["value"] == pytest.approx(result["perplexity"]["after"]["value"], rel=1e-4)
    comparison, _ = compare(layers=[2], methods=["remove"], save_path="rows", **text)
    assert [r["method"] for r in comparison.rows] == ["dense", "remove"]
    for wrong, said in ((dict(layers_to_skp=2), "layers_to_skip"), (dict(config=3), "YAML file"), (dict(config="none.yaml"), "none.yaml"),
                        (dict(dataset=[{"text": "x"}]), "rows"), (dict(config="run.yaml", metod="uidl"), "method")):
        with pytest.raises(ReplaceMeError, match=said):
            run(**wrong)
    with pytest.raises(ReplaceMeError, match="model in memory"):
        evaluate(object())


def scored(folder, method="auto", loss=3.5, dense=(3.0, 2.9), **keys):
    "What a run leaves, as far as a table reads it"
    import json
    folder.mkdir()
    both = {when: dict(value=1.0, loss=x, stderr=.1, losses=[x, x] if when == "after" else list(dense)) for when, x in (("before", 3.0), ("after", loss))}
    said = [dict(prompt="Why?", before="Because.", after=f"By {method}.")]
    d = dict(model="m", method=method, n_layers=dict(before=6, after=4), parameters=dict(before=10**6, after=8 * 10**5), generations=said,
             seconds=dict(load=100., fit=7., prove=1., texts=100.), perplexity=dict(text="t", **both)) | keys
    (folder / "replaceme.json").write_text(json.dumps(d))
    return str(folder)


def test_results_of_one_model_stand_in_one_table(tmp_path):
    "The dense model once, a row for each, the seconds of the pruning alone, and what each answers"
    from replaceme.doors import result_table
    a, b = scored(tmp_path / "a"), scored(tmp_path / "b", "lstsq", 3.75)
    table, answers = result_table(a, b).split("\n\n")
    rows = [line.split() for line in table.splitlines()[2:]]
    assert [r[0] for r in rows] == ["dense", "auto", "lstsq"] and [r[-1] for r in rows] == ["-", "8", "8"]
    assert [float(r[-4]) for r in rows] == [3.0, 3.5, 3.75]
    assert [line.split(": ")[1] for line in answers.splitlines()[1:]] == ["Because.", "By auto.", "By lstsq."]
    mute = scored(tmp_path / "mute", generations=[])
    assert "By auto." in result_table(a, mute) and result_table(mute, a).count("\n\n") == 0


@pytest.mark.parametrize("keys, said", [(dict(model="other"), "same dense model"), (dict(dense=(3.0, 2.8)), "same text"), (dict(dense=(3.0,)), "same text"),
                                        (dict(perplexity=None), "not scored"), (dict(parameters=None), "damaged"), (dict(perplexity={}), "damaged"), (dict(method=None, perplexity=dict(text="t", before=1)), "damaged")])
def test_results_that_cannot_be_compared_are_not(tmp_path, keys, said):
    scored(tmp_path / "a"), scored(tmp_path / "b", **keys)
    p = command("table", "a", "b", cwd=tmp_path)
    assert (p.returncode, p.stdout, len(p.stderr.splitlines())) == (2, "", 1) and said in p.stderr and "b" in p.stderr


@pytest.mark.parametrize("text", [None, "", "[]", "{", "{}", "\xff"])
def test_a_folder_without_a_result_is_named(tmp_path, text):
    (tmp_path / "a").mkdir()
    if text is not None:
        (tmp_path / "a/replaceme.json").write_bytes(text.encode("latin-1"))
    p = command("table", "a", cwd=tmp_path)
    assert (p.returncode, p.stdout, len(p.stderr.splitlines())) == (2, "", 1) and "a" in p.stderr


def command(*words, cwd):
    return warm.run([sys.executable, "-c", "from replaceme.doors import main; main()", *words], cwd=cwd, capture_output=True, text=True)


def test_examples_are_written_and_never_over_what_differs(tmp_path):
    p = command("examples", cwd=tmp_path)
    assert p.returncode == 0 and len(p.stdout.splitlines()) == len(EXAMPLES)
    assert {f.name: f.read_bytes() for f in (tmp_path / "examples").iterdir()} == {f.name: f.read_bytes() for f in EXAMPLES}
    p = command("examples", cwd=tmp_path)
    assert p.returncode == 0 and "already" in p.stdout
    mine = tmp_path / "examples/uidl.yaml"
    mine.write_text("model_path: mine\n")
    (tmp_path / "examples/evaluate.yaml").unlink()
    p = command("examples", cwd=tmp_path)
    assert (p.returncode, p.stdout, len(p.stderr.splitlines())) == (2, "", 1) and "uidl.yaml" in p.stderr
    assert mine.read_text() == "model_path: mine\n" and not (tmp_path / "examples/evaluate.yaml").exists()
    assert command("examples", "elsewhere", cwd=tmp_path).returncode == 0 and (tmp_path / "elsewhere/uidl.yaml").exists()


def folder(path): path.mkdir()
def binary(path): path.write_bytes(b"\xff\xfe\x00")
def nowhere(path): path.symlink_to("not/there")
def loop(path): path.symlink_to(path.name)


@pytest.mark.parametrize("stands", [folder, binary, nowhere, loop])
def test_whatever_stands_where_an_example_goes_is_not_ours(tmp_path, stands):
    (tmp_path / "examples").mkdir()
    stands(tmp_path / "examples/uidl.yaml")
    p = command("examples", cwd=tmp_path)
    assert (p.returncode, p.stdout, len(p.stderr.splitlines())) == (2, "", 1) and "uidl.yaml" in p.stderr
    assert len(list((tmp_path / "examples").iterdir())) == 1


@pytest.mark.parametrize("words", [(), ("exmaples",), ("examples", "a", "b"), ("examples", "file"), ("examples", "file/in"), ("examples", "--force")])
def test_a_mistake_is_one_line(tmp_path, words):
    (tmp_path / "file").write_text("")
    p = command(*words, cwd=tmp_path)
    assert (p.returncode, p.stdout, len(p.stderr.splitlines())) == (2, "", 1) and p.stderr.startswith("replaceme: error: ")


def test_the_wheel_has_the_examples(tmp_path):
    "Built without a network; unpacked, it writes them"
    if subprocess.run(["git", "-C", ROOT, "rev-parse"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    made = subprocess.run(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True).stdout.splitlines()
    src = tmp_path / "src"
    for name in made:
        if (ROOT / name).is_file() and not name.startswith(("nbs/", "tests/", "benchmarks/")):
            (src / name).parent.mkdir(parents=True, exist_ok=True)
            (src / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, src], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as z:
        assert [n for n in sorted(z.namelist()) if n.endswith(".yaml")] == [f"replaceme/examples/{f.name}" for f in EXAMPLES]
        assert b"replaceme = replaceme.doors:main" in z.read(next(n for n in z.namelist() if n.endswith("entry_points.txt")))
        z.extractall(tmp_path / "lib")
    python("from replaceme.doors import main; main(['examples'])", cwd=tmp_path, PYTHONPATH=str(tmp_path / "lib"))
    assert len(list((tmp_path / "examples").iterdir())) == len(EXAMPLES)


def test_the_examples_stand_once():
    "In the package; what lies at the top is a link to them"
    assert (ROOT / "examples").is_symlink() and (ROOT / "examples").resolve() == ROOT / "replaceme/examples"
