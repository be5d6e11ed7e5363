"""One calibration has the loss over all numbers of layers: what it says of each is what a run with that number finds, and a budget picks one."""
import json

import pytest
import torch

from replaceme import cli, curve as room
from replaceme.arch import fold_points, layers_of, n_hooks, n_positions
from replaceme.blocks import Block
from replaceme.core import ReplaceMeError, ReplaceMeWarning
from replaceme.curve import Shares
from replaceme.data import batches, load_texts
from replaceme.merge import cut
from replaceme.evaluate import agreement
from replaceme.methods import METHODS, Method, peers
from replaceme.models import load_model, tiny_model, tiny_tokenizer, tiny_vision
from replaceme.pipeline import analyse, make_config, AnalyseConfig, MapConfig, prune, recipe_of, run
from replaceme.search import hold_out, outcome, solve_trial, stand_in
from replaceme.solve import Fit
from replaceme.stats import Features, collect

TEXTS = [" ".join(f"word{(7 * i + j * j) % 31} stands in" for j in range(5 + 2 * i)) for i in range(16)]
KEYS = dict(dataset=TEXTS, dataset_size=16, max_length=48, batch_size=4)
TOKENIZER = tiny_tokenizer()
WAYS = dict(auto=dict(method="auto"), alone=dict(method="auto", merge=False), fit=dict(method="lstsq", select="fit", top_k=3, ridge=.1),
            masked=dict(method="lstsq", select="loss", top_k=2, ridge=.1, mask=.2), cosine=dict(method="remove", select="loss", top_k=3, metric="cosine"))


def timed(monkeypatch, layer=1., rest=4.):
    "Every layer takes as long as the others; nothing is measured"
    monkeypatch.setattr(room, "time_shares", lambda model, more=0.: Shares(rest + layer * len(layers_of(model)), [layer] * len(layers_of(model)), more))


@pytest.fixture(autouse=True)
def same_seconds(monkeypatch):
    timed(monkeypatch)


def chosen(result):
    return next(c for c in result["choice"] if c["chosen"])


# what the curve says is what runs find

@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_each_point_is_what_a_run_with_that_number_finds(family, way):
    model, keys = tiny_model(family, layers=8), {**KEYS, **WAYS[way]}
    _, result = prune(model, TOKENIZER, layers_to_skip="auto", budget="loss 9", **keys)
    points = result["curve"]["points"]
    assert [p["n"] for p in points] == [1, 2, 3] and n_hooks(model) == 0
    for p in points:
        _, one = prune(model, TOKENIZER, layers_to_skip=p["n"], **keys)
        assert [p["block"]] == one["blocks"] and p["distance"] == pytest.approx(one["distance"]["value"])
        if way != "fit":  # which judges by the error of the fit alone
            assert p["loss"] == pytest.approx(chosen(one)["loss"], abs=1e-5)


@pytest.mark.parametrize("method", ["lstsq", "remove"])
def test_a_method_that_compares_nothing_is_judged_by_a_fit_to_the_other_texts(method):
    "Each block cut and folded by hand"
    model, keys = tiny_model("llama", layers=8), {**KEYS, "method": method, **(dict(ridge=.1) if method == "lstsq" else {})}
    _, result = prune(model, TOKENIZER, layers_to_skip="auto", budget="loss 9", **keys)
    r = recipe_of(make_config(**{k: v for k, v in keys.items()}))
    fit, held = hold_out(batches(load_texts(TEXTS, tokenizer=TOKENIZER, size=16, max_length=48), TOKENIZER, 4, 48))
    assert result["curve"]["dense"] == pytest.approx(outcome(model, model, held))
    for p in result["curve"]["points"]:
        b = Block(*p["block"])
        g = collect(model, fit, [b], {} if r.features.state else fold_points(model, [b.start - 1]), feats=r.features)[b]
        assert p["loss"] == pytest.approx(outcome(model, stand_in(model, b, solve_trial(g, None, r)), held), abs=1e-5)
        assert p["above"] == pytest.approx(p["loss"] - result["curve"]["dense"])


@pytest.mark.parametrize("keys", [*WAYS.values(), dict(method="lstsq", ridge=.1), dict(method="lstsq", ridge=.1, mask=.2), dict(method="remove")], ids=str)
def test_the_number_that_is_found_is_pruned_as_a_run_with_it(keys):
    model = tiny_model("llama", layers=8)
    small, result = prune(model, TOKENIZER, layers_to_skip="auto", budget="loss 9", **KEYS, **keys)
    n = result["curve"]["chosen"]
    other, one = prune(model, TOKENIZER, layers_to_skip=n, **KEYS, **keys)
    assert result["blocks"] == one["blocks"] and result["n_layers"] == one["n_layers"]
    mine, theirs = small.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.allclose(mine[k], theirs[k], atol=1e-5) for k in mine)
    assert [c["blocks"] for c in result["choice"]] == [c["blocks"] for c in one["choice"]]
    assert result["fit"].keys() == one["fit"].keys() and result["calibration"] == one["calibration"]
    assert result["distance"]["profile"].keys() == one["distance"]["profile"].keys()


