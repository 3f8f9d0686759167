"""What the pages for readers name is there: links, pictures, headings, scripts, configs, targets of make."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
OTHERS = ("CHANGELOG.md", "THIRD_PARTY.md", "ckpt/miniature/README.md", "miniature/README.md")
PAGES = [README, *sorted(ROOT.glob("docs/*.md")), *(ROOT / name for name in OTHERS)]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def anchors(text: str) -> set[str]:
    """What a link can name of a page, by the rule of GitHub."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def faults(page: Path, text: str) -> list[str]:
    """What a page names that is not there, one line each."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)|\bsrc=\"([^\"]+)\"", text):
        path, _, anchor = "".join(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if re.match(r"\w+:", path):
            continue
        if not target.exists():
            found.append(f"{path} is linked")
        elif anchor and anchor not in anchors(text if target == page else target.read_text(encoding="utf-8")):
            found.append(f"{path}#{anchor} is linked")
    code = "\n".join(
        [*re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S), *re.findall(r"`([^`\n]+)`", text)]
    )
    scripts = re.findall(r"^(?:python|accelerate launch) ([\w./]+\.py)", code, re.M)
    configs = re.findall(r"\bcfg/[\w/]+\.json\b", code)
    found += [f"{name} is run" for name in [*scripts, *configs] if not (ROOT / name).is_file()]
    found += [
        f"make {name} is run" for name in re.findall(r"^make ([\w-]+)", code, re.M) if name not in TARGETS
    ]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_only_what_is_there(page):
    assert faults(page, page.read_text(encoding="utf-8")) == []


PLANTED = {
    "[a page](docs/NOWHERE.md)": "docs/NOWHERE.md is linked",
    "![a picture](docs/nothing.png)": "docs/nothing.png is linked",
    '<img src="docs/nothing.webp">': "docs/nothing.webp is linked",
    "[a part](docs/SPEED.md#in-no-time)": "docs/SPEED.md#in-no-time is linked",
    "[a part of this page](#nothing)": "#nothing is linked",
    "```\npython train_lore.py\n```": "train_lore.py is run",
    "| `accelerate launch morf.py` |": "morf.py is run",
    "`python train_lora.py cfg/hill.json`": "cfg/hill.json is run",
    "```\nmake coffee    # black\n```": "make coffee is run",
}


@pytest.mark.parametrize("text", PLANTED)
def test_each_kind_of_fault_is_seen(text):
    right = (
        "# A page\n\n[a page](docs/SPEED.md#the-demo) [this](#a-page) [far](https://example.org) "
        "![morph](docs/morph.webp)\n`make demo`, `python train_lora.py cfg/mountain.json rank=4`\n"
    )
    assert faults(README, right) == []
    assert faults(README, f"{right}\n{text}\n") == [PLANTED[text]]


def test_the_readme_is_one_page_and_leads_to_every_other():
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    assert [
        page.name for page in PAGES if page.parent == ROOT / "docs" and f"(docs/{page.name})" not in text
    ] == []


def test_the_tree_in_the_readme_is_that_of_the_project():
    tree = re.search(r"^## Files\n+```\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    assert tree
    names = {line.split()[0] for line in tree[1].splitlines()}
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []
    packages = {f"lorakit/{path.parent.name}/" for path in ROOT.glob("lorakit/*/__init__.py")}
    assert names >= packages | {path.name for path in ROOT.glob("*.py")}
