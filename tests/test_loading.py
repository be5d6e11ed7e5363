"What a stranger's checkpoint lacks, has too much, or is instead of a language model: said before anything is measured, never made up."
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import replaceme
from replaceme import cli
from replaceme.compare import CompareConfig, compare
from replaceme.contract import contract, saved_and_loaded
from replaceme.core import ReplaceMeError, ReplaceMeWarning
from replaceme.models import gguf_folder, gguf_place, load_model, resolve, tiny_model, tiny_tokenizer, tiny_vision
from replaceme.pipeline import EvaluateConfig, analyse, evaluate, make_config, prune, run

UP = "model.layers.3.mlp.up_proj.weight"
IDS = torch.arange(3, 40)[None]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text("".join(json.dumps(dict(text=f"The map stands in for the layers that went, line {i}. " * 3)) + "\n" for i in range(12)))
    Path("eval.txt").write_text("One layer is enough for what two have said before. " * 40)


def folder_of(model, name="m", tokenizer=True, **kw):
    model.save_pretrained(name, **kw)
    if tokenizer:
        tiny_tokenizer().save_pretrained(name)
    return Path(name)


def edit(folder, lose=(), add=None, file="model.safetensors"):
    "Another set of weights in a folder"
    old = load_file(folder / file)
    assert set(lose) <= set(old)
    save_file({k: v for k, v in old.items() if k not in lose} | (add or {}), folder / file, metadata={"format": "pt"})


def config(folder, **changes):
    "Another config in a folder; None takes a key out"
    f = Path(folder) / "config.json"
    d = {**json.loads(f.read_text()), **changes}
    f.write_text(json.dumps({k: v for k, v in d.items() if v is not None}))


def refused(folder, *parts, **kw):
    with pytest.raises(ReplaceMeError) as e:
        load_model(folder, **kw)
    assert "\n" not in str(e.value) and all(p in str(e.value) for p in parts), str(e.value)


def keys(folder, **kw):
    return dict(model_path=str(folder), dataset="texts.jsonl", max_length=64, eval_dataset="eval.txt", eval_length=32, eval_size=4, prompt=None) | kw


def scored(folder, **kw):
    "The keys of an evaluation, which reads no calibration text"
    return {k: v for k, v in keys(folder, **kw).items() if k not in ("dataset", "max_length")}


def said(f):
    "What `f` returns, and the warnings of ours"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        res = f()
    return res, [str(w.message) for w in seen if issubclass(w.category, ReplaceMeWarning)]


# -- weights that are not there


def test_only_one_place_in_the_package_takes_a_model_out_of_a_checkpoint():
    found = []
    for f in Path(replaceme.__file__).parent.glob("*.py"):
        for line in f.read_text(encoding="utf-8").splitlines():
            for before in re.findall(r"([\w.)\]]+)\.from_pretrained\(", line.split("#")[0]):
                if not re.search(r"AutoTokenizer$|AutoConfig$|PeftConfig$|AutoImageProcessor$|GenerationConfig$|^inputs\)$", before) and "f'" not in line and "f\"" not in line:
                    found.append((f.name, line.strip()))
    # a tokenizer or image processor, whichever class it is; and the one place
    assert [x for x in found if "res = cls.from_pretrained(path, **kw)" not in x[1]] == [
        ("models.py", "model, info = cls.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **kw)")]


@pytest.mark.parametrize("how", [dict(), dict(use_4bit=True), dict(use_8bit=True), dict(device_map="cpu"), dict(device_map={"": "disk"}), dict(dtype="bfloat16")],
                         ids=str)
def test_a_lost_weight_is_named_however_the_model_is_loaded(how):
    folder = folder_of(tiny_model(layers=4))
    edit(folder, [UP])
    refused(folder, "missing, and would be random: 1 parameter", UP, **how)


def test_a_lost_weight_is_named_at_every_door(capsys):
    folder, whole = folder_of(tiny_model(layers=4)), folder_of(tiny_model(layers=4), "whole")
    edit(folder, [UP])
    doors = [lambda: run(make_config(**keys(folder, layers_to_skip=1))), lambda: analyse(make_config(**keys(folder))),
             lambda: evaluate(make_config(EvaluateConfig, **scored(folder))),
             lambda: evaluate(make_config(EvaluateConfig, **scored(folder) | dict(model_path=None, compare=[str(whole), str(folder)]))),
             lambda: compare(make_config(CompareConfig, **keys(folder, layers=[1], methods=["remove"])))]
    for door in doors:
        with pytest.raises(ReplaceMeError, match=re.escape(UP)):
            door()
    with pytest.raises(SystemExit) as e:
        cli.run_replaceme(["--model_path", str(folder), "--layers_to_skip", "1"])
    assert e.value.code == 2 and UP in capsys.readouterr().err and not Path("pruned").exists()


