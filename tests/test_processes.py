"""Several processes share the texts: the same block, sums and weights as one, whatever the number of texts; and what ends one ends all."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm
from safetensors.torch import load_file

from replaceme import cli
from replaceme.group import Parted, grouped, my_share, world

SECONDS = 240  # a run that takes longer hangs
SCRIPT = '''
import sys, warnings
import torch
from replaceme.arch import fold_points, layers_of
from replaceme.borrow import borrow
from replaceme.baselines import influences, laco, magnitudes, rotation
from replaceme.blocks import Block, candidates
from replaceme.data import own_texts
from replaceme.distance import Profile
from replaceme.divergence import divergence
from replaceme.evaluate import batch_loss, perplexity
from replaceme.group import grouped, is_first
from replaceme.llm_pruner import gradients
from replaceme.models import tiny_model, tiny_tokenizer
from replaceme.search import HeldOut, Recipe, fit_between, fit_blocks, outcome
from replaceme.slicegpt import stream_sums
from replaceme.stats import Features, collect_between, measure
from replaceme.stream import find_stream


def batches(n, seed=0, size=2):
    "n texts of 5 to 20 tokens, in batches of two with padding on the left"
    gen = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 300, (5 + (7*i) % 16,), generator=gen) for i in range(n)]
    def pad(part):
        m = max(map(len, part))
        ids = torch.stack([torch.cat([torch.zeros(m-len(r), dtype=torch.long), r]) for r in part])
        mask = torch.stack([torch.cat([torch.zeros(m-len(r), dtype=torch.long), torch.ones_like(r)]) for r in part])
        return dict(input_ids=ids, attention_mask=mask)
    return [pad(rows[i:i+size]) for i in range(0, n, size)]


def gram(g): return [g.XtX, g.XtR, g.RtR, g.n]


def everything(n):
    "What calibrations and scores find on n texts"
    model, tok, bs, held = tiny_model('llama', layers=6), tiny_tokenizer(), batches(n), HeldOut([batches(2, 1), batches(1, 2)])
    other, blocks, res = tiny_model('llama', layers=6, seed=5), candidates(6, 2), {}
    for wide in (False, True):
        p = Profile(6, 'cosine', 'all' if wide else 'last')
        points = {}
        found = measure(model, bs, blocks, p, Features(wide=wide, weights='inv_norm'), k=2, held=held)
        res[f'measured {wide}'] = [[b.start for _, b in found.ranked], p.mean, p.stderr, p.norms, p.texts,
                                   *(gram(found.sums[b]) + gram(found.held[b]) for _, b in found.ranked[:2])]
    points = [fold_points(model, [1])[1]]
    res['between'] = gram(collect_between(model, model, bs, points, 2, 4))
    res['influence'], res['magnitudes'] = influences(model, bs), magnitudes(model, bs, Block(2, 4), rotation(32)[0])
    res['components'] = stream_sums(model, find_stream(model), bs)
    res['merges'] = [[t['layer'], t['cosine'], t['accepted']] for t in laco(model, bs, 2, threshold=-.9)[1].tries]
    texts = [r[m.bool()] for b in bs for r, m in zip(b['input_ids'], b['attention_mask'])]
    params = dict(list(model.named_parameters())[1:4])
    res['gradients'] = [g.double() for g in gradients(model, params, texts).values()]
    ids = torch.cat([t[:5] for t in texts])[:5*(n//1)].view(-1, 5)
    res['losses'] = perplexity(model, tok, ids).losses
    res['held loss'] = batch_loss(model, bs), outcome(model, other, held)
    d = divergence(model, other, tok, ids)
    res['divergence'] = [d.kl, d.losses, d.other_losses]
    for solver, more in dict(irls={}, adam=dict(epochs=2, batch=16, lr=1e-2, l2=1e-3, accurate=True), cg=dict(max_iter=3)).items():
        with warnings.catch_warnings(action='ignore'):
            r = Recipe(solver=solver, options=dict(dict(loss='cosine'), **more) if solver!='irls' else dict(ridge=.1))
            res[solver] = fit_between(model, model, bs, [], Block(2, 4), 2, r).T
    r = Recipe(map='wide', ridge=.1, refit=2, weights='inv_norm')
    res['refitted'] = [p.double() for p in fit_blocks(model, bs, held, [Block(2, 4)], r).model.parameters()]
    lent = borrow(model, model, bs, 2, Block(2, 4))
    res['borrowed'] = [*lent[1].of.items(), lent[1].removal_error, *(p.double() for p in lent[0].parameters())]
    res['own texts'] = [t.ids for t in own_texts(model, tok, 5, 24)]
    return res


if __name__=='__main__':
    torch.set_grad_enabled(False)
    with grouped():
        found = everything(int(sys.argv[1]))
        if is_first(): torch.save(found, sys.argv[2])
'''


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(n, *cmd, cwd, **env):
    "n processes of a command, as a launcher starts them"
    common = {**os.environ, "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
              "REPLACEME_CACHE": str(cwd / "cache"), "COLUMNS": "200", **env}
    return [warm.Popen(cmd, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env={**common, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(n)]


def ended(ps):
    "[(exit status, stdout, stderr)] of all; a hang is a failure"
    try:
        found = [p.communicate(timeout=SECONDS) for p in ps]
        return [(p.returncode, *f) for p, f in zip(ps, found)]
    finally:
        for p in ps:
            p.kill()


def launch(n, *cmd, cwd, **env):
    found = ended(start(n, *cmd, cwd=cwd, **env))
    assert all(code == 0 for code, *_ in found), found
    return found


def told(found):
    "What the processes say of errors: bars and torch's own remarks are no lines of ours"
    return [line for *_, err in found for line in re.split(r"[\r\n]", err) if "error:" in line]


def flat(o):
    "A result as tensors of float64, and everything else"
    if isinstance(o, torch.Tensor):
        return [o.double()]
    if isinstance(o, dict):
        o = list(o.values())
    return [x for v in o for x in flat(v)] if isinstance(o, (list, tuple)) else [torch.tensor(float(o)).double()]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    place, known = tmp_path_factory.mktemp("everything"), {}
    (place / "script.py").write_text(SCRIPT)

    def found(n, texts):
        if (n, texts) not in known:
            launch(n, sys.executable, "script.py", str(texts), f"{n}-{texts}.pt", cwd=place, REPLACEME_CACHE=str(place / f"cache{n}"))
            known[n, texts] = torch.load(place / f"{n}-{texts}.pt")
        return known[n, texts]
    return found


# processes and texts, two of which are a batch: as many for each, an uneven number, more processes than batches and than texts
CASES = [(2, 8), (3, 7), (3, 2)]
# float32 steps of an optimiser add up gradients of chunks, which differ with the share in the last digits
LOOSE = dict(adam=1e-4, cg=1e-4, gradients=1e-5, refitted=1e-6, borrowed=1e-5, irls=1e-9)
KEYS = ["measured False", "measured True", "between", "influence", "magnitudes", "components", "merges", "gradients", "losses", "held loss",
        "divergence", "irls", "adam", "cg", "refitted", "borrowed", "own texts"]


@pytest.mark.parametrize("n,texts", CASES)
@pytest.mark.parametrize("key", KEYS)
def test_what_several_find_is_what_one_finds(everything, key, n, texts):
    one, many = flat(everything(1, texts)[key]), flat(everything(n, texts)[key])
    assert len(one) == len(many) > 0
    for a, b in zip(one, many):
        assert a.shape == b.shape and torch.equal(a.isfinite(), b.isfinite())
        ok = a.isfinite()
        scale = a[ok].abs().max().item() if ok.any() else 0.
        assert (a[ok] - b[ok]).abs().max().item() <= LOOSE.get(key, 1e-12) * scale if ok.any() else True, key


def test_all_of_it_is_looked_at(everything):
    assert set(everything(1, 8)) == set(KEYS)


RACE = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from test_race import batches, calm
from replaceme.blocks import candidates
from replaceme.distance import Profile
from replaceme.group import everybody, grouped, is_first
from replaceme.stats import measure
texts, n = int(sys.argv[2]), 6
with grouped(), torch.no_grad():
    model = calm(2, 3).double()
    found = measure(model, batches(texts), candidates(n, 2), Profile(n), held=batches(5, seed=1), k=2)
    said = [list(found.sums), list(found.held), found.ranked[:2], found.profile.counts, found.profile.sum, [g.XtX for g in found.sums.values()]]
    alike = len({str([b for _, b in r]) for r in everybody(found.ranked)}) == 1
    if is_first():
        torch.save([alike, *said], sys.argv[3])
"""


