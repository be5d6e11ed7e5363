"""One file adds a method, its keys and a metric: they are in the YAML, in --help, in the bench and in the report, and nothing else was touched."""
import json
import sys

import pytest
import warm

from replaceme.models import tiny_model, tiny_tokenizer

TOY = '''
from dataclasses import dataclass
from replaceme.blocks import joined
from replaceme.distance import METRICS
from replaceme.keys import key
from replaceme.merge import cut
from replaceme.methods import Method, Removed, add_method
from replaceme.arch import layers_of
from replaceme.stats import n_tokens

METRICS["blocks"] = lambda x, y: (y - x).abs().sum(-1)

@dataclass
class ToyKeys:
    "Of method every_other"
    first:int = key(1, "of method every_other: the first layer that goes", least=1)

class EveryOther(Method):
    name, title, paper, keys = "every_other", "Every other", "2511.00001", (ToyKeys,)
    chose, instead = "that stand between two others", "Nothing stands in their place."
    def remove(self, model, batches, job):
        gone = [job.keys.first+2*i for i in range(job.n)]
        return cut(model, joined((i, i+1) for i in gone)), Removed(gone, n_tokens(batches))

add_method(EveryOther())
'''
WHEN = {"none": "", "before": "import toy\nfrom replaceme import cli\n", "after": "from replaceme import cli, compare\nimport toy\n"}
TEXTS = dict(dataset="texts.txt", dataset_size=8, max_length=32, eval_dataset="other.txt", eval_size=2, eval_length=32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("adding")
    tiny_model("llama", layers=6).save_pretrained(place / "tiny")
    tiny_tokenizer().save_pretrained(place / "tiny")
    (place / "texts.txt").write_text("The map stands in for the layers that went. " * 40)
    (place / "other.txt").write_text("What is left computes nearly the same as before. " * 40)
    (place / "toy.py").write_text(TOY)
    run = dict(model_path="./tiny", layers_to_skip=2, method="every_other", first=2, save_path="out", **TEXTS)
    rows = dict(model_path="./tiny", layers=[2], methods=["remove", "every_other", dict(name="measured", method="remove", metric="blocks")], save_path="rows", **TEXTS)
    (place / "run.yaml").write_text(json.dumps(run))
    (place / "rows.yaml").write_text(json.dumps(rows))
    return place


def call(place, code, when="after"):
    p = warm.run([sys.executable, "-c", WHEN[when] + code], cwd=place, capture_output=True, text=True, fresh=True)
    assert "Traceback" not in p.stderr, p.stderr
    return p


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_method_in_one_file_is_known_to_the_yaml_the_flags_and_the_report(place, when):
    said = call(place, "cli.run_replaceme(['--config', 'run.yaml'])", when)
    assert said.returncode == 0 and "every_other" in said.stdout
    r, page = json.loads((place / "out/replaceme.json").read_text()), (place / "out/report.html").read_text()
    assert r["blocks"] == [[2, 3], [4, 5]] and r["config"]["first"] == 2 and r["peer"] == dict(first=2)
    assert "that stand between two others" in page
    assert "arXiv 2511.00001" in page
    assert "Every other" in (place / "out/README.md").read_text()
    assert json.loads((place / "out/config.json").read_text())["num_hidden_layers"] == 4


def test_its_keys_are_refused_elsewhere_in_words_of_their_own(place):
    said = call(place, "cli.run_replaceme(['--config', 'run.yaml', '--method', 'uidl', '--first', '3'])")
    assert said.returncode == 2 and "first is 3, but it belongs to method every_other, and the method is uidl" in said.stderr
    said = call(place, "cli.run_replaceme(['--config', 'run.yaml', '--first', '0'])")
    assert said.returncode == 2 and "first is 0: it must be at least 1" in said.stderr
    said = call(place, "cli.run_replaceme(['--config', 'run.yaml', '--map', 'wide'])")
    assert said.returncode == 2 and "method every_other fits no map" in said.stderr


def test_help_has_headings_and_shows_the_keys_of_the_method_that_is_named(place):
    said = " ".join(call(place, "cli.run_replaceme(['--help'])").stdout.split())
    assert "Of method every_other: --first VALUE" in said and "relative_l2, influence, blocks" in said and "linearpatch" in said
    mine = " ".join(call(place, "cli.run_replaceme(['--method', 'every_other', '--help'])").stdout.split())
    assert "--first" in mine and "--threshold" not in mine and "--metric" not in mine and "--dataset" in mine
    laco = " ".join(call(place, "cli.run_replaceme(['--method', 'laco', '--help'])").stdout.split())
    assert "--threshold" in laco and "--first" not in laco


def test_the_bench_has_a_row_for_the_method_and_takes_the_metric(place):
    said = call(place, "cli.compare_methods(['--config', 'rows.yaml'])")
    assert said.returncode == 0, said.stderr
    rows = {r["method"]: r for r in json.loads((place / "rows/comparison.json").read_text())["rows"]}
    assert rows["every_other"]["blocks"] == [[1, 2], [3, 4]] and "error" not in rows["every_other"]
    assert rows["measured"]["config"]["metric"] == "blocks" and "error" not in rows["measured"]
    assert "every_other" in said.stdout and "measured" in said.stdout


def test_a_class_without_a_name_is_no_method():
    from replaceme.core import ReplaceMeError
    from replaceme.methods import Method, add_method
    for m in (Method(), Method, "lstsq"):
        with pytest.raises(ReplaceMeError, match="is no method: give an object of a class of `Method` that has a name"):
            add_method(m)


AGAIN = '''
from dataclasses import make_dataclass, fields
from replaceme.config import Config
from replaceme.core import ReplaceMeError
from replaceme.keys import key
from replaceme.methods import GROUPS, METHODS, Method, add_method
def group(name, **keys): return make_dataclass(name, [(k, int, key(v, "a toy's")) for k, v in keys.items()])
def method(*groups): return add_method(type("Toy", (Method,), dict(name="toy", keys=groups))())
def refused(*groups):
    before = [*GROUPS], dict(METHODS), {*Config.__dataclass_fields__}
    try: method(*groups)
    except ReplaceMeError as e: said = str(e)
    else: raise AssertionError("was not refused")
    assert before == ([*GROUPS], dict(METHODS), {*Config.__dataclass_fields__}), "something is half done"
    return said
'''


def test_a_method_that_is_defined_anew_leaves_nothing_behind(place):
    "Its old keys go with it, whether new ones come or not, and a class made of the configuration knows the same"
    call(place, AGAIN + '''
method(group("A", wide=4, deep=2))
assert Config(wide=5).wide == 5 and {"wide", "deep"} <= {*Config.__dataclass_fields__}
method(group("B", wide=7))
assert Config().wide == 7 and "deep" not in Config.__dataclass_fields__ and not hasattr(Config, "deep")
method()
assert "wide" not in Config.__dataclass_fields__ and not hasattr(Config, "wide")
from replaceme.compare import CompareConfig
assert "wide" not in CompareConfig.__dataclass_fields__
''').check_returncode()


def test_methods_that_share_a_group_are_defined_anew_one_by_one(place):
    "As when a file is loaded once more: the first brings the group anew while the second still has the old one; ours too"
    call(place, AGAIN + '''
def both():
    g = group("A", wide=4)
    for n in "toy", "dot": add_method(type("Toy", (Method,), dict(name=n, keys=(g,)))())
    return g
both(); g = both()
assert [x for x in GROUPS if x.__qualname__ == "A"] == [g] and Config(wide=5).wide == 5
import importlib, replaceme.ours as ours, replaceme.baselines as baselines
n = len(GROUPS)
importlib.reload(ours), importlib.reload(baselines)
assert len(GROUPS) == n and METHODS["auto"].keys[1] is ours.Choosing and ours.Choosing in GROUPS
assert Config(top_k=2).top_k == 2
''').check_returncode()


@pytest.mark.parametrize("first, then", [("__main__", "replaceme.ours"), ("replaceme.ours", "__main__")])
def test_a_notebook_and_the_module_exported_from_it_are_one(place, first, then):
    "Its cells run as __main__, before or after the module itself is imported: one set of methods, one of keys"
    call(place, f'''
import runpy
for name in {first!r}, {then!r}: runpy.run_module("replaceme.ours", run_name=name) if name == "__main__" else __import__(name)
from replaceme.registry import METHODS
from replaceme.methods import GROUPS
from replaceme.config import Config
assert len({{g.__qualname__ for g in GROUPS}}) == len(GROUPS)
assert type(METHODS["auto"]).__module__ == type(METHODS["remove"]).__module__ == {then!r}
assert Config(top_k=2).top_k == 2
''', when="none").check_returncode()


def test_the_order_of_methods_is_not_that_of_imports(place):
    "Help, errors and headings are the same whichever room was there first; a method of one's own comes last"
    said = [call(place, "print([*METHODS], [g.__name__ for g in GROUPS])".join((f"import {rooms}\nfrom replaceme.config import Config\n"
            "from replaceme.methods import GROUPS, METHODS\n", "")), when="none").stdout for rooms in (
            "replaceme.ours", "replaceme.baselines", "replaceme.llm_pruner, replaceme.streamline", "toy")]
    assert said[0].startswith("['auto', 'lstsq', 'cosine', 'remove', 'uidl'") and said[0] == said[1] == said[2]
    assert said[3].split("]")[0] == said[0].split("]")[0] + ", 'every_other'"


def test_a_name_that_is_taken_is_refused_and_nothing_is_half_done(place):
    "A key of every run, one of another method, and one of another new group"
    call(place, AGAIN + '''
method(group("A", wide=4))
assert "key seed already" in refused(group("B", seed=1))
assert "key threshold already" in refused(group("B", threshold=1))
assert "key depth already" in refused(group("B", depth=1), group("C", depth=2))
assert Config().wide == 4
''').check_returncode()
