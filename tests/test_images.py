"""Images: where they are found, what becomes of their modes, what bad ones say, and what the batches hold."""
import io

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from transformers import (BitImageProcessor, CLIPImageProcessor, CLIPProcessor, CLIPVisionConfig, CLIPVisionModel,
                          SiglipImageProcessor, ViTImageProcessor)

from replaceme.core import ReplaceMeError
from replaceme.data import as_rgb, drawn, image_batches, image_files, load_images, open_image, synthetic_images
from replaceme.models import tiny_tokenizer

PICS = synthetic_images(6, size=16)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    "A cache of its own for each test."
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def same(found, expected):
    assert [im.mode for im in found] == ["RGB"] * len(expected)
    assert [im.tobytes() for im in found] == [im.tobytes() for im in expected]


def stored(image, fmt="PNG", **kw):
    image.save(out := io.BytesIO(), fmt, **kw)
    return out.getvalue()


def write(folder, **files):
    for name, im in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        im.save(path.with_suffix(".png"))


def says(message, *args, **kw):
    with pytest.raises(ReplaceMeError) as e:
        load_images(*args, **kw)
    assert message in str(e.value), str(e.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_modes_survive_a_file(tmp_path, mode):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    rgba = Image.fromarray(values)
    im = rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode)
    im.save(tmp_path / "x.png")
    a = np.asarray(im)
    if mode == "1": expected = np.repeat(a[..., None] * np.uint8(255), 3, 2)
    elif mode == "L": expected = np.repeat(a[..., None], 3, 2)
    elif mode == "LA": expected = np.repeat(a[..., :1], 3, 2)
    elif mode == "P": expected = np.array(im.getpalette()).reshape(-1, 3)[a]
    else: expected = values[..., :3]
    [out] = load_images(tmp_path / "x.png")
    assert out.mode == "RGB" and np.array_equal(np.asarray(out), expected)


@pytest.mark.filterwarnings("error")
def test_transparent_palette_gives_its_colours_and_no_warning():
    im = Image.new("P", (2, 1))
    im.putpalette([9, 8, 7, 6, 5, 4])
    im.putdata([0, 1])
    im = Image.open(io.BytesIO(stored(im, transparency=b"\x00\x80")))
    assert np.asarray(as_rgb(im)).tolist() == [[[9, 8, 7], [6, 5, 4]]]


def test_deep_grey_is_scaled():
    levels = np.array([[0, 128, 129, 257 * 3, 40000, 65535]], dtype=np.uint16)
    im = Image.open(io.BytesIO(stored(Image.fromarray(levels))))
    assert np.asarray(as_rgb(im))[0, :, 1].tolist() == [0, 0, 1, 3, round(40000 / 257), 255]


