"""The pages point at files and names that exist."""

import re
from pathlib import Path

import pytest

import qjax

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    page
    for folder in (ROOT, ROOT / "docs", ROOT / "examples")
    for page in [*folder.glob("*.md"), *folder.glob("*/README.md")]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(page):
    text = page.read_text("utf-8")
    for target in re.findall(
        r"\b(?:tests|docs|benchmarks|examples|qjax)/[\w/.-]+", text
    ):
        if "quickstart-results" not in target:
            assert (ROOT / target.rstrip(".")).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_functions_exist(page):
    for path in re.findall(r"\bqjax((?:\.[A-Za-z_]\w*)+)", page.read_text("utf-8")):
        if path == ".json":
            continue
        value = qjax
        for name in path[1:].split("."):
            assert hasattr(value, name), f"qjax{path}"
            value = getattr(value, name)
