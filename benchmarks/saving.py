"""How much memory does writing a pruned checkpoint take beside the loaded model?

    python benchmarks/saving.py [llama mixtral]        (both by default, two minutes, 3 GB of memory, 5 GB of disk)

Random models of about a gigabyte in bfloat16, Llama and Mixtral (its experts are fused in memory and taken apart in the
checkpoint), are loaded in a process of their own, in memory or with every layer on the disk. Two layers are removed, every
weight that is in memory is read once, so that no page of it is still to come, and the model is written in files of at most
200 MB: by `save_checkpoint`, and by transformers' `save_pretrained` for comparison. Peak is the resident memory of the process
(the kernel's high-water mark) above what it was right before; the part of it that is not a mapped file, which the kernel could drop at
any time, is sampled from outside every two milliseconds. Both are given as multiples of the largest file. Results are kept in
benchmarks/results/saving.json.
"""
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks/results/saving.json"
BOUND, SIZE = 1.2, "200MB"

SHAPE = dict(hidden_size=1024, num_attention_heads=8, num_key_value_heads=4, vocab_size=16_000, max_position_embeddings=512)
MODELS = dict(llama=dict(SHAPE, intermediate_size=4096, num_hidden_layers=28),
              mixtral=dict(SHAPE, intermediate_size=1024, num_local_experts=8, num_hidden_layers=18))
CASES = [(where, saver) for where in ("memory", "disk") for saver in ("save_checkpoint", "save_pretrained")]


def build(kind, folder):
    "A random model of the family, saved"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind]), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=SIZE)


def memory(pid="self"):
    "Fields of /proc/PID/status in MB: resident, of it anonymous, and the high-water mark"
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return [int(lines[k].split()[0]) * 1024 / 1e6 for k in ("VmRSS", "RssAnon", "VmHWM")]


def load(folder, where):
    "The pruned model, everything that is in memory read once, the dense model gone"
    import torch
    from transformers import AutoModelForCausalLM

    from replaceme.blocks import Block
    from replaceme.merge import replace_block
    n = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    places = {**{k: "cpu" for k in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")},
              **{f"model.layers.{i}": "disk" for i in range(n)}}
    kw = dict(device_map=places, offload_folder=str(folder / "offload")) if where == "disk" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **kw).eval()
    map_ = torch.eye(model.config.hidden_size, dtype=torch.float64) * 1.01
    small = replace_block(model, Block(n // 2, n // 2 + 2), map_)
    with torch.no_grad():
        small(torch.arange(16)[None])
        for p in small.parameters():
            p.is_meta or p.sum()
    del model
    gc.collect()
    return small


def child(folder, where, saver):
    "Load, save, and tell when and from what memory on"
    import ctypes
    warnings.simplefilter("ignore")
    from replaceme.merge import save_checkpoint
    small = load(Path(folder), where)
    ctypes.CDLL(None).malloc_trim(0)  # what is free in the heap would hide new memory
    with tempfile.TemporaryDirectory(dir=folder) as out:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
        before, start = memory(), time.monotonic()
        save_checkpoint(small, out, SIZE) if saver == "save_checkpoint" else small.save_pretrained(out, max_shard_size=SIZE)
        stop, peak = time.monotonic(), memory()[2]
        files = [f.stat().st_size / 1e6 for f in Path(out).glob("*.safetensors")]
    print(json.dumps(dict(start=start, stop=stop, anonymous=before[1], peak=peak - before[0], loaded=before[0], files=files)))


def watched(*args):
    "Run `child` and look at its memory from outside; its own threads stand still while a file is written"
    p = subprocess.Popen([sys.executable, __file__, "child", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said, seen = [], []
    reader = threading.Thread(target=lambda: said.extend(p.communicate()))
    reader.start()
    while reader.is_alive():
        try:
            seen.append((time.monotonic(), memory(p.pid)[1]))
        except (OSError, KeyError, ValueError):
            pass  # it is not there yet, or not any more
        time.sleep(0.002)
    if p.returncode:
        raise RuntimeError(said[1][-3000:])
    res = json.loads(said[0].splitlines()[-1])
    inside = [x - res["anonymous"] for t, x in seen if res["start"] <= t <= res["stop"]]
    return dict(shards=len(res["files"]), largest=max(res["files"]), loaded=res["loaded"], peak=res["peak"], anonymous=max(inside), samples=len(inside))


def measure(kind, folder):
    "All cases of one model"
    subprocess.run([sys.executable, __file__, "build", kind, folder], check=True, stderr=subprocess.DEVNULL)
    for where, saver in CASES:
        r = dict(model=kind, weights=where, saver=saver, **watched(folder, where, saver))
        r.update(ratio=r["peak"] / r["largest"], anonymous_ratio=r["anonymous"] / r["largest"])
        print(f"{kind:8} {where:7} {saver:16} {r['loaded']:7.0f} {r['shards']:7} {r['largest']:8.0f} {r['peak']:8.0f} {r['ratio']:7.2f} "
              f"{r['anonymous']:10.0f} {r['anonymous_ratio']:7.2f}")
        yield r


def main(kinds):
    print(f"{'model':8} {'weights':7} {'saved by':16} {'loaded':>7} {'shards':>7} {'largest':>8} {'peak':>8} {'ratio':>7} {'anonymous':>10} {'ratio':>7}   (MB)")
    rows = []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as d:
            rows += measure(kind, d)
    held = max(r["ratio"] for r in rows if r["saver"] == "save_checkpoint")
    print(f"save_checkpoint needs at most {held:.2f} times the largest file above the loaded model; the bound is {BOUND}")
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(dict(bound=BOUND, max_shard_size=SIZE, largest_ratio=held, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    command, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    {"build": build, "child": child}[command](*rest) if command in ("build", "child") else main(sys.argv[1:] or list(MODELS))
