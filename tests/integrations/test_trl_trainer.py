"""MDPGRPOTrainer: the method's sampling, advantages, KL and objective inside TRL, and TRL where it is off."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.inputs import needed
from helpers.trl import PROMPTS, arguments, assert_same_log, logged, make_trainer, ours, reward, trl
from helpers.trl_vllm import Sampler, stand_in

import mdpgrpo_fast
from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.models.policy import completion_logits

pytestmark = pytest.mark.filterwarnings("ignore")

OFF = {"multi_temperature": False, "dual_anchor": False, "prospect": False, "asymmetric_kl": False}
SEED_POLICY = str(Path(mdpgrpo_fast.__file__).parent / "demo" / "seed_policy")
TRAIN = str(Path(mdpgrpo_fast.__file__).parent / "demo" / "train.jsonl")


def make(path: str, tmp: Path, **given: Any) -> Any:
    rows = given.pop("rows", None)
    return make_trainer(ours.MDPGRPOTrainer, ours.MDPGRPOConfig, path, tmp, rows, **{"num_constraints": 3, **given})


def generation(trainer: Any, prompts: list[str] = PROMPTS[:2], **columns: Any) -> dict[str, Any]:
    """What one generation gives: 4 completions of each prompt."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [{"prompt": p, **{k: v[i] for k, v in columns.items()}} for i, p in enumerate(prompts) for _ in range(4)]
    return trainer._generate_and_score_completions(rows)  # type: ignore[no-any-return]


# ---- where the method is off ----------------------------------------------------------------------------------------


def test_with_the_components_off_it_is_trl(model_dirs: dict[str, str], tmp_path: Path) -> None:
    same = {"loss_type": "dapo", "beta": 0.1, "num_iterations": 2, "max_steps": 10, "use_bias_correction_kl": True}
    theirs = logged(make_trainer(trl.GRPOTrainer, trl.GRPOConfig, model_dirs["llama"], tmp_path, **same))
    trainer = make(model_dirs["llama"], tmp_path, **OFF, packing="off", **same)
    mine = logged(trainer)
    assert_same_log(mine, theirs)
    assert len(mine) == 10 and mine[0]["groups/zero_variance_groups"] == 0


def test_a_config_of_trl_is_trl_on_our_kernels(
    model_dirs: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = logged(make_trainer(trl.GRPOTrainer, trl.GRPOConfig, model_dirs["llama"], tmp_path))
    trainer = make_trainer(ours.MDPGRPOTrainer, trl.GRPOConfig, model_dirs["llama"], tmp_path)
    assert "this is TRL's GRPO on our kernels" in caplog.text
    assert_same_log(logged(trainer), theirs)


# ---- advantages and the KL coefficient ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knob", "columns", "expected"),
    [
        (3, {}, [3.0, 3.0]),
        (4, {"num_constraints": [1, 5]}, [1.0, 5.0]),
        (4, {"instruction_id_list": [["a"], ["a", "b"]], "num_constraints": [7, 7]}, [1.0, 2.0]),
        (4, {"instruction_id_list": [None, ["a", "b"]]}, [4.0, 2.0]),
    ],
)
def test_advantages_are_the_methods(
    model_dirs: dict[str, str], tmp_path: Path, knob: int, columns: Any, expected: list[float]
) -> None:
    rows = [{"prompt": p, "num_constraints": 1} for p in PROMPTS]
    trainer = make(model_dirs["llama"], tmp_path, rows=rows, num_constraints=knob, log_completions=True)
    batch = generation(trainer, **columns)
    rewards = trainer._rewards[:, 0].view(2, 4)
    found = mdpgrpo_fast.advantages(rewards, torch.tensor(expected), trainer.method)
    assert (found.advantage != 0).any()
    torch.testing.assert_close(batch["advantages"], found.advantage.flatten())
    torch.testing.assert_close(batch["kl_beta"], found.kl_beta.flatten())
    assert list(trainer._logs["advantages"]) == pytest.approx(found.advantage.flatten().tolist())


