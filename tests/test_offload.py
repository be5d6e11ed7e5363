"""Models whose weights are on the disk, or kept on the CPU by accelerate: the same proof, sums, fold, checkpoint and logits as in memory."""
import copy
import gc
import json
import weakref

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors import safe_open
from transformers import AutoModel, ViTImageProcessor, modeling_utils

from replaceme import merge
from replaceme.arch import find_points, fold_points, layers_of
from replaceme.blocks import Block, candidates
from replaceme.core import ReplaceMeError
from replaceme.distance import Profile
from replaceme.evaluate import perplexity
from replaceme.merge import check_cut, cut, differs_when_rebuilt, explicit_map, replace_block, save_checkpoint, with_bias
from replaceme.models import fingerprint, load_model, tiny_model, tiny_tokenizer, tiny_vision
from replaceme.pipeline import make_config, prune, run
from replaceme.solve import lstsq_map
from replaceme.stats import Features, collect, measure, writes

FAMILIES = {"llama": {}, "gpt2": {}, "mixtral": {}, "tied": dict(model_type="llama", tie_word_embeddings=True)}
KINDS = ["some", "all", "cpu", "folder"]  # disk for layers 1, 3 and 5; disk for everything; accelerate's own two
BLOCKS = [Block(2, 4), Block(1, 3), Block(4, 6)]  # the fold point on the disk, in memory, on the disk; the layers that go on both
IDS = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
BATCHES = [dict(input_ids=torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(i)),
                attention_mask=torch.ones(4, 24, dtype=torch.long)) for i in range(1, 4)]


def name_of(model, part):
    "The name of a module in a model"
    return next(n for n, m in model.named_modules() if m is part)


def some_layers(model, gone=(1, 3, 5)):
    "A device map: these layers on the disk, all the rest in memory"
    stack = name_of(model, layers_of(model))
    places = {f"{stack}.{i}": "disk" if i in gone else "cpu" for i in range(len(layers_of(model)))}
    rest = [n for n, m in model.named_modules() if not any(True for _ in m.children()) and not n.startswith(stack + ".")]
    return {**{n: "cpu" for n in rest}, **places}


