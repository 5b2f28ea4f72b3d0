"""Every link of the documents to a file or a heading of this repository leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))

FENCE = re.compile(r"^ *(```|~~~).*?^ *\1[`~]*\s*$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.*?)[ \t]*#*[ \t]*$", re.MULTILINE)
LINK = re.compile(
    r"\]\(\s*<?([^)\s>]+)"  # [text](target)
    r"|^ {0,3}\[[^\]^]+\]:\s*<?([^\s>]+)"  # [name]: target
    r"""|<[^>]*\b(?:href|src)=["']([^"']+)""",
    re.MULTILINE,
)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them: what is seen, in lower case, letters, digits, _ and -
    only, spaces as -; the second of a name ends in -1."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        seen = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        seen = re.sub(r"<[^>]+>|(?<!\w)[*_]+|[*_]+(?!\w)", "", seen)
        name = re.sub(r"[^\w\- ]", "", seen.lower()).replace(" ", "-")
        number, anchor = 0, name
        while anchor in found:
            number += 1
            anchor = f"{name}-{number}"
        found.add(anchor)
    return found


def links(text: str) -> list[str]:
    """Targets, but for those on another host."""
    plain = CODE.sub("", FENCE.sub("", text))
    targets = ["".join(groups) for groups in LINK.findall(plain)]
    return [target for target in targets if not re.match(r"[a-z][a-z0-9+.-]*:|//", target)]


def dead_links(document: Path, root: Path) -> list[str]:
    faults = []
    for target in links(document.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.is_relative_to(root) or not file.exists():
            faults.append(f"{target}: there is no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text("utf-8")):
            faults.append(f"{target}: {file.name} has no such heading")
    return faults


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    assert dead_links(document, ROOT) == []


def test_there_are_links() -> None:
    """The search finds what it is for."""
    found = [target for path in DOCUMENTS for target in links(path.read_text(encoding="utf-8"))]
    assert len(found) > 20 and any("#" in target for target in found)


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text(
        "# Kept, `a_b` & *all*: 2 × 3\n\n## Twice\n## [Twice](x.md)\n```\n# not a heading\n```\n"
    )
    document = tmp_path / "document.md"
    good = [
        "other.md",
        "other.md#kept-a_b--all-2--3",
        "other.md#twice-1",
        "#here",
        "other.md#twice",
    ]
    bad = ["others.md", "other.md#kept", "other.md#twice-2", "other.md#not-a-heading", "#there"]
    bad += ["../outside.md"]
    document.write_text(
        "## Here\n`[code](nowhere.md)` [web](https://example.org/#x)\n"
        + "".join(f"[text\nof it]({target})\n" for target in good + bad[:-2])
        + f'<img src="{bad[-2]}">\n[name]: {bad[-1]}\n'
    )
    assert [fault.split(": ")[0] for fault in dead_links(document, tmp_path)] == bad
