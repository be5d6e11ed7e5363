"""Neurons that a layer borrows: what they notice, padding and order, what is refused, and that the saved folder is the model."""
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from replaceme.arch import layers_of
from replaceme.blocks import Block
from replaceme.borrow import borrow, mlp_place
from replaceme.core import ReplaceMeError
from replaceme.models import tiny_model, tiny_tokenizer
from replaceme.pipeline import prune
from replaceme.report import _kind_words
from replaceme.search import Recipe, fit_blocks

BLOCK = Block(2, 5)


def texts(n=6, rows=4, length=40, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [dict(input_ids=torch.randint(3, 300, (rows, length), generator=gen), attention_mask=torch.ones(rows, length).long()) for _ in range(n)]


def data_of(folder):
    (folder / "texts.jsonl").write_text("\n".join(json.dumps(dict(text=" ".join(f"w{(i * 7 + j * j) % 40}" for j in range(40)))) for i in range(16)))
    return str(folder / "texts.jsonl")


def test_padding_and_batches_do_not_matter():
    dense, bs = tiny_model("llama", layers=6), texts()
    new, found = borrow(dense, dense, bs, 2, BLOCK)
    padded = [dict(input_ids=torch.cat([torch.full((4, 7), 9), b["input_ids"]], 1), attention_mask=torch.cat([torch.zeros(4, 7).long(), b["attention_mask"]], 1))
              for b in bs]
    one = [{k: v[i:i + 1] for k, v in b.items()} for b in bs for i in range(4)]
    for other in (padded, one):
        again, same = borrow(dense, dense, other, 2, BLOCK)
        assert same.of == found.of and abs(same.removal_error - found.removal_error) < 1e-4
        for (k, a), b in zip(new.named_parameters(), again.parameters()):
            assert torch.allclose(a, b, atol=1e-3 * max(1, a.abs().max().item())), k


def test_a_second_block_borrows_on_the_stream_of_the_first():
    dense, bs = tiny_model("llama", layers=10), texts()
    r = Recipe(map="wide", ridge=.1, weights="inv_norm", borrow=True)
    done = fit_blocks(dense, bs[1:], [], [Block(2, 4), Block(6, 8)], r)
    assert [sum(b.of.values()) for b in done.borrowed] == [64, 64]
    assert {*done.borrowed[1].of} <= {5, 6, 7} and len(layers_of(done.model)) == 6
    plain = fit_blocks(dense, bs[1:], [], [Block(2, 4), Block(6, 8)], Recipe(map="wide", ridge=.1, weights="inv_norm"))
    assert all(f.error < g.error and abs(f.removal_error - g.removal_error) < .2 for f, g in zip(done.fits[:1], plain.fits[:1]))


@pytest.mark.parametrize("family", ["mixtral", "gemma2", "gpt_neox", "falcon"])
def test_where_neurons_cannot_be_told_apart_nothing_is_borrowed(family):
    dense = tiny_model(family, layers=6)
    assert mlp_place(dense, 1) is None
    new, found = borrow(dense, dense, texts(2), 2, BLOCK)
    assert new is dense and found is None


def test_too_little_memory_is_said(monkeypatch):
    import replaceme.borrow as room
    monkeypatch.setattr(room, "free_memory", lambda device: 1000)
    dense = tiny_model("llama", layers=6)
    with pytest.warns(UserWarning, match="no neurons are borrowed: choosing takes"):
        assert borrow(dense, dense, texts(2), 2, BLOCK)[1] is None


def test_half_precision_notices_what_was_chosen():
    dense = tiny_model("llama", layers=6).bfloat16()
    new, found = borrow(dense, dense, texts(), 2, BLOCK)
    assert found is not None and {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert new.model.layers[1].post_attention_layernorm.weight.abs().max() >= 1


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gpt2", "phi3"])
def test_the_saved_folder_is_the_model(family, tmp_path):
    dense = tiny_model(family, layers=6)
    keys = dict(dataset=data_of(tmp_path), dataset_size=16, max_length=32, blocks=[list(BLOCK)], refit=0)
    model, res = prune(dense, tiny_tokenizer(), method="auto", **keys)
    assert res.fit.borrowed and sum(res.fit.borrowed["1"].values()) == mlp_place(dense, 1).f
    model.save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    ids = texts(1)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert "borrowed from the layers that went" in " ".join(_kind_words(res))


@pytest.mark.parametrize("away", [range(6), [1], [3], [5]], ids=str)
def test_layers_on_the_disk_lend_and_borrow_as_those_in_memory(tmp_path, away):
    from replaceme.models import load_model
    tiny_model("llama", layers=6).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", **{f"model.layers.{i}": "disk" if i in away else "cpu" for i in range(6)}}
    ids = texts(1)[0]["input_ids"]
    found = []
    for device_map in (None, places):
        dense, _ = load_model(tmp_path / "m", device_map=device_map)
        with torch.no_grad():
            before = dense(ids).logits
            model, lent = borrow(dense, dense, texts(2), 2, BLOCK)
            assert torch.equal(dense(ids).logits, before) and not torch.equal(model(ids).logits, before)
            found.append((lent, model(ids).logits))
    (a, x), (b, y) = found
    assert a.of == b.of and len(a.of) > 1 and a.removal_error == pytest.approx(b.removal_error)
    assert torch.allclose(x, y, atol=1e-6)


def test_what_was_asked_for_and_cannot_be_is_refused(tmp_path):
    keys = dict(dataset=data_of(tmp_path), dataset_size=16, max_length=32, blocks=[list(BLOCK)], refit=0, method="auto")
    with pytest.raises(ReplaceMeError, match="borrow: the neurons of layer 1 cannot be told apart"):
        prune(tiny_model("gemma2", layers=6), tiny_tokenizer(), borrow=True, **keys)
    assert not prune(tiny_model("gemma2", layers=6), tiny_tokenizer(), **keys)[1].fit.borrowed


def test_what_does_not_go_together_is_refused(tmp_path):
    for keys, why in ((dict(method="lstsq"), "a wide map"), (dict(method="auto", map="narrow"), "a wide map"), (dict(method="auto", merge=False), "merge is false")):
        with pytest.raises(ReplaceMeError, match=why):
            prune(tiny_model("llama", layers=6), tiny_tokenizer(), dataset=data_of(tmp_path), dataset_size=16, max_length=32, layers_to_skip=2, borrow=True, **keys)


@pytest.mark.parametrize("family", ["blenderbot", "pegasus", "opt"])
def test_an_embedding_that_takes_a_shape_is_no_obstacle(family):
    assert mlp_place(tiny_model(family, layers=4), 1).readers == ["fc1"]


def test_a_layer_whose_hook_holds_the_weights_of_its_parts(tmp_path):
    "accelerate takes the weights of a convolution away again when the module that reads it is through"
    from replaceme.layerwise import open_layerwise
    tiny_model("falcon_h1", layers=4).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    assert mlp_place(open_layerwise(tmp_path / "m")[0], 1) == mlp_place(tiny_model("falcon_h1", layers=4), 1)


def test_a_layer_on_the_disk_that_does_not_run_alone_has_no_place(tmp_path):
    from replaceme.layerwise import open_layerwise
    tiny_model("zamba2", layers=6).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    model = open_layerwise(tmp_path / "m")[0]
    assert [mlp_place(model, i) for i in range(6)] == [None] * 6