@pytest.mark.parametrize("n,texts", [(2, 30), (3, 26), (3, 9)])
def test_several_begin_the_race_with_what_all_have_found(tmp_path, n, texts):
    "And so no text more goes to the end than where one process takes them all"
    (tmp_path / "race.py").write_text(RACE)
    for k in (1, n):
        launch(k, sys.executable, "race.py", str(Path(__file__).parent), str(texts), f"{k}.pt", cwd=tmp_path)
    (_, *one), (alike, *many) = (torch.load(tmp_path / f"{k}.pt", weights_only=False) for k in (1, n))
    assert alike and one[:2] == many[:2] and [*one[2][0][1]] == [2, 4] and torch.equal(one[3], many[3])
    assert 8 == one[3][0, -1] < one[3][0, 0] == texts + 5
    assert torch.allclose(one[4], many[4], rtol=1e-12) and all(torch.allclose(a, b, rtol=1e-12, atol=1e-12 * a.abs().max()) for a, b in zip(one[5], many[5]))


UNLIKE = """
import sys
import torch
import replaceme.stats as stats
from replaceme.arch import fold_points
from replaceme.blocks import Block, candidates
from replaceme.distance import Profile
from replaceme.group import everybody, grouped, world
from replaceme.models import tiny_model
from script import batches, gram
stats.slow_float64 = lambda device: world()[0]==int(sys.argv[1])  # each asks its own clock
torch.set_grad_enabled(False)
model = tiny_model("llama", layers=6)
for layer in model.model.layers if sys.argv[2]=="alike" else []:  # a MLP writes nearly one direction
    w = layer.mlp.down_proj.weight
    w[1:] = w[:1]*torch.linspace(.5, 1.5, 31)[:, None] + 1e-5*w[1:]
with grouped():
    bs, found = batches(8), []
    for at in (2, 1):
        found += gram(stats.collect_between(model, model, bs, [fold_points(model, [at-1])[at-1]], at, at+2))
    m = stats.measure(model, bs, candidates(6, 2), Profile(6), k=2)
    for g in m.sums.values(): found += gram(g)
    torch.save(found, f"{sys.argv[3]}.{world()[0]}")
"""


