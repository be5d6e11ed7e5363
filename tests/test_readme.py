"""What the README tells people to type is run, in small doses."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [line.split(" #")[0].strip() for block in re.findall(r"^``` ?sh\n(.*?)^```", README, re.M | re.S) for line in block.splitlines()]
TYPED = [line for line in LINES if line] + re.findall(r"`(make \w+)`", README)
TEXT = ["--dataset", "python-docs", "--dataset_size", "40", "--max_length", "64", "--eval_size", "2", "--eval_length", "64", "--prompt", "null"]
SMALL = ["--eval_size", "2", "--eval_length", "64", "--prompt", "null", "--cache", "false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder as a clone is, to write into"
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "examples", place / "examples")
    return place


def call(place, *words, **env):
    p = subprocess.run(words, cwd=place, capture_output=True, text=True, env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **env})
    assert p.returncode == 0, p.stdout[-2000:] + p.stderr[-3000:]
    return p.stdout


def test_run_replaceme(place):
    words = next(shlex.split(t) for t in TYPED if t.startswith("run_replaceme"))
    out = call(place, *words, *TEXT, "--dataset_shares", "null", "--select", "distance", "--refit", "0", "--layers", "6", "--save_path", "pruned/smollm2-135m-minus6")
    assert "report   pruned/smollm2-135m-minus6/report.html" in out


def test_evaluate_model(place):
    "On the two models that the README names: the one pruned above stands where the demo's does"
    words = next(shlex.split(t) for t in TYPED if t.startswith("evaluate_model"))
    if not (place / words[-1]).exists():
        test_run_replaceme(place)
    out = call(place, *words, *SMALL)
    assert all(w in out for w in ("parameters", "perplexity", "tokens per second", "KV cache"))


def test_compare_methods(place):
    words = next(shlex.split(t) for t in TYPED if t.startswith("compare_methods"))
    out = call(place, *words, *TEXT[:-2], "--methods", "[uidl]", "--layers", "[3]")
    assert "uidl" in out and (place / "compared/smollm2/pareto.png").exists()


def test_pip_install(tmp_path):
    "pip gets this very repository by git, without what it stands on"
    words = next(shlex.split(t) for t in TYPED if t.startswith("pip install"))
    assert words[2].startswith("git+https://")
    if subprocess.run(["git", "-C", ROOT, "rev-parse"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    call(tmp_path, sys.executable, "-m", "pip", *words[1:2], "-q", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "lib"), f"git+file://{ROOT}")
    assert (tmp_path / "lib/replaceme/pipeline.py").exists() and (tmp_path / "lib/bin/run_replaceme").exists()


@pytest.mark.skipif(not (ROOT / ".venv/.library").exists(), reason="make would build an environment here: run make test")
def test_make(place, tmp_path):
    "The demo in a small dose; `make test` is what runs this, and is only looked at"
    wanted = {t for t in TYPED if t.startswith("make ")}
    assert wanted == {"make demo", "make test"}
    flags = " ".join([*TEXT, "--save_path", str(tmp_path / "out")])
    out = call(ROOT, "make", "demo", f"FLAGS={flags}")
    assert "run_replaceme --config examples/smollm2_lstsq.yaml" in out and (tmp_path / "out/report.html").exists()
    assert "-m pytest tests" in call(ROOT, "make", "-n", "test") and re.search(r"^make test$", (ROOT / ".ci/run").read_text(), re.M)


def test_nothing_typed_is_left_out():
    known = ("run_replaceme", "evaluate_model", "compare_methods", "pip install", "make demo", "make test")
    assert [t for t in TYPED if not t.startswith(known)] == [] and all(any(t.startswith(k) for t in TYPED) for k in known)


def test_it_fits_on_a_screen():
    "Lines of text as a page of 100 characters shows them, a picture as fifteen of them"
    text = re.sub(r"\]\([^)]*\)", "]", README)
    rows = sum(max(1, -(-len(line) // 100)) for line in text.splitlines() if line.strip() and not line.startswith("<!--"))
    assert rows + 15 * README.count("![") <= 75, rows


def test_it_shows_a_picture_of_a_real_result():
    alt, path = re.search(r"!\[(.*?)\]\((\S+?)\)", README).groups()
    assert len(alt) > 20 and (ROOT / path).stat().st_size > 5000
