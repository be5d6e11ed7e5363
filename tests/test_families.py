"""The contract every family must pass, on tiny random models in float32: exact fold, identity, save, reload, KV cache."""
import json
import sys

import pytest
import torch
import warm

from replaceme.arch import fold_points, layers_of, n_hooks
from replaceme.blocks import Block, candidates
from replaceme.distance import Profile
from replaceme.merge import cut, explicit_map, lasting, replace_block
from replaceme.models import tiny_model
from replaceme.solve import lstsq_map
from replaceme.stats import measure

FAMILIES = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {}, "phi3": {}, "gpt2": {}, "opt": {}, "gpt_neox": {},
    "llama-tied-bias": dict(model_type="llama", tie_word_embeddings=True, mlp_bias=True, attention_bias=True),
    "gpt_neox-serial": dict(model_type="gpt_neox", use_parallel_residual=False),
    "granite": dict(residual_multiplier=0.22),
    "qwen2-sliding": dict(model_type="qwen2", use_sliding_window=True, sliding_window=4,
                          layer_types=["full_attention", "sliding_attention"] * 3),
}
IDS = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
MAP = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM
m = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
out = [m.generate(ids, max_new_tokens=12, do_sample=False, use_cache=c).tolist() for c in (True, False)]
assert not any(k.startswith("replaceme") for k in sys.modules)
print(json.dumps([out, m(ids).logits.tolist()]))
"""


def make(name):
    kw = dict(FAMILIES[name])
    return tiny_model(kw.pop("model_type", name), layers=6, **kw)


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


def batch(ids):
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("block", [Block(1, 2), Block(2, 4), Block(4, 6)], ids=str)
@torch.no_grad()
def test_fold_is_exact(name, block):
    model = make(name)
    dense = model(IDS).logits.clone()
    folded, removed = replace_block(model, block, MAP), replace_block(model, block, None)
    with explicit_map(cut(model, [block]), block.start - 1, MAP) as m:
        ref = m(IDS).logits
    assert rel(folded(IDS).logits, ref) < 1e-5
    assert rel(removed(IDS).logits, ref) > 1e-2  # the map matters, so the line above could have failed
    assert torch.equal(replace_block(model, block, torch.eye(32))(IDS).logits, removed(IDS).logits)
    assert torch.equal(model(IDS).logits, dense)
    assert n_hooks(model) == n_hooks(folded) == 0


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_block_that_does_nothing_is_found_and_replaced_without_loss(name):
    """Layers that add nothing to the stream are found, and the map in their place is the identity."""
    model = make(name)
    points = fold_points(model, range(6))
    layers = layers_of(model)
    for i in (2, 3):
        for p in points[i].module.parameters():
            p.zero_()
        for n, p in layers[i].named_parameters():
            if any(k in n for k in ("o_proj", "attention.dense", "attn.c_proj", "out_proj")):
                p.zero_()
    ids = torch.randint(3, 300, (8, 32), generator=torch.Generator().manual_seed(2))
    found = measure(model, [batch(ids[:4]), batch(ids[4:])], candidates(6, 2), Profile(6))
    (dist, block), fit = found.ranked[0], lstsq_map(found.sums[found.block])
    assert block == Block(2, 4) and dist < 1e-3
    assert rel(fit.T.float(), torch.eye(32)) < 1e-4
    assert rel(replace_block(model, block, fit.T)(ids).logits, model(ids).logits) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_saved_model_needs_no_replaceme(name, tmp_path):
    """Loaded by transformers in a fresh process: the same logits, the same tokens with the KV cache and without."""
    small = replace_block(make(name), Block(2, 4), MAP)
    small.generation_config.pad_token_id = 0
    small.save_pretrained(tmp_path)
    out = warm.run([sys.executable, "-c", FRESH, str(tmp_path), json.dumps(IDS.tolist())], capture_output=True, text=True, fresh=True)
    assert out.returncode == 0, out.stderr[-2000:]
    (cached, uncached), logits = json.loads(out.stdout.splitlines()[-1])
    assert cached == uncached
    assert torch.allclose(torch.tensor(logits), small(IDS).logits, atol=1e-5)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["n_layer" if name == "gpt2" else "num_hidden_layers"] == 4


@torch.no_grad()
def test_dtype_is_kept_and_half_precision_folds_in_float64():
    model = tiny_model("llama", layers=6).bfloat16()
    small = replace_block(model, Block(2, 4), MAP)
    weight = small.model.layers[1].mlp.down_proj.weight
    ref = (MAP.double().T @ model.model.layers[1].mlp.down_proj.weight.double()).bfloat16()
    assert weight.dtype == torch.bfloat16 and torch.equal(weight, ref)


@pytest.mark.parametrize("family, keys, kept", [
    ("llama", {}, [1, 2, 3, 4]),
    ("diffllama", {}, [4]),  # a constant of its attention grows with the layer's number
    ("glm4_moe", dict(first_k_dense_replace=3), [1, 2, 3, 4]),  # its first three layers are dense by number, which is translated
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), [4]),
])
def test_only_blocks_that_the_config_can_rebuild_may_go(family, keys, kept):
    model = tiny_model(family, layers=6, **keys)
    assert [b.start for b in lasting(model, candidates(6, 2))] == kept


def test_the_pruned_model_shares_all_weights_but_one():
    model = tiny_model("llama", layers=6)
    small = replace_block(model, Block(2, 4), MAP)
    theirs = {p.data_ptr() for p in model.parameters()}
    assert [n for n, p in small.named_parameters() if p.data_ptr() not in theirs] == ["model.layers.1.mlp.down_proj.weight"]


@torch.no_grad()
def test_hidden_states_asked_for_before_pruning_do_not_confuse_the_pruned_model():
    model = tiny_model("llama", layers=6)
    model(IDS, output_hidden_states=True)
    small = replace_block(model, Block(2, 4), None)
    assert len(small(IDS, output_hidden_states=True).hidden_states) == 5
    assert len(model(IDS, output_hidden_states=True).hidden_states) == 7
