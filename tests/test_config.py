"""Configuration: every check names its knob, presets are what METHOD says, switches do what they are called."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from mdpgrpo_fast.config import PRESETS, ConfigError, MDPGRPOConfig, PromptConfig, TrainConfig, preset
from mdpgrpo_fast.evaluate import EvaluateConfig
from mdpgrpo_fast.verifiers import RULES

METHOD_REFUSALS: list[tuple[str, Any]] = [
    ("num_generations", 1),
    ("num_generations", 0),
    ("temperature", 0.0),
    ("temperature", -1.0),
    ("temperature", math.nan),
    ("temperatures", [0.1, 0.0]),
    ("temperatures", [0.1, -0.4]),
    ("temperatures", [math.nan, 1.0]),
    ("temperatures", [math.inf, 1.0]),
    ("temperatures", []),
    ("temperatures", [0.1, 0.4, 0.7]),
    ("temperatures", [1.0] * 16),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_k", -1),
    ("min_p", -0.1),
    ("min_p", 1.0),
    ("group_std", "unbiased"),
    ("dual_anchor_alpha", -0.1),
    ("dual_anchor_alpha", 1.1),
    ("goal_mean", "max"),
    ("goal_std", "paper"),
    ("prospect_beta", 0.0),
    ("prospect_gain", 0.0),
    ("prospect_gain", math.inf),
    ("prospect_loss", -2.0),
    ("kl_beta_pos", -0.01),
    ("kl_beta_neg", -0.01),
    ("kl_beta_neg", math.nan),
    ("kl_estimator", "k4"),
    ("kl_temperature", 0.0),
    ("temperature_objective", "row"),
    ("importance_weight_cap", 0.0),
    ("importance_level", "group"),
    ("epsilon_low", -0.1),
    ("epsilon_low", 1.5),
    ("epsilon_high", -0.1),
    ("delta", 1.2),
    ("delta", math.nan),
    ("aggregation", "mean"),
]

TRAIN_REFUSALS: list[tuple[str, Any]] = [
    ("num_constraints", 2**63),
    ("resume", "maybe"),
    ("resume", None),
    *((name, 0) for name in ("prompts_per_step", "micro_batch_size", "eval_batch_size", "updates_per_rollout")),
    *((name, 0) for name in ("max_prompt_length", "max_completion_length", "reward_workers", "num_constraints")),
    ("reward_memory", -1),
    *((name, -1) for name in ("eval_samples", "eval_every", "log_completions", "warmup_steps")),
    ("weight_decay", -0.1),
    ("max_grad_norm", -1.0),
    ("learning_rate", 0.0),
    ("learning_rate", math.nan),
    ("reward_timeout", 0.0),
    ("epochs", 0.0),
    ("adam_beta2", 1.0),
    ("adam_beta2", -0.1),
    ("steps", 0),
    ("reward", []),
    ("reward_weights", [1.0, 2.0]),
    ("reward_weights", [math.nan]),
    ("on_bad_reward", "ignore"),
    ("reward_range", [1.0, 0.0]),
    ("reward_range", [0.0]),
    ("reward_range", [0.0, math.inf]),
    ("max_dropped", -0.1),
    ("max_dropped", 1.5),
    ("constraint_reward", "some"),
    ("reward_isolation", "thread"),
    ("strip_thinking", "yes"),
    ("on_bad_row", "skip"),
    ("rules", "google"),
    ("lr_schedule", "step"),
    ("mixed_precision", "fp8"),
    ("dtype", "fp32"),
]


@pytest.mark.parametrize(("name", "value"), METHOD_REFUSALS)
def test_method_refuses_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must be ") as error:
        MDPGRPOConfig(**{name: value})
    bad = [v for v in value if not v > 0 or v == math.inf] if isinstance(value, list) else []
    assert repr(bad[0] if bad else value) in str(error.value), "the message shows what came"


@pytest.mark.parametrize(("name", "value"), TRAIN_REFUSALS)
def test_run_refuses_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must (be|have) ") as error:
        TrainConfig(**{name: value})
    assert repr(value).strip("[]") in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("columns", ["answer"]), ("template_args", ["=x"])])
def test_pairs_have_a_name_and_a_value(name: str, value: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must be name=value; got {value[0]!r}"):
        TrainConfig(**{name: value})  # type: ignore[arg-type]


def test_training_and_evaluation_share_their_defaults() -> None:
    shared = {f.name for f in dataclasses.fields(PromptConfig)}
    for config in (TrainConfig(), EvaluateConfig()):
        assert {n: getattr(config, n) for n in shared} == dataclasses.asdict(PromptConfig())


def test_the_rules_are_those_of_the_verifiers() -> None:
    assert get_args(get_type_hints(PromptConfig)["rules"]) == RULES


def test_every_knob_has_help_and_a_default() -> None:
    for config in (MDPGRPOConfig, TrainConfig, EvaluateConfig):
        config()
        for field in dataclasses.fields(config):
            assert field.metadata.get("help"), f"{config.__name__}.{field.name}"


def test_frozen() -> None:
    for config in (MDPGRPOConfig(), TrainConfig()):
        name = dataclasses.fields(config)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, 4)
    a, b = MDPGRPOConfig(), MDPGRPOConfig()
    a.slot_temperatures.append(9.0)
    a.temperatures.append(9.0)
    assert b.temperatures == [0.1, 0.4, 0.7, 1.0] and MDPGRPOConfig().temperatures == b.temperatures


def test_edges_of_the_ranges_are_allowed() -> None:
    edge = MDPGRPOConfig(
        num_generations=2,
        temperatures=[1e-3, 5.0],
        top_p=1.0,
        dual_anchor_alpha=1.0,
        kl_beta_pos=0.0,
        kl_beta_neg=0.0,
        epsilon_low=1.0,
        epsilon_high=0.0,
        delta=1.001,
    )
    assert edge.slot_temperatures == [1e-3, 5.0] and not edge.needs_reference and edge.alpha == 1
    MDPGRPOConfig(dual_anchor_alpha=0.0, top_p=1e-3, min_p=0.99, top_k=1)
    MDPGRPOConfig(multi_temperature=False, temperatures=[0.1, 0.4, 0.7], num_generations=5)
    TrainConfig(reward=["constraints", "a:b"], reward_weights=[1.0, 0.5], max_grad_norm=0.0, adam_beta2=0.0)


# ---- the method's defaults ------------------------------------------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    c = MDPGRPOConfig()
    assert (c.num_generations, c.temperatures) == (8, [0.1, 0.4, 0.7, 1.0])
    assert (c.alpha, c.prospect_beta, c.prospect_gain, c.prospect_loss) == (0.2, 0.8, 1.25, 2.0)
    assert (c.goal_mean, c.goal_std, c.group_std, c.prospect_on_goal) == ("half", "released", "population", True)
    assert (c.betas, c.kl_estimator, c.kl_temperature) == ((0.01, 0.025), "k3", 1.0)
    assert (c.epsilon_low, c.epsilon_high, c.delta) == (0.2, 0.2, None)
    assert (c.temperature_objective, c.aggregation, c.importance_level) == ("paper", "grpo", "token")
    run = TrainConfig()
    assert (run.learning_rate, run.epochs, run.seed) == (1e-5, 1.0, 42)
    assert (run.max_prompt_length, run.max_completion_length, run.updates_per_rollout) == (1024, 1024, 1)


@pytest.mark.parametrize(
    ("temperatures", "g", "slots"),
    [
        ([0.1, 0.4, 0.7, 1.0], 4, [0.1, 0.4, 0.7, 1.0]),
        ([0.1, 0.4, 0.7, 1.0], 8, [0.1, 0.4, 0.7, 1.0] * 2),
        ([0.8, 1.0], 8, [0.8, 1.0] * 4),
        ([0.5], 3, [0.5] * 3),
    ],
)
def test_slot_temperatures(temperatures: list[float], g: int, slots: list[float]) -> None:
    assert MDPGRPOConfig(num_generations=g, temperatures=temperatures).slot_temperatures == slots


def test_one_temperature_when_multi_temperature_is_off() -> None:
    c = MDPGRPOConfig(num_generations=3, multi_temperature=False, temperature=0.6)
    assert c.slot_temperatures == [0.6] * 3


def test_switches() -> None:
    assert MDPGRPOConfig(dual_anchor=False).alpha == 0
    assert MDPGRPOConfig(asymmetric_kl=False).betas == (0.01, 0.01)
    assert MDPGRPOConfig().needs_reference
    assert MDPGRPOConfig(kl_beta_pos=0.0).needs_reference
    assert not MDPGRPOConfig(kl_beta_pos=0.0, kl_beta_neg=0.0).needs_reference
    assert not MDPGRPOConfig(kl_beta_pos=0.0, asymmetric_kl=False).needs_reference


# ---- combinations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncation", [{"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05}])
def test_the_sampler_may_be_truncated_where_its_log_probs_are_recorded(truncation: dict[str, Any]) -> None:
    """They are those after truncation, so that the weight of a token that was drawn is exact."""
    assert MDPGRPOConfig(temperature_objective="corrected", **truncation).weighs_sampling
    assert MDPGRPOConfig(temperature_objective="per_row", sampler_correction=True, **truncation).weighs_sampling
    assert not MDPGRPOConfig(temperature_objective="per_row", **truncation).weighs_sampling


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"sampler_correction": True}, "sampler_correction needs temperature_objective = per_row or corrected"),
        ({"kl_in": "reward"}, "asymmetric_kl must be False for kl_in = reward"),
        ({"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"}, "scale_rewards must be group"),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "kl_in": "reward", "asymmetric_kl": False},
            "kl_in must be loss for multi_objective_aggregation = normalize_then_sum",
        ),
        ({"loss": "cispo", "delta": 4.0}, "delta must be unset for loss = cispo"),
        ({"horizon": 9}, "horizon must be unset but for aggregation = dr_grpo"),
    ],
)
def test_knobs_that_contradict_each_other(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MDPGRPOConfig(**knobs)


def test_parts_of_a_batch_and_a_moving_reference() -> None:
    with pytest.raises(ConfigError, match="mini_batches must be at most prompts_per_step = 4; got 5"):
        TrainConfig(mini_batches=5)
    with pytest.raises(ConfigError, match="reference_mix must be 1 with lora"):
        TrainConfig(lora=True, sync_reference=1)
    TrainConfig(mini_batches=4, lora=True, sync_reference=1, reference_mix=1.0)
    with pytest.raises(ConfigError, match=r"reference_mix must be 1 with dtype = bfloat16, in which .*; got 0.6"):
        TrainConfig(dtype="bfloat16", sync_reference=1)
    TrainConfig(dtype="bfloat16", sync_reference=1, reference_mix=1.0)
    TrainConfig(dtype="bfloat16")


@pytest.mark.parametrize("coef", [-0.1, 0.005, 0.3])
def test_with_a_target_the_entropys_coefficient_begins_within_its_bounds(coef: float) -> None:
    bounds: dict[str, Any] = {"entropy_coef_min": 0.01, "entropy_coef_max": 0.2}
    assert MDPGRPOConfig(entropy_coef=coef, **bounds).has_entropy_bonus
    with pytest.raises(ConfigError, match=r"entropy_coef must be within .* = \[0.01, 0.2\] with entropy_target; got"):
        MDPGRPOConfig(entropy_coef=coef, entropy_target=1.0, **bounds)
    MDPGRPOConfig(entropy_coef=0.01, entropy_target=1.0, **bounds)


@pytest.mark.parametrize("objective", ["paper", "corrected"])
def test_an_option_that_would_not_be_used_is_refused(objective: Any) -> None:
    with pytest.raises(ConfigError, match="rescale_per_row needs temperature_objective = per_row"):
        MDPGRPOConfig(rescale_per_row=True, temperature_objective=objective)


def test_delta_has_to_exceed_the_clip() -> None:
    MDPGRPOConfig(delta=1.31, epsilon_high=0.3)
    with pytest.raises(ConfigError, match=r"delta must be above 1 \+ epsilon_high; got 1.3"):
        MDPGRPOConfig(delta=1.3, epsilon_high=0.3)


# ---- presets --------------------------------------------------------------------------------------------------------


def test_presets_are_complete_and_valid() -> None:
    assert list(PRESETS) == [
        "paper", "released_code", "exact", "grpo", "trl", "dapo", "dr_grpo", "gspo", "cispo", "rloo"
    ]  # fmt: skip
    fields = {f.name for f in dataclasses.fields(MDPGRPOConfig)}
    for name, values in PRESETS.items():
        assert set(values) <= fields
        c = preset(name)
        assert all(getattr(c, k) == v for k, v in values.items())
        assert TrainConfig(preset=name).preset == name
    assert all(name in TrainConfig.__dataclass_fields__["preset"].metadata["help"] for name in PRESETS)


def test_preset_paper_and_released_code() -> None:
    paper, released = preset("paper"), preset("released_code")
    for c in (paper, released):
        assert (c.top_p, c.top_k, c.temperatures) == (0.9, 50, [0.1, 0.4, 0.7, 1.0])
    assert (paper.goal_mean, released.goal_mean) == ("half", "max_half_mean")
    assert (paper.prospect_gain, paper.prospect_loss) == (1.25, 2.0)
    assert (released.prospect_gain, released.prospect_loss) == (2.0, 1.25), "swapped in the pipeline script"
    assert paper.prospect_on_goal and not released.prospect_on_goal


def test_preset_grpo_has_no_component_of_the_method() -> None:
    c = preset("grpo")
    assert not (c.multi_temperature or c.dual_anchor or c.prospect or c.asymmetric_kl)
    assert (c.alpha, c.betas, c.group_std, set(c.slot_temperatures)) == (0.0, (0.01, 0.01), "sample", {1.0})


def test_preset_overrides_and_unknown_names() -> None:
    assert preset("paper", num_generations=4).num_generations == 4
    assert preset("paper").num_generations == 8
    with pytest.raises(ConfigError, match="unknown preset 'papr'; did you mean 'paper'"):
        preset("papr")
    known = "cispo, dapo, dr_grpo, exact, grpo, gspo, paper, released_code, rloo, trl"
    with pytest.raises(ConfigError, match=f"unknown preset 'xyz'; known: {known}"):
        preset("xyz")
    with pytest.raises(ConfigError, match="top_p must be"):
        preset("paper", top_p=2.0)


def test_train_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 3  # type: ignore[misc]


def test_a_setting_of_another_type_is_named() -> None:
    with pytest.raises(ConfigError, match="steps must be a whole number; got '2'"):
        TrainConfig(steps="2")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"steps must be a whole number; got 2\.5"):
        TrainConfig(steps=2.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="lora must be True or False; got 'yes'"):
        TrainConfig(lora="yes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="temperatures must be a number; got 'warm'"):
        MDPGRPOConfig(temperatures=["warm"])  # type: ignore[list-item]
    run = TrainConfig(output_dir=Path("a") / "b", report_to="none", reward="m:f", learning_rate=1)  # type: ignore[arg-type]
    assert (run.output_dir, run.report_to, run.reward) == (str(Path("a/b")), [], ["m:f"])
    assert isinstance(run.learning_rate, float)


def test_a_long_value_is_cut_in_its_error() -> None:
    with pytest.raises(ConfigError, match=r"^template_args must be name=value; got '9{299}…$"):
        TrainConfig(template_args=["9" * 5000])
