"""What is said of a model: the numbers and lines of its pages, and what a dry run refuses as the run does."""
import pytest

from replaceme.config import Config, make_config
from replaceme.core import ReplaceMeError
from replaceme.cost import dry_run
from replaceme.doors import run
from replaceme.models import tiny_model, tiny_tokenizer
from replaceme.report import model_card, report_html
from replaceme.result import Result
from replaceme.save import write_provenance

PEER = dict(method="streamline", block=[2, 4], blocks=[[2, 4]], n_layers=dict(before=6, after=4), config={},
            parameters=dict(before=92_600, after=61_500))


@pytest.fixture(scope="module")
def normed(tmp_path_factory):
    "A family whose norm stands behind the MLP, and a text"
    folder = tmp_path_factory.mktemp("normed")
    tiny_model("gemma2", layers=6).save_pretrained(folder / "m")
    tiny_tokenizer().save_pretrained(folder / "m")
    (folder / "a.txt").write_text("The map stands in for the layers that went, one two three. " * 40)
    return folder


@pytest.mark.parametrize("keys", [dict(layers_to_skip="auto", budget="loss 0.5"), dict(layers_to_skip=2, affine=True),
                                  dict(layers_to_skip=2, save_transform_only=True)])
def test_a_dry_run_refuses_through_a_norm_what_a_run_refuses(keys, normed, tmp_path):
    cfg = make_config(Config, model_path=str(normed / "m"), dataset=str(normed / "a.txt"), dataset_size=8, max_length=32,
                      eval_dataset=None, prompt=None, speed=False, save_path=str(tmp_path / "out"), **keys)
    said = []
    for f in (run, dry_run):
        with pytest.raises(ReplaceMeError, match="a norm follows") as e:
            f(cfg)
        said.append(str(e.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("counts, row, card", [((92_600, 61_500), "parameters (k)", "93 → 62 k"), ((900, 600), "parameters", "900 → 600"),
                                               ((134_515_008, 100_000_000), "parameters (M)", "135 → 100 M")])
def test_parameters_of_tiny_models_are_counted(counts, row, card):
    r = Result(PEER, parameters=dict(before=counts[0], after=counts[1]))
    assert f"| {row} |" in model_card(r) and card in report_html(r)


def test_the_paper_of_what_was_trained_ends_its_sentence():
    r = Result(PEER, training=dict(tokens=1000, data="a.txt"), fit=dict(map="network", trained=True))
    card = model_card(r)
    assert ". ([" not in card and " ([LLM-Streamline" in card


def test_the_card_of_what_sees_or_hears_loads_its_processor(tmp_path):
    for name, file in (("text", None), ("sees", "preprocessor_config.json"), ("hears", "processor_config.json")):
        folder = tmp_path / name
        folder.mkdir()
        if file:
            (folder / file).write_text("{}")
        write_provenance(folder, Result(PEER, kind="text"))
        card = (folder / "README.md").read_text()
        assert ("AutoProcessor" in card) == bool(file) and ("AutoTokenizer" in card) == (not file)