@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.parametrize("columns", ["alike", "apart"])
def test_all_take_sums_again_or_none_does(tmp_path, slow, columns):
    "Where float64 is slow for one process alone, whose sums of all are then judged by all"
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "unlike.py").write_text(UNLIKE)
    launch(1, sys.executable, "unlike.py", "-1", columns, "one", cwd=tmp_path)
    launch(2, sys.executable, "unlike.py", str(slow), columns, "two", cwd=tmp_path)
    one, *two = [flat(torch.load(tmp_path / f)) for f in ("one.0", "two.0", "two.1")]
    near = 1e-12 if columns == "alike" else 1e-6  # in float64 again, or partly in float32
    for many in two:
        assert len(many) == len(one) and all((a - b).abs().max() <= near * a.abs().max() for a, b in zip(one, many))
    assert all(torch.equal(a, b) for a, b in zip(*two))


LITTLE = """
import torch
import replaceme.stats as stats
from replaceme.group import everybody, grouped, world
from replaceme.models import tiny_model
from replaceme.states import states_around, sums_of_layer
from script import batches
torch.set_grad_enabled(False)
stats.free_memory = lambda device: 0 if world()[0]==1 else 10**12
model = tiny_model("llama", layers=6)
with grouped():
    with states_around(model, model, [batches(4)], 2, 4) as ends:
        try: sums_of_layer(ends, 0, model, 2)
        except Exception as e: said = str(e)
    print(everybody(said))
"""


def test_too_little_memory_for_one_is_told_by_all(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "little.py").write_text(LITTLE)
    assert launch(2, sys.executable, "little.py", cwd=tmp_path)[0][1].count("0.0 GB are free") == 2


# --- the commands

TEXT = " ".join(f"The map number {i} stands in for the layers that went, and what is left computes nearly the same as before {i*i}." for i in range(60))


