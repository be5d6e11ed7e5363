"""What is written is the same model in transformers 4.57, whose spelling of configs vLLM, SGLang and others read, too.

Two processes see transformers 4: one that writes dense folders, of every family in its own words, and one that loads all that was pruned.
`make transformers4` (which `make test` calls) puts it into a folder of its own; without it these tests skip.
"""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from replaceme.arch import layers_of
from replaceme.blocks import Block
from replaceme.checkpoint import source_folder, spelled
from replaceme.core import cache_dir
from replaceme.merge import cut, differs_when_rebuilt, save_checkpoint
from replaceme.models import load_model, tiny_model, tiny_tokenizer
from replaceme.pipeline import make_config, run

FOUR = cache_dir() / "packages/transformers4"
needs_four = pytest.mark.skipif(not (FOUR / "transformers").is_dir(), reason="no transformers 4: make transformers4")
IDS = torch.randint(3, 259, (2, 96), generator=torch.Generator().manual_seed(0))  # longer than windows and than what positions were made for
TEXT = "The cat <new> sat.\n Äöü 你好"
SIZES = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LONG = dict(type="longrope", short_factor=[1.5] * 4, long_factor=[4.0, 5.0, 6.0, 7.0])
KINDS = ["full_attention", "sliding_attention", "sliding_attention"]
MOE = dict(moe_intermediate_size=16, num_experts_per_tok=2, norm_topk_prob=True)
MLA = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
SPARSE = dict(n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=3, **MOE)

