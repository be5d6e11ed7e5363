"""What two ways of asking for the same thing say: file and flag, name and list, plan and run, result and folder, report and sums."""
import contextlib
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import replaceme.data as data
import replaceme.save as save
import replaceme.stats as stats
from replaceme import evaluate, prune, run
from replaceme.cli import get_distance_analysis, get_lt_with_lstsq, run_replaceme
from replaceme.compare import CompareConfig, check_compared, compare, eval_pieces, plans, row_config
from replaceme.config import make_config, read_config
from replaceme.core import ReplaceMeError, ReplaceMeWarning
from replaceme.cost import dry_run
from replaceme.merge import replace_block
from replaceme.models import load_model, tiny_model, tiny_tokenizer
from replaceme.pipeline import calibration_batches
from replaceme.report import report_html

ROWS = [" ".join(f"word{(7 * i + j * j) % 31} stands in" for j in range(5 + 2 * i)) for i in range(16)]
FIT = dict(dataset="a.txt", dataset_size=16, max_length=48, batch_size=4)
JUDGE = dict(eval_length=48, eval_size=4)
RUN = dict(model_path="tiny", method="lstsq", ridge=.1, prompt=None, speed=False, **FIT, **JUDGE)
UNJUDGED = {k: v for k, v in RUN.items() if k not in JUDGE} | dict(eval_dataset=None)
HELD = dict(dataset=ROWS, dataset_size=16, max_length=48, batch_size=4)


@pytest.fixture(autouse=True)
def place(two_kinds):
    warnings.simplefilter("ignore", ReplaceMeWarning)
    Path("t.jsonl").write_text("".join(json.dumps(dict(text=t, other=t[::-1])) + "\n" for t in ROWS))


def bench(**kw):
    return make_config(CompareConfig, **{**dict(model_path="tiny", methods=["lstsq"], layers=[2], **FIT, **JUDGE, eval_dataset="b.txt"), **kw})


def test_no_row_is_calibrated_on_the_texts_that_it_is_judged_by():
    "Own text on both sides, seed after seed"
    cfg, (model, tok) = bench(seeds=[0, 1, 2], dataset="self", eval_dataset="self", max_length=32, eval_length=32), load_model("tiny")
    judged = {tuple(r.tolist()) for r in eval_pieces(model, tok, cfg)}
    for p in plans(cfg):
        batches = calibration_batches(model, tok, row_config(cfg, p))
        assert judged.isdisjoint(tuple(i[m.bool()].tolist()) for b in batches for i, m in zip(b["input_ids"], b["attention_mask"]))


@pytest.mark.parametrize("keys", [{}, dict(affine=True), dict(merge=False), dict(merge=False, affine=True)], ids=str)
def test_a_map_alone_is_applied_as_its_card_says(keys):
    if keys.get("affine") and "merge" not in keys:
        tiny_model("llama", layers=6, mlp_bias=True).save_pretrained("tiny")
    asked = dict(dataset="t.jsonl", dataset_column="text", dataset_size=16, max_length=32, **keys)
    with contextlib.suppress(SystemExit):
        get_lt_with_lstsq(["--model_path", "tiny", "--layers_to_skip", "2", "--save_path", "map", *(x for k, v in asked.items() for x in (f"--{k}", str(v)))])
    model, tok = load_model("tiny")
    there = dict(model=model)
    exec(re.search(r"```python\n(.*?)```", Path("map/README.md").read_text(encoding="utf-8"), re.S)[1].replace("path/to/this/folder", "map"), there)
    want, _ = prune(model, tok, 2, method="lstsq", **asked)
    ids = torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    a, b = want(ids).logits, there["pruned"](ids).logits
    assert (a - b).norm() < 1e-4 * a.norm()
    with safe_open("map/transform.safetensors", "pt") as f:
        assert ("no MLP adds" in f.metadata()["use"]) == ("merge" in keys)


def test_a_map_of_the_state_is_never_folded():
    model, _ = load_model("tiny")
    _, r = prune(model, tiny_tokenizer(), 2, method="lstsq", merge=False, **HELD)
    with pytest.raises(ReplaceMeError, match="is not folded"):
        replace_block(model, r.blocks[0], type("F", (), dict(kind="state", T=torch.eye(32), affine=False))())


