"""Tables as strangers bring them: formats, columns and chats, rows that give no text, and what is said of files that will not do."""
import bz2
import gzip
import io
import json
import lzma
import pickle
import random
import warnings
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_dataset_builder

from replaceme import data
from replaceme.cli import parse
from replaceme.core import ReplaceMeError, ReplaceMeWarning
from replaceme.data import data_name, load_texts, named
from replaceme.models import tiny_model, tiny_tokenizer
from replaceme.pipeline import eval_text, make_config, prune, read_config, training_batches

TOK = tiny_tokenizer()
BARE = tiny_tokenizer()
BARE.chat_template = None
ROWS = [dict(text=f"This is text {i}, with commas.", stars=i) for i in range(9)]
TEXTS = [r["text"] for r in ROWS]
HI = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello")]
HELLO = "<s>[user] Hi\n[assistant] Hello\n"
LINES = "\n".join(map(json.dumps, ROWS)).encode()


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    "A cache of its own for each test."
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def texts(dataset, **kw):
    return load_texts(dataset, **dict(dict(tokenizer=TOK, size=None), **kw))


def fails(say, *args, **kw):
    "One sentence of our own that holds `say`."
    with pytest.raises(ReplaceMeError) as e:
        texts(*args, **kw)
    assert say in str(e.value) and "\n" not in str(e.value), str(e.value)


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


# Formats


@pytest.mark.parametrize("kind", ["zst", "lz4", "gz", "zip"])
def test_a_packed_text_is_the_text(tmp_path, kind):
    words, book = "It was a dark and stormy night. " * 9, tmp_path / f"book.txt.{kind}"
    if kind in ("zst", "lz4"):
        with pa.CompressedOutputStream(str(book), {"zst": "zstd"}.get(kind, kind)) as f:
            f.write(words.encode())
    else:
        book.write_bytes(packed(book.name, words.encode()))
    (tmp_path / "plain.txt").write_text(words)
    assert texts(str(book), max_length=32) == texts(str(tmp_path / "plain.txt"), max_length=32)
    folder = tmp_path / "books"
    folder.mkdir()
    book.rename(folder / book.name)
    if kind != "zip":  # which is an archive where there is more than one file
        assert "".join(texts(str(folder), max_length=32)) == words


def test_nobodys_home_is_no_file():
    fails("~nobody-has-this/a.txt: no such file or folder", "~nobody-has-this/a.txt")


def test_fewer_images_are_told(tmp_path):
    from PIL import Image
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.warns(ReplaceMeWarning, match="fewer images than were asked for: 1 of 5"):
        assert len(data.load_images(str(tmp_path), size=5)) == 1


def packed(name, content):
    "The bytes of a file, packed as its name says."
    if name.endswith(".zip"):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as z:
            z.writestr("inner", content)
        return out.getvalue()
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    return next((p for s, p in pack.items() if name.lower().endswith(s)), bytes)(content)


def table(name):
    "The nine rows in the format that a name says."
    kind, ds = data._suffix(name), Dataset.from_list(ROWS)
    out = io.BytesIO()
    if kind in (".csv", ".tsv", ".tab"):
        content = pd.DataFrame(ROWS).to_csv(index=False, sep="," if kind == ".csv" else "\t").encode()
    elif kind in (".parquet", ".pq", ".parq"):
        pq.write_table(ds.data.table, out)
        content = out.getvalue()
    elif kind == ".feather":
        pyarrow.feather.write_feather(ds.data.table, out)
        content = out.getvalue()
    elif kind in (".arrow", ".ipc"):
        with pa.ipc.new_stream(out, ds.data.table.schema) as w:
            w.write_table(ds.data.table)
        content = out.getvalue()
    elif kind == ".orc":
        pyarrow.orc.write_table(pa.table(dict(text=TEXTS, stars=range(9))), out)
        content = out.getvalue()
    else:
        content = json.dumps(ROWS, indent=1).encode() if kind == ".json" else LINES
    return packed(name, content)


NAMES = ["A.JSONL", "A.Json", "A.CSV", "A.Parquet", "a.ARROW", "a.jsonl", "a.ndjson", "a.jsonlines", "a.tsv", "a.TAB", "a.pq", "a.parq",
         "a.feather", "a.ipc", "a.orc", "a.json.gz", "a.JSONL.GZ", "a.jsonl.xz", "a.jsonl.bz2", "a.csv.gz", "a.tsv.bz2", "a.csv.zip",
         "my data #1.jsonl", "a.b.c.csv"]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_table_is_read_as_one(tmp_path, name):
    (tmp_path / name).write_bytes(table(name))
    assert texts(tmp_path / name) == TEXTS
    assert texts(str(tmp_path / name), column="text", split="train", size=2) == TEXTS[:2]
    assert texts(tmp_path / name, split="train[2:4]") == TEXTS[2:4]
    fails("there is no column 'txt' (dataset_column): the data set has text, stars. Did you mean 'text'?", tmp_path / name, column="txt")


@pytest.mark.parametrize("codec, suffix", [("zstd", "zst"), ("lz4", "lz4")])
def test_tables_packed_by_what_pyarrow_knows(tmp_path, codec, suffix):
    path = str(tmp_path / f"a.jsonl.{suffix}")
    with pa.output_stream(path, compression=codec) as f:
        f.write(LINES)
    assert texts(path) == TEXTS


@pytest.mark.parametrize("content", [
    ROWS, dict(data=ROWS), dict(version="1", rows=ROWS), dict(text=TEXTS, stars=list(range(9))),
    pd.DataFrame(ROWS).to_dict(), TEXTS])
@pytest.mark.parametrize("indent", [None, 1])
def test_one_json_value_holds_the_table(tmp_path, content, indent):
    (tmp_path / "a.json").write_text(json.dumps(content, indent=indent))
    assert texts(tmp_path / "a.json") == TEXTS


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("more", [dict(names=[dict(name="Ann"), dict(name="Bo")]), dict(parts=[dict(title="One", page=1)])])
def test_a_single_row_is_one_of_many(tmp_path, rows, more):
    "What a row lists beside its text is no table, however many rows there are"
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(dict(text="A whole book.", **more))] * rows))
    assert texts(tmp_path / "a.jsonl") == ["A whole book."] * rows


