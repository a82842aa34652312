"""What the public functions refuse, on every backend before any work: bad arguments, settings and in-place calls."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.inputs import LossInputs
from helpers.losses import (
    ALL_BACKENDS,
    BACKENDS,
    DEVICE,
    GIVEN,
    REWARDS,
    call,
    config_for,
    make_batch,
    no_work,
    not_a_leaf,
    packed,
    to,
)

import mdpgrpo_fast
from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.ops import overwritten

all_backends = pytest.mark.parametrize("backend", ALL_BACKENDS)
fused_backends = pytest.mark.parametrize("backend", BACKENDS)
Refusals = list[tuple[str, dict[str, Any], str]]  # the argument, what is changed, what the message goes on with


def on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v if getattr(v, "is_meta", False) else to(v, DEVICE) for k, v in arguments.items()}


def assert_all_refused(function: Any, good: dict[str, Any], refusals: Refusals, **more: Any) -> None:
    """Every message names the argument, what came and what is expected."""
    for name, change, message in refusals:
        with pytest.raises(ValueError, match=f"^{name} must be {message}"), no_work():
            function(**on_device({**good, **change}), check_values=True, **more)


# ---- advantages -----------------------------------------------------------------------------------------------------

GROUPS = {"rewards": torch.zeros(4), "num_constraints": torch.ones(2), "valid": None}
ADVANTAGES: Refusals = [
    ("rewards", {"rewards": torch.zeros(4)}, r"of shape \(P, G\); got shape \(4,\)"),
    ("rewards", {"rewards": torch.zeros(2, 2, dtype=torch.long)}, "floating point; got torch.int64"),
    ("rewards", {"rewards": torch.zeros(2, 1)}, r"\(P, G\) with G = num_generations = 2; got G = 1"),
    ("rewards", {"rewards": torch.tensor([[0.0, math.nan]] * 2)}, "finite .*; got NaN or infinity"),
    ("rewards", {"rewards": torch.tensor([[0.0, math.inf]] * 2)}, "finite .*; got NaN or infinity"),
    ("rewards", {"rewards": torch.tensor([[0.0, -1.5e6]] * 2)}, r"within ±1e\+06, .*; got 1.5e\+06"),
    ("num_constraints", {"num_constraints": torch.ones(3)}, r"of shape \(2,\); got shape \(3,\)"),
    ("num_constraints", {"num_constraints": torch.tensor([1, 0])}, r"at least 1; got \[1, 0\]"),
    ("valid", {"valid": torch.ones(2, dtype=torch.bool)}, r"of shape \(2, 2\); got shape \(2,\)"),
    ("valid", {"valid": torch.ones(2, 2)}, "bool; got torch.float32"),
    ("rewards", {"groups": torch.zeros(2, dtype=torch.long)}, r"of shape \(B,\) where groups are given"),
    ("groups", {**GROUPS, "groups": torch.zeros(3, dtype=torch.long)}, r"of shape \(4,\); got shape \(3,\)"),
    ("groups", {**GROUPS, "groups": torch.zeros(4)}, "int32 or int64; got torch.float32"),
    ("groups", {**GROUPS, "groups": torch.tensor([0, 1, 1, 1])},
     "a map in which .* 2 completions; got group 0 of size 1"),
    ("groups", {**GROUPS, "groups": torch.tensor([0, 0, 0, 0])}, "a map in which .*; got group 0 of size 4"),
    ("groups", {**GROUPS, "groups": torch.tensor([1, 2, 2, 1])}, r"numbered 0 to 1; got group ids \[1, 2\]"),
    ("valid", {**GROUPS, "groups": torch.tensor([0, 0, 1, 1]), "valid": torch.ones(2, 2, dtype=torch.bool)},
     r"of shape \(4,\)"),
]  # fmt: skip


@all_backends
def test_advantages_refuses(backend: str) -> None:
    good = {"rewards": torch.zeros(2, 2), "num_constraints": torch.tensor([1, 3])}
    assert_all_refused(mdpgrpo_fast.advantages, good, ADVANTAGES, config=config_for(), backend=backend)


# ---- logits ---------------------------------------------------------------------------------------------------------

LOGITS: Refusals = [  # of both functions of logits
    ("logits", {"logits": torch.zeros(11)}, r"of shape \(B, L, V\), or \(T, V\) with completion=; got shape \(11,\)"),
    ("logits", {"logits": torch.zeros(4, 2, 11, dtype=torch.long)}, "floating point; got torch.int64"),
    ("logits", {"logits": torch.zeros(4, 2, 0)}, "of at least one column"),
    ("logits", {"completion": torch.zeros(3, dtype=torch.long)}, r"of shape \(T, V\)"),
    ("tokens", {"tokens": torch.zeros(4, 3, dtype=torch.long)}, r"of shape \(4, 2\); got shape \(4, 3\)"),
    ("tokens", {"tokens": torch.zeros(4, 2)}, "int32 or int64; got torch.float32"),
    ("tokens", {"tokens": torch.full((4, 2), 11)}, r"in \[0, 11\); got range 11 to 11"),
    ("tokens", {"tokens": torch.full((4, 2), -1)}, r"in \[0, 11\); got range -1 to -1"),
    ("mask", {"mask": torch.ones(4)}, r"of shape \(4, 2\); got shape \(4,\)"),
    ("softcap", {"softcap": 0.0}, "above 0, or None; got 0.0"),
    ("softcap", {"softcap": -1.0}, "above 0, or None; got -1.0"),
    ("num_completions", {"num_completions": 4}, "left out for padded logits; got 4"),
    ("temperature", {"temperature": torch.ones(3)}, r"of shape \(4,\) or \(4, 2\); got shape \(3,\)"),
    ("temperature", {"temperature": torch.tensor([1.0, 0.0, 1.0, 1.0])}, r"above 0 in every row; got \[1.0, 0.0"),
    ("temperature", {"temperature": 0.0}, "above 0; got 0.0"),
    ("temperature", {"temperature": -1.0}, "above 0; got -1.0"),
    ("temperature", {"temperature": math.nan}, "above 0; got nan"),
]
PACKED: Refusals = [
    ("completion", {"completion": torch.zeros(3, dtype=torch.long)}, r"of shape \(5,\); got shape \(3,\)"),
    ("completion", {"completion": torch.zeros(5)}, "int32 or int64; got torch.float32"),
    ("completion", {"completion": torch.full((5,), 4)}, r"in \[0, 4\); got range 4 to 4"),
    ("completion", {"completion": torch.full((5,), -1)}, r"in \[0, 4\); got range -1 to -1"),
    ("num_completions", {"num_completions": None}, "given for packed logits, or follow from rewards; got None"),
    ("temperature", {"temperature": torch.ones(6)}, r"of shape \(4,\) or \(5,\); got shape \(6,\)"),
]
OBJECTIVE: Refusals = [
    ("max_completion_length", {"max_completion_length": 0}, "at least 1; got 0"),
    ("old_logprobs", {"old_logprobs": torch.zeros(4)}, r"of shape \(4, 2\); got shape \(4,\)"),
    ("old_logprobs", {"old_logprobs": torch.zeros(4, 2, device="meta")}, "on (cpu|cuda:0), .*; got device meta"),
    ("ref_logprobs", {"ref_logprobs": torch.zeros(3)}, r"of shape \(4, 2\)"),
    ("denominator", {"denominator": torch.ones(2)}, r"a number or a scalar tensor; got shape \(2,\)"),
    ("denominator", {"denominator": torch.ones(1, 2)}, r"a number or a scalar tensor; got shape \(1, 2\)"),
    ("importance_weight", {"importance_weight": torch.ones(4, 1)}, r"of shape \(4, 2\)"),
    ("epsilon_low", {"epsilon_low": torch.ones(3)}, r"of shape \(4,\) or \(4, 2\)"),
    ("delta", {"delta": torch.ones(3)}, r"of shape \(4,\) or \(4, 2\)"),
    ("delta", {"delta": -1.0}, r"0 \(no cap\) or above; got -1\.0"),
    ("delta", {"delta": torch.tensor([1.5, -1.0, 2.0, 0.0])}, r"0 \(no cap\) or above in every row"),
    ("epsilon_high", {"epsilon_high": torch.ones(1, 3)}, r"of shape \(4,\) or \(4, 2\)"),
    ("advantage", {"advantage": None}, "given, or rewards; got None"),
    ("kl_beta", {"kl_beta": None}, "given, or rewards; got None"),
    ("advantage", {"advantage": torch.ones(4, 1)}, r"of shape \(4,\) or \(4, 2\); got shape \(4, 1\)"),
    ("kl_beta", {"kl_beta": torch.ones(2)}, r"of shape \(4,\) or \(4, 2\)"),
    ("num_constraints", {"num_constraints": torch.ones(2)}, "given with rewards only"),
    ("valid", {"valid": torch.ones(2, 2, dtype=torch.bool)}, "given with rewards only"),
    ("groups", {"groups": torch.arange(4)}, "given with rewards only"),
    ("advantage", REWARDS, "left out where rewards are given; got both"),
    ("kl_beta", {**REWARDS, "advantage": None}, "left out where rewards are given; got both"),
    ("num_constraints", {**GIVEN, "rewards": torch.zeros(2, 2)}, "given with rewards; got None"),
    ("rewards", {**GIVEN, **REWARDS, "rewards": torch.zeros(4)}, r"of shape \(P, G\); got shape \(4,\)"),
    ("rewards", {**GIVEN, **REWARDS, "rewards": torch.zeros(4, 1)}, r"\(P, G\) with G = .* = 2; got G = 1"),
    ("rewards", {**GIVEN, "rewards": torch.zeros(3, 2), "num_constraints": torch.ones(3)},
     "one for each of 4 completions; got 6 rewards"),
    ("groups", {**GIVEN, **REWARDS, "rewards": torch.zeros(4), "groups": torch.tensor([0, 1, 1, 1])},
     "a map in which every group has G = num_generations = 2 completions; got group 0 of size 1"),
]  # fmt: skip


def arguments(batch: LossInputs) -> dict[str, Any]:
    return {"logits": batch.logits, "tokens": batch.tokens, "mask": batch.mask, **batch.given()}


@all_backends
def test_token_loss_refuses(backend: str) -> None:
    batch, more = make_batch(15), {"config": config_for(), "backend": backend}
    assert_all_refused(mdpgrpo_fast.token_loss, arguments(batch), [*LOGITS, *OBJECTIVE], **more)
    assert_all_refused(mdpgrpo_fast.token_loss, arguments(packed(batch)), PACKED, **more)


@all_backends
def test_token_logprobs_refuses(backend: str) -> None:
    for batch, refusals in ((make_batch(15), LOGITS), (packed(make_batch(15)), PACKED)):
        names = ("logits", "tokens", "mask", "completion", "num_completions")
        good = {k: v for k, v in arguments(batch).items() if k in names}
        assert_all_refused(mdpgrpo_fast.token_logprobs, good, refusals, backend=backend)


# ---- settings -------------------------------------------------------------------------------------------------------


@all_backends
def test_bad_settings_are_refused(backend: str) -> None:
    """An option that a code path would not consume raises."""
    batch = packed(make_batch(16))
    batch = replace(batch, logits=batch.logits.to(DEVICE))
    with no_work():
        with pytest.raises(ValueError, match=r"^max_completion_length must be given for packed logits with .* dr_grpo"):
            call(backend, batch, config_for(aggregation="dr_grpo"), max_completion_length=None)
        with pytest.raises(ConfigError, match="importance_weight is required by temperature_objective = corrected"):
            call(backend, batch, config_for(temperature_objective="corrected"))


@pytest.mark.parametrize("function", ["advantages", "token_loss", "token_logprobs"])
def test_a_backend_that_cannot_run_is_an_error_and_not_a_fallback(function: str) -> None:
    batch = make_batch(17)
    logits, tokens = batch.logits.double().to(DEVICE), batch.tokens.to(DEVICE)
    given = {k: to(v, DEVICE) for k, v in batch.given().items()}
    rewards = torch.zeros(1, 2, dtype=torch.float64, device=DEVICE)
    run = {
        "advantages": lambda b: mdpgrpo_fast.advantages(
            rewards, torch.ones_like(rewards[:, 0]), config_for(), backend=b
        ),
        "token_loss": lambda b: mdpgrpo_fast.token_loss(logits, tokens, None, config_for(), backend=b, **given),
        "token_logprobs": lambda b: mdpgrpo_fast.token_logprobs(logits, tokens, backend=b),
    }[function]
    with no_work():
        with pytest.raises(ConfigError, match="unknown backend 'torhc'; did you mean 'torch'"):
            run("torhc")
        for backend in BACKENDS:
            reason = "it takes bfloat16, float16, float32, not float64"
            with pytest.raises(ValueError, match=f"^backend '{backend}' cannot run: {reason}"):
                run(backend)
    # `auto` takes the reference there.
    got, expected = (getattr(x, "loss", getattr(x, "advantage", x)) for x in (run("auto"), run("torch")))
    got, expected = (x if isinstance(x, torch.Tensor) else x[0] for x in (got, expected))
    assert got.dtype == torch.float64 and torch.equal(got, expected)


# ---- in place -------------------------------------------------------------------------------------------------------


@fused_backends
def test_in_place_is_refused_where_it_cannot_work(backend: str) -> None:
    one, leaf = not_a_leaf(make_batch(11))
    turned = one.logits.transpose(1, 2).contiguous().transpose(1, 2)
    for name, logits, message in (
        (backend, one.logits[:1].expand(4, -1, -1), "off "),  # one gradient for four rows of the same memory
        (backend, leaf, "off for .* leaf"),
        (backend, leaf[:, :-1], "off for .* leaf"),  # a view of one
        (backend, turned, "off without unit stride in V; got .*stride"),
        (backend, one.logits.half(), "off: a float16 gradient underflows"),
        ("torch", one.logits, "left off: backend torch computes the gradient in the backward pass; got True"),
    ):
        width = logits.shape[1]
        cut = replace(one, logits=logits, tokens=one.tokens[:, :width], mask=one.mask[:, :width])
        cut.kwargs = {k: v[:, :width] for k, v in one.kwargs.items()}
        with pytest.raises(ValueError, match=f"^in_place must be {message}"), no_work():
            call(name, cut, config_for(), in_place=True)


@fused_backends
def test_overwritten_logits_are_refused(backend: str) -> None:
    one, _ = not_a_leaf(make_batch(8))
    call(backend, one, config_for(), in_place=True)
    for again in (
        lambda: call(backend, one, config_for(), in_place=True),
        lambda: call("torch", one, config_for()),
        lambda: call(backend, replace(one, logits=one.logits.detach()), config_for()),
        lambda: call(backend, replace(one, logits=one.logits.data), config_for()),
        lambda: call(backend, replace(one, logits=one.logits[:2]).rows(slice(0, 2)), config_for()),
        lambda: mdpgrpo_fast.token_logprobs(one.logits.detach()[1:], one.tokens.to(DEVICE)[1:], backend=backend),
        lambda: mdpgrpo_fast.token_logprobs(one.logits.view(-1, one.logits.shape[-1]), one.tokens.flatten().to(DEVICE)),
        lambda: mdpgrpo_fast.token_logprobs(one.logits, one.tokens.to(DEVICE), backend=backend),
    ):
        with pytest.raises(ValueError, match=r"^logits must be logits.*; got .* gradient"):
            again()
    with torch.no_grad():
        one.logits.zero_()  # logits again, whoever wrote them
    assert call(backend, one, config_for()).loss.isfinite()


@fused_backends
def test_the_same_slice_again_is_refused_and_another_is_not(backend: str) -> None:
    """logits[:, :-1] is a new tensor each time it is written down, and the same memory."""
    batch, config = make_batch(3), config_for()
    whole = torch.cat([batch.logits, batch.logits], 0).to(DEVICE).requires_grad_() * 1
    b = len(batch.logits)
    for half in (slice(0, b), slice(b, 2 * b)):
        call(backend, replace(batch, logits=whole[half]), config, in_place=True)
    for half in (slice(0, b), slice(b, 2 * b)):
        with pytest.raises(ValueError, match=r"^logits must be logits; got logits that hold their gradient"):
            mdpgrpo_fast.token_logprobs(whole[half], batch.tokens.to(DEVICE), backend=backend)


@fused_backends
def test_other_columns_of_overwritten_logits_are_logits(backend: str) -> None:
    """Parts of the width lie between each other in memory, and are no one another's."""
    batch, config = make_batch(3, (4, 4)), config_for()
    whole = batch.logits.to(DEVICE).requires_grad_() * 1

    def part(whole: torch.Tensor, columns: slice) -> LossInputs:
        kwargs = {n: x[:, columns] for n, x in batch.kwargs.items()}
        return LossInputs(whole[:, columns], batch.tokens[:, columns], batch.mask[:, columns], batch.advantage,
                          batch.kl_beta, kwargs)  # fmt: skip

    for columns in (slice(0, None, 2), slice(1, None, 2)):
        call(backend, part(whole, columns), config, in_place=True)
    del whole
    assert call(backend, make_batch(3, (4, 4)), config).loss.isfinite(), "new memory, where the old may have been"


