"""The methods ReplaceMe is compared with, each against a slow computation of its published formula in float64."""
import gc
import math

import pytest
import scipy.fft
import scipy.linalg
import torch
from accelerate import cpu_offload
from transformers import AutoModel, AutoModelForCausalLM

from replaceme.activations import capture
from replaceme.arch import hooks, layers_of, n_hooks, n_positions, run
from replaceme.baselines import (BASELINES, check_plain, collapse, collapsed, first_texts, influences, laco, linearpatch, lowest, patch_of, rotation,
                                 shortgpt, states_cosine, uidl)
from replaceme.blocks import Block
from replaceme.core import ReplaceMeError, ReplaceMeWarning
from replaceme.evaluate import last_states
from replaceme.merge import cut, save_checkpoint
from replaceme.models import tiny_model, tiny_vision

GEN = torch.Generator().manual_seed(0)
TEXTS = [torch.randint(3, 300, (int(k),), generator=GEN) for k in torch.randint(2, 20, (11,), generator=GEN)]
IDS = torch.randint(3, 300, (2, 16), generator=GEN)
OPTIONS = dict(uidl={}, shortgpt={}, laco=dict(C=3, I=1, threshold=-1.0), linearpatch={})


def rectangle(rows, left=False, pad=0):
    "A padded batch; the ids under the padding are `pad`"
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for i, r in enumerate(rows):
        at = slice(width - len(r), width) if left else slice(0, len(r))
        ids[i, at], mask[i, at] = r, 1
    return dict(input_ids=ids, attention_mask=mask)


def in_batches(size, **kw):
    return [rectangle(TEXTS[i:i + size], **kw) for i in range(0, len(TEXTS), size)]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=7)


@pytest.fixture(scope="module")
def states(model):
    "The states of each text alone, `(L+1,T,d)`"
    acts = [capture(model, rectangle([t])) for t in TEXTS]
    return [torch.stack([a.S[i] for i in range(8)]).double() for a in acts]


def cos(x, y):
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


def numbers(res):
    "What decided, as one vector"
    if hasattr(res, "influence"):
        return torch.tensor(res.influence)
    if hasattr(res, "tries"):
        return torch.tensor([t["cosine"] for t in res.tries])
    return torch.tensor([*res.distances.values(), *getattr(res, "r", [])])


@pytest.mark.parametrize("name", BASELINES)
def test_batches_do_not_matter(model, name):
    "Batch size, which token pads, and for how long: the same layers and the same numbers."
    f = BASELINES[name]
    small, ref = f(model, in_batches(1), 3, **OPTIONS[name])
    wide = [{k: torch.nn.functional.pad(v, (0, 5)) for k, v in b.items()} for b in in_batches(4)]
    for bs in (in_batches(4), in_batches(11, pad=7), wide):
        other, res = f(model, bs, 3, **OPTIONS[name])
        assert res.removed == ref.removed and res.tokens == ref.tokens
        assert (numbers(res) - numbers(ref)).abs().max() < 1e-5
        assert (other(IDS).logits - small(IDS).logits).abs().max() < 1e-4


def test_tokens_are_counted_without_padding(model):
    total, ten = sum(map(len, TEXTS)), sum(map(len, TEXTS[:10]))
    for name, f in BASELINES.items():
        assert f(model, in_batches(4), 2, **OPTIONS[name])[1].tokens == (ten if name == "laco" else total)
    assert uidl(model, None, 2, simple=True)[1].tokens == 0


@pytest.mark.parametrize("n", [1, 3, 6])
def test_uidl(model, states, n):
    small, res = uidl(model, in_batches(4), n)
    want = {s: torch.stack([cos(S[s, -1], S[s + n, -1]).arccos() / math.pi for S in states]).mean().item() for s in range(1, 8 - n)}
    assert {b.start: d for b, d in res.distances.items()} == pytest.approx(want, abs=1e-6)
    s = min(want, key=want.get)
    assert res.removed == [*range(s, s + n)] and len(layers_of(small)) == 7 - n
    assert torch.equal(small(IDS).logits, cut(model, [Block(s, s + n)])(IDS).logits)


