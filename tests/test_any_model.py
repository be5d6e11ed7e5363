"""From a folder to a folder, for models beyond the plain decoder: experts, norms behind the MLP, image encoders, hybrids."""
import json
import sys

import pytest
import torch
import warm
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer, ViTImageProcessor

from replaceme.blocks import Block
from replaceme.core import ReplaceMeError
from replaceme.data import synthetic_images
from replaceme.merge import cut, save_checkpoint
from replaceme.models import load_model, tiny_model, tiny_tokenizer, tiny_vision
from replaceme.pipeline import make_config, prune, run
from replaceme.search import fit_blocks

IDS = torch.arange(5, 21)[None]
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TEXT = "\n".join(f"The {a} {b} {c} of the {a}." for a in ("cat", "dog", "sea") for b in ("saw", "ate", "was") for c in ("end", "sun", "day", "map"))


@pytest.fixture
def text_model(tmp_path):
    def make(family, **kw):
        folder = tmp_path / family
        tiny_model(family, **{"layers": 6, **kw}).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        (tmp_path / "text.txt").write_text(TEXT * 6, encoding="utf-8")
        return dict(model_path=str(folder), layers_to_skip=2, dataset=str(tmp_path / "text.txt"), dataset_size=12, max_length=32, batch_size=4,
                    eval_size=2, eval_length=32, prompt=None, save_path=str(tmp_path / "small"))
    return make