@fused_backends
def test_overwritten_logits_that_are_filled_again_are_logits(backend: str) -> None:
    batch, _ = not_a_leaf(make_batch(3, (4, 4)))
    logits = batch.logits
    tokens, seen = batch.tokens.to(DEVICE), (lambda x: x, lambda x: x.detach(), lambda x: x[:1], lambda x: x.data)
    call(backend, replace(batch, logits=logits[:]), config_for(), in_place=True)
    for view in seen:
        with pytest.raises(ValueError, match=r"^logits must be logits"):
            mdpgrpo_fast.token_logprobs(view(logits), tokens[: len(view(logits))], backend=backend)
    with torch.no_grad():
        logits.fill_(0.5)
    for view in seen:
        mdpgrpo_fast.token_logprobs(view(logits), tokens[: len(view(logits))], backend=backend)


def test_threads_mark_logits_at_the_same_time() -> None:
    stop, logits = time.monotonic() + 0.5, [torch.zeros(2, 3) for _ in range(400)]

    def mark() -> None:
        while time.monotonic() < stop:
            for _ in range(50):
                overwritten.mark_overwritten(torch.zeros(2, 3))

    for x in logits:  # which keep the dictionary long
        overwritten.mark_overwritten(x)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(mark) for _ in range(4)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    for x in logits:
        with pytest.raises(ValueError, match=r"^logits must be logits"):
            overwritten.refuse_overwritten(x)


