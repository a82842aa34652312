"""Put the measured numbers and the table of settings into README.md and docs/, between their `results:` markers.

`python benchmarks/tables/readme.py` writes, and draws the plots of the operation benchmarks; with `--check` it exits 1
where a page differs from the result files.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import environment_table
import linear_table
import losses_table
import promises_table
import speed_table
import start_table
import step_table
import trl_suite_table
import verifiers_table
import vllm_table

from mdpgrpo_fast.config import MDPGRPOConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
LEARNING = ROOT / "benchmarks" / "results" / "cpu" / "learning.json"
OTHERS = ROOT / "benchmarks" / "results" / "cpu" / "optimizations.json"
DEMO = ROOT / "benchmarks" / "results" / "cpu" / "demo_summary.json"
INSTALL = ROOT / "benchmarks" / "results" / "cpu" / "install.json"
SIZES = ROOT / "benchmarks" / "results" / "cpu" / "install_sizes.json"
LABELS = {
    "paper": "MDP-GRPO, `--preset paper` (the demonstration)",
    "exact": "MDP-GRPO, `--preset exact`",
    "demo": "MDP-GRPO, `--preset exact` (named demo at that commit)",
    "grpo": "plain GRPO, `--preset grpo`",
}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def spread(values: list[float]) -> str:
    """Mean and range of the seeds."""
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else f"{values[0]:.3f}"


def by_variant(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in result["runs"]:
        groups.setdefault(run["variant"], []).append(run)
    names = [*LABELS, *groups]
    return dict(sorted(groups.items(), key=lambda item: names.index(item[0])))


def source(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    return f"{step_table.source(result)}; {result['machine']}; {versions}."


def claim() -> str:
    """The headline, of the committed summary of one `make train`; and the mean of three other seeds."""
    run = json.loads(DEMO.read_text(encoding="utf-8"))
    others = json.loads(OTHERS.read_text(encoding="utf-8"))["runs"]
    seeds = [r["hsr_after"] for r in others if r["optimizations"] == "on"]
    return (
        f"**From {run['hsr_before']:.0%} to {run['hsr_after']:.0%} of held-out prompts with every constraint met, "
        f"in {run['total_seconds'] / 60:.1f} minutes on two CPU cores, with one command.** ({run['steps']} steps of "
        f"`make train`, {run['peak_memory_mb']:.0f} MB at the peak: [summary]({DEMO.relative_to(ROOT)}); other seeds "
        f"end at {mean(seeds):.0%} on average.)"
    )


def learning(result: dict[str, Any]) -> str:
    lines = [
        "| settings | seeds | HSR before | HSR after | SSR before | SSR after | entropy | equal-reward groups |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in by_variant(result).items():
        before = [mean([r[f"{k}_before"] for r in runs]) for k in ("hsr", "ssr")]
        after = [spread([r[f"{k}_after"] for r in runs]) for k in ("hsr", "ssr")]
        state = [
            " → ".join(f"{mean([r[key][i] for r in runs]):.2f}" for i in (0, 1))
            for key in ("entropy", "zero_variance_groups")
        ]
        lines.append(
            f"| {LABELS.get(name, name)} | {len(runs)} | {before[0]:.3f} | {after[0]} | {before[1]:.3f} | {after[1]} "
            f"| {state[0]} | {state[1]} |"
        )
    steps = result["runs"][0]["steps"]
    lines += [
        "",
        f"Held-out greedy answers after {steps} steps at the same budget: mean over seeds, range in brackets. Entropy "
        "(nats per sampled token) and the share of groups whose rewards are all equal: first and last tenth of the "
        "steps. " + source(result),
    ]
    return "\n".join(lines)


WAYS = {
    "isolated": "`pip install .`",
    "without_isolation": "`pip install --no-build-isolation .`",
    "editable": "`pip install -e .`",
    "wheel": "a wheel that is built",
    "sdist": "the sdist",
    "pure": "the sdist, `MDPGRPO_BUILD=none`",
    "no_compiler": "no compiler on the machine",
    "refusing": "a compiler that fails",
    "refusing_editable": "the same, `pip install -e .`",
}


def install() -> str:
    document = json.loads(INSTALL.read_text(encoding="utf-8"))
    lines = ["| way | `auto` on the CPU takes | seconds |", "|---|---|---|"]
    lines += [f"| {WAYS[x['way']]} | `{x['auto']}` | {x['seconds']} |" for x in document["ways"]]
    where = f"{step_table.source(document)}; {document['machine']}."
    return "\n".join([*lines, "", f"Into a fresh environment that has torch, with one loss run after it. {where}"])


def install_sizes() -> str:
    document = json.loads(SIZES.read_text(encoding="utf-8"))
    lines = ["| what pip adds, one after the other | MB | seconds |", "|---|---|---|"]
    names = {"torch": f"torch {document['versions']['torch']}", "package": "`mdpgrpo-fast` and all else that it needs"}
    for x in document["sizes"]:
        what = names.get(x["what"]) or f"`[{x['what']}]`"
        lines.append(f"| {what} | {x['bytes'] / 1e6:.3g} | {x['seconds']} |")
    packages = [f"`{x['name']}` has {x['bytes'] / 1e6:.2g} MB" for x in document["packages"]]
    own = (
        f"{' and '.join(packages)}; the package takes {document['installed_bytes'] / 1e6:.2g} MB where it is installed."
    )
    where = f"{step_table.source(document)}; {document['machine']}."
    return "\n".join([*lines, "", f"{own} {where}"])


def knobs() -> str:
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for cls in (MDPGRPOConfig, TrainConfig):
        for f in dataclasses.fields(cls):
            value = f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            text = "unset" if shown is None else f"`{shown}`" if shown != "" else "none"
            lines.append(f"| `--{f.name.replace('_', '-')}` | {text} | {f.metadata['help'].replace('|', '/')} |")
    return "\n".join(lines)


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "claim": claim,
        "install": install,
        "install sizes": install_sizes,
        "learning": lambda: learning(json.loads(LEARNING.read_text(encoding="utf-8"))),
        "speed": speed_table.section,
        "linear": linear_table.section,
        "step": step_table.section,
        "knobs": knobs,
    },
    "docs/command_line.md": {"start": start_table.section},
    "docs/losses.md": {"losses": losses_table.section},
    "docs/promises.md": {"promises": promises_table.section},
    "docs/trl.md": {"step": step_table.ways, "trl_suite": trl_suite_table.section},
    "docs/verifiers.md": {"verifiers": verifiers_table.section},
    "docs/verl.md": {"verl": lambda: environment_table.section("verl")},
    "docs/vllm.md": {
        "vllm": lambda: environment_table.section("vllm"),
        "async": vllm_table.ahead,
        "generation": vllm_table.generation,
    },
}


def render(text: str, page: str = "README.md") -> str:
    """The page with every marked section drawn again."""
    for name, section in PAGES[page].items():
        body = section()
        start, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page} lacks the section {start}")
        text = pattern.sub(lambda _, part=f"{start}\n{body}\n{end}": part, text)
    return text


def main() -> int:
    check = "--check" in sys.argv[1:]
    if not check:
        speed_table.plot_all()
        linear_table.plot_all()
    differ = False
    for page in PAGES:
        path = ROOT / page
        old = path.read_text(encoding="utf-8")
        new = render(old, page)
        if check:
            differ |= old != new
            print(f"{page} agrees with the result files" if old == new else f"{page} differs: run this without --check")
        else:
            path.write_text(new, encoding="utf-8")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