def test_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # held sideways
    jpeg = stored(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    assert open_image(dict(path=None, bytes=jpeg), "x").size == (4, 8)


def test_folder_is_recursive_sorted_and_whole(tmp_path):
    "A name with `test` in it, which the reader of `datasets` takes for a split, hides nothing."
    write(tmp_path, b__1=PICS[0], a=PICS[1], b__test_1=PICS[2], train=PICS[3])
    (tmp_path / "b" / "._1.png").write_bytes(b"not an image")
    (tmp_path / ".thumbs").mkdir()
    (tmp_path / ".thumbs" / "a.png").write_bytes(b"not an image")
    (tmp_path / "labels.csv").write_text("file,label\na.png,1\n")
    same(load_images(tmp_path), [PICS[i] for i in (1, 0, 2, 3)])
    same(load_images(str(tmp_path), size=None, split="train", column="image"), [PICS[i] for i in (1, 0, 2, 3)])
    says("has no split 'test'", tmp_path, subset="test")


def test_subset_is_a_matter_of_the_seed(tmp_path):
    many = synthetic_images(40, size=8)
    write(tmp_path, **{f"{i:02}": im for i, im in enumerate(many)})
    one, again, other = [load_images(tmp_path, size=12, seed=s) for s in (0, 0, 1)]
    same(one, again)
    where = [[m.tobytes() for m in many].index(im.tobytes()) for im in one]
    assert len(set(where)) == 12 and where == drawn(list(range(40)), 12)
    assert [im.tobytes() for im in one] != [im.tobytes() for im in other]
    same(load_images(tmp_path, size=5), one[:5])
    same(load_images(tmp_path, size=41), many)


def test_drawing_is_even():
    counts = torch.zeros(10)
    for seed in range(1000):
        counts[drawn(range(10), 3, seed)] += 1
    assert (counts - 300).abs().max() < 6 * (1000 * .3 * .7) ** .5


def test_saved_splits_and_columns(tmp_path):
    def part(i): return Dataset.from_dict(dict(a=PICS[i:i + 2], b=[ImageOps.invert(p) for p in PICS[i:i + 2]]))
    DatasetDict(train=part(0), test=part(2)).save_to_disk(tmp_path / "d")
    same(load_images(tmp_path / "d", column="a"), PICS[:2])
    same(load_images(tmp_path / "d", column="b", split="test", size=1), [ImageOps.invert(PICS[2])])
    says("choose a column (dataset_column): the data set has a, b; images are in a, b.", tmp_path / "d")
    says("there is no column 'c'", tmp_path / "d", column="c")
    says("there is no split 'dev'", tmp_path / "d", column="a", split="dev")


@pytest.mark.parametrize("known", [True, False])
def test_parquet_with_and_without_the_feature(tmp_path, known):
    "Other programs write the same cells without saying that they are images."
    cells = [dict(bytes=stored(p), path=f"{i}.png") for i, p in enumerate(PICS)]
    feature = ImageFeature() if known else dict(bytes=Value("binary"), path=Value("string"))
    ds = Dataset.from_dict(dict(image=cells, label=[*range(6)]), features=Features(image=feature, label=Value("int64")))
    ds.to_parquet(tmp_path / "rows" / "train.parquet")
    (tmp_path / "rows" / "logo.png").write_bytes(b"not looked at")
    for place in tmp_path / "rows", tmp_path / "rows" / "train.parquet":
        same(load_images(place, size=4), PICS[:4])
    says("column 'label' holds no images", tmp_path / "rows", column="label")


def test_empty_cells_do_not_count_nor_hide_a_column(tmp_path):
    ds = Dataset.from_dict(dict(a=[None, PICS[0], None, PICS[1]], b=[PICS[2]] * 4),
                           features=Features(a=ImageFeature(), b=ImageFeature()))
    same(load_images(ds, column="a", size=2), PICS[:2])
    says("choose a column", ds)
    says("holds no image", ds.select([0]), column="a")


def test_data_in_memory():
    ds = Dataset.from_dict(dict(x=PICS))
    same(load_images(ds.to_iterable_dataset(), size=3), PICS[:3])
    same(load_images(IterableDataset.from_generator(lambda: ({"x": p} for p in PICS)), size=3), PICS[:3])
    same(load_images(ds.with_format("torch")), PICS)
    assert ds.features["x"].decode


def test_damaged_ones_are_named(tmp_path):
    good = stored(PICS[0])
    for fmt in "PNG", "JPEG", "GIF", "TIFF", "WEBP":
        with pytest.raises(ReplaceMeError, match="image it cannot be read"):
            open_image(dict(path=None, bytes=stored(PICS[0], fmt)[:40]), "it")
    write(tmp_path, a=PICS[0])
    (tmp_path / "b.jpg").write_bytes(good[:200])
    says(f"image {tmp_path / 'b.jpg'} cannot be read", tmp_path)
    cells = [dict(bytes=good, path=None), dict(bytes=good[:200], path="b.png"), dict(bytes=None, path="gone.png")]
    ds = Dataset.from_dict(dict(x=cells), features=Features(x=ImageFeature()))
    same(load_images(ds, size=1), PICS[:1])
    says("image b.png in row 1 of Dataset cannot be read", ds)
    says("image gone.png in row 0 of Dataset cannot be read", ds.select([2]))


def test_what_is_no_image(tmp_path):
    for name in "self", "python-docs", "slimorca", "fineweb_and_orca":
        says(f"dataset {name} holds texts", name)
    says("there are no mixtures", [tmp_path, tmp_path])
    says("holds no image", tmp_path)
    (tmp_path / "rows.csv").write_text("text,label\nHi,1\n")
    says("there is no column of images (dataset_column): the data set has text, label", tmp_path / "rows.csv")
    says("no such file or folder", tmp_path / "none")
    says("Without a network, give a local file or folder.", "owner/none")
    says("dataset_size 0 is too small", tmp_path, size=0)


def cropped(im, processor):
    "The centre, scaled and normalized, by hand."
    c = processor.crop_size["height"]
    y, x = (im.height - c) // 2, (im.width - c) // 2
    a = np.asarray(im, dtype=np.float64)[y:y + c, x:x + c] / 255
    return ((a - processor.image_mean) / processor.image_std).transpose(2, 0, 1)


@pytest.mark.parametrize("cls", [CLIPImageProcessor, BitImageProcessor])
@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_values(cls, batch_size):
    p = cls(do_resize=False, crop_size=dict(height=8, width=8))
    bs = image_batches(PICS, p, 5, batch_size)
    x = torch.cat([b["pixel_values"] for b in bs])
    assert x.dtype == torch.float32 and max(len(b["pixel_values"]) for b in bs) == batch_size
    np.testing.assert_allclose(x, np.stack([cropped(im, p) for im in PICS]), atol=1e-5)
    assert torch.equal(torch.cat([b["attention_mask"] for b in bs]), torch.ones(6, 5, dtype=torch.long))


@pytest.mark.parametrize("cls", [ViTImageProcessor, SiglipImageProcessor, CLIPImageProcessor])
def test_images_of_all_sizes_make_one_batch(cls):
    odd = [PICS[0].resize(s) for s in ((9, 30), (40, 8), (16, 16))]
    [b] = image_batches(odd, cls(size=dict(shortest_edge=16) if cls is CLIPImageProcessor else dict(height=16, width=16),
                                 **(dict(crop_size=16) if cls is CLIPImageProcessor else {})), 17)
    assert b["pixel_values"].shape == (3, 3, 16, 16) and b["pixel_values"].isfinite().all()


def test_processor_inside_a_processor_and_an_encoder():
    inner = CLIPImageProcessor(size=dict(shortest_edge=16), crop_size=16)
    outer = CLIPProcessor(image_processor=inner, tokenizer=tiny_tokenizer())
    [a], [b] = image_batches(PICS, inner, 17), image_batches(PICS, outer, 17)
    assert torch.equal(a["pixel_values"], b["pixel_values"])
    model = CLIPVisionModel(CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                             num_attention_heads=2, image_size=16, patch_size=4))
    h = model(b["pixel_values"]).last_hidden_state
    assert h.shape[:2] == b["attention_mask"].shape and h[b["attention_mask"].bool()].shape == (6 * 17, 16)