# ---- wrong types ----------------------------------------------------------------------------------------------------

TEXT, NOTHING, TABLE, OBJECT, LIST = "one", None, {"a": 1}, object(), ["a", "b"]
TENSORS = (TEXT, TABLE, OBJECT, LIST, 1.5)  # what no tensor of rows is
NUMBERS = (TEXT, TABLE, OBJECT, LIST, [0.5, 0.5])  # what is neither a number nor a tensor
WHOLE = (TEXT, TABLE, OBJECT, [2], 2.5)
SWITCH = (TEXT, TABLE, 1, [True])
WRONG: dict[str, tuple[Any, ...]] = {  # of both losses
    "tokens": (*TENSORS, NOTHING),
    "config": (TEXT, TABLE, NOTHING, OBJECT, 1),
    "temperature": (*NUMBERS, NOTHING),
    "check_values": SWITCH,
    **{n: TENSORS for n in ("mask", "completion", "old_logprobs", "ref_logprobs", "importance_weight",
                            "sampling_logprobs")},
    **{n: NUMBERS for n in ("advantage", "kl_beta", "epsilon_low", "epsilon_high", "delta", "entropy_coef",
                            "entropy_floor", "denominator", "softcap")},
    **{n: WHOLE for n in ("num_completions", "max_completion_length")},
}  # fmt: skip
OF_REWARDS: dict[str, tuple[Any, ...]] = {
    "rewards": (TEXT, TABLE, OBJECT, LIST, 1, [[0.5, 1.0], [0.5]], [["a", 1.0], [0.5, 1.0]], [[None, 1.0], [0.0, 1.0]]),
    "num_constraints": (TEXT, TABLE, OBJECT, LIST, 0, 0.5, math.nan, [True, True], [4, None], [4, 2, 1]),
    "valid": (TEXT, TABLE, OBJECT, LIST, 1, [[1, 0], [1, 1]], [[True], [True]]),
    "groups": (TEXT, TABLE, OBJECT, LIST, 1),
}
OF_HEAD: dict[str, tuple[Any, ...]] = {
    "hidden": (*TENSORS, NOTHING),
    "weight": (*TENSORS, NOTHING),
    "bias": TENSORS,
    "logit_scale": (TEXT, NOTHING, TABLE, LIST),
    "lengths": (TEXT, TABLE, OBJECT, LIST, 3),
    "skip_idle": (*SWITCH, NOTHING),
    "fp32_logits": (*SWITCH, NOTHING),
    "workspace_bytes": WHOLE,
    "vocab_group": (TEXT, TABLE, LIST, 1),
}