def test_many_lost_weights_are_counted_and_the_first_are_named():
    folder = folder_of(tiny_model(layers=4))
    edit(folder, [k for k in load_file(folder / "model.safetensors") if ".mlp." in k])
    refused(folder, "12 parameters (model.layers.0.mlp.down_proj.weight, model.layers.0.mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight, ...)")


def test_a_lost_expert_is_named():
    "transformers stops here with `We encountered some issues`"
    folder = folder_of(tiny_model("mixtral", layers=3))
    edit(folder, ["model.layers.1.block_sparse_moe.experts.2.w1.weight"])
    refused(folder, "model.layers.1.mlp.experts.gate_up_proj")


@pytest.mark.parametrize("changes, parts", [
    (dict(num_hidden_layers=5), ["would be random: 9 parameters (model.layers.4."]),
    (dict(num_hidden_layers=3), ["without a place in the model: 9 parameters (model.layers.3."]),
    (dict(intermediate_size=32), ["of another shape: 12 parameters", "(32, 64) for (32, 32)"]),
    (dict(vocab_size=300), ["model.embed_tokens.weight (320, 32) for (300, 32)"]),
    (dict(num_key_value_heads=4), ["self_attn.k_proj.weight (16, 32) for (32, 32)"]),
    (dict(attention_bias=True), ["would be random", "q_proj.bias"]),
    (dict(tie_word_embeddings=True), ["tied by the config, but different ones", "lm_head.weight and model.embed_tokens.weight"]),
], ids=str)
def test_a_config_that_asks_for_something_else_than_the_weights_hold(changes, parts):
    folder = folder_of(tiny_model(layers=4))
    config(folder, **changes)
    refused(folder, *parts)
    if "tie_word_embeddings" in changes:
        refused(folder, *parts, device_map={"": "disk"})


def test_weights_that_were_tied_and_are_not_by_the_config():
    folder = folder_of(tiny_model(layers=4, tie_word_embeddings=True))
    assert torch.equal(load_model(folder)[0].lm_head.weight, load_model(folder)[0].model.embed_tokens.weight)
    config(folder, tie_word_embeddings=False)
    refused(folder, "would be random: 1 parameter (lm_head.weight)")


def test_a_bias_or_an_adapter_beside_the_weights_is_not_dropped():
    for name in "model.layers.1.self_attn.q_proj.bias", "model.layers.1.self_attn.q_proj.lora_A.weight", "score.weight":
        folder = folder_of(tiny_model(layers=3))
        edit(folder, add={name: torch.ones(32)})
        refused(folder, "without a place in the model", name)


def test_what_is_left_out_by_right_is_left_out():
    "Further predictors behind the last layer, tables of former days, a mask: the model is the one without them"
    model = tiny_model(layers=3)
    layer = {k.replace("layers.2.", "layers.3."): v for k, v in model.state_dict().items() if "layers.2." in k}
    extra = {**layer, "model.layers.3.eh_proj.weight": torch.ones(32, 64), "model.layers.3.shared_head.head.weight": torch.ones(320, 32),
             "mtp.fc.weight": torch.ones(2, 2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = folder_of(model)
    edit(folder, add=extra)
    with torch.no_grad():
        assert torch.equal(load_model(folder)[0](IDS).logits, model(IDS).logits)
    edit(folder, lose=[k for k in extra if "eh_proj" in k or "shared_head" in k])
    refused(folder, "without a place in the model: 9 parameters (model.layers.3.")  # the same, but an ordinary layer


def test_a_multimodal_checkpoint_is_loaded_whole_or_refused():
    "transformers has a causal model for this configuration, which would drop what sees; here what sees has no weights"
    folder = folder_of(tiny_model("qwen3_5", layers=4))
    inner = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(model_type="qwen3_5", architectures=["Qwen3_5ForConditionalGeneration"], text_config=inner)))
    edit(folder, add={"model.visual.blocks.0.norm.weight": torch.ones(8)})
    refused(folder, "model.visual")