def place(model, folder, kind, tmp):
    "The checkpoint in `folder` with its weights where `kind` says; `model` is the same one in memory"
    load = lambda **kw: type(model).from_pretrained(folder, **kw).eval()
    if kind == "some":
        return load(device_map=some_layers(model), offload_folder=str(tmp / "some"))
    if kind == "all":
        return load(device_map={"": "disk"}, offload_folder=str(tmp / "all"))
    return cpu_offload(load(), "cpu") if kind == "cpu" else disk_offload(load(), str(tmp / "folder"), "cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    "A model in memory, and the folder with its checkpoint in several files"
    kw = dict(FAMILIES[request.param])
    model, folder = tiny_model(kw.pop("model_type", request.param), layers=6, **kw), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return type(model).from_pretrained(folder).eval(), folder


@pytest.fixture
def llama(tmp_path):
    "Llama with layers 1, 3 and 5 on the disk, beside the same model in memory"
    model = tiny_model("llama", layers=6)
    model.save_pretrained(tmp_path / "dense")
    return model, place(model, tmp_path / "dense", "some", tmp_path)


def logits(model):
    with torch.no_grad():
        return model(IDS, attention_mask=torch.ones_like(IDS)).logits


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_same_as_in_memory(pair, kind, tmp_path):
    model, folder = pair
    away, dense = place(model, folder, kind, tmp_path), logits(model)
    assert any(p.is_meta for p in away.parameters()) and torch.equal(logits(away), dense)
    ours, theirs = find_points(away, range(6)), find_points(model, range(6))
    told = lambda points: [[(w.name, w.factor, w.params) for w in p.writers] for p in points.values()]
    assert told(ours) == told(theirs)
    found = [measure(m, BATCHES, candidates(6, 2), Profile(6)) for m in (away, model)]
    assert found[0].ranked == found[1].ranked
    for block in BLOCKS:
        g = [collect(m, BATCHES, [block], fold_points(m, [block.start - 1]))[block] for m in (away, model)]
        assert torch.equal(g[0].XtX, g[1].XtX) and torch.equal(g[0].XtR, g[1].XtR)
        fit = lstsq_map(g[0])
        small, ref = replace_block(away, block, fit), logits(replace_block(model, block, fit))
        check_cut(away, [block])
        assert differs_when_rebuilt(small) is None
        assert rel(logits(small), ref) < 1e-6 and rel(ref, logits(cut(model, [block]))) > 1e-2
        with explicit_map(cut(away, [block]), block.start - 1, fit) as m:
            assert rel(logits(m), ref) < 1e-5
        save_checkpoint(small, tmp_path / str(block), "40KB")
        assert len(list((tmp_path / str(block)).glob("*.safetensors"))) > 3
        assert rel(logits(type(model).from_pretrained(tmp_path / str(block)).eval()), ref) < 1e-6
        assert torch.equal(logits(away), dense) and rel(logits(small), ref) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_wide_and_affine(family, dtype, tmp_path):
    model = tiny_model(family, layers=6).to(dtype)
    model.save_pretrained(tmp_path / "dense")
    model = type(model).from_pretrained(tmp_path / "dense", dtype=dtype).eval()  # whose buffers have a dtype of their own
    away, block, feats = place(model, tmp_path / "dense", "some", tmp_path), Block(2, 4), Features(wide=True, affine=True)
    p, ref = fold_points(away, [1])[1], fold_points(model, [1])[1]
    assert p.module.weight.is_meta and torch.equal(writes(p), writes(ref)) and p.module.weight.is_meta
    fit = lstsq_map(collect(model, BATCHES, [block], {1: ref}, feats=feats)[block], ridge=1e-3)
    small, other = replace_block(away, block, fit), replace_block(model, block, fit)
    assert torch.equal(logits(small), logits(other)) and torch.equal(logits(away), logits(model))
    save_checkpoint(small, tmp_path / "small")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "small", dtype=dtype).eval()), logits(other))
    if dtype == torch.float32:
        with explicit_map(cut(with_bias(away), [block]), 1, fit) as m:
            assert rel(logits(m), logits(other)) < 1e-5


class Closed(dict):
    "A store that gives nothing away and cannot be copied"
    def __getitem__(self, k):
        raise AssertionError(f"{k} was loaded")

    def __deepcopy__(self, memo):
        raise AssertionError("the store was copied")


