"""Linear maps and networks of their own: loaded where replaceme is not, refused without their file, and through every way of loading."""
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import warm
import transformers
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

from replaceme.arch import first, hooks, layers_of, n_hooks
from replaceme.blocks import Block
from replaceme.core import ReplaceMeError
from replaceme.merge import cut, differs_when_rebuilt
from replaceme.models import tiny_model, tiny_vision
from replaceme.unmerged import linear_cost, linear_layers, map_kinds, modelling_source, replace_linear, token_cost, with_linear, with_network

BLOCK = Block(2, 4)
G = torch.Generator().manual_seed(0)
T = torch.eye(32, dtype=torch.float64) + 0.3 * torch.randn(32, 32, generator=G).double()
B = torch.randn(32, generator=G).double()
IDS = torch.randint(3, 300, (2, 12), generator=G)
PIXELS = torch.rand(2, 3, 32, 32, generator=G)
FAMILIES = ["llama", "gemma2", "olmo2", "mixtral", "gpt2", "gpt_neox", "mamba"]
HOW = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)


NETWORKS = ["ffn", "swiglu"]


def formula(kind, p, x):
    "A network written out in float64: `p` are its values by name."
    p, x = {k: v.detach().double() for k, v in p.items()}, x.double()
    n = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p["norm"]
    up = torch.einsum("...d,hd->...h", n, p["up"])
    if kind == "ffn":
        h = up * torch.distributions.Normal(0.0, 1.0).cdf(up)
    else:
        gate = torch.einsum("...d,hd->...h", n, p["gate"])
        h = gate * torch.sigmoid(gate) * up
    return x + torch.einsum("...h,dh->...d", h, p["down"])


def trained(model, i, kind, seed=0):
    "A model with a network behind layer `i` whose values are no longer those of the start."
    new = with_network(model, i, kind)
    g = torch.Generator().manual_seed(seed)
    for p in layers_of(new)[i].replaceme_map.parameters():
        p.data = (torch.randn(p.shape, generator=g) / p.shape[-1]**0.5 + (p.ndim == 1)).to(p)
    return new


def by_hand(model, i, T, b=None):
    "The map, or any function of the state, applied in float64 by a hook on a plain model."
    f = T if callable(T) else lambda x: x @ T + b
    def hook(layer, args, out):
        new = f(first(out).double()).to(first(out).dtype)
        return (new, *out[1:]) if isinstance(out, tuple) else new
    return hooks(layers_of(model)[i].register_forward_hook(hook))


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch):
    "Code of checkpoints goes to a folder of the test's own."
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("HF_MODULES_CACHE", cache)


FRESH = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
folder, families = sys.argv[1], sys.argv[2].split()
ids, pixels, how = torch.load(folder+'/inputs.pt')
out = {}
with torch.no_grad():
    for f in families:
        for name, kw in dict(plain={}, auto=dict(device_map='auto'), half=dict(dtype='bfloat16')).items():
            m = AutoModelForCausalLM.from_pretrained(f'{folder}/{f}', trust_remote_code=True, **kw).eval()
            out[f, name] = m(ids).logits.float()
            out[f, name, 'dtypes'] = {p.dtype for n, p in m.named_parameters() if 'replaceme_map' in n}
            if name=='plain':
                out[f, 'cache'], out[f, 'no cache'] = m.generate(ids, **how), m.generate(ids, use_cache=False, **how)
                m.save_pretrained(f'{folder}/{f}-again')
                out[f, 'again'] = AutoModelForCausalLM.from_pretrained(f'{folder}/{f}-again', trust_remote_code=True).eval()(ids).logits
    out['vit'] = AutoModel.from_pretrained(folder+'/vit', trust_remote_code=True).eval()(pixels)[0]