def test_shards():
    folder = folder_of(tiny_model(layers=4), max_shard_size="40KB")
    index, good = folder / "model.safetensors.index.json", (folder / "model.safetensors.index.json").read_text()
    files = json.loads(good)["weight_map"]
    load_model(folder)
    index.write_text(json.dumps(dict(metadata={}, weight_map={k: v for k, v in files.items() if k != UP})))
    refused(folder, "model.safetensors.index.json, that does not name 1 parameter", UP)
    index.write_text(good)
    edit(folder, [UP], file=files[UP])
    refused(folder, "names 1 parameter", UP, "which its files lack")
    (folder / files[UP]).unlink()
    refused(folder, "lacks 1 file", files[UP], "fetch it again")
    index.write_text(good[:50])
    refused(folder, "model.safetensors.index.json, that cannot be read")
    index.unlink()
    refused(folder, "neither model.safetensors nor model.safetensors.index.json")


def test_image_encoders_too():
    model = tiny_vision("vit")
    folder = folder_of(model, tokenizer=False)
    transformers.ViTImageProcessor(size=dict(height=32, width=32)).save_pretrained(folder)
    load_model(folder)
    lost = next(k for k in load_file(folder / "model.safetensors") if "layer.2" in k and "weight" in k)
    edit(folder, [lost])
    refused(folder, "would be random", "layers.2.")


def test_a_gguf_that_lacks_a_tensor():
    folder_of(tiny_model(layers=2))
    write_gguf("whole.gguf")
    write_gguf("lost.gguf", lose="blk.1.ffn_up.weight")
    gguf_folder("whole.gguf")
    with pytest.raises(ReplaceMeError, match="model.layers.1.mlp.up_proj.weight"):
        gguf_folder("lost.gguf")
    with pytest.raises(ReplaceMeError, match="model.layers.1.mlp.up_proj.weight"):
        gguf_folder("lost.gguf")  # nothing was kept that the next call would take


def test_a_gguf_with_biases():
    "transformers' config of a GGUF file knows none, and its reader passes over them in silence"
    d, kv = 32, 16
    shapes = {f"blk.{i}.{k}.bias": (n,) for i in range(2) for k, n in dict(attn_q=d, attn_k=kv, attn_v=kv, attn_output=d, ffn_gate=64, ffn_up=64, ffn_down=d).items()}
    write_gguf("biased.gguf", more=shapes)
    state = load_file(gguf_folder("biased.gguf") / "model.safetensors")
    assert len([k for k in state if k.endswith("bias")]) == len(shapes) and all(v.any() for v in state.values())


@pytest.mark.parametrize("name, n", [("blk.1.attn_q.bias", 32), ("rope_freqs.weight", 4), ("blk.0.attn_q_norm.weight", 8)])
def test_a_gguf_of_which_a_tensor_is_not_read(name, n):
    write_gguf("more.gguf", more={name: (n,)})
    with pytest.raises(ReplaceMeError, match=rf"more.gguf holds 1 tensor \({name}\) that transformers does not read"):
        load_model("more.gguf")


def test_a_gguf_with_the_rotation_of_llama_3():
    "The file holds what the frequencies are divided by, transformers' reader passes over it, and the model would be another"
    config = AutoConfig.for_model("llama", hidden_size=32, num_attention_heads=4, rope_theta=500000.)
    config.rope_parameters = dict(rope_type="llama3", rope_theta=500000., factor=32., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=8192)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    by = 500000. ** (-torch.arange(0, 8, 2) / 8) / scaled
    assert by.min() == 1 and by.max() == 32 and len(by.unique()) > 2
    write_gguf("scaled.gguf", more={"rope_freqs.weight": by.numpy()}, theta=500000.)
    model, _ = load_model("scaled.gguf")
    assert torch.allclose(model.model.rotary_emb.inv_freq, scaled, rtol=1e-5) and model.config.rope_parameters["factor"] == 32


def test_a_gguf_converted_by_an_older_version_is_converted_anew(monkeypatch):
    write_gguf("whole.gguf")
    now = gguf_place("whole.gguf")
    monkeypatch.setattr("replaceme.models._READING", 1)
    assert gguf_place("whole.gguf") != now


def test_a_gguf_is_read_once(monkeypatch):
    "By transformers' config and weights, and by what proves both; a file that was written again is another"
    import gguf

    from replaceme.models import gguf_read_once, read_gguf_model
    read, plain = [], gguf.GGUFReader._build_fields
    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", lambda self, *a: read.append(1) or plain(self, *a))
    write_gguf("whole.gguf")
    model = read_gguf_model(Path("whole.gguf"))
    assert len(read) == 1 and model.config.num_hidden_layers == 2
    with gguf_read_once():
        old = gguf.GGUFReader("whole.gguf")
        Path("whole.gguf").unlink(), write_gguf("whole.gguf", theta=5e5)
        assert gguf.GGUFReader("whole.gguf") is not old and len(read) == 3