@pytest.fixture(scope="module")
def place(tmp_path_factory, save_tiny):
    place = save_tiny(tmp_path_factory.mktemp("commands"))
    (place / "texts.txt").write_text(TEXT)
    (place / "other.txt").write_text(TEXT[::-1])
    keys = dict(model_path="./tiny", layers_to_skip=2, dataset="texts.txt", dataset_size=9, batch_size=2, max_length=32,
                eval_dataset="other.txt", eval_size=5, eval_length=32)
    (place / "run.yaml").write_text(json.dumps(keys))
    return place


def command(name, *args):
    return [sys.executable, "-c", f"from replaceme.cli import {name}; {name}()", *args]


def call(place, monkeypatch, name, *args):
    "The same command in this process alone"
    monkeypatch.chdir(place)
    monkeypatch.setenv("REPLACEME_CACHE", str(place / "cache alone"))
    getattr(cli, name)(list(args))


@pytest.mark.parametrize("method", [("lstsq",), ("auto", "--dataset", "self"), ("cosine", "--loss", "mse", "--solver", "l-bfgs", "--epochs", "5")], ids=lambda m: m[0])
def test_two_processes_save_what_one_saves(place, monkeypatch, method):
    words = ["--config", "run.yaml", "--method", *method, "--save_path"]
    call(place, monkeypatch, "run_replaceme", *words, f"one-{method[0]}")
    found = launch(2, *command("run_replaceme", *words, f"two-{method[0]}"), cwd=place)
    assert "layers removed" in found[0][1] and found[1][1:] == ("", "")  # the first one speaks
    one, two = [json.loads((place / f"{k}-{method[0]}/replaceme.json").read_text()) for k in ("one", "two")]
    assert one["block"] == two["block"] and [c["blocks"] for c in one["choice"]] == [c["blocks"] for c in two["choice"]]
    tol = 1e-4 if method[0] == "cosine" else 1e-6
    for when in ("before", "after"):
        assert one["perplexity"][when]["losses"] == pytest.approx(two["perplexity"][when]["losses"], rel=1e-3 * tol if when == "before" else tol)
    a, b = [load_file(place / f"{k}-{method[0]}/model.safetensors") for k in ("one", "two")]
    assert a.keys() == b.keys()
    for k in a:
        assert (a[k] - b[k]).abs().max() <= tol * max(1, a[k].abs().max()), k
    assert not list(place.glob(".*partial*")) + list(place.glob("*of-2"))


def test_analysis_map_and_scores_of_two_processes(place, monkeypatch):
    for k, go in dict(one=lambda *a: call(place, monkeypatch, *a), two=lambda *a: launch(2, *command(*a), cwd=place)).items():
        go("get_distance_analysis", "--config", "run.yaml", "--distances_path", f"{k}.json")
        go("get_lt_with_lstsq", "--config", "run.yaml", "--save_path", f"{k}-map")
    one, two = [json.loads((place / f"{k}.json").read_text()) for k in ("one", "two")]
    assert one["texts"] == two["texts"] and one["distances"].keys() == two["distances"].keys()
    for n, row in one["distances"].items():
        assert row == pytest.approx(two["distances"][n], rel=1e-12)
    a, b = [load_file(place / f"{k}-map/transform.safetensors") for k in ("one", "two")]
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-6, atol=1e-6)
    assert "loss" in launch(2, *command("evaluate_model", "--config", "run.yaml"), cwd=place)[0][1]


def test_two_processes_lay_two_models_side_by_side(place, monkeypatch, capsys):
    "What each writes and what one is worth as a draft among it, made and kept by all, and found again"
    call(place, monkeypatch, "run_replaceme", "--config", "run.yaml", "--method", "lstsq", "--prompt", "null", "--save_path", "side")
    words = ["evaluate_model", "--compare", "tiny", "side", *"--eval_dataset other.txt --eval_length 24 --eval_size 3 --speed false --writing text "
             "--writing_tokens 12 --writing_prompts 3 --draft true".split()]
    capsys.readouterr()
    call(place, monkeypatch, *words)
    one = capsys.readouterr().out
    assert "drafts that stand, of 4" in one
    for more in [], [], ["--cache", "false"]:
        assert [out for _, out, _ in launch(2, *command(*words, *more), cwd=place)] == [one, ""]


