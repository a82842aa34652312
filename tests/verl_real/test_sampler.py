"""What stands in for vLLM in verl's runs: each row's settings hold, and its log-probs are those of the model."""

from __future__ import annotations

import pytest
import torch
from helpers.verl_sampler import processed, sample

from mdpgrpo_fast.config import TrainConfig
from mdpgrpo_fast.demo import SEED_POLICY
from mdpgrpo_fast.models.load import load

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])


def test_each_row_has_settings_of_its_own() -> None:
    settings = [
        {"temperature": 1.0, "top_p": 1.0, "top_k": -1},
        {"temperature": 0.5, "top_p": 1.0, "top_k": -1},
        {"temperature": 1.0, "top_p": 1.0, "top_k": 2},
        {"temperature": 1.0, "top_p": 0.7, "top_k": -1},  # the first has 0.59, the first two 0.81
        {"temperature": 0, "top_p": 1.0, "top_k": -1},
    ]
    got = processed(LOGITS.expand(len(settings), -1), settings).exp()
    two = torch.cat([LOGITS[:2].softmax(-1), torch.zeros(3)])
    want = [LOGITS.softmax(-1), (2 * LOGITS).softmax(-1), two, two, torch.tensor([1.0, 0, 0, 0, 0])]
    torch.testing.assert_close(got, torch.stack(want))


def test_the_log_probs_are_the_models() -> None:
    """Of prompts of several lengths, as of each alone."""
    model, tokenizer = load(None, "float32", TrainConfig.attention)
    model.eval()
    prompts = [tokenizer(text)["input_ids"] for text in ("Describe the canyon.", "Tell me about the street in a poem.")]
    settings = [{"temperature": 0.7, "top_p": 1.0, "top_k": -1}, {"temperature": 1.3, "top_p": 1.0, "top_k": -1}]
    answers = sample(model, prompts, settings, torch.Generator().manual_seed(0), most=24)
    assert {len(tokens) for tokens, _ in answers} != {0}
    for prompt, params, (tokens, logps) in zip(prompts, settings, answers, strict=True):
        assert tokens[-1] == model.config.eos_token_id or len(tokens) == 24
        assert model.config.eos_token_id not in tokens[:-1]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        want = (logits / params["temperature"]).log_softmax(-1)[range(len(tokens)), tokens]
        torch.testing.assert_close(torch.tensor(logps), want, rtol=0, atol=1e-5)


def test_a_temperature_draws_by_its_distribution() -> None:
    """4000 first tokens of one prompt, at 0.5: their shares are the model's."""
    model, tokenizer = load(str(SEED_POLICY), "float32", TrainConfig.attention)
    model.eval()
    prompt = tokenizer("Describe the canyon.")["input_ids"]
    settings = [{"temperature": 0.5, "top_p": 1.0, "top_k": -1}] * 4000
    answers = sample(model, [prompt] * 4000, settings, torch.Generator().manual_seed(0), most=1)
    with torch.no_grad():
        want = (model(torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(-1)
    got = torch.bincount(torch.tensor([tokens[0] for tokens, _ in answers]), minlength=len(want)) / 4000
    assert (got - want).abs().max().item() == pytest.approx(0, abs=0.03)
    assert want.max() < 0.9  # else the greedy answer would pass as well
