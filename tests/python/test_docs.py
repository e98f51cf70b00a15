"""Tests of the documents: README's Python snippet runs, its C++ snippet names what exists, links lead somewhere."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")})


def snippet(language):
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)[1]


def test_python_snippet_runs():
    names = {}
    exec(snippet("python"), names)
    assert names["out"].shape == (2, 1, 16, 512)
    assert names["lse"].shape == (2, 16, 1)
    assert torch.isfinite(names["out"]).all()


def test_cpp_snippet_names_what_the_headers_declare():
    headers = "".join(file.read_text() for file in (ROOT / "include/flash_mla").glob("*.h"))
    names = set(re.findall(r"flash_mla::(\w+)|args\.(\w+)", snippet("cpp")))
    for name in {part for pair in names for part in pair if part}:
        assert re.search(rf"\b{name}\b", headers), name


def test_quick_start_names_real_targets():
    for target in re.findall(r"^    make ([a-z-]+)", README, re.MULTILINE):
        command = ["make", "--dry-run", "--question", target]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert "No rule to make target" not in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
