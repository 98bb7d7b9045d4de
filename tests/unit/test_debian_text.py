"""The text of Debian packages: from package file to JSON lines."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import httpx
import pytest

from scripts import debian_text
from scripts.debian_text import PACKAGES, Package, fetch, html_text, main, pod_text, sha256, texts, unique
from sparsekv.data import is_held_out
from sparsekv.errors import UserError
from sparsekv.sources import documents

ROOT = Path(__file__).parents[2]
PACKAGE = Package("notes", "1-1", "pool/main/n/notes", "", r"html/(?!index)\w+\.html")


def deb(files: dict[str, str]) -> bytes:
    """A package that holds these files, with members of an odd size before them."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"./usr/share/doc/notes/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    packed = b"!<arch>\n"
    for name, content in members.items():
        packed += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        packed += b"\n" * (len(content) % 2)
    return packed


def test_html_keeps_paragraphs_and_drops_what_leads_elsewhere():
    page = """<html><head><title>Backup</title><style>p {}</style></head><body>
    <div class="navheader"><div><a href="x">Prev</a></div> Up</div><ul class="docnav top"><li>Next</ul>
    <h2>9.10. Backup &amp; more</h2><p>One&nbsp;line
      and&#8212;<code>code</code>,<br />another.<p>Unclosed.
    <ul><li><p>First</p></li><li>Second</li></ul>
    <table><tr><th>Name</th><th>Size</th></tr><tr><td><p>a</p><p>b</p></td><td> 1 </td><td></td></tr></table>
    <pre>
  if x &lt; 1:

      y   = 2
</pre><script>no()</script><p></p>Last.<div id="banner">Get it</div></body></html>"""
    assert html_text(page).split("\n\n") == [
        "9.10. Backup & more",
        "One line and—code,\nanother.",
        "Unclosed.",
        "First",
        "Second",
        "Name | Size\na\nb | 1",
        "  if x < 1:",
        "      y   = 2",
        "Last.",
    ]


def test_pod_keeps_paragraphs_without_its_codes():
    page = """Not shown.

=encoding utf8

=head1 NAME X<name>

Some B<bold I<and
italic>> text, C<< $a <=> $b >>, C<$x-E<gt>{y}>, E<eacute>E<233>E<0xE9>.

    my $x = C<verbatim>;

=over 4

=item *

See L<perlop/"Operators">, L<perlre>, L<the list|perlfunc>, L</Here> and L<https://perl.org/>.

=item C<say>

=back

=for hackers Found in file x

=begin html

=head2 hidden

=end html

=cut

not shown

=pod

Last."""
    assert pod_text(page).split("\n\n") == [
        "NAME",
        "Some bold and italic text, $a <=> $b, $x->{y}, ééé.",
        "    my $x = C<verbatim>;",
        'See "Operators" in perlop, perlre, the list, "Here" and https://perl.org/.',
        "say",
        "Last.",
    ]


def test_a_paragraph_on_three_pages_is_kept_once():
    licence, quote = "licence " * 20, "quoted " * 20
    bodies = [f"body {number} " * 60 for number in range(4)]
    pages = {
        "a": [f"{bodies[0]}\n\n{licence}\n\n{quote}", f"{licence}\n\n{bodies[1]}", "too short"],
        "b": [f"{bodies[2]}\n\n{licence}\n\n{quote}", bodies[3], bodies[3]],
    }
    records = unique(pages)
    assert [source for source, _ in records] == ["a", "a", "b", "b"]
    assert ["licence" in text for _, text in records] == [True, False, False, False]
    assert ["quoted" in text for _, text in records] == [True, False, True, False]


def test_the_pages_of_a_package_by_path():
    files = {"html/b.html": "<p>second\u00ad", "html/a.html": "<p>first", "html/index.html": "no", "copyright": "no"}
    assert list(texts(PACKAGE, deb(files))) == ["first", "second"]


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("anarchism/html/secA1.html", True),
        ("anarchism/html/arlinks.html", False),
        ("debian-handbook/html/en-US/sect.backup.html", True),
        ("debian-handbook/html/fr-FR/sect.backup.html", False),
        ("perl-doc/pod/perlfaq4.pod", True),
        ("perl-doc/pod/perlcn.pod", False),
        ("perl-doc/pod/perltoc.pod", False),
        ("postgresql-doc-15/html/sql-createtable.html", True),
        ("postgresql-doc-15/html/bookindex.html", False),
    ],
)
def test_pages_are_english_prose(path, wanted):
    name = path.split("/")[0]
    package = next(package for package in PACKAGES if package.name == name)
    content = deb({path: "=head1 text" if path.endswith(".pod") else "<p>text"})
    assert list(texts(package, content)) == ["text"] * wanted


def test_the_file_is_the_same_every_time_and_a_source(tmp_path, monkeypatch, capsys):
    files = {f"html/p{n}.html": f"<p>{f'Line &quot;{n}&quot; and more. ' * 30}" for n in range(20)}
    monkeypatch.setattr(debian_text, "PACKAGES", [PACKAGE])
    monkeypatch.setattr(debian_text, "fetch", lambda package: deb(files))
    outputs = [tmp_path / "new" / "one.jsonl", tmp_path / "two.jsonl"]
    for output in outputs:
        main(["--output", str(output), "--held_out", str(tmp_path / "held_out.jsonl")])
    first, second = (output.read_bytes() for output in outputs)
    assert first == second
    lines = first.decode().splitlines(keepends=True)
    assert lines == sorted(lines, key=sha256)
    assert len(lines) == 20
    assert all(set(json.loads(line)) == {"text", "source"} for line in lines)
    assert set(documents(str(outputs[0]), 0, None)) == {json.loads(line)["text"] for line in lines}
    held_out = (tmp_path / "held_out.jsonl").read_text().splitlines(keepends=True)
    assert held_out == [line for line in lines if is_held_out(json.loads(line)["text"])]
    assert 0 < len(held_out) < len(lines)
    characters = sum(len(json.loads(line)["text"]) for line in lines)
    assert capsys.readouterr().out.count(f"20 documents, {characters:,} characters") == 4


def test_a_file_that_differs_is_not_taken(monkeypatch):
    right = Package("notes", "1-1", "pool/main/n/notes", sha256(b"right"), "")
    request = httpx.Request("GET", "https://example.org")
    asked = []

    def answer(url, **options):
        asked.append(url)
        return (
            httpx.Response(200, content=b"right", request=request)
            if len(asked) == 2
            else httpx.Response(404, request=request)
        )

    monkeypatch.setattr(debian_text, "_from_apt", lambda package: b"wrong")
    monkeypatch.setattr(httpx, "get", answer)
    assert fetch(right) == b"right"
    assert asked == [f"{mirror}/pool/main/n/notes/notes_1-1_all.deb" for mirror in debian_text.MIRRORS]
    with pytest.raises(UserError) as error:
        fetch(right)
    message = str(error.value)
    assert all(part in message for part in (sha256(b"wrong"), right.sha256, "404"))
    assert "\n" not in message


@pytest.mark.parametrize("output", ["notes.txt", "taken/notes.jsonl", "folder.jsonl"])
def test_what_cannot_be_written_is_one_line_before_anything_is_fetched(output, tmp_path):
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "folder.jsonl").mkdir()
    command = [sys.executable, ROOT / "scripts" / "debian_text.py", "--output", tmp_path / output]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("debian_text.py: --output ")
    assert result.stderr.count("\n") == 1
