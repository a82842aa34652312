"""Planted faults: each is one expression of a copy of the package gone wrong, which the tests named beside it must see.

    python tests/faults.py [WORD ...] [--jobs N]

runs those whose path, text or tests hold one of the words, by default all. Exits 1 where a fault escapes, where its
text is not found exactly once, or where its tests fail without it.
"""

from __future__ import annotations

import argparse
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("docs", "mdpgrpo_fast", "csrc", "tests", "benchmarks", "examples", "pyproject.toml", "setup.py", "README.md")
LIMIT = 900  # seconds of one run of pytest
PASSED, FAILED, INTERRUPTED = 0, 1, 2  # exit codes of pytest; what ends otherwise has not been tested


class Fault(NamedTuple):
    path: str  # from the root of the repository
    old: str
    new: str
    tests: str  # arguments of pytest


OPS, LINEAR, TRITON = "mdpgrpo_fast/ops/", "mdpgrpo_fast/ops/linear/", "mdpgrpo_fast/kernels/triton/"


def reference(old: str, new: str, tests: str) -> Fault:
    files = "tests/test_reference.py tests/test_reference_advantages.py tests/test_reference_losses.py"
    return Fault("mdpgrpo_fast/reference/", old, new, f"{files} -k '{tests}'")


def op(path: str, old: str, new: str, tests: str) -> Fault:
    return Fault(path, old, new, f"tests/ops --ignore tests/ops/linear -k '{tests}'")


def linear(path: str, old: str, new: str, tests: str) -> Fault:
    return Fault(path, old, new, f"tests/ops/linear -k '{tests}'")


def training(old: str, new: str, tests: str) -> Fault:
    return Fault("mdpgrpo_fast/training/", old, new, f"tests/training -k '{tests}'")


def rollout(old: str, new: str, tests: str) -> Fault:
    return Fault("mdpgrpo_fast/rollout/", old, new, f"tests/rollout -k '{tests}'")


def rewards(old: str, new: str, tests: str) -> Fault:
    return Fault("mdpgrpo_fast/rewards/", old, new, f"tests/rewards -k '{tests}'")


def prompts(old: str, new: str, tests: str) -> Fault:
    return Fault("mdpgrpo_fast/data/", old, new, f"tests/prompts -k '{tests}'")


def report(old: str, new: str, tests: str) -> Fault:
    return Fault("mdpgrpo_fast/report/", old, new, f"tests/report -k '{tests}'")


def liger(old: str, new: str, tests: str) -> Fault:
    files = "tests/integrations/test_liger_signature.py"
    return Fault("mdpgrpo_fast/integrations/liger.py", old, new, f"{files} -k '{tests}'")


def verifiers(old: str, new: str, tests: str) -> Fault:
    return Fault("mdpgrpo_fast/verifiers/", old, new, f"tests/verifiers -k '{tests}'")


def evaluation(old: str, new: str, tests: str) -> Fault:
    return Fault("mdpgrpo_fast/evaluation/", old, new, f"tests/evaluation -k '{tests}'")


def in_trl(name: str, old: str, new: str, tests: str, file: str = "test_trl_fused.py") -> Fault:
    return Fault(f"mdpgrpo_fast/integrations/trl/{name}.py", old, new, f"tests/integrations/{file} -k '{tests}'")


def method_in_trl(name: str, old: str, new: str, tests: str) -> Fault:
    return in_trl(name, old, new, tests, "test_trl_trainer.py")


def hooks(old: str, new: str, tests: str) -> Fault:
    return Fault("docs/other_trainers.md", old, new, f"tests/integrations/test_hooks.py -k '{tests}'")