def test_sums_that_do_not_fit_in_memory_are_taken_in_groups(monkeypatch):
    model, keys = tiny_model("llama", layers=8), dict(KEYS, method="auto", layers_to_skip="auto", budget="loss 9")
    whole, passes = prune(model, TOKENIZER, **keys), []
    gather = room.Calibration.gather
    monkeypatch.setattr(room.Calibration, "gather", lambda self, blocks: passes.append(len(blocks)) or gather(self, blocks))
    monkeypatch.setattr(room, "free_memory", lambda device: 2 * 4 * 2 * 2 * 8 * 32 * 32)  # half of it holds four candidates
    few = prune(model, TOKENIZER, **keys)
    assert len(passes) > 2 and max(passes) <= 4 and passes[-1] == 1  # the last has those of the block that was chosen
    assert few[1]["blocks"] == whole[1]["blocks"]
    for a, b in zip(few[1]["curve"]["points"], whole[1]["curve"]["points"]):
        assert a["block"] == b["block"] and a["loss"] == pytest.approx(b["loss"])


# what a budget picks

def pruned(budget, **keys):
    model = tiny_model("llama", layers=10)
    return model, *prune(model, TOKENIZER, layers_to_skip="auto", budget=budget, **{**KEYS, "method": "remove", **keys})


def test_a_loss_takes_the_largest_number_that_keeps_to_it():
    model, _, result = pruned("loss 99")
    above = {p["n"]: p["above"] for p in result["curve"]["points"]}
    assert result["curve"]["chosen"] == 4  # two fifths of the layers
    for limit in sorted(x for x in above.values() if x > 0):
        small, result = pruned(f"loss {limit + 1e-6}")[1:]
        n = max(n for n, x in above.items() if x <= limit + 1e-6)
        assert result["curve"]["chosen"] == n == 10 - len(layers_of(small))


def test_bytes_take_the_smallest_number_that_is_enough():
    size = lambda m: sum(p.numel() * p.element_size() for p in m.parameters())
    for share in (.9, .75, .35):
        model, small, result = pruned(f"bytes {100 * share:g}%")
        n = result["curve"]["chosen"]
        assert size(small) <= share * size(model) < size(cut(model, [Block(1, n)]) if n > 1 else model)
        assert result["curve"]["points"][n - 1]["bytes"] == pytest.approx(size(small) / size(model))


def test_a_speed_takes_the_smallest_number_that_is_enough(monkeypatch):
    for factor, n in ((1.07, 1), (1.2, 3), (2, 7), (2.8, 9)):  # 14 / (14 - n)
        result = pruned(f"speed {factor}x")[2]
        assert result["curve"]["chosen"] == n and result["curve"]["points"][n - 1]["speed"] == pytest.approx(14 / (14 - n))


def test_the_matrix_that_stands_alone_is_counted():
    "It is as large as what was saved by its layer in part"
    size = lambda m: sum(p.numel() * p.element_size() for p in m.parameters())
    model, small, result = pruned("bytes 75%", method="lstsq", merge=False, ridge=.1)
    n = result["curve"]["chosen"]
    assert result["curve"]["points"][n - 1]["bytes"] == pytest.approx(size(small) / size(model), rel=1e-3)


@pytest.mark.parametrize("kw", [dict(), dict(merge=False)], ids=str)
def test_the_biases_of_an_affine_map_are_counted(kw):
    "All layers that stay have them where the family has one switch; a share that holds without them alone takes one layer more"
    size = lambda m: sum(p.numel() * p.element_size() for p in m.parameters())
    dense = tiny_model("llama", layers=10)
    share = room.byte_shares(dense).left(Block(1, 4))
    model, small, result = pruned(f"bytes {100 * share + 1e-6:.8f}%", method="lstsq", affine=True, ridge=.1, **kw)
    n = result["curve"]["chosen"]
    assert size(small) / size(model) <= share and n == 4
    assert result["curve"]["points"][n - 1]["bytes"] == pytest.approx(size(small) / size(model))