def assert_wrong_types_refused(
    function: Any, good: dict[str, Any], table: dict[str, tuple[Any, ...]], before: Any = no_work
) -> None:
    for name, values in table.items():
        for value in values:
            with before():
                try:
                    function(**{**good, name: value})
                except ValueError as e:
                    assert str(e).startswith(f"{name} must be ") and "; got " in str(e), (name, value, str(e))
                else:
                    raise AssertionError(f"{name} = {value!r} is taken")


def test_wrong_types_of_advantages() -> None:
    good = {**REWARDS, "config": config_for(), "backend": "torch"}
    table = {**OF_REWARDS, "config": WRONG["config"], "check_values": SWITCH, "running": (TEXT, TABLE, 1.0, [1.0])}
    table["rewards"] = (*table["rewards"], NOTHING)
    table["num_constraints"] = (*table["num_constraints"], NOTHING, config_for())
    assert_wrong_types_refused(mdpgrpo_fast.advantages, good, table)
    batch = {**good, "config": config_for(scale_rewards="batch")}
    assert_wrong_types_refused(mdpgrpo_fast.advantages, batch, {"batch_std": (*NUMBERS, torch.ones(2), -1.0)})
    several = {
        "rewards": None,
        "num_constraints": 2,
        "parts": torch.rand(2, 2, 3),
        "config": config_for(multi_objective_aggregation="normalize_then_sum"),
        "backend": "torch",
    }
    wrong = {
        "parts": (*TENSORS, NOTHING, torch.ones(4), torch.ones(2, 2, 0), torch.ones(2, 2, 3).long(),
                  torch.full((2, 2, 3), math.inf), [[["a"]]]),
        "part_weights": (TEXT, TABLE, OBJECT, LIST, 1.0, [1.0, 2.0], [1.0, 2.0, math.nan], torch.ones(2)),
        "batch": (TEXT, TABLE, OBJECT, 1.0, [1.0], (1.0, TEXT), (1.0, -1.0), (NOTHING, 1.0), (torch.ones(2), 1.0)),
        "valid": (TEXT, [[True, False]], torch.ones(2, 2)),
    }  # fmt: skip
    assert mdpgrpo_fast.advantages(**several).z.shape == (2, 2)
    # The sum of the parts, which stands for the rewards, is work.
    assert_wrong_types_refused(mdpgrpo_fast.advantages, several, wrong, before=contextlib.nullcontext)


