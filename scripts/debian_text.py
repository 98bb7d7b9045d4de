#!/usr/bin/env python
"""English text that any reader can fetch without a model hub: the documentation in four Debian packages, as JSON lines.

python scripts/debian_text.py --output out/debian_text.jsonl --held_out out/debian_held_out.jsonl
"""

import argparse
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import httpx

from sparsekv.data import is_held_out
from sparsekv.errors import UserError, require
from sparsekv.files import check_writable, write_text, writing

# The second keeps every version that there ever was; it answers with its last copy before that time.
MIRRORS = ("https://deb.debian.org/debian", "https://snapshot.debian.org/archive/debian/20260715T000000Z")
MIN_CHARS = 400  # of a document
LONG_PARAGRAPH = 100  # characters; from here on a repeated paragraph is no accident
DROPPED_TAGS = {"head", "script", "style", "nav"}
DROPPED_NAMES = {"banner", "book-navigation", "docnav", "menu", "navfooter", "navheader", "toc"}  # class or id
BLOCKS = {"blockquote", "center", "dd", "div", "dl", "dt", "hr", "li", "ol", "p", "pre", "table", "ul"}
BLOCKS |= {f"h{level}" for level in range(1, 7)}
SILENT_COMMANDS = {"back", "encoding", "for", "over", "pod"}
# Formatting codes of POD, innermost first. A code in two or three brackets has them apart from its content.
POD_CODES = [
    re.compile(pattern, re.DOTALL)
    for pattern in (r"([A-Z])<([^<>]*)>", r"([A-Z])<<<\s+(.*?)\s+>>>", r"([A-Z])<<\s+(.*?)\s+>>")
]
BRACKETS = str.maketrans("<>", "\ue000\ue001")  # stand for those that are text
INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\ufeff")) | {0xA0: " "}


@dataclass(frozen=True)
class Package:
    """A Debian package, and which of its files are pages of English prose."""

    name: str
    version: str
    folder: str
    sha256: str
    pages: str

    @property
    def file(self) -> str:
        """Name of the package file."""
        return f"{self.name}_{self.version}_all.deb"


PACKAGES = (
    Package(
        "anarchism",
        "15.3-3",
        "pool/main/a/anarchism",
        "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        r"html/(?!(a|ar)?links|biblio|book|contact|index|new|pdf|translations)\w+\.html",
    ),
    Package(
        "debian-handbook",
        "11.20220922",
        "pool/main/d/debian-handbook",
        "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        r"html/en-US/[\w.-]+\.html",
    ),
    Package(
        "perl-doc",
        "5.36.0-7+deb12u3",
        "pool/main/p/perl",
        "e9e3564ff5ade27de0585835f2acad769bcc545c0a0045a9f55d5401f27f7591",
        # without the contents, a table of properties, two licences, and what is not in English
        r"pod/(?!perl(toc|uniprops|gpl|artistic|cn|jp|ko|tw)\.)\w+\.pod",
    ),
    Package(
        "postgresql-doc-15",
        "15.18-0+deb12u1",
        "pool/main/p/postgresql-15",
        "3c598277a463c44d672daa2c335deb8d8252e1852fb025fd4578ea2d9a1b90f0",
        r"html/(?!bookindex|features|legalnotice|sql-keywords|unsupported)[\w-]+\.html",
    ),
)


