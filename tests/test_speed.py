"""What both models take, in every run: turns, a dose of seconds, bytes by hand, and where it stands. Nothing here depends on how fast a computer is."""
import json
import statistics

import pytest
import torch

import replaceme.pipeline as pipeline
import replaceme.speed as s
from replaceme.blocks import Block
from replaceme.core import ReplaceMeError, ReplaceMeWarning
from replaceme.merge import cut
from replaceme.models import load_model, tiny_model, tiny_tokenizer
from replaceme.pipeline import EvaluateConfig, PruneConfig, make_config, run
from replaceme.report import report_html, result_rows, taken_rows
from replaceme.result import Result


@pytest.fixture(scope="module")
def pair():
    dense, tok = tiny_model(layers=6), tiny_tokenizer()
    return dense, cut(dense, [Block(2, 4)]), tok


KEYS = dict(model_path="./tiny", dataset="a.txt", dataset_size=8, max_length=32, layers_to_skip=2, method="lstsq", ridge=.1, prompt=None,
            eval_dataset="b.txt", eval_size=2, eval_length=48, save_path="out")


def fake_times(monkeypatch, dense, faster=.5):
    "A dense model that takes 2 s to the first token and 1 s for each after it, and one that takes a part of that; the order of the calls"
    calls = []

    def token_times(m, tok, ids, n):
        f = 1 if m is dense or m.config.num_hidden_layers == 6 else faster
        calls.append((f, tuple(ids.shape), n))
        return [f * (2 + i) for i in range(n)]
    monkeypatch.setattr(s, "token_times", token_times)
    return calls


# turns

def test_numbers_are_those_of_the_times_and_the_models_take_turns(pair, monkeypatch):
    dense, pruned, tok = pair
    calls = fake_times(monkeypatch, dense)
    taken = s.both_taken(dense, pruned, tok, seconds=8., clock=lambda: 0.)  # a clock that stands still: as many pairs as there may be
    assert [f for f, shape, _ in calls if shape == (1, 64)] == [1, .5] + [1, .5, .5, 1] * 2 + [1, .5]  # a warm-up, and five pairs
    assert {(shape, n) for _, shape, n in calls} == {((1, 64), 9), ((8, 16), 5)}
    one, eight = taken["batches"]
    assert (one["first_ms"], one["first_ratio"]) == ([2000., 1000.], [.5] * 3) and (one["rates"], one["rate_ratio"]) == ([1., 2.], [2.] * 3)
    assert (eight["rates"], eight["pairs"], one["pairs"]) == ([8., 16.], 5, 5) and "joules" not in one


def test_the_dose_is_kept(monkeypatch):
    "However slow, two pairs; no third that would end later than the dose"
    def pairs(each, seconds):
        now = [0.]
        def measure():
            now[0] += each / 2
            return now[0]
        return len(s.pairs_within([measure, measure], seconds, clock=lambda: now[0])[0])
    assert [pairs(1., x) for x in (0., 2., 2.9, 3., 4.5, 99.)] == [2, 2, 2, 3, 4, 5] and pairs(3600., 4.) == 2


def test_joules_are_counted_apart(pair, monkeypatch):
    "A meter that runs on between the calls counts for the model that ran; batch and tokens divide it"
    dense, pruned, tok = pair
    now = [0]

    def token_times(m, tok, ids, n):
        now[0] += (30 if m is dense else 18) * 10**6
        return [1. + i for i in range(n)]
    monkeypatch.setattr(s, "token_times", token_times)
    monkeypatch.setattr(s, "energy_meter", lambda m: s.Meter(lambda: [now[0] % 10**9], [10**9]))
    one, eight = s.both_taken(dense, pruned, tok, seconds=0., clock=lambda: 0.)["batches"]
    assert one["joules"] == pytest.approx([30 / 9, 18 / 9]) and eight["joules"] == pytest.approx([30 / 40, 18 / 40])
    rows = taken_rows(dict(speed=dict(batches=[one, eight])))
    assert [r[:3] for r in rows if "joules" in r[0]] == [["joules per token, batch 1", "3.33", "2"], ["joules per token, batch 8", "0.75", "0.45"]]


def test_a_card_counts_its_joules(monkeypatch):
    "By its driver, if it has a counter; a driver that fails is no counter"
    import sys
    from types import SimpleNamespace
    mj = [5000]
    fake = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda u: u, nvmlDeviceGetTotalEnergyConsumption=lambda c: mj[0])
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid="ab"))
    meter = s.card_meter(["cuda:0", "cuda:1"])
    was, mj[0] = meter.read(), 7500
    assert meter.joules(was, meter.read()) == 5.  # 2.5 J each
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda c: 1 / 0
    assert s.card_meter(["cuda:0"]) is None


