"""Shared by the tests of the operations: backends, device, random batches in both layouts, and the error budget."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from helpers.inputs import LossInputs, make_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mdpgrpo_fast
from mdpgrpo_fast.config import MDPGRPOConfig
from mdpgrpo_fast.reference import TokenLoss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def runs(backend: str) -> bool:
    logits = torch.zeros(1, 1, 2, device=DEVICE)
    try:
        mdpgrpo_fast.token_logprobs(logits, torch.zeros_like(logits[..., 0], dtype=torch.long), backend=backend)
    except ValueError:
        return False
    return True


# Of the fused ones, those that this machine can run (test_backends.py says why the others are not there).
BACKENDS = ["triton", *(name for name in ("cpu", "cuda") if runs(name))]
ALL_BACKENDS = ["torch", *BACKENDS]
MAX_LENGTH = 5
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTHS = (2, 1, 0, 2)  # ragged, with a completion that has no token
PER_TOKEN = ("logprobs", "entropy", "kl", "ratio", "completion_kl", "totals")
FLAGS = ("clipped_low", "clipped_high")

# What is allowed on top of torch's own error in the same precision, relative to the size of the result. Triton's
# interpreter cuts bfloat16 off where a GPU rounds to nearest.
CONSTANT = {torch.float32: 5e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3 if DEVICE == "cuda" else 2**-7}


def gpu(test: Any) -> Any:
    """Marks a test that needs a CUDA device, and skips it where there is none."""
    for mark in GPU:
        test = mark(test)
    return test


def config_for(**knobs: Any) -> MDPGRPOConfig:
    return MDPGRPOConfig(**{"num_generations": 2, "multi_temperature": False, **knobs})


def to(x: Any, device: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """A tensor on the device, with the dtype if it is a real one; anything else as it is."""
    if not isinstance(x, Tensor):
        return x
    return x.to(device=device, dtype=dtype if x.is_floating_point() else None)


class Result(NamedTuple):
    out: Any
    grad: Tensor


def call(backend: str, batch: LossInputs, config: MDPGRPOConfig, device: str = DEVICE, **more: Any) -> TokenLoss:
    """`token_loss` on a batch as it is; an option of None is left out."""
    options = {"max_completion_length": MAX_LENGTH, **batch.given(), **more}
    options = {k: to(v, device) for k, v in options.items() if v is not None}
    return mdpgrpo_fast.token_loss(
        batch.logits, to(batch.tokens, device), to(batch.mask, device), config, backend=backend, **options
    )


def run(backend: str, batch: LossInputs, config: MDPGRPOConfig, device: str = DEVICE, **more: Any) -> Result:
    """The loss and the gradient of the logits."""
    logits = batch.logits.detach().to(device).requires_grad_()
    out = call(backend, replace(batch, logits=logits), config, device, **more)
    return Result(out, torch.autograd.grad(out.loss, logits)[0])


def double(batch: LossInputs) -> LossInputs:
    real = {k: to(v, dtype=torch.float64) for k, v in batch.kwargs.items()}
    return LossInputs(*(to(x, dtype=torch.float64) for x in batch), kwargs=real)


def reference(batch: LossInputs, config: MDPGRPOConfig, **more: Any) -> tuple[Result, Result]:
    """The truth, in float64, and torch's own result in the precision of the batch; both on the CPU."""
    exact = {k: to(v, dtype=torch.float64) for k, v in more.items()}
    return run("torch", double(batch), config, "cpu", **exact), run("torch", batch, config, "cpu", **more)


# ---- the error budget -----------------------------------------------------------------------------------------------


def error(x: Tensor, truth: Tensor, size: Tensor | float) -> float:
    x = x.detach().cpu().double()
    same = (x == truth) | (x.isnan() & truth.isnan())
    return torch.where(same, 0, (x - truth).abs() / size).max().item() if x.numel() else 0.0