@pytest.mark.parametrize("name", ["a.txt", "a", "a.md", "a.data", "a.jsonl.bak"])
@pytest.mark.parametrize("write", [lambda: LINES, lambda: json.dumps(ROWS, indent=1).encode(), lambda: json.dumps(ROWS).encode(),
                                   lambda: b"\xef\xbb\xbf" + LINES, lambda: gzip.compress(LINES), lambda: table("a.parquet"),
                                   lambda: table("a.feather"), lambda: table("a.arrow"), lambda: table("a.orc")])
def test_what_a_file_holds_counts_more_than_its_name(tmp_path, name, write):
    (tmp_path / name).write_bytes(write())
    with pytest.warns(ReplaceMeWarning, match="is read as such, whatever its name says"):
        assert texts(tmp_path / name) == TEXTS


@pytest.mark.parametrize("text", ["[see](there) for more\nand more", "{not json}\n", "[1, 2, 3]\n[4]\n", '{"a": 1}\nSo an object looks.\n',
                                  "text,stars\nOne,1\n"])
def test_a_text_stays_a_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "".join(texts(tmp_path / "a.txt", max_length=8)) == text


@pytest.mark.parametrize("name, content, say", [
    ("a.xlsx", b"PK\3\4", "is a spreadsheet: save the sheet as .csv"), ("A.XLS", b"", "is a spreadsheet"),
    ("a.pkl", pickle.dumps(ROWS), "can hold code that runs when it is read: save the table as .parquet"),
    ("a.data", pickle.dumps(ROWS), "can hold code that runs"), ("a.npy", b"\x93NUMPY", "is not read: save the table in it"),
    ("a.bin", b"SQLite format 3\0", "is not read: save the table in it"), ("a.feather", b"FEA1", "is not read"),
    ("a.tar.gz", gzip.compress(b"x", mtime=0), "is an archive: unpack it"), ("a.pdf", b"%PDF-1.4", "is a document: save its text as .txt"),
    ("a.ipynb", b'{"cells": []}', "is a document")])
def test_what_is_not_read_is_refused_with_what_to_do(tmp_path, name, content, say):
    (tmp_path / name).write_bytes(content)
    fails(f"{name} {say}", tmp_path / name)
    fails("no such file", str(tmp_path / "gone" / name).replace(".bin", ".xlsx"))


