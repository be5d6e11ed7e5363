"Models that see or hear and write text: the decoder is pruned, and the rest is as it was."
import json

import pytest
import torch
import transformers as tf

from replaceme.arch import layers_of
from replaceme.config import make_config
from replaceme.core import ReplaceMeError
from replaceme.merge import relative_error, save_checkpoint, skipping
from replaceme.models import _draw, load_model, tiny_tokenizer
from replaceme.pipeline import prune, run

TEXT = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=2)
EYE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, image_size=28, patch_size=14)
PATCHES = dict(depth=4, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=14, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=32,
               num_position_embeddings=16)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
FIT = dict(dataset="python-docs", dataset_size=8, max_length=48)
DATA = FIT | dict(eval_dataset=None, prompt=None, speed=False)


def llava():
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**EYE),
                                                           image_token_index=5, image_token_id=5))


def qwen2_audio():
    ear = tf.Qwen2AudioEncoderConfig(d_model=32, encoder_layers=6, encoder_attention_heads=4, encoder_ffn_dim=64)
    return tf.Qwen2AudioForConditionalGeneration(tf.Qwen2AudioConfig(text_config=tf.Qwen2Config(**TEXT), audio_config=ear))


def qwen3_5():
    return tf.Qwen3_5ForConditionalGeneration(tf.Qwen3_5Config(text_config=TEXT | LINEAR, vision_config=PATCHES, image_token_id=5))


def gemma3():
    text = tf.Gemma3TextConfig(**TEXT, sliding_window=16)
    return tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(text_config=text, vision_config=tf.SiglipVisionConfig(**EYE), mm_tokens_per_image=4,
                                                             image_token_id=5, boi_token_id=6, eoi_token_id=7))


MODELS = dict(llava=(llava, "AutoModelForImageTextToText"), qwen2_audio=(qwen2_audio, "AutoModelForMultimodalLM"),
              qwen3_5=(qwen3_5, "AutoModelForImageTextToText"), gemma3=(gemma3, "AutoModelForCausalLM"))


@pytest.fixture(scope="module", params=MODELS)
def one(request, tmp_path_factory):
    "(folder, the auto class that loads it); two layers less are as many as Qwen's vision tower has"
    make, auto = MODELS[request.param]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    _draw(model := make().eval(), 32)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, auto


def test_the_saved_folder_loads_whole(one, tmp_path):
    folder, auto = one
    result, out = run(make_config(model_path=str(folder), layers_to_skip=2, save_path=str(tmp_path / "out"), **DATA))
    dense, small = load_model(folder)[0], getattr(tf, auto).from_pretrained(out).eval()
    assert type(small) is type(dense) and len(layers_of(small)) == len(layers_of(dense)) - 2
    theirs, ours = dense.state_dict(), small.state_dict()
    rest = [k for k in theirs if "vision" in k or "visual" in k or "audio" in k or "projector" in k]
    assert rest and all(torch.equal(theirs[k], ours[k]) for k in rest)
    assert auto in (out / "README.md").read_text() and json.loads((out / "replaceme.json").read_text()).get("loads", "AutoModelForCausalLM") == auto
    assert result.parameters.before == sum(p.numel() for p in dense.parameters())


def test_a_map_of_its_own_loads_at_our_door_and_at_that_of_transformers(tmp_path):
    "The code that comes with it is named for the auto class that loads the whole"
    torch.manual_seed(0)
    _draw(model := llava().eval(), 32)
    small, _ = prune(model, tiny_tokenizer(), 2, method="lstsq", merge=False, **FIT)
    save_checkpoint(small, tmp_path, inputs=tiny_tokenizer())
    ids = torch.randint(8, 300, (1, 12))
    for again in (load_model(tmp_path, trust_remote_code=True)[0],
                  tf.AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True).eval()):
        with torch.no_grad():
            assert relative_error(again(input_ids=ids).logits, small(input_ids=ids).logits) < 1e-5


def test_pictures_go_through_what_stays():
    "Nothing of a picture enters a layer by its number: without two layers Llava says what it says when they hand on what they get"
    torch.manual_seed(0)
    model = llava().eval()
    small, _ = prune(model, tiny_tokenizer(), blocks=[[2, 4]], method="remove", **FIT)
    ids = torch.cat([torch.tensor([[7, *[5] * 4]]), torch.randint(8, 300, (1, 9))], 1)
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, 28, 28), use_cache=False)
    with torch.no_grad(), skipping(model, [(2, 4)]):
        want = model(**batch).logits
    with torch.no_grad():
        assert relative_error(small(**batch).logits, want) < 1e-5 < relative_error(model(**batch).logits, want)


def test_encoder_decoders_are_refused(tmp_path):
    tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)).save_pretrained(tmp_path)
    with pytest.raises(ReplaceMeError, match="neither a causal language model nor an image encoder"):
        load_model(tmp_path)


def deep(family):
    if family == "qwen3_vl":
        eye = tf.Qwen3VLVisionConfig(**PATCHES, deepstack_visual_indexes=[0, 1, 2])
        return tf.Qwen3VLForConditionalGeneration(tf.Qwen3VLConfig(text_config=TEXT, vision_config=eye.to_dict(), image_token_id=5))
    eye = EYE | dict(hidden_size=64)
    return tf.Granite4VisionForConditionalGeneration(tf.Granite4VisionConfig(text_config=TEXT, vision_config=eye, image_token_index=5, image_token_id=5,
                                                                            deepstack_layer_map=[[-2, 0], [-1, 2]], downsample_rate="1/2"))


@pytest.mark.parametrize("family", ["qwen3_vl", "granite4_vision"])
def test_layers_that_pictures_enter_stay(family):
    "Their features are added by the number of the layer, which nothing but tokens would not show"
    _draw(model := deep(family).eval(), 32)
    for keys in (dict(blocks=[[1, 3]]), dict(blocks=[[2, 3], [4, 5]])):
        with pytest.raises(ReplaceMeError, match="pictures enter layers 0 to 2"):
            prune(model, tiny_tokenizer(), method="remove", **keys, **FIT)
    for n in (1, 2, 3):
        assert prune(model, tiny_tokenizer(), n, method="lstsq", **FIT)[1].block.start >= 3
    with pytest.raises(ReplaceMeError, match="pictures enter layers 0 to 2"):
        prune(model, tiny_tokenizer(), 4, method="lstsq", **FIT)
