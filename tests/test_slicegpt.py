"""SliceGPT: rotations that change nothing, its formulas by hand, and a sliced Llama against a slow float64 computation."""
import copy
import json
import math
import sys

import pytest
import torch
import warm
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from replaceme.activations import capture
from replaceme.arch import n_hooks
from replaceme.core import ReplaceMeError
from replaceme.merge import save_checkpoint
from replaceme.models import tiny_model, tiny_vision
from replaceme.slicegpt import (basis, components, count_at, gain_of, helmert, kept, slicegpt, stream_sums,
                                width_for, widths_of)
from replaceme.stream import find_stream, normalised
from replaceme.widths import n_parameters

GEN = torch.Generator().manual_seed(0)
TEXTS = [torch.randint(3, 300, (int(k),), generator=GEN) for k in torch.randint(2, 20, (11,), generator=GEN)]
IDS = torch.randint(3, 300, (2, 16), generator=GEN)
FAMILIES = {
    "llama": {}, "llama tied": dict(tie_word_embeddings=True), "llama, one key-value head": dict(num_key_value_heads=1),
    "llama, biases": dict(attention_bias=True, mlp_bias=True), "llama, wide heads": dict(head_dim=16),
    "qwen2": {}, "qwen3": {}, "gemma": {}, "phi3": {}, "granite": dict(residual_multiplier=.22, embedding_multiplier=3.),
    "starcoder2": {}, "cohere": {}, "olmo": {}, "gpt2": {}, "opt": {}, "gpt_neox": {}, "falcon": {}, "stablelm": {},
    "helium": {}, "smollm3": {}, "mamba": {}}
ODD_HEADS = ("gpt2", "opt", "gpt_neox", "falcon", "stablelm", "helium")  # the config derives the width of a head


def make(name, layers=3, **kw):
    return tiny_model(name.split()[0].strip(","), layers=layers, **FAMILIES.get(name, {}), **kw)


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


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_rotation_changes_nothing(name, plain):
    "Fraction 1: the logits of the dense model, which itself is left as it was."
    model = make(name)
    before, state = model(IDS).logits, copy.deepcopy(model.state_dict())
    small, res = slicegpt(model, in_batches(4), fraction=1, plain=plain)
    assert rel(small(IDS).logits, before) < 1e-5
    assert res.removed == [] and res.blocks == [] and res.tokens == sum(map(len, TEXTS)) and res.fraction == 1
    assert all(abs(e - 1) < 1e-6 for e in res.kept)
    assert torch.equal(model(IDS).logits, before) and n_hooks(model) == 0
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    q = next(n for n, p in small.named_parameters() if "layers.1." in n or ".h.1." in n)  # it is another basis
    assert not torch.allclose(dict(small.named_parameters())[q], dict(model.named_parameters())[q], atol=1e-2)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_stream_that_is_flat_is_sliced_without_loss(name, plain):
    "What writes leaves out eight directions: of 32 channels 24 hold all there is, and one more for LayerNorm's mean."
    model = make(name)
    st, g = find_stream(model), torch.Generator().manual_seed(3)
    q = torch.linalg.qr(torch.cat([torch.ones(32, 1), torch.randn(32, 31, generator=g)], 1))[0][:, 1:]
    q = torch.linalg.qr(torch.randn(32, 32, generator=g))[0][:, :24] if not st.centred else q[:, :23]
    P, mods = q @ q.T, dict(model.named_modules())
    for e in st.embeddings:
        mods[e].weight.copy_(mods[e].weight @ P)
    for w in {k for s in st.steps for k in s.writers}:
        m = mods[w]
        m.weight.copy_(m.weight @ P if isinstance(m, Conv1D) else P @ m.weight)
        if m.bias is not None:
            m.bias.copy_(m.bias @ P)
    if plain and name in ODD_HEADS:
        with pytest.raises(ReplaceMeError, match="use plain=False"):
            slicegpt(model, in_batches(4), fraction=.75, plain=plain)
        return
    same, res = slicegpt(model, in_batches(4), fraction=.75, plain=plain)
    worse, _ = slicegpt(model, in_batches(4), fraction=.625, plain=plain)
    assert res.width == 24 and same.config.hidden_size == 24
    assert rel(same(IDS).logits, model(IDS).logits) < 1e-3 < .02 < rel(worse(IDS).logits, model(IDS).logits)


