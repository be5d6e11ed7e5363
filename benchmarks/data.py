"""The public texts and questions that the protocol uses, in the very form it wants them, checked by hash.

    python benchmarks/data.py [FOLDER]              (`make data`; a minute with a network)

Writes the files of data.sha256 into FOLDER (.cache/data) and leaves alone what is there and right. What a folder that lies here already
has ($REPLACEME_DATA, ../shared/data) is copied; the rest comes from the hub, in the form that a function below gives it:
wikitext-2 (CC BY-SA), PIQA (AFL 3.0), GSM8K (MIT), the seed tasks of Self-Instruct (Apache-2.0). Code is the source of modules that this Python carries. A file whose hash is another is refused, since numbers on another text say nothing about those published.
"""
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HASHES = dict(reversed(line.split()) for line in (ROOT / "benchmarks/data.sha256").read_text().splitlines())


PLACES = [ROOT / ".cache/data", ROOT / "../shared/data"]  # where `make data` puts them, and a folder that may lie beside the repository
if os.environ.get("REPLACEME_DATA"):
    PLACES.insert(1, Path(os.environ["REPLACEME_DATA"]))


# Where whoever measures finds the texts: the folder named, or the first place that has them
DATA = Path(os.environ.get("REPLACEME_DATA") or next((p for p in PLACES if (p / "wikitext2_test.txt").exists()), PLACES[0]))


def jsonl(rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


def wikitext(rows):
    "The lines of wikitext-2 as its own files have them: a blank line is a space, and the hub keeps it as an empty row"
    return "".join(r["text"] or " \n" for r in rows)


def piqa(rows):
    return jsonl({k: r[k] for k in ("goal", "sol1", "sol2", "label")} for r in rows)


def gsm8k(rows, n):
    "Problem and worked answer, without the marks for a calculator"
    def answer(a):
        return re.sub(r"<<[^>]*>>", "", a).replace("#### ", "The answer is ") + "."
    return jsonl(dict(text=f"{r['question']}\n{answer(r['answer'])}") for r in list(rows)[:n])


def chats(rows, odd):
    "Every second of the seed tasks, each with its first instance"
    def chat(r):
        first = r["instances"]
        first = {k: v[0] for k, v in first.items()} if isinstance(first, dict) else first[0]  # datasets turns a list of structs around
        asked = r["instruction"] + (f"\n\n{first['input']}" if first["input"] else "")
        return [dict(role="user", content=asked), dict(role="assistant", content=first["output"])]
    return jsonl(dict(messages=chat(r)) for r in list(rows)[odd::2])


# file: (hub id, subset, split, revision, the form); the parquet branch stands for a repository that still has a loading script
SETS = {
    "wikitext2_valid.txt": ("Salesforce/wikitext", "wikitext-2-v1", "validation", None, wikitext),
    "wikitext2_test.txt": ("Salesforce/wikitext", "wikitext-2-v1", "test", None, wikitext),
    "piqa_valid.jsonl": ("ybisk/piqa", None, "validation", "refs/convert/parquet", piqa),
    "domains/math_test.jsonl": ("openai/gsm8k", "main", "test", None, lambda rows: gsm8k(rows, 120)),
    "domains/math_calib.jsonl": ("openai/gsm8k", "main", "train", None, lambda rows: gsm8k(rows, 600)),
    "domains/chat_test.jsonl": ("HuggingFaceH4/self-instruct-seed", None, "train", None, lambda rows: chats(rows, 0)),
    "domains/chat_calib.jsonl": ("HuggingFaceH4/self-instruct-seed", None, "train", None, lambda rows: chats(rows, 1))}


# What every Python carries, source that is judged by and source of other modules to calibrate on; it differs a little between versions
FROM_PYTHON = {"domains/code_test.txt": ["argparse"],
               "domains/code_calib.txt": ["json.decoder", "csv", "textwrap", "tarfile", "heapq", "difflib", "calendar", "configparser", "shutil"]}


def source_code(modules):
    "The source of modules, one behind the other"
    return "\n\n".join(inspect.getsource(importlib.import_module(m)) for m in modules).encode()


def right(path, name):
    "Is the file there, and the one that the published numbers were made with?"
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == HASHES[name]


def write(path, text):
    "Another name first, so that the file is there whole or not at all"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.partial")
    part.write_bytes(text)
    os.replace(part, path)


def fetch(name, load):
    "The content of one file from the hub; a ValueError where it is another than it was"
    source, subset, split, revision, form = SETS[name]
    text = form(load(source, subset, split=split, revision=revision)).encode()
    if hashlib.sha256(text).hexdigest() != HASHES[name]:
        raise ValueError(f"it is not what the numbers were made with (sha256 {HASHES[name][:12]}...)")
    return text


def from_hub():
    "The hub's reader, which says what is wrong once and does not knock again and again"
    os.environ.pop("HF_HUB_OFFLINE", None)
    import datasets
    import huggingface_hub
    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity(50)
    return datasets.load_dataset


def main(target, load=None):
    "Fill a folder; yields what could not be had, a line each"
    for name, modules in FROM_PYTHON.items():
        if not (target / name).is_file():
            write(target / name, source_code(modules))
    for name in SETS:
        path = target / name
        if right(path, name):
            continue
        if (beside := next((p / name for p in PLACES if right(p / name, name)), None)):
            write(path, beside.read_bytes())
            continue
        try:
            load = load or from_hub()
            write(path, fetch(name, load))
        except ConnectionError:
            yield f"the hub cannot be reached, and {name} is not here: run `make data` with a network, or set REPLACEME_DATA to a folder that has it"
            return
        except Exception as e:  # whatever the hub and its libraries raise
            yield f"{name}: {SETS[name][0]}: {type(e).__name__}: {' '.join(str(e).split())[:160]}"


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else PLACES[0]
    failed = list(main(where))
    print("\n".join([*failed, f"{sum(right(where / n, n) for n in SETS)} of {len(SETS)} files are in {where}"]))
    sys.exit(2 if failed else 0)