def test_a_reward_that_is_the_mean_has_not_the_sign_of_a_rounding(model_dirs: dict[str, str], tmp_path: Path) -> None:
    """TRL's own advantages too: 3/7 less the mean of 1/7, 2/7, 3/7 and 6/7 is -3e-8 there, and would take β₋."""

    def sevenths(completions: list[str], **_: Any) -> list[float]:
        return [(1, 2, 3, 6)[i % 4] / 7 for i in range(len(completions))]

    rows = needed("datasets").Dataset.from_list([{"prompt": p} for p in PROMPTS])
    config = ours.MDPGRPOConfig(**arguments(tmp_path), **{**OFF, "asymmetric_kl": True}, beta=0.1, kl_beta_neg=0.25)
    batch = generation(ours.MDPGRPOTrainer(model_dirs["llama"], sevenths, config, rows))
    assert batch["advantages"].sign().tolist() == [-1, -1, 0, 1] * 2
    torch.testing.assert_close(batch["kl_beta"], torch.tensor([0.25, 0.25, 0.1, 0.1] * 2))


def test_several_rewards_and_ones_that_do_not_apply(model_dirs: dict[str, str], tmp_path: Path) -> None:
    def other(completions: list[str], **_: Any) -> list[float | None]:
        return [None if i == 1 else i / 8 for i in range(len(completions))]

    def no_first(completions: list[str], **more: Any) -> list[float | None]:
        return [None if i in (1, 2) else r for i, r in enumerate(reward(completions, **more))]

    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        config = ours.MDPGRPOConfig(
            **arguments(tmp_path),
            num_constraints=2,
            reward_weights=[0.75, 0.25],
            multi_objective_aggregation=aggregation,
        )
        data = needed("datasets").Dataset.from_list([{"prompt": p} for p in PROMPTS])
        trainer = ours.MDPGRPOTrainer(model_dirs["llama"], [no_first, other], config, data)
        batch = generation(trainer)
        single = trainer._rewards
        assert batch["advantages"][1] == 0 and bool((batch["advantages"][2:] != 0).any())
        weights = torch.tensor([0.75, 0.25])
        if aggregation == "normalize_then_sum":
            more: dict[str, Any] = {"parts": single.view(2, 4, 2), "part_weights": weights}
            found = mdpgrpo_fast.advantages(None, torch.tensor([2.0, 2.0]), trainer.method, **more)
        else:
            valid = ~single.isnan().all(1).view(2, 4)
            total = (single * weights).nansum(1).view(2, 4)
            found = mdpgrpo_fast.advantages(total, torch.tensor([2.0, 2.0]), trainer.method, valid=valid)
        torch.testing.assert_close(batch["advantages"], found.advantage.flatten())


def test_evaluation_is_trls(model_dirs: dict[str, str], tmp_path: Path) -> None:
    trainer = make(model_dirs["llama"], tmp_path)
    trainer.model.eval()
    batch = trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS[:2] for _ in range(4)])
    rewards = trainer._rewards[:, 0].view(2, 4)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch["advantages"], expected.flatten())
    assert "sampling_temperature" not in batch and trainer._compute_loss(trainer.model, batch).isfinite()