def test_components_of_a_known_covariance():
    "Rows drawn along known directions with known energies, and a tie to no order of columns"
    g = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=g).double())[0]
    energy = torch.tensor([36., 25., 16., 9., 4., 1.]).double()
    H = (Q * energy) @ Q.T
    U = components(H)
    assert torch.allclose((U.T @ Q).abs(), torch.eye(6).double(), atol=1e-10)
    assert torch.allclose(components(H, damping=5.).abs(), U.abs(), atol=1e-9)  # damping turns nothing
    assert math.isclose(kept(H, U[:, :3]), 77 / 91)
    x = torch.randn(200, 6, generator=g).double()
    x = x - x.mean(1, keepdim=True)
    V = components(x.T @ x, centred=True)
    assert V.shape == (6, 5) and torch.allclose(V.T @ V, torch.eye(5).double()) and V.sum(0).abs().max() < 1e-12
    R = basis(V, 4, centred=True)
    assert torch.allclose(R.T @ R, torch.eye(4).double() - .25, atol=1e-12)  # a projection: three dimensions in four
    assert torch.allclose(helmert(2), torch.tensor([[1., -1.]]).double() / 2**.5) or torch.allclose(helmert(2), torch.tensor([[-1., 1.]]).double() / 2**.5)


def test_the_gain_is_the_root_of_kept_energy_times_the_widths():
    x = torch.tensor([[3., 0., 0., 4.]]).double()
    R = torch.eye(4).double()[:, :2]
    s = gain_of(kept(x.T @ x, R), 4, 2)
    assert math.isclose(s, math.sqrt(9 / 25 * 4 / 2))
    assert torch.allclose(normalised(x @ R) * s, normalised(x) @ R)  # one token: exact
    small = slicegpt(tiny_model(layers=2), in_batches(4), fraction=.5, plain=True)
    norms = [m.weight for n, m in small[0].named_modules() if "norm" in n]
    assert len(norms) == len(small[1].kept) == 5
    for w, e in zip(norms, small[1].kept):
        assert torch.allclose(w, torch.full((16,), math.sqrt(e * 32 / 16))) and .2 < e < 1
    paper = slicegpt(tiny_model(layers=2), in_batches(4), fraction=.5)[0]  # its norm divides by the dense width
    assert torch.allclose(paper.model.norm.weight, torch.full((16,), 2**.5))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sums_do_not_depend_on_batches_and_padding(name):
    model = make(name)
    st = find_stream(model)
    ref = stream_sums(model, st, in_batches(1))
    ways = [in_batches(4), in_batches(11, pad=7), in_batches(3)[::-1]]
    if name == "llama":  # rotary positions do not mind where a text begins
        ways.append(in_batches(4, left=True, pad=9))
    for bs in ways:
        for a, b in zip(stream_sums(model, st, bs), ref):
            assert rel(a, b) < 1e-5
    acts = [capture(model, rectangle([t])).S for t in TEXTS]
    x = torch.cat([a[2] for a in acts]).double()  # what enters layer 2
    z = normalised(x, st.centred)
    assert rel(ref[4], z.T @ z) < 1e-5
    x = x - st.centred * x.mean(1, keepdim=True)
    assert rel(stream_sums(model, st, in_batches(4), normed=False)[4], x.T @ x) < 1e-5