FAULTS = [
    # The reference: advantages.
    reference('n if group_std == "population" else n - 1', "n", "population_and_sample"),
    reference("4 * torch.finfo(rewards.dtype)", "0 * torch.finfo(rewards.dtype)", "equal_but_for_rounding"),
    reference('rewards.shape[1] if goal_std == "released" else 1', "1", "golden_groups"),
    reference("gain * t, loss * t", "loss * t, gain * t", "follow_the_equations"),
    reference("masked_fill(advantage < 0, beta_neg)", "masked_fill(advantage <= 0, beta_neg)", "constant_group_has_z"),
    reference("((kept - mean[:, None]) * valid)", "(kept - mean[:, None])", "invalid_samples"),
    reference("n = count.to(z.dtype)", "n = count.float()", "follow_their_definitions"),
    reference("n / (n - 1).clamp(min=1)", "1.0 * (n > 0)", "follow_their_definitions"),
    reference("return torch.where(constant[:, None], 0, z)", "return z", "all_constant"),
    reference('        elif config.scale_rewards == "none":', "        elif False:", "follow_their_definitions"),
    reference("torch.where((std == 0) | constant, 0, (sums", "torch.where(constant, 0, (sums", "all_constant"),
    reference("torch.where((std == 0) | constant, 0, (sums", "torch.where(std == 0, 0, (sums", "beside_others"),
    reference("weights[k] * z.masked_fill(~own, 0)", "z.masked_fill(~own, 0)", "by_loops"),
    reference("own = valid & ~parts[..., k].isnan()", "own = valid", "by_loops"),
    reference("    if config.advantage_clip:", "    if False:", "clipped_last"),
    # The reference: objective.
    reference("(ratio > high_bound)", "(ratio >= high_bound)", "ties"),
    reference("free = ratio.clamp(max=cap)", "free = ratio", "above_delta"),
    reference("cap.masked_fill(cap <= 0, torch.inf)", "cap", "follow_the_equations"),
    reference("d = d.clamp(max=KL_EXPONENT_MAX)", "d = d", "k3_overflow"),
    reference("per_token + kl_beta * kl", "per_token - kl_beta * kl", "kl_estimators"),
    reference(
        "per_token = per_token + kl_beta * kl",
        "per_token = per_token + kl_beta * kl * (1 if importance_weight is None else importance_weight)",
        "policy_term_only",
    ),
    reference("self.sum(x) / self.sum(mask).clamp(min=1)", "self.sum(x)", "follow_the_equations"),
    reference("completions = (lengths > 0).sum()", "completions = (lengths >= 0).sum()", "out_of_the_normaliser"),
    reference("p * x.masked_fill(p == 0, 0)", "p * x", "minus_infinite"),
    reference("logits = logits.masked_fill(~keep[..., None], 0)", "logits = logits", "masked_positions"),
    reference("exponent.clamp(max=RATIO_EXPONENT_MAX).exp()", "exponent.exp()", "beyond_float_range"),
    reference("config.kl_temperature, softcap)[0]", "temperature, softcap)[0]", "kl_estimators"),
    reference("factor = factor * temperature", "factor = factor", "rescale"),
    reference("kl = kl * kl_ratio", "kl = kl * kl_ratio.detach()", "the_gradient_of_the_kl"),
    reference('"abs": d.abs()', '"abs": -d.abs()', "absolute_kl"),
    reference("return ratio.detach().clamp(*_bounds", "return ratio.clamp(*_bounds", "cispo"),
    reference("(ratio - 1)) * 4 / tau", "(ratio - 1)) * 4", "sapo"),
    reference("_by_sign(positive, config.sapo_temperature_pos, config.sapo_temperature_neg, like)",
              "torch.where(positive, config.sapo_temperature_pos, config.sapo_temperature_neg).to(like.dtype)", "sapo"),
    reference("(log_ratio > high) & (advantage > 0)", "(log_ratio > high)", "gmpo"),
    reference("(log_ratio < -low) & (advantage < 0)", "(log_ratio < -low)", "gmpo"),
    reference("ratio = losses.bounded_exp(layout.mean(bounded.masked_fill(~keep, 0), mask))",
              "ratio = losses.bounded_exp(bounded)", "gmpo"),
    reference("log_ratio = log_ratio.detach().clamp(-VESPO_LOG_MAX, VESPO_LOG_MAX)",
              "log_ratio = log_ratio.clamp(-VESPO_LOG_MAX, VESPO_LOG_MAX)", "vespo"),
    reference("config) * advantage * logprobs, None", "config) * advantage * logprobs, weight", "vespo"),
    reference("(rate + k * log_weight - rate * log_weight.exp()).exp()",
              "(k * log_weight - rate * log_weight.exp()).exp()", "vespo"),
    reference("entropy_coef * (gate * entropy)", "entropy_coef * gate * entropy", "entropy_floor_is"),
    reference("factor = factor * gate\n", "factor = factor\n", "entropy_floor_is"),
    reference("device=gap.device) < 0) & (drift > threshold)", "device=gap.device) < 2) & (drift > threshold)",
              "off_policy_mask"),
    reference("(1 - share) * (n - 1)", "(1 - share) * n", "a_quantile"),
    # Advantages at the public door.
    op("mdpgrpo_fast/ops/", "out = dataclasses.replace(out, delta=torch.zeros_like(out.delta))", "pass",
       "left_out_without_a_goal and torch"),
    op("mdpgrpo_fast/ops/", "return fused.scalar(given, rewards.device, rewards.dtype)", "pass",
       "deviation_of_more and torch"),
    op("mdpgrpo_fast/ops/", "single = torch.empty_like(single).index_copy_(0, groups.slots, single)", "pass",
       "by_a_map and torch"),
    op("mdpgrpo_fast/ops/", "valid = valid & known if valid.dtype == torch.bool else valid", "pass",
       "by_a_map and torch"),
    # Triton's kernels.
    op(TRITON + "rows.py", "x = tl.where(inside, x, NEG_INF)",
       "x = x", "vocabularies and 4097 and triton"),
    op(TRITON + "rows.py", "(moment + gap * total) * shrink + tl.sum(", "moment * shrink + tl.sum(",
       "vocabularies and 32001 and triton"),
    op(TRITON + "rows.py", "g *= slope", "g *= 1.0", "every_option and softcap and triton"),
    op(TRITON + "rows.py", "(token >= 0) & (token < tile.vocab)", "(token >= 0)", "unseen_bad and triton"),
    op(TRITON + "rows.py", "tl.where(tau > 0, tau, float(\"nan\"))", "tl.where(tau > 0, tau, 1.0)",
       "unseen_bad and triton"),
    op(TRITON, "tl.where(clipped < free, tl.where(inside == ratio, advantage, 0.0), free_slope)",
       "tl.where(clipped <= free, 0.0, free_slope)", "ties and triton"),
    op(TRITON, "tl.where(over, 0.0, 1.0 - e)", "1.0 - e", "k3_beyond and triton"),
    op(TRITON, "share /= tl.load(lengths_ptr + completion, mask=mask, other=1.0)", "share /= 1.0",
       "aggregations and triton"),
    op(TRITON, "top - bottom <= 4.0 * unit", "top - bottom <= 0.0 * unit", "equal_but_for_rounding and triton"),
    op(TRITON, "tl.where(ratio > cap, 0.0, advantage)", "advantage", "above_delta and triton"),
    op(TRITON, "_knob(rows.delta, is_per_row.delta,", "_knob(rows.delta, False,", "delta_of and per_row and triton"),
    op(TRITON, 'tl.where(delta <= 0.0, float("inf"), delta)', "delta", "delta_of and triton"),
    op(TRITON, "total * slope / tl.maximum(length, 1.0)", "total * slope", "couples and triton"),
    op(TRITON, "tl.max(ratio_max, axis=0)", "tl.sum(ratio_max, axis=0)", "plain and triton"),
    op(TRITON, "_rewards(groups, place, place >= 0)", "_rewards(groups, prompt * G, place >= 0)", "rewards and triton"),
    op(f"{TRITON}token_loss.py", "row = tl.cast(index, tl.int64)\n        logits", "row = index\n        logits",
       "beyond_int32 and triton"),
    op(TRITON, "if scale != 1.0:", "if scale == 1.0:", "loss_scale and triton"),
    op(TRITON, "c_kl, b, LOG2E / tau", "c_kl, b, LOG2E", "test_logprobs and every_option and triton"),
    op(TRITON, "token - before, token - before + tile.vocab)", "token - before, token - before)", "off_16_bytes"),
    op(TRITON, "offsets, offsets - tile.vocab)", "offsets, offsets)", "off_16_bytes"),
    op(TRITON, " and vocab % tile.block >= width", "", "which_rows_are_written"),
    op(TRITON, "-weight * direct * advantage", "-direct * advantage", "cispo and triton"),
    op(TRITON, "4.0 * e * share * share", "4.0 * e * share", "sapo and triton"),
    op(TRITON, "tl.where(clipped_low | clipped_high, 0.0, -coupled_slope)", "-coupled_slope", "gmpo and triton"),
    op(TRITON, "tl.where(low != low, low, tl.where(high != high, high, log_ratio))", "log_ratio",
       "bound_that and triton"),
    op(TRITON, "rate * tl.exp(log_weight)", "rate * log_weight", "vespo and triton"),
    op(TRITON, "tl.where(advantage < 0, drift, threshold) > threshold", "drift > threshold", "off_policy and triton"),
    op(TRITON, "c += beta * kl * ratio_slope", "c += 0.0", "unbiased and triton"),
    op(TRITON, "loss -= bonus * entropy", "loss += bonus * entropy", "entropy and triton"),
    op(TRITON, "tl.where(entropy < floor, 0.0, 1.0)", "1.0", "entropy_floor and triton"),
    linear(TRITON, "if not settings.two_temperatures:", "if settings.two_temperatures:", "every_option and triton"),
    # The compiled kernels of the CPU.
    op("csrc/method.h", "take = clipped < free", "take = inside != ratio", "mixtures and cpu"),
    op("csrc/method.h", "is_nan(low) || is_nan(high) || is_nan(delta)", "is_nan(low + high)", "no_clip and cpu"),
    op("csrc/method.h", "rows.delta.at(c, row)", "rows.delta.at(c, c)", "delta_of and per_row and cpu"),
    op("csrc/method.h", "delta > R(0) && ratio > delta", "ratio > delta", "delta_of and cpu"),
    op("csrc/method.h", "(denominator < R(1) ? R(1) : denominator)", "denominator", "aggregations and cpu"),
    op("csrc/method.h", "over ? R(0) : R(1) - e", "R(1) - e", "k3_beyond and cpu"),
    op("csrc/cpu/rows.inl", "if (CAP) g *= Float32::load(kept_slope + start + i);", "",
       "vocabularies and 4097 and cpu"),
    Fault("csrc/cuda/token_loss.cuh", "hw::sync_block();\n    if (hw::thread() == 0) request",
          "if (hw::thread() == 0) request", "tests/kernels/test_cuda.py -k 'every_option and plain'"),
    Fault("csrc/cuda/token_loss.cuh", "hw::wait_for_cluster(&block.exchanged[slot], visit / 2 % 2);\n  Exchange all",
          "Exchange all", "tests/kernels/test_cuda.py -k 'every_option and plain'"),
    op("csrc/method.h", "out.c -= weight * j.direct", "out.c -= j.direct", "cispo and cpu"),
    op("csrc/method.h", "R(4) * s * (R(1) - s) * advantage", "R(4) * s * advantage", "sapo and cpu"),
    op("csrc/method.h", "settings.loss == GMPO && (j.low || j.high) ? R(0) : -coupled.slope", "-coupled.slope",
       "gmpo and cpu"),
    op("csrc/method.h", "rate * exp(log_weight)", "rate * log_weight", "vespo and cpu"),
    op("csrc/method.h", "rows.advantage.at(c, row) < R(0) && drift > settings.off", "drift > settings.off",
       "off_policy and cpu"),
    op("csrc/method.h", "if (settings.unbiased_kl) out.c += beta * kl.value * ratio.slope;", "", "unbiased and cpu"),
    op("csrc/method.h", "out.loss -= out.bonus * entropy", "out.loss += out.bonus * entropy", "entropy and cpu"),
    op("csrc/method.h", "return !(floor > R(0) && entropy < floor)", "return true", "entropy_floor and cpu"),
    op("csrc/cpu/rows.inl", "moment + old * total", "moment", "vocabularies and 32001 and cpu"),
    op("csrc/cpu/rows.inl", "peaks[b] - s.peak", "0", "vocabularies and 32001 and cpu"),
    op("csrc/cpu/objective.h", "n == 0 || top - bottom <= 4 * unit", "n == 0 || top == bottom",
       "equal_but_for_rounding and cpu"),
    op("csrc/cpu/objective.h", "slope[c] = whole.slope / n;", "slope[c] = whole.slope;",
       "couples and cpu"),
    # The public functions: checks, in place, autograd, groups, the choice of a backend.
    op(OPS, "low < 0 or high >= end", "low < 0 or high > end", "refuse"),
    op(OPS, "if stride < extent:", "if False:", "in_place_is_refused"),
    op(OPS, "if any(rows.meets(x) for x in known.rows):", "if False:", "overwritten_logits"),
    op(OPS, 'name == "temperature" and not bool((x > 0).all())', "False", "refuse"),
    op(OPS, 'name == "delta" and bool((x < 0).any())', "False", "refuse"),
    op(OPS, "torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()",
       "torch.compiler.is_compiling()",
       "backward_twice and cpu"),
    op(OPS, "torch.autograd.graph.increment_version(logits)", "pass", "another_consumer and cpu"),
    op(OPS, "scatter_(0, order,", "scatter_(0, torch.arange(len(order)),",
       "neighbours or rewards_are"),
    op(OPS, 'if backend != "auto":', "if False:", "cannot_run or bad_settings"),
    # From hidden states: rows, chunks, heads over several processes.
    linear(LINEAR, "(rows.advantage == 0) & (rows.kl_beta == 0)", "(rows.advantage == 0)", "idle_rows and torch"),
    linear(LINEAR, "((given != 0) & (given != counts)).any() | ", "", "lengths_that_are_not and torch"),
    linear(LINEAR, "max(extents, default=0) > chunk", "False", "plans or no_matmul_more"),
    linear(LINEAR, "beta = 0 if first else 1", "beta = 0", "gradcheck"),
    linear(LINEAR, "return h if mask is None else h.masked_fill(~mask[start:stop, None], 0)", "return h",
           "lengths_known and torch"),
    linear(LINEAR, "Chunking(max_rows // CPU_TILE * CPU_TILE, CPU_TILE)", "Chunking(max_rows, 1)",
           "company or tiles"),
    linear("mdpgrpo_fast/kernels/schemas.py", "torch.float32 if dtype == torch.float16 else dtype", "dtype",
           "small_float16"),
    linear(LINEAR, "alike = alike and rows.importance_weight is None and", "alike = alike and",
           "as_many_rows"),
    linear(LINEAR, "skip_idle and not quantile and not settings.has_bonus(rows)", "skip_idle", "idle_rows and torch"),
    linear(LINEAR, "once = once and (len(chunks) == 1 or not quantile)", "once = once", "top_entropy and torch"),
    linear(LINEAR, "p.exp_().mul_(scaled - factor)", "p.exp_().mul_(scaled + factor)", "entropy and torch"),
    linear(LINEAR, "flat.mul_(weights[:, None])", "flat.mul_(1)", "unit_gradient_waits"),
    linear(LINEAR, "return gradient / ctx.ranks, None", "return gradient, None", "fsdp2"),
    linear(LINEAR, "(peaks - peak) / temperature", "(peaks - peak)", "split_vocabulary"),
    linear(LINEAR, "(each[:, 5].sum(0) == 1) & even", "even", "split_vocabulary or uneven"),
    # Training.
    training("scale: float = acc.num_processes", "scale: float = 1", "same_steps and ddp-2"),
    training("if update == 0:", "if False:", "later_updates"),
    training("(rollout.finished | (not method.mask_truncated))", "True", "truncated_completions"),
    training('method.temperature_objective == "per_row" else 1.0', "False else 1.0",
             "temperature_objectives or recorded_and_trained"),
    training("tokens = batch.mask.sum(1)\n        if groups", "tokens = batch.rollout.mask.sum(1)\n        if groups",
             "normaliser_is_of"),
    training("1 / max(1, sum(m.counted > 0 for m in part))", "1", "normaliser_is_of"),
    training("sum(m.counted > 0 for m in part)", "len(part)", "normaliser_is_of"),
    training("return rollout.policy_logprobs - rollout.sampling_logprobs",
             "return rollout.sampling_logprobs - rollout.policy_logprobs", "corrected_weighs"),
    training("self.old_logprobs(parts[1:], old, passes)", "pass", "later_parts"),
    training("is_first = update == 0 and i == 0", "is_first = update == 0", "later_parts"),
    training("tokens = tokens.view(-1, g)[upload(torch.tensor(groups), tokens.device)].flatten()", "pass",
             "divided_by_its_own"),
    training("ours.lerp_(theirs, self.run.reference_mix)", "ours.copy_(theirs)", "follows_the_policy"),
    training('        parts |= {"reference": self.reference} if self.reference.moves else {}', "        pass",
             "went_through"),
    training('        parts |= {"entropy": self.updates.entropy} if self.updates.entropy.adapts else {}',
             "        pass", "went_through"),
    training("if target is None or self.last <= target else 0.0", "if True else 0.0", "coefficient_follows"),
    training("self.method.kl_beta_pos * batch.kl.sum(1)", "batch.kl.sum(1)", "taken_off_the_reward"),
    training("m.put(found, policy)", "policy = batch.rollout.policy_logprobs", "no_kl_to_take_off"),
    training("method.samples_as_trained and self.run.repetition_penalty == 1", "True", "measures_drift"),
    training("(layout.sum((keep & ~kept).long()) > 0).sum()", "(keep & ~kept).sum()", "left_out_is_logged"),
    training("rollout.log_kept.nan_to_num(0.0)", "0.0", "truncation_kept"),
    training("gap = gap.sum(1, keepdim=True).expand_as(gap)", "pass", "weights_are_trls"),
    training("return weight.masked_fill(outside, 0), outside", "return weight, outside", "weights_are_trls"),
    training("both = accelerator.gather(", "both = (", "of_all_ranks or over_all_ranks"),
    training("self.engine is not None and same:", "same:", "measures_drift"),
    # Rollout.
    rollout("device=self.lengths.device) < self.lengths[:, None]",
            "device=self.lengths.device) <= self.lengths[:, None]", "lengths_and_ends"),
    rollout("(self.mask.cumsum(1) - 1)", "self.mask.cumsum(1)", "padding_changes_nothing"),
    rollout("(self.tokens[:, :num_steps, None] == eos).any(2)", "self.tokens[:, :num_steps] == eos[0]",
            "lengths_and_ends"),
    rollout("sampling = logprobs(logits, tokens, temperature)", "sampling = logprobs(logits, tokens, 1.0)",
            "test_logprobs"),
    Fault(TRITON, "tl.join(tl.join(a, c), tl.join(b, d)), (tile", "tl.join(tl.join(a, a), tl.join(a, a)), (tile",
          "tests/rollout/test_sampling.py -k kernel_frequencies"),
    Fault("csrc/cpu/sample.cpp", " && sweep.at(row, i).z == r.statistics.peak", "",
          "tests/rollout/test_sampling.py -k test_greedy"),
    Fault("csrc/cpu/sample.cpp", "|| at(left) < least", "",
          "tests/rollout/test_sampling.py -k 'truncated_frequencies and cpu'"),
    Fault("csrc/cpu/sample.cpp", "found = i, before = running", "found = i",
          "tests/rollout/test_sampling.py -k cumulative_sum"),
    Fault("mdpgrpo_fast/models/", "max(2, *(b - a for a, b in itertools", "max(1, *(b - a for a, b in itertools",
          "tests/models/test_packing.py -k gpus_calls"),
    Fault("mdpgrpo_fast/models/", 'return None if self.attention == FLASH_ATTN else "masks"', 'return "masks"',
          "tests/models/test_packing.py -k takes_no_masks"),
    Fault("mdpgrpo_fast/models/adapters.py", "            module.reshard()", "            pass",
          "tests/models/test_lora.py -k two_ranks"),
    Fault("mdpgrpo_fast/models/adapters.py", "            p.copy_(values[name])", "            p.mul_(1)",
          "tests/models/test_adapters.py -k began_with"),
    Fault("mdpgrpo_fast/models/adapters.py", "        _set(model, own)\n", "        pass\n",
          "tests/models/test_adapters.py -k began_with"),
    Fault("mdpgrpo_fast/models/adapters.py", "    fits = 2 * len(layers) == len(stored) and not", "    fits = not",
          "tests/models/test_adapters.py -k another_kind"),
    Fault("mdpgrpo_fast/models/adapters.py", "            config.tie_word_embeddings = False", "            pass",
          "tests/models/test_adapters.py -k merged_or_trained"),
    Fault("mdpgrpo_fast/models/load.py", "(source, trust_remote_code=trust_remote_code)", "(source)",
          "tests/models/test_load.py -k says_why"),
    Fault("mdpgrpo_fast/models/load.py", "causal_lm(model).get_submodule(name).requires_grad_(False)", "pass",
          "tests/models/test_load.py -k loaded_whole"),
    Fault("mdpgrpo_fast/models/load.py", "    _check_weights(model, info, where, allow_random)\n", "",
          "tests/models/test_load.py -k says_why"),
    Fault("mdpgrpo_fast/models/load.py", "model.name_or_path = _absolute(adapter)", "pass",
          "tests/models/test_adapters.py -k over_an_adapter"),
    Fault("mdpgrpo_fast/models/lora.py", "type(m).forward in plain and", "isinstance(m, (nn.Linear, Conv1D)) and",
          "tests/models/test_load.py -k llama4"),
    Fault("mdpgrpo_fast/models/lora.py", 'exclude_modules=rf"({outside})\\..*" if outside else None,', "",
          "tests/models/test_load.py -k survive"),
    Fault("mdpgrpo_fast/training/checkpoint/manifest.py", "if size != wanted", "if False and size != wanted",
          "tests/training/test_checkpoint_damage.py -k names_the_file"),
    Fault("mdpgrpo_fast/training/checkpoint/manifest.py", "whole = text ==", "whole = True or text ==",
          "tests/training/test_checkpoint_damage.py -k names_the_file"),
    Fault("mdpgrpo_fast/training/checkpoint/manifest.py", 'if x != files[n]["sha256"]', "if False",
          "tests/training/test_checkpoint_damage.py -k names_the_file"),
    Fault("mdpgrpo_fast/training/checkpoint/best.py", 'score <= self.found["score"]', 'score < self.found["score"]',
          "tests/training/test_checkpoint.py -k best_model"),
    Fault("mdpgrpo_fast/training/checkpoint/best.py", "if first is not None and", "if False and",
          "tests/training/test_checkpoint.py -k goes_on_comparing"),
    Fault("mdpgrpo_fast/rollout/engine.py", "base_model(run.model)", "run.model",
          "tests/rollout/test_engine.py"),
    rollout("p.cumsum(1) - p >= top_p", "p.cumsum(1) >= top_p", "truncated or logprobs"),
    rollout("self.temperature[rows]", "self.temperature[: len(rows)]", "rows_share and llama"),
    rollout("self.length - 1", "0", "caches_of_other_kinds and Bamba"),
    rollout('"rwkv", "minimax"}', '"rwkv"}', "minimax"),
    rollout('{"recurrent_gemma", ', "{", "reads_padding"),
    rollout("(logprobs(logits, tokens, temperature) - sampling)", "(sampling - sampling)", "truncation_kept and torch"),
    Fault("csrc/cpu/sample.cpp", "total / whole", "total / all", "tests/rollout/test_sampling.py -k truncation_kept"),
    rollout("self.ids.shape[1] - n :", "0 :", "row_by_row and penalty"),
    rollout("policy = logprobs(logits, drawn, 1.0)", "policy = logprobs(processed, drawn, 1.0)", "what_is_recorded"),
    rollout("0 <= pad < text.vocab_size", "True", "pad_is_the_tokenizers"),
    rollout("self.noise[step, rows]", "self.noise[step, : len(rows)]", "who_is_beside_it"),
    rollout("self.first.copy_(width - lengths)", "self.first.zero_()", "same_tokens and qwen2"),
    rollout("place > last - window", "place >= last - window", "same_tokens and gemma2 or plain_attention"),
    rollout("x[: len(index), :, :filled] = x[:, :, :filled][index]", "pass", "same_tokens and llama"),
    rollout("steps.key == key", "True", "a_capture_for_each_size"),
    rollout("self.fused.refresh()", "pass", "weights_that_change"),
    rollout("x.keys.shape != x.values.shape", "False", "different_widths"),
    rollout('raise Unfit("its attention is over chunks")', "pass", "chunked_attention"),
    rollout("self.place + self.is_updated", "self.keys.shape[2]", "asks_how_much"),
    rollout("torch.is_inference_mode_enabled()", "False", "a_capture_for_each_size"),
    rollout("LARGE = 100.0", "LARGE = 1.0", "gated_by_silu"),
    Fault("mdpgrpo_fast/kernels/triton/decode/", "tl.where(total == 0, NEG_INF, top + tl.log2(total))",
          "tl.where(total > 0, top + tl.log2(total), NEG_INF)", "tests/rollout/test_fixed.py -k no_number"),
    Fault("mdpgrpo_fast/kernels/triton/decode/", "begin += part * each", "begin += part * BLOCK",
          "tests/rollout/test_fixed.py -k kernel_attention"),
    rollout("temperature=temperature, check_values=False", "temperature=temperature", "no_step_waits and llama"),
    # Verifiers.
    verifiers("known is not None and rules in known.rules", "known is not None", "unknown_id"),
    verifiers("(lines[1:], lines[:-1], lines[1:-1])", "(lines[1:], lines[:-1])", "eight"),
    verifiers("stop=num_sentences + 1", "stop=num_sentences", "relations"),
    verifiers('rf"\\b{word}\\b"', 'rf"{word}"', "golden"),
    verifiers("text.count(_DIVIDER) == N - 1", "text.count(_DIVIDER) >= N - 1", "golden"),
    verifiers("return min_words <= up_to(", "return min_words < up_to(", "golden"),
    verifiers('"以上": operator.ge', '"以上": operator.gt', "golden"),
    verifiers("engine_of(tokenizer._regexp).compile", "re.compile", "tokens or alphanumeric or scripts"),
    verifiers("SystemExit) as error:\n        raise CheckError", "OSError) as error:\n        raise CheckError",
              "check_that_fails"),
    verifiers("if not (registered or (known and any(", "if False and not ((any(", "cannot_be_loaded"),
    verifiers("os.path.abspath(name) if name", "name if name", "training_file"),
    verifiers("if not isinstance(follows, bool):", "if False:", "check_that_fails"),
    verifiers("sum(all(row) for _, row in counted)", "sum(any(row) for _, row in counted)", "accuracies"),
    verifiers("p.name for p in parameters if p.default is not p.empty", "", "annotations_are"),
    verifiers("content = answers[-1]", "content = answers[0]", "last_answer"),
    Fault("mdpgrpo_fast/rewards/constraints.py", "example.opening + response", "response",
          "tests/verifiers -k last_answer"),
    # Rewards: what a function sees, what it may return, what is lost, and what ends a run.
    rewards("if len(values) != count:", "if False:", "returns or one_value or fails_loses"),
    rewards("if not isinstance(value, (str, bytes)):", "if True:", "fails_loses"),
    rewards("isinstance(returned, (str, bytes, dict, set)) or", "", "fails_loses"),
    rewards('if isinstance(e.prompt, str) else [{"role"', 'if True else [{"role"', "chat_completions"),
    rewards("    function.per_completion = True", "    pass", "decorated"),
    rewards('isolation == "process" or', "", "isolated_scorer"),
    rewards("if over <= 0 else", "if over < -1 else", "soft_overlong"),
    rewards("min(length / self.max_len, 1.0)", "length / self.max_len", "cosine"),
    rewards("max(arguments[length] // 5, 1)", "arguments[length] // 4", "left_out_is"),
    rewards("all(verdict.satisfied or ())", "any(verdict.satisfied or ())", "satisfies_all"),
    rewards("isinstance(share, Failure):\n        return share", "False:\n        return share", "cannot_be_checked"),
    rewards("zip(self.weights, parts.values(), strict=True) if v is not None)",
            "zip([1.0] * len(parts), parts.values(), strict=True) if v is not None)", "several_rewards"),
    rewards("if all(v is None for v in parts.values()):", "if False:", "not_mine"),
    rewards("satisfied, isolated = verdict.satisfied, iter", "satisfied, isolated = None, iter", "keeps_its_verdicts"),
    rewards("if not self.drop_bad:", "if False:", "nan_is"),
    rewards("if expired.is_set() and not done.is_set():", "if False:", "fails_loses"),
    rewards("        _loop.cache_clear()\n", "", "blocks_its_loop"),
    rewards('if not key.startswith("init_main")', "", "main_guard"),
    rewards('return scores[0] if len(causes) == 1 and "" not in causes else None', "return None", "fails_loses"),
    rewards('len(causes) == 1 and "" not in causes', '"" not in causes', "all_ranks"),
    rewards("all(f is not None and f.cause == first.cause for f in failed)", "True", "all_ranks"),
    rewards("if slot.worker is not None and not slot.worker.is_alive():", "if False:", "dies_idle"),
    rewards("            if self._failures >= STARTS:", "            if False:", "no_wait or cannot_start"),
    rewards("end = time.monotonic() + self.limit\n", "end = math.inf\n", "late_process"),
    rewards("if came or not self.is_alive():", "if came:", "says_its_exit_code"),
    rewards("    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C", "    pass  # Ctrl-C", "ctrl_c_ends"),
    rewards("multiprocessing.process._children.discard(self)", "pass", "both_sides_of_a_fork"),
    rewards("gone = sentinel in ready or os.getppid() != program", "gone = False", "program_that_is_killed"),
    rewards("if slot.stopped:\n                return  #", "if False:\n                return  #", "a_stop_ends"),
    rewards("socket.SO_SNDTIMEO, value)", "socket.SO_SNDTIMEO, bytes(16))", "suspended_process"),
    rewards("max(began, self._progress) + pause", "began + pause", "as_long_as_something"),
    rewards("        pool.forked()\n", "        pass\n", "both_sides_of_a_fork"),
    rewards("answer is _UNANSWERED:", "answer is None:", "none_is_an_answer"),
    Fault("mdpgrpo_fast/rewards/scorer.py", "for example in first.values():", "for example in []:",
          "tests/verifiers -k before_a_run"),
    rewards("suppress(ConfigError):  # which", "suppress(ZeroDivisionError):  # which", "is_a_sentence"),
    rewards("if self._steps and self.limit < 1 and all(", "if False and all(", "many_lost"),
    rewards("_loaded = functools.cache(load_reward)", "_loaded = load_reward", "keeps_its_state"),
    rewards("or frames[:1]\n", "and frames\n", "users_code"),
    rewards("except BaseException as e:  # sys.exit()", "except ValueError as e:  # sys.exit()", "end_as_it_likes"),
    rewards("counts = Counter([CONSTRAINTS, *{", "counts = Counter([*{", "told_apart"),
    rewards('name=f"{reward.name} {seen[reward.name]}"', "name=reward.name", "told_apart"),
    rewards("extend(map(_plain, values))", "extend(values)", "is_plain"),
    rewards("len(self._steps) == WINDOW and lost", "lost", "many_lost"),
    rewards("        if all(s.cause for s in scores):", "        if False:", "trial"),
    rewards("        if missing:", "        if False:", "reward_model"),
    rewards("answers or responses, ids", "responses, ids", "look_at_answers"),
    rewards("float(all(held)) if", "float(any(held)) if", "kinds_of"),
    training("return total if bounds is None else", "return total if True else", "range_is_mapped"),
    training("seen = self._seen or rewards", "seen = rewards", "running_goal"),
    training("if low is None or high is None or not fixed:", "if low is None or high is None:", "off_the_scale"),
    training('        parts |= {"goal": self.collector.goal} if method.running_goal else {}', "        pass",
             "running_goal_trains"),
    training('return 1 if self.run.constraint_reward == "all" else', "return", "one_level"),
    training("                self.lost.check(number,", "                print(number,", "never_apply"),
    training("        if run.reward_check:", "        if False:", "tried_before"),
    Fault("mdpgrpo_fast/cli/parser.py", "if layer.get(k, v) is not None}", "}", "tests/test_cli.py -k null_in"),
    Fault("mdpgrpo_fast/cli/parser.py", "    parser._negative_number_matcher = ", "    _ = ",
          "tests/test_cli.py -k negative"),
    Fault("mdpgrpo_fast/cli/parser.py", " <= here else \"\"", " <= {*here, *here} or text else \"\"",
          "tests/test_cli.py -k other_commands"),
    Fault("mdpgrpo_fast/cli/foreign.py", '.removeprefix("actor_rollout_ref.")', "", "tests/test_cli.py -k status_2"),
    Fault("mdpgrpo_fast/cli/help.py", "values.get(f.name, f.default)", "f.default", "tests/test_cli.py -k in_effect"),
    Fault("mdpgrpo_fast/config/effects.py", "if found and applies(run, method):", "if found:",
          "tests/test_cli.py -k with_effect"),
    Fault("mdpgrpo_fast/train.py", "if v != below.get(k, _DEFAULTS.get(k))", "if k",
          "tests/test_cli.py -k with_effect"),
    Fault("mdpgrpo_fast/api.py", "preset=nearest_preset(config, run.preset), **changed", "**changed",
          "tests/test_api.py -k one_call"),
    Fault("mdpgrpo_fast/train.py", "sys.modules[__name__].__class__ =", "_ =", "tests/test_api.py -k can_be_called"),
    Fault("mdpgrpo_fast/api.py", 'if getattr(multiprocessing.current_process(), "_inheriting", False):', "if False:",
          "tests/test_train.py -k child"),
    Fault("mdpgrpo_fast/verifiers/verify.py", 'return "" if opened or', 'return "" if', "tests/rollout -k thinking"),
    rollout("kept if keep_special_tokens else answers", "answers", "answers_of_a_rollout"),
    rollout("text = text.replace(token, \"\")", "pass", "answers_of or several_special"),
    rollout("tail.rstrip().endswith(openers)", "False", "answers_of_a_rollout"),
    Fault("mdpgrpo_fast/rollout/engine.py", "type(problem) is kind or alike", "True", "tests/rollout/test_engine.py"),
    Fault("mdpgrpo_fast/rollout/engine.py", "kind(message) if trace is None", "RolloutError(message) if True",
          "tests/training/test_distributed.py -k ranks_stop"),
    Fault("mdpgrpo_fast/training/loop.py", "        acc.wait_for_everyone()  # a rank", "        pass  # a rank",
          "tests/training/test_distributed.py -k ranks_stop"),
    Fault("mdpgrpo_fast/api.py", "loop.accelerator.wait_for_everyone()", "pass",
          "tests/training/test_distributed.py -k torchrun_keeps"),
    Fault("mdpgrpo_fast/training/distributed.py", 'os.environ.get("ACCELERATE_USE_FSDP") == "true" and', "False and",
          "tests/training/test_distributed.py -k 'more_processes and fsdp2'"),
    Fault("mdpgrpo_fast/training/loop.py", "and (alike or whole)", "and True",
          "tests/training/test_distributed.py -k alone_is_not_lost"),
    Fault("mdpgrpo_fast/training/loop.py", "tracker.finish()", "acc.end_training()",
          "tests/training/test_distributed.py -k torchrun_on"),
    Fault("mdpgrpo_fast/training/distributed.py", "(by_backend and _GONE.search(text))", "by_backend",
          "tests/training/test_distributed.py -k says_that_a_rank"),
    Fault("mdpgrpo_fast/training/distributed.py", 'and "/gloo/" in text', "and False",
          "tests/training/test_two_hosts.py -k dies"),
    Fault("mdpgrpo_fast/training/loop.py", "if not isinstance(failure, distributed.RankLostError):", "if True:",
          "tests/training/test_two_hosts.py -k dies"),
    Fault("mdpgrpo_fast/training/before/ranks.py", "if mine.get(name) != theirs.get(name)", "if False",
          "tests/training/test_two_hosts.py -k differ"),
    Fault("mdpgrpo_fast/training/before/ranks.py", "        if store.check([FAILED]):", "        if False:",
          "tests/training/test_two_hosts.py -k does_not_come_is_named"),
    Fault("mdpgrpo_fast/training/before/ranks.py", 'f"mdpgrpo_fast/{meeting}"', '"mdpgrpo_fast"',
          "tests/training/test_two_hosts.py -k meet_anew"),
    Fault("mdpgrpo_fast/training/before/ranks.py", 'store.compare_set(FAILED, "", f', "store.set(FAILED, f",
          "tests/training/test_two_hosts.py -k does_not_come_is_named"),
    training("except (RewardError, FloatingPointError) as e:\n        problem = e\n    raise",
             "except RewardError as e:\n        problem = e\n    raise", "cannot_answer"),
    training('row.get("eval", row).get("dropped", 0)', 'row.get("dropped", 0)', "knows_what_was"),
    rollout("if t.special]", "if False]", "beside_an_answer"),
    # The door of a vLLM server, and weights on their way.
    rollout('scope["path"] == "/health"', 'scope["path"].startswith("/health")', "every_path_needs"),
    rollout("if len(given) != 1:", "if not given:", "nothing_but_the_key"),
    rollout('scheme.lower() == b"bearer" and ', "", "nothing_but_the_key"),
    rollout("key is None and not is_loopback(known.host)", "key is None and known.host == '0.0.0.0'", "refusals"),
    rollout('*rest, "--enable-scale-out", *fixed,', '*fixed, "--enable-scale-out", *rest,', "its_own_machine_alone"),
    rollout("headers=headers, follow_redirects=False", "headers=headers, follow_redirects=True", "redirects"),
    rollout('if "CERTIFICATE_VERIFY_FAILED" in reason:', "if False:", "certificate_is_verified"),
    rollout("if is_loopback(host) else {}", "if False else {}", "through_no_proxy"),
    rollout("os.O_EXCL, 0o600))", "os.O_EXCL, 0o644))", "never_open_to_others"),
    rollout("shutil.rmtree(made, ignore_errors=True)", "pass", "files_of_a_sync or they_go"),
    rollout(" or host != _host() or", " or", "nothing_else_is_removed"),
    rollout("if own and not _runs(int(pid)):", "if own:", "running_one_stay"),
    # What vLLM holds.
    rollout("self.label not in (None, c.weights)", "False", "does_not_pass_for"),
    rollout('if self._rpc("mdpgrpo_finish", update) != workers:', "if False:", "restarted_during_a_sync"),
    rollout("self._lost = bool(others) or", "self._lost = False and", "does_not_pass_for"),
    rollout("and weights in self._mdpgrpo_loaded", "and False", "done_once"),
    rollout("if (p.dtype, p.numel()) == (dtype, elements):", "if True:", "where_a_layer_is_repacked"),
    rollout("method.process_weights_after_loading(layer)\n        owners", "pass\n        owners", "head_is_repacked"),
    rollout("if not self._holds_base or self._lost:\n            self.sync(", "if True:\n            self.sync(",
            "base_goes_once"),
    rollout('"model": self.adapter or self._model', '"model": self._model', "newest_adapter_of_a_server"),
    rollout("2 if lora_rank is None else 1", "2", "sleep_keeps"),
    rollout("list(kept) if kept is not None else", "", "does_not_pass_for"),
    Fault("mdpgrpo_fast/training/collect.py", "if self.synced != number:", "if True:",
          "tests/rollout/vllm/test_ahead.py -k weights_of_before"),
    Fault("mdpgrpo_fast/training/collect.py", "batch.staleness = staleness", "batch.staleness = 0",
          "tests/rollout/vllm/test_ahead.py -k weights_of_before"),
    Fault("mdpgrpo_fast/training/collect.py", "if not left or self.accelerator.num_processes > 1:", "if True:",
          "tests/rollout/vllm/test_restart.py -k goes_on"),
    training("if not any(s.cause for s in scores[i * g : (i + 1) * g])]", "]", "not_refilled"),
    training("statistics.pstdev(seen) or 1.0", "statistics.pstdev(seen)", "running_goal"),
    training("in dict.fromkeys(name for row in rows for name in row):", "in rows[0]:", "one_rank_alone"),
    training('if scores.get("reward") == scores.get("SSR"):', "if False:", "last_line"),
    training('        group["lr"] = rate', "        pass", "longer_or_shorter"),
    training("BNPO_KNOBS if method.aggregation", "() if method.aggregation", "other_settings"),
    training("reference = (weights if whole and not run.lora else 0), method.needs_reference and not run.lora",
             "reference = (weights if whole else 0), method.needs_reference", "cannot_suffice"),
    training("ours or record.levelno >= logging.ERROR or not", "ours or not", "known_notes"),
    training('if phase != "after":  #', "if not phase:  #", "and_nothing_else"),
    training("copy.deepcopy(row)) is True", "row) is True", "callback_sees"),
    training("return bool(found & 1)", "return False", "callback_sees"),
    training("set_random_states(before, device)\n            raise", "pass\n            raise", "goes_on_to_the_bit"),
    training("self._open, self.half_done = False, True", "pass", "goes_on_to_the_bit"),
    training("if not self.evaluated and self.evaluates_after(self.done):", "if False:", "goes_on_to_the_bit"),
    training("        if self._unhurried:", "        if True:", "come_to_an_end"),
    training("fcntl.flock(fd, kind | fcntl.LOCK_NB)", "pass", "one_run_has"),
    training("if found and not (path / MARKER).is_file():", "if False:", "only_an_earlier_run"),
    training("    if not math.isfinite(norm):", "    if False:", "not_finite_is_not_made"),
    training("made = bad is None and not", "made = True or not", "not_finite_is_not_made"),
    training("if len(bad) if alone else distributed.max_over_ranks(accelerator, len(bad)):", "if False:",
             "not_finite_are_not_saved"),
    training("if len(bad) if alone else", "if", "fails_alone_asks"),
    Fault("mdpgrpo_fast/cli/ending.py", "        except OSError as e:", "        except ZeroDivisionError as e:",
          "tests/test_cli.py -k goes_away"),
    training("        if public(word) != word:", "        if False:", "uploads_its_model"),
    training("api.auth_check(repo_id, write=True)", "pass", "right_that_is_missing"),
    training("run.lora and not run.merge_adapter and hub_id(lm.name_or_path)", "run.lora", "adapters_are_uploaded"),
    training("run.hub_private_repo and not api.model_info(repo_id).private", "False", "repository_that_is_there"),
    training("is not None and math.isfinite(value)", "is not None", "what_was_not_measured"),
    Fault("mdpgrpo_fast/models/load.py", "return model, copy.copy(tokenizer)", "return model, tokenizer",
          "tests/training/test_task.py -k stay_as_they_are"),
    # Prompts.
    prompts("return context - completion, f", "return config.max_prompt_length, f", "limit or context or long"),
    prompts("goes_on = messages[-1]", "goes_on = False and messages[-1]", "trl or continued"),
    prompts("any(text.startswith(token) for token in tokens)", "any(token in text for token in tokens)", "quoted"),
    prompts("if ends and not self.eos & ends.keys():", "if False:", "base or chat"),
    prompts('if self.system is not None and not any', 'if False and not any', "system"),
    prompts('n + 1  # the same', 'n  # the same', "rlvr or function or forms"),
    # The report.
    report("_largest_z(method) <= 2:", "_largest_z(method) < 2:", "only_be_zero"),
    report("if alike and not moved:", "if alike:", "value_of_the_loss"),
    report("for pick in (np.argmin, np.argmax)", "for pick in (np.argmin,)", "outliers"),
    report("autoescape=True", "autoescape=False", "untrusted or hostile"),
    report("key=lambda p: p[0])", "key=lambda p: -p[0])", "either_direction"),
    report("if options.output.exists() and not options.overwrite:", "if False:", "wrong_command_line"),
    report('run.summary.get("held_out") for', "None for", "other_held_out"),
    report("if len(set(values)) > 1]", "]", "what_differs"),
    # Evaluation.
    evaluation("return 1 - math.comb(n - passed, k)", "return 1 - math.comb(n - passed, 1)", "pass_at_k"),
    evaluation("if path.exists() and not config.overwrite:", "if False:", "existing_files"),
    evaluation("num_generations=g,", "num_generations=1,", "sampler or several"),
    evaluation("all(strict) if example.instruction_ids else", "all(strict) or", "by_hand"),
    evaluation("or min(values) == max(values)", "", "interval_is"),
    evaluation("None if None in group else of(group)", "of([v for v in group if v])", "samples_by_hand"),
    evaluation("hash(entry.group)", "pass", "copy_that_is_none"),
    evaluation("    if there < needed:", "    if False:", "cannot_be_had"),
    evaluation("average(x[rows], weights=w[rows])", "average(x[rows])", "weighted"),
    evaluation("values[i : i + self.samples] for", "values[i : i + 1] for", "by_hand"),
    evaluation("[-1:] == [target]", "[:1] == [target]", "rules"),
    evaluation("[*row, False].index(False)", "sum(row)", "consistency"),
    evaluation("if scorer is not None or entries:", "if False:", "refused_before"),
    # Liger's signatures
    liger("skip_idle=not isinstance(beta, Tensor)", "skip_idle=True", "mean_kl"),
    liger("num_items_in_batch / ranks", "num_items_in_batch", "several_processes"),
    liger("            dist.all_reduce(num_items_in_batch)", "            pass", "several_processes"),
    liger("temperature = 1.0  # the KL's", "temperature = float(temperature[0])", "per_completion or knobs"),
    liger("keep.int().argmax(1, keepdim=True)", "torch.zeros_like(keep[:, :1], dtype=torch.long)", "vespo_takes"),
    liger('!= "vespo":', '!= "":', "vespo_takes or completion_weights"),
    liger("pad(keep, (0, 1))", "pad(keep, (0, 1), value=True)", "from_logits"),
    liger("        kl_logprobs = token_logprobs(", "        _ = token_logprobs(", "per_completion"),
    liger("in_place=inplace and", "in_place=False and", "inplace"),
    liger("        and logits.is_contiguous()", "", "inplace"),
    liger("if not (self.use_ref_model and _is_on(beta)):", "if not _is_on(beta):", "hidden_states"),
    liger("selected_token_ids.masked_fill(~keep, 0)", "selected_token_ids", "masked_positions"),
    # TRL's trainer.
    in_trl("fused", "1 / steps", "1.0", "every_option and delta or every_loss_type and grpo-token"),
    in_trl("fused", "share = self.args.steps_per_generation / steps", "share = 1", "several_updates or option"),
    in_trl("fused", "1 - self.top_entropy_quantile", "self.top_entropy_quantile", "quantile"),
    in_trl("fused", '* inputs.get("tool_mask", 1)\n        config', "\n        config", "tool"),
    in_trl("fused", "first + own.start, first + own.stop", "0, 8", "chunks"),
    in_trl("rows", "(self.tokens.shape[1] + 1) : -1", "self.tokens.shape[1] :", "every_option and temperature"),
    in_trl("rows", "x[self._completions] if x.ndim == 1", "x if x.ndim == 1", "every_option and truncated"),
    in_trl("rows", "[counted[i] for i in packed.rows]", "[lengths[i] for i in packed.rows]", "tool"),
    in_trl("head", 'scored.aux_loss = _load', 'scored.aux_loss = 0 * _load', "mixture"),
    in_trl("head", "if shape.in_float32:", "if False:", "float32"),
    in_trl("metrics", "(x & keep).any(1).float()", "x[:, 0].float() * 0", "clips_of_sequences"),
    in_trl("metrics", "each = clipped.amax(1) if by_sequence", "each = clipped.amin(1) if True", "clip"),
    in_trl("entropy", 'if aggregation == "grpo"', "if True", "bonus"),
    in_trl("entropy", "t._last_world_entropy <= t.args", "t._last_world_entropy > t.args", "adaptive"),
    method_in_trl("trainer", "first + i) % g", "first + i) % (g - 1)", "references or several"),
    method_in_trl("trainer", "< 0, method.kl_beta_neg", "> 0, method.kl_beta_neg", "are_the_methods"),
    method_in_trl("trainer", "logged.pop()", "pass", "are_the_methods"),
    method_in_trl("trainer", 'return [self.method.kl_temperature]', "return [1.0]", "references"),
    method_in_trl("trainer", "[prompts].argsort(stable=True)", ".argsort(stable=True)", "whole_groups"),
    method_in_trl("trainer", "if not math.isfinite(self.last_loss):", "if False:", "not_finite"),
    method_in_trl("trainer", "single = self._rewards.view", "single = 0 * self._rewards.view", "several_rewards"),
    method_in_trl("sampling", "scores / self", "scores * self", "references"),
    # The page on other trainers.
    hooks("kl_coefficient(a, *CONFIG.betas), old", "CONFIG.kl_beta_pos, old", "prime"),
    hooks("Layout(1, torch.zeros_like(keep, dtype=torch.long))", "Layout(len(keep), torch.arange(len(keep)))", "prime"),
    hooks("out.per_token * inputs.loss_weights", "out.per_token", "weights_of_a_component"),
    hooks("keep.sum().clamp(min=1)", "keep.sum()", "without_tokens"),
    hooks("data[name][:, 1:]", "data[name][:, :-1]", "nemo"),
    hooks("logits[:, : tokens.shape[1]]", "logits[:, :-1]", "nemo"),
    hooks('mask * data["sample_mask"][:, None]', "mask", "does_not_count"),
    hooks("None if self.force_on_policy_ratio else old", "old", "does_not_compute"),
    hooks("else global_valid_seqs,", "else global_valid_toks,", "nemo"),
    hooks("advantages(rewards[None], [k], CONFIG).advantage[0]", "rewards - rewards.mean()", "advantages"),
]  # fmt: skip