ALONE = """
from replaceme.group import everybody, from_first, grouped, summed, together
from replaceme.kept import kept
def joined():
    with together(): return 1
asks = [lambda: everybody(1), lambda: summed(1), joined, lambda: from_first(max, 1, 2), lambda: kept("kept", "sums", 1, lambda: 2)]
with grouped():
    said = []
    for ask in asks:
        try: from_first(ask)
        except Exception as e: said.append(str(e))
    print(everybody(said), everybody(from_first(lambda: 7)))
"""


def test_what_is_left_to_the_first_process_does_not_wait_for_the_others(tmp_path):
    "An error in all, and at once: the others would answer to something else, or never"
    (tmp_path / "alone.py").write_text(ALONE)
    out = launch(2, sys.executable, "alone.py", cwd=tmp_path)[0][1]
    assert out.count("is left to the first process, and it waits for all of them inside") == 10 and out.endswith("[7, 7]\n")


FREE = """
import types
import torch
import replaceme.stats as stats
from replaceme.group import everybody, from_first, grouped
stats.psutil = types.SimpleNamespace(virtual_memory=lambda: types.SimpleNamespace(available=6*10**9))
free = lambda: stats.free_memory(torch.device("cpu"))
before = free()
with grouped():
    with grouped(): print(before, everybody(free()), from_first(free))
    print(free())
print(free())
"""


@pytest.mark.parametrize("said,alone", [(None, 6), ("2", 3)], ids=["counted", "as the launcher says"])
def test_memory_is_that_of_all_processes_of_a_machine_together(tmp_path, monkeypatch, said, alone):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    (tmp_path / "free.py").write_text(FREE)
    g = 10**9
    out = launch(2, sys.executable, "free.py", cwd=tmp_path, **({"LOCAL_WORLD_SIZE": said} if said else {}))[0][1]
    assert out.splitlines() == [f"{alone*g} [{3*g}, {3*g}] {3*g}", f"{3*g}", f"{alone*g}"]


def test_rows_of_a_comparison(place, monkeypatch):
    methods = ["lstsq", "shortgpt", "laco", "linearpatch"]
    keys = json.loads((place / "run.yaml").read_text())
    keys.pop("layers_to_skip")
    (place / "rows.yaml").write_text(json.dumps(dict(keys, methods=[*methods[:2], dict(method="laco", threshold=-.9), methods[3]], layers=[2])))
    call(place, monkeypatch, "compare_methods", "--config", "rows.yaml", "--save_path", "rows-one")
    launch(2, *command("compare_methods", "--config", "rows.yaml", "--save_path", "rows-two"), cwd=place)
    one, two = [json.loads((place / f"rows-{k}/comparison.json").read_text())["rows"] for k in ("one", "two")]
    assert [r["method"] for r in two] == ["dense", *methods] and not any("error" in r for r in two)
    for a, b in zip(one, two):
        assert a["blocks"] == b["blocks"] and a["losses"] == pytest.approx(b["losses"], rel=1e-6)


def test_a_network_is_trained_by_two_processes(place):
    words = ["--config", "run.yaml", "--train_tokens", "200", "--save_path", "trained", "--trainer", "{per_device_train_batch_size: 2}"]
    launch(2, *command("run_streamline", *words), cwd=place)
    assert json.loads((place / "trained/replaceme.json").read_text())["training"]["tokens"] > 0


# --- errors

def test_a_misspelt_key_is_told_once(place):
    found = ended(start(3, *command("run_replaceme", "--config", "run.yaml", "--dataset_sise", "3"), cwd=place))
    assert [code for code, *_ in found] == [2, 2, 2]
    assert len(told(found)) == 1 and "dataset_size" in told(found)[0], found


PATCHED = '''
import os, signal, sys, torch
import replaceme.stats as stats
from replaceme import cli
rank, how = int(os.environ["RANK"]), sys.argv.pop(1)
inner, calls = stats.add_batch, []
def add_batch(*a, **k):
    calls.append(1)
    if rank==1 and how=="kill" and len(calls)==2: os.kill(os.getpid(), signal.SIGKILL)
    if rank==1 and how=="fail" and len(calls)==2: raise MemoryError
    if rank==1 and how=="bug" and len(calls)==2: raise KeyError("a mistake")
    return inner(*a, **k)
stats.add_batch = add_batch
cli.run_replaceme()
'''


