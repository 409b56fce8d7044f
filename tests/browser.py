"""A report in a real browser: `make browser`, or `python tests/browser.py OUT RESULT.json... [--data DIR --cache DIR]`.

Writes OUT/report.html, with screenshots and a PDF beside it, and ends with an error where the console has one, a request
leaves the page, a text lacks contrast or a control its name, the page is wider than a phone, or the keyboard does not reach
what it should. Needs Chromium, which nothing here installs: `apt-get install chromium`.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)
SECONDS = 120  # that an answer may take: the machine may be busy

# Every text's colour against what lies behind it, where that is less than WCAG's AA asks for.
CONTRAST = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const rgba = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => { const f = (v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    return .2126 * f(r) + .7152 * f(g) + .0722 * f(b); };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
    if (c[3] > 250) return c; } return [255, 255, 255, 255]; };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode, e = node.parentElement;
    if (!node.textContent.trim() || !e.checkVisibility() || e.closest("script, .hidden, title")) continue;
    texts++;
    const style = getComputedStyle(e), svg = e instanceof SVGElement;
    const a = light(rgba(svg ? style.fill : style.color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${node.textContent.trim().slice(0, 40)}`);
  }
  return {poor, texts};
})()"""
FOCUS = """(() => { const e = document.activeElement;
  const sort = e.closest("th") && e.tagName === "BUTTON" ? "sort" : "";
  return sort || e.id || e.className || e.tagName.toLowerCase(); })()"""


