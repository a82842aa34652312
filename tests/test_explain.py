"""The explained group: its numbers are the reference's, and its sentences follow from them."""

import dataclasses

import pytest
import torch

from mdpgrpo_fast import reference
from mdpgrpo_fast.config import MDPGRPOConfig, preset
from mdpgrpo_fast.explain import ADVANTAGE_KNOBS, explain_group, main


def explained(capsys, *argv: str) -> tuple[list[dict[str, str]], str]:
    """The table's rows by column name, and the whole text."""
    assert main(list(argv)) == 0
    text = capsys.readouterr().out
    head, _, *rows = text.split("\n\n")[1].splitlines()
    names = head.replace("GRPO A", "GRPO_A").replace("GRPO β", "GRPO_β").split()
    return [dict(zip(names, row.split(), strict=True)) for row in rows], text


@pytest.mark.parametrize("name", ["paper", "released_code", "grpo", "dr_grpo", "rloo", "trl"])
@pytest.mark.parametrize("rewards", [[0.5, 0.5, 0.5, 0.75], [0.0, 0.25, 1.0], [0.25] * 4, [0.0] * 8, [1.0, 1.0, 0.75]])
def test_numbers_are_the_reference_s(capsys, name, rewards):
    rows, _ = explained(capsys, "--rewards", ",".join(map(str, rewards)), "--constraints", "4", "--preset", name)
    config = preset(name, num_generations=len(rewards), multi_temperature=False)
    r, k = torch.tensor([rewards], dtype=torch.float64), torch.tensor([4])
    ours = reference.advantages(r, k, config)
    plain = reference.advantages(r, k, preset("grpo", num_generations=len(rewards), kl_beta_pos=config.kl_beta_pos))
    expected = {"reward": r, "z": ours.z, "δ": ours.delta, "A": ours.advantage, "β": ours.kl_beta,
                "GRPO_A": plain.advantage, "GRPO_β": plain.kl_beta}  # fmt: skip
    assert len(rows) == len(rewards)
    for column, values in expected.items():
        assert [float(row[column]) for row in rows] == pytest.approx(values[0].tolist(), abs=5.1e-5), column
    # What is mixed into A is what stands in the columns before it.
    for row in rows:
        mixed = (1 - config.alpha) * float(row["ψ(z)"]) + config.alpha * float(row["ψ(δ)"])
        assert float(row["A"]) == pytest.approx(mixed, abs=2e-4)


@pytest.mark.parametrize("goal_mean, m", [("half", 0.5), ("max_half_mean", 0.8125), ("mean", 0.8125)])
@pytest.mark.parametrize("goal_std, s", [("released", 0.5), ("binomial", 0.25)])
def test_goal_anchor_is_told(goal_mean, m, goal_std, s):
    config = MDPGRPOConfig(num_generations=4, goal_mean=goal_mean, goal_std=goal_std)
    x = explain_group([1.0, 0.75, 0.75, 0.75], 4, config)
    assert (x.goal_mean, x.goal_std) == pytest.approx((m, s))
    assert x.delta.tolist() == pytest.approx([(r - m) / s for r in (1.0, 0.75, 0.75, 0.75)])


def test_zero_variance_moves_by_the_goal_alone(capsys):
    rows, text = explained(capsys, "--rewards", "0,0,0,0", "--constraints", "3")
    a = {row["A"] for row in rows}
    assert len(a) == 1 and float(min(a)) < 0
    assert {row["GRPO_A"] for row in rows} == {row["z"] for row in rows} == {"0.0000"}
    assert "All 4 rewards are 0:" in text and "plain GRPO has no policy gradient" in text
    assert f"still gives A = {min(a)} to each" in text and "less likely" in text
    assert "below the goal mean 0.5000" in text and all(row["β"] == "0.025" for row in rows)
    assert "A < 0 for 4 of 4 completions: KL coefficient β = 0.025 there" in text


def test_zero_variance_above_the_goal(capsys):
    assert "more likely" in explained(capsys, "--rewards", "0.75,0.75", "--constraints", "4")[1]
    text = explained(capsys, "--rewards", "0.75,0.75", "--constraints", "4", "--goal-mean", "max_half_mean")[1]
    assert "δ = 0, so A = 0 here too" in text
    text = explained(capsys, "--rewards", "0.75,0.75", "--constraints", "4", "--no-dual-anchor")[1]
    assert "this group teaches nothing" in text


def test_amplified_step_is_bounded(capsys):
    rows, text = explained(capsys, "--rewards", *["0"] * 7, "0.25", "--constraints", "4")
    best = rows[-1]
    assert float(best["z"]) > 2 and float(best["ψ(z)"]) < 1.25
    assert f"becomes z = {best['z']}, low variance amplified" in text
    assert f"ψ(z) = {best['ψ(z)']}, 97% of the bound λ₊ = 1.25; plain GRPO uses {best['GRPO_A']}" in text
    assert "z alone reinforces completion 8 although below the goal" in text
    assert f"turns ψ(z) = {best['ψ(z)']} into A = {best['A']} for completion 8" in text
    assert "low variance amplified" not in explained(capsys, "--rewards", "0,0.5,1", "--constraints", "2")[1]


