"""MDPGRPOTrainer samples each completion at its own temperature, in all four ways that TRL samples."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import trl_vllm
from helpers.trl_vllm import IMAGE, Sampler, Telling, generation, stand_in
from torch import Tensor
from trl import GRPOTrainer, chat_template_utils
from trl.trainer import grpo_trainer

from mdpgrpo_fast.integrations.trl import MDPGRPOConfig, MDPGRPOTrainer, sampling

TAUS = [0.5, 0.75, 1.25, 2.0]  # exact in float32
SLOTS = TAUS * 2
ROWS: list[dict[str, Any]] = [{"prompt": "write about the sea"}] * 4 + [{"prompt": "the wind"}] * 4
Make = Callable[..., Any]


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(ids) % 7 / 6 for ids in completion_ids]


@pytest.fixture
def make(model_dirs: dict[str, str], tmp_path: Path) -> Make:
    """A trainer with these knobs, in training."""
    from datasets import Dataset

    def trainer(rows: Any = None, tools: Any = None, tokenizer: Any = None, **knobs: Any) -> Any:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True,
            "per_device_train_batch_size": 8, "num_generations": 4, "temperatures": TAUS, "temperature": 0.7,
            "max_completion_length": 4, "num_constraints": 2, "beta": 0.0, "packing": "off", "save_strategy": "no",
            "learning_rate": 1e-2, "logging_steps": 1,
        }  # fmt: skip
        args = MDPGRPOConfig(**{**settings, **knobs})
        data = Dataset.from_list((rows or ROWS)[::4])
        made = MDPGRPOTrainer(model_dirs["llama"], reward, args, data, processing_class=tokenizer, tools=tools)
        made.model.train()
        return made

    return trainer


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The probabilities (B, V) of each draw."""
    found: list[Tensor] = []
    draw = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, **kw: (found.append(p), draw(p, **kw))[1])
    return found


@pytest.mark.parametrize("knobs", [{}, {"generation_kwargs": {"temperature": 0.3}}], ids=["", "own temperature"])
def test_each_row_is_drawn_at_its_temperature(make: Make, drawn: list[Tensor], knobs: dict[str, Any]) -> None:
    trainer = make(**knobs)
    batch = trainer._generate_and_score_completions(ROWS)
    with torch.no_grad():
        for i, tau in enumerate(SLOTS):
            ids = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
            logits = trainer.model(ids[None]).logits[0, -1]
            torch.testing.assert_close(drawn[0][i], (logits / tau).softmax(-1), rtol=1e-4, atol=1e-7)
    assert batch["sampling_temperature"].tolist() == pytest.approx(SLOTS)


@pytest.mark.parametrize("knobs", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"repetition_penalty": 1.5}], ids=str)
def test_the_rest_of_sampling_comes_after_the_temperature(
    make: Make, drawn: list[Tensor], knobs: dict[str, float]
) -> None:
    """As transformers itself has it, at one temperature for all rows."""
    trainer = make(**knobs)
    batch = trainer._generate_and_score_completions(ROWS)
    ours = drawn[0]
    assert (
        len({int((p > 0).sum()) for p in ours[:4]}) > 1 or "top_p" not in knobs
    )  # the temperature acts on the nucleus
    for tau in TAUS:
        drawn.clear()
        trainer.generation_config.temperature = tau
        trainer.model.generate(
            input_ids=batch["prompt_ids"], attention_mask=batch["prompt_mask"],
            generation_config=trainer.generation_config,
        )  # fmt: skip
        rows = [i for i, t in enumerate(SLOTS) if t == tau]
        torch.testing.assert_close(ours[rows], drawn[0][rows], rtol=1e-5, atol=1e-8)