assert not any(n=='replaceme' or n.startswith('replaceme.') for n in sys.modules)
torch.save(out, folder+'/out.pt')
"""


def python(code, *args):
    "Run code in a process of its own that has no terminal."
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return warm.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env, fresh=True)


def test_a_fresh_process_computes_the_same(tmp_path):
    "Sharded, on a device map, in another dtype, with and without cache, and saved once more by a process without replaceme."
    expected = {}
    for family in FAMILIES:
        model = tiny_model(family, layers=6)
        small = replace_linear(model, BLOCK, T, B)
        with torch.no_grad(), by_hand(plain := cut(model, [BLOCK]), 1, T, B):
            expected[family] = plain(IDS).logits
            tokens = plain.generate(IDS, **HOW)
        expected[family, "tokens"] = tokens
        small.save_pretrained(tmp_path / family, max_shard_size="40KB")
        assert len(list((tmp_path / family).glob("model-*.safetensors"))) > 1
    vit = replace_linear(tiny_vision("vit", layers=6), BLOCK, T, B)
    vit.save_pretrained(tmp_path / "vit")
    torch.save((IDS, PIXELS, HOW), tmp_path / "inputs.pt")
    done = python(FRESH, tmp_path, " ".join(FAMILIES))
    assert done.returncode == 0, done.stderr[-2000:]
    out = torch.load(tmp_path / "out.pt")
    for f in FAMILIES:
        scale = expected[f].norm()
        for how in ("plain", "auto"):
            assert (out[f, how] - expected[f]).norm() < 1e-5 * scale, (f, how)
        assert (out[f, "again"] - expected[f]).norm() < 1e-5 * scale, f
        assert (out[f, "half"] - expected[f]).norm() < 0.1 * scale, f
        assert (out[f, "plain", "dtypes"], out[f, "half", "dtypes"]) == ({torch.float32}, {torch.bfloat16}), f
        assert torch.equal(out[f, "cache"], expected[f, "tokens"]) and torch.equal(out[f, "no cache"], expected[f, "tokens"]), f
    assert torch.equal(out["vit"], vit(PIXELS)[0])


def test_a_fresh_process_computes_the_same_with_networks(tmp_path):
    names, expected = [], {}
    for family, kind in zip(FAMILIES, NETWORKS * 4):
        names.append(name := f"{family}-{kind}")
        plain = cut(tiny_model(family, layers=6), [BLOCK])
        small = trained(plain, 1, kind)
        values = dict(layers_of(small)[1].replaceme_map.named_parameters())
        with torch.no_grad(), by_hand(plain, 1, lambda x: formula(kind, values, x)):
            expected[name], expected[name, "tokens"] = plain(IDS).logits, plain.generate(IDS, **HOW)
        with torch.no_grad():
            assert (cut(plain, [])(IDS).logits - expected[name]).norm() > 1e-2 * expected[name].norm()
        small.save_pretrained(tmp_path / name, max_shard_size="40KB")
    vit = trained(cut(tiny_vision("vit", layers=6), [BLOCK]), 1, "swiglu")
    vit.save_pretrained(tmp_path / "vit")
    torch.save((IDS, PIXELS, HOW), tmp_path / "inputs.pt")
    done = python(FRESH, tmp_path, " ".join(names))
    assert done.returncode == 0, done.stderr[-2000:]
    out = torch.load(tmp_path / "out.pt")
    for f in names:
        scale = expected[f].norm()
        for how in ("plain", "auto", "again"):
            assert (out[f, how] - expected[f]).norm() < 1e-5 * scale, (f, how)
        assert (out[f, "half"] - expected[f]).norm() < 0.1 * scale, f
        assert (out[f, "plain", "dtypes"], out[f, "half", "dtypes"]) == ({torch.float32}, {torch.bfloat16}), f
        assert torch.equal(out[f, "cache"], expected[f, "tokens"]) and torch.equal(out[f, "no cache"], expected[f, "tokens"]), f
    assert torch.equal(out["vit"], vit(PIXELS)[0])


REFUSED = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
for kw in ({}, dict(trust_remote_code=False)):
    for auto in (AutoConfig, AutoModelForCausalLM):
        try: auto.from_pretrained(sys.argv[1], **kw)
        except ValueError as e: assert 'trust_remote_code=True' in str(e), e
        else: raise SystemExit(f'{auto.__name__} loaded it with {kw}')
m = LlamaForCausalLM.from_pretrained(sys.argv[1])
print(type(m).__name__, 'replaceme_map' in str(m))
"""


def test_refused_without_its_file(tmp_path):
    "No Auto class loads the model without its maps; the class itself, asked for by name, warns twice."
    replace_linear(tiny_model(layers=6), BLOCK, T).save_pretrained(tmp_path / "m")
    done = python(REFUSED, tmp_path / "m")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == ["LlamaForCausalLM", "False"]
    assert "of type `replaceme_llama` to instantiate a model of type `llama`" in done.stderr
    assert "UNEXPECTED" in done.stderr and "replaceme_map.weight" in done.stderr


def test_the_file_is_all_that_is_added(tmp_path):
    model = tiny_model("gemma2", layers=6)
    cut(model, [BLOCK]).save_pretrained(tmp_path / "plain")
    replace_linear(model, BLOCK, T, B).save_pretrained(tmp_path / "map")
    names = [{f.name for f in (tmp_path / d).iterdir()} for d in ("plain", "map")]
    assert names[1] - names[0] == {"modeling_replaceme.py"} and names[0] <= names[1]
    assert (tmp_path / "map/modeling_replaceme.py").read_text() == modelling_source()
    plain, config = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("plain", "map")]
    changed = {k for k in config if config[k] != plain.get(k)}
    assert changed == {"model_type", "architectures", "auto_map", "replaceme_linear", "replaceme_layers"}
    assert set(plain) <= set(config)


