"""What the tests share: no hub, and the texts and questions that known answers are about."""
import functools
import gc
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config):
    config.addinivalue_line("markers", "minutes: takes a minute or more on one core")


def pytest_collection_modifyitems(items):
    "Files with such a test come first: of two processes that share the files, none works alone at the end"
    first = {i.path for i in items if i.get_closest_marker("minutes")}
    items.sort(key=lambda i: i.path not in first)


def pytest_collection_finish():
    "What was imported stays: runs of tiny models, which collect garbage often, need not walk through a million objects each time"
    gc.collect()
    gc.freeze()


LOOK = {"test_plots", "test_report", "test_site", "test_speed", "test_lasting", "test_kill"}  # at pictures, or at how often something is timed


@pytest.fixture(scope="module", autouse=True)
def lightly(request):
    "A run's pictures are drawn but not rendered, and two models are timed twice, not five times, except where this is what is tested"
    if request.module.__name__ in LOOK:
        yield
        return
    from matplotlib.figure import Figure
    from replaceme import report, speed

    def drawn(draw, height=3.6):
        draw(Figure().subplots())
        return b"\x89PNG drawn, not rendered"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_png", drawn)
        patch.setattr(speed, "pairs_within", functools.partial(speed.pairs_within, most=2))
        yield


@pytest.fixture(scope="session")
def data_dir():
    "Folder with wikitext2_valid.txt, wikitext2_test.txt and piqa_valid.jsonl; a test that asks for it skips without it."
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from data import DATA
    if not (DATA / "wikitext2_valid.txt").is_file():
        pytest.skip(f"no test data in {DATA}: `make data` fetches it")
    return DATA.resolve()


@pytest.fixture(scope="session")
def save_tiny():
    "Writes the checkpoint of a tiny Llama of six layers, with its tokenizer, into `folder/tiny`, and returns the folder"
    def save(folder):
        from replaceme.models import tiny_model, tiny_tokenizer
        model = tiny_model("llama", layers=6)
        model.generation_config.pad_token_id = 0
        model.save_pretrained(folder / "tiny")
        tiny_tokenizer().save_pretrained(folder / "tiny")
        return folder
    return save


@pytest.fixture
def two_kinds(save_tiny, tmp_path, monkeypatch):
    "A folder to be in, with `tiny` and texts of two kinds, a.txt and b.txt; what is kept goes there too"
    monkeypatch.chdir(save_tiny(tmp_path))
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    Path("a.txt").write_text("The map stands in for the layers that went, one two three. " * 60)
    Path("b.txt").write_text("def f(x): return [x, x]\n\n" * 80)
    return tmp_path
