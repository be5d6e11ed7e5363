"""What do minutes of training bring after the pruning, on each kind of text, and when is it time to stop?

    python benchmarks/recovery.py [RUNG:TOKENS ...]      (cut:62000 lora:62000 lora:250000 lora:500000 by default; after `make data`; two hours on two cores)

SmolLM2-135M-Instruct in float32 loses 6 of its 30 layers by `auto`, calibrated on 124 texts of 512 tokens that it wrote itself; each training starts from that model
and sees these same texts again and again, with the dense model as the teacher. Judged by the five kinds of text of domains.yaml, 12 pieces each: nats a token above
the dense model, 95% by a paired bootstrap over pieces, and minutes of this machine. Results are kept in benchmarks/results/recovery.json, row by row.
"""
import dataclasses
import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
OUT, TEXTS = ROOT / "benchmarks/results/recovery.json", 124
RUNS = "cut:62000", "lora:62000", "lora:250000", "lora:500000"


def row(name, model, dense, pieces, names, **more):
    "What a model loses on each kind of text"
    from replaceme.domains import compare_domains
    from replaceme.evaluate import all_losses
    kinds = compare_domains(dense, all_losses(model, pieces.split(4)), names)
    print(name, {k: v for k, v in more.items() if k != "history"}, *(f"{d.text} {d.above[0]:+.3f}" for d in kinds), sep=" | ", flush=True)
    return dict(name=name, **more, domains=[dataclasses.asdict(d) for d in kinds])


def main(*runs):
    import torch
    import yaml

    from replaceme import load_model, prune
    from replaceme.config import make_config
    from replaceme.core import ReplaceMeWarning
    from replaceme.data import batches, load_texts
    from replaceme.evaluate import all_losses
    from replaceme.feed import eval_text, judged_names
    from replaceme.recover import recover
    warnings.simplefilter("ignore", ReplaceMeWarning)
    said = yaml.safe_load((ROOT / "benchmarks/domains.yaml").read_text())
    judge = {k: said[k] for k in ("eval_dataset", "eval_size", "eval_length")}
    model, tokenizer = load_model(said["model_path"])
    pieces, names = eval_text(make_config(model_path=said["model_path"], layers_to_skip=6, **judge), tokenizer, model), judged_names(judge["eval_dataset"])
    dense = all_losses(model, pieces.split(4))
    texts = batches(load_texts("self", tokenizer=tokenizer, model=model, size=TEXTS, max_length=said["max_length"]), tokenizer, 4, said["max_length"])
    start = time.perf_counter()
    pruned, result = prune(model, tokenizer, 6, dataset="self", dataset_size=TEXTS, max_length=said["max_length"], batch_size=said["batch_size"])
    rows = [row("auto", pruned, dense, pieces, names, tokens=0, minutes=(time.perf_counter() - start) / 60)]
    facts = dict(threads=torch.get_num_threads(), block=list(result.block), texts=TEXTS)
    for rung, tokens in (r.split(":") for r in runs):
        start = time.perf_counter()
        small, (climbed,) = recover(model, pruned, [result.block], texts, [rung], int(tokens))
        more = dict(tokens=climbed.trained, minutes=(time.perf_counter() - start) / 60, parameters=climbed.parameters, history=climbed.history)
        rows.append(row(rung, small, dense, pieces, names, **more))
        OUT.write_text(json.dumps(dict(**facts, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:] or RUNS)