def test_the_curve_is_in_the_record_and_on_the_page(tmp_path, save_tiny, monkeypatch, capsys):
    monkeypatch.chdir(save_tiny(tmp_path))
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    args = "--model_path ./tiny --layers_to_skip auto --dataset texts.txt --dataset_size 8 --max_length 48 --eval_dataset texts.txt --eval_size 2 --eval_length 32"
    cli.run_replaceme([*args.split(), "--prompt", "null", "--budget", "loss 9"])
    said, folder = capsys.readouterr().out, tmp_path / "pruned/tiny-minusauto-auto"
    record = json.loads((folder / "replaceme.json").read_text())
    assert (record["curve"]["budget"], record["curve"]["chosen"]) == ("loss 9", 2) and record["n_layers"] == dict(before=6, after=4)
    assert (record["config"]["layers_to_skip"], record["config"]["budget"]) == ("auto", "loss 9")
    assert "2 (chosen)" in said and "How many layers" in (folder / "report.html").read_text() and (folder / "curve.png").is_file()
    again = prune(*load_model("./tiny"), dataset="texts.txt", dataset_size=8, max_length=48, layers_to_skip=2)[1]
    assert again["blocks"] == record["blocks"]


def test_a_map_alone_has_a_number_too(tmp_path, save_tiny, monkeypatch):
    monkeypatch.chdir(save_tiny(tmp_path))
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    cfg = make_config(MapConfig, model_path="./tiny", method="lstsq", ridge=.1, layers_to_skip="auto", budget="bytes 85%", dataset="texts.txt", dataset_size=8, max_length=48)
    result, folder = run(cfg)
    assert (folder / "transform.safetensors").is_file() and result["curve"]["chosen"] == len(Block(*result["block"]))


def test_a_profile_that_was_kept_is_read(tmp_path, save_tiny, monkeypatch):
    monkeypatch.chdir(save_tiny(tmp_path))
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    keys = dict(model_path="./tiny", dataset="texts.txt", dataset_size=8, max_length=48)
    analyse(make_config(AnalyseConfig, distances_path="p.json", **keys))
    keys = dict(keys, layers_to_skip="auto", budget="loss 9", eval_dataset=None, prompt=None, method="remove")
    fresh, kept = run(make_config(save_path="a", **keys))[0], run(make_config(save_path="b", distances_path="p.json", **keys))[0]
    assert [p["block"] for p in fresh["curve"]["points"]] == [p["block"] for p in kept["curve"]["points"]] and fresh["blocks"] == kept["blocks"]


