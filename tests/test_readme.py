"""The README's commands and code run, and every link, path and module that the documents name exists."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from environment import XLA_FLAGS
from PIL import Image

README = ROOT / "README.md"
DOCUMENTS = (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))

# Blocks of the README, by a part of their text that no other block has, with the changes under which they run: the
# demo trains for two steps, on the installed package.
REDUCED = (
    "--workdir=runs/shapes --config.encoders.llama.train.steps=2 --config.encoders.qwen.train.steps=2 "
    "--config.vae.train.steps=2 --config.train.steps=2 --config.train.sample_every=0 --config.evaluate.two_objects=4 "
    "--config.evaluate.held_out_pairs=4 --config.evaluate.three_objects=4 --config.evaluate.four_objects=4"
)
RUN = {
    "-m lidit_jax.main --config=configs/shapes.py": {"pip install -e . && ": "", "--workdir=runs/shapes": REDUCED},
    "-m lidit_jax.sample": {},
    "trained_model.load": {},
}
NOT_RUN = {
    'pip install -e ".[test]"': ".ci/run runs this very line in a fresh environment",
    "launch/tpu_vm.sh": "needs TPUs; tests/test_launch.py runs the script with a stand-in for gcloud",
    "--config=configs/1b.py": "needs two LLMs of 7 to 8 billion weights; tests/test_experiment.py builds the config",
}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`]+)`")
MODULE = re.compile(r"(?:python -m |`)(lidit_jax(?:\.\w+)+)")


def blocks() -> list[tuple[str, str]]:
    """Returns (language, text) of the README's code blocks that can be run."""
    return [match for match in FENCE.findall(README.read_text()) if match[0] in ("bash", "python")]


def block_with(part: str) -> tuple[str, str]:
    [block] = [block for block in blocks() if part in block[1]]
    return block


def prose(document: Path) -> str:
    return FENCE.sub("", document.read_text())


def anchors(document: Path) -> set[str]:
    """Returns the anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named_paths(document: Path) -> set[str]:
    """Returns what stands in backticks and is a path in the repository: below one of its folders, or a Python file."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", "build", "dist"}
    words = {word for code in CODE.findall(prose(document)) for word in code.split()}
    paths = {word.rpartition("=")[2].partition(":")[0] for word in words if "…" not in word}
    return {path for path in paths if path.split("/")[0] in folders and "/" in path or re.fullmatch(r".+/.+\.py", path)}


# --- the README's blocks ----------------------------------------------------------------------------------------


def test_every_block_is_run_here_or_listed_with_a_reason():
    for part in (*RUN, *NOT_RUN):
        block_with(part)
    assert len(blocks()) == len(RUN) + len(NOT_RUN)


def test_substitutions_change_only_what_is_there():
    for part, changes in RUN.items():
        assert all(before in block_with(part)[1] for before in changes)


def test_ci_finds_the_line_that_installs_and_runs_the_tests():
    pattern = re.search(r"grep -m1 -E '(.+)' README.md", (ROOT / ".ci" / "run").read_text())[1]
    assert re.findall(pattern, README.read_text(), re.MULTILINE) == ['pip install -e ".[test]" && pytest']


def test_the_python_example_is_short():
    lines = block_with("trained_model.load")[1].splitlines()
    assert len([line for line in lines if line.strip()]) <= 6


@pytest.mark.slow
def test_the_readmes_blocks_run_in_order_and_write_what_it_says(tmp_path):
    for folder in ("configs", "launch"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": XLA_FLAGS,
    }
    for part, changes in RUN.items():
        language, text = block_with(part)
        for before, after in changes.items():
            text = text.replace(before, after)
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stderr[-4000:]}"

    scores = json.loads((tmp_path / "runs" / "shapes" / "scores.json").read_text())
    assert scores
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        *(f"{i:05}.png" for i in range(8)),
        "grid.png",
        "images.json",
        "prompts.png",
    ]
    assert np.asarray(Image.open(tmp_path / "out" / "00000.png")).shape == (32, 32, 3)


# --- links, paths, modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_to_files_and_headings_that_exist(document):
    broken = []
    for link in LINK.findall(prose(document)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_in_backticks_exist(document):
    assert not sorted(path for path in named_paths(document) if not (ROOT / path).exists())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_configs_and_scripts_in_code_blocks_exist(document):
    code = "\n".join(text for _, text in FENCE.findall(document.read_text()))
    paths = set(re.findall(r"\b(?:configs|launch|tests)/[\w.]+\w", code))
    assert not sorted(path for path in paths if not (ROOT / path).exists())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_modules_that_are_run_exist(document):
    missing = []
    for module in set(MODULE.findall(document.read_text())):
        place = ROOT / module.replace(".", "/")
        if not place.with_suffix(".py").exists() and not (place / "__main__.py").exists():
            missing.append(module)
    assert not missing


def test_every_document_is_linked_from_the_readme_and_says_for_whom_it_is():
    linked = set(LINK.findall(prose(README)))
    for document in (ROOT / "docs").glob("*.md"):
        assert any(link.partition("#")[0] == f"docs/{document.name}" for link in linked), document.name
        paragraph = document.read_text().split("\n\n")[1]
        assert paragraph.startswith("For "), document.name


def test_the_figure_names_files_that_exist():
    tree = xml.etree.ElementTree.parse(ROOT / "docs" / "architecture.svg")
    files = [element.text for element in tree.iter() if element.get("class") == "file"]
    assert len(files) > 15
    assert not [file for file in files if not (ROOT / "lidit_jax" / file).is_file()]
