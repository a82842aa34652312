"""The charts: each with the numbers of the metrics, in the page's SVG and in PNG files."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

from helpers.report import Page


def test_stage_shares_are_those_of_the_metrics(full: tuple[Path, Page]) -> None:
    run, page = full
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    total = sum(sum(s.values()) for s in seconds)
    for stage in seconds[0]:
        assert f"{stage} {sum(s[stage] for s in seconds) / total:.0%}" in page.text


def test_every_chart_with_numbers_is_drawn(full: tuple[Path, Page]) -> None:
    _, page = full
    for title in ("Held-out HSR and SSR", "Training HSR and SSR", "Training reward", "Loss", "KL to the reference",
                  "Entropy", "Clip share", "Gradient norm", "Groups with equal rewards", "Groups with |z| > 2",
                  "Failing groups rewarded by z", "Reward by temperature", "Reward spread by temperature",
                  "Seconds per step"):  # fmt: skip
        assert f'aria-label="{title.replace(">", "&gt;")}"' in page.source, title
    assert "τ 0.1" in page.text and "τ 0.7" in page.text
    assert "Effective sample size" not in page.text  # no importance weights in this run


def test_images_are_png_files(full: tuple[Path, Page]) -> None:
    run, _ = full
    for name in ("curves", "group_health", "pace", "types"):
        data = (run / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND" and width > 1000 and height > 300


def test_identifiers_of_all_charts_differ(full: tuple[Path, Page]) -> None:
    _, page = full
    references = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert references and {value[1:] for value in references} <= set(ids)


def test_matplotlib_state_is_left_alone_and_torch_unneeded(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    code = (
        "import sys, mdpgrpo_fast.report.page; assert 'matplotlib' not in sys.modules\n"
        "import matplotlib; before = matplotlib.rcParams.copy()\n"
        f"mdpgrpo_fast.report.page.write_report({str(tmp_path)!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
        "assert matplotlib.rcParams.copy() == before\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").is_file()
