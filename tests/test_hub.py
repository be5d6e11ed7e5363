"""push_to_hub: asked for before the work begins, uploaded when it is done, and a failure never costs the folder."""
import json
from pathlib import Path

import huggingface_hub
import pytest

from replaceme.core import ReplaceMeError, ReplaceMeWarning
from replaceme.pipeline import make_config, run


class Hub:
    "Stands in for the hub's interface and notes what it was asked"
    said, fails, known, files = [], None, True, [".gitattributes"]

    def __init__(self, token=None):
        self.token = token

    def whoami(self):
        Hub.said.append(("whoami", self.token))
        return dict(name="me")

    def list_repo_files(self, name):
        return Hub.files

    def create_repo(self, name, private, exist_ok):
        Hub.said.append(("create", self.token, name, private, exist_ok))
        if not Hub.known:
            raise OSError("403 Forbidden")
        return type("Url", (), dict(repo_id="me/" + name.split("/")[-1]))()

    def upload_folder(self, folder_path, repo_id, commit_message, delete_patterns):
        if Hub.fails:
            raise Hub.fails
        Hub.said.append(("upload", repo_id, delete_patterns, sorted(p.name for p in Path(folder_path).iterdir())))
        return type("Commit", (), dict(commit_url="https://hub/commit"))()


@pytest.fixture
def place(tmp_path, monkeypatch, save_tiny):
    Hub.said, Hub.fails, Hub.known, Hub.files = [], None, True, [".gitattributes"]
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return save_tiny(tmp_path)


def config(place, **keys):
    return make_config(**{**dict(model_path=str(place / "tiny"), layers_to_skip=2, method="lstsq", dataset="python-docs", dataset_size=8, max_length=32, eval_size=2, eval_length=32,
                                 prompt=None, save_path=str(place / "out"), push_to_hub="me/small", token="hf_secret"), **keys})


def test_the_finished_folder_is_uploaded(place):
    result, path = run(config(place), "model_path: %s/tiny" % place)
    who, create, again, upload = Hub.said
    assert who == ("whoami", "hf_secret") and create == again == ("create", "hf_secret", "me/small", True, True)
    assert upload[1:3] == ("me/small", "*") and {"model.safetensors", "config.json", "README.md", "report.html", "replaceme.json"} <= set(upload[3])
    assert json.loads((path / "replaceme.json").read_text())["config"]["push_to_hub"] == "me/small" and result["pushed"] == "https://hub/commit"
    assert "from_pretrained('me/small')" in (path / "README.md").read_text()
    for f in path.iterdir():  # neither the token nor where things lie on this machine
        assert b"hf_secret" not in f.read_bytes() and str(place).encode() not in f.read_bytes(), f.name
    assert "words" not in json.loads((path / "replaceme.json").read_text())["errors"]


def test_what_stays_here_keeps_its_paths(place):
    _, path = run(config(place, push_to_hub=None))
    r = json.loads((path / "replaceme.json").read_text())
    assert r["config"]["model_path"] == str(place / "tiny") and len(r["errors"]["words"]) == 32


def test_a_failed_upload_keeps_the_folder(place):
    Hub.fails = ConnectionError("no route")
    with pytest.warns(ReplaceMeWarning, match=r"could not be pushed to me/small \(ConnectionError: no route\): push it with `hf upload me/small"):
        _, path = run(config(place))
    assert (path / "model.safetensors").exists()


@pytest.mark.parametrize("offline", [True, False])
def test_nothing_begins_without_a_hub(place, monkeypatch, offline):
    "Neither offline nor for somebody the hub does not know; and nothing is loaded before that is known"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    Hub.known = False
    monkeypatch.setattr("replaceme.pipeline.load", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(ReplaceMeError, match="HF_HUB_OFFLINE is set" if offline else "lets nobody write there"):
        run(config(place))
    assert not (place / "out").exists()


@pytest.mark.parametrize("files, ok", [([".gitattributes", "README.md"], True), (["replaceme.json", "model.safetensors"], True), (["model.safetensors"], False)])
def test_what_somebody_else_wrote_is_left_alone(place, files, ok):
    "A repository that is empty or our own may be written over, another not; nor may the dense model's"
    Hub.files = files
    if ok:
        run(config(place))
        assert Hub.said[-1][0] == "upload"
        return
    with pytest.raises(ReplaceMeError, match="was not written by replaceme"):
        run(config(place))
    with pytest.raises(ReplaceMeError, match="which is the dense model"):
        run(config(place, model_path="me/small"))
    assert not any(s[0] == "upload" for s in Hub.said)


@pytest.mark.parametrize("name", ["me/a b", "a/b/c", "me/", ""])
def test_names_no_hub_would_take(name):
    with pytest.raises(ReplaceMeError, match="push_to_hub is"):
        make_config(push_to_hub=name)


def test_nothing_is_pushed_unasked(place):
    run(config(place, push_to_hub=None))
    assert Hub.said == []


def test_a_result_is_pushed_later(place):
    "The folder as others may see it goes up, the one here stays as it is; what is no folder of this result is refused"
    result, path = run(config(place, push_to_hub=None))
    mine = {f.name: f.read_bytes() for f in path.iterdir()}
    sent = {}
    upload = Hub.upload_folder

    def noting(self, folder_path, *a, **k):
        sent.update({f.name: f.read_bytes() for f in Path(folder_path).iterdir()})
        return upload(self, folder_path, *a, **k)
    Hub.upload_folder = noting
    try:
        assert result.push_to_hub("me/small", token="hf_secret", private=False) == "https://hub/commit"
    finally:
        Hub.upload_folder = upload
    assert Hub.said[0] == ("whoami", "hf_secret") and Hub.said[1] == ("create", "hf_secret", "me/small", False, True) and Hub.said[-1][:3] == ("upload", "me/small", "*")
    assert {f.name: f.read_bytes() for f in path.iterdir()} == mine and sent.keys() == mine.keys() and sent["model.safetensors"] == mine["model.safetensors"]
    assert not any(b"hf_secret" in b or str(place).encode() in b for b in sent.values()) and b"from_pretrained('me/small')" in sent["README.md"]
    assert all(f"]({name})".encode() in sent["README.md"] for name in sent if name.endswith(".png"))
    again = type(result)(json.loads((path / "replaceme.json").read_text()))
    assert again.push_to_hub("me/small") == "https://hub/commit"
    Hub.said = []
    for bad, said in ((dict(folder=str(place)), "holds no finished run"), (dict(folder=str(place / "nowhere")), "holds no finished run")):
        with pytest.raises(ReplaceMeError, match=said):
            result.push_to_hub("me/small", **bad)
    with pytest.raises(ReplaceMeError, match="holds another result"):
        type(result)(result, blocks=[[1, 2]]).push_to_hub("me/small")
    assert Hub.said == []  # the hub was not asked
    Hub.fails = ConnectionError("no route")
    with pytest.raises(ReplaceMeError, match=rf"{path} was saved but could not be pushed to me/small \(ConnectionError: no route\): try again"):
        result.push_to_hub("me/small")


def test_the_page_is_had_later(place):
    result, path = run(config(place, push_to_hub=None))
    page = result.save_report(place / "pages" / "a.html")
    assert page.read_bytes() == (path / "report.html").read_bytes() == result.save_report(place / "b").read_bytes()
    html = result._repr_html_()
    assert "tokens/s, 1 text" in html and "perplexity" in html and "<script" not in html