def assert_within(got: Tensor, truth: Tensor, own: Tensor, name: str, dtype: torch.dtype = torch.float32) -> None:
    """Element by element: no further from the truth than torch's own result in that precision, plus a constant."""
    assert got.shape == truth.shape and got.isnan().sum() == truth.isnan().sum(), name
    size = 1 + truth.abs()
    allowed = error(own, truth, size) + CONSTANT[dtype]
    assert error(got, truth, size) <= allowed, f"{name}: off by {error(got, truth, size):.2e}, allowed {allowed:.2e}"


def assert_gradient(got: Tensor, truth: Tensor, logprobs: Tensor, own: Tensor, dtype: torch.dtype) -> None:
    """As `assert_within`, relative to each row's weight; a row that is 0 in truth is 0 to the bit.

    logprobs: those of the rows, in truth.
    """
    assert got.dtype == dtype and got.shape == truth.shape
    if got.numel() == 0:
        return
    rows = truth.abs().amax(-1, keepdim=True)
    # The gradient of a row is its weight times onehot - p, whose largest member is 1 - p(token): that may cancel.
    weight = rows / -logprobs[..., None].detach().clamp(max=-1e-12).expm1()
    size = weight.clamp(min=max(1e-3 * weight.max().item(), 1e-30))
    allowed = error(own, truth, size) + CONSTANT[dtype]
    found = error(got, truth, size)
    assert found <= allowed, f"gradient: off by {found:.2e}, allowed {allowed:.2e}"
    assert (got.cpu()[rows.squeeze(-1) == 0] == 0).all(), "a row without effect has a gradient"


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Equal up to the order of a row's sums, which may follow its alignment, and one rounding to the dtype."""
    rtol = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}[got.dtype]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-6)


def assert_matches(backend: str, batch: LossInputs, config: MDPGRPOConfig, **more: Any) -> Result:
    """Loss, gradient and every statistic against the reference. Returns the backend's result."""
    truth, own = reference(batch, config, **more)
    got = run(backend, batch, config, **more)
    for name in ("loss", *PER_TOKEN):
        assert_within(*(getattr(r.out, name) for r in (got, truth, own)), name)
    for name in FLAGS:
        assert torch.equal(getattr(got.out, name).cpu(), getattr(truth.out, name)), name
    assert_gradient(got.grad, truth.grad, truth.out.logprobs, own.grad, batch.logits.dtype)
    return got


def not_a_leaf(batch: LossInputs) -> tuple[LossInputs, Tensor]:
    """The batch on the device with logits that are not a leaf, and the leaf behind them."""
    leaf = batch.logits.to(DEVICE, copy=True).requires_grad_()
    return replace(batch, logits=leaf * 1), leaf


def wide_view(logits: Tensor, pad: int, shift: int = 0) -> tuple[Tensor, Tensor]:
    """NaN-padded storage and a view of it that holds the logits; shift: elements off the allocation's alignment."""
    b, width, v = logits.shape
    flat = torch.full((b * (width + 1) * (v + pad) + shift,), math.nan, dtype=logits.dtype, device=DEVICE)
    base = flat[shift:].view(b, width + 1, v + pad)
    base[:, :-1, :v] = logits.to(DEVICE)
    base.requires_grad_()
    return base, base[:, :-1, :v]


# ---- before any work ------------------------------------------------------------------------------------------------

# On floating-point numbers none of them is a check. The operations of this package are seen under their own name.
ARITHMETIC = "exp log logsumexp _log_softmax tanh sqrt mm addmm bmm mul div gather index_select"