@pytest.fixture
def image_model(tmp_path):
    def make(family, cls=None, **kw):
        model = tiny_vision(family, layers=6, **kw)
        if cls is not None:
            torch.manual_seed(0)
            model = cls.from_config(model.config).eval()
        model.save_pretrained(tmp_path / family)
        ViTImageProcessor(size=dict(height=32, width=32)).save_pretrained(tmp_path / family)
        (tmp_path / "pictures").mkdir()
        for i, im in enumerate(synthetic_images(24)):
            im.save(tmp_path / "pictures" / f"{i:02}.png")
        return dict(model_path=str(tmp_path / family), layers_to_skip=2, dataset=str(tmp_path / "pictures"), dataset_size=16, batch_size=4,
                    eval_size=6, save_path=str(tmp_path / "small"))
    return make


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "jamba", "falcon", "granite"])
def test_auto_on_any_family_gives_an_ordinary_checkpoint(family, text_model):
    "Experts take a narrow map, all others a wide one; what is saved loads without this package"
    result, folder = run(make_config(**text_model(family)))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert result["fit"]["map"] == ("narrow" if family in ("mixtral", "deepseek_v3", "gpt_oss", "jamba") else "wide")
    assert model.config.num_hidden_layers == 4 and not (folder / "modeling_replaceme.py").exists()
    assert result["fit"]["error"] < result["fit"]["removal_error"]
    assert result["perplexity"]["after"]["tokens"] == result["perplexity"]["before"]["tokens"] > 0
    a, b = [model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(a, b)


GIVEN = dict(blocks=[[2, 4]])


@pytest.mark.parametrize("family, keys", [*[(f, GIVEN) for f in ("mixtral", "gpt_oss", "deepseek_v3", "dead llama", "dead olmo2")],
                                          ("mixtral", dict(layers_to_skip=2, max_blocks=2)), ("mixtral", dict(method="lstsq", refit=2, **GIVEN))], ids=str)
def test_a_block_that_is_given_where_no_matrix_alone_writes(family, keys, text_model):
    "What is read there is no one thing, whoever chose the block; an MLP of zeros, as one that was added may be, is one that takes no map"
    asked = text_model(family.split()[-1])
    if family.startswith("dead"):
        model = AutoModelForCausalLM.from_pretrained(asked["model_path"])
        torch.nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
        model.save_pretrained(asked["model_path"])
    result, folder = run(make_config(**{**asked, "layers_to_skip": None, **keys, **({} if family == "dead olmo2" else dict(map="narrow"))}))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.num_hidden_layers == 4
    assert result.fit.error < result.fit.removal_error


def test_a_tokenizer_whose_files_have_names_of_their_own(text_model, tmp_path):
    "What its class reads is there, whatever it is called"
    asked = text_model("gpt_neox")
    folder = tmp_path / "gpt_neox"
    for f in folder.glob("*token*"):
        f.unlink()
    (folder / "vocab.txt").write_text("\n".join(["<|endoftext|>", "<|startoftext|>", *"abcdefghijklmnopqrstuvwxyzTCDS .", *(f"<|byte{i}|>" for i in range(256))]))
    (folder / "emoji.json").write_text('{"emoji": {}, "emoji_inv": {}}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPTNeoXJapaneseTokenizer"}')
    _, saved = run(make_config(**{**asked, "method": "remove"}))
    tok, was = [AutoTokenizer.from_pretrained(f) for f in (saved, folder)]
    assert type(tok).__name__ == "GPTNeoXJapaneseTokenizer" and tok("a cat").input_ids == was("a cat").input_ids != []


def test_wide_maps_for_experts_are_refused(text_model):
    with pytest.raises(ReplaceMeError, match="mlp.experts is not one matrix .* use map: narrow"):
        run(make_config(**text_model("mixtral"), map="wide"))
    with pytest.raises(ReplaceMeError, match="affine: mlp.experts has no bias"):
        run(make_config(**text_model("mixtral"), method="lstsq", affine=True))


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.arange(5, 21)[None]
assert torch.equal(*[m.generate(ids, max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False)])
assert "replaceme" not in sys.modules
torch.save(m(ids).logits, sys.argv[2])
"""


@pytest.mark.parametrize("method", ["auto", "lstsq"])
def test_a_norm_behind_the_sum_with_the_stream(method, text_model, tmp_path):
    "BERT's: folding is refused with both ways out; both ways work"
    keys = text_model("bert")
    with pytest.raises(ReplaceMeError, match="norm or another non-linear step.*method: remove.*merge: false"):
        run(make_config(**keys, method=method))
    assert not (tmp_path / "small").exists()
    result, folder = run(make_config(**keys, method=method, merge=False))
    assert result["fit"]["map"] == "state" and result["fit"]["error"] < result["fit"]["removal_error"] and "parameters" in result["fit"]["cost"]
    assert "trust_remote_code=True" in (folder / "README.md").read_text(encoding="utf-8")
    out = warm.run([sys.executable, "-c", FRESH, str(folder), str(tmp_path / "logits.pt")], capture_output=True, text=True, fresh=True)
    assert out.returncode == 0, out.stderr[-2000:]
    removed, plain = run(make_config(**{**keys, "save_path": str(tmp_path / "plain")}, method="remove"))
    model = AutoModelForCausalLM.from_pretrained(plain)
    assert removed["fit"]["map"] == "none" and removed["fit"]["error"] == removed["fit"]["removal_error"]
    assert model.config.num_hidden_layers == 4
    assert not torch.allclose(model(IDS).logits, torch.load(tmp_path / "logits.pt"), atol=1e-3)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "glm4"])
@pytest.mark.parametrize("method", ["auto", "lstsq", "cosine"])
def test_a_norm_behind_the_mlp(family, method, text_model, tmp_path):
    "The matrix and the norm's weight are fitted together; what is saved is an ordinary checkpoint that was fitted so"
    keys = text_model(family)
    result, folder = run(make_config(**keys, method=method))
    assert result["fit"]["map"] == "normed" and result["fit"]["error"] < result["fit"]["removal_error"]
    page, card = [(folder / name).read_text(encoding="utf-8") for name in ("report.html", "README.md")]
    assert "through the norm" in page and "through the norm" in card and "trust_remote_code=True" not in card
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == 4
    small, again = prune(*load_model(keys["model_path"]), method=method, 
                         **{k: keys[k] for k in ("layers_to_skip", "dataset", "dataset_size", "max_length", "batch_size")})
    assert again["block"] == result["block"] and torch.allclose(model(IDS).logits, small(IDS).logits, atol=1e-5)


def test_rows_behind_a_norm_are_kept_turn_by_turn(text_model, tmp_path):
    "The matrix is fitted twice, to other rows each time; a second run finds both and comes to the same"
    keys = dict(text_model("gemma2"), method="cosine", activations_save_path=str(tmp_path / "acts"))
    first = run(make_config(**keys))[0]
    again = run(make_config(**{**keys, "save_path": str(tmp_path / "again")}))[0]
    assert again["fit"]["error"] == first["fit"]["error"] and len(list((tmp_path / "acts").iterdir())) == 2


def test_recovery_trains_the_norm_with_its_matrix(text_model):
    from replaceme.recover import rung_names
    assert rung_names(tiny_model("gemma2", layers=4), [2], "fold") == [
        "model.layers.1.mlp.down_proj.weight", "model.layers.1.post_feedforward_layernorm.weight"]


def test_what_no_norm_can_take(text_model):
    "A bias, a map that is saved alone, several bits: said before any text is made"
    keys = text_model("gemma2")
    for wrong, said in ((dict(affine=True), "no place for a bias"), (dict(save_transform_only=True), "no map is left to save alone")):
        with pytest.raises(ReplaceMeError, match=said):
            run(make_config(**keys, method="lstsq", **wrong))


@torch.no_grad()
def test_the_unmerged_map_is_least_squares_on_the_states(text_model):
    "Against a direct computation in float64"
    from replaceme.activations import capture
    from replaceme.data import batches
    model, tok = tiny_model("gemma2", layers=6), tiny_tokenizer()
    keys = text_model("gemma2")
    small, result = prune(model, tok, method="lstsq", merge=False, blocks=[[2, 4]], dataset=keys["dataset"], dataset_size=12, max_length=64, batch_size=4)
    from replaceme.data import load_texts
    bs = batches(load_texts(keys["dataset"], tokenizer=tok, size=12, max_length=64), tok, 4, 64)
    S, B = [torch.cat([capture(model, b).S[i] for b in bs]).double() for i in (2, 4)]
    T = torch.linalg.lstsq(S, B).solution
    assert torch.allclose(small.model.layers[1].replaceme_map.weight.double().T, T, atol=1e-3)
    assert result["calibration"]["tokens"] == len(S)


def test_removal_is_the_cut_alone(text_model):
    from replaceme.blocks import Block
    from replaceme.merge import cut
    model, tok, keys = tiny_model("llama"), tiny_tokenizer(), text_model("llama")
    small, result = prune(model, tok, 2, method="remove", dataset=keys["dataset"], dataset_size=12, max_length=32)
    ref = cut(model, [Block(*result["block"])])
    assert torch.equal(small(IDS).logits, ref(IDS).logits)


@pytest.mark.parametrize("keys, why", [
    (dict(method="remove", map="wide"), "method remove fits nothing"),
    (dict(method="remove", merge=False), "no map to keep"),
    (dict(method="cosine", merge=False), "closed form"),
    (dict(merge=False, map="wide"), "the map acts on the hidden state"),
    (dict(method="lstsq", merge=False, structure="diag"), "the map acts on the hidden state"),
])
def test_contradictions(keys, why):
    with pytest.raises(ReplaceMeError, match=why):
        make_config(**keys)


@pytest.mark.parametrize("family", ["vit", "clip", "dinov2", "siglip_vision_model", "dinov3_vit", "pixtral"])
@torch.no_grad()
def test_an_image_encoder_from_a_folder_of_pictures(family, image_model):
    result, folder = run(make_config(**image_model(family)))
    assert result["kind"] == "images" and result["calibration"]["texts"] == 16 and result["features"]["images"] == 6
    assert .2 < result["features"]["agreement"] <= 1 and result["fit"]["error"] < result["fit"]["removal_error"]
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (folder / "preprocessor_config.json").exists()
    card, page = [(folder / n).read_text(encoding="utf-8") for n in ("README.md", "report.html")]
    assert "AutoImageProcessor" in card and "image-feature-extraction" in card and "images" in page and "AutoTokenizer" not in card


@torch.no_grad()
def test_a_classifier_keeps_its_head(image_model, tmp_path):
    result, folder = run(make_config(**image_model("vit", AutoModelForImageClassification), method="lstsq"))
    small = AutoModelForImageClassification.from_pretrained(folder)
    assert 0 <= result["features"]["same_class"] <= 1 and small(pixel_values=PIXELS).logits.shape == (2, 2)


@pytest.mark.parametrize("keys, why", [
    (dict(dataset="self"), "self"), (dict(tasks="piqa"), "tasks are questions to a language model"), (dict(mask=.1), "an image has none"),
])
def test_what_makes_no_sense_for_images(keys, why, image_model, tmp_path, monkeypatch):
    monkeypatch.setattr("replaceme.pipeline.load_tasks", lambda *a: None)
    with pytest.raises(ReplaceMeError, match=why):
        run(make_config(**{**image_model("vit"), **keys}))
    assert not (tmp_path / "small").exists()


@torch.no_grad()
def test_a_better_fit_of_an_encoder_is_chosen_by_its_last_states(image_model):
    "The candidate with the smallest loss wins, and the loss is one minus the cosine of the last states"
    result, _ = run(make_config(**image_model("vit"), select="loss", top_k=3))
    losses = [c["loss"] for c in result["choice"]]
    assert len(losses) == 3 and result["block"] == result["choice"][losses.index(min(losses))]["blocks"][0]
    assert all(0 <= x < 1 for x in losses)


def test_one_shot_record_is_json(image_model):
    result, folder = run(make_config(**{k: v for k, v in image_model("vit").items() if k != "eval_size"}, eval_dataset=None))
    assert "features" not in json.loads((folder / "replaceme.json").read_text(encoding="utf-8")) and safe_open(folder / "model.safetensors", "pt").keys()


def wrapped(kind, model):
    "A model as a program of its own may hold it, and the model that can be got of it"
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    if kind == "compile":
        return torch.compile(model), lambda m: m._orig_mod
    if kind == "parallel":
        return torch.nn.DataParallel(model), lambda m: m.module
    if kind == "lora":
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])), lambda m: m.merge_and_unload()
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), lambda m: m.get_base_model()


@pytest.mark.parametrize("kind, way", [("compile", "._orig_mod."), ("parallel", ".module."), ("lora", ".merge_and_unload()."), ("prompt", ".get_base_model(),")])
def test_a_wrapped_model_is_refused_with_the_way_out(kind, way):
    model, out = wrapped(kind, tiny_model(layers=4))
    keys = dict(layers_to_skip=2, dataset=[TEXT] * 4, dataset_size=4, max_length=16)
    with pytest.raises(ReplaceMeError) as said:
        prune(model, tiny_tokenizer(), **keys)
    assert f"of type {type(model).__name__}: give its {way}" in str(said.value) and "\n" not in str(said.value)
    assert prune(out(model), tiny_tokenizer(), **keys)[0].config.num_hidden_layers == 2


def only(kind, at, n=6):
    return dict(layer_types=["full_attention" if i in at else kind for i in range(n)])


HYBRIDS = [("qwen3_next", only("linear_attention", [1]), [[1, 3]]), ("qwen3_next", only("linear_attention", [1, 3]), [[1, 2], [3, 4]]),
           ("granitemoehybrid", only("linear_attention", [1, 3]), [[1, 2], [3, 4]]), ("lfm2", only("conv", [1, 3]), [[1, 2], [3, 4]])]


@pytest.mark.parametrize("family, keys, blocks", HYBRIDS, ids=str)
def test_the_last_attention_layer_of_a_hybrid_stays(family, keys, blocks, text_model, monkeypatch):
    "Blocks that are given are refused before a text is read; one attention layer that is left is enough to write text"
    monkeypatch.setattr("replaceme.feed.Feed.calibration", lambda *a, **k: pytest.fail("a text was read"))
    conf = {**text_model(family, **keys), "layers_to_skip": None, "method": "remove"}
    with pytest.raises(ReplaceMeError, match="cannot run with a cache.*no attention layer is left"):
        run(make_config(**conf, blocks=blocks))
    monkeypatch.undo()
    small, _ = prune(tiny_model(family, layers=6, **keys), tiny_tokenizer(), blocks=[[4, 5], [2, 3]], method="remove", dataset=conf["dataset"],
                     dataset_size=4, max_length=32)
    assert small.generate(IDS, max_new_tokens=4, do_sample=False).shape[1] > IDS.shape[1]


def nearest_first(monkeypatch, layers):
    "The distances that would let these layers go first"
    monkeypatch.setattr("replaceme.distance.Profile.of_length",
                        lambda self, n: [sum(.01 if i in layers else 1. for i in range(s, s + n)) for s in range(1, self.n_layers - n + 1)])


@pytest.mark.parametrize("more, left", [(dict(max_blocks=2, layers_to_skip=2), 1), (dict(num_A=2, layers_to_skip=1), 0), (dict(method="shortgpt"), 0)], ids=str)
def test_a_way_that_takes_every_attention_layer_is_left_out_or_refused(more, left, text_model, monkeypatch):
    nearest_first(monkeypatch, (1, 3))
    monkeypatch.setattr("replaceme.baselines.influences", lambda *a: torch.tensor([float(i not in (1, 3)) for i in range(6)]))
    keys = text_model("qwen3_next", **only("linear_attention", [1, 3]))
    conf = make_config(**{**keys, "method": "remove", **more, **({} if "method" in more else dict(sinks="allow"))})
    if not left:
        with pytest.raises(ReplaceMeError, match="cannot run with a cache"):
            run(conf)
        return
    _, folder = run(conf)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "full_attention" in model.config.layer_types
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape[1] > IDS.shape[1]


@pytest.mark.parametrize("most, found", [(300, True), (10, False)])
def test_ways_are_looked_for_behind_those_that_do_not_last(most, found, text_model, monkeypatch):
    "More ways than are wanted take every attention layer, and are nearer than all others; only a search without end is given up"
    nearest_first(monkeypatch, (1, 3))
    monkeypatch.setattr("replaceme.ours._MOST", most)
    keys = text_model("qwen3_next", layers=9, **only("linear_attention", [1, 3], 9))
    conf = make_config(**{**keys, "method": "remove", "max_blocks": 3, "layers_to_skip": 4, "sinks": "allow"})
    if found:
        assert "full_attention" in AutoModelForCausalLM.from_pretrained(run(conf)[1]).config.layer_types
        return
    with pytest.raises(ReplaceMeError, match="no way to remove 4 layers in 3 blocks"):
        run(conf)


@pytest.mark.parametrize("layers, blocks", [(6, [[1, 2], [4, 5]]), (5, [[1, 2]]), (5, [[1, 2], [3, 4]])], ids=str)
@torch.no_grad()
def test_a_list_that_is_as_long_as_the_layers_by_chance_is_left_whole(layers, blocks, tmp_path, text_model):
    "Blocks go one after another, and five multipliers are not about five layers; a list that nobody knows neither, where it was longer than the layers"
    model = tiny_model("falcon_h1", layers=layers, ssm_multipliers=[1.0, 0.9, 0.8, 0.7, 0.6])
    if layers == 6:
        model.config.mine = [1, 2, 3, 4, 5]
    small, _ = prune(model, tiny_tokenizer(), blocks=blocks, method="remove", dataset=text_model("llama")["dataset"], dataset_size=4, max_length=32)
    assert small.config.ssm_multipliers == model.config.ssm_multipliers and getattr(small.config, "mine", None) == getattr(model.config, "mine", None)
    assert len(small.config.layer_types) == small.config.num_hidden_layers == layers - len(blocks)
    save_checkpoint(small, tmp_path / "out")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits, small.eval()(IDS).logits)


def test_what_is_handed_out_must_be_what_its_config_rebuilds(monkeypatch, text_model):
    "Not only what the blocks leave when they go together"
    def odd(*a, **k):
        done = fit_blocks(*a, **k)
        done.model.config.intermediate_size += 1
        return done
    monkeypatch.setattr("replaceme.search.fit_blocks", odd)
    with pytest.raises(ReplaceMeError, match="the config would rebuild model.layers.0.mlp"):
        prune(tiny_model("llama", layers=6), tiny_tokenizer(), blocks=[[1, 2], [4, 5]], method="remove", dataset=text_model("llama")["dataset"],
              dataset_size=4, max_length=32)


def test_image_backbones_name_their_stages_right_where_one_layer_goes():
    model = tiny_vision("dinov2", layers=6)
    small = cut(model, [Block(2, 3)])
    assert small.config.stage_names == model.config.stage_names[:6]
