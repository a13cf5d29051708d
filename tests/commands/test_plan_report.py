"""`moempi plan --report` in a real browser: every picture has a size, no text is cut or covered, nothing is loaded."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from moempi.cli import main
from moempi.commands.plan_report import KINDS, _parts, _shares
from moempi.observe.html_page import NOTHING_LOADED
from moempi.planning.simulate import Resumed
from mpirun import ROOT

MACHINE = ROOT / "jobs/machines/mission-h100.toml"
NAME = "<script>document.title='ran'</script> & \\\"'</p>\\u202e"
BROWSER = shutil.which("chromium") or shutil.which("chromium-headless-shell")
LIMIT_S = 120
MEASURING = """<script>
const box = one => one.getBoundingClientRect();
const inside = (a, b) => Math.min(a.left - b.left, b.right - a.right, a.top - b.top, b.bottom - a.bottom) > -1;
const apart = (a, b) => Math.max(b.left - a.right, a.left - b.right, b.top - a.bottom, a.top - b.bottom) > -1;
for (const svg of document.querySelectorAll('svg')) {
  const texts = [...svg.querySelectorAll('text')];
  const covered = (one, i) => texts.some((other, j) => j < i && !apart(box(one), box(other)));
  const bad = texts.filter((one, i) => !inside(box(one), box(svg)) || covered(one, i));
  const drawn = [...svg.querySelectorAll('rect, circle')].filter(one => box(one).width * box(one).height > 0);
  svg.setAttribute('data-found', [Math.round(box(svg).width), Math.round(box(svg).height), drawn.length].join(' '));
  svg.setAttribute('data-bad', bad.map(one => one.textContent).join('|'));
}
document.body.setAttribute('data-wide', document.documentElement.scrollWidth > window.innerWidth);
</script>"""

needs_browser = pytest.mark.skipif(
    BROWSER is None and not (os.geteuid() == 0 and shutil.which("apt-get")),
    reason="no chromium, which bash tests/run.sh installs where it is root and has apt-get",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a job, and a machine whose name is HTML."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arch.toml").write_text((ROOT / "jobs/arch/ep64.toml").read_text())
    name = MACHINE.read_text().replace("H100 as the mission states it, links assumed", NAME)
    assert NAME in name
    (tmp_path / "machine.toml").write_text(name)
    (tmp_path / "job.toml").write_text(
        "[model]\nweights = '<b>none.h5'\narchitecture = 'arch.toml'\n[input]\nprompts = 'prompts.jsonl'\n"
        "[output]\nresults = 'results.h5'\n[run]\nbackend = 'cupy'\n[topology]\nrank_memory = '0.1GB'\n"
    )
    return tmp_path


def plan(*arguments):
    sizes = ["--ranks", "16", "--ranks-per-node", "8", "--context", "128", "--prompt", "64"]
    return main(["plan", "job.toml", "--machine", "machine.toml", *sizes, *arguments])


def browse(page, *, width, dark=False):
    """The DOM after loading, with what MEASURING found, and the lines of the browser's log about the page."""
    text = page.read_text().replace(NOTHING_LOADED, "")  # else the script that measures would not run
    measured = page.with_name("measured.html")
    measured.write_text(text.replace("</body>", f"{MEASURING}</body>"))
    home = page.parent / "browser"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home}", "--dump-dom"]
    command += [
        "--enable-logging=stderr",
        f"--window-size={width},1000",
        f"--blink-settings=preferredColorScheme={1 - dark}",
    ]
    done = subprocess.run([*command, measured.as_uri()], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
@pytest.mark.parametrize(("arguments", "pictures"), [([], 8), (["--search"], 5), (["--search", "--for", "prefill"], 5)])
def test_pictures_have_a_size_and_their_texts_are_whole_in_a_browser(folder, capsys, arguments, pictures):
    assert BROWSER, "no chromium; bash tests/run.sh installs it"
    assert plan(*arguments, "--report", "plan.html") == 0
    assert "wrote plan.html" in capsys.readouterr().out
    for width, dark in ((1300, False), (700, True)):
        dom, console = browse(folder / "plan.html", width=width, dark=dark)
        assert console == []
        found = [tuple(map(int, one.split())) for one in re.findall(r'data-found="([^"]*)"', dom)]
        assert len(found) == pictures
        for wide, high, drawn in found:
            assert wide >= 400
            assert high >= 80
            assert drawn >= 3
        assert re.findall(r'data-bad="([^"]*)"', dom) == [""] * pictures
        assert 'data-wide="false"' in dom
        assert "<title>Forecast of a job</title>" in dom


def test_the_timeline_shows_computing_in_every_lane(folder):
    assert plan("--report", "plan.html") == 0
    lanes = re.findall(r"<tr><td>lane \d+</td><td>([\d.]+)</td>", (folder / "plan.html").read_text())
    assert len(lanes) == 4
    assert all(float(compute_ms) > 0 for compute_ms in lanes)


def test_the_page_is_escaped_and_loads_nothing(folder):
    assert plan("--report", "plan.html") == 0
    text = (folder / "plan.html").read_text()
    assert text.count("<svg ") == text.count("<table>") == 8
    assert "A model&#x27;s forecast, not a measurement." in text
    assert "&lt;script&gt;document.title=" in text
    assert "&lt;b&gt;none.h5" in text
    assert "\\u202e" in text
    assert not re.search(r"<script|<b>|<img|<link|src=|href=|url\(|@import|\u202e", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


def test_a_report_replaces_no_other_file(folder, capsys):
    for flags, code, words in (
        (["--report", "job.toml", "--force"], 74, "same file"),
        (["--report", "none/plan.html"], 74, "cannot be written"),
        (["--search", "-o", "new.toml", "--report", "new.toml"], 64, "same file"),
    ):
        assert plan(*flags) == code
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
    (folder / "plan.html").write_text("mine")
    assert plan("--report", "plan.html") == 74
    assert (folder / "plan.html").read_text() == "mine"


def test_a_lane_that_gives_way_is_idle_between_what_it_computes():
    lane = [
        Resumed(0, False, 0.0, 0.0, [(0.0, 1.0)]),
        Resumed(0, False, 0.0, 3.0, [(4.0, 5.0), (7.0, 8.0)]),
        Resumed(0, True, 0.0, 9.0, [(9.0, 9.5)]),
    ]
    parts = [(begin, end, KINDS[kind]) for begin, end, kind in _parts(lane, 0.5, 8.75)]
    assert parts == [
        (0.0, 500.0, "compute"),
        (500.0, 2500.0, "travel"),
        (2500.0, 3500.0, "idle"),
        (3500.0, 4500.0, "compute"),
        (4500.0, 6500.0, "idle"),
        (6500.0, 7500.0, "compute"),
        (7500.0, 8500.0, "travel"),
        (8500.0, 8750.0, "compute"),
    ]


@dataclass(frozen=True)
class Stage:
    """What the picture of stages needs of a forecast of one."""

    compute_s: float
    overlapped_s: float = 0.0


@pytest.mark.parametrize(
    ("computes_s", "bars"), [([0.5, 0.9, 0.9, 0.5, 0.9, 0.7], 3), ([*np.linspace(0.1, 0.9, 40)], 16)]
)
def test_equal_stages_share_a_bar_and_no_stage_is_left_out_in_silence(computes_s, bars):
    workload = SimpleNamespace(name="decode")
    stages = [Stage(one) for one in computes_s]
    picture = _shares(SimpleNamespace(micro_batch_s=lambda **_: 1.0, stages=stages, workload=workload))
    names = [row[0] for row in picture.rows]
    texts = re.findall(r">([^<]+)</text>", picture.svg)
    assert len([name for name in names if name in texts]) == bars
    if bars == 3:
        assert names == ["stages 0, 3", "stages 1 to 2, 4", "stage 5"]
        assert "Bars of" not in picture.caption
    else:
        assert names == [f"stage {number}" for number in range(40)]
        assert names[-16:] == [name for name in names if name in texts]  # the least idle
        assert "Bars of the 16 least idle of 40 sets of equal stages; the table has all." in picture.caption
