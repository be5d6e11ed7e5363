"""What a run costs, by the code behind `--dry-run`: a table for large models, and a check against runs on this machine.

    python benchmarks/cost.py                (the table: shapes alone, no weights, a minute)
    python benchmarks/cost.py --measure [74M 162M 323M lstsq auto]    (Llama-shaped random models, one thread, 15 minutes)

Both are kept in benchmarks/results/cost.json. Speeds of the accelerators are their makers' peaks: nothing runs at its peak,
so that the seconds are the least there can be. The check predicts from a trial of the machine's speed, made in a process of
its own, and then runs the same configuration in another one; both count the seconds of the processor, since the machine may
be shared, and memory above what Python and its libraries take.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks/results/cost.json"
MEASURED = "--child" in sys.argv
if MEASURED:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig  # noqa: E402

from replaceme import pipeline  # noqa: E402
from replaceme.config import make_config  # noqa: E402
from replaceme.core import Stages, peak_memory, reset_peak_memory, resident_memory  # noqa: E402
from replaceme.cost import Headers, Speed, cost_of, dry_run, empty_model  # noqa: E402
from replaceme.models import tiny_tokenizer  # noqa: E402

# peaks in 16 bits and float64, and bytes a second: the makers' data sheets (T4; A100 SXM 80 GB and H100 SXM with tensor cores
# in float64 as well). Files come at 2 GB/s. Eigendecompositions are taken to run at a tenth of the products of float64.
PEAKS = dict(T4=(65e12, 0.254e12, 320e9, 16e9), A100=(312e12, 19.5e12, 2039e9, 80e9), H100=(989e12, 67e12, 3350e9, 80e9))
FILES = 2e9
GPUS = {k: Speed(k, flops, flops, double, double / 10, memory, FILES) for k, (flops, double, memory, _) in PEAKS.items()}

LLAMA = dict(model_type="llama", dtype="bfloat16", vocab_size=128256, max_position_embeddings=8192, num_key_value_heads=8)
SHAPES = {
    "Llama-3-8B": dict(LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "Llama-3-70B": dict(LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "Mixtral-8x7B": dict(model_type="mixtral", dtype="bfloat16", vocab_size=32000, hidden_size=4096, intermediate_size=14336,
                         num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, num_local_experts=8,
                         num_experts_per_tok=2, max_position_embeddings=32768)}
TEXTS = dict(dataset="Open-Orca/SlimOrca", dataset_size=1000, max_length=1024, batch_size=8, eval_dataset="Salesforce/wikitext",
             eval_size=24, eval_length=1024, prompt=None)


def table():
    "A quarter of the layers, by the paper's closed form and by auto, 1000 texts of 1024 tokens"
    rows = []
    for name, shape in SHAPES.items():
        config = AutoConfig.for_model(**shape)
        h = Headers(empty_model(AutoModelForCausalLM, config))
        for method in "lstsq", "auto":
            cfg = make_config(model_path=name, method=method, layers_to_skip=shape["num_hidden_layers"] // 4, **TEXTS)
            costs = {g: cost_of(cfg, h, s, free=PEAKS[g][3]) for g, s in GPUS.items()}
            row = dict(costs["H100"].record(), method=method, layers=shape["num_hidden_layers"])
            row["seconds"] = {g: {k: [round(x, 2) for x in v] for k, v in c.by_stage().items()} for g, c in costs.items()}
            row["peaks"] = {g: dict(bytes=c.peak, moment=c.moment, fits=c.fits) for g, c in costs.items()}
            rows.append(row)
            total = "; ".join(f"{g} {sum(a for a, _ in v.values()):.0f} to {sum(b for _, b in v.values()):.0f} s" for g, v in row["seconds"].items())
            print(f"{name:14} {method:6} read {row['read']/1e9:.1f} GB, {row['flops']:.2e} flops, {row['double']:.2e} in float64, "
                  f"peak {row['peak']/1e9:.1f} GB ({row['moment']}); {total}", flush=True)
    return rows


SIZES = {"74M": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8),
         "162M": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=12),
         "323M": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=20, num_attention_heads=16)}


def build(folder, size):
    "A Llama of random weights in float32, with a tokenizer of bytes"
    torch.manual_seed(0)
    heads = size["num_attention_heads"]
    config = LlamaConfig(**size, vocab_size=32000, num_key_value_heads=heads // 2, max_position_embeddings=2048, tie_word_embeddings=False,
                         pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def setting(folder, method):
    "Four candidates, so that few can drop out while the texts are read: what they add is known"
    layers = json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"]
    n = layers // 4
    return make_config(model_path=str(folder), method=method, layers_to_skip=n, min_distance_layer=layers - n - 3, dataset="python-docs",
                       dataset_size=32, max_length=256, batch_size=8, eval_dataset=str(Path(folder) / "text.txt"), eval_size=6, eval_length=256,
                       prompt=None, save_path=str(Path(folder) / f"pruned-{method}"))


class Processor(Stages):
    "Seconds of the processor by stage"
    from contextlib import contextmanager

    @contextmanager
    def __call__(self, name):
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.) + time.process_time() - start


def child(what, folder, method):
    "In a process of its own: predict, or run"
    torch.set_num_threads(1)
    if what == "build":
        return build(folder, SIZES[method])
    cfg = setting(folder, method)
    if what == "predict":
        cost = dry_run(cfg, clock=time.process_time)
        print(json.dumps(dict(stages=cost.by_stage(), peak=cost.peak, moment=cost.moment, speed=vars(cost.speed),
                              moments={m: sum(v.values()) for m, v in cost.held.items()})))
        return
    pipeline.Stages = Processor
    warm = torch.ones(8, 8) @ torch.ones(8, 8)
    assert warm.sum() > 0
    baseline = resident_memory()
    reset_peak_memory()
    start = time.process_time()
    result, _ = pipeline.run(cfg)
    whole = time.process_time() - start
    print(json.dumps(dict(stages=result.seconds, whole=whole, peak=peak_memory() - baseline, baseline=baseline)))


def asked(*words):
    out = subprocess.run([sys.executable, __file__, "--child", *map(str, words)], capture_output=True, text=True)
    if out.returncode:
        raise SystemExit(out.stderr)
    return out.stdout


def compared(size, method, folder):
    "Predicted and measured"
    said, was = (json.loads(asked(w, folder, method).splitlines()[-1]) for w in ("predict", "run"))
    stages = {k: dict(predicted=said["stages"].get(k, (0, 0)), measured=v) for k, v in was["stages"].items()}
    low, high = (sum(v[i] for v in said["stages"].values()) for i in (0, 1))
    total = sum(was["stages"].values())
    row = dict(size=size, method=method, stages=stages, predicted=[low, high], measured=total, whole=was["whole"], speed=said["speed"],
               ratio=(low + high) / 2 / total, peak=dict(predicted=said["peak"], moment=said["moment"], measured=was["peak"],
                                                         ratio=said["peak"] / was["peak"], baseline=was["baseline"]))
    print(f"{size} {method}: predicted {low:.1f} to {high:.1f} s, measured {total:.1f} s of the processor (with report and imports {was['whole']:.1f}), "
          f"ratio {row['ratio']:.2f}; peak predicted {said['peak']/1e6:.0f} MB ({said['moment']}), measured {was['peak']/1e6:.0f} MB, "
          f"ratio {row['peak']['ratio']:.2f}")
    for k, v in stages.items():
        print(f"    {k:10} {v['predicted'][0]:7.2f} to {v['predicted'][1]:7.2f}   {v['measured']:7.2f}")
    print("    moments (MB):", {k: round(v / 1e6) for k, v in said["moments"].items()}, flush=True)
    return row


def measure(sizes=tuple(SIZES), methods=("lstsq", "auto")):
    "Each size in a folder of its own"
    rows = []
    text = "The quick brown fox jumps over the lazy dog, and a map stands in for the layers that went. " * 40
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            asked("build", folder, size)
            (Path(folder) / "text.txt").write_text(text)
            for method in methods:
                rows.append(compared(size, method, folder))
                keep(rows[-1])
    return rows


def keep(row):
    "One row in the place of that of the same size and method"
    kept = json.loads(OUT.read_text()) if OUT.exists() else {}
    others = [r for r in kept.get("measured", []) if (r["size"], r["method"]) != (row["size"], row["method"])]
    order = [(s, m) for m in ("lstsq", "auto") for s in SIZES]
    kept["measured"] = sorted([*others, row], key=lambda r: order.index((r["size"], r["method"])))
    OUT.write_text(json.dumps(kept, indent=1) + "\n")


def main():
    words = [a for a in sys.argv[1:] if not a.startswith("--")]
    if MEASURED:
        return child(*words)
    kept = json.loads(OUT.read_text()) if OUT.exists() else {}
    if "--measure" in sys.argv:
        sizes, methods = ([w for w in words if w in known] for known in (SIZES, ("lstsq", "auto")))
        measure(sizes or SIZES, methods or ("lstsq", "auto"))
        return
    kept["table"] = table()
    kept["peaks"] = {k: dict(zip(("flops", "double", "memory", "holds"), v)) for k, v in PEAKS.items()}
    OUT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