def test_a_table_with_semicolons_and_one_whose_texts_are_not_quoted(tmp_path):
    (tmp_path / "a.csv").write_text("text;stars\nOne, two;5\nThree;4\n")
    assert texts(tmp_path / "a.csv") == ["One, two", "Three"]
    (tmp_path / "b.csv").write_text("text,stars\nOne, two,5\nThree, four,4\n")
    fails("its rows have more fields than its first line", tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("text,n\n007,1\nNA,2\nnull,3\n,4\n")
    assert texts(tmp_path / "c.csv") == ["007", "NA", "null"]  # as they are written


SAID = [f"Sentence {i}." for i in range(300)] # more rows than are read at once


@pytest.mark.parametrize("sep", ["\t", ";", ","])
@pytest.mark.parametrize("first, last, say", [('"Hello there she said', '"Bye" he said', ""), ('"Hello there she said', "he left", ""),
                                              ('"Hello there.', 'So he said."', "row 1 ends 301 lines on; they are taken for rows of their own")])
def test_a_quote_that_is_a_letter_swallows_no_rows(tmp_path, sep, first, last, say):
    "However the file ends: with a quote that begins a text, with none, or with one that ends a text"
    rows = [first, *SAID, last]
    (tmp_path / "a.csv").write_text(f"text{sep}n\n" + "".join(f"{r}{sep}{i%2}\n" for i, r in enumerate(rows)))
    found, said = told(tmp_path / "a.csv")
    assert found == rows and (say in said if say else not said)


def test_what_can_be_neither_is_named(tmp_path):
    (tmp_path / "a.csv").write_text('text,n\nOne,1\n"Two and\nthree" she said,2\nFour,3\n')
    found, said = told(tmp_path / "a.csv")
    assert len(found) == 2 + 1 and "dataset a.csv: a quote that begins in row 2 ends 1 line on; they are taken for one text" in said


@pytest.mark.parametrize("seed", range(20))
def test_quoted_texts_stay_what_they_are(tmp_path, seed):
    "Whatever a writer quotes: line breaks, separators, quotes, and all of them"
    rng = random.Random(seed)
    words = ["a", 'b "q" c', "x, y", "l1\nl2", "l,1\nl, 2", "tab\there", '"', ' "s" ', "", "\r\n z", "Dear all,\nme", '""', 'a""b']
    for i in range(20):
        n = rng.choice([1, 2, 3])
        frame = pd.DataFrame([[rng.choice(words) for _ in range(n)] for _ in range(rng.randint(1, 30))], columns=list("uvw")[:n])
        kind = dict(index=False, sep=rng.choice(",;\t|") if n > 1 else ",", quoting=rng.choice([0, 1]), lineterminator=rng.choice(["\n", "\r\n"]))
        text = frame.to_csv(**kind)
        with warnings.catch_warnings(action="error", category=ReplaceMeWarning):
            rows = list(data.csv_rows(io.BytesIO(text.encode()), path="a.csv"))
        assert rows == pd.read_csv(io.StringIO(text, newline=""), sep=kind["sep"], dtype=str, na_filter=False).to_dict("records"), text


def test_folders_of_tables_whatever_their_suffix(tmp_path):
    for i, name in enumerate(["train.JSONL", "test.JSONL"]):
        lines(tmp_path / name, ROWS[3 * i:3 * i + 3])
    assert texts(tmp_path) == TEXTS[:3] and texts(tmp_path, split="test") == TEXTS[3:6]
    assert texts(tmp_path, split="train[1:]+test[:1]") == TEXTS[1:4]
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.pq").write_bytes(table("a.pq"))
    assert texts(tmp_path / "mixed") == TEXTS
    (tmp_path / "mixed" / "b.feather").write_bytes(table("b.feather"))
    fails("holds tables of different kinds (arrow, parquet): give one of them", tmp_path / "mixed")


def told(path, **kw):
    "The texts, and what is said of them."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = texts(path, **kw)
    return found, " ".join(str(w.message) for w in said if issubclass(w.category, ReplaceMeWarning))


def filled(folder, names):
    "Files of one row each, which is the name."
    for n in names.split():
        (folder / n).parent.mkdir(parents=True, exist_ok=True)
        (folder / n).write_text(f"text,n\n{n},1\n" if n.endswith("csv") else json.dumps(dict(text=n)))
    return folder


@pytest.mark.parametrize("names, left", [
    ("part1.jsonl part2.jsonl dev.jsonl", "part1.jsonl, part2.jsonl"), ("a.jsonl b_test.jsonl", "a.jsonl"), ("a.jsonl b.JSONL", ""),
    ("a.jsonl val/b.jsonl", "a.jsonl"), ("a[1].jsonl b.jsonl", ""), ("a.jsonl config.json __x/b.jsonl .b.jsonl", "")])
def test_no_file_of_a_folder_is_left_out_unsaid(tmp_path, names, left):
    "All are read where none is named after train, and the held-out ones stay to be had."
    found, said = told(filled(tmp_path / "glob[1]*", names))
    assert sorted(found) == sorted(n for n in names.split() if n not in ("config.json", "__x/b.jsonl", ".b.jsonl"))
    assert (f"after no split at all {left}: all" in said) if left else not said
    if "dev" in names:
        assert texts(tmp_path / "glob[1]*", split="validation") == ["dev.jsonl"]


@pytest.mark.parametrize("names, read, left", [
    ("train.jsonl test.jsonl extra.jsonl stats.csv", "train.jsonl", "extra.jsonl, stats.csv"), ("train-a.jsonl train-b.JSONL dev.jsonl", "", ""),
    ("data/train-00000-of-00001.jsonl data/test-00000-of-00001.jsonl x.jsonl", "data/train-00000-of-00001.jsonl", "x.jsonl")])
def test_files_beside_those_of_the_splits_are_named(tmp_path, names, read, left):
    found, said = told(filled(tmp_path, names))
    assert found == ([read] if read else ["train-a.jsonl", "train-b.JSONL"]) and (f"left out: {left}." in said if left else not said)


def test_a_readme_says_what_is_read(tmp_path):
    filled(tmp_path, "a.jsonl b.jsonl c.csv")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: a.jsonl\n---\n")
    found, said = told(tmp_path)
    assert found == ["a.jsonl"] and "left out: b.jsonl, c.csv." in said
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: a.jsonl\n- config_name: y\n  data_files: b.jsonl\n---\n")
    assert told(tmp_path, subset="y") == (["b.jsonl"], "")


@pytest.mark.parametrize("names", ["a.jsonl b.csv", "train.jsonl train2.csv", "dev.jsonl b.csv"])
def test_tables_of_different_kinds_are_refused(tmp_path, names):
    with warnings.catch_warnings(action="ignore"):
        fails("holds tables of different kinds (csv, json): give one of them", filled(tmp_path, names))


@pytest.mark.parametrize("column", [None, "text"])
@pytest.mark.parametrize("suffix, write", [("parquet", pq.write_table), ("orc", pa.orc.write_table), ("arrow", pa.feather.write_feather),
                                           ("jsonl", lambda t, p: lines(p, t.to_pylist())), ("csv", lambda t, p: t.to_pandas().to_csv(p, index=False))])
def test_a_file_that_gives_no_text_is_named(tmp_path, suffix, write, column):
    for name, key in zip("abc", ("text", "content", "text")):
        write(pa.table({key: [f"{name} one", f"{name} two"], "n": [1, 2]}), tmp_path / f"{name}.{suffix}")
    found, said = told(tmp_path, column=column)
    assert found == ["a one", "a two", "c one", "c two"] and f"no row of b.{suffix} gives a text, which is read from the column text" in said
    assert texts(tmp_path, column="text", split="train[3:5]") == ["c one"]
    assert told(tmp_path, column=column, size=2)[1] == ""  # where nothing of it was needed


# Chats


FORMS = dict(
    lists=HI, tuples=tuple(HI), array=np.array(HI), json=json.dumps(HI), json_lines_and_all=json.dumps(HI, indent=1), python=str(HI),
    inside=dict(messages=HI, source="x"), json_inside=json.dumps(dict(conversations=HI)),
    columns=dict(role=["user", "assistant"], content=["Hi", "Hello"]),
    array_columns=dict(role=np.array(["user", "assistant"]), content=np.array(["Hi", "Hello"])),
    share_gpt=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
    mixed=[{"role": "User", "value": "Hi"}, {"from": "assistant", "content": "Hello", "weight": 1}],
    nulls=[dict(m, value=None, tool_calls=None, name=None) for m in HI],
    parts=[dict(role="user", content=[dict(type="image", image="a.png"), dict(type="text", text="Hi")]), HI[1]],
    part_arrays=[dict(role="user", content=np.array([dict(type="text", text="Hi", image=None)])), HI[1]],
    strings=[dict(role="user", content=["Hi"]), HI[1]],
    extra=[HI[0], dict(HI[1], reasoning_content="Hm.", weight=0., name="bot")])


@pytest.mark.parametrize("form", FORMS)
def test_a_chat_in_any_form(form):
    rows = [dict(id="7", talk=FORMS[form])]
    assert texts(IterableDataset.from_generator(lambda: iter(rows))) == [HELLO]
    assert texts(IterableDataset.from_generator(lambda: iter(rows)), column="talk") == [HELLO]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("form", ["lists", "json", "python", "inside", "nulls", "mixed"])
def test_a_chat_in_any_form_in_a_file(tmp_path, form, suffix):
    path = tmp_path / f"a.{suffix}"
    frame = pd.DataFrame([dict(id="7", talk=FORMS[form])])
    dict(jsonl=lambda p: frame.to_json(p, orient="records", lines=True), csv=lambda p: frame.to_csv(p, index=False),
         parquet=frame.to_parquet)[suffix](path)
    assert texts(path) == [HELLO]


def template(text):
    tok = tiny_tokenizer()
    tok.chat_template = text
    return tok


PARTS = ("{% for m in messages %}{{ '<' + m.role + '>' }}{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %}"
         "{% endfor %}")
MUTE = "{% for m in messages %}{{ '<' + m.role + '>' }}{% endfor %}"


@pytest.mark.parametrize("wants", [PARTS, "{% for m in messages %}<{{ m.role }}>{{ m.content[0]['text'] }}{% endfor %}",
                                   "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"])
def test_words_reach_a_template_that_wants_parts(tmp_path, wants):
    "Given as a text or as parts, they come out; so do the first words of the model's own texts"
    parted = [{**m, "content": [dict(type="text", text=m["content"])]} for m in HI]
    tok = template(wants)
    assert texts(lines(tmp_path / "a.jsonl", [dict(messages=HI), dict(messages=parted)]), tokenizer=tok) == ["<user>Hi<assistant>Hello"] * 2
    assert data.user_turn(tok) == "<user>"


def test_a_template_that_writes_no_words_is_refused():
    fails("row 1: the chat template writes nothing of what is said", rows_of([dict(messages=HI)]), tokenizer=template(MUTE))
    assert data.user_turn(template(MUTE)) is None


def test_calls_of_tools_and_other_keys_reach_the_template():
    tok = template("{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}"
                   "{% endfor %}{{ m.reasoning_content }}{{ 'name' in m }};{% endfor %}")
    call = dict(role="assistant", content=None, name=None, reasoning_content="hm",
                tool_calls=[dict(id="1", type="function", function=dict(name="f", arguments='{"a": 3}'))])
    rows = [dict(messages=[HI[0], call, dict(role="tool", content=[dict(type="text", text="4")], name="f")])]
    assert texts(rows_of(rows), tokenizer=tok) == ["user:HiFalse;assistant:3hmFalse;tool:4True;"]


def rows_of(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


GEMMA = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ messages[-1].content }}"