# ---- the objective --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature_objective": "per_row"},
        {"temperature_objective": "per_row", "rescale_per_row": True, "kl_temperature": 0.8},
        {"asymmetric_kl": False, "kl_estimator": "k2"},
        {"multi_temperature": False, "temperature": 0.7, "kl_temperature": 1.3},
        {"num_iterations": 2, "loss_type": "dapo", "importance_sampling_level": "sequence"},
        {"loss_type": "vespo", "temperature_objective": "per_row", "num_iterations": 2},
    ],
    ids=["paper", "per_row", "rescaled", "symmetric", "one temperature", "sequence", "vespo"],
)
def test_loss_and_gradient_are_the_references(
    model_dirs: dict[str, str], tmp_path: Path, given: dict[str, Any], packing: str
) -> None:
    """On the completions that it has sampled, with old log-probs and a reference that differ from the policy's."""
    trainer = make(model_dirs["llama"], tmp_path, packing=packing, beta=0.1, kl_beta_neg=0.25, **given)
    batch = generation(trainer)
    many, method = trainer.method.multi_temperature, trainer.method
    taus: Any = torch.tensor([0.1, 0.4, 0.7, 1.0] * 2) if many else 0.7
    if many:
        torch.testing.assert_close(batch["sampling_temperature"], taus)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    ids, prompt_mask, tokens, mask = (batch[n] for n in names)
    logits = completion_logits(trainer.model, ids, prompt_mask.bool(), tokens, mask.bool())
    policy_tau = (taus if method.temperature_objective == "per_row" else 1.0) if many else 0.7
    kl_tau = method.kl_temperature if many else 0.7
    with torch.no_grad():
        ref = mdpgrpo_fast.token_logprobs(logits, tokens, temperature=kl_tau, backend="torch")[0]
        own = mdpgrpo_fast.token_logprobs(logits, tokens, temperature=policy_tau, backend="torch")[0]
    torch.testing.assert_close(batch["ref_per_token_logps"] * mask, ref * mask, rtol=1e-4, atol=1e-4)
    if "old_per_token_logps" in batch:
        torch.testing.assert_close(batch["old_per_token_logps"] * mask, own * mask, rtol=1e-4, atol=1e-4)
    noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    batch["ref_per_token_logps"] = ref + noise
    old = {}
    if trainer.num_iterations > 1:
        batch["old_per_token_logps"] = own - noise
        old = {"old_logprobs": own - noise}
    names_of = {"loss_type": "grpo", "importance_sampling_level": "token", **given}
    loss, aggregation = {"grpo": ("ppo_clip", "grpo"), "dapo": ("ppo_clip", "dapo"), "vespo": ("vespo", "dapo")}[
        names_of["loss_type"]
    ]
    config = mdpgrpo_fast.MDPGRPOConfig(
        loss=loss, aggregation=aggregation, importance_level=names_of["importance_sampling_level"],  # type: ignore[arg-type]
        kl_temperature=kl_tau, kl_estimator=method.kl_estimator, rescale_per_row=method.rescale_per_row,
        temperature_objective="per_row",
    )  # fmt: skip
    expected = mdpgrpo_fast.token_loss(
        logits, tokens, mask, config, advantage=batch["advantages"],
        kl_beta=torch.where(batch["advantages"] < 0, 0.25, 0.1) if method.asymmetric_kl else 0.1,
        temperature=policy_tau, ref_logprobs=ref + noise, backend="torch", **old,
    )  # fmt: skip
    expected.loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    batch["num_items_in_batch"] = mask.sum()
    trainer.args.steps_per_generation = 1
    found = trainer._compute_loss(trainer.model, batch)
    found.backward()
    assert found.item() == pytest.approx(expected.loss.item(), rel=1e-4, abs=1e-6)
    for name, p in trainer.model.named_parameters():
        size = gradients[name].abs().max().item()
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-4 * size + 1e-8)


