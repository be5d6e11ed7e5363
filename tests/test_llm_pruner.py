"""LLM-Pruner: groups found by asking, importance by hand and against slow sums, and models that go without them exactly."""
import copy
import json
import math
import sys

import pytest
import torch
import warm
from torch import nn
from transformers import AutoModelForCausalLM

from replaceme.arch import n_hooks
from replaceme.core import ReplaceMeError
from replaceme.llm_pruner import (TAYLOR, first_tokens, gradients, groups_of, importances, llm_pruner, middle_layers, part_of,
                                  salience, silenced, spread)
from replaceme.merge import save_checkpoint
from replaceme.models import tiny_model, tiny_vision
from replaceme.stream import find_stream
from replaceme.widths import n_parameters

GEN = torch.Generator().manual_seed(0)
TEXTS = [torch.randint(3, 300, (int(k),), generator=GEN) for k in torch.randint(2, 20, (11,), generator=GEN)]
IDS = torch.randint(3, 300, (2, 16), generator=GEN)
FAMILIES = {  # (rows of each reader of a head, its columns; number of heads) and the rows of a neuron
    "llama": ({}, 16, 2), "llama, one head a query": (dict(num_key_value_heads=4), 8, 4), "llama, wide heads": (dict(head_dim=16), 32, 2),
    "llama, tied, biases": (dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True), 16, 2), "qwen3": ({}, 16, 2),
    "gemma": ({}, 16, 2), "phi3": ({}, 16, 2), "granite": (dict(residual_multiplier=.22), 16, 2), "cohere": ({}, 16, 2),
    "starcoder2": ({}, 16, 2), "gpt2": ({}, 8, 4), "opt": ({}, 8, 4), "gpt_neox": ({}, 8, 4), "stablelm": ({}, 16, 2)}
ODD_HEADS = ("gpt2", "opt", "gpt_neox", "stablelm")  # the config derives the width of a head


def make(name, layers=4):
    return tiny_model(name.split(",")[0], layers=layers, **FAMILIES[name][0])


def rectangle(rows, left=False, pad=0):
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for i, r in enumerate(rows):
        at = slice(width - len(r), width) if left else slice(0, len(r))
        ids[i, at], mask[i, at] = r, 1
    return dict(input_ids=ids, attention_mask=mask)