class _NoWork(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        (space, name), inputs = function.name().split("::"), [x for x in args if isinstance(x, Tensor)]
        floats = any(x.is_floating_point() for x in inputs)
        if space == "mdpgrpo_fast" or (floats and name.split(".")[0] in ARITHMETIC.split()):
            raise AssertionError(f"{function.name()} before the checks")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_work() -> Iterator[None]:
    """Nothing is computed inside: only checks have their turn."""
    with _NoWork():
        yield


# ---- options --------------------------------------------------------------------------------------------------------

SIZE = (len(LENGTHS), max(LENGTHS))
EACH = torch.tensor([0.4, 0.7, 1.0, 1.3])
ROWS = torch.linspace(0.1, 1.2, SIZE[0] * SIZE[1]).view(SIZE)
MASK = torch.arange(SIZE[1]) < torch.tensor(LENGTHS)[:, None]
REWARDS = {"rewards": torch.tensor([[0.25, 1.0], [0.5, 0.0]]), "num_constraints": torch.tensor([4, 2])}
GIVEN = {"advantage": None, "kl_beta": None}
PER_ROW = {"temperature_objective": "per_row"}

OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # config, arguments
    "plain": ({}, {}),
    "on_policy": ({}, {"old_logprobs": None}),
    "no_reference": ({}, {"ref_logprobs": None}),
    "neither": ({}, {"old_logprobs": None, "ref_logprobs": None}),
    "advantage_number": ({}, {"advantage": -0.7, "kl_beta": 0.3}),
    "advantage_scalar": ({}, {"advantage": torch.tensor(0.7), "kl_beta": torch.tensor(0.3)}),
    "advantage_per_row": ({}, {"advantage": ROWS - 0.6, "kl_beta": ROWS}),
    "temperature_number": ({}, {"temperature": 0.7}),
    "temperature_scalar": ({}, {"temperature": torch.tensor(0.7)}),
    "temperature_per_completion": ({}, {"temperature": EACH}),
    "temperature_per_row": ({}, {"temperature": ROWS + 0.2}),
    "kl_at_the_temperature": ({"kl_temperature": 0.7}, {"temperature": 0.7}),
    "kl_at_another_temperature": ({"kl_temperature": 0.6}, {"temperature": EACH}),
    "epsilon_number": ({}, {"epsilon_low": 0.05, "epsilon_high": 0.1}),
    "epsilon_scalar": ({}, {"epsilon_low": torch.tensor(0.05), "epsilon_high": torch.tensor(0.1)}),
    "epsilon_per_completion": ({}, {"epsilon_low": EACH / 4, "epsilon_high": EACH / 8}),
    "epsilon_per_row": ({}, {"epsilon_low": ROWS / 4, "epsilon_high": ROWS / 8}),
    "no_clip": ({}, {"epsilon_low": math.inf, "epsilon_high": math.inf}),
    "delta": ({"delta": 1.3}, {}),
    "delta_number": ({}, {"delta": 1.3}),
    "delta_per_completion": ({"delta": 1.5}, {"delta": torch.tensor([1.3, 0.0, 1.1, 1.2])}),
    "delta_per_row": ({}, {"delta": 1.0 + ROWS / 2}),
    "k1": ({"kl_estimator": "k1"}, {}),
    "k2": ({"kl_estimator": "k2"}, {}),
    "per_row": ({"temperature_objective": "per_row"}, {"temperature": EACH}),
    "rescaled": ({"temperature_objective": "per_row", "rescale_per_row": True}, {"temperature": EACH}),
    "rescaled_number": ({"temperature_objective": "per_row", "rescale_per_row": True}, {"temperature": 0.5}),
    "corrected": ({"temperature_objective": "corrected"}, {"importance_weight": 2 * ROWS}),
    "softcap": ({}, {"softcap": 3.0}),
    "softcap_temperatures": ({}, {"softcap": 30.0, "temperature": EACH}),
    "no_mask": ({}, {"mask": None}),
    "mask_int": ({}, {"mask": MASK.int()}),
    "mask_float": ({}, {"mask": MASK * -0.5}),
    "tokens_int32": ({}, {"tokens": torch.int32}),
    "cispo": ({"loss": "cispo"}, {}),
    "cispo_no_lower_bound": ({"loss": "cispo", "epsilon_low": 1.0}, {"importance_weight": 2 * ROWS}),
    "cispo_epsilon": ({"loss": "cispo"}, {"epsilon_high": EACH / 8}),
    "sapo": ({"loss": "sapo"}, {}),
    "sapo_temperature": ({"loss": "sapo", "sapo_temperature_neg": 2.0}, {}),
    "gmpo": ({"loss": "gmpo"}, {}),
    "gmpo_tight": ({"loss": "gmpo"}, {"epsilon_low": 0.02, "epsilon_high": ROWS / 20, "importance_weight": 2 * ROWS}),
    "luspo": ({"loss": "luspo"}, {}),
    "vespo": ({"loss": "vespo"}, {}),
    "vespo_weight": ({"loss": "vespo", "vespo_k_pos": 1.0}, {"importance_weight": 2 * ROWS}),
    "vespo_on_policy_weight": ({"loss": "vespo"}, {"importance_weight": 2 * ROWS, "old_logprobs": None}),
    "abs": ({"kl_estimator": "abs"}, {}),
    "unbiased": ({"kl_gradient": "unbiased"}, {}),
    "unbiased_on_policy": ({"kl_gradient": "unbiased"}, {"old_logprobs": None}),
    "unbiased_temperatures": ({"kl_gradient": "unbiased", "rescale_per_row": True, **PER_ROW}, {"temperature": EACH}),
    "unbiased_on_policy_temperatures": (
        {"kl_gradient": "unbiased", **PER_ROW},
        {"old_logprobs": None, "temperature": EACH},
    ),
    "unbiased_gmpo": ({"kl_gradient": "unbiased", "loss": "gmpo"}, {}),
    "entropy": ({"entropy_coef": 0.3}, {}),
    "entropy_no_kl": ({"entropy_coef": -0.2}, {"ref_logprobs": None}),
    "entropy_per_completion": ({}, {"entropy_coef": EACH}),
    "entropy_per_row": ({**PER_ROW}, {"entropy_coef": ROWS, "temperature": EACH}),
    "entropy_softcap": ({"entropy_coef": 0.3}, {"softcap": 3.0, "temperature": EACH}),
    "entropy_floor": ({"entropy_coef": 0.3}, {"entropy_floor": 1.5}),
    "entropy_floor_per_row": ({}, {"entropy_floor": 2 * ROWS}),
    "entropy_floor_on_policy": ({}, {"entropy_floor": 1.2, "old_logprobs": None}),
    "entropy_floor_gmpo": ({"loss": "gmpo"}, {"entropy_floor": EACH}),
    "top_entropy": ({"top_entropy_quantile": 0.5}, {}),
    "top_entropy_temperatures": ({"top_entropy_quantile": 0.4, **PER_ROW}, {"temperature": EACH}),
    "off_policy": ({"off_policy_threshold": 0.01}, {}),
    "off_policy_sampling": ({"off_policy_threshold": 0.05}, {"sampling_logprobs": -2 * ROWS, "old_logprobs": None}),
    "off_policy_vespo": ({"off_policy_threshold": 0.01, "loss": "vespo"}, {}),
    "logit_floor": ({}, {"logit_floor": 3 * ROWS - 1}),
    "logit_floor_no_kl": ({"entropy_coef": 0.3}, {"logit_floor": 3 * ROWS - 1, "ref_logprobs": None}),
    "logit_floor_temperatures": (PER_ROW, {"logit_floor": ROWS, "temperature": EACH, "softcap": 3.0}),
    "logit_floor_top_entropy": ({"top_entropy_quantile": 0.5}, {"logit_floor": 3 * ROWS - 1}),
    "seq_mean_token_sum": ({"aggregation": "seq_mean_token_sum"}, {}),
    "rewards_batch": ({"scale_rewards": "batch", "group_std": "sample"}, {**GIVEN, **REWARDS}),
    "rewards_unscaled": ({"scale_rewards": "none", "baseline": "leave_one_out"}, {**GIVEN, **REWARDS}),
    "rewards_clip": ({"advantage_clip": 0.7}, {**GIVEN, **REWARDS}),
    "rewards": ({}, {**GIVEN, **REWARDS}),
    "rewards_per_row_temperature": ({"temperature_objective": "per_row"}, {**GIVEN, **REWARDS, "temperature": EACH}),
    "rewards_valid": ({}, {**GIVEN, **REWARDS, "valid": torch.tensor([[True, True], [False, True]])}),
}


