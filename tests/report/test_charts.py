"""The charts: each with the numbers of the metrics, and captions that are true for the run's settings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.report import ATTACK, Page, change_config, fake_run, rewrite

from mdpgrpo_fast import reference
from mdpgrpo_fast.config import PRESETS, preset
from mdpgrpo_fast.report import charts, panels
from mdpgrpo_fast.report.charts import Curve, figure
from mdpgrpo_fast.report.page import write_report
from mdpgrpo_fast.report.panels import loss_caption
from mdpgrpo_fast.report.run import method_of, read_run


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
                  "Entropy", "Clip share", "Gradient norm", "Groups with equal rewards",
                  "Failing groups rewarded by z", "Reward by temperature", "Reward spread by temperature",
                  "Seconds per step"):  # fmt: skip
        assert f'aria-label="{title}"' in page.source, title
    assert "τ 0.1" in page.text and "τ 0.7" in page.text
    assert "Effective sample size" not in page.text  # no importance weights in this run


def test_values_are_on_hover_in_text_of_the_page(full: tuple[Path, Page]) -> None:
    run, page = full
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    step = next(row for row in rows if row["step"] == 7)
    assert f"<title>step 7\nHSR {step['hsr']:.1%}\nSSR {step['ssr']:.1%}</title>" in page.source
    assert f"<title>step 7\nloss {step['loss']:.3g}</title>" in page.source
    assert "<title>step 20\nHSR 26.0% ± 12.5%\nSSR 60.4% ± 6.2%</title>" in page.source
    assert '<text class="middle"' in page.source and not {"image", "use", "script"} & set(page.tags)
    assert page.source.count('<path class="bar c0"') == 4  # one for each evaluation


def test_zero_series_say_so(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=20)
    rewrite(run / "metrics.jsonl", lambda row: {**row, "clip_low": 0.0, "clip_high": 0.0, "truncated": 0.0})
    page = Page(write_report(run))
    for title in ("Clip share", "Truncated completions"):
        assert f"{title} 0 in all steps" in page.text and f'aria-label="{title}"' not in page.source
    assert "no gradient 0 in all steps" in page.text  # one curve of a chart
    rewrite(
        run / "metrics.jsonl",
        lambda row: {**row, "eval": {**row["eval"], "hsr": 0, "ssr": 0}} if "eval" in row else row,
    )
    assert "Held-out HSR and SSR 0 in all evaluations" in Page(write_report(run)).text


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"num_generations": 4}, "not possible: |z| ≤ 1.73 in a group of 4"),
        ({"num_generations": 4, "group_std": "sample"}, "not possible: |z| ≤ 1.50 in a group of 4"),
        ({"num_generations": 8}, None),
        ({"num_generations": 6, "group_std": "sample", "temperatures": [1.0]}, None),
        ({"num_generations": 5, "temperatures": [1.0]}, "not possible: |z| ≤ 2.00 in a group of 5"),
    ],
)
def test_a_chart_that_can_only_be_zero_says_so(tmp_path: Path, knobs: dict[str, Any], said: str | None) -> None:
    run = fake_run(tmp_path / "run", steps=3)
    change_config(run, **knobs)
    page = Page(write_report(run))
    assert ('aria-label="Groups with |z| &gt; 2"' in page.source) == (said is None) == ("not possible" not in page.text)
    assert said is None or f"Groups with |z| > 2 {said}" in page.text


def largest_z(group: int, std: str) -> float:
    """Of groups with one odd member, by the reference itself."""
    rewards = torch.eye(group, dtype=torch.float64)[:1]
    config = preset("grpo", num_generations=group, group_std=std)
    return reference.advantages(rewards, torch.ones(1), config).z.abs().max().item()


@pytest.mark.parametrize("std", ["population", "sample"])
@pytest.mark.parametrize("group", [2, 4, 5, 6, 8])
def test_largest_z_is_the_references(group: int, std: str) -> None:
    assert panels._largest_z(preset("grpo", num_generations=group, group_std=std)) == pytest.approx(
        largest_z(group, std), abs=1e-3
    )


@pytest.mark.parametrize(
    ("name", "knobs", "caption"),
    [
        (
            "paper",
            {},
            "Minus the advantages, which shaping and the goal anchor move from a mean of 0, plus the KL term. ",
        ),
        ("released_code", {}, "Minus the advantages, which shaping and the goal anchor move from a mean of 0, plus"),
        (
            "exact",
            {},
            "Minus the advantages, which shaping and the goal anchor move from a mean of 0, plus the KL term. ",
        ),
        ("grpo", {}, "Its value is the KL term alone, as the advantages of a group add up to 0 and the ratio is 1."),
        ("grpo", {"kl_beta_pos": 0.0}, "Its value is 0, as the advantages of a group add up to 0 and the ratio is 1."),
        (
            "grpo",
            {"aggregation": "dapo"},
            "Minus the advantages, which add up to 0 only where all completions weigh al",
        ),
        ("grpo", {"prospect": True}, "Minus the advantages, which shaping moves from a mean of 0, plus the KL term."),
        ("paper", {"updates_per_rollout": 2}, "Minus the weighted advantages, plus the KL term. "),
    ],
)
def test_the_caption_of_the_loss_is_of_the_settings(
    tmp_path: Path, name: str, knobs: dict[str, Any], caption: str
) -> None:
    run = fake_run(tmp_path / "run", steps=2)
    change_config(run, **{**vars(preset(name)), **knobs})
    assert loss_caption(read_run(run)).startswith(caption)


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_value_of_the_loss_is_what_its_caption_says(tmp_path: Path, name: str) -> None:
    """On-policy, by the reference: the KL term alone under `grpo`, and not under the presets that shape; that the
    advantages add up to 0 is said only where they do."""
    run = fake_run(tmp_path / "run", steps=2)
    change_config(run, **vars(preset(name, num_generations=4)))
    caption, config = loss_caption(read_run(run)), method_of(read_run(run))
    assert config is not None
    torch.manual_seed(0)
    rewards = torch.tensor([[0.0, 0.5, 0.5, 1.0], [0.25, 0.25, 0.25, 0.75]], dtype=torch.float64)
    logprobs = -torch.rand(8, 6, dtype=torch.float64)
    advantage = reference.advantages(rewards, torch.full((2,), 4.0), config).advantage.flatten()
    value = -(advantage[:, None] * torch.ones_like(logprobs)).mean().item()  # lengths alike: every aggregation
    assert abs(value) < 1e-9 or "Its value is" not in caption
    if name in ("paper", "released_code", "exact", "grpo"):
        assert ("the KL term alone" in caption) == (abs(value) < 1e-9)
    assert ("KL term" in caption) == config.kl_in_loss


def test_the_page_of_a_long_run_stays_small_and_keeps_outliers(tmp_path: Path) -> None:
    y = np.sin(np.arange(50_000) / 900)
    y[31_234] = 9.0
    drawn = figure("t", "c", [Curve("y", np.arange(50_000) + 1.0, y)])
    assert drawn.svg is not None and len(drawn.svg) < 40_000 and drawn.svg.count("<title>") <= 100
    thin = re.search(r'class="thin c0" d="M(.*?)"', drawn.svg)
    assert thin and min(float(p.split()[1]) for p in thin[1].split("L")) < 30  # near the top


@pytest.mark.parametrize(
    "values",
    [[5e-324], [1e308, -1e308], [0.3, 0.3 + 1e-16], [-2.0, -1.0], [1e-9, 2e-9], [0.0, 1e-99], [7.0], [1e6, 3e6]],
)
@pytest.mark.parametrize("kind", ["noisy", "line", "points"])
def test_any_numbers_can_be_drawn(values: list[float], kind: Any) -> None:
    steps = np.arange(len(values)) + 1.0
    for percent, from_zero in ((False, True), (False, False), (True, True)):
        drawn = figure("t", "c", [Curve("y", steps, np.array(values), kind)], percent=percent, from_zero=from_zero)
        places = [float(n) for n in re.findall(r"[ML](?:-?[\d.]+) (-?[\d.]+)", drawn.svg or "")]
        assert drawn.svg and all(-1 <= y <= 153 for y in places), drawn.svg


def test_labels_of_ticks_tell_neighbours_apart() -> None:
    for low, high in ((0.0, 1.0), (0.0, 0.013), (-3.0, 1e5), (0.9991, 0.9994), (0.0, 4e-7)):
        ticks = charts._ticks(low, high, 5)
        assert 2 <= len(ticks) <= 6 and all(low <= t <= high * (1 + 1e-9) for t in ticks)
        for percent in (False, True):
            labels = charts._tick_labels(ticks, percent)
            assert len(set(labels)) == len(labels), labels


def test_names_are_text_in_drawings_too() -> None:
    drawn = figure("t", "c", [Curve(ATTACK, np.array([1.0, 2.0]), np.array([1.0, 2.0]))] * 2)
    assert drawn.svg is not None and "<script" not in drawn.svg and "&lt;script&gt;" in drawn.svg


def test_drawing_needs_neither_matplotlib_nor_torch(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    code = (
        "import sys, mdpgrpo_fast.report.page\n"
        f"mdpgrpo_fast.report.page.write_report({str(tmp_path)!r})\n"
        "assert not {'matplotlib', 'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "metrics.jsonl"] == ["report.html"]


def test_each_reward_has_a_chart_and_a_score(tmp_path: Path) -> None:
    """Names are of the user's functions, and may be anything."""
    run, names = fake_run(tmp_path / "run"), ["constraints", "<u>\ud800", "length"]

    def with_rewards(row: dict[str, Any]) -> dict[str, Any]:
        step = row.get("step") or 0
        row["rewards"] = {name: {"mean": i + step / 100, "std": 0.25} for i, name in enumerate(names)}
        if "eval" in row:
            row["eval"] |= {"reward": 1.5 + step / 100, "rewards": {n: {"mean": 0.125, "std": 0.1} for n in names}}
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
    assert "u" not in page.tags and "Reward <u>?" in page.text
    for text in ("1.500 ± 0.062 → 2.100 ± 0.062", "constraints 0.00", "length 2.00", "held-out mean 0.125"):
        assert text in page.text, text
    assert "The run stopped after step 60: reward 'm:f' raised KeyError." in page.text
    assert "Rows left out 7" in page.text