DENSE = {  # in the words of transformers 4
    "llama": dict(rope_theta=5e5, rope_scaling=dict(type="linear", factor=4.0)),
    "llama-llama3": dict(rope_theta=5e5, rope_scaling=LLAMA3, head_dim=16),
    "llama-yarn": dict(rope_theta=3e4, rope_scaling=dict(YARN, beta_fast=16.0)),
    "llama-dynamic": dict(rope_theta=3e4, rope_scaling=dict(type="dynamic", factor=2.0), tie_word_embeddings=True),
    "llama-bfloat16": dict(rope_theta=5e5, dtype="bfloat16"),
    "mistral": dict(rope_theta=1e6, sliding_window=16, head_dim=16),
    "qwen2": dict(rope_theta=1e6, use_sliding_window=True, sliding_window=16, max_window_layers=3),
    "qwen2-yarn": dict(model_type="qwen2", rope_theta=1e6, rope_scaling=dict(YARN)),
    "qwen3": dict(rope_theta=1e6, head_dim=16, tie_word_embeddings=True),
    "gemma": dict(head_dim=16, rope_theta=3e4),
    "gemma2": dict(head_dim=16, rope_theta=3e4, sliding_window=16, query_pre_attn_scalar=16),
    "gemma3_text": dict(head_dim=16, rope_theta=2e6, rope_local_base_freq=5e3, sliding_window=16, query_pre_attn_scalar=16,
                        sliding_window_pattern=3, rope_scaling=dict(rope_type="linear", factor=8.0)),
    "gemma3": dict(image_token_index=302, boi_token_index=300, eoi_token_index=301, mm_tokens_per_image=4,  # it sees, too
                   text_config=dict(SIZES, head_dim=16, rope_theta=2e6, rope_local_base_freq=5e3, sliding_window=16, rope_scaling=dict(rope_type="linear", factor=8.0)),
                   vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)),
    "phi": dict(rope_theta=3e4, partial_rotary_factor=0.5),
    "phi3": dict(rope_theta=3e4, rope_scaling=LONG, original_max_position_embeddings=32),
    "phi3-partial": dict(rope_theta=3e4, partial_rotary_factor=0.5),
    "olmo": dict(rope_theta=3e4, rope_scaling=dict(type="linear", factor=4.0)),
    "olmo2": dict(rope_theta=5e5, rope_scaling=dict(type="linear", factor=4.0)),
    "smollm3": dict(rope_theta=5e6, no_rope_layer_interval=3),
    "cohere": dict(rope_theta=8e6),
    "cohere2": dict(rope_theta=5e4, sliding_window=16, sliding_window_pattern=3),
    "glm": dict(rope_theta=3e4, partial_rotary_factor=0.5, head_dim=16),
    "glm4": dict(rope_theta=3e4, partial_rotary_factor=0.5, head_dim=16),
    "granite": dict(rope_theta=1e7, attention_multiplier=0.3, residual_multiplier=0.2),
    "stablelm": dict(rope_theta=3e4, partial_rotary_factor=0.5),
    "persimmon": dict(rope_theta=3e4, partial_rotary_factor=0.5, num_key_value_heads=4),
    "gpt_neox": dict(rotary_emb_base=3e4, rotary_pct=0.5),
    "starcoder2": dict(rope_theta=1e6, sliding_window=16),
    "falcon_h1": dict(rope_theta=1e11, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=16),
    "exaone4": dict(rope_theta=1e6, sliding_window=16, sliding_window_pattern=3, head_dim=16),
    "helium": dict(rope_theta=3e4, head_dim=8),
    "nemotron": dict(rope_theta=3e4, partial_rotary_factor=0.5, head_dim=8),
    "deepseek_v3": dict(rope_theta=3e4, rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=1.0), **SPARSE, **MLA),
    "glm4_moe": dict(rope_theta=1e6, partial_rotary_factor=0.5, head_dim=16, **SPARSE),
    "mixtral": dict(rope_theta=1e6, num_local_experts=4, num_experts_per_tok=2),
    "phimoe": dict(rope_theta=3e4, num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=4),
    "qwen2_moe": dict(rope_theta=1e6, num_experts=4, shared_expert_intermediate_size=32, mlp_only_layers=[0, 4], **MOE),
    "qwen3_moe": dict(rope_theta=1e7, num_experts=4, head_dim=16, mlp_only_layers=[0, 4], **MOE),
    "qwen3_next": dict(rope_theta=1e7, partial_rotary_factor=0.5, num_experts=4, shared_expert_intermediate_size=32, head_dim=16, full_attention_interval=2,
                       linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, **MOE),
    "gpt_oss": dict(rope_theta=1.5e5, rope_scaling=dict(YARN, truncate=False), head_dim=8, sliding_window=16, num_local_experts=4, num_experts_per_tok=2),
    "granitemoehybrid": dict(num_local_experts=0, shared_intermediate_size=64, layer_types=["mamba", "attention"] * 3, mamba_n_heads=4, mamba_d_head=16,
                             mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16),
}
for _k in ("llama3", "yarn", "dynamic", "bfloat16"):
    DENSE["llama-" + _k]["model_type"] = "llama"
DENSE["phi3-partial"]["model_type"] = "phi3"

WRITE = """
import json, sys, torch, transformers
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
assert transformers.__version__.startswith("4.57")
transformers.logging.set_verbosity_error()
root = Path(sys.argv[1])
ids, out = torch.load(root / "ids.pt"), {}
for name, kw in json.loads((root / "dense.json").read_text()).items():
    torch.manual_seed(0)
    dtype = getattr(torch, kw.pop("dtype", "float32"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**kw), attn_implementation="eager").eval()
    for p in model.parameters():
        if p.ndim < 2: p.data += 0.2 * torch.randn_like(p)
    model = model.to(dtype)
    with torch.no_grad(): out[name] = model(ids).logits
    model.save_pretrained(root / "dense" / name)
torch.save(out, root / "dense.pt")
"""
LOAD = """
import json, sys, torch, transformers
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.57")
transformers.logging.set_verbosity_error()
root = Path(sys.argv[1])
ids, out = torch.load(root / "ids.pt"), {}
for d in sorted(p for p in (root / "pruned").iterdir()):
    try:
        model, info = AutoModelForCausalLM.from_pretrained(d, dtype="auto", output_loading_info=True, attn_implementation="eager")
        with torch.no_grad(): logits = model.eval()(ids).logits
        out[d.name] = dict(logits=logits, wrong=[k for w in ("missing_keys", "unexpected_keys", "mismatched_keys") for k in info[w]], dtype=str(model.dtype))
        if (d / "tokenizer_config.json").exists():
            tok = AutoTokenizer.from_pretrained(d)
            out[d.name].update(tokens=tok(sys.argv[2]).input_ids, special=tok.all_special_tokens, chat=tok.apply_chat_template([dict(role="user", content="hi")], tokenize=False))
    except Exception as e: out[d.name] = dict(error=f"{type(e).__name__}: {e}")
torch.save(out, root / "pruned.pt")
"""