def levels_of(option: str) -> tuple[str, ...]:
    """Levels of the importance ratio that an option may be combined with."""
    loss = OPTIONS[option][0].get("loss")
    return ("token",) if loss in ("gmpo", "vespo") else ("sequence",) if loss == "luspo" else ("token", "sequence")


# ---- batches --------------------------------------------------------------------------------------------------------


def make_batch(seed: int = 0, lengths: tuple[int, ...] = LENGTHS, dtype: str = "float32", **more: Any) -> LossInputs:
    return make_inputs(seed, lengths, dtype=dtype, **more)


def rows_like(batch: LossInputs, seed: int, low: float, high: float) -> Tensor:
    """One number per row, uniform in [low, high)."""
    g = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(batch.tokens.shape, generator=g)


def equal_beta(batch: LossInputs, beta: float = 0.1) -> LossInputs:
    """One KL coefficient for all, as TRL and Liger have it."""
    batch.kl_beta = torch.full_like(batch.kl_beta, beta)
    return batch


def packed_order(batch: LossInputs, seed: int = 0, drop_masked: bool = True) -> Tensor:
    """The rows of a padded batch in a random order, as indices of the flat rows."""
    order = torch.randperm(batch.tokens.numel(), generator=torch.Generator().manual_seed(seed))
    return order[batch.mask.flatten()[order] != 0] if drop_masked else order