def test_beams_of_a_row_have_its_temperature(make: Make) -> None:
    scores = torch.ones(6, 2)
    found = sampling.TemperaturePerRow(torch.tensor([0.5, 1.0, 2.0]))(torch.zeros(6, 1), scores)
    assert found[:, 0].tolist() == [2.0, 2.0, 1.0, 1.0, 0.5, 0.5]
    batch = make(generation_kwargs={"num_beams": 2, "length_penalty": -0.1})._generate_and_score_completions(ROWS)
    assert len(batch["completion_ids"]) == len(ROWS)


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_changed_for_a_turn_is_as_before(make: Make, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    trainer = make()
    kwargs, config = trainer.generation_kwargs, trainer.generation_config
    generate, inside = type(trainer.model).generate, []

    def spy(self: Any, *args: Any, **more: Any) -> Any:
        inside.append((more["generation_config"].temperature, trainer.generation_kwargs["temperature"]))
        if fails:
            raise RuntimeError("out of memory")
        return generate(self, *args, **more)

    monkeypatch.setattr(type(trainer.model), "generate", spy)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            trainer._generate_and_score_completions(ROWS)
    else:
        trainer._generate_and_score_completions(ROWS)
    assert inside == [(1.0, 1.0)]
    assert trainer.generation_kwargs is kwargs and trainer.generation_config is config
    assert kwargs["temperature"] == config.temperature == 0.7 and "generate" not in vars(trainer.model)


def test_an_attribute_of_the_object_itself_comes_back() -> None:
    owner = types.SimpleNamespace(generate=1)
    with pytest.raises(KeyError), sampling.replaced(owner, "generate", 2):
        assert owner.generate == 2
        raise KeyError
    assert owner.generate == 1


def test_evaluation_is_at_the_temperature_of_the_config(make: Make, drawn: list[Tensor]) -> None:
    trainer = make()
    trainer.model.eval()
    batch = trainer._generate_and_score_completions(ROWS)
    logits = trainer.model(batch["prompt_ids"][:1]).logits[0, -1]
    for row in drawn[0][:4]:
        torch.testing.assert_close(row, (logits / 0.7).softmax(-1), rtol=1e-4, atol=1e-7)
    assert "sampling_temperature" not in batch


def test_continuous_batching_has_a_pass_for_each_temperature(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, telling, passes = make(use_transformers_continuous_batching=True), Telling(), []

    def generate_batch(self: Any, prompts: list[list[int]], generation_config: Any, **_: Any) -> dict[str, Any]:
        tau = generation_config.temperature
        passes.append((tau, len(prompts)))
        found = [telling(ids, tau, 4)[0] for ids in prompts]
        return {str(i): types.SimpleNamespace(generated_tokens=ids) for i, ids in enumerate(found)}

    monkeypatch.setattr(type(trainer.model), "generate_batch", generate_batch)
    batch = trainer._generate_and_score_completions(ROWS)
    assert passes == [(tau, 2) for tau in TAUS] and trainer.generation_config.temperature == 0.7
    prompts = unpadded(batch["prompt_ids"], batch["prompt_mask"])
    assert batch["completion_ids"].tolist() == [
        Telling()(ids, tau, 4)[0] for ids, tau in zip(prompts, SLOTS, strict=True)
    ]


# ---- ranks and turns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_with_part_of_a_group_has_its_part_of_the_temperatures(
    make: Make, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    trainer, found = make(), []
    monkeypatch.setattr(type(trainer.accelerator), "process_index", property(lambda self: rank))

    def stop(self: Any, inputs: Any) -> Any:
        found.extend(self._taus.tolist())
        raise StopIteration

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", stop)
    with pytest.raises(StopIteration):
        trainer._generate_and_score_completions(ROWS[:3])
    assert found == pytest.approx([SLOTS[rank * 3 % 4 + i] for i in range(3)])


def look() -> str:
    """Looks at the sea."""
    return "waves"


@pytest.mark.parametrize("way", ["transformers", "colocate", "server"])
def test_later_turns_of_a_completion_keep_its_temperature(
    make: Make, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, way: str
) -> None:
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = chat_template_utils.qwen3_chat_template
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    turns = [range(8), [1, 2, 4, 7], [2, 7]]  # rows of each turn
    calls = iter([row in after for now, after in zip(turns, [*turns[1:], []], strict=True) for row in now])

    def parse(*_: Any, **__: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "look", "arguments": {}}}
        return {"role": "assistant", "content": "", **({"tool_calls": [call]} if next(calls) else {})}

    knobs: dict[str, Any] = {"max_completion_length": 300, "tools": [look], "tokenizer": talking}
    if way != "transformers":
        stand_in(monkeypatch, Telling)
        knobs |= {"use_vllm": True, "vllm_mode": way, "vllm_max_model_length": 4096}
    trainer = make(rows, **knobs)
    trainer.model.config.max_position_embeddings = 4096
    monkeypatch.setattr(grpo_trainer, "parse_response", parse)
    found: list[tuple[list[int], float]] = []
    if way == "transformers":
        trainer.generation_config.max_new_tokens = 4
        generate = type(trainer.model).generate

        def spy(self: Any, input_ids: Tensor, attention_mask: Tensor, logits_processor: Any, **more: Any) -> Any:
            taus = logits_processor[0].temperatures.tolist()
            found.extend(zip(unpadded(input_ids, attention_mask), taus, strict=True))
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "logits_processor": logits_processor}
            return generate(self, **inputs, **more)

        monkeypatch.setattr(type(trainer.model), "generate", spy)
    batch = trainer._generate_and_score_completions(rows)
    if way == "colocate":
        found = [(p["prompt_token_ids"], s.temperature) for p, s in trainer.vllm_generation.llm.requests]
    elif way == "server":
        bodies = trainer.vllm_generation.vllm_client.bodies
        found = [(ids, body["temperature"]) for body in bodies for ids in body["prompt"] for _ in range(body["n"])]
    prompts = unpadded(batch["prompt_ids"], batch["prompt_mask"])
    whole = [p + c for p, c in zip(prompts, unpadded(batch["completion_ids"], batch["completion_mask"]), strict=True)]
    # What was sampled from is the beginning of what came of it.
    for ids, tau in found:
        assert any(w[: len(ids)] == ids and w[len(ids) :] and SLOTS[i] == tau for i, w in enumerate(whole))
    later = [(len(ids), tau) for ids, tau in found if ids not in prompts]
    assert sorted(tau for _, tau in later) == sorted(SLOTS[row] for now in turns[1:] for row in now)
    assert sorted(tau for ids, tau in found if ids in prompts) == sorted(SLOTS)
    assert batch["tool_mask"].min() == 0


