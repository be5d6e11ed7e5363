"""lm-eval's tasks through the chat template: what the model is really asked, at every door, and in every key."""
import json

import pytest
import yaml

import replaceme.evaluate as e
import replaceme.sidebyside as s
from replaceme.cli import evaluate_model
from replaceme.core import ReplaceMeError
from replaceme.models import tiny_model, tiny_tokenizer
from replaceme.pipeline import evaluate, make_config, prune, run  # noqa: F401


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    "Three sums, one of them solved before the question"
    folder = tmp_path_factory.mktemp("tasks")
    rows = [dict(q=f"What is {i} and {i}?", right=str(2*i), wrong=str(2*i+1)) for i in range(1, 4)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "sums.yaml").write_text(yaml.safe_dump(dict(
        task="sums", dataset_path="json", dataset_kwargs=dict(data_files=dict(train=str(folder / "sums.jsonl"), validation=str(folder / "sums.jsonl"))),
        output_type="multiple_choice", validation_split="validation", fewshot_split="train", num_fewshot=1, doc_to_text="{{q}}", doc_to_target=0,
        doc_to_choice=["{{right}}", "{{wrong}}"], metric_list=[dict(metric="acc")])))
    return str(folder)


@pytest.fixture
def asked(monkeypatch):
    "What lm-eval's model is given"
    found, inner = [], e._count_tokens

    def noted(lm):
        real = lm.loglikelihood
        lm.loglikelihood = lambda requests, **kw: (found.extend(r.args[0] for r in requests), real(requests, **kw))[1]
        return inner(lm)
    monkeypatch.setattr(e, "_count_tokens", noted)
    return found


def test_questions_go_through_the_template(tasks, asked):
    model, tok = tiny_model(layers=2), tiny_tokenizer()
    e.eval_tasks(model, tok, tasks)
    plain = list(asked)
    asked.clear()
    e.eval_tasks(model, tok, tasks, chat=dict(apply_chat_template=True, fewshot_as_multiturn=True, system_instruction="Be brief."))
    assert len(plain) == len(asked) == 6 and not any("[user]" in a for a in plain)
    for a in asked:
        assert a.count("[user]") == 2 and a.count("[assistant]") == 1 and a.count("Be brief.") == 1  # the solved one is a turn of its own
    asked.clear()
    e.eval_tasks(model, tok, tasks, chat=dict(apply_chat_template=True))
    assert all(a.count("[user]") == 1 for a in asked)  # here it stands in the one message


def test_scores_of_the_two_ways_are_kept_apart(tasks, asked, tmp_path, monkeypatch):
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path))  # what an earlier run kept would not be asked again
    model, tok = tiny_model(layers=2, seed=3), tiny_tokenizer()
    plain = s.kept_tasks(model, tok, tasks)
    asked.clear()
    chat = s.kept_tasks(model, tok, tasks, chat=dict(apply_chat_template=True))
    assert asked and plain["sums"]["questions"][0]["loglik"] != chat["sums"]["questions"][0]["loglik"]
    asked.clear()
    assert s.kept_tasks(model, tok, tasks) == plain and s.kept_tasks(model, tok, tasks, chat=dict(apply_chat_template=True)) == chat and not asked


def test_a_tokenizer_without_a_template_is_refused(tasks):
    tok = tiny_tokenizer()
    tok.chat_template = None
    with pytest.raises(ReplaceMeError, match="no chat template"):
        e.eval_tasks(tiny_model(layers=2), tok, tasks, chat=dict(apply_chat_template=True))


PARTS = "{% for m in messages %}{{ '[' + m.role + '] ' }}{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %}{% endfor %}"
MUTE = "{% for m in messages %}[{{ m.role }}]{% endfor %}"


@pytest.mark.parametrize("more", [{}, dict(fewshot_as_multiturn=True, system_instruction="Be brief.")])
def test_words_reach_a_template_that_wants_parts(tasks, asked, more):
    tok = tiny_tokenizer()
    tok.chat_template = PARTS
    e.eval_tasks(tiny_model(layers=2), tok, tasks, chat=dict(apply_chat_template=True, **more))
    assert asked and all(a.count("What is") == 2 and "Be brief." * bool(more) in a for a in asked)
    assert tok.decode(e.prompt_ids(tok, "Why?")["input_ids"][0]) == "[user] Why?"


def test_a_template_that_writes_no_words_is_refused(tasks, save_tiny, tmp_path):
    "Before anything is asked; a prompt of no tokens as well"
    tok = tiny_tokenizer()
    tok.chat_template = MUTE
    with pytest.raises(ReplaceMeError, match="nothing of what is said"):
        e.eval_tasks(tiny_model(layers=2), tok, tasks, chat=dict(apply_chat_template=True))
    folder = save_tiny(tmp_path) / "tiny"
    for template, why in (MUTE, "nothing of what is said"), ("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}", "no token is made of the prompt 'Why'"):
        (folder / "chat_template.jinja").write_text(template)
        cfg = make_config(model_path=str(folder), dataset="python-docs", dataset_size=4, max_length=32, eval_dataset=None, layers_to_skip=2, prompt="Why",
                          save_path=str(tmp_path / "out"))
        with pytest.raises(ReplaceMeError, match=why):
            run(cfg)


@pytest.mark.parametrize("keys, why", [(dict(apply_chat_template=True), "no tasks"), (dict(system_instruction="x"), "no tasks"),
                                       (dict(tasks=["sums"], fewshot_as_multiturn=True), "apply_chat_template")])
def test_what_would_be_ignored_is_refused(keys, why):
    with pytest.raises(ReplaceMeError, match=why):
        make_config(model_path="x", layers_to_skip=2, **keys)


def test_every_door_asks_so(tasks, asked, save_tiny, tmp_path):
    "A run before and after, an evaluation, two models side by side, and a comparison"
    from replaceme.compare import CompareConfig, compare
    from replaceme.pipeline import EvaluateConfig
    tiny = str(save_tiny(tmp_path) / "tiny")
    both = dict(model_path=tiny, dataset="python-docs", dataset_size=4, max_length=32, eval_dataset=None, tasks=tasks, apply_chat_template=True)
    run(make_config(**both, layers_to_skip=2, prompt=None, save_path=str(tmp_path / "out")))
    assert len(asked) == 12 and all("[user]" in a for a in asked)
    asked.clear()
    evaluate(make_config(EvaluateConfig, model_path=tiny, eval_dataset=None, tasks=tasks, apply_chat_template=True, cache=False))
    evaluate(make_config(EvaluateConfig, compare=[tiny, str(tmp_path / "out")], eval_dataset=None, prompt=None, tasks=tasks, apply_chat_template=True,
                         cache=False, speed=False))
    assert len(asked) == 18 and all("[user]" in a for a in asked)
    asked.clear()
    compare(make_config(CompareConfig, **{**both, "eval_dataset": "python-docs"}, eval_size=2, eval_length=32, methods=["remove"], layers=[2],
                        save_path=str(tmp_path / "bench")))
    assert len(asked) == 12 and all("[user]" in a for a in asked)


def test_a_flag_does_it_too(tasks, asked, save_tiny, tmp_path, capsys):
    tiny = str(save_tiny(tmp_path) / "tiny")
    evaluate_model(["--model_path", tiny, "--eval_dataset", "null", "--tasks", tasks, "--apply_chat_template", "true", "--cache", "false"])
    assert asked and all("[user]" in a for a in asked) and "sums acc" in capsys.readouterr().out
