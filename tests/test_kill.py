"""SIGKILL at random moments of one run, 16 of them or REPLACEME_KILLS: each time the whole folder or none, an untouched input, and a next run that ends well.

The file is its own script: a process that has everything imported forks the runs, since an import takes longer than a run. Half
of the kills are drawn over the time of a run, half over its steps on the disk, which lie close together around the saving.
"""
import gc
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

KILLS = int(os.environ.get("REPLACEME_KILLS", 16))
WHOLE = {"model.safetensors", "config.json", "tokenizer.json", "replaceme.json", "replaceme.yaml", "README.md", "report.html"}
STEPS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}  # and what is opened to be written


def watch(place, kill_at, note):
    "Count the steps on the disk; at one of them, end like somebody who is killed"
    done = [0]

    def hook(event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (event in STEPS or writes) and str(args[0]).startswith(place):
            done[0] += 1
            if done[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if note:
                os.pwrite(note, str(done[0]).encode(), 0)
    sys.addaudithook(hook)


def fork(run, kill_at=None, note=None):
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        watch(os.getcwd(), kill_at, note)
        run()
    except BaseException as e:
        print("failed:", type(e).__name__, e, file=sys.stdout, flush=True)
        os._exit(1)
    os._exit(0)


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(pid, seconds):
    "Kill a process once it has used so much of a processor; the clock on the wall would depend on who else is at work"
    used = 0
    while used < seconds and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(.002)
        used = sum(psutil.Process(pid).cpu_times()[:2])
    os.kill(pid, signal.SIGKILL)


def digest(folder):
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()


def whole(folder):
    "Everything is there, can be read, and is the pruned model"
    from safetensors.torch import load_file
    record = json.loads((folder / "replaceme.json").read_text(encoding="utf-8"))
    drawn = {"profile.png", "heatmap.png"} if record["distance"]["profile"] else set()  # where the blocks are given, nothing is measured
    return (WHOLE | drawn <= set(os.listdir(folder)) and len(load_file(folder / "model.safetensors")) == 39 and record["block"]
            and "</html>" in (folder / "report.html").read_text(encoding="utf-8") and (folder / "README.md").read_text(encoding="utf-8").endswith("\n"))


def left(known=()):
    "What nobody wants: hidden folders and files, in the place, in the cache and where temporary files go"
    return [str(p) for p in Path().rglob("*") if ".partial-" in p.name] + [f for f in os.listdir("tmp") if f not in known]


def main(seed=0):
    import torch
    import tqdm.auto
    from replaceme.pipeline import make_config, run
    torch.set_num_threads(1)
    tqdm.auto.tqdm.monitor_interval = 0  # no thread, since this process forks
    keys = dict(model_path="tiny", method="lstsq", dataset="self", dataset_size=8, max_length=32, prompt=None, save_path="out")
    full = make_config(**keys, layers_to_skip=2, eval_size=1, eval_length=32)  # scored when it is in its place
    short = make_config(**keys, blocks=[[2, 4]], eval_dataset=None)
    run(full)  # whatever is imported late
    run(short)
    gc.collect()
    gc.freeze()  # or every fork would look through all that is imported, and copy it
    before, draw, known = digest("tiny"), random.Random(seed), os.listdir("tmp")  # torch has a cache there
    note = os.open("steps", os.O_RDWR | os.O_CREAT)
    _, code, used = os.wait4(fork(lambda: run(full), note=note), 0)
    assert code == 0
    seconds, steps, i, killed = used.ru_utime + used.ru_stime, int(os.pread(note, 9, 0)), 0, 0
    subprocess.run(["rm", "-r", "out"], check=True)
    note = os.open("alone", os.O_RDWR | os.O_CREAT)
    assert wait(fork(lambda: run(full), note=note)) == 0
    alone = int(os.pread(note, 9, 0))
    while killed < KILLS:
        older = i % 4 < 2
        if not older:
            os.rename("out", "gone")
            subprocess.run(["rm", "-r", "gone"], check=True)
        if i % 3 == 0:
            subprocess.run(["rm", "-rf", "cache"], check=True)  # the model writes its texts anew
        at = draw.randint(1, steps) if i % 2 else None
        if i % 8 == 7:  # among the last steps where nothing was before: the folder is in its place, and scores are written
            at = draw.randint(alone - 5, alone)
        pid = fork(lambda: run(full), at)
        if at is None:
            kill_after(pid, draw.uniform(0, seconds))
        said = dict(kill=i, code=wait(pid), at=at, older=older, there=os.path.exists("out"), hidden=len(left(known)))
        said["whole"] = not said["there"] or bool(whole(Path("out")))
        said["next"] = wait(fork(lambda: run(short)))
        said |= dict(after=bool(whole(Path("out"))), left=left(known), input=digest("tiny") == before)
        print(json.dumps(said), flush=True)
        i, killed = i + 1, killed + (said["code"] == -signal.SIGKILL)


@pytest.mark.minutes
def test_killed_at_many_moments(tmp_path, save_tiny):
    save_tiny(tmp_path)
    (tmp_path / "tmp").mkdir()
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "REPLACEME_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    p = subprocess.run([sys.executable, __file__], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert p.returncode == 0 and "failed" not in p.stdout, p.stdout[-2000:] + p.stderr[-2000:]
    kills = [json.loads(line) for line in p.stdout.splitlines() if line.startswith("{")]
    for k in kills:
        assert k["whole"] and k["next"] == 0 and k["after"] and k["left"] == [] and k["input"], k
        assert k["code"] in (0, -signal.SIGKILL), k
    killed = [k for k in kills if k["code"]]
    assert len(killed) == KILLS  # others came too late
    new = [k["there"] for k in killed if not k["older"]]
    assert any(new) and not all(new) and any(k["hidden"] for k in killed)  # before the folder was there, behind, and in between


if __name__ == "__main__":
    main()