# ---- vLLM, by TRL's own VLLMGeneration ------------------------------------------------------------------------------

PROMPTS = [[5, 6, 7]] * 4 + [[8, 9]] * 4
PICTURES = [["a", "b"]] * 4 + [None] * 4


def told(prompts: list[list[int]], taus: list[float]) -> tuple[Any, ...]:
    """What VLLMGeneration must return of `Telling`."""
    telling = Telling()
    found = [telling(ids, tau, 16) for ids, tau in zip(prompts, taus, strict=True)]
    return prompts, [tokens for tokens, _ in found], [[[v] for v in logprobs] for _, logprobs in found]


@pytest.fixture
def telling(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, Telling)


@pytest.mark.usefixtures("telling")
def test_colocated_requests_have_their_temperatures() -> None:
    images = [["a", "b"], ["c"], None, None] * 2
    for prompts, taus in ((PROMPTS, SLOTS), (PROMPTS[3:6], [2.0, 2.0, 0.5])):
        vllm = generation("colocate", top_p=0.9, generation_kwargs={"seed": 3, "temperature": 0.1})
        with sampling.through_vllm(vllm, taus):
            found = vllm.generate(prompts, images[: len(prompts)], 4)
        assert found[:3] == told(prompts, taus)
        asked, settings = zip(*vllm.llm.requests, strict=True)
        assert [s.temperature for s in settings] == taus
        assert {(s.top_p, s.seed, s.n) for s in settings} == {(0.9, 3, 1)}
        pictures = [p.get("multi_modal_data") for p in asked]
        assert pictures[:3] == [{"image": ["a", "b"]}, {"image": "c"}, None]
    vllm.generate(PROMPTS[:1], None, 1)
    assert vllm.llm.requests[-1][1].temperature == 0.1  # as before