def slow_llama(model, ids, bases, gains):
    "The sliced Llama, written out in float64 with the dense weights: the stream is projected, the norms divide by fewer channels"
    p, c = {k: v.double() for k, v in model.state_dict().items()}, model.config
    k, hd, nh, nk = bases[0].shape[1], c.head_dim, c.num_attention_heads, c.num_key_value_heads
    P, S = [R @ R.T for R in bases], ids.shape[1]
    angle = torch.arange(S).double()[:, None] / c.rope_parameters["rope_theta"]**(torch.arange(0, hd, 2).double() / hd)
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([angle.sin()] * 2, 1)

    def norm(x, w, s):
        return s * x / (x.square().sum(-1, keepdim=True) / k + c.rms_norm_eps).sqrt() * w

    def rope(q):
        return q * cos + torch.cat([-q[..., hd // 2:], q[..., :hd // 2]], -1) * sin

    x, i = p["model.embed_tokens.weight"][ids] @ P[0], 0
    for l in range(c.num_hidden_layers):
        at = f"model.layers.{l}."
        z = norm(x, p[at + "input_layernorm.weight"], gains[i])
        q, key, v = [(z @ p[f"{at}self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, hd)).transpose(1, 2) for n in "qkv"]
        key, v = [t.repeat_interleave(nh // nk, 1) for t in (rope(key), v)]
        score = (rope(q) @ key.transpose(2, 3)) / hd**.5 + torch.full((S, S), -math.inf).double().triu(1)
        out = (score.softmax(-1) @ v).transpose(1, 2).flatten(2) @ p[at + "self_attn.o_proj.weight"].T
        x, i = (x + out) @ P[i + 1], i + 1
        z = norm(x, p[at + "post_attention_layernorm.weight"], gains[i])
        g = z @ p[at + "mlp.gate_proj.weight"].T
        out = (g * g.sigmoid() * (z @ p[at + "mlp.up_proj.weight"].T)) @ p[at + "mlp.down_proj.weight"].T
        x, i = (x + out) @ P[i + 1], i + 1
    return norm(x, p["model.norm.weight"], gains[i]) @ p["lm_head.weight"].T


@pytest.mark.parametrize("plain", [True, False])
@torch.no_grad()
def test_against_a_slow_computation(plain):
    "Sums of all states at once, eigenvectors, a forward pass by hand: the logits of the sliced model."
    model = make("llama tied")
    acts = [capture(model, rectangle([t])).S for t in TEXTS]
    st = find_stream(model)
    mid = stream_sums(model, st, in_batches(1), normed=plain)  # the odd ones lie inside the layers
    H = []
    for i in range(7):
        if i % 2 == 0:
            x = torch.cat([a[i // 2] for a in acts]).double()
            z = x / x.square().mean(1, keepdim=True).sqrt() if plain else x
            H.append(z.T @ z)
        else:
            H.append(mid[i])
    top = lambda h: torch.linalg.eigh(h)[1].flip(1)[:, :20]
    Rs = [top(sum(h / h.trace() for h in H))] * 7 if plain else [top(h) for h in H]
    gains = [math.sqrt(((R.T @ h @ R).trace() / h.trace() if plain else 1) * 32 / 20) for h, R in zip(H, Rs)]
    small, res = slicegpt(model, in_batches(4), fraction=20 / 32, plain=plain)
    assert rel(small(IDS).logits.double(), slow_llama(model, IDS, Rs, gains)) < 1e-4
    assert rel(small(IDS).logits, model(IDS).logits) > .05  # so the line above could have failed
    assert res.untied and small.config.tie_word_embeddings is False


FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
sys.modules["replaceme"] = None
m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[3] == "own").eval()
ids = torch.tensor(json.loads(sys.argv[2]))
how = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
print(json.dumps([m(ids).logits.tolist(), m.generate(ids, **how).tolist(), m.generate(ids, use_cache=False, **how).tolist()]))
"""


@pytest.mark.parametrize("name,own", [("llama tied", ""), ("starcoder2", ""), ("gemma", ""), ("llama tied", "own"), ("gpt2", "own"), ("olmo", "own"), ("falcon", "own"), ("gpt_neox", "own")])
@torch.no_grad()
def test_saved_and_loaded_without_replaceme(name, own, tmp_path):
    "In a fresh process: the same logits, the same tokens with the cache and without; the plain variant needs nobody's code."
    small, res = slicegpt(make(name), in_batches(4), fraction=.6, plain=not own)
    save_checkpoint(small, tmp_path)
    assert (tmp_path / "modeling_replaceme.py").exists() == bool(own)
    out = warm.run([sys.executable, "-c", FRESH, str(tmp_path), json.dumps(IDS.tolist()), own], capture_output=True, text=True, fresh=True)
    assert out.returncode == 0, out.stderr[-2000:]
    logits, cached, uncached = json.loads(out.stdout.splitlines()[-1])
    assert cached == uncached and torch.allclose(torch.tensor(logits), small(IDS).logits, atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.get("hidden_size", config.get("n_embd")) == res.width and res.width in (19, 20)
    if not own:
        assert config["head_dim"] == 8 and "auto_map" not in config and not config["tie_word_embeddings"]


@torch.no_grad()
def test_saved_twice_and_in_half_precision(tmp_path):
    small, _ = slicegpt(make("opt").bfloat16(), in_batches(4), fraction=.6)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    small.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=True).eval()
    again.save_pretrained(tmp_path / "b")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "b", trust_remote_code=True).eval()
    for m in (again, third, copy.deepcopy(small)):
        assert torch.equal(m(IDS).logits, small(IDS).logits) and m.config.hidden_size == 19
    dense = make("opt")
    assert rel(slicegpt(dense.bfloat16(), in_batches(4), fraction=1)[0](IDS).logits.float(), make("opt")(IDS).logits) < .05


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama tied", "cohere", "starcoder2"])
def test_the_budget_is_met_as_nearly_as_widths_allow(name, plain):
    model = make(name, layers=6)
    st = find_stream(model)
    goal = n_parameters(model) - 2 * n_parameters(model.model.layers[1])
    k = width_for(model, st, 2, plain)
    small, res = slicegpt(model, in_batches(4), 2, plain=plain)
    assert res.width == k and res.parameters == n_parameters(small) == count_at(model, st, k, plain)
    assert all(abs(res.parameters - goal) <= abs(count_at(model, st, j, plain) - goal) for j in widths_of(model, st))
    assert res.dense_parameters == n_parameters(model) and 0 < res.fraction < 1


class Peeks(nn.Module):
    "An MLP that looks at one channel of what the norm puts out, not through a matrix"
    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        return self.down_proj(self.gate_proj(x).sigmoid() * self.up_proj(x) * (1 + x[..., :1].tanh()))


def test_who_reads_the_stream_in_secret_is_found_by_running_it():
    model = make("llama")
    model.model.layers[1].mlp = Peeks(model.model.layers[1].mlp)
    find_stream(model)  # nothing is to be seen from outside
    for plain in (True, False):
        with pytest.raises(ReplaceMeError, match="something besides the norms and matrices that were found"):
            slicegpt(model, None, fraction=1, plain=plain)  # before any batch is looked at


@pytest.mark.parametrize("family", "gemma2 gemma3_text olmo2 mixtral qwen3_moe bloom rwkv glm4 nemotron_h".split())
def test_what_cannot_be_turned_is_refused_before_anything_is_measured(family):
    with pytest.raises(ReplaceMeError, match="cannot be made narrower"):
        slicegpt(tiny_model(family, layers=3), None, fraction=.5)


def test_wrong_values_are_named():
    model = make("llama")
    for kw, said in ((dict(), "one of the two"), (dict(n=1, fraction=.5), "one of the two"), (dict(fraction=0), "fraction is 0"),
                     (dict(fraction=1.2), "fraction is 1.2"), (dict(n=3), "n is 3"), (dict(n=0), "n is 0")):
        with pytest.raises(ReplaceMeError, match=said):
            slicegpt(model, None, **kw)
    with pytest.raises(ReplaceMeError, match="looks at images"):
        slicegpt(tiny_vision("vit"), None, 1)
    with pytest.raises(ReplaceMeError, match="several places"):
        slicegpt(make("llama").to("meta"), None, 1)


def test_a_nan_is_blamed_on_its_layer():
    model = make("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = math.nan
    with pytest.raises(ReplaceMeError, match="NaN or infinity"):
        slicegpt(model, in_batches(4), fraction=.5)