@pytest.mark.parametrize("family", ["mixtral", "gpt_neox", "vit", "pixio"])
def test_weights_keep_the_names_of_the_family(family, tmp_path):
    "These families have other names, or other tensors, on disk than in memory, by the name of the class or by that of the family."
    text = family in FAMILIES
    auto = AutoModelForCausalLM if text else AutoModel
    (tiny_model if text else tiny_vision)(family, layers=6).save_pretrained(tmp_path / "dense")
    dense = auto.from_pretrained(tmp_path / "dense").eval()
    plain, small = cut(dense, [BLOCK]), replace_linear(dense, BLOCK, T)
    plain.save_pretrained(tmp_path / "plain")
    small.save_pretrained(tmp_path / "map")
    names = []
    for d in ("plain", "map"):
        with safe_open(tmp_path / d / "model.safetensors", "pt") as f:
            names.append(set(f.keys()))
    assert names[0] < names[1] and [n.endswith(".1.replaceme_map.weight") for n in names[1] - names[0]] == [True]
    assert not names[1] <= small.state_dict().keys()  # a rule was at work
    loaded, info = auto.from_pretrained(tmp_path / "map", trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = dict(input_ids=IDS) if text else dict(pixel_values=PIXELS)
    assert torch.equal(loaded.eval()(**inputs)[0], small(**inputs)[0])


def test_stale_record_is_refused(tmp_path):
    replace_linear(tiny_model(layers=6), BLOCK, T).save_pretrained(tmp_path / "m")
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "replaceme_linear": config["replaceme_linear"][1:]}))
    with pytest.raises(ValueError, match="speaks of 3 layers, model.layers has 4"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)


def test_unknown_kind_is_refused(tmp_path):
    with_network(tiny_model(), 1, "ffn").save_pretrained(tmp_path / "m")
    path = tmp_path / "m/config.json"
    path.write_text(path.read_text().replace('"ffn"', '"kan"'))
    with pytest.raises(ValueError, match=r"names \['kan'\]: this file knows \['affine', 'ffn', 'linear', 'swiglu'\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)


def test_the_file_of_an_older_checkpoint_is_renewed(tmp_path):
    "A model whose own file knows linear maps only is saved with one that knows what has been put behind its layers since."
    with_linear(tiny_model(layers=6), 1, T, B).save_pretrained(tmp_path / "old")
    path = tmp_path / "old/modeling_replaceme.py"
    assert path.read_text().count(", ffn=FFN, swiglu=SwiGLU") == 1
    path.write_text(path.read_text().replace(", ffn=FFN, swiglu=SwiGLU", ""))
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "old", trust_remote_code=True).eval()
    new = trained(with_linear(old, 1, T), 3, "swiglu")
    assert linear_layers(new) == {1: "affine", 3: "swiglu"} and type(old) is not type(new)
    new.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new/modeling_replaceme.py").read_text() == modelling_source()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new", trust_remote_code=True).eval()
    assert torch.equal(loaded(IDS).logits, new(IDS).logits)


def test_offloaded(tmp_path):
    "Layers on the disk: a map can be put behind one, and a checkpoint with maps can be loaded so."
    model = tiny_model(layers=4)
    model.save_pretrained(tmp_path / "dense")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(4)}
    kw = dict(device_map=places, offload_folder=str(tmp_path / "offload"))
    expected = with_linear(model, 1, T, B)(IDS).logits
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **kw)
    assert layers_of(dense)[1].mlp.down_proj.weight.is_meta
    with torch.no_grad():
        mapped = with_linear(dense, 1, T, B)
        torch.testing.assert_close(mapped(IDS).logits, expected)
        torch.testing.assert_close(dense(IDS).logits, model(IDS).logits)
        mapped.save_pretrained(tmp_path / "mapped")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mapped", trust_remote_code=True, **kw)
        assert layers_of(loaded)[1].replaceme_map.weight.is_meta
        torch.testing.assert_close(loaded(IDS).logits, expected)
        twice = with_linear(loaded, 1, T)  # the first map is read from the disk
        torch.testing.assert_close(twice(IDS).logits, with_linear(with_linear(model, 1, T, B), 1, T)(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", NETWORKS)
def test_network_offloaded(kind, tmp_path):
    "A network behind a layer on the disk: put there, saved, and loaded to the disk."
    model = tiny_model(layers=4)
    model.save_pretrained(tmp_path / "dense")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(4)}
    kw = dict(device_map=places, offload_folder=str(tmp_path / "offload"))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **kw)
    assert layers_of(dense)[1].mlp.down_proj.weight.is_meta
    with torch.no_grad():
        expected = trained(model, 1, kind)(IDS).logits
        new = trained(dense, 1, kind)
        torch.testing.assert_close(new(IDS).logits, expected)
        new.save_pretrained(tmp_path / "new")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new", trust_remote_code=True, **kw)
        assert layers_of(loaded)[1].replaceme_map.down.is_meta
        torch.testing.assert_close(loaded(IDS).logits, expected)


