"""A model whose layers stay on the disk, beside the same in memory: peak memory, and seconds a token, over sizes of a chunk.

    python benchmarks/streamed.py [--gb 1] [--texts 16] [--length 128] [--chunks 512 2048] [--limit 1] [--offload] [--cgroup] [--save]

Makes a Llama of random weights of about GB gigabytes in bfloat16, one file a layer, and prunes it by least squares (`run`; nothing is scored,
the last five candidates, a ridge since the tokens are few), each time in a process of its own: in memory, with --offload through accelerate's
offload to the disk, and layer by layer with each size of a chunk. A layer by layer run ends with an error once it holds more than LIMIT GB.
A thread looks into /proc/self/status every 20 ms: `anon` is what the process holds, `file` is pages of mapped files, which the system takes back
when it needs them (the libraries are among them, and of a model in memory its weights), `high` is VmHWM, the most of both. With --cgroup (Linux, as root)
all runs but the one in memory share the limit, LIMIT GB with the pages of files: the kernel takes back what is more, so weights that are read again come from
the disk again, and kills what cannot be taken back. One thread computes;
what else runs on the machine changes the seconds, so the load average stands beside them. --save keeps the table as benchmarks/results/streamed.json.
"""
import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from math import prod
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
D, F, HEADS, KV, VOCAB, SKIP = 1536, 4096, 12, 4, 4096, 4


def shapes(i):
    "Names and shapes of a layer"
    m = dict(q_proj=(D, D), k_proj=(KV * D // HEADS, D), v_proj=(KV * D // HEADS, D), o_proj=(D, D))
    out = {f"self_attn.{k}": s for k, s in m.items()}
    out |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F), "input_layernorm": (D,), "post_attention_layernorm": (D,)}
    return {f"model.layers.{i}.{k}.weight": s for k, s in out.items()}


def make(folder, gb):
    "The checkpoint, written file by file; returns the number of its layers and the bytes of its weights"
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig
    from replaceme.models import tiny_tokenizer
    size = lambda s: 2 * prod(s)
    layers = max(SKIP + 3, round((gb * 1e9 - 4 * VOCAB * D) / sum(map(size, shapes(0).values()))))
    parts = [shapes(i) for i in range(layers)] + [{"model.embed_tokens.weight": (VOCAB, D), "lm_head.weight": (VOCAB, D), "model.norm.weight": (D,)}]
    gen, places, total = torch.Generator().manual_seed(0), {}, 0
    for j, part in enumerate(parts):
        name = f"model-{j+1:05}-of-{len(parts):05}.safetensors"
        draw = lambda s: torch.ones(s) if len(s) == 1 else torch.randn(s, generator=gen) * (1. if s[0] == VOCAB else .7 * s[1] ** -.5)
        save_file({k: draw(s).bfloat16() for k, s in part.items()}, str(folder / name), metadata=dict(format="pt"))
        places |= dict.fromkeys(part, name)
        total += sum(map(size, part.values()))
    LlamaConfig(hidden_size=D, intermediate_size=F, num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=KV, vocab_size=VOCAB,
                max_position_embeddings=4096, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata=dict(total_size=total), weight_map=places)))
    tiny_tokenizer().save_pretrained(folder)
    return layers, total


class Watch(threading.Thread):
    "Peaks of this process"
    def __init__(self, limit=0):
        super().__init__(daemon=True)
        self.limit = limit or float("inf")
        self.peak, self.going = dict(RssAnon=0, RssFile=0, VmHWM=0), True

    def look(self):
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        for k in self.peak:
            self.peak[k] = max(self.peak[k], int(lines[k].split()[0]) * 1024)

    def run(self):
        while self.going:
            self.look()
            if self.peak["RssAnon"] > 1e9 * self.limit:
                print(f"more than {self.limit} GB were held", file=sys.stderr)
                os._exit(1)
            time.sleep(.02)


def child(keys, limit, out):
    "One run"
    import torch
    from replaceme.pipeline import make_config, run
    torch.set_num_threads(1)
    watch = Watch(limit)
    watch.look()
    start = dict(watch.peak)
    watch.start()
    begin = time.perf_counter()
    result, _ = run(make_config(**keys))
    seconds = time.perf_counter() - begin
    watch.going = False
    Path(out).write_text(json.dumps(dict(peak=watch.peak, start=start, seconds=seconds, stages=result["seconds"], block=result["block"],
                                         error=result["fit"]["error"], tokens=result["calibration"]["tokens"])))


GROUP = Path("/sys/fs/cgroup/memory/replaceme")