def test_processors_that_do_not_fit():
    def gives(x): return lambda images, return_tensors: dict(pixel_values=x)
    for processor, message in [(gives(torch.zeros(6, 2, 3, 4, 4)), "(6, 2, 3, 4, 4) from 6 images"),
                               (gives(torch.zeros(5, 3, 4, 4)), "(5, 3, 4, 4) from 6 images"),
                               (tiny_tokenizer(), "makes no batch of 6 images"),
                               (lambda images, return_tensors: {}, "makes no batch of 6 images")]:
        with pytest.raises(ReplaceMeError) as e:
            image_batches(PICS, processor, 17)
        assert message in str(e.value)
    assert image_batches(PICS, gives(torch.zeros(6, 3, 4, 4, dtype=torch.uint8)), 1)[0]["pixel_values"].dtype == torch.float32
    for kw, message in (dict(positions=0), "positions 0"), (dict(positions=1, batch_size=0), "batch_size 0"):
        with pytest.raises(ReplaceMeError, match=message):
            image_batches(PICS, ViTImageProcessor(), **kw)


def test_synthetic_images_leave_the_random_state_alone():
    torch.manual_seed(0); np.random.seed(0)
    expected = torch.rand(2).tolist(), np.random.rand(2).tolist()
    torch.manual_seed(0); np.random.seed(0)
    drawn(range(9), 3), synthetic_images(2)
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist()) == expected
    assert all(np.asarray(im).std() > 5 for im in synthetic_images(20))


def test_files_of_a_link_to_a_folder(tmp_path):
    write(tmp_path / "real", a=PICS[0])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert [f.name for f in image_files(tmp_path / "link")] == ["a.png"]