@pytest.mark.parametrize("first, then", [(["--metric", "angular"], ["--metric", "cosine"]), (["--distance_tokens", "last"], ["--distance_tokens", "all"])])
def test_a_profile_does_not_go_on_from_another_one(first, then, monkeypatch):
    "Interrupted, and asked for something else at the same place"
    base = "--model_path tiny --dataset t.jsonl --dataset_column text --dataset_size 16 --max_length 32 --batch_size 4 --resume_every 0".split()
    add, calls = stats.add_batch, []

    def profile(out, words, ends_after=None):
        calls.clear()

        def counted(*args, **kw):
            calls.append(0)
            if ends_after is not None and len(calls) > ends_after:
                raise KeyboardInterrupt
            return add(*args, **kw)
        monkeypatch.setattr(stats, "add_batch", counted)
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            get_distance_analysis([*base, "--distances_path", out, *words])
        return Path(out).is_file() and json.loads(Path(out).read_text())["distances"]
    want = profile("fresh.json", then)
    assert not profile("p.json", first, 2) and profile("p.json", then) == want


def test_a_row_that_reads_no_text_has_none_written(monkeypatch):
    monkeypatch.setattr(data, "sample_texts", lambda *a, **kw: pytest.fail("texts were written"))
    c, _ = compare(bench(methods=["lstsq", dict(name="deepest", method="uidl", simple=True)], save_path="out"))
    assert [r.get("error") for r in c.rows] == [None] * 3


@pytest.mark.parametrize("key", ["stream_weights", "stream_tokens", "resume_every", "equal_within", "quantised_twice"])
def test_what_no_row_reads_is_no_entry(key):
    with pytest.raises(ReplaceMeError, match=key):
        plans_of = bench(methods=["lstsq", {"name": "x", "method": "lstsq", key: True if key == "stream_weights" else 1}])
        [row_config(plans_of, p) for p in plans(plans_of)]


@pytest.mark.parametrize("file, flags, means", [
    ("diag: true", dict(structure="full"), ("full", None)), ("diag: true", dict(structure=None), (None, None)),
    ("structure: diag", dict(diag=False), ("full", None)), ("diag: true", dict(structure="lower"), ("lower", None)),
    ("thri: true", dict(diag=True), ("diag", None)), ("two_vectors: true", dict(rank=4), ("rank", 4)), ("two_vectors: true", {}, ("rank", 1)),
    ("diag: true", dict(thri=False), ("diag", None))])
def test_flags_win_whichever_words_are_used(file, flags, means):
    Path("c.yaml").write_text(f"model_path: tiny\nmethod: lstsq\nlayers_to_skip: 2\n{file}\n")
    cfg = read_config("c.yaml", **flags)
    assert ((cfg.structure or "full"), cfg.rank) == (means[0] or "full", means[1])


@pytest.mark.parametrize("dataset, says", [
    ([dict(path="b.txt", column="nix"), dict(path="t.jsonl", column="text")], "b.txt is plain text and has no column 'nix'"),
    (dict(path="b.txt", pack=True), "pack strings the rows"), (dict(path="t.jsonl", column="text", subset=3), "subset is 3: it must be text"),
    (dict(path="t.jsonl", split=True), "split is True: it must be text"), (dict(path="t.jsonl", column=7), "is 7: give the name of a column")], ids=str)
def test_what_a_data_set_says_of_itself_is_heeded_or_refused(dataset, says):
    with pytest.raises(ReplaceMeError, match=re.escape(says)):
        run(**{**UNJUDGED, "dataset": dataset, "layers_to_skip": 2, "save_path": "out"})


def test_a_key_for_all_data_sets_goes_to_those_that_take_it():
    "Also where some say their own, and to none that has no use for it"
    Path("u.jsonl").write_text(Path("t.jsonl").read_text())
    three = [dict(path="t.jsonl", column="other"), "u.jsonl", "a.txt"]
    texts = data.load_parts(three, column="text", tokenizer=tiny_tokenizer(), size=6)
    assert texts[0][0] == ROWS[0][::-1] and texts[1][0] == ROWS[0]
    with pytest.raises(ReplaceMeError, match="column 'nix' is said for all data sets, and each table says its own"):
        data.load_parts([three[0], "a.txt"], column="nix", tokenizer=tiny_tokenizer(), size=4)
    for split in "train", "test":
        Path("parted", split).mkdir(parents=True)
        Path("parted", split, "a.txt").write_text(f"This is {split}. " * 40)
    assert data.load_parts("parted", split="test", tokenizer=tiny_tokenizer(), size=1)[0][0].startswith("This is test")
    with pytest.raises(ReplaceMeError, match="has no column 'nix'"):
        data.load_parts("parted", column="nix", tokenizer=tiny_tokenizer(), size=1)
    text = evaluate(model_path="tiny", eval_dataset=three, eval_column="text", eval_length=16, eval_size=2)
    assert text["domains"].keys() == {"t.jsonl", "u.jsonl", "a.txt"}


@pytest.fixture
def mix(monkeypatch):
    monkeypatch.setitem(data.MIXES, "mix", ("a.txt", "b.txt"))


