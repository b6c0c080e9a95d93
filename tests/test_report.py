"""The HTML page of check, transfer and verify: whole, self-contained, and grown verb by verb."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_llama
from tests.data_models import with_tokenizer
from tests.verb_models import lora_folder
from xadapt.cli import main
from xadapt.report import parts_of, render, write_report

VOID = {"meta", "img", "br", "input"}


class Reader(HTMLParser):
    """Checks that what is opened is closed, and keeps what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(page: Path | str) -> Reader:
    reader = Reader()
    reader.feed(page.read_text() if isinstance(page, Path) else page)
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three verbs, one after another, into one page."""
    work = tmp_path_factory.mktemp("report")
    bases = ["--source", str(with_tokenizer(work / "source")), "--target", str(with_tokenizer(work / "target"))]
    adapter = str(lora_folder(work / "lora"))
    (work / "lines.txt").write_text("a b c d e f g h i j\nhello world\n")
    data, report = ["--data", str(work / "lines.txt")], ["--report", str(work / "report.html")]
    assert main(["check", adapter, *bases, *data, *report]) == 0
    assert main(["transfer", adapter, *bases, "--method", "lora_x", "--out", str(work / "out"), *report]) == 0
    assert (
        main(["verify", adapter, str(work / "out"), *bases, *data, *report]) == 3
    )  # it loses to the copy, and the page is written
    return work / "report.html"


class TestPage:
    def test_it_has_all_three_and_nothing_from_elsewhere(self, page: Path) -> None:
        text, found = page.read_text(), read(page)
        assert re.findall("<h2>(.*?)</h2>", text) == ["Check", "Transfer", "Verify"]
        assert found.seen.count("svg") >= 5
        assert all(address.startswith("data:") for address in found.fetched)
        assert not re.search(r"url\(|@import|https?://", text)
        assert "model.layers.1.self_attn.v_proj" in text
        assert "the same weights" in text  # the reason, layer by layer

    def test_its_numbers_are_in_it(self, page: Path) -> None:
        parts = parts_of(page)
        assert parts.keys() == {"check", "transfers", "verify"}
        assert parts["check"]["verdict"] == "carries"
        assert parts["transfers"][0]["method"] == "lora_x"
        assert f"{parts['verify']['score']:.3f}" in page.read_text()

    def test_a_verb_replaces_its_own_part_alone(self, page: Path, tmp_path: Path) -> None:
        again = tmp_path / "again.html"
        shutil.copy(page, again)
        check = {**parts_of(page)["check"], "verdict": "doubtful"}
        write_report(again, check=check)
        assert parts_of(again) == {**parts_of(page), "check": check}
        assert "Verdict: doubtful" in again.read_text()
        assert [path.name for path in tmp_path.iterdir()] == ["again.html"]

    def test_pictures(self, page: Path) -> None:
        verify: dict[str, Any] = parts_of(page)["verify"]
        drawn = [{**row, "images": ["data:image/png;base64,AAAA"]} for row in verify["rows"]]
        text = render({"verify": {**verify, "rows": drawn, "prompts": ["a <red> square"]}})
        assert read(text).fetched == ["data:image/png;base64,AAAA"] * 5
        assert "a &lt;red&gt; square" in text

    def test_what_loses_is_marked(self, page: Path) -> None:
        verify = {**parts_of(page)["verify"], "loses_to": ["copy"], "verdict": "worse than the plain copy: score 0.10"}
        assert '<p class="bad"><b>Worse than the plain copy' in render({"verify": verify})

    def test_nothing_given_breaks_out(self, page: Path) -> None:
        check = {**parts_of(page)["check"], "adapter": "</script><script>alert(1)</script>", "notes": ["<b>bold</b>"]}
        text = render({"check": check})
        assert read(text).seen.count("script") == 1
        assert "<b>bold</b>" not in text
        found = re.search('id="xadapt">(.*?)</script>', text, re.DOTALL)
        assert found is not None
        assert json.loads(found[1]) == {"check": check}

    def test_a_file_that_is_no_report_stays(self, tmp_path: Path) -> None:
        (tmp_path / "mine.html").write_text("<p>mine</p>")
        with pytest.raises(ValueError, match="is no report of xadapt"):
            write_report(tmp_path / "mine.html", check={})
        assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
        with pytest.raises(ValueError, match="is a folder"):
            write_report(tmp_path, check={})

    def test_layers_without_measures(self, tmp_path: Path) -> None:
        import xadapt

        found = xadapt.check(lora_folder(tmp_path / "lora"), make_llama(), make_llama(layers=1))
        text = render({"check": found.as_dict()})
        read(text)
        assert "2 layers nowhere: model.layers has 2 blocks and 1 in the target" in text


def test_it_opens_in_a_browser(page: Path, tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser is installed ({', '.join(names)})")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    # Without a network: a page that fetched anything would show it as an error.
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--window-size=1000,2000"]
    drawn = subprocess.run(
        [browser, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert drawn.returncode == 0, drawn.stderr
    assert all(f"<h2>{verb}</h2>" in drawn.stdout for verb in ("Check", "Transfer", "Verify"))
    assert "CONSOLE" not in drawn.stderr
    picture = tmp_path / "page.png"
    subprocess.run(
        [browser, *options, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120, check=True
    )
    from PIL import Image

    with Image.open(picture) as opened:
        assert len(opened.convert("RGB").getcolors(1 << 24) or ()) > 20  # more than an empty page
