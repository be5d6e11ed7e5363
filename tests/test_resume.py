"""SIGKILL at random moments of a calibration, of one process and of two: the same command goes on from what was noted, to the same bits.

The file is its own script, as `test_kill.py` is: a process that has everything imported forks the runs.
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
import warnings
from pathlib import Path

import pytest
import torch

KILLS = int(os.environ.get("REPLACEME_KILLS", 12))
SECONDS = 120  # a run that takes longer hangs
NOTES = "resume"


def fork(run, rank=0, n=1, port=0, kill_at=None):
    "A run, which is killed when it has made so many notes"
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.dup2(os.open(f"said{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        done = [0]

        def hook(event, args):
            if event == "os.rename" and f"/{NOTES}/" in str(args[1]):
                done[0] += 1
                if done[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        run()
    except BaseException as e:
        print(type(e).__name__, e, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def wait(pids):
    "Exit statuses; a hang is a failure"
    end, codes = time.time() + SECONDS, {}
    while len(codes) < len(pids):
        for p in pids:
            if p not in codes and (found := os.waitpid(p, os.WNOHANG))[0]:
                codes[p] = os.waitstatus_to_exitcode(found[1])
        if time.time() > end:
            for p in pids:
                os.kill(p, signal.SIGKILL)
            raise SystemExit("a run hangs")
        time.sleep(.01)
    return [codes[p] for p in pids]


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def digest():
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(Path("out").glob("*.safetensors")))).hexdigest()


def main(seed=0):
    import tqdm.auto

    from replaceme.group import grouped
    from replaceme.pipeline import make_config, run
    torch.set_num_threads(1)
    tqdm.auto.tqdm.monitor_interval = 0  # no thread, since this process forks
    cfg = make_config(model_path="tiny", method="auto", layers_to_skip=2, dataset="texts.txt", dataset_size=24, max_length=32, batch_size=2,
                      save_path="out", eval_dataset=None, prompt=None, speed=False, resume_every=0)

    def one():
        with grouped():
            run(cfg)
    one()
    bits, draw = {1: digest()}, random.Random(seed)
    gc.collect()
    gc.freeze()

    def start(n, kill_at=None, which=0):
        port = free_port()
        return [fork(one, r, n, port, kill_at if r == which else None) for r in range(n)]

    begun = time.time()
    assert wait(start(2)) == [0, 0]
    bits[2], took = digest(), time.time() - begun
    for i in range(KILLS):
        n, moment = 1 + i % 2, draw.uniform(0, took)
        pids = start(n, draw.randint(1, 30) if i % 3 else None, draw.randrange(n))
        if not i % 3:
            time.sleep(moment)
            victim = draw.choice(pids)
            if not os.waitid(os.P_PID, victim, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                os.kill(victim, signal.SIGKILL)
        codes = wait(pids)
        noted = len([*Path("cache").glob(f"{NOTES}/*/*.safetensors")])
        said = dict(kill=i, processes=n, codes=codes, noted=noted, again=wait(start(n)), same=digest() == bits[n])
        said |= dict(went_on="goes on from what the same command" in Path("said0").read_text(), left=os.listdir(f"cache/{NOTES}"))
        print(json.dumps(said), flush=True)


@pytest.mark.minutes
def test_killed_at_random_moments_it_ends_in_the_same_bits(tmp_path, save_tiny):
    save_tiny(tmp_path)
    (tmp_path / "texts.txt").write_text(" ".join(f"The map number {i} stands in for {i * i} layers that went, nearly." for i in range(300)))
    env = {**os.environ, "REPLACEME_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    p = subprocess.run([sys.executable, __file__], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout[-2000:] + p.stderr[-2000:]
    kills = [json.loads(line) for line in p.stdout.splitlines() if line.startswith("{")]
    assert len(kills) == KILLS
    for k in kills:
        assert set(k["again"]) == {0} and k["same"] and k["left"] == [], k
        assert k["went_on"] == (k["noted"] > 0), k
    killed = [k for k in kills if -signal.SIGKILL in k["codes"]]
    assert len(killed) > KILLS / 2 and {k["processes"] for k in killed if k["noted"]} == {1, 2}
    assert all(set(k["codes"]) <= {-signal.SIGKILL, 1} for k in killed)  # who has lost another ends, too


# what is made again, and what is not

@pytest.fixture
def place(tmp_path, save_tiny, monkeypatch):
    save_tiny(tmp_path)
    (tmp_path / "texts.txt").write_text(" ".join(f"The map number {i} stands in for {i * i} layers that went, nearly." for i in range(300)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    return tmp_path


class Killed(BaseException):
    pass


def stopped_at(monkeypatch, nth, run):
    "Run, stopped behind the batch that is the nth; the batches that went through the model"
    from replaceme import stats
    seen, plain = [], stats.add_chunk

    def counting(model, chunk, *a, **k):
        if len(seen) == nth:
            raise Killed
        seen.append(tuple(chunk[0][1]["input_ids"][0].tolist()))
        return plain(model, chunk, *a, **k)
    monkeypatch.setattr(stats, "add_chunk", counting)
    try:
        run()
    except Killed:
        pass
    monkeypatch.setattr(stats, "add_chunk", plain)
    return seen


KEYS = dict(model_path="tiny", method="lstsq", layers_to_skip=2, dataset="texts.txt", dataset_size=12, max_length=24, batch_size=2, save_path="out",
            eval_dataset=None, prompt=None, speed=False)


@pytest.mark.parametrize("more", [{}, dict(stream_weights=True, stream_tokens=96), dict(map="wide"), dict(select="loss", ridge="auto"), dict(num_A=2, layers_to_skip=1)],
                         ids=str)
def test_no_batch_goes_through_twice(place, monkeypatch, more):
    from replaceme.pipeline import make_config, run
    def go():
        run(make_config(**{**KEYS, "resume_every": 0, **more}))
    whole = stopped_at(monkeypatch, None, go)
    bits = digest()
    for nth in range(1, len(whole), 3):
        first = stopped_at(monkeypatch, nth, go)
        with pytest.warns(UserWarning, match="goes on from what the same command"):
            rest = stopped_at(monkeypatch, None, go)
        assert first + rest == whole and digest() == bits
    assert not [*(place / "cache/resume").iterdir()]


STATES = dict(method="auto", top_k=2, refit=2)
STREAMED = dict(**STATES, borrow=False, stream_weights=True, stream_tokens=400)


def worked(monkeypatch, watched, nth=None, more=STATES):
    "Run, stopped where the nth call of the watched functions, `(module, name, what is told of a call)`, would begin; what was told"
    from replaceme.pipeline import make_config, run
    seen = []

    def counting(plain, tell):
        def call(*a, **k):
            if len(seen) == nth:
                raise Killed
            seen.append(tell(*a, **k))
            return plain(*a, **k)
        return call
    with monkeypatch.context() as m:
        for module, name, tell in watched:
            m.setattr(module, name, counting(getattr(module, name), tell))
        try:
            run(make_config(**{**KEYS, "resume_every": 0, **more}))
        except Killed:
            pass
    return seen


def walked(monkeypatch, nth=None, more=STATES):
    "The batches that were walked around the block"
    from replaceme import states
    tell = lambda dense, model, batches, *a: tuple(i for b in batches for i in b["input_ids"].flatten().tolist())  # noqa: E731
    return worked(monkeypatch, [(states, "_ends_of", tell)], nth, more)


@pytest.mark.filterwarnings("ignore:this run goes on")
@pytest.mark.parametrize("more", [STATES, STREAMED], ids=["in memory", "from the disk"])
def test_states_around_a_block_are_gone_on_with(place, monkeypatch, more):
    "auto looks four times at the same states: the models are walked through once, also after a kill"
    whole = walked(monkeypatch, None, more)
    bits = digest()
    assert len(whole) == len(set(whole)) > 2
    for nth in range(1, len(whole), 2):
        assert walked(monkeypatch, nth, more) + walked(monkeypatch, None, more) == whole and digest() == bits


@pytest.mark.filterwarnings("ignore:this run goes on")
@pytest.mark.parametrize("spoil", ["changed", "short", "gone"])
def test_damaged_states_are_walked_anew(place, monkeypatch, spoil):
    whole = walked(monkeypatch)
    bits = digest()
    walked(monkeypatch, 3)
    file = next((place / "cache/resume").glob("*/*.enter"))
    data = bytearray(file.read_bytes())
    if spoil == "changed":
        data[len(data) // len(whole) + 999] ^= 64  # in the second batch
        file.write_bytes(data)
    elif spoil == "short":
        file.write_bytes(data[:100])
    else:
        file.unlink()
    assert walked(monkeypatch) == whole[{"changed": 1, "short": 0, "gone": 0}[spoil]:] and digest() == bits


def behind():
    "The pieces of work behind the walk: neurons, matrices behind the cut, losses of their steps"
    from replaceme import borrow, search
    return [(borrow, "_lent", lambda *a: ("neurons",)), (search, "_refit", lambda one, cut, point, weights: ("matrix", point.name)),
            (search, "outcome", lambda dense, model, held, desc="": ("loss", desc))]


@pytest.mark.filterwarnings("ignore:this run goes on")
@pytest.mark.parametrize("more", [STATES, dict(method="auto", num_A=2, layers_to_skip=1, refit=1, merge_consecutive=False), STREAMED],
                         ids=["one block", "two blocks", "from the disk"])
def test_neurons_and_refits_are_gone_on_with(place, monkeypatch, more):
    "Each of them is found once, whatever moment the run is stopped at, and the last bit is the same"
    whole = worked(monkeypatch, behind(), None, more)
    bits = digest()
    kinds = {"matrix", "loss"} | ({"neurons"} if more is not STREAMED else set())
    assert {name for name, *_ in whole} == kinds and len(whole) >= 10
    for nth in range(1, len(whole), 4):
        assert worked(monkeypatch, behind(), nth, more) + worked(monkeypatch, behind(), None, more) == whole and digest() == bits


def test_another_configuration_text_or_model_begins_anew(place, monkeypatch):
    from replaceme.models import load_model
    from replaceme.pipeline import make_config, run
    def go(**more):
        run(make_config(**{**KEYS, "resume_every": 0, **more}))
    whole = stopped_at(monkeypatch, None, go)
    assert len(stopped_at(monkeypatch, 4, go)) == 4
    others = [lambda: go(metric="cosine"), lambda: go(dataset_size=11), lambda: go(save_path="other")]
    for other in others:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert len(stopped_at(monkeypatch, None, other)) >= len(whole) - 1
    (place / "texts.txt").write_text((place / "texts.txt").read_text()[::-1])  # the same name, other text
    assert len(stopped_at(monkeypatch, None, go)) == len(whole)
    assert len(stopped_at(monkeypatch, 4, go)) == 4
    model, tok = load_model("tiny")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    model.save_pretrained("tiny")
    assert len(stopped_at(monkeypatch, None, go)) == len(whole)


@pytest.mark.filterwarnings("ignore:this run goes on")
@pytest.mark.parametrize("more", [dict(select="loss", top_k=4, ridge=.01), dict(layers_to_skip=1, num_A=2, ridge="auto")], ids=["candidates", "blocks"])
def test_what_was_judged_on_texts_that_stayed_is_not_believed_when_others_changed(place, monkeypatch, more):
    "A held-out loss depends on the texts that were fitted to, and a second block on the map of the first"
    from replaceme import pipeline
    from replaceme.pipeline import make_config, run
    rows = [" ".join(f"The map number {i*j} stands in for {i + j} layers." for j in range(9)) for i in range(40)]

    def write(rows):
        Path("texts.jsonl").write_text("".join(json.dumps(dict(text=r)) + "\n" for r in rows))

    def go():
        run(make_config(**{**KEYS, "dataset": "texts.jsonl", "dataset_size": 40, "resume_every": 0, **more}))
        return digest()

    def end(*args):
        raise Killed
    write(rows)
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(pipeline, "make_result", end)
        go()
    assert [*Path("cache").glob(f"{NOTES}/*/*.safetensors")]
    write([r.upper()[::-1] for r in rows[:35]] + rows[35:])
    found = go()
    monkeypatch.setenv("REPLACEME_CACHE", str(place / "other"))
    assert found == go()


@pytest.mark.parametrize("spoil", [lambda f: f.write_bytes(f.read_bytes()[:-9]), lambda f: f.write_bytes(b""), lambda f: f.unlink()], ids=["cut", "empty", "gone"])
def test_a_damaged_note_costs_its_pass(place, monkeypatch, spoil):
    from replaceme.pipeline import make_config, run
    def go():
        run(make_config(**KEYS, resume_every=0))
    whole = stopped_at(monkeypatch, None, go)
    bits = digest()
    stopped_at(monkeypatch, 4, go)
    for f in (place / "cache/resume").rglob("*.safetensors"):
        spoil(f)
    assert stopped_at(monkeypatch, None, go) == whole and digest() == bits


def test_nothing_is_noted_before_it_is_due_or_where_that_is_not_wanted(place, monkeypatch):
    from replaceme.pipeline import make_config, run
    for every in (60, None):
        stopped_at(monkeypatch, 4, lambda every=every: run(make_config(**KEYS, resume_every=every)))
        assert not [*(place / "cache").rglob("resume/*/*.safetensors")]


@pytest.mark.parametrize("more", [{}, STATES], ids=["sums", "states"])
def test_a_cache_that_cannot_be_written_costs_nothing_but_the_notes(place, monkeypatch, more):
    from replaceme.pipeline import make_config, run
    (place / "cache").mkdir(exist_ok=True)
    (place / "cache/resume").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="a note to go on from could not be made"):
        run(make_config(**{**KEYS, "resume_every": 0, **more}))
    assert (place / "out/model.safetensors").exists()


def test_a_profile_goes_on_too(place, monkeypatch):
    from replaceme.pipeline import AnalyseConfig, analyse, make_config
    keys = {k: v for k, v in KEYS.items() if k in ("model_path", "dataset", "dataset_size", "max_length", "batch_size")}
    def go():
        return analyse(make_config(AnalyseConfig, **keys, distances_path="p.json", resume_every=0))
    whole = stopped_at(monkeypatch, None, go)
    said = (place / "p.json").read_text()
    first = stopped_at(monkeypatch, 3, go)
    assert first + stopped_at(monkeypatch, None, go) == whole and (place / "p.json").read_text() == said


if __name__ == "__main__":
    main()