def test_a_name_for_several_kinds_is_judged_as_the_list_of_it(mix):
    both = [run(**RUN, layers_to_skip=2, eval_dataset=e, save_path="m")[0] for e in ("mix", ["mix"], ["a.txt", "b.txt"])]
    said = [[(d.text, d.before, d.after) for d in r.domains] for r in both]
    assert said[0] == said[1] == said[2] and len(said[0]) == 3
    assert {r.perplexity.before.stderr for r in both} == {both[0].perplexity.before.stderr}
    r, _ = run(**{**RUN, "eval_size": 5}, layers_to_skip=2, eval_dataset="mix", save_path="m")
    assert not r.get("scoring_failed") and len(r.perplexity.before.losses) == 10


def test_how_a_name_for_several_is_read_goes_to_all_of_them(mix, monkeypatch):
    Path("u.jsonl").write_text(Path("t.jsonl").read_text())
    monkeypatch.setitem(data.MIXES, "pair", ("t.jsonl", "u.jsonl"))
    parts = [d for d, _ in data.mixture(dict(path="pair", column="other", share=3))]
    assert [(str(p), p.how) for p in parts] == [(f, dict(column="other")) for f in ("t.jsonl", "u.jsonl")]


def test_a_result_is_uploaded_with_its_own_weights_alone(monkeypatch):
    keys = dict(UNJUDGED, save_path="out", blocks=[[2, 4]])
    r1, _ = run(**keys)
    r2, _ = run(**{**keys, "dataset": "b.txt"})
    monkeypatch.setattr(save, "check_hub", lambda k: None)
    sent = []
    monkeypatch.setattr(save, "push_folder", lambda folder, k: sent.append(sorted(str(f.relative_to(folder)) for f in Path(folder).rglob("*"))) or "url")
    with pytest.raises(ReplaceMeError, match="another result"):
        r1.push_to_hub("me/x")
    assert r2.push_to_hub("me/x") == "url" and "model.safetensors" in sent[0]


def test_all_chat_templates_are_uploaded(monkeypatch):
    tok = tiny_tokenizer()
    tok.chat_template = {"default": tok.chat_template, "tool_use": tok.chat_template + "TOOLS"}
    tok.save_pretrained("tiny")
    r, folder = run(**UNJUDGED, layers_to_skip=2, save_path="out")
    monkeypatch.setattr(save, "check_hub", lambda k: None)
    sent = []
    monkeypatch.setattr(save, "push_folder", lambda f, k: sent.extend(str(x.relative_to(f)) for x in Path(f).rglob("*") if x.is_file()) or "url")
    r.push_to_hub("me/x")
    assert {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} <= {*sent}


@pytest.mark.parametrize("family", ["inkling2_text", "rwkv"])
def test_a_curve_is_refused_where_layers_depend_on_more_than_the_state(family):
    try:
        model = tiny_model(family, layers=6)
    except Exception as e:
        pytest.skip(f"{family} cannot be built: {e}")
    with pytest.raises(ReplaceMeError, match="give layers_to_skip a number"):
        prune(model, tiny_tokenizer(), layers_to_skip="auto", budget="loss 9", method="remove", **HELD)


def test_several_blocks_show_the_fits_of_all():
    small, r = prune(tiny_model("llama", layers=8), tiny_tokenizer(), blocks=[[2, 3], [4, 7]], method="lstsq", ridge=.1, **HELD)
    each = r.fit.each
    assert len(each) == 2 and each[0] != each[1] and r.fit.error == pytest.approx(sum(e for e, _ in each) / 2)
    page = re.sub("<[^>]*>", "", report_html(r))
    assert "the mean of 2 blocks" in str(r) and all(f"{e:.1%}" in page for e, _ in each)


def test_the_report_names_the_quantity_that_an_error_is_of():
    for keys, of in ({}, "B − A"), (dict(merge=False), "B"):
        _, r = prune(tiny_model("llama", layers=8), tiny_tokenizer(), blocks=[[3, 5]], method="lstsq", ridge=.1, **HELD, **keys)
        assert f"Of the squared length of {of}, the map" in re.sub("<[^>]*>", "", report_html(r))


def test_one_piece_of_each_kind_has_no_interval():
    run(**RUN, layers_to_skip=2, eval_dataset="b.txt", save_path="out")
    scores = evaluate(compare=["tiny", "out"], eval_dataset=["a.txt", "b.txt"], eval_length=48, eval_size=1, speed=False)
    [line] = [x for x in str(scores).splitlines() if "perplexity (mean of 2)" in x]
    assert "[" not in line


BASE = "--model_path tiny --method lstsq --dataset t.jsonl --dataset_column text --dataset_size 8 --max_length 32 --eval_dataset a.txt --eval_size 2 " \
       "--eval_length 32 --save_path o".split()


