"""Training: killed and gone on with, by two processes as by one, for many families, and what comes out."""
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers
import warm
from safetensors.torch import load_file

from replaceme.activations import capture
from replaceme.arch import layers_of
from replaceme.baselines import uidl
from replaceme.blocks import Block
from replaceme.core import ReplaceMeError, ReplaceMeWarning
from replaceme.evaluate import outputs
from replaceme.merge import cut, save_checkpoint
from replaceme.models import tiny_model
from replaceme.recover import cuts_of, recover, rung_names
from replaceme.search import Recipe, fit_blocks
from replaceme.streamline import streamline
from replaceme.train import Pupil, TextRows, fit_weights, frozen, held_loss, kd_loss, own, pad_rows, topk_targets
from replaceme.unmerged import with_linear


def texts(n, S=16, seed=0, vocab=320, ragged=True, count=False):
    "`n` batches of two texts; every third one is shorter; those that count can be learnt"
    g, got = torch.Generator().manual_seed(seed), []
    for i in range(n):
        mask = torch.ones(2, S, dtype=torch.long)
        if ragged and i % 3 == 0:
            mask[1, S - 5:] = 0
        ids = (torch.randint(vocab, (2, 1), generator=g) + torch.arange(S)) % vocab if count else torch.randint(vocab, (2, S), generator=g)
        got.append(dict(input_ids=ids * mask, attention_mask=mask))
    return got


def odd_texts(n, seed=0):
    "`n` batches of one text each, of very different lengths, which can be learnt"
    return [{k: v[:1] for k, v in texts(1, [40, 6, 12, 30, 5, 9, 17, 22][i % 8], 8*seed+i, ragged=False, count=True)[0].items()} for i in range(n)]


