"""Behind the peers and the trainings: what is saved, what is handed out, and what is said where nothing came of it."""
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from replaceme.activations import capture
from replaceme.arch import layers_of, n_hooks
from replaceme.baselines import uidl
from replaceme.blocks import Block
from replaceme.core import ReplaceMeError
from replaceme.llm_pruner import llm_pruner
from replaceme.merge import cut, save_checkpoint
from replaceme.models import tiny_model
from replaceme.recover import recover
from replaceme.search import Recipe, fit_blocks
from replaceme.slicegpt import slicegpt
from replaceme.streamline import alone, place_network, train_network
from replaceme.train import layers_on
from replaceme.widths import n_parameters

IDS = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(0))
BATCHES = [dict(input_ids=IDS, attention_mask=torch.ones_like(IDS))]
# lists of layer kinds that no other key says, in families whose class does not declare `head_dim`
KINDS = {"qwen2": dict(use_sliding_window=True, sliding_window=4, layer_types=["full_attention", "sliding_attention"] * 3), "smollm3": {}, "cohere2": {}}


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("how", ["cut", "sliced", "sliced plain", "pruned plain"])
@torch.no_grad()
def test_a_width_of_heads_is_kept_beside_kinds_of_layers(family, how, tmp_path):
    "A value that the family's class refuses says nothing about the kinds of layers, so the key that it stands under is not in their way"
    model = tiny_model(family, layers=6, **KINDS[family], **(dict(head_dim=16) if how == "cut" else {}))
    small = {"cut": lambda: cut(model, [Block(1, 2)]), "sliced": lambda: slicegpt(model, BATCHES, n=2)[0],
             "sliced plain": lambda: slicegpt(model, BATCHES, n=2, plain=True)[0],
             "pruned plain": lambda: llm_pruner(model, BATCHES, n=2, plain=True)[0]}[how]()
    save_checkpoint(small, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=how == "sliced").eval()
    assert rel(again(IDS).logits, small(IDS).logits) < 1e-5


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("family", ["mamba2", "bamba"])
@pytest.mark.parametrize("much", [dict(n=2), dict(fraction=.5)], ids=str)
def test_a_config_that_takes_no_other_width_is_said_to(much, family, plain):
    "What comes out would be as wide as before, with matrices more: it was handed out as if something had gone"
    with pytest.raises(ReplaceMeError, match="takes no width below 32.*takes layers out"):
        slicegpt(tiny_model(family, layers=4), BATCHES, plain=plain, **much)


def test_less_than_the_shortcuts_cost_is_no_reason_to_grow():
    "Of the widths that make it smaller the nearest is taken, where the nearest of all would make it larger"
    model = tiny_model("llama", layers=6, intermediate_size=16)
    small, res = slicegpt(model, BATCHES, n=.02)
    assert res.parameters < res.dense_parameters and res.width == 24


def ties(model):
    "Names that stand for one parameter"
    found = {}
    for n, p in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(p), []).append(n)
    return sorted(v for v in found.values() if len(v) > 1)


SINGLE = [dict(input_ids=i[None], attention_mask=torch.ones_like(i[None])) for i in IDS]


@pytest.mark.parametrize("rung", ["layer", "cut", "lora"])
@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_layers_that_share_weights_share_them_when_trained(family, rung, tmp_path):
    "What is trained under one name is trained under all, so that the config, which ties them, builds the trained model again"
    model = tiny_model(family, layers=6)
    small, res = uidl(model, BATCHES, 2)
    trained, _ = recover(model, small, res.blocks, SINGLE, [rung], tokens=600, held=SINGLE, learning_rate=2e-4)
    assert ties(trained) == ties(small) != [] and n_parameters(trained) == n_parameters(small)
    assert rel(trained(IDS).logits, small(IDS).logits) > 1e-3
    save_checkpoint(trained, tmp_path)
    assert rel(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, trained(IDS).logits) < 1e-5


@pytest.mark.parametrize("rung", ["fold", "lora"])
def test_a_trained_model_asks_for_gradients_where_it_did_before(rung):
    "peft freezes what it finds; who trains on finds the model as it was given"
    model = tiny_model("llama", layers=6)
    model.model.embed_tokens.weight.requires_grad_(False)
    small, res = uidl(model, BATCHES, 2)
    was = {n: p.requires_grad for n, p in small.named_parameters()}
    trained, _ = recover(model, small, res.blocks, SINGLE * 4, [rung], tokens=100)
    assert {n: p.requires_grad for n, p in trained.named_parameters()} == was == {n: n != "model.embed_tokens.weight" for n in was}
    assert {n: p.requires_grad for n, p in model.named_parameters()}["model.layers.5.mlp.up_proj.weight"] and not model.training


@pytest.mark.parametrize("family, network, block", [("rwkv", "layer", (2, 4)), ("rwkv", "ffn", (2, 4)), ("zamba2", "layer", (3, 6)),
                                                    ("zamba2", "ffn", (4, 6)), ("llama", "layer", (2, 4)), ("llama", "ffn", (2, 4))])
def test_a_layer_whose_number_matters_is_trained_where_it_stands(family, network, block):
    "A block of RWKV that is first has a norm more, a hybrid layer of Zamba2 knows its own number: alone it would be another, or none"
    dense = tiny_model(family, layers=6)
    small, where, names = place_network(dense, Block(*block), network)
    one = alone(small, where)
    assert (len(layers_of(one)) == 1) == (family == "llama")
    batch = BATCHES[0]
    acts = capture(small, batch)
    with torch.no_grad():
        assert rel(layers_on(one, batch, acts.S[where]), acts.S[where + 1]) < 1e-5
    before = {n: p.clone() for n, p in small.named_parameters()}
    fit = train_network(dense, small, Block(*block), where, names, "mse", SINGLE, SINGLE, 600, learning_rate=3e-4)
    assert fit.after < fit.before and n_hooks(small) == n_hooks(dense) + (network == "ffn")
    assert {n for n, p in small.named_parameters() if not torch.equal(p, before[n])} == {*names} and not {*names} & {n for v in ties(small) for n in v}


def test_a_layer_before_a_cut_that_cannot_run_alone_is_left_as_it_is():
    "The default method looks at that layer by itself, which in a hybrid that looks itself up by its number ended in a traceback"
    dense = tiny_model("zamba2", layers=6)
    done = fit_blocks(dense, BATCHES, BATCHES, [Block(4, 6)], Recipe(map="wide", borrow=True))
    assert len(layers_of(done.model)) == 4 and done.borrowed == [None]


@pytest.mark.parametrize("family, n", [("rwkv", 0), ("llama", 2)])
def test_layers_behind_a_cut_are_refitted_as_far_as_they_run_alone(family, n):
    "Layer 0 runs alone, a later block of RWKV does not: nothing behind is refitted, and it is said"
    dense = tiny_model(family, layers=6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        done = fit_blocks(dense, BATCHES, BATCHES, [Block(1, 3)], Recipe(map="state", refit=2))
    assert {o["layer"] for o in done.refits} == {*range(3, 3 + n)}
    assert (n == 0) == any("nothing behind [1,3) is refitted: layer 3 does not run by itself" in str(w.message) for w in said)