def test_image_classifier(tmp_path):
    base = tiny_vision("vit", layers=6)
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(base.config).eval()
    small = replace_linear(model, BLOCK, T, B)
    with by_hand(plain := cut(model, [BLOCK]), 1, T, B):
        torch.testing.assert_close(small(PIXELS).logits, plain(PIXELS).logits)
    small.save_pretrained(tmp_path)
    assert "AutoModelForImageClassification" in small.config.auto_map
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(loaded(PIXELS).logits, small(PIXELS).logits)


def test_a_config_of_another_family(tmp_path):
    "Two families share a class: the class that is made knows whose config it takes."
    model = tiny_model("iquestcoder", layers=6)
    assert type(model).config_class is not type(model.config)
    small = replace_linear(model, BLOCK, T)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(loaded(IDS).logits, small(IDS).logits) and loaded.config.model_type == "iquestcoder"


@pytest.mark.parametrize("family", ["gemma3", "clip"])
def test_composite_config(family, tmp_path):
    "In a composite config the record is cut with the part that it stands in."
    vision = family == "clip"
    model = tiny_vision(family, layers=6) if vision else tiny_model(family, layers=6)
    small = cut(with_linear(model, 4, T), [BLOCK])
    part = small.config.vision_config if vision else small.config.text_config
    assert part.replaceme_linear == [None, None, "linear", None] and linear_layers(small) == {2: "linear"}
    small.save_pretrained(tmp_path)
    auto = AutoModel if vision else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path, trust_remote_code=True).eval()
    inputs = dict(pixel_values=PIXELS, input_ids=IDS) if vision else dict(input_ids=IDS)
    a, b = loaded(**inputs), small(**inputs)
    assert torch.equal(a.logits_per_image, b.logits_per_image) if vision else torch.equal(a.logits, b.logits)


def test_it_is_a_model_like_any_other():
    "It can be trained, pickled, cast, and asked for a loss."
    model = tiny_model("llama", layers=6)
    small = replace_linear(model, BLOCK, T, B)
    small(IDS, labels=IDS).loss.backward()
    assert small.model.layers[1].replaceme_map.weight.grad.abs().max() > 0
    copy = pickle.loads(pickle.dumps(small))
    assert type(copy) is type(small) and torch.equal(copy(IDS).logits, small(IDS).logits)
    assert copy.bfloat16().model.layers[1].replaceme_map.weight.dtype == torch.bfloat16
    assert not hasattr(model.model.layers[1], "replaceme_map") and type(model) is transformers.LlamaForCausalLM