@contextlib.contextmanager
def confined(limit, files):
    "A function that puts a process into a group that may hold LIMIT GB, pages of files with it; none of the files is in memory at the start"
    if not limit:
        yield None
        return
    for f in files:
        with open(f, "rb") as o:
            os.posix_fadvise(o.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    GROUP.mkdir()
    try:
        (GROUP / "memory.limit_in_bytes").write_text(str(int(limit * 1e9)))
        yield lambda: (GROUP / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        GROUP.rmdir()


def launched(tmp, keys, limit=0, enter=None):
    out, env = tmp / "out.json", {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed is given back
    cmd = [sys.executable, __file__, "--child", json.dumps(keys), "--limit", str(limit), "--out", str(out)]
    done = subprocess.run(cmd, env=env, capture_output=True, text=True, preexec_fn=enter)
    if done.returncode:
        sys.exit(done.stderr[-3000:] or f"ended with {done.returncode}")
    return json.loads(out.read_text())


def same(a, b):
    "The largest difference between the weights of two folders, over the largest weight"
    from safetensors import safe_open
    def where(folder):
        files = sorted(folder.glob("*.safetensors"))
        return {k: f for f in files for k in safe_open(f, "pt").keys()}
    ours, theirs = where(a), where(b)
    assert set(ours) == set(theirs)
    off = 0.
    for k, f in ours.items():
        with safe_open(f, "pt") as x, safe_open(theirs[k], "pt") as y:
            p, q = x.get_tensor(k), y.get_tensor(k)
            off = max(off, ((p.float() - q.float()).abs().max() / p.float().abs().max()).item())
    return off


def main(a):
    with tempfile.TemporaryDirectory(dir=a.tmp) as tmp:
        tmp = Path(tmp)
        (tmp / "dense").mkdir()
        layers, total = make(tmp / "dense", a.gb)
        words = [json.dumps(dict(text=f"{i} " + "a stream of layers and of tokens " * (a.length // 8))) for i in range(a.texts)]
        (tmp / "t.jsonl").write_text("\n".join(words))
        base = dict(model_path=str(tmp / "dense"), layers_to_skip=SKIP, method="lstsq", dataset=str(tmp / "t.jsonl"), dataset_size=a.texts,
                    max_length=a.length, batch_size=a.batch, ridge=.1, min_distance_layer=max(1, layers - SKIP - 4), eval_dataset=None, prompt=None, speed=False)
        print(f"{total/1e9:.2f} GB of weights in {layers} layers of {sum(2 * prod(s) for s in shapes(0).values())/1e6:.0f} MB; "
              f"{a.texts} texts of {a.length} tokens, {a.batch} at a time; load average {os.getloadavg()[0]:.1f}")
        kinds = [("in memory", {}, 0)]
        if a.offload:
            places = {f"model.layers.{i}": "disk" for i in range(layers)} | dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
            kinds += [("accelerate's offload", dict(device_map=places), a.limit if a.cgroup else 0)]
        kinds += [(f"layer by layer, {n} tokens", dict(stream_weights=True, stream_tokens=n), a.limit) for n in a.chunks]
        rows, kept, ref = [], [], None
        head = ["", "anon MB", "of it before", "file MB", "high MB", "calibrate s", "ms a token", "ratio", "whole run s", "block", "weights differ by"]
        for name, keys, limit in kinds:
            place = tmp / f"out{len(rows)}"
            with confined(limit if a.cgroup else 0, (tmp / "dense").glob("*.safetensors")) as enter:
                r = launched(tmp, {**base, **keys, "save_path": str(place)}, limit, enter)
            ref, mb = ref or r, lambda k: f"{r['peak'][k]/1e6:.0f}"
            spent, off = r["stages"]["calibrate"], same(tmp / "out0", place)
            rows.append([name, mb("RssAnon"), f"{r['start']['RssAnon']/1e6:.0f}", mb("RssFile"), mb("VmHWM"), f"{spent:.1f}", f"{1e3*spent/r['tokens']:.1f}",
                         f"{spent/ref['stages']['calibrate']:.2f}", f"{r['seconds']:.1f}", str(r["block"]), f"{off:.1e}"])
            kept.append(dict(name=name, limit=limit or None, peak=r["peak"], before=r["start"], seconds=spent, of_memory=spent / ref["stages"]["calibrate"], per_token=spent / r["tokens"],
                             block=r["block"], weights=off))
            print(" | ".join(head if len(rows) == 1 else []), " | ".join(rows[-1]), sep="\n" if len(rows) == 1 else "", flush=True)
            print("   stages:", {k: round(v, 1) for k, v in r["stages"].items()}, flush=True)
        if a.save:
            about = dict(bytes=total, layers=layers, texts=a.texts, length=a.length, batch=a.batch, limit=a.limit, cgroup=a.cgroup, rows=kept)
            (Path(__file__).parent / "results/streamed.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gb", type=float, default=1.)
    p.add_argument("--texts", type=int, default=16)
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--chunks", type=int, nargs="+", default=[512, 2048])
    p.add_argument("--limit", type=float, default=1.)
    p.add_argument("--offload", action="store_true")
    p.add_argument("--cgroup", action="store_true")
    p.add_argument("--save", action="store_true")
    p.add_argument("--tmp", default=None, help="folder for the model and what is made of it")
    p.add_argument("--child")
    p.add_argument("--out")
    args = p.parse_args()
    child(json.loads(args.child), args.limit, args.out) if args.child else main(args)
