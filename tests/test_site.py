"""The rendered site: no broken link, nothing from the network, and every page opened in a browser at desktop and phone width."""
import functools
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "_docs"
PAGES = sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.html")) if DOCS.is_dir() else []
pytestmark = pytest.mark.skipif(not PAGES, reason="the site is not built: run make docs")


class Page(HTMLParser):
    "What a page links to, what it loads, and the anchors it has"

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag in ("img", "script", "source", "iframe") and a.get("src"):
            self.loads.append(a["src"])
        if tag == "link" and a.get("href") and a.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(a["href"])


@functools.cache
def read(name):
    return Page((DOCS / name).read_text(encoding="utf-8"))


def target(page, url):
    "The file that a local address names, and the anchor in it; None for another host"
    if urlparse(url).scheme:
        return None
    url, anchor = urldefrag(url)
    path = (DOCS / page).parent / unquote(url.split("?")[0]) if url else DOCS / page
    return (path / "index.html" if path.is_dir() else path).resolve(), anchor


def test_there_is_a_page_for_every_notebook():
    notebooks = {p.stem.split("_", 1)[1] if re.match(r"\d\d_", p.stem) else p.stem for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert notebooks == {Path(p).stem for p in PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures(page):
    for url in read(page).links:
        if (t := target(page, url)) is None:
            assert urlparse(url).scheme in ("http", "https", "mailto") and (urlparse(url).netloc or urlparse(url).path)
            continue
        path, anchor = t
        assert path.exists(), f"{url} leads nowhere"
        if anchor and path.suffix == ".html" and path.is_relative_to(DOCS.resolve()):
            assert unquote(anchor) in read(path.relative_to(DOCS.resolve()).as_posix()).ids, f"{url} has no such place"
    for url in read(page).loads:
        assert url.startswith("data:") or (t := target(page, url)) and t[0].exists(), f"{url} is not there, or comes from the network"


@pytest.mark.parametrize("page", PAGES)
def test_formulas_need_no_network(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    spans = re.findall(r'<span class="math (?:inline|display)">(.*?)</span>', text, re.S)
    assert all(s.startswith("<math") and not re.search(r"\\[a-zA-Z]", html.unescape(s)) for s in spans)


# All pages in frames, each at both widths: how wide each is, and which of its pictures are missing.
PROBE = """<!doctype html><meta charset=utf-8><body>FRAMES<script>
onload = () => {
  const look = f => [f.dataset.page, f.dataset.width, f.contentDocument];
  const said = [...document.querySelectorAll('iframe')].map(look).map(([page, width, d]) => ({page, width, title: d.title,
    wide: d.documentElement.scrollWidth, missing: [...d.images].filter(m => !m.naturalWidth).map(m => m.src)}));
  const out = document.createElement('pre');
  out.id = 'out'; out.textContent = JSON.stringify(said);
  document.body.replaceChildren(out);
};
</script>"""
FRAME = '<iframe src="{0}" data-page="{1}" data-width="{2}" style="width:{2}px;height:900px;border:0"></iframe>'
WIDTHS = 1200, 390
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BARE = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--allow-file-access-from-files", "--enable-logging=stderr"]


@pytest.mark.minutes
@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_every_page_opens_at_both_widths(tmp_path):
    frames = [FRAME.format((DOCS / page).resolve().as_uri(), page, width) for page in PAGES for width in WIDTHS]
    (tmp_path / "probe.html").write_text(PROBE.replace("FRAMES", "".join(frames)), encoding="utf-8")
    p = subprocess.run([CHROMIUM, *BARE, f"--user-data-dir={tmp_path / 'user'}", f"--window-size={max(WIDTHS)},1000", "--dump-dom",
                        (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, timeout=600)
    found = re.search(r'<pre id="out">(.*?)</pre>', p.stdout, re.S)
    assert found and found[1], p.stderr[-2000:]
    out = json.loads(html.unescape(found[1]))
    assert [(said["page"], int(said["width"])) for said in out] == [(page, width) for page in PAGES for width in WIDTHS]
    assert not [line for line in p.stderr.splitlines() if "CONSOLE" in line]
    for said in out:
        assert said["title"] and not said["missing"], said
        assert said["wide"] <= int(said["width"]), said


CHOOSE = """<script>
for (const [col, value] of Object.entries(CHOICE)) {
  const pick = document.querySelector(`#all-methods select[data-col="${col}"]`);
  pick.value = value; pick.dispatchEvent(new Event('change'));
}
const left = [...document.querySelectorAll('#all-methods tbody tr')].filter(r => !r.hidden);
document.body.innerHTML = `<pre id="out">${JSON.stringify(left.map(r => [...r.cells].slice(0, 2).map(c => c.textContent)))}</pre>`;
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
@pytest.mark.parametrize("choice", [{}, {0: "auto"}, {1: "6"}, {0: "LaCo", 1: "8"}])
def test_the_table_of_methods_shows_what_is_chosen_without_a_network(choice, tmp_path):
    page = (DOCS / "tutorials/all_methods.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(page + CHOOSE.replace("CHOICE", json.dumps(choice)), encoding="utf-8")
    p = subprocess.run([CHROMIUM, *BARE, f"--user-data-dir={tmp_path / 'user'}", "--dump-dom", (tmp_path / "page.html").as_uri()],
                       capture_output=True, text=True, timeout=120)
    left = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', p.stdout, re.S)[1]))
    every = [r for name in ("methods", "widths") for r in json.loads((ROOT / f"benchmarks/results/{name}/comparison.json").read_text())["rows"] if r["n"]]
    wanted = [[r["method"], str(r["n"])] for r in every if all([r["method"], str(r["n"])][int(c)] == v for c, v in choice.items())]
    assert sorted(left) == sorted(wanted) and len(left) > 0