def in_four(script, *args):
    "Run a script where `import transformers` finds version 4"
    env = {**os.environ, "PYTHONPATH": str(FOUR), "HF_HUB_OFFLINE": "1"}
    p = subprocess.run([sys.executable, "-W", "ignore", "-c", script, *map(str, args)], env=env, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-3000:]


def rel(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def pruned_of(model):
    "The model without the first block of its middle whose removal lasts, and without anything in its place"
    n = len(layers_of(model))
    blocks = [Block(2, 3), Block(2, 4), Block(1, 3), Block(1, 4), Block(3, 5)]
    small = [cut(model, [b]) for b in blocks if b.end < n]
    return next(s for s in small if not differs_when_rebuilt(s))


FIVE = {  # folders that transformers 5 has written: nobody has said it in old words
    "five-llama": dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=5e5)), "five-gemma3_text": {}, "five-phi3": dict(rope_parameters=dict(LONG, rope_theta=3e4), original_max_position_embeddings=32), "five-gpt_neox": {},
    "five-qwen3_moe": {}, "five-mixtral": {}, "five-deepseek_v3": {},
    "five-cohere2": {}, "five-persimmon": {}, "five-granitemoehybrid": {}, "five-mamba2": {}, "five-olmo2": dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=5e5)),
}
RUNS = dict(llama="lstsq", gemma3_text="remove", mixtral="lstsq")  # through the door that users take


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "Logits of dense models in 4 and 5, and of the pruned ones in 5, in 4, and in 5 as loaded again"
    root = tmp_path_factory.mktemp("both")
    torch.save(IDS, root / "ids.pt")
    dense = {name: {**({} if "text_config" in kw else SIZES), "model_type": name, **kw} for name, kw in DENSE.items()}
    (root / "dense.json").write_text(json.dumps(dense))
    in_four(WRITE, root)
    four, res = torch.load(root / "dense.pt"), {}
    for name in [*dense, *FIVE]:
        folder = root / "dense" / name
        if name in FIVE:
            tiny_model(name.removeprefix("five-"), layers=6, **FIVE[name]).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager").eval()
        with torch.no_grad():
            small = pruned_of(model)
            res[name] = dict(five=model(IDS).logits, four=four.get(name), pruned=small(IDS).logits)
        save_checkpoint(small, root / "pruned" / name)
    for name, method in RUNS.items():
        tiny_tokenizer().save_pretrained(root / "dense" / name)
        (root / "texts.txt").write_text("The map stands in for the layers that went. " * 40)
        folder = root / "pruned" / ("run-" + name)
        run(make_config(model_path=str(root / "dense" / name), save_path=str(folder), dataset=str(root / "texts.txt"), dataset_size=4, max_length=32, blocks=[[2, 4]],
                        eval_dataset=None, prompt=None, method=method))
        with torch.no_grad():
            res["run-" + name] = dict(pruned=AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits)
    in_four(LOAD, root, TEXT)
    for name, got in torch.load(root / "pruned.pt").items():
        res[name].update(elsewhere=got, folder=root / "pruned" / name)
    return res


@needs_four
@pytest.mark.parametrize("name", [*DENSE, *FIVE, *("run-" + n for n in RUNS)])
def test_a_pruned_folder_is_the_same_model_in_transformers_4(both, name):
    r = both[name]
    dtype = "bfloat16" if "bfloat16" in name else "float32"
    tol = 5e-2 if dtype == "bfloat16" else 1e-4
    assert r.get("four") is None or rel(r["five"], r["four"]) < tol  # the dense one agrees
    assert r["elsewhere"].get("error") is None
    assert r["elsewhere"]["wrong"] == [] and r["elsewhere"]["dtype"] == "torch." + dtype
    assert rel(r["elsewhere"]["logits"], r["pruned"]) < tol
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(r["folder"], dtype="auto", attn_implementation="eager").eval()
        assert rel(again(IDS).logits, r["pruned"]) < tol


