"""Every model type that transformers can build is exact or refused with a reason, as the documentation says it is."""
import json
import sys
from pathlib import Path

import pytest
import torch

from replaceme.models import causal_types

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from architectures import RESULT, THROUGH, VISION, outcome, steady  # noqa: E402

SEEN = dict(text={}, images={})  # computed here
RECORD = json.loads(RESULT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind, name", [("text", t) for t in causal_types()] + [("images", t) for t in VISION])
def test_contract(kind, name):
    "Computed again, the row of the table in the documentation is the same, and is none of the two that would be a defect"
    torch.manual_seed(0)
    SEEN[kind][name] = row = outcome(kind, name)
    assert row["outcome"] in ("exact", THROUGH, "refused", "not built"), row["reason"]
    assert len(row["reason"]) > 20 or row["outcome"] in ("exact", THROUGH)
    assert name in RECORD[kind], "run benchmarks/architectures.py: the installed transformers knows a new type"
    assert steady(row) == steady(RECORD[kind][name])


@pytest.mark.parametrize("kind, result, least", [("text", "exact", 110), ("text", THROUGH, 10), ("images", "exact", 10)])
def test_enough_types_are_exact(kind, result, least):
    "Of what was just computed, not of what is on record"
    if len(SEEN[kind]) < len(RECORD[kind]):
        pytest.skip("needs test_contract before it")
    assert sum(r["outcome"] == result for r in SEEN[kind].values()) >= least
