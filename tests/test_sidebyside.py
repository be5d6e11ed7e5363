"""Two models side by side: definitions in float64, bytes by hand, draws counted out, and nothing kept that should not be."""
import copy
import importlib
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import replaceme.scores
import replaceme.sidebyside as s
import replaceme.speed
from replaceme.arch import judging
from replaceme.blocks import Block
from replaceme.core import ReplaceMeError, ReplaceMeWarning, cache_dir, help_page
from replaceme.evaluate import cut_pieces, eval_tasks, perplexity, stability, task_samples
from replaceme.merge import cut
from replaceme.models import load_model, tiny_model, tiny_tokenizer, tiny_vision
from replaceme.pipeline import prune

TEXT = "Removing layers is only worth it if what remains still works. " * 12
WORDS = ["red", "blue", "sky", "moon", "cow", "door", "tea"]
ROWS = [dict(q=f"{a} and {b}", options=[WORDS[(a*k+b+2*k) % 7] for k in range(3)], answer=(a+b) % 3)
        for a in range(4) for b in range(4)]


def write_tasks(folder, rows=ROWS, **kw):
    "A multiple choice task, and one with a metric of which less is better"
    folder.mkdir(exist_ok=True)
    (folder/"q.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    base = dict(dataset_path="json", dataset_kwargs=dict(data_files=dict(validation=str(folder/"q.jsonl"))), validation_split="validation")
    metric = lambda m, up=True, agg="mean": dict(metric=m, aggregation=agg, higher_is_better=up)
    (folder/"sums.yaml").write_text(json.dumps({**base, **dict(task="sums", output_type="multiple_choice", doc_to_text="{{q}} =", doc_to_choice="{{options}}",
                                                               doc_to_target="{{answer}}", metric_list=[metric("acc_norm"), metric("acc")]), **kw}))
    (folder/"last.yaml").write_text(json.dumps({**base, **dict(task="last", output_type="loglikelihood", doc_to_text="{{q}} =", doc_to_target=" {{options[answer]}}",
                                                               metric_list=[metric("perplexity", False, "perplexity"), metric("acc")])}))
    return str(folder)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path/"cache"))