# bytes

@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_bytes_by_hand(dtype, size):
    "Keys and values of all layers and heads at 4k and at 32k tokens, of which none was run; tied weights once; what lies outside the layers stays"
    dense = tiny_model(layers=6, tie_word_embeddings=True, max_position_embeddings=64).to(getattr(torch, dtype))
    pruned = cut(dense, [Block(1, 4)])
    found = s._all_bytes((dense, pruned))
    assert found["caches"] == [dict(tokens=n, bytes=[n * layers * 2 * 2 * 8 * size for layers in (6, 3)]) for n in (4096, 32768)]
    layer = size * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32)
    assert found["layers"] == [6 * layer, 3 * layer] and found["weights"] == [n * layer + size * (320 * 32 + 32) for n in (6, 3)]
    assert found["positions"] == 64


def test_windows_and_states():
    "A window holds what it holds at any length, in the layers that have one; a state does not grow"
    m = tiny_model("mistral", layers=6, sliding_window=100)
    assert s.caches_at(m, (50, 4096, 32768)) == [n * 6 * 2 * 2 * 8 * 4 for n in (50, 99, 99)]
    m = tiny_model("gemma3_text", layers=6, sliding_window=20, layer_types=["sliding_attention", "full_attention"] * 3)
    one = s.cache_bytes(m, 10) // (6 * 10)
    assert s.caches_at(m, (4096, 32768)) == [one * 3 * (n + 19) for n in (4096, 32768)]
    mamba = tiny_model("mamba")
    assert len({*s.caches_at(mamba, (16, 4096, 32768))}) == 1 and s.caches_at(tiny_model("recurrent_gemma"), (16, 4096)) == [None, None]
    assert s._all_bytes((tiny_model("recurrent_gemma"),) * 2)["caches"] == []


def test_weights_that_lie_elsewhere_are_weighed_and_not_timed(two_kinds, pair):
    "Offloaded to the disk: the bytes are the same, and the reason stands in the place of the seconds"
    away, _ = load_model("./tiny", device_map={"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu",
                                               **{f"model.layers.{i}": "disk" if i > 2 else "cpu" for i in range(6)}})
    assert any(p.is_meta for p in away.parameters())
    near, tok = load_model("./tiny")
    taken = s.both_taken(away, near, tok, seconds=0.)
    assert "batches" not in taken and "lie outside" in taken["untimed"]
    assert taken["weights"][0] == taken["weights"][1] and taken["layers"][0] == taken["layers"][1] and taken["caches"][1]["bytes"][0] == 32768 * 6 * 2 * 2 * 8 * 4
    assert "Nothing was timed: some of its weights" in report_html(dict(speed=taken))


# a run

def test_a_run_writes_it_down(two_kinds, monkeypatch):
    "Numbers of the fake clock in the record, the table, the card and the page; the models that are timed are the dense and the pruned one"
    calls = fake_times(monkeypatch, None)
    result, path = run(make_config(**KEYS, speed_seconds=0.))
    kept = json.loads((path / "replaceme.json").read_text())
    assert kept["speed"] == json.loads(json.dumps(result["speed"])) and len(calls) == 2 * 2 * 3 and result["seconds"]["speed"] >= 0
    assert Result(kept).speed.batches[1].rates == [8., 16.] and kept["speed"]["caches"][0] == dict(tokens=4096, bytes=[4096 * n * 2 * 2 * 8 * 4 for n in (6, 4)])
    assert [r for r in result_rows(kept) if r in taken_rows(kept)] == taken_rows(kept) and not any(r[0].startswith("tokens/s") for r in result_rows(kept, False))
    page, card = (path / "report.html").read_text(), (path / "README.md").read_text()
    assert "<h2>Speed and memory" in page and "time to first token" in page and "tokens/s" in card and "cache, 32k tokens (MB)" in card
    assert "+100.0%" in card and "| first token (ms)" in card and repr(result).count("tokens/s") == 2


def test_it_can_be_left_out(two_kinds, monkeypatch):
    monkeypatch.setattr(pipeline, "both_taken", lambda *a, **k: pytest.fail("something was timed"))
    result, path = run(make_config(**KEYS, speed=False))
    assert "speed" not in result and "speed" not in result["seconds"] and "<h2>Speed" not in (path / "report.html").read_text()
    with pytest.raises(ReplaceMeError, match="speed_seconds is 3.0, but nothing is timed: that takes speed"):
        make_config(**KEYS, speed=False, speed_seconds=3.)
    with pytest.raises(ReplaceMeError, match="speed_seconds is -1.0: it must be at least 0"):
        make_config(**KEYS, speed_seconds=-1.)
    with pytest.raises(ReplaceMeError, match="speed is False, but nothing is timed where one model is scored"):
        make_config(EvaluateConfig, model_path="./tiny", speed=False)
    with pytest.raises(ReplaceMeError, match="means nothing for a model in memory: score the two models"):
        make_config(PruneConfig, layers_to_skip=2, speed=False)


