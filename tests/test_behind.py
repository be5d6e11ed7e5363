"""What is done behind a pruning, and to a pruned model: quantised, pruned again, trained, exported, looked at."""
import warnings

import pytest
import torch

import replaceme
from replaceme.arch import first, hooks, layers_of
from replaceme.blocks import Block
from replaceme.core import ReplaceMeError, ReplaceMeWarning
from replaceme.data import check_steps
from replaceme.export import in_own_order
from replaceme.llm_pruner import llm_pruner
from replaceme.merge import cut, relative_error, replace_block, save_checkpoint
from replaceme.models import load_model, tiny_model, tiny_tokenizer
from replaceme.recover import recover
from replaceme.search import _output_matrices
from replaceme.slicegpt import slicegpt

IDS = torch.randint(5, 320, (8, 24), generator=torch.Generator().manual_seed(0))
TEXT = [dict(input_ids=IDS, attention_mask=torch.ones_like(IDS))]
FIT = dict(dataset="python-docs", dataset_size=8, max_length=32)


@pytest.fixture(autouse=True)
def nothing_trained_in_vain(recwarn):
    warnings.simplefilter("ignore", ReplaceMeWarning)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_a_sliced_model_in_few_bits_keeps_its_shortcuts(tmp_path, family):
    "bitsandbytes exchanges the modules whose outputs the shortcuts are added to; as anybody may"
    dense = tiny_model(family, layers=4, d=128)
    off = []
    for model in (dense, slicegpt(dense, TEXT, 1)[0]):
        folder = tmp_path / type(model).__name__
        save_checkpoint(model, folder, inputs=tiny_tokenizer())
        few, _ = load_model(folder, trust_remote_code=True, use_8bit=True)
        off.append(relative_error(few(IDS).logits, model(IDS).logits))
    assert off[1] < 3 * off[0] + .02, off
    want = model(IDS).logits
    for layer in layers_of(model):
        for name, m in [*layer.named_modules()]:
            if isinstance(m, torch.nn.Linear):
                layer.set_submodule(name, torch.nn.Linear(1, 1, bias=m.bias is not None))
                layer.get_submodule(name).weight, layer.get_submodule(name).bias = m.weight, m.bias
    assert torch.equal(model(IDS).logits, want)