def in_batches(size, rows=TEXTS, **kw):
    return [rectangle(rows[i:i + size], **kw) for i in range(0, len(rows), size)]


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_and_neurons_are_found(name):
    "However the family stacks its matrices: every row and column is in one group, and the groups have the sizes they must"
    model, (_, cols, n) = make(name, 2), FAMILIES[name]
    st = find_stream(model)
    groups = groups_of(model, st, [0, 1])
    for l, gs in groups.items():
        heads = [g for g in gs if g.kind == "heads"]
        assert len(heads) == n and len(gs) - n == 64
        assert {sum(map(len, g.cols.values())) for g in heads} == {cols}
        for part in ("rows", "cols"):
            seen = [(k, int(j)) for g in gs for k, v in getattr(g, part).items() for j in v]
            assert len(seen) == len(set(seen))
            names = {k for s in st.steps if s.layer == l for k in (s.readers if part == "rows" else s.writers)}
            sizes = {k: model.get_submodule(k).weight.shape[(type(model.get_submodule(k)).__name__ == "Conv1D") == (part == "rows")] for k in names}
            assert len(seen) == sum(sizes.values())
    assert n_hooks(model) == 0


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_goes_goes_without_a_trace(name, heads, plain):
    "The narrower model computes what the dense one computes whose writers read zeros from what went; the dense one is as it was."
    model = make(name)
    before, state = model(IDS).logits.detach(), copy.deepcopy(model.state_dict())
    ask = dict(ratio=.5, plain=plain, heads=heads)
    if heads and (plain and name in ODD_HEADS or not plain and name == "phi3"):
        with pytest.raises(ReplaceMeError, match="heads=False"):
            llm_pruner(model, None, **ask)  # before any batch is looked at
        return
    small, res = llm_pruner(model, in_batches(4), **ask)
    groups = groups_of(model, find_stream(model), [*res.lost])
    these = {l: {k: [g for g in gs if g.kind == k] for k in ("heads", "neurons")} for l, gs in groups.items()}
    gone = {l: [these[l][k][i] for k, out in (("heads", res.heads), ("neurons", res.neurons)) for i in out[l]] for l in groups}
    with silenced(model, gone), torch.no_grad():
        ref = model(IDS).logits
    assert rel(small(IDS).logits, ref) < 1e-5 and rel(before, ref) > 1e-3
    assert [*res.lost] == ([*range(4)] if plain else middle_layers(4)) and all(len(o) == 32 for o in res.neurons.values())
    assert all(len(o) == (FAMILIES[name][2] // 2 if heads else 0) for o in res.heads.values())
    assert res.removed == [] and res.parameters == n_parameters(small) < res.dense_parameters == n_parameters(model)
    assert torch.equal(model(IDS).logits, before) and n_hooks(model) == 0 and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_importance_of_two_neurons_by_hand():
    "y = relu(x W') a' with x = (1,2): neurons 3 and 1/2, gradients (2,4), (-1,-2) of the rows and (3,1/2) of the columns"
    x, W, a = torch.tensor([1., 2.]), torch.tensor([[1., 1.], [1., -.25]]), torch.tensor([[2., -1.]])
    W.requires_grad_(), a.requires_grad_()
    gW, ga = torch.autograd.grad((a @ (W @ x).relu()).sum(), [W, a])
    assert (gW * W).tolist() == [[2, 4], [-1, .5]] and (ga * a).tolist() == [[6, -.5]]
    assert [(salience(W, gW, 0, t) + salience(a, ga, 1, t)).tolist() for t in TAYLOR] == [[6 + 6, .5 + .5], [6 + 6, 1.5 + .5]]
    b, gb = torch.tensor([1., 2.]), torch.tensor([-6., 1.])  # a bias belongs to its row
    assert salience(W, gW, 0, "vector", b, gb).tolist() == [0, 1.5] and salience(W, gW, 0, "element", b, gb).tolist() == [12, 3.5]


@pytest.mark.parametrize("taylor", TAYLOR)
@pytest.mark.parametrize("name", ["llama", "gpt2", "llama, tied, biases"])
def test_importance_against_slow_sums_in_float64(name, taylor):
    "A float64 model, its own backward pass, and a loop over every vector of every group"
    model = make(name, 2)
    groups = groups_of(model, find_stream(model), [1])
    mine = importances(model, groups, gradients(model, part_of(model, groups), TEXTS), taylor)[1]
    wide = copy.deepcopy(model).double()
    losses = [nn.functional.cross_entropy(wide(t[None]).logits[0, :-1], t[1:], reduction="sum") for t in TEXTS]
    (sum(losses) / sum(len(t) - 1 for t in TEXTS)).backward()
    mods = dict(wide.named_modules())
    for g, value in zip(groups[1], mine.tolist()):
        slow = 0.
        for part in ("rows", "cols"):
            for k, index in getattr(g, part).items():
                m, flip = mods[k], type(mods[k]).__name__ == "Conv1D"
                s = m.weight.detach() * m.weight.grad
                s = s.T if flip else s
                for j in index.tolist():
                    v = (s[j] if part == "rows" else s[:, j]).tolist()
                    if part == "rows" and m.bias is not None:
                        v.append((m.bias[j] * m.bias.grad[j]).item())
                    slow += abs(math.fsum(v)) if taylor == "vector" else math.fsum(map(abs, v))
        assert math.isclose(value, slow, rel_tol=1e-3, abs_tol=1e-8)


def test_batches_and_padding_do_not_matter():
    "Batch size, padding on either side, what pads: the same texts are asked, and the same groups go."
    model = make("llama")
    small, ref = llm_pruner(model, in_batches(1), 1)
    for bs in (in_batches(4), in_batches(11, pad=7), in_batches(3, left=True, pad=9)):
        other, res = llm_pruner(model, bs, 1)
        assert (res.heads, res.neurons, res.tokens) == (ref.heads, ref.neurons, ref.tokens)
        assert torch.equal(other(IDS).logits, small(IDS).logits)
    again = llm_pruner(model, in_batches(4, TEXTS[::-1][1:]), 1)[1]  # the order of ten texts
    first = llm_pruner(model, in_batches(4, TEXTS[:10]), 1)[1]
    assert again.tokens == first.tokens == sum(map(len, TEXTS[:10])) and again.neurons == first.neurons
    assert [len(t) for t in first_tokens(in_batches(4), 3, 5)] == [min(len(t), 5) for t in TEXTS[:3]]


FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM
sys.modules["replaceme"] = None
m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[3] == "own").eval()
ids = torch.tensor(json.loads(sys.argv[2]))
how = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
print(json.dumps([m(ids).logits.tolist(), m.generate(ids, **how).tolist(), m.generate(ids, use_cache=False, **how).tolist()]))
"""


@pytest.mark.parametrize("name,own", [("llama", ""), ("llama, wide heads", ""), ("llama, tied, biases", ""), ("llama, tied, biases", "own"), ("opt", "own"), ("gpt2", "own")])
def test_saved_and_loaded_without_replaceme(name, own, tmp_path):
    "In a fresh process: the same logits, the same tokens with the cache and without; the plain variant needs nobody's code."
    model = make(name)
    small, _ = llm_pruner(model, in_batches(4), ratio=.5, plain=not own)
    save_checkpoint(small, tmp_path)
    assert (tmp_path / "modeling_replaceme.py").exists() == bool(own)
    out = warm.run([sys.executable, "-c", FRESH, str(tmp_path), json.dumps(IDS.tolist()), own], capture_output=True, text=True, fresh=True)
    assert out.returncode == 0, out.stderr[-2000:]
    logits, cached, uncached = json.loads(out.stdout.splitlines()[-1])
    assert cached == uncached and torch.allclose(torch.tensor(logits), small(IDS).logits, atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    if not own:
        assert (config["num_key_value_heads"], config["num_attention_heads"], config["intermediate_size"]) == (1, 2, 32)
        assert config["head_dim"] == model.config.head_dim and config["hidden_size"] == 32 and "auto_map" not in config
    if "tied" in name:
        assert small.get_output_embeddings().weight is small.get_input_embeddings().weight
        assert small.get_input_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_saved_twice(tmp_path):
    small, _ = llm_pruner(make("opt").bfloat16(), in_batches(4), ratio=.5)
    small.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=True).eval()
    again.save_pretrained(tmp_path / "b")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "b", trust_remote_code=True).eval()
    for m in (again, third, copy.deepcopy(small)):
        assert torch.equal(m(IDS).logits, small(IDS).logits) and m.dtype == torch.bfloat16


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama, tied, biases", "cohere"])
def test_the_budget_is_met_but_for_half_a_neuron_a_layer(name, plain):
    model = make(name, 6)
    small, res = llm_pruner(model, in_batches(4), 1.5, plain=plain)
    goal = n_parameters(model) - 1.5 * n_parameters(model.model.layers) / 6
    neuron = 3 * 32 + 2 * ("biases" in name)
    assert abs(n_parameters(small) - goal) <= neuron / 2 * len(res.lost) + 1e-6
    share = [len(o) for o in res.neurons.values()]
    assert min(share) == max(share) > 0  # every layer as many


def test_middle_layers_and_shares():
    assert middle_layers(32) == [*range(4, 30)] and middle_layers(2) == [0, 1]
    assert spread(dict(heads=(8, 1000), neurons=(100, 10)), 2250) == dict(heads=2, neurons=25)
    assert spread(dict(heads=(4, 1000), neurons=(100, 10)), 2500) == dict(heads=2, neurons=50)
    assert spread(dict(heads=(1, 1000), neurons=(100, 10)), 1900) == dict(heads=0, neurons=99)  # one of a kind stays


def test_gradients_leave_nothing_behind():
    model = make("llama", 2)
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    was = [p.requires_grad for p in model.parameters()]
    llm_pruner(model.train(), in_batches(4), ratio=.5)
    assert [p.requires_grad for p in model.parameters()] == was and all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules()) and not torch.is_grad_enabled() is False
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ReplaceMeError):
        llm_pruner(model, in_batches(4), ratio=.5)
    assert [p.requires_grad for p in model.parameters()] == was and n_hooks(model) == 0


class Mixes(nn.Module):
    "An MLP whose neurons look at each other"
    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        return self.down_proj((self.gate_proj(x) * self.up_proj(x)).softmax(-1))


def test_neurons_that_look_at_each_other_are_one_group():
    "A softmax over the neurons: they cannot go one by one, and do not."
    model = make("llama", 2)
    model.model.layers[1].mlp = Mixes(model.model.layers[1].mlp)
    groups = groups_of(model, find_stream(model), [0, 1])
    assert [len(gs) for gs in groups.values()] == [66, 3]
    assert sorted(sum(map(len, g.cols.values())) for g in groups[1]) == [16, 16, 64]


@pytest.mark.parametrize("family", "gemma2 gemma3_text olmo2 mixtral qwen3_moe bloom rwkv".split())
def test_what_cannot_be_told_apart_is_refused_before_anything_is_measured(family):
    with pytest.raises(ReplaceMeError, match="cannot be made narrower"):
        llm_pruner(tiny_model(family, layers=3), None, 1)


def test_wrong_values_are_named():
    model = make("llama")
    for kw, said in ((dict(), "one of the two"), (dict(n=1, ratio=.5), "one of the two"), (dict(ratio=0), "ratio is 0"), (dict(ratio=1.), "ratio is 1.0"),
                     (dict(n=4), "n is 4"), (dict(n=1, taylor="vektor"), "taylor is 'vektor'"), (dict(n=1, layers=[7]), "no layer 7"),
                     (dict(n=1, layers=[]), "layers is empty"), (dict(n=1, layers=[1, 2], plain=True), "use plain=False")):
        with pytest.raises(ReplaceMeError, match=said):
            llm_pruner(model, in_batches(4), **kw)
    with pytest.raises(ReplaceMeError, match="looks at images"):
        llm_pruner(tiny_vision("vit"), None, 1)
    with pytest.raises(ReplaceMeError, match="two tokens or more"):
        llm_pruner(model, [rectangle([TEXTS[0][:1]])], 1)