def test_packed_micro_batches_hold_whole_groups(model_dirs: dict[str, str], tmp_path: Path) -> None:
    """TRL shuffles all completions; with packing whole groups are, and training is the same sum."""
    given = {"gradient_accumulation_steps": 4, "generation_batch_size": 16}
    trainer = make(model_dirs["llama"], tmp_path, packing="on", **given)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 4
    rows = [{"prompt": p} for p in PROMPTS for _ in range(4)]
    trainer._prepare_inputs(rows)
    parts = trainer._buffered_inputs
    prompts = [set(map(tuple, part["prompt_ids"].tolist())) for part in parts]
    assert [len(p) for p in prompts] == [1] * 4 and len(set.union(*prompts)) == 4
    assert sorted(t for part in parts for t in part["sampling_temperature"].tolist()) == pytest.approx(
        sorted([0.1, 0.4, 0.7, 1.0] * 4)
    )
    packed, padded = (
        logged(make(model_dirs["llama"], tmp_path, packing=packing, **given)) for packing in ("on", "off")
    )
    assert_same_log(packed, padded, tolerance=1e-4)


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_data_without_k_is_said(model_dirs: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(model_dirs["llama"], tmp_path, num_constraints=6)
    assert "train_dataset has no column instruction_id_list or num_constraints: K is 6 for all prompts" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperatures": [0.1, 0.2, 0.3]}, "temperatures must be a list whose length divides num_generations = 4"),
        ({"num_constraints": 0}, "num_constraints must be 1 or above; got 0"),
        ({"goal_mean": "running"}, "goal_mean"),
        ({"dual_anchor_alpha": 2.0}, r"dual_anchor_alpha must be in \[0, 1\]; got 2.0"),
        ({"rescale_per_row": True}, "rescale_per_row needs temperature_objective = per_row"),
        ({"packing": "often"}, "packing"),
        ({"backend": "gpu"}, "backend"),
    ],
)
def test_config_errors_name_the_knob(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ours.MDPGRPOConfig(**arguments(tmp_path, **given))


def test_a_rollout_of_ones_own_needs_one_temperature(model_dirs: dict[str, str], tmp_path: Path) -> None:
    def rollout(prompts: Any, trainer: Any) -> Any:
        raise AssertionError

    def construct(**given: Any) -> Any:
        config = ours.MDPGRPOConfig(**arguments(tmp_path), num_constraints=1, **given)
        data = needed("datasets").Dataset.from_list([{"prompt": p} for p in PROMPTS])
        return ours.MDPGRPOTrainer(model_dirs["llama"], reward, config, data, rollout_func=rollout)

    with pytest.raises(ValueError, match="rollout_func samples at temperatures of its own; set multi_temperature"):
        construct()
    construct(multi_temperature=False)


def test_an_infinite_reward_and_a_loss_that_is_not_finite_stop_the_run(
    model_dirs: dict[str, str], tmp_path: Path
) -> None:
    trainer = make(model_dirs["llama"], tmp_path)
    trainer.reward_funcs[0] = lambda completions, **_: [math.inf] * len(completions)
    with pytest.raises(ValueError, match="rewards"):
        trainer.train()
    trainer = make(model_dirs["llama"], tmp_path)
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(math.nan)
    trainer.reward_funcs[0] = lambda completions, **_: [i / 8 for i in range(len(completions))]
    trainer._generate_single_turn = lambda ids, *_, **__: ([[5, 6, 2]] * len(ids), None)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        trainer.train()


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> Any:
    return ours.constraint_dataset(TRAIN)


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
ALL = [*itertools.product(LOSS_TYPES, (False, True), (False,)), *((t, t == "dapo", True) for t in LOSS_TYPES)]
FEW = [("grpo", False, True), ("dapo", True, True), ("cispo", False, False), ("sapo", True, False)]


@pytest.mark.parametrize(
    ("loss_type", "lora", "vllm"),
    [x if x in FEW else pytest.param(*x, marks=pytest.mark.long) for x in ALL],
)
def test_ten_steps_of_the_seed_policy(
    embedded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_type: str, lora: bool, vllm: bool
) -> None:
    more: dict[str, Any] = {"epsilon_high": 2.0} if loss_type == "cispo" else {}
    if vllm:
        stand_in(monkeypatch, lambda: Sampler(SEED_POLICY))
        more |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_importance_sampling_mode": "token_truncate"}
    settings = arguments(tmp_path, max_steps=10, max_completion_length=24, gradient_accumulation_steps=1)
    config = ours.MDPGRPOConfig(**settings, loss_type=loss_type, **more)
    peft = needed("peft").LoraConfig(r=4, target_modules="all-linear") if lora else None
    trainer = ours.MDPGRPOTrainer(SEED_POLICY, ours.constraint_reward, config, embedded, peft_config=peft)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    log = logged(trainer)
    assert len(log) == 10 and trainer.has_learned and all(math.isfinite(row["grad_norm"]) for row in log)
    assert {"reward/temperature_0.1", "groups/advantage_mean", "kl", "entropy"} <= log[0].keys()
    assert any(row["reward"] > 0 for row in log) and trainer.packer is not None
    moved = [not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before]
    assert any(moved) if lora else all(moved)
    if vllm:
        # The sampler follows the weights, and says what the policy says of its tokens.
        ratios = [row["sampling/importance_sampling_ratio/mean"] for row in log]
        assert ratios == pytest.approx([1.0] * 10, abs=1e-3)


def test_prompts_and_reward(tmp_path: Path, embedded: Any) -> None:
    row = embedded[0]
    assert row["num_constraints"] == len(row["instruction_id_list"]) == len(json.loads(row["kwargs"]))
    assert row["prompt"][0]["role"] == "user"
    text = ours.constraint_dataset([{"prompt": "a"}], conversational=False)
    assert text[0]["prompt"] == "a" and text[0]["num_constraints"] == 1
    columns: dict[str, Any] = {
        "instruction_id_list": [["punctuation:no_comma", "startend:quotation"]] * 2, "kwargs": ["[{}, {}]", [{}, None]]
    }  # fmt: skip
    answers = ['"no commas"', [{"role": "assistant", "content": "one, two"}]]
    assert ours.constraint_reward(["a", "b"], answers, **columns) == [1.0, 0.0]
    with pytest.raises(ValueError, match="instruction_id_list has no entry for the prompt a"):
        ours.constraint_reward(["a"], ["b"], [[]], ["[]"])


def script_arguments(tmp: Path, **given: Any) -> list[str]:
    fields = arguments(tmp / "out", report_to="none", **{"max_steps": 2, "gradient_accumulation_steps": 1, **given})
    fields = {"model_name_or_path": SEED_POLICY, "dataset_name": TRAIN, **fields}
    path = tmp / "run.yaml"
    path.write_text(json.dumps(fields), encoding="utf-8")  # which is YAML
    return ["--config", str(path)]


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mdpgrpo_fast.integrations.trl import __main__ as script

    assert script.run([*script_arguments(tmp_path), "--temperatures", "0.5", "1.0"]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists() and "The model is in" in capsys.readouterr().out
    # A run that learns nothing ends with another status.
    (tmp_path / "own_reward.py").write_text("def same(completions, **_):\n    return [0.5] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    named = ["--reward_funcs", "own_reward.same", "--dual_anchor", "false"]
    assert script.run([*script_arguments(tmp_path), *named]) == 1
    assert "no completion ever had an advantage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reward_funcs", "nothing"], "reward_funcs must be constraints, package.module.function or one of"),
        (["--reward_funcs", "no.such"], "reward_funcs has 'no.such', which cannot be imported"),
        (["--no_such_flag", "1"], "no_such_flag"),
        (["--dataset_name", "missing.jsonl"], "missing.jsonl"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--model_name_or_path", ""], "model_name_or_path must be set"),
        (["--eval_strategy", "steps"], "dataset_test_split must be one of train, or eval_strategy no; got 'test'"),
    ],
)
def test_wrong_arguments_of_the_script_are_one_line(
    tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mdpgrpo_fast.integrations.trl import __main__ as script

    given = script_arguments(tmp_path) if "--config" not in more else []
    with pytest.raises(ConfigError, match=message):
        script.run([*given, *more])
