"""The page has the numbers of the results, escapes hostile text, requests nothing, and is accessible."""

from __future__ import annotations

import base64
import hashlib
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import soundfile
from report_results import predictions, record, result, right, save
from shard_makers import encoded, sine, write_shard

from xares_onnx.data.catalog import Digests, shipped_tasks
from xares_onnx.data.selection import prepare
from xares_onnx.errors import DataError, DataMissingError
from xares_onnx.evaluation.differences import Side
from xares_onnx.evaluation.record import Gate
from xares_onnx.progress import ignore
from xares_onnx.report.board import make_board
from xares_onnx.report.page.html import html
from xares_onnx.scoring.shots import Shots

ESC, VOX, SPEECH = "esc50", "voxlingua33", "speechocean762"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and the text in each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.tables: list[list[list[tuple[str, dict[str, str | None]]]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(("", dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open:
            return
        self.texts.setdefault(self._open[-1], []).append(data)
        if "td" in self._open or "th" in self._open:
            text, attributes = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = (text + data, attributes)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, heading: str) -> list[list[tuple[str, dict[str, str | None]]]]:
        """The first table whose first column is called so."""
        return next(table for table in self.tables if table and table[0][0][0].strip() == heading)


def page_of(*paths: Path, **options: Any) -> Page:
    return Page(html(make_board([Side.read(path) for path in paths]), **options))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    truth = np.linspace(0, 10, 40)
    layers = {"layer.0": {ESC: right(range(77)), SPEECH: predictions(truth, [truth + 1])}}
    a = save(tmp_path, "a", {ESC: right(range(60)), SPEECH: predictions(truth, [truth + 3])}, taps=layers)
    b = save(tmp_path, "b", {ESC: right(range(66)), SPEECH: predictions(truth, [truth + 2])}, methods={})
    return a, b


def test_the_page_has_the_numbers_of_the_results(two: tuple[Path, Path]) -> None:
    page = page_of(*two)
    rows = {cells[0][0]: cells for cells in page.table("task")[1:]}
    published = shipped_tasks()[ESC].published
    assert published is not None
    heads = [text.split("published")[0].strip() for text, _ in page.table("task")[0]]
    assert heads == ["task", "domain", "metric", "b", "a", *published.linear, "test clips"]
    esc = rows["ESC-50"]
    assert [attributes["data-value"] for _, attributes in esc[3:5]] == ["0.66", "0.6"]
    assert [attributes.get("class") for _, attributes in esc[3:5]] == ["n best", "n behind"]
    assert esc[3][0].startswith("0.660 ★")
    assert [text for text, _ in esc[5:9]] == [f"{score:.3f}" for score in published.linear.values()]
    low, high = record(ESC, right(range(66))).ci95 or (0, 0)
    assert f"{low:.3f}\N{EN DASH}{high:.3f}" in esc[3][0]
    error = rows["speechocean762"]
    assert [attributes["data-value"] for _, attributes in error[3:5]] == ["4.0", "9.0"]
    assert "best" in str(error[3][1]["class"])
    assert "lower is better" in error[2][0]
    averages = page.table("model")
    assert [cells[0][0].strip() for cells in averages[1:3]] == ["b", "a"]
    assert averages[1][1][1]["data-value"] == "0.66"
    assert any("b is best with 0.660" in text for text in page.texts["p"])


def test_layers_have_curves_of_their_own(two: tuple[Path, Path]) -> None:
    page = page_of(*two)
    table = page.table("tap")
    assert [cells[0][0] for cells in table[1:]] == ["layer.0", "embeddings"]
    assert [text.split()[0] for text, _ in table[1][1:]] == ["0.770", "1.000"]
    assert [text.split()[0] for text, _ in table[2][1:]] == ["0.600", "9.000"]
    assert ["★" in text for text, _ in table[1][1:]] == [True, True]
    assert any("ESC-50 layer by layer" in str(svg["aria-label"]) for svg in page.all("svg") if "aria-label" in svg)
    assert not any("layer by layer" in str(svg.get("aria-label")) for svg in page_of(two[1]).all("svg"))


def test_few_clips_have_curves_and_tables(tmp_path: Path) -> None:
    def shots(*scores: float | None) -> list[Shots]:
        return [
            Shots(clips_per_class=2**i, score=s, ci95=None if s is None else (s - 0.1, s + 0.1), draws=[])
            for i, s in enumerate(scores)
        ]

    a = save(tmp_path, "a", {ESC: right(range(60))}, records={ESC: {"shots": shots(0.2, 0.5)}})
    b = save(tmp_path, "b", {ESC: right(range(66))}, records={ESC: {"shots": shots(0.3, None, 0.6)}})
    c = save(tmp_path, "c", {ESC: right(range(50))})
    page = page_of(a, b, c)
    (table,) = [table for table in page.tables if [cell for cell, _ in table[0]] == ["model", "1", "2", "4"]]
    dash = "\N{EN DASH}"
    assert [[text for text, _ in row] for row in table[1:]] == [
        ["b", f"0.3000.200{dash}0.400", "", f"0.6000.500{dash}0.700"],
        ["a", f"0.2000.100{dash}0.300", f"0.5000.400{dash}0.600", ""],
    ]
    assert any("ESC-50 by training clips per class" in str(svg.get("aria-label")) for svg in page.all("svg"))
    assert not any("training clips" in str(svg.get("aria-label")) for svg in page_of(c).all("svg"))


HOSTILE = '</script></title><script>alert(1)</script><img src=x onerror="alert(2)">" onfocus="x\x1b[31m\u202e'


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    keys = [f"{HOSTILE}{i:03}" for i in range(20)]
    arrays = predictions(np.arange(20) % 2, [np.zeros(20, int)], keys)
    gate = Gate(gate="fail_under", task=HOSTILE, method=HOSTILE, status="fail", message=HOSTILE, limit=1.0)
    names: dict[str, Any] = {
        "title": HOSTILE, "domain": HOSTILE, "metric": "accuracy", "published": {HOSTILE: 0.5}, "notes": [HOSTILE],
    }  # fmt: skip
    hostile: dict[str, Any] = {
        "settings": {"protocol": "corrected", "seeds": 1, "limit": None, HOSTILE: {HOSTILE: [HOSTILE]}},
        "environment": {"provider": HOSTILE, "machine": {"processor": HOSTILE}},
        "notes": [HOSTILE],
        "created": HOSTILE,
        "gates": [gate],
    }
    paths = []
    for name in ("a", "b"):
        path = save(tmp_path, name, {ESC: arrays}, taps={HOSTILE: {ESC: arrays}}, records={ESC: names}, **hostile)
        content = msgspec.json.decode(path.read_bytes())
        content["encoder"]["file"] = HOSTILE + name
        content["encoder"]["contract"][HOSTILE] = {"value": HOSTILE, "source": HOSTILE}
        content["tasks"].append(
            {**content["tasks"][0], "task": HOSTILE, "status": "failed", "score": None, "reason": HOSTILE}
        )
        path.write_bytes(msgspec.json.encode(content))
        paths.append(path)
    text = html(make_board([Side.read(path) for path in paths]))
    page = Page(text)
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert page.all("img") == []
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on") or name == "style"]
    assert "alert(1)" in "".join(page.texts["h1"])
    assert "\x1b" not in text
    assert "\u202e" not in text
    for place in ("h1", "li", "code", "td", "text", "dt", "span"):
        assert any("</script>" in text for text in page.texts[place]), place


def test_the_page_requests_nothing(two: tuple[Path, Path]) -> None:
    text = html(make_board([Side.read(path) for path in two]))
    page = Page(text)
    links = [
        attributes[name]
        for _, attributes in page.elements
        for name in ("href", "src", "srcset", "data", "action")
        if name in attributes
    ]
    assert links
    assert all(str(link).startswith(("#", "data:")) for link in links)
    targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {str(link)[1:] for link in links if str(link).startswith("#")} <= targets
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_the_policy_allows_only_the_pages_script_and_style(two: tuple[Path, Path]) -> None:
    page = page_of(*two)
    policy = next(str(meta["content"]) for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    digests = {
        kind: base64.b64encode(hashlib.sha256("".join(page.texts[kind]).encode()).digest()).decode()
        for kind in ("style", "script")
    }
    assert policy.split("; ")[:3] == [
        "default-src 'none'",
        f"style-src 'sha256-{digests['style']}'",
        f"script-src 'sha256-{digests['script']}'",
    ]


def test_the_same_results_give_the_same_bytes(two: tuple[Path, Path]) -> None:
    sides = [Side.read(path) for path in two]
    first = html(make_board(sides))
    assert first == html(make_board([Side.read(path) for path in two]))
    assert first == html(make_board(sides[::-1]))
    assert len(first) < 300_000


def test_the_page_is_accessible(two: tuple[Path, Path]) -> None:
    page = page_of(*two)
    assert page.all("html")[0]["lang"] == "en"
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in page.elements}
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and svg["aria-label"])
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    regions = [attributes for _, attributes in page.elements if attributes.get("class") == "scroll"]
    assert regions
    assert all(region["tabindex"] == "0" and region["role"] == "region" and region["aria-label"] for region in regions)
    assert all(button.get("aria-label") for button in page.all("button"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_confusions_and_worst_clips(tmp_path: Path) -> None:
    names = shipped_tasks()[ESC].target.class_names
    targets = [0] * 6 + [1] * 4
    answers = [[0, 0, 0, 2, 2, 2, 1, 1, 1, 1], [0, 0, 0, 0, 2, 2, 1, 1, 1, 1], [0, 0, 0, 0, 0, 3, 1, 1, 1, 1]]
    page = page_of(save(tmp_path, "a", {ESC: predictions(targets, answers)}))
    pairs = [[cell for cell, _ in row] for row in page.table("true")[1:]]
    assert pairs == [[names[0], names[2], "28 %"], [names[0], names[3], "6 %"]]
    clips = page.table("clip")[1:]
    assert [row[0][0].strip() for row in clips] == [f"test-0.tar/clip{i:03}" for i in (5, 4, 3)]
    assert [[cell.strip() for cell, _ in row[1:]] for row in clips] == [
        [names[0], f"{names[2]} 2x, {names[3]} 1x0.000"],
        [names[0], f"{names[2]} 2x, {names[0]} 1x0.333"],
        [names[0], f"{names[0]} 2x, {names[2]} 1x0.667"],
    ]


def test_predictions_of_another_run_are_an_error_for_a_single_model_too(tmp_path: Path) -> None:
    path = save(tmp_path, "a", {ESC: right(range(60))})
    save(tmp_path / "other", "a", {ESC: right(range(50))})
    (tmp_path / "other/a.predictions/esc50.linear.npz").replace(tmp_path / "a.predictions/esc50.linear.npz")
    with pytest.raises(DataError, match="another run's"):
        page_of(path)


def test_without_predictions_there_is_still_a_page() -> None:
    board = make_board([Side.of_result("a.json", result([record(ESC, right(range(60)))]))])
    assert "Mistakes" not in Page(html(board)).texts["h2"]


# ---------------------------------------------------------------- sound


@pytest.fixture
def audible(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A result of four clips of ESC-50, the folder of their shards, and a cache."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    keys = []
    for fold in range(1, 6):
        clips = {f"clip{i}": (encoded(sine(300, 8.0 if i else 0.5, rate=22_050), 22_050), {"target": 0}) for i in range(2)}
        write_shard(data / ESC / f"wds-audio-fold-{fold}-000000.tar", clips)
        keys += [f"wds-audio-fold-{fold}-000000.tar/clip{i}" for i in range(2)]
    digest = prepare(shipped_tasks()[ESC], data, Digests(cache), None, ignore).digest()
    arrays = predictions([0] * 10, [[1] * 4 + [0] * 6], keys)
    return save(tmp_path, "a", {ESC: arrays}, records={ESC: {"data_digest": digest}}), data, cache


def test_the_worst_clips_can_be_heard(audible: tuple[Path, Path, Path]) -> None:
    path, data, cache = audible
    sounds = page_of(path, data=data, cache=cache).all("audio")
    assert [sound["aria-label"] for sound in sounds] == [
        f"wds-audio-fold-{fold}-000000.tar/clip{i}" for fold in (1, 2) for i in range(2)
    ]
    lengths = []
    for sound in sounds:
        kind, _, encoded_text = str(sound["src"]).partition(",")
        assert kind == "data:audio/mpeg;base64"
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(encoded_text)))
        assert (rate, samples.ndim) == (16_000, 1)
        lengths.append(len(samples) / rate)
        spectrum = np.abs(np.fft.rfft(samples[:8000]))
        assert np.argmax(spectrum) * rate / 8000 == pytest.approx(300, abs=4)
    assert lengths == pytest.approx([0.5, 6.0, 0.5, 6.0], abs=0.1)
    assert page_of(path).all("audio") == []


def test_other_data_are_not_audible(audible: tuple[Path, Path, Path]) -> None:
    path, data, cache = audible
    write_shard(data / ESC / "wds-audio-fold-1-000000.tar", {"clip0": (encoded(sine(500, 1)), {"target": 0})})
    page = page_of(path, data=data, cache=cache)
    assert page.all("audio") == []
    assert any("are not those that were scored" in text for text in page.texts["p"])
    with pytest.raises(DataMissingError):
        page_of(path, data=data / "nowhere", cache=cache)


def test_sound_in_a_page_is_limited_with_a_note(audible: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path, data, cache = audible
    monkeypatch.setattr("xares_onnx.report.page.listening.MAX_PAGE_BYTES", 12_000)
    page = page_of(path, data=data, cache=cache)
    assert 1 <= len(page.all("audio")) < 4
    assert any("some clips are left out" in text for text in page.texts["p"])