@pytest.mark.parametrize("how,says", [("kill", "lost another one"), ("fail", "out of memory"), ("bug", None)])
def test_what_ends_one_ends_all(place, how, says):
    (place / "patched.py").write_text(PATCHED)
    words = ["run.yaml", "--save_path", f"ended-{how}"]
    found = ended(start(2, sys.executable, "patched.py", how, "--config", *words, cwd=place))
    assert [code for code, *_ in found] == dict(kill=[2, -signal.SIGKILL], fail=[2, 2], bug=[1, 1])[how], found
    if says:
        assert len(told(found)) == 1 and says in told(found)[0], found
        assert not any("Traceback" in err for *_, err in found)
    assert not list(place.glob(f"*ended-{how}*")) + list(place.glob(f".ended-{how}*"))  # nothing half written
    if how == "kill":
        launch(2, *command("run_replaceme", "--config", *words), cwd=place)  # and the next start is well
        assert (place / f"ended-{how}/replaceme.json").is_file()


def test_torchrun_ends_with_a_dead_process(place):
    "The real launcher: it starts the commands by name, and a process that is killed ends it with all others"
    (place / "patched.py").write_text(PATCHED)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "REPLACEME_CACHE": str(place / "cache")}
    words = ["--config", "run.yaml", "--save_path", "launched"]
    dead = subprocess.run([*run, "patched.py", "kill", *words], cwd=place, env=env, capture_output=True, text=True, timeout=SECONDS)
    assert dead.returncode != 0 and len(re.findall("run_replaceme: error: process 0 of 2", dead.stderr)) == 1, dead.stderr
    assert not (place / "launched").exists() and not list(place.glob(".launched*"))
    well = subprocess.run([*run, "--no-python", *command("run_replaceme", *words)], cwd=place, env=env, capture_output=True, text=True, timeout=SECONDS)
    assert well.returncode == 0 and well.stdout.count("layers removed") == 1, well.stderr
    assert (place / "launched/replaceme.json").is_file()


def test_a_text_that_is_not_finite_is_named_with_its_number(place, tmp_path):
    script = SCRIPT.split("if __name__")[0] + '''
with grouped():
    model, bs = tiny_model("llama", layers=6), batches(8)
    bs[2]["input_ids"][1, -1] = 301  # text 5
    with torch.no_grad(): model.model.embed_tokens.weight[301] = torch.nan
    from replaceme.group import everybody
    for solver in ("closed", "irls"):
        try: fit_between(model, model, bs, [], Block(2, 4), 2, Recipe(solver=solver))
        except Exception as e: said = str(e)
        print(everybody(said))
'''
    (tmp_path / "script.py").write_text(script)
    out = launch(2, sys.executable, "script.py", cwd=tmp_path)[0][1]
    assert out.count("the embeddings, text 5 ") == 4, out  # of both processes, for both solvers


# --- alone, and in a group of one's own

def test_alone_everything_is_ones_own(monkeypatch):
    monkeypatch.setenv("RANK", "1")  # no launcher that says where the others are
    with grouped():
        assert world() == (0, 1) and my_share([1, 1]) == [0, 1]


def test_a_group_that_is_there_is_used_where_it_is_asked_for(tmp_path):
    (tmp_path / "script.py").write_text('''
import torch.distributed as dist
from replaceme.group import grouped, summed, world
dist.init_process_group("gloo")
outside = world()
with grouped(): inside, total = world(), summed(2)
print(outside, inside, total, dist.is_initialized(), world())
dist.destroy_process_group()
''')
    found = launch(2, sys.executable, "script.py", cwd=tmp_path)
    assert [out.strip() for _, out, _ in found] == [f"(0, 1) ({i}, 2) [4.0] True (0, 1)" for i in range(2)]


def test_shares_are_even_and_everybody_agrees(monkeypatch):
    sizes = [9, 1, 8, 2, 7, 3, 6, 4, 5]
    for n in (2, 3, 20):
        shares = []
        for rank in range(n):
            monkeypatch.setattr("replaceme.group.world", lambda: (rank, n))
            shares.append(my_share(sizes))
        assert sorted(i for s in shares for i in s) == list(range(9))
        loads = [sum(sizes[i] for i in s) for s in shares]
        assert max(loads) - min(loads) <= (2 if n < 9 else 9)


def test_what_has_lost_the_others_is_not_kept_alive():
    assert not issubclass(Parted, Exception)