def test_uidl_simple(model):
    for n in range(1, 6):
        small, res = uidl(model, None, n, simple=True)
        assert res.removed == [*range(6 - n, 6)] and res.distances == {}
        assert layers_of(small)[-1].mlp.down_proj.weight.data_ptr() == layers_of(model)[6].mlp.down_proj.weight.data_ptr()
    with pytest.raises(ReplaceMeError, match="use at most 5"):
        uidl(model, None, 6, simple=True)


def test_influence_is_the_formula(model, states):
    want = torch.stack([1 - torch.cat([cos(S[i], S[i + 1]) for S in states]).mean() for i in range(7)])
    assert (influences(model, in_batches(4)) - want).abs().max() < 1e-6


def test_shortgpt_takes_the_lowest(model):
    for n in (1, 3, 5):
        small, res = shortgpt(model, in_batches(4), n)
        rest = [i for i in range(1, 7) if i not in res.removed]
        assert len(res.removed) == n and max(res.influence[i] for i in res.removed) <= min(res.influence[i] for i in rest)
        assert torch.equal(small(IDS).logits, cut(model, [Block(i, i + 1) for i in res.removed])(IDS).logits)


def test_shortgpt_keeps_the_first_layer():
    "Layer 0 made to do nothing is the lowest; it stays, and that is said."
    model = tiny_model("llama", layers=6)
    with torch.no_grad():
        layers_of(model)[0].mlp.down_proj.weight.zero_()
        layers_of(model)[0].self_attn.o_proj.weight.zero_()
    with pytest.warns(ReplaceMeWarning, match="layer 0 is among the 2 with the lowest influence"):
        small, res = shortgpt(model, in_batches(4), 2)
    assert res.influence[0] == pytest.approx(0, abs=1e-6) and res.passed == [0]
    assert res.removed == sorted(sorted(range(1, 6), key=lambda i: res.influence[i])[:2])
    assert lowest([0.5, 0.1, 0.2], 2) == ([1, 2], [])