def find(root: Path, fault: Fault) -> Path:
    """The one file of the fault's path, itself or below it, that holds the old text. Raises where it is not one."""
    base = root / fault.path
    files = [base] if base.is_file() else sorted(base.rglob("*.py"))
    counts = {f: n for f in files if (n := f.read_text(encoding="utf-8").count(fault.old))}
    if sum(counts.values()) != 1:
        raise LookupError(f"{fault.path}: found {sum(counts.values())} times, not once: {fault.old!r}")
    return next(iter(counts))


def copy_to(folder: Path) -> Path:
    """The repository without its history, the compiled libraries with it."""
    root = folder / "repository"
    root.mkdir()
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", ".git", "results"))
        else:
            shutil.copy(ROOT / name, root / name)
    shared = ROOT.parent / "shared"
    if shared.exists():
        (folder / "shared").symlink_to(shared.resolve())
    return root


def environment(root: Path) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return {**clean, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}


def build(root: Path) -> None:
    """The libraries of csrc/cpu from the sources of the copy, in place."""
    env = {**environment(root), "MDPGRPO_BUILD": "cpu", "MDPGRPO_CXXFLAGS": "-O1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
    subprocess.run(command, cwd=root, env=env, check=True, capture_output=True, timeout=LIMIT)


def run_tests(root: Path, tests: str) -> tuple[int, str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--long",
        "-x",
        "-p",
        "no:cacheprovider",
        "--tb=line",
        *shlex.split(tests),
    ]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment(root), capture_output=True, text=True, timeout=LIMIT
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return FAILED, f"no end within {LIMIT} s"
    # With -x, pytest calls a file that it cannot import a failure.
    code = INTERRUPTED if "ERROR collecting" in done.stdout else done.returncode
    return code, done.stdout[-2000:] + done.stderr[-500:]


def plant(root: Path, fault: Fault) -> tuple[bool, str]:
    """Whether the tests see the fault, and what came of them."""
    path = find(root, fault)
    text = path.read_text(encoding="utf-8")
    compiled = fault.path.startswith("csrc")
    library = root / "mdpgrpo_fast/kernels/_cpu.abi3.so"
    before = library.read_bytes() if compiled else b""
    try:
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        if compiled:
            build(root)
        code, output = run_tests(root, fault.tests)
    finally:
        path.write_text(text, encoding="utf-8")
        if compiled:
            library.write_bytes(before)
    # A crash is an answer too; no test collected, or a file that cannot be imported, is none.
    return code == FAILED or code < 0, "" if code == FAILED else f"pytest ended with {code}\n{output}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--no-clean", action="store_true", help="do not run the tests without a fault first")
    options = parser.parse_args()
    faults = [f for f in FAULTS if not options.words or any(w in " ".join(f) for w in options.words)]
    if not faults:
        parser.error(f"no fault holds one of {options.words}")
    problems = []
    for fault in faults:
        try:
            find(ROOT, fault)
        except LookupError as e:
            problems.append(str(e))
    if problems:
        print(*problems, sep="\n")
        return 1
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        roots: queue.Queue[Path] = queue.Queue()
        for i in range(options.jobs):
            (Path(folder) / str(i)).mkdir()
            roots.put(copy_to(Path(folder) / str(i)))

        def on_a_copy(fault: Fault | str) -> bool:
            root, begin = roots.get(), time.monotonic()
            try:
                if isinstance(fault, str):
                    code, output = run_tests(root, fault)
                    seen, what = code == PASSED, f"without a fault: {fault}"
                    word = "passes" if seen else "FAILS"
                else:
                    seen, output = plant(root, fault)
                    what = f"{fault.path}: {fault.old}  ->  {fault.new}".replace("\n", " ")
                    word = "caught" if seen else "ESCAPED"
            finally:
                roots.put(root)
            print(f"{word:8} {time.monotonic() - begin:5.0f} s  {what}", "" if seen else output, flush=True)
            return seen

        clean = [] if options.no_clean else list(dict.fromkeys(f.tests for f in faults))
        with ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(on_a_copy, [*clean, *faults]))
    print(f"{sum(results[len(clean) :])} of {len(faults)} faults are caught; {sum(results[: len(clean)])} of "
          f"{len(clean)} sets of tests pass without one")  # fmt: skip
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