# A training whose weights are written to a file; with a second argument it waits at that step to be killed.
SCRIPT = """
import json, os, sys, time, torch
from pathlib import Path
sys.path.insert(0, os.environ['TESTS'])
from test_train import odd_texts, texts
from safetensors.torch import save_file
from transformers import TrainerCallback
import replaceme.train as t
from replaceme.models import tiny_model
from replaceme.merge import cut, keep_layers
from replaceme.blocks import Block
o = json.loads(sys.argv[1])
class Wait(TrainerCallback):
    def on_step_end(self, args, state, control, **kw):
        if state.global_step==o['stop']: print('HERE', flush=True); time.sleep(600)
make = t.make_trainer
def waiting(*a, **k):
    trainer = make(*a, **k)
    if o.get('stop'): trainer.add_callback(Wait())
    return trainer
t.make_trainer = waiting
dense = tiny_model('llama', layers=6)
small = cut(dense, [Block(2, 4)])
names = [n for n,_ in small.named_parameters() if '.layers.1.' in n]
t.own(small, names)
model = keep_layers(small, [1]) if o['kind']=='mse' else small
inner = [n.replace('layers.1.', 'layers.0.') for n in names] if o['kind']=='mse' else names
targets = dict(mse=t.state_targets(dense, 1, 4), kd=t.topk_targets(dense, 16), lm=None)[o['kind']]
learn, held = texts(40, count=True), texts(4, seed=1, count=True)
if o.get('odd'): learn, held = odd_texts(11), odd_texts(5, 1)
done = t.fit_weights(model, inner, o['kind'], learn, held, o.get('tokens', 40*30), targets, keep_path=o.get('keep'), folder=o.get('folder'), trainer=o['trainer'])
if o.get('said'): Path(o['said']).write_text(json.dumps([done.tokens, done.before, [h['loss'] for h in done.history if 'loss' in h]]))
rank = os.environ.get('RANK', '0')
save_file({n: p.detach().clone() for n,p in small.named_parameters() if n in names}, o['out'] + ('' if rank=='0' else rank))
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**os.environ, "TESTS": os.path.dirname(__file__), "OMP_NUM_THREADS": "1"}
    env.pop("RANK", None)

    def go(launch=(), **o):
        o = {"trainer": dict(learning_rate=1e-2), "kind": "kd", "out": str(tmp_path / "out.safetensors"), **o}
        cmd = [sys.executable, *launch, str(tmp_path / "script.py"), json.dumps(o)]
        p = warm.Popen(cmd, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        if o.get("stop"):
            assert p.stdout.readline() == "HERE\n", p.stderr.read()
            p.send_signal(signal.SIGKILL)
            return p.wait()
        _, err = p.communicate()
        assert p.returncode == 0, err[-3000:]
        return load_file(o["out"])
    return go


@pytest.mark.parametrize("kind", ["kd", "mse"])
def test_killed_and_gone_on_with(script, tmp_path, kind):
    whole = script(kind=kind)
    folder = tmp_path / "run"
    script(kind=kind, folder=str(folder), stop=8)  # of 20 steps, with a checkpoint every 5
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-5"]
    assert not (tmp_path / "again").exists()
    again = script(kind=kind, folder=str(folder), out=str(tmp_path / "again"))
    assert {p.name for p in folder.glob("checkpoint-*")} >= {"checkpoint-20"}
    for n, p in whole.items():
        assert torch.equal(p, again[n]), n


# accelerate's own launcher starts one process on a CPU; torch's starts two, and accelerate finds them
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize("kind", ["mse", "lm", "kd"])
def test_two_processes_are_as_one(script, tmp_path, kind):
    o = dict(learning_rate=1e-3)
    one = script(kind=kind, trainer=dict(o, per_device_train_batch_size=4))
    two = script(TWO, kind=kind, keep=str(tmp_path / "kept") if kind != "lm" else None, out=str(tmp_path / "two"),
                 trainer=dict(o, per_device_train_batch_size=2))
    start = dict(cut(tiny_model("llama", layers=6), [Block(2, 4)]).named_parameters())
    for n, p in one.items():
        assert (p - start[n]).abs().max() > 1e-3  # it did move
        assert (p - two[n]).abs().max() < 1e-4, n
    for n, p in load_file(str(tmp_path / "two") + "1").items():  # both processes hold the same, best weights
        assert torch.equal(p, two[n]), n


@pytest.mark.parametrize("kind,n,each", [("kd", 2, 4), ("mse", 2, 4), ("lm", 3, 1)])
def test_no_text_counts_twice_where_the_last_round_is_not_full(script, tmp_path, kind, n, each):
    "11 texts to train on, 5 to judge by; of three processes with a text each, one has none in the end"
    tokens = 3 * sum(b["input_ids"].numel() for b in odd_texts(11))
    o = dict(kind=kind, odd=True, tokens=tokens)
    # steps of plain gradients, so that one that is off by little shows
    kw = dict(optim="sgd", learning_rate=.3, lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=0., logging_steps=1, per_device_eval_batch_size=each)
    def say(which): return dict(said=str(tmp_path / f"{which}.json"), out=str(tmp_path / which))
    one = script(**o, **say("one"), trainer=dict(kw, per_device_train_batch_size=n * each))
    many = script([*TWO[:-1], str(n)], **o, **say("many"), keep=str(tmp_path / "kept") if n == 2 else None, trainer=dict(kw, per_device_train_batch_size=each))
    a, b = [json.loads((tmp_path / f"{k}.json").read_text()) for k in ("one", "many")]
    assert a[0] == b[0] == tokens
    assert b[1] == pytest.approx(a[1], rel=1e-5) and b[2] == pytest.approx(a[2], rel=1e-4)
    start = dict(cut(tiny_model("llama", layers=6), [Block(2, 4)]).named_parameters())
    moved = max((p - start[k]).abs().max() for k, p in one.items())
    assert moved > 1e-3 and all((p - many[k]).abs().max() < 1e-3 * moved for k, p in one.items())


def test_accumulated_steps_are_as_one_batch(script, tmp_path):
    one = script(trainer=dict(learning_rate=1e-3, per_device_train_batch_size=4))
    four = script(out=str(tmp_path / "four"), trainer=dict(learning_rate=1e-3, per_device_train_batch_size=1, gradient_accumulation_steps=4))
    for n, p in one.items():
        assert (p - four[n]).abs().max() < 1e-4, n


FAMILIES = ["gpt2", "gemma2", "qwen3", "mixtral", "phi", "falcon", "opt", "bloom"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_learn(family):
    "A block of one layer, and the layer before it learns what the dense model says"
    dense = tiny_model(family, layers=4)
    before = {n: p.clone() for n, p in dense.named_parameters()}
    small = cut(dense, [Block(2, 3)])
    model, (rung,) = recover(dense, small, [Block(2, 3)], texts(24, ragged=False), ["layer"], tokens=1500, learning_rate=3e-3)
    assert rung.loss_after < rung.loss_before
    for n, p in dense.named_parameters():
        assert torch.equal(p, before[n]) and p.requires_grad
    assert (outputs(model, texts(1)[0]) - outputs(small, texts(1)[0])).abs().max() > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2", "mixtral"])
def test_a_streamline_layer_learns_its_block(family, tmp_path):
    dense = tiny_model(family, layers=5)
    small, r = streamline(dense, texts(4), 1, texts=texts(30), learning_rate=5e-3, tokens=1500)
    s, e = r.removed[0] - 1, r.removed[-1] + 1
    assert r.training.after < r.training.before and len(layers_of(small)) == 4
    plain = cut(dense, r.blocks)
    err = [sum((capture(m, b).S[s + 1] - capture(dense, b).S[e]).square().mean().item() for b in texts(3, seed=9)) for m in (plain, small)]
    assert err[1] < err[0]  # on texts it never saw, run inside the whole model
    save_checkpoint(small, tmp_path)
    again = type(dense).from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(again, texts(1)[0]), outputs(small, texts(1)[0]), rtol=1e-4, atol=1e-5)


def test_its_choice_is_the_largest_mean_cosine():
    dense, bs, n = tiny_model("llama", layers=7), texts(3), 2
    _, r = streamline(dense, bs, n, "none")
    S = [capture(dense, b).S for b in bs]
    cos = {j: torch.cat([torch.cosine_similarity(a[j].double(), a[j + n].double(), dim=-1) for a in S]).mean() for j in range(1, 7 - n + 1)}
    assert r.removed[0] == max(cos, key=cos.get)


@pytest.mark.parametrize("network", ["ffn", "swiglu"])
def test_small_networks_are_saved_with_their_code(network, tmp_path):
    dense = tiny_model("llama", layers=6)
    small, r = streamline(dense, texts(4), 2, network, texts=texts(30), learning_rate=5e-3)
    save_checkpoint(small, tmp_path)
    assert len(layers_of(small)) == 3 and r.training.after < r.training.before
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    torch.testing.assert_close(outputs(again, texts(1)[0]), outputs(small, texts(1)[0]), rtol=1e-4, atol=1e-5)


def test_half_precision_learns_in_float32():
    dense = tiny_model("llama", layers=6).bfloat16()
    small = cut(dense, [Block(2, 4)])
    model, rungs = recover(dense, small, [Block(2, 4)], texts(30), ["fold", "cut"], tokens=2400, learning_rate=1e-3)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert rungs[-1].loss_after < rungs[0].loss_before
    with pytest.raises(ReplaceMeError, match="float16 loses small gradients"):
        recover(dense.half(), cut(dense.half(), [Block(2, 4)]), [Block(2, 4)], texts(4), ["fold"])


@pytest.mark.parametrize("rungs", [["lora"], ["fold", "qlora"]])
def test_adapters_are_merged(rungs, tmp_path):
    dense = tiny_model("llama", layers=5, d=64)
    before = {n: p.clone() for n, p in dense.named_parameters()}
    small = cut(dense, [Block(2, 4)])
    model, got = recover(dense, small, [Block(2, 4)], texts(24), rungs, tokens=1500, learning_rate=5e-3)
    assert got[-1].loss_after < got[0].loss_before
    assert [(n, p.shape, p.dtype) for n, p in model.named_parameters()] == [(n, p.shape, p.dtype) for n, p in small.named_parameters()]
    for n, p in dense.named_parameters():
        assert torch.equal(p, before[n]) and p.requires_grad
    batch = pad_rows([TextRows(texts(1)[:1])[0]], True)
    losses = [kd_loss(m, batch, topk_targets(dense)(batch)).item() for m in (small, model)]
    assert losses[1] < losses[0]
    save_checkpoint(model, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(again, texts(1)[0]), outputs(model, texts(1)[0]), rtol=1e-4, atol=1e-5)


def test_an_unmerged_map_learns():
    dense = tiny_model("gemma2", layers=5)
    small = with_linear(cut(dense, [Block(2, 4)]), 1, torch.eye(32))
    model, (r,) = recover(dense, small, [Block(2, 4)], texts(24, ragged=False), ["fold"], learning_rate=1e-2)
    assert r.loss_after < r.loss_before and r.parameters == 32 * 32
    assert rung_names(model, [2], "fold") == ["model.layers.1.replaceme_map.weight"]


def test_several_cuts():
    dense = tiny_model("llama", layers=8)
    blocks = [Block(2, 3), Block(5, 7)]
    done = fit_blocks(dense, texts(10), [], blocks, Recipe())
    assert cuts_of(blocks) == [2, 4]
    assert rung_names(done.model, [2, 4], "fold") == [f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 3)]
    _, (r,) = recover(dense, done.model, blocks, texts(24), ["cut"], learning_rate=5e-3)
    assert r.loss_after < r.loss_before


def test_the_start_is_kept_where_training_harms():
    dense = tiny_model("llama", layers=6)
    small, _ = uidl(dense, texts(4), 2)
    with pytest.warns(ReplaceMeWarning, match="did not lower"):
        model, (r,) = recover(dense, small, [Block(2, 4)], texts(10), ["layer"], tokens=200, learning_rate=50.)
    assert r.loss_after == r.loss_before
    for p, q in zip(model.parameters(), small.parameters()):
        assert torch.equal(p, q)


def test_batches_do_not_matter():
    "The sum of the losses, and their gradients, are those of the texts one by one"
    dense = tiny_model("llama", layers=6)
    small = cut(dense, [Block(2, 4)])
    rows, names = TextRows(texts(2)), rung_names(small, [2], "layer")
    with frozen(dense):
        pupil = Pupil(small, names, kd_loss, topk_targets(dense))
        one = pad_rows([rows[i] for i in range(4)], True)
        n = one["labels"].ne(-100).sum()
        pupil(**one)["loss"].backward()
        g = {k: w.grad.clone() for k, w in pupil.weights.items()}
        pupil.zero_grad()
        for i in range(4):
            pupil(**pad_rows([rows[i]], True), num_items_in_batch=n)["loss"].backward()
    for k, w in pupil.weights.items():
        torch.testing.assert_close(w.grad, g[k], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kw, said", [
    (dict(rungs=["flod"]), "Did you mean 'fold'"), (dict(rungs=["cut", "fold"]), "no ladder"), (dict(rungs=["fold"], lr=1), "unknown argument 'lr'"),
    (dict(rungs=["fold"], save_strategy="no"), "set by the training itself"), (dict(rungs=["fold"], cut=dict(lr=1)), "unknown argument 'lr'"),
    (dict(rungs=["fold"], learning_rate="fast"), "trainer"),
])
def test_refused(kw, said):
    dense = tiny_model("llama", layers=4)
    with pytest.raises(ReplaceMeError, match=said):
        recover(dense, cut(dense, [Block(2, 3)]), [Block(2, 3)], texts(4), kw.pop("rungs"), **kw)


def test_another_training_in_the_folder_is_refused(tmp_path):
    dense = tiny_model("llama", layers=5)
    kw = dict(texts=texts(12), learning_rate=1e-2, folder=tmp_path / "run")
    a, _ = streamline(dense, texts(2), 1, **kw)
    b, _ = streamline(dense, texts(2), 1, **kw)  # all is done: nothing is trained again
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q)
    with pytest.raises(ReplaceMeError, match="another texts"):
        streamline(dense, texts(2), 1, **{**kw, "texts": texts(12, seed=5)})
    with pytest.raises(ReplaceMeError, match="another trainer"):
        streamline(dense, texts(2), 1, **{**kw, "learning_rate": 1e-3})


# The whole recipe with two rungs; it waits at step 3 of the second training to be killed.
RUN = """
import sys, time
import replaceme.train as t
from transformers import TrainerCallback
class Wait(TrainerCallback):
    def on_step_end(self, args, state, control, **kw):
        if state.global_step==3: print('HERE', flush=True); time.sleep(600)