@pytest.mark.parametrize("m", [1, 2, 3])
def test_collapse_is_the_formula(m):
    "Toy weights of two and four numbers; the telescoped sum of the released code is another one as soon as m is 2."
    theta = torch.randn(m + 1, 2, 2, generator=GEN).double()
    want = theta[0] + sum(theta[k] - theta[0] for k in range(1, m + 1))
    assert torch.allclose(collapsed(theta[0], list(theta[1:])), want, atol=1e-14)
    released = theta[0].clone()
    for k in range(1, m + 1):
        released += theta[k] - released
    assert torch.allclose(released, theta[m], atol=1e-14) and torch.allclose(released, want, atol=1e-3) == (m == 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_collapse_casts_once(dtype):
    w = [torch.randn(4, 4, generator=GEN).to(dtype) for _ in range(4)]
    assert torch.equal(collapsed(w[0], w[1:]), sum(x.double() for x in w[1:]).sub(2 * w[0].double()).to(dtype))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral", "opt"])
def test_collapse_of_all_weights(family):
    "Matrices, biases, norms and experts of the layer that stays; everything else is shared."
    model = tiny_model(family, layers=6)
    new, old = collapse(model, 2, 2), [dict(x.named_parameters()) for x in layers_of(model)]
    for k, p in layers_of(new)[2].named_parameters():
        assert torch.allclose(p, old[3][k] + old[4][k] - old[2][k], atol=1e-6), k
    own = {p.data_ptr() for p in layers_of(new)[2].parameters()}
    ours = {p.data_ptr() for p in model.parameters()}
    assert all((p.data_ptr() in ours) != (p.data_ptr() in own) for p in new.parameters())


def test_laco_search_is_the_algorithm(model):
    "Every try of the record, done again by hand on the layers that are left; thresholds that refuse some and let others pass."
    few = [rectangle([t]) for t in TEXTS[:10]]
    refs = [run(model, b)[0].double().flatten() for b in few]
    for C, shift, threshold, n in ((2, 1, 0.9, 2), (3, 1, 0.5, 3), (2, 2, 0.8, 3), (4, 2, 0.1, 4)):
        now, keep, at, want = model, list(range(7)), 7 - min(C, n + 1), []
        while at >= 0 and len(keep) > 7 - n:
            m = min(C - 1, n - (7 - len(keep)), len(keep) - 1 - at)
            trial = collapse(now, at, m)
            s = sum(cos(r, run(trial, b)[0].double().flatten()).item() for r, b in zip(refs, few)) / 10
            want.append((keep[at], keep[at + 1:at + 1 + m], s, s > threshold))
            if s > threshold:
                now, keep = trial, keep[:at + 1] + keep[at + 1 + m:]
                at = min(at - shift, len(keep) - C)
            else:
                at -= 1
        if len(keep) > 7 - n:
            with pytest.raises(ReplaceMeError, match="lets %d of %d layers go in %d tries" % (7 - len(keep), n, len(want))):
                laco(model, in_batches(4), n, C, shift, threshold)
            continue
        small, res = laco(model, in_batches(4), n, C, shift, threshold)
        assert [(t["layer"], t["takes"], t["accepted"]) for t in res.tries] == [(a, b, d) for a, b, _, d in want]
        assert [t["cosine"] for t in res.tries] == pytest.approx([c for _, _, c, _ in want], abs=1e-5)
        assert res.removed == sorted(set(range(7)) - set(keep)) and torch.equal(small(IDS).logits, now(IDS).logits)


def test_laco_stops_at_n(model):
    for n in range(1, 7):
        small, res = laco(model, in_batches(4), n, threshold=-1.0)
        assert len(res.removed) == n == sum(len(t["takes"]) for t in res.tries) and len(layers_of(small)) == 7 - n
        assert all(len(t["takes"]) == 3 for t in res.tries[:-1])


def test_laco_looks_at_a_few_texts(model):
    assert [len(b["attention_mask"]) for b in first_texts(in_batches(4), 10)] == [4, 4, 2]
    a, b = [laco(model, in_batches(4), 2, threshold=-1.0, texts=k)[1] for k in (3, 99)]
    assert (a.tokens, b.tokens) == (sum(map(len, TEXTS[:3])), sum(map(len, TEXTS)))
    assert a.tries[0]["cosine"] != b.tries[0]["cosine"]


@pytest.mark.parametrize("options", [dict(C=1), dict(C=2.5), dict(I=0), dict(texts=0), dict(C=True)])
def test_laco_refuses_bad_numbers(model, options):
    with pytest.raises(ReplaceMeError, match="must be a whole number"):
        laco(model, in_batches(4), 2, **options)


def test_laco_keeps_kinds_apart():
    "Dense and sparse layers of one model do not collapse into each other."
    model = tiny_model("deepseek_v3", layers=6, first_k_dense_replace=2)
    small, res = laco(model, in_batches(4), 3, C=3, threshold=-1.0)
    kinds = [type(x.mlp) for x in layers_of(model)]
    assert len(layers_of(small)) == 3
    assert all(kinds[i] is kinds[t["layer"]] for t in res.tries for i in t["takes"])


def test_laco_refuses_packed_weights():
    model = tiny_model("llama", layers=4)
    layers_of(model)[1].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(32, 64, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ReplaceMeError, match="1.mlp.down_proj.weight of the layers is quantised"):
        check_plain(model)


def test_states_cosine(model):
    refs = last_states(model, in_batches(4))
    assert states_cosine(refs, refs, in_batches(4)) == pytest.approx(1, abs=1e-9)
    assert states_cosine(refs, [-x for x in refs], in_batches(4)) == pytest.approx(-1, abs=1e-9)


@pytest.mark.parametrize("d", [1, 2, 4, 8, 12, 20, 28, 32, 36, 48, 64, 96, 112, 320, 384, 576])
def test_rotation_is_hadamard(d):
    H, true = rotation(d)
    assert true and torch.allclose(H @ H.T, torch.eye(d).double(), atol=1e-12)
    assert torch.allclose(H.abs(), torch.full((d, d), d ** -0.5).double(), atol=1e-14)
    if d & (d - 1) == 0:
        assert torch.allclose(H, torch.tensor(scipy.linalg.hadamard(d)).double() / d ** 0.5)


@pytest.mark.parametrize("d", [3, 9, 10, 18, 30, 52, 100])
def test_rotation_without_hadamard(d):
    "Orthonormal, mixes all channels, and says that it is not the paper's."
    H, true = rotation(d)
    assert not true and torch.allclose(H @ H.T, torch.eye(d).double(), atol=1e-12)
    m = d // (d & -d)
    dct = torch.tensor(scipy.fft.dct(torch.eye(m).double().numpy(), norm="ortho", axis=0))
    assert torch.allclose(H, torch.kron(torch.tensor(scipy.linalg.hadamard(d // m)).double() / (d // m) ** 0.5, dct), atol=1e-12)


def test_patch_by_hand():
    "Four channels: ratios 1, 2, 3, 4 in the Hadamard basis, so that P has them as eigenvalues."
    H, true = rotation(4)
    r = torch.tensor([1.0, 2, 3, 4]).double()
    P, got = patch_of(H, torch.ones(4).double(), r)
    by_hand = torch.tensor([[10, -2, -4, 0], [-2, 10, 0, -4], [-4, 0, 10, -2], [0, -4, -2, 10]]).double() / 4
    assert torch.equal(got, r) and torch.allclose(P, by_hand, atol=1e-14)
    assert torch.allclose(P @ H, H * r, atol=1e-14)


@pytest.mark.parametrize("family,d", [("llama", 32), ("gpt2", 36), ("gemma2", 32), ("llama", 24), ("opt", 40)])
def test_linearpatch(family, d):
    "The ratios and the model, against all states of each text alone and a patch applied by a hook."
    model = tiny_model(family, layers=6, d=d)
    small, res = linearpatch(model, in_batches(4), 2)
    (s, e), (H, true) = res.blocks[0], rotation(d)
    acts = [capture(model, rectangle([t])) for t in TEXTS]
    S, E = [torch.cat([a.S[i] for a in acts]).double() for i in (s, e)]
    r = (E @ H).abs().mean(0) / (S @ H).abs().mean(0)
    assert torch.allclose(res.r, r, rtol=1e-4) and res.hadamard == true
    want = {b: 1 - cos(*[torch.cat([a.S[i] for a in acts]).double() for i in b]).mean().item() for b in res.distances}
    assert res.distances == pytest.approx(want, abs=1e-6) and (s, e) == tuple(min(want, key=want.get))

    def patch(layer, args, out):
        x = out[0] if isinstance(out, tuple) else out
        y = (x.double() @ H @ torch.diag(r) @ H.T).float()
        return (y, *out[1:]) if isinstance(out, tuple) else y

    plain = cut(model, [Block(s, e)])
    with hooks(layers_of(plain)[s - 1].register_forward_hook(patch)):
        ref = plain(IDS).logits
    assert torch.allclose(small(IDS).logits, ref, atol=1e-4)


def test_linearpatch_behind_a_given_block(model):
    small, res = linearpatch(model, in_batches(4), 2, Block(5, 7))
    assert res.removed == [5, 6] and res.distances == {} and len(layers_of(small)) == 5
    with pytest.raises(ReplaceMeError, match="has 2 layers, but n is 3"):
        linearpatch(model, in_batches(4), 3, Block(5, 7))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2"])
def test_saved_and_loaded(name, family, tmp_path):
    "The dense model stays as it is, to the last bit and hook; the pruned one is loaded by transformers and generates with its cache."
    model = tiny_model(family, layers=6)
    before, hung, config = {k: p.clone() for k, p in model.state_dict().items()}, n_hooks(model), model.config.to_dict()
    small, res = BASELINES[name](model, in_batches(4), 2, **OPTIONS[name])
    assert all(torch.equal(p, before[k]) for k, p in model.state_dict().items())
    assert n_hooks(model) == hung and model.config.to_dict() == config and len(layers_of(model)) == 6
    ours = {p.data_ptr() for p in model.parameters()}
    new = [k for k, p in small.named_parameters() if p.data_ptr() not in ours]
    if name == "linearpatch":
        assert [k.split(".", 3)[-1] for k in new] == ["replaceme_map.weight"]
    else:
        assert bool(new) == (name == "laco")
    save_checkpoint(small, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=name == "linearpatch").eval()
    assert torch.equal(again(IDS).logits, small(IDS).logits)
    tokens = [again.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", BASELINES)
def test_image_encoder(name, tmp_path):
    model = tiny_vision("vit", layers=6)
    size, gen = model.config.image_size, torch.Generator().manual_seed(1)
    batches = [dict(pixel_values=torch.randn(2, 3, size, size, generator=gen), attention_mask=torch.ones(2, n_positions(model)).long()) for _ in range(2)]
    small, res = BASELINES[name](model, batches, 2, **OPTIONS[name])
    save_checkpoint(small, tmp_path)
    again = AutoModel.from_pretrained(tmp_path, trust_remote_code=name == "linearpatch").eval()
    assert len(layers_of(again)) == 4 and torch.equal(run(again, batches[0])[0], run(small, batches[0])[0])
    one = [{k: v[i:i + 1] for k, v in b.items()} for b in batches for i in range(2)]
    assert (numbers(BASELINES[name](model, one, 2, **OPTIONS[name])[1]) - numbers(res)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["uidl", "shortgpt", "linearpatch"])
def test_memory_is_flat_in_tokens(model, name):
    "Before each batch no more tensors are alive than before the third, however many came by."
    alive, layer = [], layers_of(model)[0]

    def count(*_):
        own = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
        alive.append(sum(t.untyped_storage().nbytes() for t in own))

    batches = [rectangle([TEXTS[2]] * 4)] * 12
    with hooks(layer.register_forward_pre_hook(count)):
        BASELINES[name](model, batches, 2)
    assert len(alive) >= 12 and max(alive[3:12]) - alive[2] < TEXTS[2].numel() * 32 * 4


@pytest.mark.parametrize("name", BASELINES)
def test_offloaded(name):
    "Weights that accelerate keeps elsewhere give the same result."
    ref, want = BASELINES[name](tiny_model("llama", layers=6), in_batches(4), 2, **OPTIONS[name])
    away = cpu_offload(tiny_model("llama", layers=6), "cpu")
    small, res = BASELINES[name](away, in_batches(4), 2, **OPTIONS[name])
    assert res.removed == want.removed and torch.allclose(small(IDS).logits, ref(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("name", BASELINES)
def test_wrong_numbers(model, name):
    for n, match in ((0, "at least 1"), (7, "use at most 6"), (1.5, "whole number")):
        with pytest.raises(ReplaceMeError, match=match):
            BASELINES[name](model, in_batches(4), n)


@pytest.mark.parametrize("name", ["uidl", "shortgpt", "linearpatch"])
def test_not_a_number(name):
    model = tiny_model("llama", layers=6)
    with torch.no_grad():
        model.model.embed_tokens.weight[310] = torch.nan
    texts = [t.clone() for t in TEXTS]
    texts[5][-1] = 310
    with pytest.raises(ReplaceMeError, match="the embeddings, text 5"):
        BASELINES[name](model, [rectangle(texts[i:i + 4]) for i in range(0, 11, 4)], 2, **(dict(block=Block(2, 4)) if name == "linearpatch" else {}))


def test_a_model_that_cannot_lose_single_layers():
    gpt2 = tiny_model("gpt2", layers=6, scale_attn_by_inverse_layer_idx=True)
    small, res = uidl(gpt2, in_batches(4), 2)
    assert res.removed == [4, 5]
    with torch.no_grad():  # now layer 2 does nothing, but those behind it would get other scales
        for m in (layers_of(gpt2)[2].attn.c_proj, layers_of(gpt2)[2].mlp.c_proj):
            m.weight.zero_(), m.bias.zero_()
    with pytest.raises(ReplaceMeError, match=r"without layers \[2,3\) its config would rebuild"):
        shortgpt(gpt2, in_batches(4), 1)


@pytest.mark.parametrize("name", BASELINES)
def test_plots(model, name):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    res = BASELINES[name](model, in_batches(4), 2, **OPTIONS[name])[1]
    fig, ax = plt.subplots()
    assert res.plot(ax) is ax and ax.get_xlabel() and ax.get_ylabel() and (ax.lines or ax.patches)
    assert res.plot() is not ax
    plt.close("all")