def stores(model):
    "The store behind each module's offloaded weights"
    return [m._hf_hook.weights_map.dataset for m in model.modules() if getattr(getattr(m, "_hf_hook", None), "weights_map", None) is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_loads_and_copies_nothing(kind, tmp_path):
    model = tiny_model("llama", layers=6)
    model.save_pretrained(tmp_path / "dense")
    away = place(model, tmp_path / "dense", kind, tmp_path)
    assert stores(away)
    for m in away.modules():
        if getattr(getattr(m, "_hf_hook", None), "weights_map", None) is not None:
            m._hf_hook.weights_map.dataset = Closed()
    small = cut(away, [Block(2, 4)])
    assert {id(s) for s in stores(small)} <= {id(s) for s in stores(away)} and differs_when_rebuilt(small) is None
    def numbers(m):
        return {id(t) if t.is_meta else t.data_ptr() for t in (*m.parameters(), *m.buffers())}
    assert numbers(small) <= numbers(away)
    with pytest.raises(AssertionError, match="was loaded"):
        logits(small)


def test_the_copy_does_not_hold_on_to_the_dense_model(tmp_path):
    "accelerate's wrappers around `to` and `cuda` are bound to the model they were made for"
    model = tiny_model("llama", layers=6)
    model.save_pretrained(tmp_path / "dense")
    away = place(model, tmp_path / "dense", "some", tmp_path)
    small, dense, layer = replace_block(away, Block(2, 4), None), weakref.ref(away), weakref.ref(layers_of(away)[2])
    ref = logits(small)
    del away
    gc.collect()
    assert dense() is None and layer() is None
    assert torch.equal(logits(small), ref)


def test_pruning_a_pruned_model(llama):
    "Each has a store of its own: a later fold into the same weight does not reach the earlier model"
    model, away = llama
    maps = [torch.eye(32) + 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    chain = lambda m: [m, *(a := [replace_block(m, Block(2, 3), maps[0])]), *(b := [replace_block(a[0], Block(2, 3), maps[1])]),
                       replace_block(b[0], Block(2, 3), maps[2]), replace_block(a[0], Block(3, 4), maps[1])]
    ours, theirs = chain(away), chain(model)
    for a, b in zip(ours, theirs):
        assert rel(logits(a), logits(b)) < 1e-6
    assert [len(layers_of(m)) for m in ours] == [6, 5, 4, 3, 4]


def test_the_device_map_speaks_of_the_layers_that_are_left(llama):
    _, away = llama
    before = dict(away.hf_device_map)
    away.hf_device_map["model.layers.4"] = "cpu"
    away.hf_device_map["model.layers.5.mlp"] = away.hf_device_map.pop("model.layers.5")
    rest = {k: v for k, v in before.items() if ".layers." not in k}
    layers = {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu", "model.layers.3.mlp": "disk"}
    small = cut(away, [Block(2, 4)])
    assert small.hf_device_map == {**rest, **layers} and len(away.hf_device_map) == len(before)
    assert cut(copy.deepcopy(small), [Block(1, 2)]).hf_device_map == {
        **rest, "model.layers.0": "cpu", "model.layers.1": "cpu", "model.layers.2.mlp": "disk"}
    assert small.hf_device_map == {**rest, **layers}
    assert not hasattr(cut(tiny_model("llama"), [Block(2, 4)]), "hf_device_map")


def test_a_layer_without_offloaded_weights_left(llama, tmp_path):
    "What goes may be all that was offloaded"
    model, _ = llama
    one = type(model).from_pretrained(tmp_path / "dense", device_map=some_layers(model, {3}), offload_folder=str(tmp_path / "one")).eval()
    small = replace_block(one, Block(3, 4), None)
    assert not any(p.is_meta for p in small.parameters()) and "disk" not in small.hf_device_map.values()
    small.save_pretrained(tmp_path / "small")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "small")), logits(replace_block(model, Block(3, 4), None)))


@pytest.mark.parametrize("kind", ["memory", "cpu", "some"])
def test_experts_are_taken_apart_file_by_file(kind, tmp_path, monkeypatch):
    model = tiny_model("mixtral", layers=6)
    model.save_pretrained(tmp_path / "dense")
    away = model if kind == "memory" else place(model, tmp_path / "dense", kind, tmp_path)
    small, sizes, save = replace_block(away, Block(2, 4), None), [], modeling_utils.safe_save_file
    asked, convert, whole = [], merge._reverted, modeling_utils.revert_weight_conversion

    def note(m, state):
        asked.append((len(state), sum(t.nbytes for t in state.values() if not t.is_meta)))
        return convert(m, state)

    def write(state, *args, **kw):
        sizes.append(sum(n for _, n in asked))
        asked.clear()
        return save(state, *args, **kw)

    monkeypatch.setattr(merge, "_reverted", note)
    monkeypatch.setattr(modeling_utils, "safe_save_file", write)
    said = copy.copy(vars(small).get("hf_device_map"))
    save_checkpoint(small, tmp_path / "small", 70_000)
    files = [f.stat().st_size for f in (tmp_path / "small").glob("*.safetensors")]
    assert len(sizes) == len(files) > 3 and 60_000 < max(sizes) <= 70_000  # bytes converted before each file is written
    assert vars(small).get("hf_device_map") == said and modeling_utils.revert_weight_conversion is whole
    assert rel(logits(type(model).from_pretrained(tmp_path / "small").eval()), logits(replace_block(model, Block(2, 4), None))) < 1e-6


def weights_in(folder):
    "`{name: tensor}` of all files, after a look at the index"
    found = {}
    for f in folder.glob("*.safetensors"):
        with safe_open(f, "pt") as s:
            new = {k: s.get_tensor(k) for k in s.keys()}
        assert not set(new) & set(found), "a weight stands in two files"
        found.update(new)
    index = folder / "model.safetensors.index.json"
    assert not index.exists() or set(json.loads(index.read_text())["weight_map"]) == set(found)
    return found