def test_chats_that_the_template_refuses_are_left_out_and_counted(tmp_path):
    bad = [dict(role="system", content="Be brief."), *HI]
    path = lines(tmp_path / "a.jsonl", [dict(messages=m) for m in (HI, bad, HI, bad, [], HI)])
    with pytest.warns(ReplaceMeWarning) as said:
        assert texts(path, tokenizer=template(GEMMA)) == ["Hello"] * 3
    message, = {str(w.message) for w in said if w.category is ReplaceMeWarning}
    assert "2 rows are left out beside the 3 that are taken; the first, row 2: the chat template refuses a chat of the roles system, " \
           "user, assistant: System role not supported" in message
    lines(path, [dict(messages=bad)] * 3)
    fails("none of 3 rows gives a text; the first, row 1: the chat template refuses", path, tokenizer=template(GEMMA))


@pytest.mark.parametrize("code", ["{{ messages[0].content.nothing.there }}", "{{ 1 + messages[0].content }}", "{{ messages[9].role.x }}"])
def test_a_template_that_stumbles_is_one_that_refuses(code):
    fails("the chat template refuses a chat of the roles user, assistant", rows_of([dict(messages=HI)]), tokenizer=template(code))


def test_a_stream_of_refusals_ends():
    def rows():
        while True:
            yield dict(messages=HI)
    fails("none of 1000 rows gives a text", IterableDataset.from_generator(rows), tokenizer=template("{{ raise_exception('no') }}"), size=4)


# Columns


def test_a_column_that_is_null_for_15000_rows_and_then_a_number(tmp_path):
    rows = [dict(text=f"text {i}", note=None if i < 15_000 else i, pad="x" * 700) for i in range(16_000)]
    for place in lines(tmp_path / "a.jsonl", rows), tmp_path:
        assert texts(place)[-1] == "text 15999"
        assert texts(place, column="text", split="train[99%:]")[-1] == "text 15999"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_nulls_in_the_first_rows(tmp_path, kind):
    rows = [dict(review=None, stars=1.5)] * 200 + [dict(review=t, stars=2.) for t in TEXTS]
    frame, path = pd.DataFrame(rows), tmp_path / f"a.{kind}"
    dict(jsonl=lambda p: lines(p, rows), csv=lambda p: frame.to_csv(p, index=False), parquet=frame.to_parquet)[kind](path)
    assert texts(path) == texts(path, size=9) == TEXTS


def test_only_a_thousand_rows_are_looked_at():
    def rows():
        for i in range(data.LOOK):
            yield dict(review=None, stars=i)
        raise AssertionError("looked too far")
    fails("choose a column (dataset_column): the data set has review, stars", IterableDataset.from_generator(rows))


def test_rows_of_another_kind_are_left_out_and_counted(tmp_path):
    path = lines(tmp_path / "a.jsonl", [dict(body=b) for b in (5, "one", ["a"], None, "two", dict(a=1), HI)])
    with pytest.warns(ReplaceMeWarning, match="3 rows are left out beside the 3 that are taken; the first, row 1: the column holds int"):
        assert texts(path, column="body") == ["one", "two", HELLO]


def test_columns_that_only_later_rows_have(tmp_path):
    path = lines(tmp_path / "a.jsonl", [dict(id=1)] * 30 + [dict(id=1, body="here")])
    assert texts(path) == texts(path, column="body") == ["here"]