def test_wrong_types_of_token_loss() -> None:
    batch = make_batch(15)
    good = {**arguments(batch), "config": config_for(), "backend": "torch"}
    of_logits = {"logits": (*TENSORS, NOTHING), "in_place": (*SWITCH, NOTHING)}
    assert_wrong_types_refused(mdpgrpo_fast.token_loss, good, {**WRONG, **of_logits})
    good = {**good, **GIVEN, **REWARDS}
    refused = {**OF_REWARDS, "num_constraints": (*OF_REWARDS["num_constraints"], NOTHING)}
    assert_wrong_types_refused(mdpgrpo_fast.token_loss, good, refused)


def test_wrong_types_of_linear_token_loss() -> None:
    batch = make_batch(15)
    good = {k: v for k, v in arguments(batch).items() if k != "logits"}
    good |= {"hidden": torch.randn(4, 2, 5), "weight": torch.randn(11, 5), "config": config_for(), "backend": "torch"}
    assert_wrong_types_refused(mdpgrpo_fast.linear_token_loss, good, {**WRONG, **OF_HEAD})
    good |= {**GIVEN, **REWARDS}
    refused = {**OF_REWARDS, "num_constraints": (*OF_REWARDS["num_constraints"], NOTHING)}
    assert_wrong_types_refused(mdpgrpo_fast.linear_token_loss, good, refused)


def test_wrong_types_of_token_logprobs() -> None:
    batch = make_batch(15)
    good = {"logits": batch.logits, "tokens": batch.tokens, "backend": "torch"}
    names = ("tokens", "mask", "completion", "temperature", "softcap", "num_completions", "check_values")
    table = {n: WRONG[n] for n in names} | {"logits": (*TENSORS, NOTHING)}
    assert_wrong_types_refused(mdpgrpo_fast.token_logprobs, good, table)
