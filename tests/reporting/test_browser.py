"""report.html in a headless Chromium: no error, no request, readable at 400 and 1280 pixels, light and dark.

The browser is that of the environment variable CHROMIUM, or one on the PATH; without any, the test is skipped.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dylora_moe.reporting import page

from ..support.results import sample

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, in CHROMIUM or on the PATH")

# A page around the report, in frames of two widths and two colour schemes, which measures it and writes what it found.
AROUND = """<!DOCTYPE html><meta charset="utf-8"><body>FRAMES<pre id="found"></pre><script>
const rgb = text => (text.match(/[0-9.]+/g) || []).map(Number);
const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = c => { const [r, g, b] = c.map(v => linear(v / 255)); return .2126 * r + .7152 * g + .0722 * b; };
const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
function ground(window, element) {
  for (; element; element = element.parentElement) {
    const c = rgb(window.getComputedStyle(element).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c;
  }
  return [255, 255, 255];
}
function measure(frame) {
  const inside = frame.contentWindow, document = inside.document;
  const texts = [...document.body.querySelectorAll(":not(svg *)")].filter(
    e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
  const all = texts.map(e => contrast(rgb(inside.getComputedStyle(e).color).slice(0, 3), ground(inside, e)));
  const sizes = texts.map(e => parseFloat(inside.getComputedStyle(e).fontSize));
  return { wanted: frame.clientWidth, width: document.documentElement.scrollWidth, texts: texts.length,
    contrast: Math.min(...all), size: Math.min(...sizes), paper: ground(inside, document.body),
    requests: inside.performance.getEntriesByType("resource").length };
}
onload = () => { document.getElementById("found").textContent =
  JSON.stringify([...document.querySelectorAll("iframe")].map(measure)); };
</script>"""
FRAME = '<iframe style="width:{}px;height:900px;border:0;color-scheme:{}" srcdoc="{}"></iframe>'


BAD = '<main><p style="width:900px;color:#888">faint</p><p style="background-image:url(http://[::1]:9/x)">x</p>'


def look_at(frames: list[tuple[str, int, str]], tmp_path: Path) -> tuple[list[dict], list[str]]:
    """What a browser measures in frames of (page, width in pixels, "light" or "dark"), and what its console says."""
    inside = "".join(FRAME.format(width, scheme, html.escape(text)) for text, width, scheme in frames)
    around = tmp_path / "around.html"
    around.write_text(AROUND.replace("FRAMES", inside), encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --dump-dom"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *options.split(), "--window-size=1400,900", profile, around.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout)
    assert done.returncode == 0 and found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), re.findall(r"CONSOLE.*", done.stderr)


def test_the_page_can_be_read_and_what_cannot_is_seen(tmp_path):
    good = page.render(sample(8, 3))
    places = [(width, scheme) for width in (400, 1280) for scheme in ("light", "dark")]
    frames = [(good, *place) for place in places] + [(good.replace("<main>", BAD), 400, "light")]
    (*found, bad), console = look_at(frames, tmp_path)
    assert [frame["wanted"] for frame in found] == [width for width, _ in places]
    for frame in found:
        assert frame["width"] <= frame["wanted"] and frame["requests"] == 0 and frame["texts"] > 200, frame
        assert frame["contrast"] >= 4.5 and frame["size"] >= 10, frame
    assert [sum(frame["paper"]) > 3 * 128 for frame in found] == [scheme == "light" for _, scheme in places]
    assert bad["width"] > bad["wanted"] and bad["contrast"] < 4.5
    # The Content-Security-Policy of the page refuses the request of the bad one; no other has anything to say.
    assert len(console) == 1 and "http://[::1]:9/x" in console[0]