def packed(batch: LossInputs, seed: int = 0, drop_masked: bool = True) -> LossInputs:
    """Those rows as (T, V), with the map to their completions."""
    b, width = batch.tokens.shape
    order = packed_order(batch, seed, drop_masked)

    def flat(x: Any) -> Any:
        return x.flatten(0, 1)[order] if isinstance(x, Tensor) and x.shape[:2] == (b, width) else x

    kwargs = {k: flat(v) for k, v in batch.kwargs.items()}
    kwargs |= {"completion": order // width, "num_completions": b}
    mask = None if drop_masked else flat(batch.mask)
    return LossInputs(flat(batch.logits), flat(batch.tokens), mask, flat(batch.advantage), flat(batch.kl_beta), kwargs)


def pick_rewards(r: random.Random, b: int, group_size: int) -> dict[str, Any]:
    """Rewards of a batch in place of its advantages, with lost samples; half of the time in no order."""
    g, p = torch.Generator().manual_seed(r.randrange(1000)), b // group_size
    rewards, valid = torch.randint(0, 5, (b,), generator=g) / 4, torch.rand(b, generator=g) < 0.8
    more = {"num_constraints": torch.randint(1, 9, (p,), generator=g), **GIVEN}
    if r.random() < 0.5:
        groups = (torch.arange(b) // group_size)[torch.randperm(b, generator=g)]
        return {**more, "rewards": rewards, "valid": valid, "groups": groups}
    return {**more, "rewards": rewards.view(p, group_size), "valid": valid.view(p, group_size)}


def pick_options(seed: int) -> tuple[LossInputs, MDPGRPOConfig, dict[str, Any]]:
    """A random mixture of everything that `token_loss` takes: batch, config and further arguments."""
    r = random.Random(seed)
    batch = make_batch(
        seed, r.choice([LENGTHS, (2, 2), (1, 0, 1, 2, 1, 1)]), r.choice(["float32", "bfloat16", "float16"]),
        vocab=r.choice([7, 129, 1001]), scale=r.choice([1.0, 3.0]),
    )  # fmt: skip
    b = len(batch.tokens)

    def knob(low: float, high: float) -> Any:
        per_row = rows_like(batch, r.randrange(1000), low, high)
        return r.choice([low, torch.tensor(high), per_row[:, 0].clone(), per_row])

    optional = {
        **batch.kwargs,
        "importance_weight": rows_like(batch, seed, 0.2, 2.0),
        "temperature": knob(0.5, 1.5),
        "epsilon_low": knob(0.05, 0.3),
        "epsilon_high": knob(0.05, 0.3),
        "sampling_logprobs": rows_like(batch, seed + 1, -3.0, -1.0),
        "logit_floor": rows_like(batch, seed + 2, -1.0, 2.0),
        "entropy_coef": knob(-0.2, 0.2),
        "entropy_floor": knob(0.5, 1.5),
        "softcap": 4.0,
        "denominator": r.choice([3.0, torch.tensor(7.0), 0.25]),
    }
    batch.kwargs = {k: v for k, v in optional.items() if r.random() < 0.6}
    batch.tokens = r.choice([batch.tokens, batch.tokens.int()])
    loss = r.choice(["ppo_clip", "ppo_clip", "cispo", "sapo", "gmpo", "vespo"])
    level = "token" if loss in ("gmpo", "vespo") else r.choice(["token", "sequence"])
    config = config_for(
        num_generations=r.choice([n for n in (2, 3, 4, 6) if b % n == 0]), loss=loss, importance_level=level,
        delta=r.choice([None, 1.5]) if loss == "ppo_clip" else None, kl_gradient=r.choice(["plain", "unbiased"]),
        aggregation=r.choice(["grpo", "dapo", "dr_grpo", "bnpo", "seq_mean_token_sum"]),
        kl_estimator=r.choice(["k1", "k2", "k3", "abs"]), entropy_coef=r.choice([0.0, 0.2]),
        off_policy_threshold=r.choice([None, 0.05]), scale_rewards=r.choice(["group", "batch", "none"]),
        baseline=r.choice(["mean", "leave_one_out"]), advantage_clip=r.choice([0.0, 1.0]),
        kl_temperature=r.choice([1.0, 0.8]), prospect=r.random() < 0.7,
        temperature_objective="per_row", rescale_per_row=r.random() < 0.3, prospect_on_goal=r.random() < 0.5,
        group_std=r.choice(["population", "sample"]), goal_mean=r.choice(["half", "max_half_mean", "mean"]),
        goal_std=r.choice(["released", "binomial"]),
    )  # fmt: skip
    more = pick_rewards(r, b, config.num_generations) if r.random() < 0.5 else {}
    if loss == "ppo_clip" and r.random() < 0.4:
        batch.kwargs["delta"] = knob(1.1, 2.0)
    if loss in ("sapo", "vespo"):
        batch.kwargs = {k: v for k, v in batch.kwargs.items() if not k.startswith("epsilon")}
    if config.off_policy_threshold is None:
        batch.kwargs.pop("sampling_logprobs", None)
    if r.random() < 0.5:
        return packed(batch, seed, drop_masked=r.random() < 0.5), config, more
    batch.mask = r.choice([batch.mask, batch.mask.long(), batch.mask * 0.5, batch.mask.bfloat16()])
    return batch, config, more


# ---- compiled -------------------------------------------------------------------------------------------------------


def loss_of(backend: str, **knobs: Any) -> Callable[..., Tensor]:
    """The loss as a function of tensors alone."""
    config = config_for(**knobs)

    def loss(x: Tensor, tokens: Tensor, mask: Tensor, **more: Any) -> Tensor:
        return mdpgrpo_fast.token_loss(
            x, tokens, mask, config, max_completion_length=MAX_LENGTH, backend=backend, **more
        ).loss

    return loss


def arguments(batch: LossInputs, **more: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Those of `loss_of`, on the device; the logits are a leaf of their own."""
    logits = batch.logits.to(DEVICE, copy=True).requires_grad_()
    options = {k: to(v, DEVICE) for k, v in {**batch.given(), **more}.items() if v is not None}
    return (logits, batch.tokens.to(DEVICE), batch.mask.to(DEVICE)), options