def test_of_a_hundred_columns_one_is_read(tmp_path, monkeypatch):
    names = [f"c{i}" for i in range(98)]
    wide = pa.table({"text": TEXTS, "talk": [json.dumps(HI)] * 9, **{n: range(9) for n in names}})
    asked, read = [], pq.ParquetFile.iter_batches
    def watched(self, *args, columns=None, **kw):
        asked.append(columns)
        return read(self, *args, columns=columns, **kw)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    pq.write_table(wide, tmp_path / "a.parquet")
    for place in tmp_path / "a.parquet", tmp_path:
        asked.clear()
        assert texts(place, column="talk") == [HELLO] * 9 and asked == [["talk"]]
        assert texts(place) == TEXTS and asked[1:] == [["text", "talk"], ["text"]]  # numbers are not even looked at


def test_of_the_hub_too(tmp_path, monkeypatch):
    pq.write_table(pa.table(dict(text=TEXTS, stars=range(9))), tmp_path / "train.parquet")
    monkeypatch.setattr(data, "load_dataset", lambda path, name=None, **kw: load_dataset(str(tmp_path), name, **kw))
    monkeypatch.setattr(data, "load_dataset_builder", lambda path, name=None, **kw: load_dataset_builder(str(tmp_path), name, **kw))
    asked, read = [], data.READERS["parquet"]
    monkeypatch.setitem(data.READERS, "parquet", lambda f, columns, path: asked.append(columns) or read(f, columns, path))
    assert texts("me/mine", column="text", size=3) == TEXTS[:3] and asked == [["text"]]


def test_broken_half_an_emoji_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert texts(tmp_path / "a.jsonl") == ["a \ufffd b", "\U0001f600"]


# Columns that are joined