def test_group_above_the_goal(capsys):
    _, text = explained(capsys, "--rewards", "1,1,1,0.75", "--constraints", "4")
    assert "above the goal mean" in text and "z alone punishes completion 4 although above the goal" in text


def test_sign_against_plain_grpo(capsys):
    rows, text = explained(capsys, "--rewards", "0,0,0.25,0.25", "--constraints", "4", "--dual-anchor-alpha", "0.9")
    assert [float(r["A"]) * float(r["GRPO_A"]) < 0 for r in rows] == [False, False, True, True]
    assert "the sign of A changes for completions 3 and 4" in text


def test_grpo_preset_explains_itself(capsys):
    rows, text = explained(
        capsys, "--rewards", "0,1", "--constraints", "2", "--preset", "grpo", "--kl-beta-pos", "0.02"
    )
    assert all(row["A"] == row["GRPO_A"] and row["β"] == row["GRPO_β"] == "0.02" for row in rows)
    assert "shaping is off" in text and "α = 0" in text and "One KL coefficient for all: β = 0.02." in text


def test_rules_without_a_deviation(capsys):
    group = ("--rewards", "0.5,0.5,0.5,0.75", "--constraints", "4")
    rows, text = explained(capsys, *group, "--preset", "rloo")
    assert [row["z"] for row in rows] == ["-0.0833"] * 3 + ["+0.2500"]
    assert "mean 0.5625 (each against the mean of the others), undivided: the standard deviation 0.1250" in text
    assert "Completion 4 is 1.00 constraints above the mean of the others; undivided that is z = +0.2500." in text
    assert "The KL is in the reward: 0.05 times" in text and "One KL coefficient" not in text
    rows, text = explained(capsys, *group, "--preset", "dr_grpo")
    assert "Completion 4 is 0.75 constraints above the group mean; undivided that is z = +0.1875." in text
    assert "One KL coefficient for all: β = 0." in text
    one = explained(capsys, *group, "--baseline", "leave_one_out")[1]
    assert "1.00 constraints above the mean of the others; divided by a standard deviation worth 0.43" in one
    rows, text = explained(capsys, *group, "--scale-rewards", "batch")
    assert [row["A"] for row in rows] == [row["A"] for row in explained(capsys, *group)[0]]
    assert "all rewards of a step (scale_rewards = batch), not of this group" in text


def test_clip_is_told(capsys):
    group = ("--rewards", "0,0,0,1", "--constraints", "4")
    free, text = explained(capsys, *group)
    assert "clip" not in text
    rows, text = explained(capsys, *group, "--advantage-clip", "0.9")
    cut = [abs(float(row["A"])) > 0.9 for row in free]
    assert True in cut and [abs(float(row["A"])) == 0.9 for row in rows] == cut
    assert "|A| at most 0.9" in text and "The clip cuts A to ±0.9 for " in text
    text = explained(capsys, *group, "--preset", "grpo", "--advantage-clip", "9")[1]
    assert "the clip alone bounds A, at ±9" in text and "cuts" not in text


def test_table_is_aligned(capsys):
    _, text = explained(capsys, "--rewards", "0", "0.3333", "1", "--constraints", "3")
    lines = text.split("\n\n")[1].splitlines()
    assert len({len(line) for line in lines}) == 1
    assert {line.index("│") for line in lines if "│" in line} == {lines[1].index("┼")}


def test_every_advantage_knob_is_a_flag_and_no_other_of_the_method(capsys):
    assert set(ADVANTAGE_KNOBS) <= {f.name for f in dataclasses.fields(MDPGRPOConfig)}
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all("--" + name.replace("_", "-") in text for name in ADVANTAGE_KNOBS)
    assert "--epsilon-low" not in text


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--rewards is required"),
        (["--rewards", "0,1"], "--constraints is required"),
        (["--rewards", "0,one", "--constraints", "2"], "'one'"),
        (["--rewards", "0,,1", "--constraints", "2"], "got ''"),
        (["--rewards", "0,nan", "--constraints", "2"], "finite; got 'nan'"),
        (["--rewards", "0,2e6", "--constraints", "2"], "within ±1e+06; got '2e6'"),
        (["--rewards", "0.5", "--constraints", "2"], "at least two"),
        (["--rewards", "0,1", "--constraints", "0"], "--constraints must be from 1"),
        (["--rewards", "0,1", "--constraints", "9" * 30], "--constraints must be a whole number below 2^63"),
        (["--rewards", "0,1", "--constraints", "2", "--preset", "papr"], "did you mean 'paper'"),
        (["--reward", "0,1", "--constraints", "2"], "did you mean '--rewards'"),
        (["--rewards", "0,1", "--constraints", "2", "--goal-std", "running"], "running are of a whole run"),
        (["--rewards", "0,1", "--constraints", "2", "--prospect-beta", "0"], "prospect_beta must be above 0"),
    ],
)
def test_one_line_of_error(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    "rewards, message", [("0,1.5", "1.5 is outside [0, 1]"), ("0,0.3", "0.3 is no whole number of 4"), ("0.25,1", "")]
)
def test_warnings(capsys, rewards, message):
    assert main(["--rewards", rewards, "--constraints", "4"]) == 0
    err = capsys.readouterr().err
    assert (err.startswith("warning: ") and message in err) if message else not err