make, calls = t.make_trainer, []
def waiting(*a, **k):
    trainer = make(*a, **k)
    calls.append(1)
    if sys.argv[1]=='stop' and len(calls)==2: trainer.add_callback(Wait())
    return trainer
t.make_trainer = waiting
import replaceme.pipeline as p
p.run(p.read_config('c.yaml', train_path=sys.argv[2], save_path=sys.argv[3]))
"""


def test_a_killed_run_goes_on_from_its_train_path(tmp_path, save_tiny):
    save_tiny(tmp_path)
    (tmp_path / "texts.txt").write_text("The map stands in for the layers that went, and learns what they would have said. " * 60)
    (tmp_path / "c.yaml").write_text("{model_path: ./tiny, dataset: texts.txt, dataset_size: 16, max_length: 32, layers_to_skip: 2, method: lstsq, recover: [fold, cut], "
                                     "train_tokens: 1600, trainer: {learning_rate: 1e-2, eval_steps: 2}, eval_dataset: null}")

    def go(stop, folder, out):
        p = warm.Popen([sys.executable, "-c", RUN, stop, folder, out], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if stop == "stop":
            assert p.stdout.readline() == "HERE\n", p.stderr.read()
            p.send_signal(signal.SIGKILL)
            return p.wait()
        _, err = p.communicate()
        assert p.returncode == 0, err[-3000:]
        return load_file(tmp_path / out / "model.safetensors"), json.loads((tmp_path / out / "replaceme.json").read_text())

    whole, said = go("run", "a", "one")
    go("stop", "b", "two")
    assert not (tmp_path / "two").exists() and (tmp_path / "b").exists()
    again, also = go("run", "b", "two")
    assert [r["name"] for r in also["recovery"]] == ["fold", "cut"]
    assert also["recovery"][1]["loss_after"] < also["recovery"][0]["loss_before"]
    assert [r["loss_after"] for r in said["recovery"]] == [r["loss_after"] for r in also["recovery"]]
    for n, p in whole.items():
        assert torch.equal(p, again[n]), n


def test_the_folder_is_of_one_training(tmp_path):
    "Another block, dense model, number of tokens of its distribution or text is another training, and other targets"
    dense, kw = tiny_model("llama", layers=7), dict(texts=texts(12), learning_rate=1e-2)
    streamline(dense, texts(2), 1, block=Block(2, 4), folder=tmp_path / "s", **kw)
    with pytest.raises(ReplaceMeError, match="another"):
        streamline(dense, texts(2), 3, block=Block(2, 6), folder=tmp_path / "s", **kw)
    with pytest.raises(ReplaceMeError, match="another"):
        streamline(tiny_model("llama", layers=7, seed=3), texts(2), 1, block=Block(2, 4), folder=tmp_path / "s", **kw)
    small, b = cut(dense, [Block(2, 4)]), [Block(2, 4)]
    recover(dense, small, b, texts(12), ["fold"], folder=tmp_path / "r", k=8)
    for args in [(dense, small, b, texts(12, seed=7)), (tiny_model("llama", layers=7, seed=3), small, b, texts(12))]:
        with pytest.raises(ReplaceMeError, match="another"):
            recover(*args, ["fold"], folder=tmp_path / "r", k=8)
    with pytest.raises(ReplaceMeError, match="another texts"):  # nor are the kept targets taken for another rung's
        recover(dense, small, b, texts(12, seed=7), ["layer"], folder=tmp_path / "r", k=8)


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    dense, kw = tiny_model("llama", layers=5), dict(texts=texts(12), learning_rate=1e-2, folder=tmp_path / "run")
    a, _ = streamline(dense, texts(2), 1, **kw)
    last = max((tmp_path / "run").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    (last / "trainer_state.json").unlink()
    b, _ = streamline(dense, texts(2), 1, **kw)
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q)


def test_modes_gradients_and_random_numbers_are_left_alone():
    "A model in training mode with dropout is judged and taught without it, and handed back as it was"
    dense = tiny_model("gpt2", layers=5, attn_pdrop=.3, resid_pdrop=.3, embd_pdrop=.3)
    small = cut(dense, [Block(2, 4)])
    _, (quiet,) = recover(dense, small, [Block(2, 4)], texts(12), ["layer"], seed=2**40)
    dense.train(), small.train()
    state = torch.get_rng_state()
    model, (r,) = recover(dense, small, [Block(2, 4)], texts(12), ["layer"], seed=2**40)
    assert r.loss_before == quiet.loss_before and torch.equal(torch.get_rng_state(), state)
    assert dense.training and small.training and all(m.training for m in dense.modules())
    assert all(p.requires_grad for p in [*dense.parameters(), *model.parameters()])


def test_tokens_are_those_that_were_trained_on():
    dense = tiny_model("llama", layers=5)
    for kw, said in [(dict(), 320), (dict(gradient_accumulation_steps=8), 320)]:
        _, (r,) = recover(dense, cut(dense, [Block(2, 3)]), [Block(2, 3)], texts(2, 16, ragged=False) + texts(1, 16, ragged=False), ["fold"], tokens=320,
                          held=texts(1, seed=4), **kw)
        assert r.trained == said or abs(r.trained - said) <= 32


def test_the_held_out_loss_is_a_mean_over_terms():
    dense = tiny_model("llama", layers=5)
    g, held = torch.Generator().manual_seed(3), []
    for n in (4, 4, 4, 4, 60):
        held.append(dict(input_ids=torch.randint(320, (1, n), generator=g), attention_mask=torch.ones(1, n, dtype=torch.long)))
    small = own(cut(dense, [Block(2, 3)]), names := rung_names(cut(dense, [Block(2, 3)]), [2], "fold"))
    done = [fit_weights(own(cut(dense, [Block(2, 3)]), names), names, "lm", texts(4), held, 64, trainer=dict(per_device_eval_batch_size=b)) for b in (1, 4)]
    ce = [small(**b).logits[0, :-1].double().log_softmax(-1).gather(1, b["input_ids"][0, 1:, None]).sum() for b in held]
    true = -sum(ce).item() / (4 * 3 + 59)
    assert abs(held_loss(small, "lm", held) - true) < 1e-4
    for d in done:
        assert abs(d.before - true) < 1e-3


def test_norms_do_not_decay():
    from replaceme.train import kd_loss, make_trainer, training_arguments
    dense = tiny_model("qwen3", layers=4)
    names = rung_names(cut(dense, [Block(2, 3)]), [2], "layer")
    t = make_trainer(Pupil(cut(dense, [Block(2, 3)]), names, kd_loss), training_arguments("kd", "/tmp", 1, 0, {}), TextRows(texts(2)), TextRows(texts(2)), "", 10, 1)
    decays = {n.split("weights.")[1] for n in t.get_decay_parameter_names(t.model)}
    assert decays and not any("norm" in n for n in decays) and len(decays) < len(names)


def test_all_processes_take_the_first_ones_verdict_of_qlora(monkeypatch):
    "It measured that nothing was gained; what this one measures is not asked"
    dense = tiny_model("llama", layers=5, d=64)
    small, held = with_linear(cut(dense, [Block(2, 4)]), 1, torch.eye(64)), texts(2, seed=5)
    monkeypatch.setattr("replaceme.recover.from_first", lambda f: [1., 2.])
    with pytest.warns(ReplaceMeWarning, match="qlora did not lower the loss"):
        model, (r,) = recover(dense, small, [Block(2, 4)], texts(24), ["qlora"], tokens=1500, held=held, learning_rate=5e-3)
    assert model is small and (r.loss_before, r.loss_after) == (1., 1.)


@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")  # 4 bit weights packed for inference have no gradients
def test_qlora_speaks_of_the_model_it_returns():
    dense = tiny_model("llama", layers=5, d=64)
    small = with_linear(cut(dense, [Block(2, 4)]), 1, torch.eye(64))
    held = texts(2, seed=5)
    model, (r,) = recover(dense, small, [Block(2, 4)], texts(24), ["qlora"], tokens=1500, held=held, learning_rate=5e-3)
    for m, said in [(small, r.loss_before), (model, r.loss_after)]:
        assert abs(held_loss(m, "kd", held, topk_targets(dense)) - said) < 1e-4
    assert r.loss_after < r.loss_before and rung_names(model, [2], "fold") == ["model.layers.1.replaceme_map.weight"]