@needs_four
@pytest.mark.parametrize("name", RUNS)
def test_the_tokenizer_of_a_pruned_folder_is_the_same_in_transformers_4(both, name):
    r = both["run-" + name]
    tok = AutoTokenizer.from_pretrained(r["folder"])
    assert r["elsewhere"]["tokens"] == tok(TEXT).input_ids
    assert r["elsewhere"]["chat"] == tok.apply_chat_template([dict(role="user", content="hi")], tokenize=False)
    assert r["elsewhere"]["special"] == tok.all_special_tokens


# What stands in the folder, which can be seen without transformers 4

OLD = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=5e5,
           rope_scaling=dict(type="linear", factor=4.0), torch_dtype="float32", transformers_version="4.41.0", use_cache=True, **SIZES)
TOKENIZER = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64, clean_up_tokenization_spaces=False,
                 added_tokens_decoder={str(i): dict(content=t, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
                                       for i, t in enumerate(["<pad>", "<s>", "</s>"])})
STAYS = {"preprocessor_config.json": '{"image_processor_type": "CLIPImageProcessor"}', "processor_config.json": '{"processor_class": "LlavaProcessor"}',
         "video_preprocessor_config.json": "{}", "chat_template.json": '{"chat_template": "{{ messages }}"}', "special_tokens_map.json": '{"bos_token": "<s>"}',
         "added_tokens.json": '{"<pad>": 0}', "LICENSE": "free", "NOTICE.txt": "of whom", "USE_POLICY.md": "be kind", "configuration_own.py": "from .own_helper import A",
         "own_helper.py": "A = 1", "additional_chat_templates/tools.jinja": "{{ tools }}"}
GOES = {"README.md": "theirs", "params.json": '{"n_layers": 6}', "optimizer.pt": "o", "trainer_state.json": "{}", "training_args.bin": "t", "model.gguf": "g",
        "quantize_config.json": "{}", "original/consolidated.00.pth": "w", "onnx/model.onnx": "w", "tokenizer.bin": "w", "stray.py": "import os",
        "pytorch_model.bin.index.json": "{}"}


@pytest.fixture
def old_folder(tmp_path):
    "A folder as it lies on the hub, written before transformers 5, with much beside the weights"
    folder = tmp_path / "dense"
    tiny_model("llama", layers=6, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=5e5)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(dict(OLD, auto_map={"AutoConfig": "configuration_own.Config"})))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=4))
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true, "eos_token_id": [2, 1],    "transformers_version": "4.41.0"}')
    for name, text in {**STAYS, **GOES}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (tmp_path / "texts.txt").write_text("The map stands in for the layers that went. " * 40)
    return folder


def run_on(folder, **kw):
    out = folder.parent / "out"
    run(make_config(model_path=str(folder), save_path=str(out), dataset=str(folder.parent / "texts.txt"), dataset_size=4, max_length=32, blocks=[[2, 4]],
                    method="remove", eval_dataset=None, prompt=None, **kw))
    return out


