"""The Dockerfile, read as docker reads it; its steps run in a clean environment where `make containers` asks for it, which takes minutes."""
import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = "opt", "src", "cache", "work", "var"  # folders of the image that the steps write to
OF_THE_SYSTEM = "apt-get", "useradd", "chown"  # what only an image can be asked for: written down, not run


def read(text):
    "[(instruction, what follows it)]"
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    return [tuple(line.strip().split(None, 1)) for line in joined.splitlines() if line.strip()]


STEPS = read((ROOT / "Dockerfile").read_text(encoding="utf-8"))


def stages(steps=STEPS):
    "{device: (base, [what its stage sets])} of those before the last FROM, and the steps behind it"
    starts = [i for i, (k, _) in enumerate(steps) if k == "FROM"]
    bases = {}
    for a, b in zip(starts, starts[1:]):
        base, _, name = steps[a][1].split()
        bases[name] = base, steps[a + 1:b]
    return bases, steps[starts[-1]][1], steps[starts[-1] + 1:]


BASES, LAST, BODY = stages()


def index_of(device):
    return dict(words.split("=", 1) for _, words in BASES[device][1])["TORCH_INDEX"]


def ignored(path, lines=(ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()):
    "As docker decides: the last pattern that matches"
    out = False
    for line in filter(None, (s.strip() for s in lines)):
        if line.startswith("#"):
            continue
        pattern = line.lstrip("!")
        hit = path.split("/")[-1] == pattern[3:] if pattern.startswith("**/") else fnmatch.fnmatch(path.split("/")[0], pattern)
        out = not line.startswith("!") if hit else out
    return out


def test_a_device_chooses_the_base_and_torch_s_index_and_nothing_else():
    assert STEPS[0] == ("ARG", "DEVICE=cpu") and LAST == "${DEVICE}" and set(BASES) == {"cpu", "cuda"}
    assert BASES["cuda"][0].startswith("nvidia/cuda:") and not BASES["cpu"][0].startswith("nvidia")
    for base, sets in BASES.values():
        assert ":" in base and not base.endswith(":latest") and [k for k, _ in sets] == ["ENV"] and sets[0][1].startswith("TORCH_INDEX=https://")
    assert index_of("cpu") != index_of("cuda") and not any("cuda" in words or "nvidia" in words for _, words in BODY)


def test_what_is_copied_is_there_and_reaches_the_builder():
    sources = [s for k, words in BODY if k == "COPY" for s in words.split()[:-1]]
    assert set(sources) == {"constraints.txt", "settings.ini", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "replaceme"}
    for s in sources:
        assert (ROOT / s).exists() and not ignored(s), s
    for s in ".git", ".venv", ".cache", ".env", "pruned", "nbs", "tests", "benchmarks", "replaceme/__pycache__":
        assert ignored(s), s


def test_layers_are_small_and_change_in_the_order_of_the_work():
    runs = [words for k, words in BODY if k == "RUN"]
    apt = next(w for w in runs if "apt-get" in w)
    assert "--no-install-recommends" in apt and apt.endswith("rm -rf /var/lib/apt/lists/*")
    assert any(k == "ENV" and "PIP_NO_CACHE_DIR=1" in w for k, w in BODY)
    order = [i for i, (k, w) in enumerate(BODY) if k == "COPY"]
    assert [BODY[i][1].split()[0] for i in order][-1] == "replaceme"  # what changes most, last
    torch = next(i for i, (k, w) in enumerate(BODY) if "TORCH_INDEX" in w)
    assert order[0] < torch < order[1] and BODY[torch][1].endswith("-c constraints.txt torch")


def test_nobody_in_particular_runs_it_and_it_keeps_no_secret():
    kinds = [k for k, _ in BODY]
    user, check = kinds.index("USER"), next(i for i, (k, w) in enumerate(BODY) if w.startswith("run_replaceme --help"))
    assert int(BODY[user][1]) > 0 and "root" not in kinds[user:] and user < check and kinds.count("USER") == 1
    assert ("VOLUME", "/cache") in BODY and "chown replaceme /cache" in next(w for k, w in BODY if "useradd" in w)
    env = dict(w.split("=", 1) for k, words in BODY if k == "ENV" for w in words.split())
    assert env["REPLACEME_CACHE"].startswith("/cache/") and env["HF_HOME"].startswith("/cache/")
    assert not re.search(r"token|password|secret|api_?key", (ROOT / "Dockerfile").read_text(), re.I)


def inside(words, root):
    "Places of the image as places under a folder"
    return re.sub(rf"(?<![\w./:-])/({'|'.join(PLACES)})\b", lambda m: f"{root}/{m[1]}", words)


def test_places_of_the_image_are_moved_and_nothing_else():
    assert inside("rm -rf /var/lib/apt/lists/* && mkdir /cache", "/r") == "rm -rf /r/var/lib/apt/lists/* && mkdir /r/cache"
    assert inside("PATH=/opt/venv/bin:/usr/bin https://x.org/src ./work", "/r") == "PATH=/r/opt/venv/bin:/usr/bin https://x.org/src ./work"


def perform(steps, root, env, said):
    "Run the steps as a builder does, under a folder; what the system would have to do is written down in `said`"
    here, tools = root, root / "tools"
    tools.mkdir()
    for name in OF_THE_SYSTEM:
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {said}\n')
        (tools / name).chmod(0o755)
    (tools / "python3").symlink_to(getattr(sys, "_base_executable", sys.executable))
    env = {**env, "PATH": f"{tools}:/usr/bin:/bin"}
    for kind, words in steps:
        if kind == "ENV":
            for pair in inside(words, root).split():
                k, v = pair.split("=", 1)
                env[k] = v.replace("$PATH", env["PATH"])
        elif kind == "WORKDIR":
            here = Path(inside(words, root))
            here.mkdir(parents=True, exist_ok=True)
        elif kind == "COPY":
            *sources, to = words.split()
            for s in sources:
                if (ROOT / s).is_dir():
                    shutil.copytree(ROOT / s, here / to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / s, here / to)
        elif kind == "RUN":
            p = subprocess.run(["sh", "-c", inside(words, root)], cwd=here, env=env, capture_output=True, text=True)
            assert p.returncode == 0, f"RUN {words}\n{p.stdout[-2000:]}{p.stderr[-3000:]}"
        elif kind == "CMD":
            return subprocess.run(eval(words), cwd=here, env=env, capture_output=True, text=True)
        else:
            assert kind in ("USER", "VOLUME"), kind


def test_steps_are_performed(tmp_path):
    "A builder of three lines: variables, places, a copy, what is asked of the system, and what is started"
    steps = read('ENV A=/cache/a\nRUN apt-get update \\\n && mkdir -p /cache && echo "$A" > /cache/x\nWORKDIR /src\nCOPY setup.py ./\nCMD ["ls"]')
    p = perform(steps, tmp_path, {}, tmp_path / "said")
    assert p.stdout == "setup.py\n" and (tmp_path / "cache/x").read_text() == f"{tmp_path}/cache/a\n"
    assert (tmp_path / "said").read_text() == "apt-get update\n"
    with pytest.raises(AssertionError, match="RUN false"):
        (tmp_path / "other").mkdir()
        perform(read("RUN false"), tmp_path / "other", {}, tmp_path / "said")


@pytest.mark.skipif(not os.environ.get("REPLACEME_CONTAINERS"), reason="installs everything anew, in minutes: `make containers`")
def test_the_steps_install_and_start_it(tmp_path):
    "All of them, with torch from the index that pip is set to here, which has a build for a CPU"
    (tmp_path / "home").mkdir()
    pip = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_", "REQUESTS_")) or k.lower().endswith("_proxy")}
    env = {**pip, "HOME": str(tmp_path / "home"), "TORCH_INDEX": pip.get("PIP_INDEX_URL", "https://pypi.org/simple")}
    try:
        p = perform(BODY, tmp_path, env, tmp_path / "said")
    except AssertionError as e:
        if re.search(r"Temporary failure in name resolution|Network is unreachable|Failed to establish a new connection", str(e)):
            pytest.skip("no network: pip finds no package index")
        raise
    assert p.returncode == 0 and p.stdout.startswith("usage: run_replaceme")
    own = subprocess.run([tmp_path / "opt/venv/bin/python", "-c", "import replaceme, sys; print(replaceme.__file__)"], cwd=tmp_path, capture_output=True, text=True, env={})
    assert Path(own.stdout.strip()).is_relative_to(tmp_path / "opt/venv"), own.stderr
    asked = [shlex.split(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert [w[0] for w in asked] == ["apt-get", "apt-get", "useradd", "chown"]
    assert not list((tmp_path / "src").glob("build"))