@pytest.mark.parametrize("said", [None, {"": "cpu"}, "disk"])
def test_weights_that_are_saved_as_one(said, tmp_path):
    "DINOv2's gated MLP: two weights of the model are one in its checkpoint, so no file boundary may come between them"
    model = tiny_vision("dinov2", use_swiglu_ffn=True)
    model.save_pretrained(tmp_path / "whole")
    ref = weights_in(tmp_path / "whole")
    assert any("weights_in" in k for k in ref) and not any("weights_in" in k for k in model.state_dict())
    places = {"": "disk"} if said == "disk" else said
    other = AutoModel.from_pretrained(tmp_path / "whole", device_map=places, offload_folder=str(tmp_path / "off"))
    for size in range(5_000, 60_000, 5_000):
        save_checkpoint(other, tmp_path / str(size), size)
        found = weights_in(tmp_path / str(size))
        assert set(found) == set(ref) and all(torch.equal(found[k], ref[k]) for k in ref), size


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_layers_share_are_written_once(kind, tmp_path):
    "Zamba 2 has one block in many layers, and offloaded each layer has its own; what a map went into is no longer shared"
    model = tiny_model("zamba2", layers=6)
    model.save_pretrained(tmp_path / "dense")
    small, ref = [replace_block(m, Block(4, 6), None) for m in (place(model, tmp_path / "dense", kind, tmp_path), model)]
    for m, name in ((small, "away"), (ref, "memory")):
        save_checkpoint(m, tmp_path / name)
    found, want = [weights_in(tmp_path / name) for name in ("away", "memory")]
    assert len(want) < len(model.state_dict()) and set(found) == set(want) and all(torch.equal(found[k], want[k]) for k in want)
    assert torch.equal(*[logits(type(model).from_pretrained(tmp_path / name).eval()) for name in ("away", "memory")])
    name = "model.layers.3.shared_transformer.feed_forward.down_proj"
    linear = small.get_submodule(name)
    if linear.weight is not small.get_submodule(name.replace("3", "1")).weight:  # loaded onto the disk it is, and transformers sees it
        merge._assign(linear, dict(weight=merge._values(linear, "weight") + 1))
        once = merge._written_once(small)
        assert name + ".weight" not in once and name.replace("down", "gate_up") + ".weight" in once


@torch.no_grad()
def test_what_reads_weights_reads_offloaded_ones(pair, tmp_path):
    model, folder = pair
    text = "A transformer is a stack of layers. " * 8
    for kind in KINDS:
        away = place(model, folder, kind, tmp_path)
        assert fingerprint(away) == fingerprint(model)
        assert perplexity(away, tiny_tokenizer(), text, 32, 4).value == perplexity(model, tiny_tokenizer(), text, 32, 4).value


def test_the_whole_recipe(pair, tmp_path):
    model, folder = pair
    away = place(model, folder, "some", tmp_path)
    keys = dict(method="lstsq", dataset="python-docs", dataset_size=8, max_length=32, batch_size=4)
    pruned, results = zip(*[prune(m, tiny_tokenizer(), 2, **keys) for m in (away, model)])
    assert results[0]["block"] == results[1]["block"] and rel(logits(pruned[0]), logits(pruned[1])) < 1e-6


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_device_map_auto_on_a_small_machine(family, tmp_path, monkeypatch):
    "What does not fit goes to the disk; the folder for what must be written there first is nobody's business but ours"
    tiny_model(family, layers=6).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    model, _ = load_model(tmp_path / "dense")
    room = sum(p.nbytes for p in model.parameters()) // 2
    monkeypatch.setattr("transformers.integrations.accelerate.get_max_memory", lambda *a: {"cpu": room})
    away, _ = load_model(tmp_path / "dense", device_map="auto")
    assert "disk" in away.hf_device_map.values() and torch.equal(logits(away), logits(model))
    small, ref = [replace_block(m, Block(3, 5), None) for m in (away, model)]
    save_checkpoint(small, tmp_path / "small")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "small")), logits(ref))


