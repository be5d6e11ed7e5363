"""Which model types are exact, which are fitted through a norm, which are refused and why: the contract of nbs/15_contract.ipynb on a tiny random model of each.

    python benchmarks/architectures.py          # all of them, written to benchmarks/results/architectures.json (two minutes)
    python benchmarks/architectures.py llama vit # these, printed only

The documentation shows the file, and tests/test_contract.py computes it again and compares.
"""
import json
import re
import sys
import warnings
from pathlib import Path

import torch
from transformers.utils import logging

from replaceme.contract import THROUGH, contract
from replaceme.core import ReplaceMeError
from replaceme.models import causal_types, tiny_model, tiny_vision

RESULT = Path(__file__).parent / "results/architectures.json"
VISION = """vit deit beit data2vec-vision ijepa vit_msn dinov2 dinov2_with_registers dinov3_vit clip_vision_model siglip_vision_model
            clip siglip""".split()


def outcome(kind, name):
    "The outcome of the contract for one type, as plain data"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings(action="ignore"):
        try:
            model = tiny_vision(name) if kind == "images" else tiny_model(name)
        except ReplaceMeError as e:
            return dict(outcome="not built", reason=str(e))
        found = contract(model)
    res = dict(outcome=found.outcome, reason=found.reason)
    if found.outcome in ("exact", THROUGH):
        res |= dict(writes=found.writes, cache=found.checks["cache"])
    return res


def steady(row):
    "A row without its numbers, which depend on the machine in the last digits"
    return {**row, "reason": re.sub(r"\d+\.\d+(e[+-]?\d+)?", "0", row["reason"])}


def main(names):
    torch.set_num_threads(1)
    kinds = dict(text=causal_types(), images=VISION)
    rows = {}
    for kind, types in kinds.items():
        rows[kind] = {}
        for t in types:
            if names and t not in names:
                continue
            rows[kind][t] = row = outcome(kind, t)
            print(f"{t:26} {row['outcome']:23} {row['reason'] or ' / '.join(row['writes'])}", flush=True)
    for kind, found in rows.items():
        counts = {o: sum(r["outcome"] == o for r in found.values()) for o in ("exact", THROUGH, "refused", "not built", "wrong")}
        print(f"{kind}: " + ", ".join(f"{n} {o}" for o, n in counts.items()))
    if not names:
        RESULT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
