"""The charts: each with the numbers of the metrics, in the page's SVG and in PNG files."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.report import Page, fake_run, rewrite

from mdpgrpo_fast.report.page import write_report


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


def test_each_reward_has_a_chart_and_a_score(tmp_path: Path) -> None:
    """Names are of the user's functions, and may be anything."""
    run, names = fake_run(tmp_path / "run"), ["constraints", "<b>\ud800", "length"]

    def with_rewards(row: dict[str, Any]) -> dict[str, Any]:
        step = row.get("step") or 0
        row["rewards"] = {name: {"mean": i + step / 100, "std": 0.25} for i, name in enumerate(names)}
        if "eval" in row:
            row["eval"]["reward"] = 1.5 + step / 100
        if "response" in row:
            row["rewards"] = {name: float(i) for i, name in enumerate(names)}
        return row

    for file in ("metrics.jsonl", "completions.jsonl"):
        rewrite(run / file, with_rewards)
    summary = json.loads((run / "summary.json").read_text())
    summary |= {
        "rewards": {name: {"before": 0.0, "after": 1.0} for name in names},
        "reward_before": 1.5,
        "dropped_rows": 7,
    }
    summary |= {"reward_after": 2.1, "failure": "reward 'm:f' raised KeyError"}
    (run / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(run))
    for title in ("Held-out reward", "Reward constraints", "Reward length", "Held-out HSR and SSR"):
        assert f'aria-label="{title}"' in page.source, title
    plain = Page(write_report(fake_run(tmp_path / "plain")))
    assert page.tags.count("b") == plain.tags.count("b") + 1, "but for the tile's own, names are escaped"
    assert "1.500 → 2.100" in page.text and "constraints 0.00" in page.text and "length 2.00" in page.text
    assert "The run stopped after step 60: reward 'm:f' raised KeyError." in page.text
    assert "Rows left out 7" in page.text
