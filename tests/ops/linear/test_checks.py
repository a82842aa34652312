"""What the operations on hidden states and a head refuse, before any work."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from helpers.losses import DEVICE, config_for, gpu, no_work

from mdpgrpo_fast import linear_token_logprobs, linear_token_loss
from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.log import say_once

W = torch.zeros(37, 8)
BAD_HEADS: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"weight": torch.zeros(37, 9)}, r"weight must be of shape \(V, D\) with the D of hidden; got"),
    "one_dimension": ({"weight": torch.zeros(37)}, r"weight must be of shape \(V, D\); got shape \(37,\)"),
    "no_row": ({"weight": torch.zeros(0, 8)}, r"weight must be of shape \(V, D\)"),
    "device": ({"weight": torch.zeros(37, 8, device="meta")}, "weight must be a tensor with memory; got a meta tensor"),
    "hidden_meta": ({"hidden": torch.zeros(2, 2, 8, device="meta")}, "hidden must be a tensor with memory"),
    "quantised": ({"weight": torch.zeros(37, 8, dtype=torch.int8)}, "weight must be floating point of 16 bits or more"),
    "float8": ({"weight": torch.zeros(37, 8).to(torch.float8_e4m3fn)}, "weight must be floating point of 16 bits"),
    "dtype": ({"weight": W.bfloat16()}, "weight must be of the dtype of hidden, torch.float32, or float32; got"),
    "double": ({"hidden": torch.zeros(2, 2, 8).double()}, "weight must be float64, as hidden is; got torch.float32"),
    "bias_length": ({"bias": torch.zeros(36)}, r"bias must be of shape \(37,\), one number per row of weight"),
    "bias_dtype": ({"bias": torch.zeros(37).double()}, "bias must be"),
    "budget": ({"workspace_bytes": 147}, "workspace_bytes must be at least 148, what one row of V = 37 takes; got 147"),
    "scale": ({"logit_scale": math.inf}, "logit_scale must be a finite number; got inf"),
    "hidden_shape": ({"hidden": torch.zeros(4, 8)}, r"tokens must be of shape|hidden must be of shape \(B, L, D\)"),
    "tokens": ({"tokens": torch.full((2, 2), 37)}, r"tokens must be in \[0, 37\); got range 37 to 37"),
    "lengths": ({"lengths": [1, 2, 3]}, r"lengths must be integers of shape \(2,\)"),
    "lengths_negative": ({"lengths": [-1, 2]}, r"lengths must be 0 or above"),
    "softcap": ({"softcap": 0.0}, "softcap must be above 0, or None"),
    "temperature": ({"temperature": 0.0}, "temperature must be above 0"),
}  # fmt: skip
BAD_OBJECTIVES: dict[str, tuple[dict[str, Any], str]] = {
    "old_logprobs": ({"old_logprobs": torch.zeros(3)}, "old_logprobs must be of shape"),
    "advantage": ({"advantage": None}, "advantage must be given, or rewards; got None"),
    "both": ({"rewards": torch.zeros(1, 2), "num_constraints": torch.ones(1)}, "advantage must be left out where"),
    "denominator": ({"denominator": torch.ones(2)}, "denominator must be a number or a scalar tensor"),
    "backend": ({"backend": "tritn"}, "unknown backend 'tritn'; did you mean 'triton'?"),
}  # fmt: skip


def good(**more: Any) -> dict[str, Any]:
    return {
        "hidden": torch.zeros(2, 2, 8), "weight": W, "tokens": torch.zeros(2, 2, dtype=torch.long), "mask": None, **more
    }  # fmt: skip


def test_bad_input_is_refused_before_any_work() -> None:
    for wrong, message in (*BAD_HEADS.values(), *BAD_OBJECTIVES.values()):
        given = {**good(config=config_for(), advantage=1.0, kl_beta=0.1), **wrong}
        with pytest.raises(ValueError, match=message), no_work():
            linear_token_loss(**given)
    for wrong, message in BAD_HEADS.values():
        with pytest.raises(ValueError, match=message), no_work():
            linear_token_logprobs(**{**good(), **wrong})


def test_wrapped_weights_are_refused_and_not_read_as_numbers() -> None:
    class Quantised(torch.Tensor):
        pass

    with pytest.raises(ValueError, match=r"weight must be a plain tensor \(quantised weights: dequantise them first\)"):
        linear_token_logprobs(**good(weight=W.as_subclass(Quantised)))


def test_corrected_wants_its_weight() -> None:
    with pytest.raises(ConfigError, match="importance_weight is required"):
        linear_token_loss(**good(config=config_for(temperature_objective="corrected"), advantage=1.0, kl_beta=0.1))


@gpu
def test_devices_that_differ() -> None:
    with pytest.raises(ValueError, match="weight must be on cpu, as hidden are; got device cuda:0"):
        linear_token_logprobs(**good(weight=W.cuda()))


def test_an_explicit_backend_that_cannot_run_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    say_once.cache_clear()
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="backend 'triton' cannot run: the tensors are on the CPU"):
            linear_token_logprobs(**good(), backend="triton")
    with caplog.at_level(logging.INFO, "mdpgrpo_fast"):
        linear_token_logprobs(**good())
    assert "backend cpu: the tensors are torch.float32 on cpu" in caplog.text or DEVICE == "cuda"