def test_a_model_in_few_bits_measures_and_what_is_saved_is_counted(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", layers=6, d=64).save_pretrained("tiny")
    TOKENIZER.save_pretrained("tiny")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    keys = dict(model_path="./tiny", dataset="texts.txt", dataset_size=8, max_length=48, eval_dataset=None, prompt=None, use_4bit=True)
    result, one = run(make_config(layers_to_skip="auto", budget="bytes 80%", save_path="a", **keys))[0], run(make_config(layers_to_skip=2, save_path="b", **keys))[0]
    n = result["curve"]["chosen"]
    assert n == 2 and result["blocks"] == one["blocks"]
    assert result["curve"]["points"][n - 1]["bytes"] == pytest.approx(result["parameters"]["after"] / result["parameters"]["before"])


def test_images_have_a_curve_too():
    model = tiny_vision("vit", layers=6)
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    bs = [dict(pixel_values=x, attention_mask=torch.ones(len(x), n_positions(model)).long()) for x in pixels.split(4)]
    fits = {b: Fit(torch.eye(32, dtype=torch.float64), 0., 0., 1, kind="none") for b in (Block(1, 3), Block(4, 6))}
    for b, loss in room.candidate_losses(model, bs, fits, {}, Features(state=True)).items():
        assert loss == pytest.approx(1 - agreement(model, cut(model, [b]), bs), abs=1e-6)


# what cannot be

@pytest.mark.parametrize("keys, words", [
    (dict(layers_to_skip="auto"), "layers_to_skip is auto, and budget is missing"),
    (dict(layers_to_skip=3, budget="loss 0.2"), "budget is 'loss 0.2', but it finds the number of layers where layers_to_skip is auto"),
    (dict(budget="loss 0.2"), "budget is 'loss 0.2', but it finds the number"),
    (dict(layers_to_skip="auto", budget="0.2"), 'give "loss 0.2"'),
    (dict(layers_to_skip="auto", budget="bytes 120%"), "between 0% and 100%"),
    (dict(layers_to_skip="auto", budget="speed 0.5x"), "a speed-up is above 1"),
    (dict(layers_to_skip="auto", budget="loss nan"), "a loss is above 0"),
    (dict(layers_to_skip="automatic", budget="loss 1"), "layers_to_skip is 'automatic': it must be a whole number, or auto"),
    (dict(layers_to_skip="auto", budget="loss 1", num_A=2), "leave num_A and max_blocks out"),
    (dict(layers_to_skip="auto", budget="loss 1", max_blocks=2), "leave num_A and max_blocks out"),
    (dict(layers_to_skip="auto", blocks=[[1, 2]]), "layers_to_skip is 'auto', but the blocks are given"),
    (dict(layers_to_skip="auto", budget="loss 1", method="cosine"), "not for method cosine: its solver reads the data anew"),
    *((dict(layers_to_skip="auto", budget="loss 1", method=m), f"not for method {m}: its rule is for a number that is given. Give a number, or use one of auto, lstsq, remove")
      for m in peers())], ids=str)
def test_what_cannot_be_is_said_before_a_model_is_loaded(keys, words):
    with pytest.raises(ReplaceMeError) as e:
        make_config(**keys)
    assert words in str(e.value)


def test_a_command_says_it_in_one_line(tmp_path, capsys):
    for budget in ("loss much", "none"):
        with pytest.raises(SystemExit) as e:
            cli.run_replaceme(["--model_path", "nowhere", "--layers_to_skip", "auto", "--budget", budget])
        said = capsys.readouterr().err
        assert e.value.code == 2 and said.startswith("run_replaceme: error: ") and "budget" in said and said.count("\n") == 2  # and where to read on


def test_what_no_number_reaches_is_said_before_texts_are_read(monkeypatch):
    model = tiny_model("llama", layers=6)
    monkeypatch.setattr(room, "_read", lambda *a: pytest.fail("texts were read"))
    for budget, words in (("bytes 1%", "with one of 6 layers left"), ("speed 3x", "it is 2.00 times as fast")):
        with pytest.raises(ReplaceMeError, match=f"budget {budget} cannot be met: .*{words}"):
            prune(model, TOKENIZER, layers_to_skip="auto", budget=budget, **KEYS)


def test_a_loss_that_every_cut_exceeds_writes_nothing(tmp_path, save_tiny, monkeypatch):
    monkeypatch.chdir(save_tiny(tmp_path))
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    monkeypatch.setattr(room, "outcome", lambda *a: 0.)  # all of the loss is above that of such a dense model
    keys = dict(model_path="./tiny", dataset="texts.txt", dataset_size=8, max_length=48, eval_dataset=None, prompt=None)
    with pytest.raises(ReplaceMeError, match=r"budget loss 1 cannot be met: the least that is lost is \d\.\d+ \(nats/token\), without \["):
        run(make_config(layers_to_skip="auto", budget="loss 1", **keys))
    assert not (tmp_path / "pruned/tiny-minusauto-auto").exists()


def test_a_budget_that_even_the_last_number_keeps_is_told():
    "Two fifths of the layers are tried: a loss that is never reached says nothing of more"
    with pytest.warns(ReplaceMeWarning, match="budget loss 50: 2 layers are the most that were tried"):
        prune(tiny_model("llama", layers=6), TOKENIZER, layers_to_skip="auto", budget="loss 50", **{**KEYS, "method": "remove"})
    c = room.Curve(room.read_budget("loss 1e-9"), 0., [room.Point(1, Block(1, 2), .1, .5, .5, .9, 1.1)], dict(unit="1 - cosine"))
    with pytest.raises(ReplaceMeError, match=r"0\.5000 \(1 - cosine\)"):
        c.choose()


def test_one_text_has_nothing_to_judge_by():
    with pytest.raises(ReplaceMeError, match="and there is 1: give two or more"):
        prune(tiny_model("llama"), TOKENIZER, layers_to_skip="auto", budget="loss 1", **{**KEYS, "dataset_size": 1, "method": "remove"})


def test_a_method_that_is_added_is_refused_by_construction():
    class Own(Method):
        name = "own"
    assert Own().no_curve() == "its rule is for a number that is given"
    assert [m.name for m in METHODS.values() if not m.no_curve()] == ["auto", "lstsq", "remove"]


def test_a_profile_has_all_lengths(tmp_path):
    with pytest.raises(ReplaceMeError, match="layers_to_skip is 'auto', but a profile has all lengths"):
        make_config(AnalyseConfig, layers_to_skip="auto")


def test_a_file_that_is_called_like_a_number_is_no_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "3").write_text("")
    cfg = cli.parse("run_replaceme", "", ["--layers_to_skip", "3"], {})[0]
    assert cfg.layers_to_skip == 3