@pytest.mark.usefixtures("telling")
@pytest.mark.parametrize("rank", [0, 1])
def test_tensor_parallel_ranks_sample_all_of_their_rows(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Each of two ranks asks for the rows of both, and has its own of what comes."""
    group, dist = object(), torch.distributed
    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", lambda ranks: (group, None))
    monkeypatch.setattr(dist, "get_rank", lambda group: rank)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    vllm = generation("colocate", rank=rank, ranks=2, tensor_parallel=2)
    taus, pictures = [SLOTS[:3], SLOTS[3:6]], [["a"], None, ["b"]]
    prompts = [PROMPTS[:3], PROMPTS[3:6]]
    rounds = iter([taus, prompts, [pictures, [None] * 3]])

    def gather(into: list[Any], own: Any, group: Any) -> None:
        parts = next(rounds)
        assert group is vllm.tp_group and own == parts[rank]
        into[:] = parts

    monkeypatch.setattr(dist, "all_gather_object", gather)
    with sampling.through_vllm(vllm, taus[rank]):
        found = vllm.generate(prompts[rank], [pictures, None][rank], 4)
    everyone = told(PROMPTS[:6], SLOTS[:6])
    assert found[:3] == tuple(part[rank * 3 : rank * 3 + 3] for part in everyone)
    assert [s.temperature for _, s in vllm.llm.requests] == SLOTS[:6]


@pytest.mark.usefixtures("telling")
@pytest.mark.parametrize("pictures", [None, PICTURES], ids=["text", "images"])
@pytest.mark.parametrize(
    ("taus", "n", "calls"),
    [
        (SLOTS, 4, 4),
        ([0.5, 2.0, 0.5, 2.0] * 2, 4, 2),
        ([0.5] * 8, 4, 1),
        ([0.5, 0.5, 0.5, 2.0, 0.5, 2.0, 2.0, 2.0], 4, 4),  # no two groups alike
        ([2.0, 0.5, 0.5, 1.25, 2.0, 2.0, 0.5, 0.5], 1, 3),  # a tool's turn
    ],
)
def test_a_server_is_called_once_for_each_temperature(pictures: Any, taus: list[float], n: int, calls: int) -> None:
    vllm = generation("server", top_k=7)
    prompts = PROMPTS if pictures is None else [[IMAGE, 4, IMAGE, IMAGE]] * 4 + [[8, 9]] * 4
    if n == 1:
        prompts = [[*ids, 50 + i] for i, ids in enumerate(prompts)]
    with sampling.through_server(vllm, taus):
        found = vllm.generate(prompts, pictures, n)
    assert found[:3] == told(prompts, taus)
    assert found[3] == [[[token] for token in ids] for ids in found[1]]
    bodies = vllm.vllm_client.bodies
    if pictures is None:
        assert len(bodies) == calls and all(body["top_k"] == 7 for body in bodies)
        return
    for body in bodies:
        has = body["features"]
        assert (has is None) == (body["token_ids"][:2] == [8, 9])
        if has:
            assert has["of"] == ["a", "b"] and has["mm_placeholders"]["image"][1] == {"offset": 2, "length": 2}


@pytest.mark.usefixtures("telling")
def test_a_server_is_not_asked_for_the_temperature_of_generation_kwargs() -> None:
    vllm = generation("server", generation_kwargs={"seed": 3, "temperature": 0.1})
    with sampling.through_server(vllm, SLOTS):
        vllm.generate(PROMPTS, None, 4)
    bodies = vllm.vllm_client.bodies
    assert [body["temperature"] for body in bodies] == TAUS and {body["seed"] for body in bodies} == {3}
    vllm.generate(PROMPTS[:1], None, 1)
    assert bodies[-1]["temperature"] == 0.1 and vllm.generation_kwargs == {"seed": 3, "temperature": 0.1}


@pytest.mark.usefixtures("telling")
def test_a_server_without_logprobs() -> None:
    vllm = generation("server")
    generate = vllm.vllm_client.generate
    vllm.vllm_client.generate = lambda **kw: {**generate(**kw), "logprobs": None, "logprob_token_ids": None}
    with sampling.through_server(vllm, SLOTS):
        assert vllm.generate(PROMPTS, None, 4)[1:] == (told(PROMPTS, SLOTS)[1], None, None)


@pytest.mark.usefixtures("telling")
def test_ranks_of_a_server_have_their_parts_of_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks with two completions each; only the first one calls the server."""
    parts = [slice(2 * rank, 2 * rank + 2) for rank in range(4)]
    sent: list[Any] = []

    def broadcast(objects: list[Any], from_process: int) -> None:
        if objects[0] is not None:
            sent[:] = objects
        objects[:] = sent

    monkeypatch.setattr(trl_vllm.vllm_generation, "broadcast_object_list", broadcast)
    for rank, own in enumerate(parts):
        rounds = iter([SLOTS, PROMPTS, [None] * 8])

        def gather(local: list[Any], own: slice = own, rounds: Any = rounds) -> list[Any]:
            whole = next(rounds)
            assert local == whole[own]
            return whole  # type: ignore[no-any-return]

        monkeypatch.setattr(sampling, "gather_object", gather)
        monkeypatch.setattr(trl_vllm.vllm_generation, "gather_object", gather)
        vllm = generation("server", rank=rank, ranks=4)
        assert hasattr(vllm, "vllm_client") == (rank == 0)
        with sampling.through_server(vllm, SLOTS[own]):
            found = vllm.generate(PROMPTS[own], None, 4)
        assert found[:3] == tuple(part[own] for part in told(PROMPTS, SLOTS))


# ---- training with vLLM ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "objective"), [("colocate", "paper"), ("colocate", "per_row"), ("server", "paper")], ids=str
)
def test_training_with_an_exact_sampler(
    make: Make, monkeypatch: pytest.MonkeyPatch, model_dirs: dict[str, str], mode: str, objective: str
) -> None:
    """TRL's weights are then 1, at the temperatures of sampling, whatever those of the loss; and it trains as without
    vLLM, on the same completions."""
    stand_in(monkeypatch, lambda: Sampler(model_dirs["llama"]))
    turn, said = GRPOTrainer._generate_single_turn, []

    def remembered(self: Any, *args: Any, **kwargs: Any) -> Any:
        said.append(turn(self, *args, **kwargs))
        return said[-1]

    with_vllm = {"use_vllm": True, "vllm_mode": mode, "vllm_importance_sampling_mode": "token_truncate"}
    found = []
    for more in (with_vllm, {**with_vllm, "vllm_importance_sampling_correction": False}, {}):
        again = iter(said)

        def repeated(self: Any, *_: Any, again: Any = again, **__: Any) -> Any:
            ids, logprobs = next(again)
            return ids, logprobs if self.use_vllm else None

        monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", repeated if found else remembered)
        trainer = make(
            **more, temperature_objective=objective, max_steps=4, num_iterations=2, beta=0.02, learning_rate=1e-3,
            max_completion_length=6,
        )  # fmt: skip
        trainer.train()
        found.append((trainer.state.log_history[:-1], [p.detach() for p in trainer.model.parameters()]))
    corrected, uncorrected, without = found
    generated = [log for log in corrected[0] if "sampling/importance_sampling_ratio/mean" in log]
    assert len(generated) == 2
    for log in generated:
        for kind in ("min", "mean", "max"):
            assert log[f"sampling/importance_sampling_ratio/{kind}"] == pytest.approx(1, abs=1e-4)
        assert log["sampling/sampling_logp_difference/max"] < 1e-4
    assert without[0][1]["kl"] > 1e-4 and without[0][1]["clip_ratio/region_mean"] > 0  # it moved
    for (logs, parameters), rtol in ((uncorrected, 0.0), (corrected, 1e-3)):
        for ours, theirs in zip(logs, without[0], strict=True):
            for name in ("loss", "grad_norm", "kl", "entropy"):
                assert ours[name] == pytest.approx(theirs[name], rel=rtol, abs=rtol / 100), name
        for a, b in zip(parameters, without[1], strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=rtol / 2)


@pytest.mark.parametrize(("objective", "correction"), [("paper", True), ("per_row", True), ("per_row", False)])
def test_an_exact_sampler_is_not_off_policy(
    make: Make, monkeypatch: pytest.MonkeyPatch, model_dirs: dict[str, str], objective: str, correction: bool
) -> None:
    """The mask sees no gap of temperatures, under `paper` neither."""
    stand_in(monkeypatch, lambda: Sampler(model_dirs["llama"]))
    vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_importance_sampling_mode": "token_truncate"}
    losses = []
    for threshold in (None, 0.01):
        trainer = make(
            **vllm, vllm_importance_sampling_correction=correction, temperature_objective=objective,
            off_policy_mask_threshold=threshold, max_steps=1,
        )  # fmt: skip
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0] != 0
