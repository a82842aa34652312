"""Sampling and weight sync, the same in both modes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.vllm import ARGS, EOS, GENERATE, PROMPTS, TAUS, FusedModel, Worker, weights
from torch import Tensor, nn

from mdpgrpo_fast.models.load import load
from mdpgrpo_fast.models.policy import Policy
from mdpgrpo_fast.rollout.generate import generate
from mdpgrpo_fast.rollout.vllm import sampler
from mdpgrpo_fast.rollout.vllm.completion import RolloutError
from mdpgrpo_fast.rollout.vllm.local import VLLMEngine
from mdpgrpo_fast.rollout.vllm.sampler import with_policy_logprobs


def test_a_rollout_has_the_rows_in_order_with_what_was_drawn(engine: Any) -> None:
    r = engine.generate(PROMPTS, **ARGS)
    assert r.prompt_ids.tolist() == [[5, 6, 7]] * 2 + [[1, 1, 8]] * 2 + [[1, 9, 10]] * 2
    assert r.prompt_mask.sum(1).tolist() == [3, 3, 1, 1, 2, 2]
    # The sums of the prompts are 18, 8 and 19: 4 tokens each at most, the last prompt's being cut at the limit too.
    assert r.lengths.tolist() == [4] * 6 and not r.finished.any()
    r = engine.generate(PROMPTS, **{**ARGS, "max_new_tokens": 5})
    assert r.lengths.tolist() == [4, 4, 4, 4, 5, 5] and r.finished.tolist() == [True] * 4 + [False] * 2
    assert r.tokens.shape == (6, 5) and r.tokens.dtype == torch.int64
    assert r.tokens[2].tolist() == [28, 29, 30, EOS[-1], EOS[0]]
    assert torch.equal(r.temperature, torch.tensor(TAUS))
    expected = -torch.tensor(TAUS)[:, None] - torch.arange(5) / 8
    assert torch.equal(r.sampling_logprobs, expected.masked_fill(~r.mask, 0))
    assert r.policy_logprobs.shape == (6, 5) and r.policy_logprobs.isnan().all()
    assert not r.log_kept.any(), "nothing is cut"
    cut = engine.generate(PROMPTS, **ARGS, top_p=0.9)
    assert torch.equal(cut.log_kept.isnan(), cut.mask), "vLLM does not tell"
    assert engine.logprobs_mode == "processed_logprobs"


def sent_settings(engine: Any) -> list[dict[str, Any]]:
    """The settings of each row of the last generate()."""
    if isinstance(engine, VLLMEngine):
        return [vars(p) for p in next(args[1] for name, args, _ in reversed(engine.fake.log) if name == "generate")]
    return [body["sampling_params"] for _, path, body in engine.fake.log if path == GENERATE]


def test_sampling_settings_of_a_row(engine: Any) -> None:
    engine.generate(PROMPTS[:1], temperature=[0.7], eos=EOS, max_new_tokens=3, top_k=5, top_p=0.9, min_p=0.1)
    (row,) = sent_settings(engine)
    want = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "max_tokens": 3, "logprobs": 0, "seed": None}
    # What the model's own files ask for must not come in.
    want |= {"stop_token_ids": EOS, "ignore_eos": True, "repetition_penalty": 1.0}
    want |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert {k: row[k] for k in want} == want


def test_greedy_has_temperature_zero_and_no_truncation(engine: Any) -> None:
    r = engine.generate(PROMPTS[:1], temperature=None, eos=EOS, max_new_tokens=3, top_k=5, top_p=0.9, min_p=0.1, seed=3)
    (row,) = sent_settings(engine)
    assert [row[k] for k in ("temperature", "top_k", "top_p", "min_p", "seed")] == [0.0, 0, 1.0, 0.0, None]
    assert r.temperature.tolist() == [0.0]


def test_a_seed_gives_each_row_its_own_and_the_same_again(engine: Any) -> None:
    seen = []
    for seed in (3, 3, 4):
        engine.generate(PROMPTS, **ARGS, seed=seed)
        seen.append(sorted(row["seed"] for row in sent_settings(engine)[-6:]))
    assert seen[0] == seen[1] and len(set(seen[0] + seen[2])) == 12
    assert all(0 <= s < 2**63 for s in seen[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": TAUS[:5]}, "for each of the 6 rows; got"),
        ({"temperature": [*TAUS[:5], 0.009]}, "at least 0.01"),
        ({"temperature": [*TAUS[:5], math.nan]}, "at least 0.01"),
        ({"prompts": [[1], []]}, "an empty row 1"),
        ({"prompts": []}, "no row"),
    ],
)
def test_bad_arguments_of_generate(engine: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as e:
        engine.generate(**{"prompts": PROMPTS, **ARGS, **change})
    assert "\n" not in str(e.value)


def test_after_a_sync_the_sampler_holds_the_weights(engine: Any) -> None:
    for version in (0, 1):
        named = weights(version)
        engine.sync(named.items(), version)
        held = engine.fake.workers[0].model.held
        qkv = torch.cat([named[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"])
        assert torch.equal(held["model.layers.0.self_attn.qkv_proj.weight"], qkv.bfloat16())
        assert torch.equal(held["model.embed_tokens.weight"][:5], named["model.embed_tokens.weight"].bfloat16())
        assert engine.version == version and engine.fake.label == engine.label == f"{engine.run_id}-{version}"
        assert engine.fake.workers[0].reloads == 0, "each reload that is begun is ended"
    assert engine.generate(PROMPTS, **ARGS).tokens.shape == (6, 4)


@pytest.mark.parametrize("part", ["k_proj", "norm", "embed_tokens"])
def test_a_weight_that_did_not_arrive_is_named(engine: Any, part: str) -> None:
    engine.sync(weights(0).items(), 0)
    engine.fake.workers[0].model.skip = part
    held = "qkv_proj" if part == "k_proj" else part
    with pytest.raises(RolloutError, match=rf"version 1: checksum of 'model\.[\w.]*{held}\.weight' must be") as e:
        engine.sync(weights(1).items(), 1)
    assert "\n" not in str(e.value)
    # The old version's name must not stand for a mixture.
    assert engine.version is None and engine.fake.label == "none"
    with pytest.raises(RolloutError, match=r"does not hold the weights of the last sync\(\)"):
        engine.generate(PROMPTS, **ARGS)


def test_weights_left_out_or_unknown_are_named(engine: Any) -> None:
    named = weights()
    without = {k: v for k, v in named.items() if "norm" not in k}
    with pytest.raises(RolloutError, match=r"holds 'model.norm.weight', and 1 in all, that no weights were sent for"):
        engine.sync(without.items(), 0)
    without = {k: v for k, v in named.items() if "k_proj" not in k}
    with pytest.raises(RolloutError, match="qkv_proj"):
        engine.sync(without.items(), 0)
    with pytest.raises(RolloutError, match=r"holds no parameter for 'visual\.weight'"):
        engine.sync([*named.items(), ("visual.weight", torch.ones(1))], 0)
    assert engine.version is None


def test_a_second_name_of_tied_weights_is_passed_over(engine: Any) -> None:
    named = weights()
    engine.sync([*named.items(), ("lm_head.weight", named["model.embed_tokens.weight"])], 0)
    assert engine.version == 0
    with pytest.raises(RolloutError, match=r"holds no parameter for 'lm_head\.weight'"):
        engine.sync([*named.items(), ("lm_head.weight", named["model.embed_tokens.weight"] + 1)], 0)


def test_merged_weights_may_be_taken_back_when_the_iterator_ends(engine: Any) -> None:
    """What a LoRA merge in place does."""

    def merged() -> Iterator[tuple[str, Tensor]]:
        named = {k: v.bfloat16() for k, v in weights().items()}
        yield from named.items()
        for tensor in named.values():
            tensor.zero_()

    engine.sync(merged(), 0)
    assert engine.fake.workers[0].model.held["model.norm.weight"].abs().sum() > 0


def test_weights_go_in_batches_of_bounded_size(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "SYNC_BYTES", 40)
    engine.sync(weights().items(), 0)
    # 48 bytes of q; 16 of k, 16 of v and 40 of the embedding; the norm's 8.
    assert engine.fake.workers[0].model.loads == 3


def test_shards_and_replicas_of_several_workers_are_checked(engine: Any) -> None:
    class Shard(FusedModel):
        """Half of the embedding's columns; all of the others."""

        def __init__(self, rank: int) -> None:
            super().__init__()
            self.columns = slice(2 * rank, 2 * rank + 2)
            self.held["model.embed_tokens.weight"] = nn.Parameter(torch.zeros(8, 2).bfloat16(), requires_grad=False)

        def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
            super().load_weights([(n, t[:, self.columns] if "embed" in n else t) for n, t in weights])

    engine.fake.workers = [Worker(Shard(0)), Worker(Shard(1))]
    engine.sync(weights(0).items(), 0)
    assert engine.version == 0
    engine.fake.workers[1].model.skip = "norm"
    with pytest.raises(RolloutError, match=r"'model\.norm\.weight'"):
        engine.sync(weights(1).items(), 1)


def test_a_prefix_cache_of_old_weights_is_an_error(engine: Any) -> None:
    engine.fake.reset = False
    with pytest.raises(RolloutError, match="prefix cache"):
        engine.sync(weights().items(), 0)
    assert engine.version is None


def test_policy_logprobs_come_from_the_trainers_model(model_dirs: dict[str, str]) -> None:
    model, _ = load(model_dirs["llama"], "float32")
    torch.manual_seed(0)
    taus = [0.5, 1.0, 1.5]
    r = generate(model, [[40, 41, 42], [50], [60, 61]], temperature=taus, eos=[1], max_new_tokens=6)
    blank = replace(r, policy_logprobs=torch.full_like(r.policy_logprobs, torch.nan))
    filled = with_policy_logprobs(blank, Policy(model), micro_batch_size=2, backend="torch")
    assert torch.allclose(filled.policy_logprobs[r.mask], r.policy_logprobs[r.mask], atol=2e-5)
    assert filled.sampling_logprobs is r.sampling_logprobs