def main(arguments: list[str] | None = None) -> None:
    """Fetch the packages and write one JSON line a document, ``{"text", "source"}``, the same bytes every time.

    The lines are in the order of their own SHA-256, so a prefix is a fair sample. It is not the hash that decides what
    training holds out.

    Raises
    ------
    UserError
        The output cannot be written, or a package cannot be fetched or is not the expected one.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--held_out", type=Path, help="another, for the documents among them that training leaves out")
    asked = parser.parse_args(arguments)
    outputs = {"--output": asked.output} | ({"--held_out": asked.held_out} if asked.held_out else {})
    for flag, output in outputs.items():
        require(output.suffix == ".jsonl", f"{flag} {output}: its kind is not known; name a .jsonl file")
        require(not output.is_dir(), f"{flag} {output}: it is a folder; name a file")
        check_writable(output.parent, flag)
    pages = {package.name: list(texts(package, fetch(package))) for package in PACKAGES}
    records = unique(pages)
    for flag, output in outputs.items():
        chosen = [record for record in records if flag == "--output" or is_held_out(record[1])]
        lines = [json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n" for source, text in chosen]
        with writing(output, flag):
            write_text(output, "".join(sorted(lines, key=sha256)))
    for name in pages:
        sizes = [len(text) for source, text in records if source == name]
        print(f"{name}: {len(sizes):,} documents, {sum(sizes):,} characters")
    print(f"{asked.output}: {len(records):,} documents, {sum(len(text) for _, text in records):,} characters")


def sha256(content: str | bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(content.encode("utf-8") if isinstance(content, str) else content).hexdigest()


def fetch(package: Package) -> bytes:
    """The package file, from apt where it offers that very version, or else from a mirror; its SHA-256 is verified."""
    reasons = []
    for place in (None, *MIRRORS):
        try:
            content = _from_mirror(place, package) if place else _from_apt(package)
        except (OSError, httpx.HTTPError) as error:
            reasons.append(" ".join(str(error).split()) or type(error).__name__)
            continue
        if sha256(content) == package.sha256:
            return content
        reasons.append(f"SHA-256 {sha256(content)}, not {package.sha256}")
    raise UserError(f"{package.file}: cannot be fetched ({'; '.join(reasons)})")


def _from_apt(package: Package) -> bytes:
    if shutil.which("apt-get") is None:
        raise OSError("no apt-get here")
    with tempfile.TemporaryDirectory() as folder:
        command = ["apt-get", "-qq", "download", f"{package.name}={package.version}"]
        if subprocess.run(command, cwd=folder, capture_output=True).returncode != 0:
            raise OSError(f"apt-get does not offer {package.name}={package.version}")
        return (Path(folder) / package.file).read_bytes()


def _from_mirror(mirror: str, package: Package) -> bytes:
    url = f"{mirror}/{package.folder}/{package.file}"
    return httpx.get(url, follow_redirects=True, timeout=60).raise_for_status().content


def texts(package: Package, content: bytes) -> Iterator[str]:
    """The pages of a package as plain text, by path."""
    with tarfile.open(fileobj=io.BytesIO(_data(content)), mode="r:xz") as archive:
        wanted = (member for member in archive if re.search(f"/{package.pages}$", member.name))
        files = {member.name: file.read() for member in wanted if (file := archive.extractfile(member))}
    for name, page in sorted(files.items()):
        to_text = pod_text if name.endswith(".pod") else html_text
        yield to_text(page.decode("utf-8", "replace")).translate(INVISIBLE)


def _data(content: bytes) -> bytes:
    """The member data.tar.xz of a package, an `ar` archive: a header of 60 bytes, then the content, to an even size."""
    place = len(b"!<arch>\n")
    while not content.startswith(b"data.tar.xz", place):
        place += 60 + (int(content[place + 48 : place + 58]) + 1) // 2 * 2
    return content[place + 60 :][: int(content[place + 48 : place + 58])]


def unique(pages: dict[str, list[str]]) -> list[tuple[str, str]]:
    """(Source, text) without repetitions: of a long paragraph on three pages or more, a licence say, one is kept."""
    paragraphs = [(name, page.split("\n\n")) for name, texts in pages.items() for page in texts]
    counts = Counter(part for _, parts in paragraphs for part in set(parts) if len(part) >= LONG_PARAGRAPH)
    seen: set[str] = set()
    records: dict[str, tuple[str, str]] = {}
    for name, parts in paragraphs:
        kept = [part for part in parts if counts[part] < 3 or part not in seen]
        seen.update(parts)
        text = "\n\n".join(kept)
        if len(text) >= MIN_CHARS:
            records.setdefault(sha256(text), (name, text))
    return list(records.values())


def html_text(page: str) -> str:
    """The paragraphs of an HTML page, blank lines between them; a row of a table is a line, its cells between bars."""
    parser = _Html()
    parser.feed(page)
    parser.close()
    parser.end_paragraph()
    return "\n\n".join(parser.paragraphs)


class _Html(HTMLParser):
    """Collects paragraphs, without what only leads to other pages."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.buffer = ""  # what was read since the last paragraph or cell
        self.row: list[str] = []
        self.rows: list[str] = []
        self.inside = Counter[str]()  # how many of the tags table and pre are open
        self.dropped, self.depth = "", 0  # the tag whose content is dropped, and how many of its kind are open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name for key, value in attrs if key in ("class", "id") for name in (value or "").split()}
        if self.depth:
            self.depth += tag == self.dropped
        elif tag in DROPPED_TAGS or names & DROPPED_NAMES:
            self.dropped, self.depth = tag, 1
        elif tag == "br":
            self.buffer += "\n"
        elif tag in BLOCKS:
            self.end_paragraph()
            self.inside[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        if self.depth:
            self.depth -= tag == self.dropped
        elif tag in ("td", "th"):
            self.row.append(self.take().replace("\n\n", "\n"))
        elif tag == "tr":
            self.rows.append(" | ".join(filter(None, self.row)))
            self.row = []
        elif tag in BLOCKS:
            self.end_paragraph()
            self.inside[tag] -= 1
            if tag == "table":
                self.paragraphs.append("\n".join(filter(None, self.rows)))
                self.rows = []

    def handle_data(self, data: str) -> None:
        if not self.depth:
            self.buffer += data if self.inside["pre"] else re.sub(r"\s+", " ", data)

    def end_paragraph(self) -> None:
        """What was read is a paragraph; within a table it is part of a cell."""
        if self.inside["table"] > 0:
            self.buffer += "\n"
        elif text := self.take():
            self.paragraphs.append(text)

    def take(self) -> str:
        """What was read, without superfluous white space; preformatted lines keep their indentation."""
        lines, self.buffer = self.buffer.split("\n"), ""
        if self.inside["pre"] and not self.inside["table"]:
            return "\n".join(line.rstrip() for line in lines).strip("\n")
        return re.sub("\n{2,}", "\n\n", "\n".join(" ".join(line.split()) for line in lines)).strip()


def pod_text(page: str) -> str:
    """The paragraphs of a page in Perl's documentation format (https://perldoc.perl.org/perlpod), likewise."""
    paragraphs = []
    shown = False
    page = re.sub(r"^=begin (\S+).*?^=end \1\s", "", page, flags=re.DOTALL | re.MULTILINE)  # for other formats
    for block in re.split(r"\n(?:[ \t]*\n)+", page.strip("\n")):
        command = re.match(r"=(\w+)\s*", block)
        if command:
            shown = command[1] != "cut"
        if not shown or (command and command[1] in SILENT_COMMANDS):
            continue
        if block[0] in " \t":  # verbatim
            paragraphs.append("\n".join(line.rstrip() for line in block.split("\n")))
        else:
            paragraphs.append(" ".join(_without_codes(block[command.end() if command else 0 :]).split()))
    bullets = re.compile(r"\*|\d+[.)]?|")
    return "\n\n".join(paragraph for paragraph in paragraphs if not bullets.fullmatch(paragraph))


def _without_codes(text: str) -> str:
    """A paragraph of POD as it reads: links by their text, escapes as characters, index entries gone."""
    while any((found := code.subn(_meaning, text))[1] for code in POD_CODES):
        text = found[0]
    return text.translate({stand_in: bracket for bracket, stand_in in BRACKETS.items()})


def _meaning(code: re.Match[str]) -> str:
    letter, text = code.groups()
    if letter in "XZ":
        text = ""
    elif letter == "E":  # a name as in HTML, or a number
        text = html.unescape(f"&{text};" if text.isalpha() else f"&#{text.removeprefix('0')};")
    elif letter == "L" and "|" in text:
        text = text.split("|")[0]
    elif letter == "L" and not re.match(r"\w+:\w*/", text):
        page, _, section = text.partition("/")
        text = " in ".join(filter(None, [section and f'"{section.strip(chr(34))}"', page]))
    return text.translate(BRACKETS)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"debian_text.py: {error}", file=sys.stderr)
        sys.exit(2)
