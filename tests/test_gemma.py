"""Gemma 3 270M: three of 18 layers out of a real model with a norm behind the MLP, fitted through it, as a plain checkpoint."""
import json
import math
import sys

import pytest
import torch
import warm

from replaceme.blocks import Block
from replaceme.core import cache_dir
from replaceme.data import load_texts
from replaceme.merge import replace_block, save_checkpoint
from replaceme.models import load_model
from replaceme.pipeline import prune

MODEL = "package:gemma3_270m"
KEYS = dict(blocks=[[6, 9]], dataset="python-docs", dataset_size=24, max_length=192, batch_size=8)
FRESH = """
import sys, json, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "replaceme" not in sys.modules
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad(): print(model.config.num_hidden_layers, type(model).__name__, model(ids, labels=ids).loss.item())
"""


@pytest.fixture(scope="module")
def gemma():
    if not [*(cache_dir() / "packages/gemma3_270m").glob("*.gguf")]:
        pytest.skip("no Gemma 3 here: `make gemma` fetches it")
    model, tok = load_model(MODEL)
    texts = load_texts("python-docs", tokenizer=tok, size=48, max_length=256)[24:]
    return model, tok, torch.tensor([tok(str(t)).input_ids[:128] for t in texts if len(tok(str(t)).input_ids) >= 128][:4])


@torch.no_grad()
def loss(model, ids):
    return sum(model(x[None], labels=x[None]).loss.item() for x in ids) / len(ids)


@pytest.mark.minutes
def test_three_layers_less_through_the_norm_behind(gemma, tmp_path):
    model, tok, ids = gemma
    assert len(ids) == 4 and (ids[:, 0] == tok.bos_token_id).all()  # wrong by orders of magnitude without
    more = dict(KEYS, method="lstsq", ridge=.03)
    small, folded = prune(model, tok, None, **more)
    beside, apart = prune(model, tok, None, merge=False, **more)
    assert (folded.fit.map, apart.fit.map) == ("normed", "state")
    there = dict(dense=model, removed=replace_block(model, Block(6, 9), None), folded=small, beside=beside)
    losses = {k: loss(m, ids) for k, m in there.items()}
    assert losses["dense"] < losses["beside"] < losses["removed"] and losses["dense"] < losses["folded"]
    assert losses["folded"] - losses["dense"] < .5 * (losses["removed"] - losses["dense"]), losses
    assert math.exp(losses["folded"] - losses["beside"]) < 1.12, losses  # in perplexity
    save_checkpoint(small, tmp_path, inputs=tok)
    out = warm.run([sys.executable, "-c", FRESH, str(tmp_path), json.dumps(ids.tolist())], capture_output=True, text=True, fresh=True)
    assert out.returncode == 0, out.stderr[-2000:]
    n, kind, again = out.stdout.split()
    assert (n, kind) == ("15", "Gemma3ForCausalLM") and float(again) == pytest.approx(losses["folded"], abs=1e-3)