def test_what_stood_beside_the_weights_stands_beside_the_pruned_ones(old_folder):
    out = run_on(old_folder)
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert set(STAYS) | {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= there
    assert not (set(GOES) - {"README.md"}) & there and (out / "README.md").read_text() != "theirs"
    for name in [*STAYS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]:
        assert (out / name).read_bytes() == (old_folder / name).read_bytes(), name


def test_the_config_says_it_in_both_spellings(old_folder):
    d = json.loads((run_on(old_folder) / "config.json").read_text())
    assert (d["num_hidden_layers"], d["rope_theta"], d["rope_scaling"], d["torch_dtype"]) == (4, 5e5, dict(type="linear", factor=4.0), "float32")
    assert d["dtype"] == "float32" and d["rope_parameters"]["factor"] == 4.0 and d["rope_parameters"]["rope_theta"] == 5e5
    assert (d["hidden_size"], d["head_dim"], d["tie_word_embeddings"]) == (32, 8, False) and "_name_or_path" not in d


def test_in_memory_and_from_the_command_it_is_the_same_folder(old_folder):
    out = run_on(old_folder)
    model, tokenizer = load_model(str(old_folder))
    save_checkpoint(cut(model, [Block(2, 4)]), old_folder.parent / "memory", inputs=tokenizer)
    for f in (old_folder.parent / "memory").rglob("*"):
        assert f.is_dir() or f.read_bytes() == (out / f.relative_to(old_folder.parent / "memory")).read_bytes(), f.name


def test_a_config_that_was_changed_in_memory_is_not_overruled_by_its_source(old_folder):
    model = load_model(str(old_folder))[0]
    model.config.rope_parameters = dict(rope_type="linear", factor=2.0, rope_theta=7e4)
    save_checkpoint(model, old_folder.parent / "memory")
    d = json.loads((old_folder.parent / "memory/config.json").read_text())
    assert (d["rope_theta"], d["rope_scaling"]["factor"], d["rope_parameters"]["rope_theta"]) == (7e4, 2.0, 7e4)


def test_a_tokenizer_that_was_changed_is_saved_in_words_that_transformers_4_has(old_folder):
    model, tokenizer = load_model(str(old_folder))
    tokenizer.add_special_tokens(dict(extra_special_tokens=["<new>"]))
    save_checkpoint(model, old_folder.parent / "memory", inputs=tokenizer)
    d = json.loads((old_folder.parent / "memory/tokenizer_config.json").read_text())
    assert d["tokenizer_class"] == "PreTrainedTokenizerFast" and d["additional_special_tokens"] == ["<new>"] and "extra_special_tokens" not in d
    assert not (old_folder.parent / "memory/added_tokens.json").exists()  # about the tokens that were
    assert (old_folder.parent / "memory/preprocessor_config.json").exists()
    assert AutoTokenizer.from_pretrained(old_folder.parent / "memory")("a<new>").input_ids == tokenizer("a<new>").input_ids


def test_of_a_hub_id_it_is_the_snapshot(old_folder, monkeypatch):
    repo = old_folder.parent / "hub/models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("a" * 40)
    shutil.copytree(old_folder, repo / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(old_folder.parent / "hub"))
    assert source_folder("org/name") == repo / "snapshots" / ("a" * 40) and source_folder("org/other") is None
    model, tokenizer = load_model(str(old_folder))
    for m in (model, model.config):
        m.name_or_path = "org/name"
    save_checkpoint(cut(model, [Block(2, 4)]), old_folder.parent / "memory", inputs=tokenizer)
    for name in [*STAYS, "tokenizer_config.json"]:
        assert (old_folder.parent / "memory" / name).read_bytes() == (old_folder / name).read_bytes(), name


def test_an_image_encoder_keeps_its_processor(tmp_path):
    from transformers import ViTImageProcessor
    from replaceme.models import tiny_vision
    tiny_vision("vit", layers=6).save_pretrained(tmp_path / "dense")
    ViTImageProcessor(size=dict(height=32, width=32)).save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense/preprocessor_config.json"
    path.write_text(path.read_text() + "\n\n")
    model, processor = load_model(str(tmp_path / "dense"))
    save_checkpoint(cut(model, [Block(2, 4)]), tmp_path / "out", inputs=processor)
    assert (tmp_path / "out/preprocessor_config.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kw", [dict(), dict(merge=False)], ids=str)
@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPVisionModelWithProjection", "ViTModel"])
def test_the_card_of_an_image_encoder_loads_the_whole_of_it(tmp_path, monkeypatch, name, kw):
    "With its classifier or projection: what the lines of the card load has every number of the files"
    import numpy as np
    import transformers
    from PIL import Image
    from safetensors.torch import load_file
    from replaceme.pipeline import make_config, run
    monkeypatch.chdir(tmp_path)
    config = (transformers.CLIPVisionConfig if "CLIP" in name else transformers.ViTConfig)(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, image_size=32, patch_size=8)
    getattr(transformers, name)(config).save_pretrained("dense")
    transformers.ViTImageProcessor(size=dict(height=32, width=32)).save_pretrained("dense")
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(f"pictures/{i}.png")
    _, path = run(make_config(model_path="dense", layers_to_skip=2, method="lstsq", dataset="pictures", dataset_size=8, speed=False, save_path="out", **kw))
    lines = (path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    space = {}
    exec(lines.replace("path/to/this/folder", str(path)), space)
    state, files = space["model"].state_dict(), load_file(path / "model.safetensors")
    assert sum(v.numel() for v in files.values()) == sum(v.numel() for k, v in state.items() if "position_ids" not in k)
    assert type(space["model"]).__name__.removeprefix("ReplaceMe") == name


# Layers that are counted but not saved

HEADS = {  # families that count layers of multi-token prediction, by the names they use
    "deepseek_v3": dict(num_mtp_layers=1), "glm4_moe": dict(num_mtp_layers=1), "mellum": dict(num_mtp_layers=1),
    "nemotron_h": dict(num_nextn_predict_layers=1), "qwen3_next": dict(num_nextn_predict_layers=2), "mimo_v2_flash": dict(num_nextn_predict_layers=1),
    "minimax_m2": dict(num_mtp_modules=3, mtp_transformer_layers=1, use_mtp=True), "qwen3_5_text": dict(mtp_num_hidden_layers=1),
    "ernie4_5_moe": dict(num_nextn_predict_layers=1),
}


@pytest.mark.parametrize("family", HEADS)
def test_layers_that_predict_further_tokens_are_not_counted(family, tmp_path):
    model = tiny_model(family, layers=6)
    for k, v in HEADS[family].items():
        setattr(model.config, k, v)
    save_checkpoint(pruned_of(model), tmp_path)
    d = json.loads((tmp_path / "config.json").read_text())
    said = {k: v for k, v in d.items() if re.search("nextn|num_mtp|mtp_num|mtp_transformer|use_mtp|mtp.*types", k)}
    assert said and not any(said.values()), said
    assert all(getattr(model.config, k) == v for k, v in HEADS[family].items())  # of the dense model nothing is changed
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not any(getattr(reloaded.config, k) for k in HEADS[family])


def test_lists_that_speak_of_those_layers_too_lose_them(tmp_path):
    model = tiny_model("llama", layers=6)
    model.config.num_nextn_predict_layers, model.config.kinds_of_layers = 1, ["a", "b", "c", "d", "e", "f", "mtp"]
    save_checkpoint(cut(model, [Block(2, 4)]), tmp_path)
    d = json.loads((tmp_path / "config.json").read_text())
    assert (d["kinds_of_layers"], d["num_nextn_predict_layers"]) == (["a", "b", "e", "f"], 0)


def test_as_many_conversions_of_weights_as_layers_are_all_kept(tmp_path):
    "transformers keeps a list of them on a loaded model: were it cut like a list of layers, experts would be saved under names that nothing else reads"
    tiny_model("phimoe", layers=4).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    small = cut(model, [Block(2, 3)])
    assert len(model._weight_conversions) == 4 == len(small._weight_conversions)


def test_a_pattern_that_no_longer_holds_is_not_said():
    from transformers import Cohere2Config
    raw = dict(model_type="cohere2", sliding_window_pattern=4, num_hidden_layers=8)
    kinds = AutoConfig.for_model(**raw).layer_types
    for keep, says in (([0, 1, 2, 3], 4), ([0, 3, 4, 7], 2), ([0, 3, 4, 5], None)):
        config = Cohere2Config(num_hidden_layers=4, layer_types=[kinds[i] for i in keep], **{k: v for k, v in raw.items() if k != "num_hidden_layers"})
        d = spelled(config, json.loads(config.to_json_string()), raw)
        assert d.get("sliding_window_pattern") == says and d["layer_types"] == config.layer_types
