"""What does training behind the pruning bring on each kind of text, and does it take more passes or more text?

    python benchmarks/recovery.py [RUNG:TOKENS:TEXTS ...]     (lora:500000:self lora:250000:broad by default; after `make data`; two hours on two cores)

SmolLM2-135M-Instruct in float32 loses 6 of its 30 layers by `auto`, calibrated on 124 texts of 512 tokens that it wrote itself; each training starts from that model,
with the dense one as its teacher. TEXTS is `self`, those 124 texts again and again, or `broad`: of them, of chats, problems and code a fifth each, as far as there are
so many, and wikitext2, as much as it takes that nothing is seen twice; of the documentation there is nothing. Judged by the five kinds of text of domains.yaml, 12 pieces each: nats a token above the dense
model, 95% by a paired bootstrap over pieces. Rows are written to benchmarks/results/recovery.json one by one; a row of the same training is replaced.
"""
import dataclasses
import json
import os
import random
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
OUT, TEXTS = ROOT / "benchmarks/results/recovery.json", 124
RUNS = "lora:500000:self", "lora:250000:broad"


def training_texts(texts, n, model, tokenizer, length):
    "The model's own texts, alone or among real ones, `n` in all"
    from data import DATA
    from replaceme.data import load_texts

    def of(dataset, size=None):
        return list(load_texts(dataset, tokenizer=tokenizer, model=model, size=size, max_length=length))
    own, draw = of("self", TEXTS), random.Random(0)
    if texts == "self":
        return own
    few = [{"path": str(DATA / f"domains/{k}_calib.jsonl"), "pack": True} for k in ("chat", "math")] + [str(DATA / "domains/code_calib.txt")]
    rows = [t for part in [own, *map(of, few)] for t in draw.sample(part, min(len(part), n // 5))]
    rows += draw.sample(of(str(DATA / "wikitext2_valid.txt")), n - len(rows))
    draw.shuffle(rows)
    return rows


def row(name, model, dense, pieces, names, **more):
    "What a model loses on each kind of text"
    from replaceme.domains import compare_domains
    from replaceme.evaluate import all_losses
    kinds = compare_domains(dense, all_losses(model, pieces.split(4)), names)
    print(name, *(f"{d.text} {d.above[0]:+.3f}" for d in kinds), sep=" | ", flush=True)
    return dict(name=name, **more, domains=[dataclasses.asdict(d) for d in kinds])


def keep(facts, new):
    "A row beside those of other trainings"
    rows = json.loads(OUT.read_text())["rows"] if OUT.exists() else []
    OUT.write_text(json.dumps(dict(**facts, rows=[r for r in rows if r["name"] != new["name"]] + [new]), indent=1) + "\n")


def main(*runs):
    import torch
    import yaml

    from replaceme import load_model, prune
    from replaceme.config import make_config
    from replaceme.core import ReplaceMeWarning
    from replaceme.data import batches
    from replaceme.evaluate import all_losses
    from replaceme.feed import eval_text, judged_names
    from replaceme.recover import recover
    from replaceme.train import TextRows, split_texts
    warnings.simplefilter("ignore", ReplaceMeWarning)
    said = yaml.safe_load((ROOT / "benchmarks/domains.yaml").read_text())
    judge = {k: said[k] for k in ("eval_dataset", "eval_size", "eval_length")}
    model, tokenizer = load_model(said["model_path"])
    pieces, names = eval_text(make_config(model_path=said["model_path"], layers_to_skip=6, **judge), tokenizer, model), judged_names(judge["eval_dataset"])
    dense, length = all_losses(model, pieces.split(4)), said["max_length"]
    pruned, result = prune(model, tokenizer, 6, dataset="self", dataset_size=TEXTS, max_length=length, batch_size=said["batch_size"])
    facts = dict(threads=torch.get_num_threads(), block=list(result.block), texts=TEXTS, pieces=said["eval_size"])
    keep(facts, row("auto", pruned, dense, pieces, names, tokens=0, distinct=0))
    for rung, tokens, texts in (r.split(":") for r in runs):
        rows = training_texts(texts, -(-int(tokens) * 16 // 15 // length), model, tokenizer, length)  # a sixteenth is held out
        learn, held = split_texts(batches(rows, tokenizer, 4, length))
        start = time.perf_counter()
        small, (climbed,) = recover(model, pruned, [result.block], learn, [rung], int(tokens), held)
        more = dict(tokens=climbed.trained, distinct=min(climbed.trained, TextRows(learn).tokens), minutes=(time.perf_counter() - start) / 60,
                    parameters=climbed.parameters, history=climbed.history)
        keep(facts, row(f"{rung}, {texts}", small, dense, pieces, names, **more))


if __name__ == "__main__":
    main(*sys.argv[1:] or RUNS)
