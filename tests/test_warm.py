"""A process that is forked is as one that is started."""
import os
import signal
import subprocess
import sys

import pytest
import warm

CODES = {
    "says": "import sys, os; print('out', sys.argv, os.getcwd(), os.environ['MARK'], __name__); print('err', file=sys.stderr); print(input())",
    "exits": "import sys; sys.exit(7)",
    "explains": "raise SystemExit('no such layer')",
    "fails": "1/0",
    "kills": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "cleans": "import atexit; atexit.register(print, 'bye')",
}


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_it_is_seen_as_an_ordinary_process(code, tmp_path):
    both = [run([sys.executable, "-c", code, "a", "b c"], cwd=tmp_path, env={**os.environ, "MARK": "x" * 9999}, input="in\n", capture_output=True, text=True)
            for run in (warm.run, subprocess.run)]
    a, b = ((p.returncode, p.stdout, p.stderr.splitlines()[-1:]) for p in both)
    assert a == b


def test_a_script_finds_what_lies_beside_it(tmp_path):
    (tmp_path / "beside.py").write_text("there = 1")
    (tmp_path / "script.py").write_text("import beside, sys; print(beside.there, sys.argv[1:], __file__)")
    a, b = (run([sys.executable, "script.py", "x"], cwd=tmp_path, capture_output=True, text=True).stdout for run in (warm.run, subprocess.run))
    assert a == b != ""


def test_it_can_be_killed_and_waited_for():
    p = warm.Popen([sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "here\n" and p.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        p.wait(.05)
    p.kill()
    assert p.wait() == -signal.SIGKILL and p.poll() == -signal.SIGKILL


def test_nothing_of_one_is_left_for_the_next():
    code = "import os, sys, torch; print(os.environ.get('MARK'), torch.initial_seed(), hasattr(sys, 'mark')); sys.mark = 1; torch.manual_seed(3)"
    said = [warm.run([sys.executable, "-c", code], env={**os.environ, "MARK": m}, capture_output=True, text=True).stdout.split() for m in "ab"]
    assert said[0][1:] == said[1][1:] and said[0][2] == "False" and [s[0] for s in said] == ["a", "b"]


def test_what_imports_read_makes_it_an_ordinary_process():
    p = warm.Popen([sys.executable, "-c", "import sys; print('torch' in sys.modules)"], env={**os.environ, "PYTHONPATH": "/nowhere"}, stdout=subprocess.PIPE, text=True)
    assert p.communicate()[0] == "False\n" and not p.warm
    assert warm.run([sys.executable, "-c", "import sys; print('torch' in sys.modules)"], capture_output=True, text=True).stdout == "True\n"


def test_a_fresh_one_has_seen_nothing_of_ours():
    code = "import sys; print(sorted({m.split('.')[0] for m in sys.modules} & {'replaceme', 'torch', 'transformers'}))"
    assert [warm.run([sys.executable, "-c", code], capture_output=True, text=True, fresh=fresh).stdout.strip() for fresh in (True, False, True)] == [
        "['torch', 'transformers']", "['replaceme', 'torch', 'transformers']", "['torch', 'transformers']"]