@pytest.mark.parametrize("family", ["mixtral", "gpt_neox", "vit", "pixio", "gemma3", "clip"])
def test_networks_in_families_of_all_sorts(family, tmp_path):
    "Weights that are renamed on disk, configs inside configs: nothing is missing, and further cuts keep the kinds."
    text = family in ("mixtral", "gpt_neox", "gemma3")
    model = (tiny_model if text else tiny_vision)(family, layers=6)
    small = cut(trained(trained(with_linear(model, 1, T, B), 4, "ffn"), 5, "swiglu"), [BLOCK])
    assert linear_layers(small) == {1: "affine", 2: "ffn", 3: "swiglu"} and differs_when_rebuilt(small) is None
    small.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if text else AutoModel
    loaded, info = auto.from_pretrained(tmp_path, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and linear_layers(loaded) == linear_layers(small)
    both = dict(pixel_values=PIXELS, input_ids=IDS)
    inputs = both if family == "clip" else dict(input_ids=IDS) if text else dict(pixel_values=PIXELS)
    a, b = [m.vision_model(PIXELS)[0] if family == "clip" else m(**inputs)[0] for m in (loaded.eval(), small)]
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", NETWORKS)
def test_network_starts_as_the_identity_and_learns(kind, dtype):
    "The first step moves the last matrix, the second one everything; nothing else is touched when it alone is trained."
    model = tiny_model("llama", layers=6).to(dtype)
    plain = cut(model, [BLOCK])
    small = with_network(plain, 1, kind, seed=3)
    assert torch.equal(small(IDS).logits, plain(IDS).logits)
    net = small.model.layers[1].replaceme_map
    assert {p.dtype for p in net.parameters()} == {dtype} and all(p.requires_grad for p in net.parameters())
    before = {k: p.clone() for k, p in model.state_dict().items()}
    optimiser = torch.optim.SGD(net.parameters(), lr=1.0)
    moved, losses = [], []
    for _ in range(3):
        optimiser.zero_grad()
        loss = small(IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
        moved.append({k for k, p in net.named_parameters() if p.grad.abs().max() > 0})
        optimiser.step()
    names = {"norm", "up", "down"} | ({"gate"} if kind == "swiglu" else set())
    assert moved == [{"down"}, names, names]
    assert losses[2] < losses[0]
    assert all(torch.equal(p, before[k]) for k, p in model.state_dict().items()) and n_hooks(plain) == 0


@pytest.mark.parametrize("kind", NETWORKS)
def test_network_is_drawn_from_its_seed(kind):
    "The same seed gives the same values, whatever the global generator says, which is left alone."
    model = tiny_model("llama", layers=4)
    values = lambda seed: dict(with_network(model, 1, kind, seed=seed).model.layers[1].replaceme_map.state_dict())
    torch.manual_seed(0)
    state, a = torch.get_rng_state(), values(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    b, c = values(1), values(2)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert {k for k in a if not torch.equal(a[k], c[k])} == set(a) - {"norm", "down"}
    for k in set(a) - {"norm", "down"}:
        assert abs(a[k].std() * 32**0.5 - 1) < 0.1 and abs(a[k].mean()) < 0.02
    if kind == "swiglu":
        assert not torch.equal(a["gate"], a["up"])


@pytest.mark.parametrize("kind", NETWORKS)
def test_one_enormous_token_is_no_trouble(kind):
    "A row of norm 29000 in half precision, where its square is infinite."
    net = layers_of(trained(tiny_model(layers=4), 1, kind))[1].replaceme_map.half()
    x = torch.nn.functional.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(0))) * torch.tensor([[29000.0], [200.0], [200.0], [1.0]])
    x = x.half()
    assert x.isfinite().all() and not (x[0] * x[0]).isfinite().all()
    y, ref = net(x).double(), formula(kind, dict(net.named_parameters()), x)
    assert ((y - ref).norm(dim=1) <= 2e-3 * ref.norm(dim=1)).all()


def test_what_is_refused():
    model = tiny_model("llama", layers=4)
    small = with_network(with_linear(model, 0, T), 1, "ffn")
    with pytest.raises(ReplaceMeError, match="'swigl' is no kind of network: .*Did you mean 'swiglu'"):
        with_network(model, 1, "swigl")
    for i, kind in {0: "linear", 1: "ffn"}.items():
        with pytest.raises(ReplaceMeError, match=rf"Layer {i} is followed by a map or a network already \({kind}\)"):
            with_network(small, i, "swiglu")
    with pytest.raises(ReplaceMeError, match=r"Layer 1 is followed by a network already \(ffn\)"):
        with_linear(small, 1, T)
    with pytest.raises(ReplaceMeError, match="has layers 0 to 3"):
        with_network(model, 4, "ffn")


@pytest.mark.parametrize("kind,per_map", dict(linear=32 * 32, affine=32 * 33, ffn=32 + 2 * 32 * 128, swiglu=32 + 3 * 32 * 128).items())
def test_cost_is_what_stands_there(kind, per_map):
    model = tiny_model("llama", layers=4)
    count = lambda m: sum(p.numel() for p in m.parameters())
    new = with_network(with_network(model, 1, kind), 2, kind)
    assert count(new) - count(model) == 2 * per_map
    vector = dict(linear=0, affine=32).get(kind, 32)
    assert token_cost(new) - token_cost(model) == 2 * (per_map - vector)
    said = linear_cost(new, 2, kind=kind)
    assert said == linear_cost(model, 2, kind=kind) and f"({2 * per_map / count(model):+.1%})" in said
    assert set(map_kinds()) == {"linear", "affine", "ffn", "swiglu"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_in_the_type_of_the_model(dtype):
    small = with_linear(tiny_model("llama", layers=4).to(dtype), 1, T, B)
    m = small.model.layers[1].replaceme_map
    assert torch.equal(m.weight, T.T.to(dtype)) and torch.equal(m.bias, B.to(dtype))
