"What enters the layer before a block and what leaves the block, kept: and where that cannot be, nothing is made of it."
import dataclasses

import pytest
import torch

from replaceme.blocks import Block
from replaceme.models import tiny_model
from replaceme.search import Recipe, fit_blocks


def test_where_a_layer_does_not_run_by_itself_nothing_is_made_of_it():
    "A layer that reads what another one left: no kept states, so no borrowing and no refits, which is said once, and the fit is the plain one"
    from replaceme.states import states_around
    model = tiny_model("llama", layers=8)
    left = {}
    layers = model.model.layers
    layers[0].register_forward_hook(lambda m, a, out: left.update(x=out))
    layers[3].register_forward_hook(lambda m, a, out: out + left.pop("x", 0))
    ids = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))
    bs = [dict(input_ids=x, attention_mask=torch.ones_like(x)) for x in (ids[:3, :12], ids[3:])]
    with states_around(model, model, [bs], 4, 6) as ends: assert ends is None
    with states_around(model, model, [bs], 3, 5) as ends: assert ends is not None
    r = Recipe(map="wide", weights="inv_norm", ridge=.1)
    plain = fit_blocks(model, bs, [], [Block(4, 6)], r)
    with pytest.warns(UserWarning) as said: done = fit_blocks(model, bs, [], [Block(4, 6)], dataclasses.replace(r, borrow=True, refit=2))
    words = [str(w.message) for w in said]
    assert sum("nothing behind [4,6) is refitted: layer 3 does not run by itself" in w for w in words) == 1
    assert done.refits == [] and done.borrowed == [None]
    assert torch.equal(done.fits[0].T, plain.fits[0].T)