@pytest.fixture(scope="module")
def tok():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def pair():
    dense = tiny_model()
    return dense, cut(dense, [Block(2, 4)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def kept():
    return sorted(f.name for f in (cache_dir()/"scores").glob("*")) if (cache_dir()/"scores").exists() else []


# divergence

@torch.no_grad()
def slowly(dense, model, ids):
    "KL and agreement, token by token, from the definition"
    dense, model = copy.deepcopy(dense).double().eval(), copy.deepcopy(model).double().eval()
    kl, same = [], []
    for p in ids:
        q, r = [m(p[None]).logits[0, :-1].softmax(-1) for m in (dense, model)]
        kl.append(np.mean([sum((a*math.log(a/b)) for a, b in zip(x.tolist(), y.tolist())) for x, y in zip(q, r)]))
        same.append(np.mean([int(x.argmax() == y.argmax()) for x, y in zip(q, r)]))
    return kl, same


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_divergence_by_definition(family, tok):
    dense = tiny_model(family)
    model = cut(dense, [Block(3, 5)])
    ids = cut_pieces(tok, TEXT, 24, 5)
    d = s.divergence(dense.train(), model, tok, TEXT, 24, 5)
    assert dense.training and not any(p.grad is not None for p in dense.parameters())
    kl, same = slowly(dense, model, ids)
    assert d.kl == pytest.approx(kl, abs=1e-5) and d.same == pytest.approx(same)
    assert d.value == pytest.approx(np.mean(kl), abs=1e-5) and d.stderr == pytest.approx(np.std(kl, ddof=1)/5**.5, abs=1e-5)
    assert d.agreement_stderr == pytest.approx(np.std(same, ddof=1)/5**.5)
    for m, p in zip((dense, model), d.perplexities()):
        ref = perplexity(m, tok, TEXT, 24, 5)
        assert (p.loss, p.stderr) == pytest.approx((ref.loss, ref.stderr), abs=1e-5) and p.tokens == ref.tokens == d.tokens == 5*23


def test_divergence_is_small_for_small_changes(pair, tok):
    "Differences far below float32's rounding of a loss are seen, and are quadratic in the change"
    near = []
    for eps in (1e-3, 2e-3):
        m = copy.deepcopy(pair[0])
        with torch.no_grad():
            m.lm_head.weight += eps*torch.randn(m.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        near.append(s.divergence(pair[0], m, tok, TEXT, 24, 5).value)
    assert 0 < near[0] < 1e-3 and near[1]/near[0] == pytest.approx(4, rel=.05)
    one = s.divergence(*pair, tok, TEXT, 24, 1)
    assert one.stderr is None and one.agreement_stderr is None
    assert repr(one).startswith("KL ")


def test_tokens_that_are_ruled_out():
    "Masked entries of the vocabulary are -inf in both models and add nothing"
    q = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    r = q.flip(0)
    x = torch.zeros(4, dtype=torch.long)
    masked = [torch.cat([l, torch.full((4, 3), -math.inf)], 1) for l in (q, r)]
    assert torch.allclose(s.row_divergence(*masked, x), s.row_divergence(q, r, x), atol=1e-12)
    assert s.row_divergence(q, masked[1][:, 3:], x)[0] == math.inf  # what the dense model holds possible and the other one does not


def test_divergence_refuses(pair, tok):
    with pytest.raises(ReplaceMeError, match="vocabularies of 320 and of 300"):
        s.divergence(pair[0], tiny_model(vocab=300), tok, TEXT)
    with pytest.raises(ReplaceMeError, match="256 positions"):
        s.divergence(*pair, tok, TEXT, 512)
    broken = copy.deepcopy(pair[1])
    broken.lm_head.weight.data[3] = math.nan
    with pytest.raises(ReplaceMeError, match="overflow"):
        s.divergence(pair[0], broken, tok, TEXT, 24, 2)


# latency

def test_every_token_is_written(pair, tok, monkeypatch):
    "The right number of tokens, greedily, with a cache, whatever the checkpoint's own settings"
    m = copy.deepcopy(pair[0])
    m.generation_config.do_sample, m.generation_config.eos_token_id = True, list(range(320))  # would sample, and stop at once
    seen, real, config = [], type(m).generate, m.generation_config
    monkeypatch.setattr(type(m), "generate", lambda self, **kw: seen.append(real(self, **kw)) or seen[-1])
    ids = s.prompt_of(tok, m, 10, 3, 6)
    times = s.token_times(m, tok, ids, 6)
    assert len(times) == 6 and times == sorted(times) and m.generation_config is config
    ref = ids
    with judging(m):
        for _ in range(6):
            ref = torch.cat([ref, m(ref).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(seen[0], ref)


@pytest.mark.parametrize("family", ["gpt2", "mamba", "gemma3_text", "rwkv"])
def test_families_are_timed(family, tok):
    speed, = s.latency(tiny_model(family, layers=2), tok, 5, 3, (2,), repeats=2, warmup=0)
    assert (speed.batch, len(speed.first_ms), len(speed.rates)) == (2, 2, 2) and min(speed.first_ms+speed.rates) > 0


def test_taking_turns(pair, tok, monkeypatch):
    "Warm-up runs are not counted, repeats are pairs, and the first of a pair alternates"
    calls = []
    monkeypatch.setattr(replaceme.speed, "token_times", lambda m, *a: calls.append(pair.index(m)) or [len(calls), len(calls)+1])
    runs = s.in_turns(pair, tok, None, 2, repeats=3, warmup=1)
    assert calls == [1, 0, 0, 1, 1, 0, 0, 1]
    assert [[r[0] for r in rs] for rs in runs] == [[3, 6, 7], [4, 5, 8]]


def test_ratios_are_of_pairs(pair, tok, monkeypatch):
    "A computer that gets slower from pair to pair; the other model always needs half"
    calls = itertools.count()

    def slow(m, *a):
        f = (1+next(calls)//2)*(2 if m is pair[0] else 1)
        return [f, 2*f, 4*f]
    monkeypatch.setattr(replaceme.speed, "token_times", slow)
    (r,) = s.side_by_side_latency(*pair, tok, 8, 3, (4,), repeats=3)  # the first pair is the warm-up
    assert r.dense.first_ms == [4e3, 6e3, 8e3] and r.first_ratio == (.5, .5, .5) and r.rate_ratio == (2, 2, 2)
    assert r.dense.rate == pytest.approx(4*2/18) and r.model.first == 3e3


@pytest.mark.parametrize("kw, message", [(dict(prompt_tokens=0), "takes at least"), (dict(new_tokens=1), "takes at least"), (dict(batch_sizes=(0,)), "takes at least"),
                                         (dict(prompt_tokens=250), "256 positions")])
def test_impossible_latencies(kw, message, pair, tok):
    with pytest.raises(ReplaceMeError, match=message):
        s.latency(pair[0], tok, **kw)


# memory

@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_by_hand(dtype, size):
    m = tiny_model("llama", layers=5, d=64, num_key_value_heads=2).to(dtype)
    c = m.config
    mem = s.memory_of(m, 2048, 3)
    assert mem.cache == 2*c.num_hidden_layers*c.num_key_value_heads*c.head_dim*size*2048*3
    assert mem.weights == size*sum(p.numel() for p in m.parameters())
    assert s.memory_of(cut(m, [Block(1, 3)]), 2048, 3).cache*5 == mem.cache*3


def test_tied_weights_count_once():
    m = tiny_model("llama", tie_word_embeddings=True)
    assert s.weight_bytes(m) == 4*sum(p.numel() for p in m.parameters())  # parameters() names each once
    m.lm_head.weight = torch.nn.Parameter(m.lm_head.weight.data)  # two parameters, one storage
    assert s.weight_bytes(m) == 4*(sum(p.numel() for p in m.parameters())-m.lm_head.weight.numel())


def test_quantised_weights_as_stored(tmp_path):
    pytest.importorskip("bitsandbytes")
    dense = tiny_model("llama", layers=2, d=64)
    dense.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    small, _ = load_model(tmp_path, use_4bit=True)
    linear = sum(m.weight.numel() for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n)
    rest = sum(p.numel()*p.element_size() for n, p in small.named_parameters() if p.dtype.is_floating_point)
    extra = s.weight_bytes(small)-rest-linear//2  # scales and tables
    assert 0 < extra < linear


@pytest.mark.parametrize("family, kw", [("llama", {}), ("gpt2", {}), ("mistral", dict(sliding_window=8)), ("gemma3_text", {}), ("deepseek_v3", {}), ("qwen3_next", {}),
                                        ("falcon_h1", {}), ("mamba2", {}), ("gemma3n_text", {})])
def test_cache_is_that_of_a_long_run(family, kw):
    m = tiny_model(family, **kw)
    with judging(m):
        assert s.cache_bytes(m, 100) == sum(replaceme.speed._cached_bytes(m, 100)[1])
        assert s.cache_bytes(m, 5) <= s.cache_bytes(m, 100)


def tensors_of(o, seen):
    "Every tensor anywhere in an object, once"
    if isinstance(o, torch.Tensor): seen[o.data_ptr(), o.shape] = o.numel()*o.element_size()*(o.ndim > 0)
    elif isinstance(o, (list, tuple)): [tensors_of(v, seen) for v in o]
    elif isinstance(o, dict): [tensors_of(v, seen) for v in o.values()]
    elif type(o).__module__.startswith("transformers") and "Config" not in type(o).__name__: tensors_of(getattr(o, "__dict__", {}), seen)
    return seen


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "minimax", "deepseek_v4", "nemotron_h"])
def test_cache_is_all_that_the_model_keeps(family):
    m = tiny_model(family)
    for n in (5, 20, 150, 200):  # below a window of 16, past it, and with and without a rest of what is compressed
        ids = torch.arange(n)[None] % 300
        with judging(m):
            held = tensors_of(m(input_ids=ids, use_cache=True).past_key_values, {})
        assert s.cache_bytes(m, n) == sum(held.values()), n
    assert replaceme.speed.caches_at(m, (20, 200)) == [s.cache_bytes(m, n) for n in (20, 200)]


def test_no_cache_is_none():
    assert s.memory_of(tiny_model("recurrent_gemma", layers=3)).cache is None


# retained

def record(scores, options=4, metric="acc"):
    qs = [dict(id=i, asked=str(i), scores={metric: float(v)}, **(dict(loglik=[0.]*options) if options else {})) for i, v in enumerate(scores)]
    return dict(scores={metric: float(np.mean(scores)), metric+"_stderr": .1, "shots": 0, "samples": len(qs)}, better=[metric], questions=qs)


def counted_out(b, a, c=0):
    "The ends of the interval over all equally likely draws; these cases have no end within three standard deviations of a step"
    n = range(len(b))
    ratios = sorted(100*sum(a[i]-c for i in d)/t if (t := sum(b[i]-c for i in d)) > 0 else math.inf for d in itertools.product(n, repeat=len(b)))
    low, high = [None if (v := ratios[int(k)]) == math.inf else v for k in (.025*len(ratios), .975*len(ratios))]
    t, (lost, won) = sum(b)-len(b)*c, [sum(max(s*(x-y), 0) for x, y in zip(b, a)) for s in (1, -1)]
    most = [scipy.stats.beta.ppf(.975, k+1, len(b)-k) for k in (lost, won)]  # Clopper and Pearson
    near = [100*max(t+won-len(b)*most[0], -len(b)*c)/t, 100*min(t-lost+len(b)*most[1], len(b)*(1-c))/t]  # scores stay from 0 to 1
    return [min(low, near[0]), None if high is None else max(high, near[1])]


@pytest.mark.parametrize("b, a", [([1, 1, 1, 0], [0, 1, 1, 1]), ([1, 1, 1, 1], [1, 0, 1, 0]), ([1, 1, 1, 1, 0], [0, 0, 1, 1, 0])])
@pytest.mark.parametrize("options", [0, 4])
def test_intervals_counted_out(b, a, options):
    got = s.retained({"t": record(b, options)}, {"t": record(a, options)})["tasks"]["t"]["acc"]
    assert got["percent"] == pytest.approx(100*sum(a)/sum(b)) and got["questions"] == len(b)
    assert [got["low"], got["high"]] == pytest.approx(counted_out(b, a), abs=1e-9)
    c = 1/options if options else 0
    assert got["above"] == pytest.approx(100*(sum(a)-len(a)*c)/(sum(b)-len(b)*c))
    assert [got["above_low"], got["above_high"]] == pytest.approx(counted_out(b, a, c), abs=1e-9)


@pytest.mark.parametrize("b, a", [([1, 0, 0, 0], [0, 0, 0, 0]), ([1, 0, 0, 0], [1, 0, 0, 0])])
def test_what_is_left_of_a_score_is_no_less_than_nothing(b, a):
    found = s.retained(dict(x=record(b), y=record(b)), dict(x=record(a), y=record(a)))
    for share in (found["tasks"]["x"]["acc"], found["mean"]):
        assert share["low"] > -1e-9


def test_retained_edges():
    zero = s.retained({"t": record([0]*9)}, {"t": record([1]*9)})
    assert [zero["mean"][k] for k in ("percent", "low", "high", "above")] == [None]*4
    guess = s.retained({"t": record([1, 0, 0, 0]*9)}, {"t": record([0]*36)})["mean"]
    assert guess["percent"] == 0 and guess["above"] is None  # the dense model only guesses
    plain = s.retained({"t": dict(acc=.5, acc_stderr=.1, perplexity=9., shots=0, samples=4)}, {"t": dict(acc=.4, acc_stderr=.1, perplexity=12., shots=0, samples=4)})
    assert list(plain["tasks"]["t"]) == ["acc"] and plain["mean"]["percent"] == pytest.approx(80) and plain["mean"]["low"] is None and plain["mean"]["above"] is None
    with pytest.raises(ReplaceMeError, match="the same tasks"):
        s.retained({"t": record([1])}, {})
    other = record([1, 0])
    other["questions"][1]["asked"] = "with a shot"
    with pytest.raises(ReplaceMeError, match="put differently"):
        s.retained({"t": record([1, 0])}, {"t": other})


def test_mean_of_tasks_draws_within_tasks():
    b, a = dict(x=record([1, 1, 1, 0]*50), y=record([1, 0]*30)), dict(x=record([1, 1, 0, 0]*50), y=record([1, 0, 0, 1]*15))
    m = s.retained(b, a)["mean"]
    assert m["percent"] == pytest.approx(100*(.5+.5)/(.75+.5)) and m["tasks"] == 2
    R = m["percent"]/100
    u = [np.array([q["scores"]["acc"] for q in a[t]["questions"]])-R*np.array([q["scores"]["acc"] for q in b[t]["questions"]]) for t in "xy"]
    se = 100*(u[0].var()/200+u[1].var()/60)**.5/1.25
    assert [m["low"], m["high"]] == pytest.approx([100*R-1.96*se, 100*R+1.96*se], abs=.25*se)
    assert s.retained(b, a) == s.retained(b, a) and s.retained(b, a, seed=1) != s.retained(b, a)


def test_records_are_what_lm_eval_says(pair, tok, folder):
    r = s.task_records(pair[0], tok, folder)
    assert {t: v["scores"] for t, v in r.items()} == eval_tasks(pair[0], tok, folder)
    assert r["last"]["better"] == ["acc"] and s.metrics_of(r["sums"]) == ["acc", "acc_norm"]
    for t in r:
        for m in s.metrics_of(r[t]):
            assert np.mean([q["scores"][m] for q in r[t]["questions"]]) == pytest.approx(r[t]["scores"][m])
    a = s.task_records(pair[1], tok, folder)
    st = s.record_stability(r, a)
    assert list(st) == ["sums"] and st["sums"]["stability"] == pytest.approx(
        stability(task_samples(pair[0], tok, "sums", include_path=folder), task_samples(pair[1], tok, "sums", include_path=folder), "loss"))
    assert s.retained(r, a)["mean"]["tasks"] == 2


# kept by content

@pytest.fixture
def counter(monkeypatch):
    "How often each expensive thing is done"
    n = dict(perplexity=0, task_records=0, divergence=0, side_by_side_latency=0)

    def counted(name, f):
        def g(*a, **kw):
            n[name] += 1
            return f(*a, **kw)
        return g
    for name in n:
        room = s if name == "side_by_side_latency" else replaceme.scores
        monkeypatch.setattr(room, name, counted(name, getattr(room, name)))
    return n


def test_one_weight_one_word_one_folder(tok, tmp_path, counter):
    "Other content is computed, the same content elsewhere is not, and no folder's name counts"
    place = tmp_path/"model"

    def score(folder):
        model, t = load_model(folder)
        return s.kept_perplexity(model, t, TEXT, 24, 3)["loss"]

    def save(model, folder=place):
        model.save_pretrained(folder), tok.save_pretrained(folder)
    save(tiny_model())
    first = score(place)
    assert (score(place), counter["perplexity"]) == (first, 1)
    save(tiny_model(), tmp_path/"elsewhere")
    assert (score(tmp_path/"elsewhere"), counter["perplexity"]) == (first, 1)
    changed = tiny_model()
    with torch.no_grad():
        changed.model.layers[3].mlp.down_proj.weight[5, 7] += 1e-3
    save(changed)  # under the old name
    second = score(place)
    assert second != first and counter["perplexity"] == 2
    config = json.loads((place/"config.json").read_text())
    (place/"config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))  # the same weights
    assert score(place) not in (first, second) and counter["perplexity"] == 3
    (place/"config.json").write_text(json.dumps(config))
    assert (score(place), counter["perplexity"]) == (second, 3)


def test_every_argument_counts(pair, tok, counter):
    base = dict(text=TEXT, length=24, pieces=3)
    for kw in (base, base, {**base, "text": TEXT[1:]}, {**base, "length": 16}, {**base, "pieces": 2}):
        s.kept_perplexity(pair[0], tok, **kw)
    assert counter["perplexity"] == 4 == len(kept())
    s.kept_perplexity(pair[0], tiny_tokenizer(add_bos=True), **base)
    s.kept_perplexity(copy.deepcopy(pair[0]).double(), tok, **base)
    assert counter["perplexity"] == 6
    s.kept_perplexity(pair[0], tok, **base, cache=False)
    assert counter["perplexity"] == 7 and len(kept()) == 6  # neither read nor written


def test_pairs_are_ordered(pair, tok, counter):
    a, b = [s.kept_divergence(*p, tok, TEXT, 24, 3) for p in (pair, pair[::-1])]
    assert counter["divergence"] == 2 and a.losses == b.other_losses and a.kl != b.kl
    assert s.kept_divergence(*pair, tok, TEXT, 24, 3) == a and counter["divergence"] == 2


def test_tasks_count_by_content(pair, tok, folder, tmp_path, counter):
    ask = lambda tasks, limit=None, **kw: s.kept_tasks(pair[0], tok, tasks, limit, **kw)
    first = ask(folder)
    assert ask(folder) == first and ask(write_tasks(tmp_path/"copied")) == first and counter["task_records"] == 1
    ask(folder, 3), ask({"sums": 1, "last": None}, include_path=folder), ask(write_tasks(tmp_path/"reworded", doc_to_text="{{q}}:"))
    ask(write_tasks(tmp_path/"changed", [{**ROWS[0], "q": "else"}, *ROWS[1:]])), ask(write_tasks(tmp_path/"version", metadata=dict(version=2)))
    assert counter["task_records"] == 6
    with pytest.raises(ReplaceMeError, match="limit is 0"):
        ask(folder, 0)


@pytest.mark.parametrize("name", ["evaluate", "divergence", "tasks", "scores"])
def test_the_programs_of_every_room_that_makes_scores_count(name, tmp_path, monkeypatch):
    "A room that is written anew makes new scores"
    versions, room = replaceme.scores.score_versions, importlib.import_module(f"replaceme.{name}")
    (tmp_path/"other.py").write_text(Path(room.__file__).read_text() + "\n# another line")
    versions.cache_clear()
    old = versions()["programs"]
    monkeypatch.setattr(room, "__file__", str(tmp_path/"other.py"))
    versions.cache_clear()
    assert versions()["programs"] != old
    versions.cache_clear()


def test_versions_count(monkeypatch):
    old = s.score_path("x", {})
    for k in ("torch", "transformers", "lm-eval", "replaceme", "programs"):
        monkeypatch.setattr(replaceme.scores, "score_versions", lambda real=s.score_versions(), k=k: {**real, k: "other"})
        assert s.score_path("x", {}) != old
        monkeypatch.undo()
        monkeypatch.setenv("REPLACEME_CACHE", str(old.parents[1]))


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"hash": "0", "result": {"n": 0}}', b"\xff\xfe"])
def test_damaged_files_are_computed_again(damage):
    n = itertools.count(1)
    make = lambda: dict(n=next(n))
    assert s.cached("x", {}, make) == s.cached("x", {}, make) == dict(n=1)
    path = s.score_path("x", {})
    path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert s.cached("x", {}, make) == s.cached("x", {}, make) == dict(n=2)


def test_written_whole_or_not_at_all(monkeypatch):
    "A write that fails leaves no file, and the result is still there"
    real = os.replace

    def fails(a, b):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", fails)
    with pytest.warns(ReplaceMeWarning, match="could not be kept"):
        assert s.cached("x", {}, lambda: dict(n=1)) == dict(n=1)
    assert kept() == []
    monkeypatch.setattr(os, "replace", lambda a, b: (json.loads(a.read_text()), real(a, b)))  # complete when it gets its name
    assert s.cached("x", {}, lambda: dict(n=2)) == dict(n=2) and len(kept()) == 1
    with pytest.raises(ZeroDivisionError):
        s.cached("y", {}, lambda: 1/0)
    assert len(kept()) == 1


def test_hooks_are_not_kept(pair, tok, counter):
    m = copy.deepcopy(pair[0])
    h = m.model.layers[1].register_forward_hook(lambda mod, a, out: None)
    for _ in range(2):
        s.kept_perplexity(m, tok, TEXT, 24, 2)
    assert counter["perplexity"] == 2 and kept() == []
    h.remove()
    assert s.keepable(m)


def test_results_are_the_same_read_or_computed(pair, tok, folder):
    new, old = [s.kept_tasks(pair[0], tok, folder) for _ in range(2)]
    assert new == old == s.kept_tasks(pair[0], tok, folder, cache=False)
    assert s.task_records(pair[0], tok, folder) == new


# all of it

def test_side_by_side(pair, tok, folder, counter):
    ask = lambda: s.side_by_side(*pair, tok, TEXT, folder, prompts=["Hi"], length=24, pieces=4, text_name="toy", context=100, speed=dict(prompt_tokens=4, new_tokens=3, batch_sizes=(1,)))
    r = ask()
    again = ask()
    assert counter == dict(perplexity=0, task_records=2, divergence=1, side_by_side_latency=2)  # seconds are measured again
    assert again.divergence == r.divergence and again.records == r.records and again.retained == r.retained
    rows = {x[0]: x[1:] for x in r.rows()}
    assert rows["KV cache of 100 tokens (MB)"][2] == pytest.approx(100*4/6)
    assert rows["perplexity (toy)"][2] == pytest.approx(100*math.exp(np.mean(np.subtract(r.divergence.other_losses, r.divergence.losses))))
    assert rows["perplexity (toy)"][3] < rows["perplexity (toy)"][2] < rows["perplexity (toy)"][4]
    assert rows["sums acc (0-shot)"][2] == r.retained["tasks"]["sums"]["acc"]["percent"]
    for text in (r.table(), r.markdown(), repr(r), r._repr_markdown_()):
        assert all(label in text for label in rows) and "95%" in text
    plain = r.to_dict()
    assert plain == json.loads(json.dumps(plain)) and "records" not in plain
    assert plain["tasks"][1]["sums"] == r.records[1]["sums"]["scores"] and plain["divergence"]["value"] == r.divergence.value
    ax = r.plot()
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert ax.get_xlabel() == "pruned, in percent of dense" and set(labels) == {k for k, v in rows.items() if v[2] is not None}


def test_only_what_is_asked_for(pair, tok):
    r = s.side_by_side(*pair, tok, speed=False)
    assert [x[0] for x in r.rows()] == ["parameters (M)", "weights (MB)", "KV cache of 256 tokens (MB)"]  # it has no more positions
    assert r.divergence is r.records is r.speeds is None and r.to_dict()["answers"] == []
    with pytest.raises(ReplaceMeError, match="image encoder"):
        s.side_by_side(pair[0], tiny_vision("vit"), tok)
    with pytest.raises(ReplaceMeError, match="vocabularies"):
        s.side_by_side(pair[0], tiny_model(vocab=300), tok)


# the states behind the cut

@pytest.mark.parametrize("keys, blocks", [(dict(method="lstsq"), None), (dict(method="auto", merge=False), None), (dict(method="lstsq", blocks=[[1, 2], [3, 5]]), [(1, 2), (3, 5)])], ids=str)
def test_state_errors_are_those_of_the_hidden_states(tmp_path, keys, blocks):
    "Against what transformers hands out: the state that each layer reads, in float64, of each model by itself"
    (tmp_path / "t.txt").write_text("The map stands in for the layers that went. " * 60)
    dense = tiny_model(layers=7)
    small, result = prune(dense, tiny_tokenizer(), None if blocks else 2, dataset=str(tmp_path / "t.txt"), dataset_size=8, max_length=48, **keys)
    ids = torch.randint(3, 250, (3, 20), generator=torch.Generator().manual_seed(0))
    errs = s.state_errors(dense, small, result["blocks"], ids)
    gone = [l for a, b in result["blocks"] for l in range(a, b)]
    kept = [l for l in range(7) if l not in gone]
    with torch.no_grad():
        ends = []
        hook = lambda mod, args: ends.append(args[0])  # what the last norm reads; hidden_states ends behind it
        handles = [m.model.norm.register_forward_pre_hook(hook) for m in (dense, small)]
        h, g = [[*m(ids, output_hidden_states=True).hidden_states[:-1], ends[-1]] for m in (dense, small)]
        for handle in handles:
            handle.remove()
    assert list(errs) == [l for l in [*kept, 7] if l > result["blocks"][0][0]]
    for i, l in enumerate([*kept, 7]):
        if l in errs:
            ref = (g[i].double() - h[l].double()).norm(dim=-1) / h[l].double().norm(dim=-1)
            assert torch.allclose(errs[l], ref, rtol=1e-5, atol=1e-7) and ref.max() > 1e-3
    pic = s.error_picture(errs, ids, tiny_tokenizer())
    assert json.loads(json.dumps(pic)) == pic and pic["tokens"] == 60 and len(pic["words"]) == 20
    assert pic["grid"][0][0] == pytest.approx(errs[min(errs)][:, 0].mean().item(), abs=1e-6)


# names of these rooms that are younger than the rooms, and were never found elsewhere
SINCE = dict(speed="""CONTEXTS DOSES Meter Takes both_taken caches_at card_meter depth_bytes energy_meter image_ms image_pace pairs_within
                      processor_meter untimed writing_pace""".split(), scores=["generation_key"], intervals=["nearest_ends", "share_ends", "stretched"])


@pytest.mark.parametrize("name", ["divergence", "intervals", "speed", "tasks", "scores"])
def test_what_has_a_room_of_its_own_is_found_where_it_was(name):
    "Every public name of the rooms can be imported from `sidebyside`, and an error in them has the page it had"
    room = importlib.import_module(f"replaceme.{name}")
    names = set(room.__all__) - {*SINCE.get(name, [])}
    assert names <= set(s.__all__) and all(getattr(s, n) is getattr(room, n) for n in names)
    assert help_page(room.__name__) == help_page("replaceme.sidebyside")