ALPACA = [dict(instruction="Add.", input="1, 2", output="3"), dict(instruction="Greet.", input="", output="Hello")]
ADDED = ["<s>[user] Add.\n\n1, 2\n[assistant] 3\n", "<s>[user] Greet.\n[assistant] Hello\n"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_columns_of_an_exchange_become_a_chat(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    ds = Dataset.from_list(ALPACA)
    dict(jsonl=ds.to_json, csv=ds.to_csv, parquet=ds.to_parquet)[suffix](path)
    assert texts(path) == texts(path, column=["instruction", "input", "output"]) == ADDED
    assert texts(path, tokenizer=BARE) == ["Add.\n\n1, 2\n\n3", "Greet.\n\nHello"]
    assert texts(path, column=["input", "instruction"]) == ["1, 2\n\nAdd.", "Greet."]
    assert texts(path, column=["output"]) == texts(path, column="output") == ["3", "Hello"]
    fails("there is no column 'outpt' (dataset_column): the data set has instruction, input, output. Did you mean 'output'?", path,
          column=["input", "outpt"])


@pytest.mark.parametrize("row", [
    dict(prompt="Hi", completion="Hello"), dict(Question="Hi", Answer="Hello", source="web"), dict(prompt="Hi", chosen="Hello", rejected="No"),
    dict(prompt=HI[:1], chosen=HI[1:], rejected=HI[1:]), dict(prompt="Hi", chosen=HI, rejected=HI), dict(prompt=HI[:1], completion=HI[1:]),
    dict(input="Hi", output="Hello"), dict(question="Hi", response="Hello", id="7")])
def test_sets_of_columns_that_leave_no_choice(row):
    assert texts(rows_of([row])) == [HELLO]


def test_a_system_prompt_in_a_column_and_answers_that_are_missing():
    row = dict(system_prompt="Be brief.", question="Hi", response="Hello")
    assert texts(rows_of([row, dict(row, response=None)])) == ["<s>[system] Be brief.\n[user] Hi\n[assistant] Hello\n"]


@pytest.mark.parametrize("row", [dict(question="a", answer="b", output="c"), dict(prompt="a", question="b", answer="c"),
                                 dict(title="a", answer="b"), dict(chosen=HI, rejected=HI)])
def test_sets_of_columns_that_leave_a_choice(row):
    fails(f"choose a column (dataset_column): the data set has {', '.join(row)}.", rows_of([row]))


# Files that will not do


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_that_is_broken_says_which(tmp_path, name):
    rows = [json.dumps(dict(text=f"t{i}")) for i in range(6000)]
    rows[4999] = rows[4999][:-3]
    (tmp_path / name).write_bytes(packed(name, "\n".join(rows).encode()))
    fails(f"{name} cannot be read: JSON parse error in row 5000", tmp_path / name)
    fails(f"{name}: JSON parse error in row 5000", two_files(tmp_path, name)) if name == "a.jsonl" else None
    assert len(texts(tmp_path / name, size=4999)) == 4999  # what is not needed may be broken


def two_files(tmp_path, name):
    lines(tmp_path / "a0.jsonl", ROWS)
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.xz", "a.parquet", "a.feather", "a.arrow", "a.orc", "a.jsonl.bz2", "a.csv.zip"])
@pytest.mark.parametrize("share", [.3, .7, .97])
def test_files_that_were_cut_off(tmp_path, name, share):
    content = table(name)
    (tmp_path / name).write_bytes(content[:int(len(content) * share)])
    try:
        assert texts(tmp_path / name)[:1] == TEXTS[:1]
    except ReplaceMeError as e:
        assert f"{tmp_path / name} cannot be read: " in str(e) and "\n" not in str(e)
    else:
        assert name.endswith(".arrow")  # a stream whose end mark is missing


@pytest.mark.parametrize("name, content, say", [
    ("a.csv", b"", "cannot be read: No columns"), ("a.csv", b"text\n", "holds no text"), ("a.jsonl", b"5\n6\n", "row 1 is 5 and no object"),
    ("a.csv", "text\ndéjà\n".encode("latin-1"), "not UTF-8"), ("a.jsonl", '{"text": "déjà"}\n'.encode("latin-1") * 2, "not UTF-8"),
    ("a.jsonl", b'{"text": " \\n"}\n{"text": "\\t"}', "holds no text"), ("a.parquet", None, "holds no text"),
    ("a.json", b"[" * 100_000, "cannot be read")])
def test_tables_with_nothing_in_them(tmp_path, name, content, say):
    if content is None:
        pq.write_table(pa.table(dict(text=pa.array([], pa.string()))), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    fails(say, tmp_path / name)


def test_one_row_is_a_table(tmp_path):
    assert texts(lines(tmp_path / "a.jsonl", ROWS[:1])) == texts(rows_of(ROWS[:1])) == TEXTS[:1]
    assert texts(lines(tmp_path / "b.json", ROWS[:1])) == TEXTS[:1]


def test_what_save_to_disk_wrote(tmp_path):
    ds = Dataset.from_list(ROWS)
    ds.save_to_disk(tmp_path / "one")
    DatasetDict(train=ds, test=ds.select([0])).save_to_disk(tmp_path / "two")
    assert texts(tmp_path / "one") == texts(tmp_path / "two") == TEXTS
    assert texts(tmp_path / "one", split="train[:2]") == texts(tmp_path / "two", split="train[:2]") == TEXTS[:2]
    next((tmp_path / "one").glob("*.arrow")).unlink()
    fails("one cannot be read: ", tmp_path / "one")
    (tmp_path / "two" / "dataset_dict.json").write_text("{")
    fails("two cannot be read: ", tmp_path / "two")


# In memory


PROSE = ["It was a dark and stormy night.", "Yes.", "A text\nof two lines"]


def memories():
    ds = Dataset.from_list(ROWS)
    return dict(dataset=ds, stream=ds.to_iterable_dataset(), splits=DatasetDict(train=ds, test=ds.select([0])), rows=ROWS, tuple=tuple(ROWS),
                frame=pd.DataFrame(ROWS), arrow=pa.table(dict(text=TEXTS)), columns=dict(text=TEXTS), plain=dict(train=ROWS),
                torch=ds.with_format("torch"), texts=TEXTS)


@pytest.mark.parametrize("kind", memories())
def test_data_sets_in_memory(kind):
    given = memories()[kind]
    assert texts(given) == texts(named(given)) == TEXTS
    name = named(given)
    assert isinstance(name, str) and f"{type(given).__name__} in memory (" in name and data_name(name) == name
    again = named(memories()[kind])
    assert (again == name) == (kind != "stream")  # nobody can say what a stream will give
    json.dumps(dict(dataset=name))


def test_the_digest_is_of_the_rows():
    names = [named(x) for x in (ROWS, ROWS[:8], [dict(ROWS[0], stars=7), *ROWS[1:]], pd.DataFrame(ROWS[1:]))]
    assert len(set(names)) == 4 and "9 rows" in names[0] and "8 rows" in names[1]


def test_chats_and_texts_alone_are_rows():
    assert texts([HI, HI]) == [HELLO] * 2 and texts(PROSE) == PROSE
    assert texts([np.array(HI)]) == [HELLO]


def test_a_list_of_names_is_a_mixture_whatever_they_are_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "my data is here.jsonl", ROWS)
    lines(tmp_path / "It was a dark night", ROWS[:3])
    with pytest.warns(ReplaceMeWarning, match="holds json"):
        assert len(texts(["my data is here.jsonl", "It was a dark night"])) == 12
    fails("dataset my data is there.jsonl: no such file or folder", ["my data is there.jsonl", "my data is here.jsonl"])


@pytest.mark.parametrize("given, say", [
    (["self", *PROSE], "'self' is the name of a data set and 'It was a dark and stormy night.' is a text"),
    ([ROWS[0], PROSE[0]], "is a text: give names alone, or texts alone"), (PROSE[0], "there is no such file, and no other name has spaces"),
    (["Hello there.", "Good bye."], "dataset 'Hello there.': there is no such file, and no other name has spaces"),
    ("x" * 5000, "there is no such file"), (["yes", "no", "maybe"], "dataset is a list of 3 data sets, and dataset_size is 2"),
    ([[]], "is no data set"), ([1, 2], "dataset 1 is no data set")])
def test_lists_that_leave_a_doubt_get_one_line(given, say):
    fails(say, given, size=2)


def test_prune_takes_what_is_in_memory(tmp_path):
    model = tiny_model("llama", layers=4)
    kw = dict(method="lstsq", dataset_size=9, max_length=32)
    path = lines(tmp_path / "a.jsonl", ROWS)
    expected, _ = prune(model, TOK, 1, dataset=str(path), **kw)
    for given in ROWS, pd.DataFrame(ROWS), Dataset.from_list(ROWS), TEXTS, path, Dataset.from_list(ROWS).to_iterable_dataset():
        pruned, result = prune(model, TOK, 1, dataset=given, **kw)
        assert all(torch.equal(a, b) for a, b in zip(pruned.state_dict().values(), expected.state_dict().values()))
        kept = json.loads(json.dumps(result))
        assert yaml.safe_load(yaml.safe_dump(result["config"]))["dataset"] == kept["config"]["dataset"] == named(given) or "Iterable" in str(given)
        assert " in memory (" in kept["calibration"]["dataset"] or given == path
    both, result = prune(model, TOK, 1, dataset=["python-docs", Dataset.from_list(ROWS)], **kw)
    assert result["config"]["dataset"][1].startswith("Dataset in memory (9 rows, ") and "python-docs + Dataset in memory" in str(
        result["calibration"]["dataset"])
    with pytest.raises(ReplaceMeError, match="dataset is a generator, which can be read but once"):
        prune(model, TOK, 1, dataset=(r for r in ROWS), **kw)
    with pytest.raises(ReplaceMeError, match="dataset is 5: it must be text or a list"):
        prune(model, TOK, 1, dataset=5, **kw)


def test_rows_do_not_stand_in_a_configuration(tmp_path):
    (tmp_path / "c.yaml").write_text("dataset:\n- text: a\n")
    with pytest.raises(ReplaceMeError, match="rows cannot stand in a configuration"):
        read_config(tmp_path / "c.yaml")


# Fewer than asked for


def test_fewer_texts_than_asked_for_are_mentioned_once(tmp_path):
    path = lines(tmp_path / "a.jsonl", ROWS)
    with pytest.warns(ReplaceMeWarning) as said:
        texts(path, size=8000)
    assert [str(w.message) for w in said if w.category is ReplaceMeWarning] == [
        f"dataset {path} holds fewer texts than were asked for: 9 of 8000."]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReplaceMeWarning)
        texts(path, size=9), texts(path, size=None), texts(path, size=8000, most=True)


def test_what_is_trained_on_is_said_too():
    model = tiny_model("llama", layers=2)
    with pytest.warns(ReplaceMeWarning, match=r"leaves 8 texts to train on, and 500 were asked for \(train_size\)"):
        training_batches(model, TOK, make_config(recover="cut", dataset=ROWS, train_size=500))
    with pytest.warns(ReplaceMeWarning, match=r"tokens in 8 texts to train on, and 131072 were asked for \(train_tokens\)"):
        training_batches(model, TOK, make_config(recover="cut", dataset=ROWS))


def test_an_evaluation_asks_for_more_than_it_needs_and_says_nothing(tmp_path):
    path = lines(tmp_path / "a.jsonl", ROWS * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReplaceMeWarning)
        eval_text(make_config(eval_dataset=str(path), eval_size=2, eval_length=16), TOK, tiny_model("llama", layers=2))


# Flags


@pytest.mark.parametrize("name", ["my data #1.jsonl", "a: b.jsonl", "[x].jsonl", "{y}.jsonl", "100%.jsonl", "@x.jsonl", "'q'.jsonl", "*.jsonl",
                                  '"quoted"', "2024", "true", "- x", "!tag", "x, y", "C:\\data\\x.jsonl", "& y.jsonl", "> y"])
def test_a_path_that_exists_is_a_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / name, ROWS)
    cfg, _ = parse("x", "", ["--dataset", name, "--eval_dataset", name], {})
    assert (cfg.dataset, cfg.eval_dataset) == (name, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert texts(cfg.dataset) == TEXTS


@pytest.mark.parametrize("name", ["my-data #1", "a: b", "@x", "%x", "*x", "!x", "2024", "true", "1e5", "2024-01-01", "it's", "C:\\x", "#1"])
def test_what_no_list_can_be_is_text(name):
    cfg, _ = parse("x", "", ["--dataset", name, "--dataset_column", name], {})
    assert (cfg.dataset, cfg.dataset_column) == (name, name)


def test_lists_of_columns_and_of_names_as_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "a #1.txt", "b.txt":
        (tmp_path / name).write_text("text")
    cfg, _ = parse("x", "", ["--dataset_column", "[instruction, output]", "--dataset", '["a #1.txt", b.txt]'], {})
    assert (cfg.dataset_column, cfg.dataset) == (["instruction", "output"], ["a #1.txt", "b.txt"])
    with pytest.raises(ReplaceMeError, match="cannot be read: in a list, put quotes around names with signs in them"):
        parse("x", "", ["--dataset", "[a #1.txt, b.txt]"], {})
    with pytest.raises(ReplaceMeError, match=r"dataset_column is \[1\]: give the name of a column, or a list of different names"):
        parse("x", "", ["--dataset_column", "[1]"], {})


# chats that were had with tools

LOOK_UP = dict(type="function", function=dict(name="look_up", description="Looks a word up.", parameters=dict(type="object", properties=dict(
    word=dict(type="string")), required=["word"])))
ASKS = "{% if tools %}[tools] {{ tools | tojson }}\n{% endif %}" + TOK.chat_template
ALONE = LOOK_UP["function"]


def with_tools(dataset, tok=None, **kw):
    return texts(dataset, tokenizer=tok or template(ASKS), **kw)


@pytest.mark.parametrize("name, value", [
    ("tools", [LOOK_UP]), ("tools", json.dumps([LOOK_UP])), ("tools", [json.dumps(LOOK_UP)]), ("tools", json.dumps([json.dumps(LOOK_UP)])),
    ("tools", repr([LOOK_UP])), ("functions", [ALONE]), ("functions", json.dumps([ALONE])), ("tools", [ALONE])])
def test_tools_beside_a_chat_reach_the_template(tmp_path, name, value):
    rows, tok = [dict(id=3, messages=HI, **{name: value}), dict(id=4, messages=HI, **{name: None})], template(ASKS)
    wanted = [tok.apply_chat_template(HI, tools=[LOOK_UP], tokenize=False), HELLO]
    assert "look_up" in wanted[0]
    file, table = lines(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"
    pd.DataFrame(rows).to_parquet(table)
    for given in rows, Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset(), file, table, pd.DataFrame(rows):
        assert with_tools(given) == with_tools(given, column="messages") == wanted
        assert texts(given) == [HELLO, HELLO] # this template makes no use of them
    assert with_tools([dict(text=json.dumps({"messages": HI, name: value}))]) == wanted[:1]
    assert with_tools([dict(prompt=HI[:1], completion=HI[1:], **{name: value})]) == wanted[:1]


@pytest.mark.parametrize("value", [None, [], "[]", "", "null", "a hammer", ["hammer"], 3, float("nan")])
def test_what_is_no_tool_changes_nothing(value):
    assert with_tools([dict(messages=HI, tools=value)]) == [HELLO]
    assert with_tools([dict(messages=HI, tools=value, functions=[ALONE])])[0].startswith("[tools] ")


def test_tools_choose_the_template_that_is_for_them():
    tok = template(dict(default=TOK.chat_template, tool_use=ASKS))
    assert with_tools([dict(messages=HI, tools=[LOOK_UP]), dict(messages=HI)], tok)[0].startswith("[tools] ")


def test_a_template_that_refuses_tools_says_so():
    refuses = template("{% if tools %}{{ raise_exception('no tools here') }}{% endif %}" + TOK.chat_template)
    with pytest.raises(ReplaceMeError, match="refuses a chat of the roles user, assistant with 1 tools: no tools here"):
        with_tools([dict(messages=HI, tools=[LOOK_UP])], refuses)


def test_a_column_of_tools_is_no_matter_to_plain_text(tmp_path):
    rows = [dict(text=f"This is text {i}.", tools=[LOOK_UP]) for i in range(3)]
    assert with_tools(rows) == with_tools(lines(tmp_path / "a.jsonl", rows)) == [r["text"] for r in rows]


# Fuzz


def weird(rng, depth=0):
    "Some value that a cell might hold."
    pick = rng.randrange(14 if depth < 3 else 9)
    simple = [None, "", "text", " \n", 5, 2.5, float("nan"), True, rng.choice(["[1", '[{"role": "user"}]', '{"a": ', "[{'role': 1}]", "\ud83d"])]
    if pick < len(simple):
        return simple[pick]
    if pick < 11:
        return [weird(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = rng.sample(["role", "content", "from", "value", "tool_calls", "type", "text", "messages", "a"], rng.randrange(1, 5))
    made = {k: weird(rng, depth + 1) for k in keys}
    if "role" in made and rng.random() < .7:
        made["role"] = rng.choice(["user", "assistant", "system", "Human", ""])
    return made if pick < 13 else [made] * rng.randrange(1, 3)


def weird_file(rng, folder, i):
    names = rng.sample(["text", "messages", "prompt", "completion", "input", "output", "chosen", "id"], rng.randrange(1, 4))
    rows = [{n: weird(rng) for n in names if rng.random() < .9} for _ in range(rng.randrange(6))]
    suffix = rng.choice(["jsonl", "json", "csv", "txt", "tsv", "jsonl.gz", "parquet", "JSON", "xlsx", "feather"])
    content = json.dumps(rows).encode() if suffix.lower() == "json" else "\n".join(map(json.dumps, rows)).encode()
    if suffix in ("csv", "tsv"):
        plain = json.loads(json.dumps(rows).replace("\\ud83d", "?"))
        content = pd.DataFrame(plain).to_csv(index=False, sep=rng.choice(",;\t")).encode()
    content = packed(f"a.{suffix}", content)
    if rng.random() < .3 and content:
        at = rng.randrange(len(content))
        content = content[:at] + bytes([rng.randrange(256)]) * rng.randrange(3) + content[at + rng.randrange(20):]
    path = folder / f"{i}.{suffix}"
    path.write_bytes(content)
    return path, names, rows


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.filterwarnings("ignore")
def test_nothing_but_our_own_errors_comes_out(tmp_path, seed):
    rng, read = random.Random(seed), 0
    for i in range(40):
        path, names, rows = weird_file(rng, tmp_path, i)
        column = rng.choice([None, names[0], names, "nope", [], ["text", "id"]])
        for source in (path, rows_of(rows)):
            try:
                found = texts(source, column=column, tokenizer=rng.choice([TOK, BARE]), size=rng.choice([None, 2]))
            except ReplaceMeError as e:
                assert "\n" not in str(e)
            else:
                assert found and all(isinstance(t, str) and t.strip() and t.encode() for t in found)
                read += 1
    assert read > 4


def test_numbers_in_a_csv_are_no_texts(tmp_path):
    "There everything is a string; the column of words is the one that is meant"
    (tmp_path / "r.csv").write_text("stars,review\n5,Arrived on time.\n3,Too short.\n")
    assert load_texts(tmp_path / "r.csv", tokenizer=tiny_tokenizer(), size=None) == ["Arrived on time.", "Too short."]


# A data set that says itself how it is read


def test_each_part_of_a_mixture_has_its_own_column(tmp_path):
    a = lines(tmp_path / "a.jsonl", [dict(text=f"wrong {i}", body=f"first {i}") for i in range(8)])
    b = lines(tmp_path / "b.jsonl", [dict(words=f"second {i}", text=f"wrong {i}") for i in range(8)])
    parts = [dict(path=str(a), column="body", share=3), dict(path=b, column="words", share=1)]
    got = texts(named(parts), size=8)
    assert sorted(got) == sorted([f"first {i}" for i in range(6)] + [f"second {i}" for i in range(2)])
    assert texts(named(dict(path=str(a), column="body")), size=2) == ["first 0", "first 1"]
    assert texts([named(parts[0]), named(parts[1])], size=8) == got == texts(parts, size=8)
    assert texts(dict(path=str(a), column="body"), size=2) == texts([dict(path=a, column="body")], size=2) == ["first 0", "first 1"]
    with pytest.raises(ReplaceMeError, match="unknown key 'colum'. Did you mean 'column'"):
        texts([dict(path=str(a), colum="body")])


def test_a_mapping_in_a_file_a_flag_and_a_record(tmp_path):
    a = lines(tmp_path / "a.jsonl", [dict(text=f"wrong {i} of the table", body=f"text {i} of the table") for i in range(8)])
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(dict(dataset=dict(path=str(a), column="body"), dataset_size=4)))
    for cfg in (read_config(tmp_path / "c.yaml"), parse("run_replaceme", "", ["--dataset", f"{{path: {a}, column: body}}"], {})[0]):
        assert (cfg.dataset, cfg.dataset.how) == (str(a), dict(column="body"))
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(dict(dataset=["self", dict(path=str(a), column="body")])))
    assert [getattr(d, "how", None) for d in read_config(tmp_path / "m.yaml").dataset] == [None, dict(column="body")]
    model = tiny_model("llama", layers=4)
    _, r = prune(model, TOK, 1, method="remove", dataset=dict(path=str(a), column="body"), dataset_size=4)
    assert r["config"]["dataset"] == dict(path=str(a), column="body")
    assert make_config(**{k: r["config"][k] for k in ("dataset", "dataset_size")}).dataset.how == dict(column="body")


@pytest.mark.parametrize("given, say", [
    (dict(path="self", column="body"), "is plain text and has no column 'body'"),
    (dict(path="a.jsonl", colum="body"), "unknown key 'colum'. Did you mean 'column'?"),
    ([dict(path="self", share=1), "python-docs"], "give each of the data sets a share, or none of them")])
def test_what_a_mapping_cannot_say(given, say):
    with pytest.raises(ReplaceMeError) as e:
        texts(named(given), size=4)
    assert say in str(e.value)