def write_gguf(path, lose=None, more=(), theta=None):
    import gguf
    import numpy as np
    n = 2
    w = gguf.GGUFWriter(path, "llama")
    for k, v in dict(context_length=256, embedding_length=32, block_count=n, feed_forward_length=64, head_count=4, head_count_kv=2, vocab_size=320).items():
        getattr(w, f"add_{k}")(v)
    w.add_layer_norm_rms_eps(1e-6), w.add_rope_dimension_count(8)
    if theta:
        w.add_rope_freq_base(theta)
    tokens = sorted(tiny_tokenizer().get_vocab().items(), key=lambda x: x[1])
    w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre("default")
    w.add_token_list([t for t, _ in tokens] + ["ab"] + [f"<x{i}>" for i in range(len(tokens) + 1, 320)])
    w.add_token_types([1] * 320), w.add_token_merges(["a b"])
    w.add_bos_token_id(1), w.add_eos_token_id(2)
    names = dict(attn_q=(32, 32), attn_k=(16, 32), attn_v=(16, 32), attn_output=(32, 32), ffn_gate=(64, 32), ffn_up=(64, 32), ffn_down=(32, 64),
                 attn_norm=(32,), ffn_norm=(32,))
    shapes = {f"blk.{i}.{k}.weight": s for i in range(n) for k, s in names.items()}
    shapes |= {"token_embd.weight": (320, 32), "output.weight": (320, 32), "output_norm.weight": (32,)} | dict(more)
    for k, s in shapes.items():
        if k != lose:
            w.add_tensor(k, np.random.default_rng(0).standard_normal(s).astype(np.float32) if isinstance(s, tuple) else s)
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()


OWN = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

class OwnConfig(PreTrainedConfig):
    model_type = "own_thing"
    def __init__(self, hidden_size=32, vocab_size=320, num_hidden_layers=3, **kw):
        self.hidden_size, self.vocab_size, self.num_hidden_layers = hidden_size, vocab_size, num_hidden_layers
        super().__init__(**kw)

class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.num_hidden_layers)])
        self.register_buffer("inv_freq", 1/10000**(torch.arange(4)/4), persistent=KEPT)
        self.post_init()
    def get_input_embeddings(self): return self.embed
    def forward(self, input_ids=None, **kw):
        h = self.embed(input_ids)
        for l in self.layers: h = h + l(h)
        return CausalLMOutputWithPast(logits=h@self.embed.weight.T*self.inv_freq.sum())