@pytest.mark.parametrize("words", ["--blocks [[1,20]]", "--layers_to_skip 2 --structure rank --rank 100", "--layers_to_skip 2 --num_A 4",
                                   "--layers_to_skip 2 --distances_path nix.json", "--layers_to_skip 2 --device_map nix", "--layers_to_skip 2 --budget=",
                                   "--layers_to_skip 2 --recover=[[fold]]", "--layers_to_skip auto --budget="])
def test_a_dry_run_refuses_what_the_run_refuses(words, capsys):
    said = []
    for dry in (["--dry-run"], []):
        with pytest.raises(SystemExit) as e:
            run_replaceme([*BASE, *words.split(), *dry])
        assert e.value.code == 2
        said.append(capsys.readouterr().err.strip().splitlines()[-1])
    assert said[0] == said[1] and not Path("o").exists()


@pytest.mark.parametrize("keys", [dict(eval_length=1000), dict(eval_size=1), dict(layers=[9]), dict(writing="text", writing_tokens=1000)], ids=str)
def test_so_does_that_of_a_comparison(keys):
    cfg, (model, tok) = bench(save_path="cmp", **keys), load_model("tiny")
    for f in (lambda: dry_run(cfg), lambda: compare(cfg), lambda: check_compared(cfg, model, tok)):
        with pytest.raises(ReplaceMeError):
            f()
    assert not Path("cmp").exists() or not any(Path("cmp").rglob("*.json"))


def test_a_dry_run_tells_that_timing_takes_time():
    notes = dry_run(make_config(**{**UNJUDGED, "speed": True}, layers_to_skip=2)).notes
    assert any("timing both models" in n for n in notes)


@pytest.mark.parametrize("command, holds", [
    ("run_uidl", "(default: uidl)"), ("get_lt_with_lstsq", "(default: lstsq)"), ("run_streamline", "(default: streamline)"),
    ("get_distance_analysis", "the profile is written here; null makes distances.json; elsewhere: reuse the profile"),
    ("compare_methods", "null makes compared/MODEL; elsewhere: output folder"), ("compare_methods", "text for the perplexity of all models")])
def test_help_tells_what_the_command_does(command, holds, capsys):
    import replaceme.cli as cli
    with pytest.raises(SystemExit):
        getattr(cli, command)(["--help"])
    assert holds in " ".join(capsys.readouterr().out.split())


def test_neither_batches_nor_order_choose_the_neurons_that_are_borrowed():
    "Batch 1 and batch 8 agree, and of a mixture every part has a say"
    from random import Random
    draw, model = Random(0), tiny_model("llama", layers=6)
    rows = [dict(text="".join(draw.choices("abcdefgh 0123", k=n))) for n in [100, 80, 60, 3, 2, 90, 100, 40, 200, 7] * 3]
    keys = dict(method="auto", dataset=rows, dataset_size=None)
    ids = torch.arange(5, 40)[None]
    one, *others = [prune(model, tiny_tokenizer(), 2, batch_size=b, **keys)[0](ids).logits for b in (1, 2, 8)]
    assert all((x - one).norm() < 1e-3 * one.norm() for x in others)


@pytest.mark.parametrize("keys", [dict(structure="rank", rank=2), dict(alpha=1e3), {}], ids=str)
def test_behind_a_norm_the_best_turn_is_kept(keys):
    from replaceme.blocks import Block
    from replaceme.data import in_batches
    from replaceme.search import Recipe, fit_blocks
    model = tiny_model("gemma2", layers=6)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "norm" in n:
                p.add_(.3 * torch.randn(p.shape, generator=draw))
            elif p.ndim >= 2 and "embed" not in n:
                p.mul_(2)
    bs = in_batches(torch.randint(5, 60, (32, 60), generator=draw).tolist(), 8)
    errors = [fit_blocks(model, bs, [], [Block(2, 5)], Recipe(weights="inv_norm", turns=t, **keys)).fits[0].error for t in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)


def test_a_singular_system_names_what_is_wrong_and_what_helps():
    model, same = tiny_model("llama", layers=6), dict(dataset=[dict(text="a" * 100)] * 12, dataset_size=None, blocks=[[2, 4]])
    for keys, says in ((dict(method="lstsq"), r"too much alike.*a ridge \(alpha > 0 or ridge > 0\)"), (dict(method="cosine", solver="irls"), "too much alike.*solver l-bfgs"),
                       (dict(method="lstsq", structure="orthonormal"), r"too much alike.*a ridge \(ridge > 0\)")):
        with pytest.raises(ReplaceMeError, match=says):
            prune(model, tiny_tokenizer(), **keys, **same)
