"""The look at a report in a browser finds what it is there for."""

import os

import pytest
import report_check
from browser import find_browser


needs_browser = pytest.mark.skipif(
    find_browser() is None,
    reason="looks at pages in Chromium, which no Python package brings (`apt install chromium`)",
)
PAGE = "<!doctype html><meta charset=utf-8><title>t</title><style>body {{ margin: 0 }}</style>{}"


def look(tmp_path, body):
    page = tmp_path / "page.html"
    page.write_text(PAGE.format(body), encoding="utf-8")
    return report_check.check(find_browser(), page, tmp_path)


@needs_browser
def test_a_sound_page_and_the_screenshots(tmp_path):
    dark = "<style>@media (prefers-color-scheme: dark) { body { background: #000 } }</style>"
    assert look(tmp_path, f"{dark}<p>text</p><img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>") == []
    pictures = {path.stem: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert pictures.keys() == {"phone-light", "phone-dark", "desktop-light", "desktop-dark"}
    assert len(set(pictures.values())) == 4


@needs_browser
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<div style='width: 500px'>wide</div>", "the page is 110 pixels wider than the window"),
        ("<script>console.error('a fault')</script>", "console: ['a fault']"),
        ("<script>throw Error('a fault')</script>", "exception: Uncaught"),
        ("<img src='http://example.com/x.png'>", "request: http://example.com/x.png"),
        ("<link rel=stylesheet href='missing.css'>", "/missing.css"),
        (
            "<script>if (matchMedia('(prefers-color-scheme: dark)').matches) console.error('dark')</script>",
            "dark: console: ['dark']",
        ),
    ],
)
def test_a_fault_is_found(tmp_path, body, message):
    found = look(tmp_path, body)
    assert any(message in problem for problem in found)
    # Only a narrow window shows the first fault, and only a dark page the last.
    alone = {"wider": "phone", "dark: console": "dark"}
    where = next((place for word, place in alone.items() if word in message), "")
    assert all(where in problem for problem in found)


@needs_browser
def test_the_sample_report_has_no_fault(tmp_path, capsys):
    assert report_check.main(["--output", str(tmp_path)]) == 0
    assert "No problem was found" in capsys.readouterr().out
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for heading in (
        "Can a benign task still be learned?",
        "By coefficient",
        "Behind cues",
        "Sample answers",
        "What was not",
    ):
        assert heading in text


def test_without_a_browser_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", os.devnull)
    assert report_check.main(["--output", str(tmp_path / "out")]) == 1
    assert "apt-get install chromium" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_report_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report_check, "find_browser", lambda: "chromium")
    assert report_check.main([str(tmp_path / "no.html"), "--output", str(tmp_path / "out")]) == 1
    assert "is no file" in capsys.readouterr().err