@pytest.mark.parametrize("error", [ReplaceMeError("no prompt"), RuntimeError("no kernel"), torch.OutOfMemoryError("full")])
def test_what_goes_wrong_costs_nothing_else(two_kinds, monkeypatch, error):
    def broken(*a, **k): raise error
    monkeypatch.setattr(s, "token_times", broken)
    with pytest.warns(ReplaceMeWarning, match="goes without seconds and bytes"):
        result, path = run(make_config(**KEYS))
    assert "speed" not in result and result.perplexity.after.value and (path / "report.html").exists()


def test_whoever_interrupts_it_has_the_pruned_model(two_kinds, monkeypatch):
    def stop(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(pipeline, "both_taken", stop)
    with pytest.warns(ReplaceMeWarning, match="the pruned model is complete"), pytest.raises(KeyboardInterrupt):
        run(make_config(**KEYS))
    assert load_model("out")[0].config.num_hidden_layers == 4


@pytest.mark.parametrize("method, more", [("slicegpt", {}), ("linearpatch", {}), ("auto", dict(merge=False))])
def test_methods_with_files_of_their_own(two_kinds, monkeypatch, method, more):
    "Narrower layers, and a map beside them: the bytes are those of the model in memory"
    fake_times(monkeypatch, None)
    keys = {k: v for k, v in KEYS.items() if k != "ridge"}
    result, path = run(make_config(**{**keys, "method": method, **more}, speed_seconds=0.))
    from transformers import AutoModelForCausalLM
    saved = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    assert result.speed.weights[1] == pytest.approx(s.weight_bytes(saved), rel=1e-3) and result.speed.weights[1] < result.speed.weights[0]


def test_an_image_encoder_looks_and_does_not_write(tmp_path, monkeypatch):
    "Milliseconds a batch, by a clock that gives six layers 6 ms and four 4; no cache, no tokens"
    from transformers import ViTImageProcessor
    from replaceme.data import synthetic_images
    from replaceme.models import tiny_vision
    monkeypatch.setattr(s, "image_ms", lambda m, batch: batch * float(m.config.num_hidden_layers))
    tiny_vision("vit", layers=6).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size=dict(height=32, width=32)).save_pretrained(tmp_path / "vit")
    (tmp_path / "pictures").mkdir()
    for i, im in enumerate(synthetic_images(8)):
        im.save(tmp_path / "pictures" / f"{i}.png")
    keys = dict(model_path=str(tmp_path / "vit"), layers_to_skip=2, method="lstsq", dataset=str(tmp_path / "pictures"), dataset_size=8, batch_size=4, eval_size=2)
    result, path = run(make_config(**keys, save_path=str(tmp_path / "small"), speed_seconds=0.))
    assert [(b.batch, b.ms, b.ms_ratio[0], b.rates) for b in result.speed.batches] == [(1, [6., 4.], 4 / 6, []), (8, [48., 32.], 4 / 6, [])]
    assert result.speed.caches == [] and result.speed.layers[1] * 6 == result.speed.layers[0] * 4
    assert "8 images (ms)" in (path / "README.md").read_text() and "time, 8 images" in (path / "report.html").read_text()


def test_of_several_processes_the_first_one_measures(pair, monkeypatch):
    "Another one is told what came of it, and has not measured"
    dense, pruned, tok = pair
    asked = []
    monkeypatch.setattr(pipeline, "from_first", lambda f, *a: asked.append(f) or dict(device="told"))
    monkeypatch.setattr(s, "token_times", lambda *a: pytest.fail("measured"))
    result = {}
    assert pipeline._time_both(dense, pruned, tok, make_config(eval_dataset=None), result) is None
    assert result == dict(speed=dict(device="told")) and asked == [pipeline.both_taken]


@pytest.mark.parametrize("paces", [([1., 2., 4.], [1., 1., 6.]), ([3., 5.], [4., 2.])])
def test_table_picture_and_side_by_side_say_one_ratio(paces):
    "That of the two numbers that are shown; the pairs say how far to believe it"
    dense, pruned = map(statistics.median, paces)
    ratio = s.pair_ratio(*paces)
    assert ratio[0] == pruned / dense and ratio[1] <= ratio[0] <= ratio[2]
    batch = dict(batch=1, pairs=len(paces[0]), rates=[dense, pruned], rate_ratio=list(ratio))
    row = taken_rows(dict(speed=dict(device="cpu", batches=[batch])))[0]
    assert row[-1] == f"{100 * (ratio[0] - 1):+.1f}%"