"""


@pytest.mark.parametrize("kept", [False, True])
def test_a_class_that_comes_with_its_checkpoint(kept):
    "Its tables are in no checkpoint, and transformers 5 fills them with whatever the memory held"
    folder = Path(f"own{kept}")
    folder.mkdir()
    (folder / "modeling_own.py").write_text(OWN.replace("KEPT", str(kept)))
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(dict(model_type="own_thing", architectures=["OwnForCausalLM"], auto_map=auto)))
    tiny_tokenizer().save_pretrained(folder)
    weights = {"embed.weight": torch.randn(320, 32)} | {f"layers.{i}.{n}": torch.randn(s) for i in range(3) for n, s in (("weight", (32, 32)), ("bias", (32,)))}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_model(folder, trust_remote_code=True)
    assert torch.equal(model.inv_freq, 1 / 10000 ** (torch.arange(4) / 4))
    refused(folder, "set trust_remote_code to true")
    edit(folder, ["layers.1.bias"])
    refused(folder, "would be random: 1 parameter (layers.1.bias)", trust_remote_code=True)


def test_the_contract_calls_a_checkpoint_that_loses_weights_wrong(monkeypatch):
    import replaceme.contract as c
    model, save = tiny_model(layers=4), c.save_checkpoint

    def forgetful(m, d):
        save(m, d)
        edit(Path(d), ["lm_head.weight"])
    monkeypatch.setattr(c, "save_checkpoint", forgetful)
    with pytest.raises(RuntimeError, match="lm_head.weight"):
        saved_and_loaded(model)
    assert contract(model).outcome == "wrong"


# -- models of another kind


def tiny_config(**kw):
    return transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=320, **kw)


@pytest.mark.parametrize("cls, what", [("LlamaForSequenceClassification", "head would be lost"), ("LlamaForTokenClassification", "head would be lost"),
                                       ("LlamaForQuestionAnswering", "head would be lost"), ("LlamaModel", "without a head that predicts tokens")])
def test_another_head_is_refused(cls, what):
    folder = folder_of(getattr(transformers, cls)(tiny_config(tie_word_embeddings=cls == "LlamaModel")))
    refused(folder, f"is a {cls}", what, "causal language models")
    config(folder, architectures=None)  # then the weights tell
    if cls != "LlamaModel":
        refused(folder, "without a place in the model")
    else:
        load_model(folder)  # its tied embedding is all that the head is


def test_an_encoder_decoder_is_not_cut_to_its_decoder():
    c = transformers.BartConfig(d_model=32, encoder_layers=2, decoder_layers=4, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
                                decoder_ffn_dim=64, vocab_size=320, max_position_embeddings=128)
    folder = folder_of(transformers.BartForConditionalGeneration(c))
    refused(folder, "BartForConditionalGeneration", "its encoder would be cut off")
    config(folder, architectures=None)
    refused(folder, "without a place in the model")
    load_model(folder_of(tiny_model("bart", layers=4), "decoder"))  # one that is a decoder stays one


def test_masked_language_models_and_bare_berts_are_refused():
    c = transformers.BertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=320)
    for cls in transformers.BertModel, transformers.BertForMaskedLM:
        refused(folder_of(cls(c), cls.__name__), f"is a {cls.__name__}")
    load_model(folder_of(tiny_model("bert", layers=4)))


def test_a_folder_of_sentence_transformers_is_refused():
    folder = folder_of(tiny_model(layers=4))
    (folder / "modules.json").write_text(json.dumps([dict(idx=0, name="0", path="", type="sentence_transformers.models.Transformer")]))
    refused(folder, "is an embedding model", "give the language model")


def test_names_of_language_models_that_transformers_does_not_know():
    folder = folder_of(tiny_model(layers=4))
    for name in None, ["LLaMAForCausalLM"], ["MistralForCausalLM"], []:
        config(folder, architectures=name)
        load_model(folder)
    config(folder, architectures=["LlamaForRewardModel"])
    refused(folder, "LlamaForRewardModel", "the head would be lost")


def test_an_image_model_keeps_its_head_or_is_refused():
    processor = transformers.ViTImageProcessor(size=dict(height=32, width=32))
    c = tiny_vision("vit").config
    for cls in "ViTForImageClassification", "ViTModel", "ViTForMaskedImageModeling":
        folder = folder_of(getattr(transformers, cls)(c), cls, tokenizer=False)
        processor.save_pretrained(folder)
        if cls == "ViTForMaskedImageModeling":
            refused(folder, f"is a {cls}", "the head would be lost", "image encoders")
        else:
            assert type(load_model(folder)[0]).__name__ == cls
    two = folder_of(tiny_vision("clip"), "clip", tokenizer=False)
    processor.save_pretrained(two)
    load_model(two)
    config(two, architectures=None)
    load_model(two)


# -- messages


def test_messages_say_what_it_is():
    model = tiny_model(layers=3)
    folder = folder_of(model)
    good = (folder / "config.json").read_text()
    for text, part in ((good[:40], "not readable as JSON"), ("{}", "names no model_type"), (good.replace('"llama"', '"lama"'), "Did you mean 'llama'?"),
                       (good.replace('"hidden_size": 32', '"hidden_size": "x"'), "hidden_size"), (good.replace('"hidden_size": 32', '"hidden_size": 33'), "33")):
        (folder / "config.json").write_text(text)
        refused(folder, part)
    (folder / "config.json").write_text(good)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-64])
    refused(folder, "damaged weights file", "model.safetensors")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(folder, "git lfs pull")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    refused(folder, "model.fp16.safetensors", "neither model.safetensors")
    (folder / "model.fp16.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "pickled ones are not loaded")
    (folder / "pytorch_model.bin").rename(folder / "training_args.bin")
    refused(folder, "fetch the weights")
    refused("nobody/no-such-model", "could not be loaded", "taken for a hub id")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2", "mamba"])  # some of which get an empty one from transformers
def test_a_folder_without_tokenizer(family):
    refused(folder_of(tiny_model(family, layers=3), tokenizer=False), "holds no tokenizer", "(tokenizer.json)")


def test_an_image_model_without_processor():
    refused(folder_of(tiny_vision("clip"), tokenizer=False), "holds no image processor", "preprocessor_config.json")


def test_a_tokenizer_of_another_model():
    refused(folder_of(tiny_model(layers=3, vocab=200)), "tokenizer that does not belong to the model", "ids up to 258", "the 200 rows")
    folder, tok = folder_of(tiny_model(layers=3, vocab=259)), tiny_tokenizer()
    tok.add_special_tokens(dict(pad_token="<filler>"))  # one id more than the embedding has rows: nothing that a text is made of
    tok.save_pretrained(folder)
    assert len(load_model(folder)[1]) == 260
    tok.add_special_tokens(dict(bos_token="<begin>"))
    tok.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    tok.save_pretrained(folder)
    _, warned = said(lambda: load_model(folder))
    assert ["chats cannot be read" in w for w in warned] == [True]


def test_the_folder_one_stands_in_is_a_folder(monkeypatch):
    folder = folder_of(tiny_model(layers=3))
    monkeypatch.chdir(folder)
    assert resolve(".") == "." and load_model(".")[0].config.num_hidden_layers == 3
    monkeypatch.chdir("..")
    with pytest.raises(ReplaceMeError, match="holds no config.json.*Its folder m is one"):
        resolve(".")


# -- checkpoints that are quantised already


@pytest.fixture
def bnb():
    def make(bits):
        folder = folder_of(tiny_model(layers=4, d=64))
        small, tok = load_model(folder, **{f"use_{bits}bit": True})
        return small, folder_of(small, f"q{bits}")
    return make


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bitsandbytes_checkpoint_is_turned_back_and_pruned(bnb, bits):
    small, folder = bnb(bits)
    refused(folder, f"use_4bit is true, but model_path {folder} is quantised already (bitsandbytes {bits} bit): leave it out", use_4bit=True)
    (model, _), warned = said(lambda: load_model(folder))
    assert len(warned) == 1 and f"bitsandbytes {bits} bit" in warned[0] and " MB" in warned[0]
    from bitsandbytes.functional import dequantize_4bit
    for k, p in small.named_parameters():
        ref = p if p.is_floating_point() else dequantize_4bit(p.data, p.quant_state) if bits == 4 else p.CB.float() * p.SCB[:, None] / 127
        assert (model.get_parameter(k) - ref).norm() <= 1e-6 * ref.norm(), k
    (result, path), _ = said(lambda: run(make_config(**keys(folder, layers_to_skip=1))))
    assert "quantization_config" not in json.loads((path / "config.json").read_text()) and result["perplexity"]["after"]["value"] > 1
    again, _ = load_model(path)
    assert all(p.dtype == torch.float32 for p in again.parameters()) and again.config.num_hidden_layers == 3


def test_a_quantised_checkpoint_is_evaluated_as_it_is(bnb):
    small, folder = bnb(4)
    assert getattr(load_model(folder, keep_quantised=True)[0], "is_loaded_in_4bit", False)
    _, warned = said(lambda: evaluate(make_config(EvaluateConfig, **scored(folder))))
    assert warned == []


@pytest.mark.parametrize("q, part", [(dict(quant_method="gptq", bits=4, group_size=128), "gptq 4 bit"), (dict(quant_method="awq", bits=4), "awq 4 bit"),
                                     (dict(quant_method="something_new"), "something_new"), (dict(bits=3), "unnamed method 3 bit")], ids=str)
def test_what_cannot_be_turned_back_is_refused_before_anything_is_measured(q, part):
    folder = folder_of(tiny_model(layers=4))
    config(folder, quantization_config=q)
    refused(folder, "is quantised already", part, "give the checkpoint that it was made from")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_an_fp8_checkpoint_is_turned_back(family):
    model = tiny_model(family, layers=3, d=64)
    folder = folder_of(model)
    state = {}
    for k, v in load_file(folder / "model.safetensors").items():
        if "proj" not in k:
            state[k] = v
            continue
        scale = v.abs().max() / 448
        state[k], state[k + "_scale_inv"] = (v / scale).to(torch.float8_e4m3fn), scale.reshape(1, 1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config(folder, quantization_config=dict(quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic", fmt="e4m3"))
    (back, _), warned = said(lambda: load_model(folder))
    assert len(warned) == 1 and "(fp8)" in warned[0]
    for k, p in back.named_parameters():
        assert p.is_floating_point() and p.element_size() > 1 and (p - model.get_parameter(k)).norm() < .05 * p.norm(), k
    (_, path), _ = said(lambda: run(make_config(**keys(folder, layers_to_skip=1))))
    assert {v.dtype for v in load_file(path / "model.safetensors").values()} == {torch.float32}


# -- adapters


def adapter(model, name="a", base="m", **kw):
    "An adapter folder, with something in it, and what peft's model says"
    from peft import LoraConfig, get_peft_model
    conf = kw.pop("conf", None) or LoraConfig(**dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM") | kw)
    wrapped = get_peft_model(model, conf).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for k, p in wrapped.named_parameters():
            if p.requires_grad:
                p.copy_(p + .2 * torch.randn_like(p))
        ref = wrapped(input_ids=IDS).logits
    wrapped.peft_config["default"].base_model_name_or_path = base
    wrapped.save_pretrained(name)
    return Path(name), ref


@pytest.mark.parametrize("kw", [dict(), dict(modules_to_save=["lm_head"]), dict(use_dora=True), dict(target_modules=["q_proj", "embed_tokens"])], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_is_merged_into_its_base(kw, tied):
    folder_of(tiny_model(layers=4, tie_word_embeddings=tied))
    folder, ref = adapter(tiny_model(layers=4, tie_word_embeddings=tied), **kw)
    model, tok = load_model(folder)
    with torch.no_grad():
        assert (model(input_ids=IDS).logits - ref).norm() < 1e-4 * ref.norm()
    assert not any("lora" in k for k in model.state_dict()) and all(p.requires_grad for p in model.parameters())
    model.save_pretrained("plain"), tok.save_pretrained("plain")
    with torch.no_grad():
        assert torch.equal(load_model("plain")[0](input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_an_adapter_is_pruned_to_a_plain_checkpoint():
    folder_of(tiny_model(layers=4, d=64))
    folder, _ = adapter(tiny_model(layers=4, d=64))
    result, path = run(make_config(**keys(folder, layers_to_skip=1)))
    assert not (path / "adapter_config.json").exists() and load_model(path)[0].config.num_hidden_layers == 3
    run(make_config(**keys(folder, layers_to_skip=1, use_4bit=True, method="lstsq", save_path="four")))
    with torch.no_grad():
        a, b = load_model(folder)[0](input_ids=IDS).logits, load_model(folder, device_map={"": "disk"})[0](input_ids=IDS).logits
    assert torch.equal(a, b)


@pytest.mark.parametrize("conf", [dict(trainable_token_indices=[3, 4, 5]), dict(trainable_token_indices={"embed_tokens": [3, 4], "lm_head": [3, 4]}), None], ids=str)
def test_single_tokens_of_tied_weights_are_changed_in_both(conf):
    "What peft has in the embedding and in the head is in both when it is merged"
    from peft import LoraConfig, TrainableTokensConfig
    alone = TrainableTokensConfig(token_indices=[3, 4, 5], target_modules=["embed_tokens"])
    folder_of(tiny_model(layers=4, tie_word_embeddings=True))
    folder, ref = adapter(tiny_model(layers=4, tie_word_embeddings=True), conf=LoraConfig(r=4, target_modules=["q_proj"], **conf) if conf else alone)
    model, _ = load_model(folder)
    with torch.no_grad():
        assert (model(input_ids=IDS).logits - ref).norm() < 1e-4 * ref.norm()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_is_merged_is_held_to_weights_that_are_tied():
    "As the adapter was trained: single tokens of the one and a matrix beside the other are not what comes out of both alone"
    from peft import LoraConfig
    folder_of(tiny_model(layers=4, tie_word_embeddings=True))
    conf = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], trainable_token_indices=[3, 4])
    folder, _ = adapter(tiny_model(layers=4, tie_word_embeddings=True), conf=conf)
    refused(folder, "is not the same when it is merged")


def test_adapters_of_other_types():
    from peft import IA3Config, PromptTuningConfig
    folder_of(tiny_model(layers=4))
    ia3, ref = adapter(tiny_model(layers=4), "ia3", conf=IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        assert (load_model(ia3)[0](input_ids=IDS).logits - ref).norm() < 1e-4 * ref.norm()
    prompt, _ = adapter(tiny_model(layers=4), "prompt", conf=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    refused(prompt, "adapter of type PROMPT_TUNING", "cannot be merged")


def test_adapters_that_do_not_fit():
    folder_of(tiny_model(layers=4))
    folder, _ = adapter(tiny_model(layers=4), base="nowhere/at-all")
    refused(folder, "is an adapter, and its base nowhere/at-all cannot be had")
    folder, _ = adapter(tiny_model(layers=6), "long")
    refused(folder, "does not fit its base", "layers.4")
    folder, _ = adapter(tiny_model(layers=3), "short")
    refused(folder, "does not fit its base", "layers.3")
    good, _ = adapter(tiny_model(layers=4), "good")
    edit(good, lose=[k for k in load_file(good / "adapter_model.safetensors") if "layers.2" in k and "lora_B" in k], file="adapter_model.safetensors")
    refused(good, "does not fit its base (2 weights", "layers.2")
    (good / "adapter_model.safetensors").unlink()
    refused(good, "without adapter_model.safetensors")
    folder, _ = adapter(tiny_model(layers=4), "reward")
    f = folder / "adapter_config.json"
    f.write_text(f.read_text().replace("CAUSAL_LM", "SEQ_CLS"))
    refused(folder, "another kind of model (task_type SEQ_CLS)")
    shutil.copy("m/model.safetensors", folder), shutil.copy("m/config.json", folder)
    f.write_text(f.read_text().replace("SEQ_CLS", "CAUSAL_LM"))
    refused(folder, "holds a whole model and an adapter")


def test_an_adapter_that_brings_tokens():
    folder_of(tiny_model(layers=4))
    model, tok = tiny_model(layers=4), tiny_tokenizer()
    tok.add_tokens([f"<new{i}>" for i in range(70)])
    model.resize_token_embeddings(len(tok), mean_resizing=False)
    folder, ref = adapter(model, modules_to_save=["embed_tokens", "lm_head"])
    tok.save_pretrained(folder)
    loaded, t = load_model(folder)
    assert len(t) == 329 and loaded.config.vocab_size == 329
    with torch.no_grad():
        assert (loaded(input_ids=IDS).logits - ref).norm() < 1e-4 * ref.norm()


# -- where a model goes, and which of its versions


def test_a_device_map_is_a_mapping_in_yaml_in_json_and_in_python(capsys):
    folder = folder_of(tiny_model(layers=4))
    half = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu",
            "model.layers.2": "disk", "model.layers.3": "disk"}
    model, _ = load_model(folder, device_map=half)
    assert {str(p.device) for p in model.model.layers[3].parameters()} == {"meta"} and str(model.lm_head.weight.device) == "cpu"
    common = ["--model_path", str(folder), "--dataset", "texts.jsonl", "--max_length", "64", "--layers_to_skip", "1", "--eval_dataset", "null", "--prompt", "null", "--borrow", "false"]
    cli.run_replaceme([*common, "--save_path", "one", "--device_map", json.dumps(half)])
    Path("c.yaml").write_text("device_map: {'': cpu}\n")
    cli.run_replaceme([*common, "--save_path", "two", "--config", "c.yaml"])
    a, b = load_file("one/model.safetensors"), load_file("two/model.safetensors")
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    refused(folder, "device_map names 1 module (model.layres.2)", "Did you mean", device_map={"": "cpu", "model.layres.2": "disk"})
    refused(folder, "device_map names 'warp9'", device_map={"": "warp9"})
    refused(folder, "device_map has no place for", "model.embed_tokens.weight", device_map={"lm_head": "cpu"})


def test_max_memory_places_the_model_or_is_refused(capsys):
    folder = folder_of(tiny_model(layers=4))
    model, _ = load_model(folder, device_map="auto", max_memory={"cpu": "100KB"})
    assert any(p.is_meta for p in model.parameters()) and not all(p.is_meta for p in model.parameters())
    refused(folder, "max_memory is {'cpu': '1GB'}, but nothing is placed by it", device_map="cpu", max_memory={"cpu": "1GB"})
    refused(folder, "give a size", device_map="auto", max_memory={"cpu": "lots"})
    with pytest.raises(SystemExit) as e:
        cli.run_replaceme(["--model_path", str(folder), "--layers_to_skip", "1", "--device_map", "cpu", "--max_memory", "{cpu: 1GB}"])
    assert e.value.code == 2 and "nothing is placed by it" in capsys.readouterr().err


def test_a_revision_is_for_the_hub(monkeypatch):
    folder = folder_of(tiny_model(layers=4))
    refused(folder, "revision is 'v1'", "on this machine", revision="v1")
    with pytest.raises(ReplaceMeError, match="revision is 'v1'"):
        run(make_config(**keys(folder, layers_to_skip=1, revision="v1")))
    with pytest.raises(ReplaceMeError, match="both models of compare"):
        evaluate(make_config(EvaluateConfig, **scored(folder) | dict(model_path=None, compare=[str(folder)] * 2, revision="v1")))
    model, tok = load_model(folder)
    with pytest.raises(ReplaceMeError, match="revision means nothing"):
        prune(model, tok, 1, revision="v1")


def test_a_revision_is_the_one_that_is_loaded(tmp_path, monkeypatch):
    "Two commits of one repository in a cache of the hub, as downloading them leaves it"
    repo = tmp_path / "hub/models--me--small"
    for commit, branch, layers in (("a" * 40, "main", 3), ("b" * 40, "v2", 4)):
        folder_of(tiny_model(layers=layers), repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / branch).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "hub"), raising=False)
    assert load_model("me/small")[0].config.num_hidden_layers == 3
    assert load_model("me/small", revision="v2")[0].config.num_hidden_layers == 4
    refused("me/small", "could not be loaded", revision="v3")
