"""Killed at any moment, there is either the whole folder or none."""
import json
import os
import signal
import subprocess
import sys

import pytest
import warm


# Runs the real recipe, but stops and waits to be killed when the named function of the pipeline is reached.
SCRIPT = """
import sys, time
import replaceme.pipeline as p
stop, after = sys.argv[1], sys.argv[2]=='after'
real = getattr(p, stop)
def wait(*a, **k):
    res = real(*a, **k) if after else None
    print('HERE', flush=True); time.sleep(600)
setattr(p, stop, wait)
p.run(p.read_config('c.yaml'))
"""


@pytest.fixture
def place(tmp_path, save_tiny):
    save_tiny(tmp_path)
    (tmp_path / "texts.txt").write_text("The map stands in for the layers that went. " * 40)
    (tmp_path / "c.yaml").write_text("{model_path: ./tiny, dataset: texts.txt, max_length: 64, layers_to_skip: 2, "
                                     "eval_dataset: null, save_path: out}")
    return tmp_path


def kill_at(place, name, when):
    p = warm.Popen([sys.executable, "-c", SCRIPT, name, when], cwd=place, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "HERE\n"
    p.send_signal(signal.SIGKILL)
    p.wait()


def complete(folder):
    names = set(os.listdir(folder))
    return {"model.safetensors", "config.json", "tokenizer.json", "replaceme.json", "replaceme.yaml", "report.html", "README.md",
            "profile.png"} <= names and json.loads((folder / "replaceme.json").read_text())["block"]


@pytest.mark.parametrize("name, when", [("calibrate", "after"), ("reload", "before"), ("write_provenance", "before"),
                                        ("write_provenance", "after")])
def test_killed(place, name, when):
    kill_at(place, name, when)
    assert not (place / "out").exists()
    warm.run([sys.executable, "-c", "import replaceme.pipeline as p; p.run(p.read_config('c.yaml'))"], cwd=place, check=True)
    assert complete(place / "out")
    assert not [f for f in os.listdir(place) if "partial" in f]  # what the killed run left is swept away


def test_killed_over_an_older_result_leaves_the_older_one(place):
    warm.run([sys.executable, "-c", "import replaceme.pipeline as p; p.run(p.read_config('c.yaml'))"], cwd=place, check=True)
    before = (place / "out/replaceme.json").read_text()
    kill_at(place, "write_provenance", "after")
    assert complete(place / "out") and (place / "out/replaceme.json").read_text() == before