@torch.no_grad()
def test_adapters_on_a_sliced_model_keep_its_shortcuts_once():
    from peft import LoraConfig, get_peft_model
    small = slicegpt(tiny_model("llama", layers=4), TEXT, 1)[0]
    want = small(IDS).logits
    wrapped = get_peft_model(small, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert relative_error(wrapped(IDS).logits, want) < 1e-5
    assert relative_error(wrapped.merge_and_unload()(IDS).logits, want) < 1e-5


def test_no_map_is_folded_beside_a_shortcut():
    small = slicegpt(tiny_model("llama", layers=6), TEXT, 1)[0]
    with pytest.raises(ReplaceMeError, match="the stream goes through a matrix beside it"):
        replace_block(small, Block(3, 4), torch.eye(small.config.hidden_size))
    for method in ("lstsq", "auto"):
        with pytest.raises(ReplaceMeError, match="cannot be folded"):
            replaceme.prune(small, tiny_tokenizer(), 2, method=method, **FIT)
    again, _ = replaceme.prune(small, tiny_tokenizer(), 2, method="remove", **FIT)
    assert len(layers_of(again)) == 4
    plain = slicegpt(tiny_model("llama", layers=6), TEXT, 1, plain=True)[0]
    replaceme.prune(plain, tiny_tokenizer(), 2, method="lstsq", **FIT)


def test_no_map_is_folded_into_what_a_hook_changes():
    model = tiny_model("llama", layers=6)
    handle = model.model.layers[2].mlp.down_proj.register_forward_hook(lambda m, a, y: 2 * y)
    with pytest.raises(ReplaceMeError, match="a hook changes what mlp.down_proj writes"):
        replace_block(model, Block(3, 5), torch.eye(model.config.hidden_size))
    handle.remove()
    replace_block(model, Block(3, 5), torch.eye(model.config.hidden_size))


def test_the_order_of_every_list_of_layers_is_looked_at():
    "SmolLM3 says in a list which layers have no rotation; a GGUF file has no place for it"
    model = tiny_model("smollm3", layers=8)
    assert in_own_order(model.config) and in_own_order(cut(model, [Block(3, 7)]).config)
    assert not in_own_order(cut(model, [Block(2, 4)]).config)
    for family, fine in (("llama", True), ("gemma3_text", False)):
        assert in_own_order(cut(tiny_model(family, layers=8), [Block(2, 3)]).config) == fine


@torch.no_grad()
def test_what_an_unmerged_model_shows_does_not_depend_on_what_was_shown_before():
    for look_first in (False, True):
        dense = tiny_model("llama", layers=6)
        if look_first:
            dense(IDS, output_hidden_states=True)
        small, _ = replaceme.prune(dense, tiny_tokenizer(), blocks=[[3, 5]], method="lstsq", merge=False, **FIT)
        seen = []
        layers_of(small)[3].register_forward_pre_hook(lambda m, a, kw: seen.append(a[0] if a else kw["hidden_states"]), with_kwargs=True)
        said = small(IDS, output_hidden_states=True).hidden_states[3]
        assert torch.equal(said, seen[0]), look_first


@pytest.mark.parametrize("family, more", [("gemma", dict(num_key_value_heads=1, head_dim=32)), ("falcon", {}), ("llama", {})], ids=["gemma", "falcon", "llama"])
def test_llm_pruner_takes_what_was_asked_for_or_says_what_there_is(family, more):
    dense, refused = tiny_model(family, layers=8, **more), []
    layer = sum(p.numel() for p in layers_of(dense).parameters()) / 8
    for n in range(1, 8):
        try:
            gone = (dense.num_parameters() - llm_pruner(dense, TEXT, n)[0].num_parameters()) / layer
        except ReplaceMeError as e:
            assert "layers' worth of parameters, of which" in str(e)
            refused.append(n)
        else:
            assert not refused and abs(gone - n) < .15, (n, gone)
    assert refused


@pytest.mark.parametrize("method", ["llm_pruner", "slicegpt"])
def test_qlora_behind_models_of_our_own_file(method):
    small, r = replaceme.prune(tiny_model("llama", layers=6), tiny_tokenizer(), 1, method=method, recover="qlora", train_tokens=400, **FIT)
    assert r.recovery[0].name == "qlora"


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_a_model_that_cannot_write_step_by_step_writes_no_texts(family):
    model = tiny_model(family, layers=4)
    with pytest.raises(ReplaceMeError, match="cannot write texts step by step .*Name a data set"):
        replaceme.prune(model, tiny_tokenizer(), 2, method="uidl", dataset_size=4, max_length=16)
    replaceme.prune(model, tiny_tokenizer(), 2, method="uidl", **FIT)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe", "gpt_oss", "lfm2", "olmo2", "phi3"])
def test_models_that_write_step_by_step_go_on_doing_so(family):
    check_steps(tiny_model(family, layers=4))


def test_lora_takes_plain_linear_layers_and_refuses_before_any_text_is_made():
    for family in ("llama4_text", "phimoe"):
        _, r = replaceme.prune(tiny_model(family, layers=6), tiny_tokenizer(), 2, recover="lora", train_tokens=300, **FIT)
        assert r.recovery[0].name == "lora"
    with pytest.raises(ReplaceMeError, match="takes no adapters .*use layer or cut"):
        replaceme.prune(tiny_model("falcon_h1", layers=6), tiny_tokenizer(), 2, recover="lora", train_tokens=300, **FIT)


def test_recover_by_hand():
    texts = [dict(input_ids=x, attention_mask=torch.ones_like(x)) for x in torch.randint(5, 320, (6, 4, 24), generator=torch.Generator().manual_seed(0))]
    dense = tiny_model("llama", layers=6)
    small = cut(dense, [(2, 4)])
    losses = [recover(dense, small, [b], texts, "layer", tokens=300)[1][0].loss_after for b in ((2, 4), Block(2, 4), range(2, 4))]
    with torch.no_grad():
        losses.append(recover(dense, small, [(2, 4)], texts, "layer", tokens=300)[1][0].loss_after)
    assert len(set(losses)) == 1
    with pytest.raises(ReplaceMeError, match="layer trains what stands at a cut, and no layer was cut out: use lora"):
        recover(dense, llm_pruner(dense, TEXT, 1)[0], [], texts, "layer", tokens=300)


@pytest.mark.parametrize("family, keys", [("falcon_h1", dict(attention_out_multiplier=2., mlp_multipliers=[1., .25])),
                                          ("granite", dict(residual_multiplier=.3)), ("llama", {}), ("gemma2", {})])
@torch.no_grad()
def test_attention_is_refitted_by_its_own_factor(family, keys):
    "What a refit means to add to the stream is what the layer adds then; in Falcon-H1 the MLP has another factor"
    model = tiny_model(family, layers=6, **keys)
    model.config.use_cache = False
    i, batch = 3, dict(input_ids=IDS)
    seen = {}
    point, _ = _output_matrices(model, i)
    assert point.name == "self_attn.o_proj"
    def state_between():
        "The state of the stream between attention and the MLP, whose output is left out"
        _, mlp = _output_matrices(model, i)
        silent = [m.register_forward_hook(lambda m, a, y: 0 * y) for m, _ in mlp.taps]
        with hooks(*silent, layers_of(model)[i].register_forward_hook(lambda m, a, y: seen.update(S=first(y))),
                   point.taps[0][0].register_forward_hook(lambda m, a, y: seen.update(M=y))):
            model(**batch)
        return seen["S"].double(), seen["M"].double() * point.factor
    S, M = state_between()
    w = point.linear.module.weight if point.norm is None else point.norm.module.weight
    w.add_(.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1)))
    S2, M2 = state_between()
    assert relative_error(S2 - S, M2 - M) < 1e-4 < (S2 - S).norm()


@torch.no_grad()
def test_a_refit_brings_a_model_with_two_factors_nearer():
    dense = tiny_model("falcon_h1", layers=6, attention_out_multiplier=2., mlp_multipliers=[1., .25])
    want, off = dense.model(IDS).last_hidden_state, []
    for refit in (0, 2):
        small, _ = replaceme.prune(dense, tiny_tokenizer(), blocks=[[2, 4]], method="lstsq", dataset="python-docs", dataset_size=60,
                                   max_length=40, refit=refit)
        off.append(relative_error(small.model(IDS).last_hidden_state, want))
    assert off[1] < off[0], off
