"""`make data`: the public sets in the form of the protocol, from the hub as it hands them out, and told by their hashes."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import data  # noqa: E402


def test_wikitext_as_the_hub_has_it_becomes_its_own_file(data_dir):
    "On the hub each line is a row and a blank line an empty row"
    for name in ("wikitext2_valid.txt", "wikitext2_test.txt"):
        text = (data_dir / name).read_text(encoding="utf-8")
        rows = [dict(text="" if line == " \n" else line) for line in text.splitlines(True)]
        assert any(r["text"] == "" for r in rows) and data.fetch(name, lambda *a, **k: rows) == text.encode()


def test_questions_keep_their_four_columns(data_dir):
    rows = [dict(json.loads(line), id=i) for i, line in enumerate((data_dir / "piqa_valid.jsonl").read_text().splitlines())]
    assert data.fetch("piqa_valid.jsonl", lambda *a, **k: rows) == (data_dir / "piqa_valid.jsonl").read_bytes()


def test_problems_lose_their_calculator_and_say_the_answer(data_dir):
    row = dict(question="A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total does it take?",
               answer="It takes 2/2=<<2/2=1>>1 bolt of white fiber\nSo the total amount of fabric is 2+1=<<2+1=3>>3 bolts of fabric\n#### 3")
    assert data.gsm8k([row, row], 1) == (data_dir / "domains/math_test.jsonl").read_text().splitlines(True)[1]


@pytest.mark.parametrize("listed", [True, False])
def test_chats_are_every_second_seed_task(data_dir, listed):
    "Whether `instances` is a list of structs or, as `datasets` reads it, a struct of lists"
    both = [(data_dir / f"domains/chat_{n}.jsonl").read_text().splitlines() for n in ("test", "calib")]
    lines = [both[i % 2][i // 2] for i in range(175)]

    def row(line):
        asked, said = [m["content"] for m in json.loads(line)["messages"]]
        instruction, _, given = asked.partition("\n\n")
        return dict(instruction=instruction, instances=[dict(input=given, output=said)] if listed else dict(input=[given], output=[said]))
    rows = list(map(row, lines))
    assert data.fetch("domains/chat_test.jsonl", lambda *a, **k: rows) == (data_dir / "domains/chat_test.jsonl").read_bytes()
    assert data.fetch("domains/chat_calib.jsonl", lambda *a, **k: rows) == (data_dir / "domains/chat_calib.jsonl").read_bytes()


def test_what_lies_here_is_copied_and_what_is_spoilt_is_mended(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PLACES", [tmp_path, data_dir])
    assert list(data.main(tmp_path)) == [] and all(data.right(tmp_path / n, n) for n in data.SETS)
    (tmp_path / "piqa_valid.jsonl").write_text("{}")
    assert list(data.main(tmp_path)) == [] and data.right(tmp_path / "piqa_valid.jsonl", "piqa_valid.jsonl")
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]


def test_another_text_under_the_same_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PLACES", [tmp_path])
    rows = [dict(text="another", question="?", answer="#### 1", goal="", sol1="", sol2="", label=0, instruction="", instances=[dict(input="", output="")])]*2
    said = list(data.main(tmp_path, lambda *a, **k: rows))
    assert len(said) == len(data.SETS) and all("not what the numbers were made with" in line for line in said)
    there = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert there == set(data.FROM_PYTHON)  # which need no hub


def test_without_a_network_it_says_so_in_one_line(tmp_path):
    code = "import sys; sys.path.insert(0, 'benchmarks'); import data; from pathlib import Path\n" \
           "data.PLACES = []\ndef no(*a, **k): raise ConnectionError\nprint(*data.main(Path(sys.argv[1]), no), sep='\\n')"
    p = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert p.stdout.count("\n") == 1 and "make data" in p.stdout and "REPLACEME_DATA" in p.stdout


def test_code_is_the_source_of_modules_that_this_python_carries(data_dir, tmp_path, monkeypatch):
    "That which is judged by is in no calibration"
    import argparse
    import inspect
    monkeypatch.setattr(data, "PLACES", [tmp_path, data_dir])
    assert list(data.main(tmp_path)) == []
    judged, fitted = [(tmp_path / f"domains/code_{n}.txt").read_text(encoding="utf-8") for n in ("test", "calib")]
    assert judged == inspect.getsource(argparse) and inspect.getsource(argparse)[:2000] not in fitted and len(fitted) > 2 * len(judged)