class Browser:
    """Chromium over its own pipe: JSON messages that end in a zero byte, on descriptors 3 and 4."""

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        shell = 'exec "$@" 3<&"$IN" 4>&"$OUT"'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "browser", program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            env={**os.environ, "IN": str(to_browser), "OUT": str(from_browser)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self.events = b"", 0, list[dict[str, Any]]()
        self._session: str | None = None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                found: dict[str, Any] = answer["result"]
                return found
            self.events.append(answer)
        raise RuntimeError(f"{method} has no answer after {SECONDS} s")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded

    def value(self, expression: str) -> Any:
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def open(self, url: str) -> None:
        self("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        self.events = [event for event in self.events if event.get("method") != "Page.loadEventFired"]

    def look(self, scheme: str, width: int) -> None:
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        phone = width < 600
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone)

    def screenshot(self, path: Path) -> None:
        image = self("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(image))

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def close(self) -> None:
        try:
            os.write(self._write, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
            self._process.wait(timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()


def faults_of(browser: Browser, page: Path, out: Path) -> list[str]:
    faults: list[str] = []
    browser.look("light", 1280)
    browser.open(page.as_uri())
    for scheme in ("light", "dark"):
        browser.look(scheme, 1280)
        browser.screenshot(out / f"{scheme}.png")
        browser.value("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        found = browser.value(CONTRAST)
        print(f"{scheme}: {found['texts']} texts, {len(found['poor'])} of poor contrast")
        faults += [f"{scheme}: contrast {poor}" for poor in found["poor"][:5]]
    browser.screenshot(out / "open-dark.png")
    browser.look("light", 390)
    browser.screenshot(out / "phone.png")
    wide = browser.value("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    if wide > 0:
        faults.append(f"the page is {wide} px wider than a phone")
    browser.look("light", 1280)
    pdf = browser("Page.printToPDF", printBackground=False, preferCSSPageSize=True)["data"]
    (out / "print.pdf").write_bytes(base64.b64decode(pdf))
    faults += _names(browser) + _keyboard(browser) + _audio(browser) + _theme(browser)
    browser("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(page.as_uri())
    browser.screenshot(out / "without-script.png")
    browser("Emulation.setScriptExecutionDisabled", value=False)
    return faults + _console(browser, page)


def _names(browser: Browser) -> list[str]:
    """Controls, drawings and regions without a name for who cannot see them."""
    roles = {"button", "link", "image", "img", "region", "navigation", "Audio", "columnheader", "rowheader"}
    nodes = browser("Accessibility.getFullAXTree")["nodes"]
    named = [node for node in nodes if not node["ignored"] and node.get("role", {}).get("value") in roles]
    bare = [node for node in named if not node.get("name", {}).get("value", "").strip()]
    print(f"{len(named)} controls, drawings and headers, {len(bare)} without a name")
    return [f"a {node['role']['value']} has no name" for node in bare]


def _keyboard(browser: Browser) -> list[str]:
    """Tab goes to the skip link first, then to buttons and scroll regions; Enter sorts a table."""
    browser.value("document.body.focus(); window.scrollTo(0, 0)")
    reached = []
    for _ in range(40):
        browser.press("Tab", 9)
        reached.append(browser.value(FOCUS))
    print(f"tab order: {', '.join(dict.fromkeys(reached))}")
    faults = [f"Tab does not reach {what}" for what in ("theme", "sort", "scroll") if what not in reached]
    if reached[0] != "skip":
        faults.append(f"the first Tab leads to {reached[0]}, not to the skip link")
    browser.value("document.querySelector('#tasks th button').focus()")
    rows = "[...document.querySelector('#tasks table').tBodies[0].rows].map((r) => r.cells[0].textContent).join()"
    before = browser.value(rows)
    browser.press("Enter", 13, "\r")
    first = browser.value(rows)
    browser.press("Enter", 13, "\r")
    second = browser.value(rows)
    told = browser.value("document.querySelector('#tasks th').getAttribute('aria-sort')")
    if told != "descending" or (len(before.split(",")) > 1 and first == second):
        faults.append("Enter on a column's button does not sort the table")
    return faults


def _audio(browser: Browser) -> list[str]:
    """A sound in the page can be decoded."""
    seconds = browser.value(
        """(async () => { const a = document.querySelector("audio"); if (!a) return null; a.preload = "metadata"; a.load();
        return await new Promise((done) => {
          a.onloadedmetadata = () => done(a.duration); a.onerror = () => done(-1); }); })()"""
    )
    print("no sound in the page" if seconds is None else f"the first sound lasts {seconds:.2f} s")
    return ["the first sound cannot be played"] if seconds is not None and not 0 < seconds < 10 else []


def _theme(browser: Browser) -> list[str]:
    paper = "getComputedStyle(document.body).backgroundColor"
    before = browser.value(paper)
    browser.value("document.getElementById('theme').click()")
    return ["the button does not change light and dark"] if browser.value(paper) == before else []


def _console(browser: Browser, page: Path) -> list[str]:
    faults, requests = [], 0
    for event in browser.events:
        method, said = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            faults.append(f"exception: {said['exceptionDetails']['text']}")
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            faults.append(f"console: {said['args']}")
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            faults.append(f"log: {said['entry']['text']}")
        elif method == "Network.requestWillBeSent":
            requests += 1
            url = said["request"]["url"]
            if url != page.as_uri() and not url.startswith("data:"):
                faults.append(f"a request leaves the page: {url}")
    print(f"{requests} requests, all of them for the page itself" if not faults else f"{requests} requests")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cache", type=Path)
    given = parser.parse_args()
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        sys.exit("there is no Chromium on the path; install it (Debian: apt-get install chromium)")
    given.out.mkdir(parents=True, exist_ok=True)
    page = (given.out / "report.html").resolve()
    options = [
        text for name in ("data", "cache") if getattr(given, name) for text in (f"--{name}", str(getattr(given, name)))
    ]
    command = [sys.executable, "-m", "xares_onnx", "report", *map(str, given.results), "-o", str(page), *options]
    subprocess.run(command, check=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, Path(profile))
        try:
            faults = faults_of(browser, page, given.out)
        finally:
            browser.close()
    print(f"{page.stat().st_size / 1e3:.0f} kB; pictures of it lie in {given.out}")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