@pytest.mark.parametrize("more", [{}, dict(merge=False), dict(method="remove")], ids=str)
def test_scores_of_a_run_whose_weights_stay_on_the_disk(save_tiny, tmp_path, monkeypatch, more):
    "They are read from the folder that was saved, which has its last name by the time the pruned model is scored"
    monkeypatch.chdir(save_tiny(tmp_path))
    keys = dict(model_path="tiny", layers_to_skip=2, method="lstsq", ridge=.01, dataset="python-docs", dataset_size=8, max_length=32, eval_size=2, eval_length=32,
                speed=False, prompt="Hi") | more
    keys = {k: v for k, v in keys.items() if more.get("method") != "remove" or k != "ridge"}
    here, away = [run(make_config(**keys, **place, save_path=name))[0] for name, place in
                  (("here", {}), ("away", dict(device_map="auto", max_memory={"cpu": "10KB"})))]
    assert away.perplexity.after.losses == here.perplexity.after.losses and "scoring_failed" not in away
    assert away["generations"] == here["generations"]


def places(stack):
    "Mappings as the messages advise them, and with one place inside another"
    return ["disk", {"": "cpu", f"{stack}.5": "disk"}, {"": "disk", f"{stack}.1": "cpu"}, {"": "cpu", stack: "disk", f"{stack}.2": "cpu"}]


@pytest.mark.parametrize("family", [*FAMILIES, "vit"])
def test_the_word_disk_and_the_rest_of_a_mapping(family, tmp_path):
    "transformers takes no word disk, and fails where a mapping names a module and what it is a part of"
    kw = dict(FAMILIES.get(family, {}))
    model = tiny_vision("vit", layers=6) if family == "vit" else tiny_model(kw.pop("model_type", family), layers=6, **kw)
    model.save_pretrained(tmp_path / "dense")
    if family == "vit":
        ViTImageProcessor(size=dict(height=32, width=32)).save_pretrained(tmp_path / "dense")
    else:
        tiny_tokenizer().save_pretrained(tmp_path / "dense")
    stack = name_of(model, layers_of(model))
    for where in places(stack):
        away, _ = load_model(tmp_path / "dense", device_map=where)
        gone = [n for n, p in layers_of(away).named_parameters() if p.is_meta]
        assert gone and fingerprint(away) == fingerprint(model), where
        if isinstance(where, dict):
            assert {int(n.split(".")[0]) for n in gone} == {i for i in range(6) if where.get(f"{stack}.{i}", where.get(stack, where[""])) == "disk"}
        with torch.no_grad():
            one, two = [m(torch.ones(1, 3, 32, 32) if family == "vit" else IDS)[0] for m in (away, model)]
        assert torch.equal(one, two), where


@pytest.mark.parametrize("where", places("model.layers"), ids=str)
def test_a_run_with_a_mapping(where, tmp_path):
    folder = tmp_path / "dense"
    tiny_model(layers=6).save_pretrained(folder), tiny_tokenizer().save_pretrained(folder)
    (tmp_path / "text.txt").write_text("\n".join(f"Line {i} of a text, and nothing more." for i in range(40)))
    keys = dict(model_path=str(folder), layers_to_skip=2, method="lstsq", dataset=str(tmp_path / "text.txt"), dataset_size=8, max_length=32,
                eval_dataset=None, prompt=None, speed=False)
    (a, here), (b, there) = [run(make_config(**keys, device_map=m, save_path=str(tmp_path / n))) for m, n in ((None, "here"), (where, "there"))]
    assert a["block"] == b["block"] and rel(logits(load_model(there)[0]), logits(load_model(here)[0])) < 1e-6


@pytest.mark.parametrize("where, why", [({"": "cpu", "model.layers.5.mlp.up_proj.weight": "disk"}, "only a whole module"), ({"": "cpu", "model.layers.6": "disk"}, "names 1 module"),
                                        ({"": "cpu", "lm_head.weight": "disk"}, "only a whole module")])
def test_a_mapping_that_cannot_be(where, why, tmp_path):
    tiny_model(layers=6).save_pretrained(tmp_path), tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ReplaceMeError, match=why):
        load_model(tmp_path, device_map=where)
