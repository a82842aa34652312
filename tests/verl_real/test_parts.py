"""The agent loop, the reward, the head and the counts of constraints, each through what verl does with it."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch
from helpers.inputs import make_tokenizer
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap, _agent_loop_registry
from verl.models.transformers.dense_common import forward_with_torch_backend
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.replica import TokenOutput

from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.integrations.verl.estimator import constraint_counts
from mdpgrpo_fast.integrations.verl.head import install
from mdpgrpo_fast.rewards.functions import RewardError

# ---- the agent loop -------------------------------------------------------------------------------------------------


class Server:
    """In place of verl's client of an LLM server: keeps what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    async def generate(self, *, sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        self.asked.append(sampling_params)
        return TokenOutput(token_ids=[5, 6, 7], log_probs=[-1.0, -2.0, -3.0], extra_fields={})


def settings(**rollout: Any) -> Any:
    val = {"temperature": 0, "top_p": 1.0, "top_k": -1}
    return OmegaConf.create(
        {
            "algorithm": {"mdp_grpo": {"num_generations": 4}},
            "actor_rollout_ref": {
                "rollout": {
                    "prompt_length": 64, "response_length": 16, "temperature": 1.0, "top_p": 0.9, "top_k": 50,
                    "val_kwargs": val, "full_determinism": False, **rollout,
                }
            },
            "data": {"apply_chat_template_kwargs": {}},
        }
    )  # fmt: skip


def loop_of(config: Any, server: Server) -> Any:
    """As verl's worker makes one for each completion."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return instantiate(
        config=_agent_loop_registry["mdp_grpo"], trainer_config=DictConfigWrap(config), server_manager=server,
        tokenizer=tokenizer, processor=None, hf_model_type="llama", dataset_cls=RLHFDataset,
        data_config=DictConfigWrap(config.data), tools=ToolListWrap([]),
    )  # fmt: skip


def asked(config: Any, sampling: dict[str, Any], sessions: list[int | None]) -> tuple[list[float], list[Any]]:
    server = Server()

    async def run() -> list[Any]:
        prompt = [{"role": "user", "content": "a b c"}]
        more: list[dict[str, Any]] = [{} if s is None else {"session_id": s} for s in sessions]
        loops = [loop_of(config, server) for _ in sessions]
        return [await loop.run(sampling, raw_prompt=prompt, **m) for loop, m in zip(loops, more, strict=True)]

    outputs = asyncio.run(run())
    return [p["temperature"] for p in server.asked], outputs


TRAINING = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.0, "logprobs": True}


def test_each_completion_of_a_prompt_has_its_own_temperature() -> None:
    shared = dict(TRAINING)  # one object for all completions of a prompt, in verl
    taus, outputs = asked(settings(), shared, [0, 1, 2, 3])
    assert taus == [0.1, 0.4, 0.7, 1.0] and shared == TRAINING
    assert [o.extra_fields["sampling_temperature"] for o in outputs] == taus
    assert outputs[0].response_ids == [5, 6, 7] and outputs[0].response_mask == [1, 1, 1]


def test_a_validation_and_one_temperature_are_left_as_they_are() -> None:
    greedy = {"temperature": 0, "top_p": 1.0, "top_k": -1}
    assert asked(settings(), greedy, [0, 1])[0] == [0, 0]
    config = settings(temperature=0.6)
    config.algorithm.mdp_grpo.multi_temperature = False
    assert asked(config, {**TRAINING, "temperature": 0.6}, [0, None])[0] == [0.6, 0.6]


@pytest.mark.parametrize(
    ("config", "sessions", "said"),
    [
        (settings(temperature=0.7), [0], "rollout.temperature must be 1 with multi_temperature"),
        (settings(val_kwargs={"temperature": 1.0, "top_p": 0.9, "top_k": 50}), [0], "val_kwargs must differ"),
        (settings(), [None], "trainer.use_v1 must be True"),
    ],
)
def test_sampling_that_would_be_wrong_is_refused(config: Any, sessions: list[int | None], said: str) -> None:
    with pytest.raises(Exception, match=said) as found:  # hydra wraps what a constructor raises
        asked(config, TRAINING, sessions)
    assert "ConfigError" in repr(found.value) or isinstance(found.value, ConfigError)


# ---- the reward -----------------------------------------------------------------------------------------------------

TRUTH = {
    "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase", "keywords:existence"],
    "kwargs": [{}, {}, {"keywords": ["apple"]}],
}


def reward_of(name: str, **kwargs: Any) -> Any:
    """The function that verl's reward manager calls."""
    path = "pkg://mdpgrpo_fast.integrations.verl.reward"
    chosen = {"path": path, "name": name, "reward_kwargs": kwargs}
    return get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": chosen}}))


def score(text: str, truth: Any, name: str = "compute_score", **kwargs: Any) -> dict[str, Any]:
    function = reward_of(name, **kwargs)
    found = function(data_source="demo", solution_str=text, ground_truth=truth, extra_info={"num_turns": 2})
    if name.endswith("async"):
        assert inspect.iscoroutinefunction(function)
        return asyncio.run(found)
    assert not inspect.iscoroutinefunction(function)
    return found


@pytest.mark.parametrize("name", ["compute_score", "compute_score_async"])
@pytest.mark.parametrize("truth", [TRUTH, json.dumps(TRUTH)], ids=["object", "text"])
def test_the_share_of_the_constraints_and_their_counts(name: str, truth: Any) -> None:
    text = "An apple is red. It tastes good and it is round."
    assert score(text, truth, name) == {"score": 2 / 3, "constraints": 3, "satisfied": 2, "all_satisfied": 0.0}
    assert score(text.lower(), truth, name)["all_satisfied"] == 1.0
    assert score(text, truth, name, constraint_reward="all")["score"] == 0.0
    with pytest.raises(ConfigError, match="constraint_reward must be one of share, all, loose; got 'any'"):
        score(text, truth, name, constraint_reward="any")


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        ("{}", "it has no instruction_id_list"),
        ("no JSON", "ground_truth must be JSON"),
        ({"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}, "no_comma"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "one entry per instruction id"),
    ],
)
def test_a_ground_truth_that_cannot_be_used_is_named(truth: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        score("a", truth)


def test_a_check_that_never_ends_does_not_stop_the_run(tmp_path: Any) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import re\nfrom mdpgrpo_fast.verifiers import instruction\n\n"
        "@instruction('mine:slow')\ndef slow(text: str) -> bool:\n"
        "    return bool(re.fullmatch('(a+)+b', text))\n",
        encoding="utf-8",
    )
    truth = {"instruction_id_list": ["mine:slow"], "kwargs": [{}]}
    options = {"instructions": [str(slow)], "timeout": 2.0}
    assert score("ab", truth, **options)["score"] == 1.0
    began = time.monotonic()
    with pytest.raises(RewardError, match="no answer within 2 s"):
        score("a" * 64, truth, **options)
    assert time.monotonic() - began < 60  # such a match takes years
    assert score("ab", truth, **options)["score"] == 1.0


# ---- the head -------------------------------------------------------------------------------------------------------


def model_of(kind: str) -> PreTrainedModel:
    sizes = {
        "vocab_size": 131, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "attn_implementation": "eager",
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    config = Gemma2Config(**sizes, final_logit_softcapping=2.0, query_pre_attn_scalar=8)
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_log_probs_and_entropy_are_those_of_the_models_logits(kind: str) -> None:
    model, g = model_of(kind), torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # logits that the soft-cap bends
    ids = torch.randint(131, (1, 23), generator=g)
    labels, tau = torch.roll(ids, -1, dims=-1), 0.7
    given = {"input_ids": ids, "attention_mask": None, "position_ids": torch.arange(23)[None]}
    before = model(**given).logits
    logp = (before / tau).log_softmax(-1)
    expected, entropy = logp.gather(-1, labels[..., None])[..., 0], -(logp.exp() * logp).sum(-1)
    expected.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    theirs = forward_with_torch_backend(model, **given, temperature=tau, shift_labels=labels, return_dict=True)
    install(model)
    ours = model(**given, temperature=tau, shift_labels=labels, return_dict=True, use_cache=False)
    assert torch.allclose(ours.log_probs, expected, atol=1e-5) and torch.allclose(ours.entropy, entropy, atol=1e-5)
    assert torch.equal(model(**given).logits, before)  # all other calls are as they were
    ours.log_probs.sum().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, gradients[name], atol=1e-4, rtol=1e-4), name
    # verl's fused head leaves the soft-cap out.
    assert torch.allclose(theirs.log_probs, expected, atol=1e-4) == (kind == "llama")


def test_a_model_for_flash_attention_is_looked_at_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's default, which cannot run where verl builds a model: on a CPU."""
    model = model_of("llama")
    # What a model gets by attn_implementation="flash_attention_2" where the package is there.
    object.__setattr__(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ImportError):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))
    install(model)
    assert model.config._attn_implementation == "flash_attention_2"


def test_packed_rows_under_autocast() -> None:
    """As verl's engine calls on a GPU: completions one after the other in one row, in bfloat16, labels rolled over."""
    model, g = model_of("gemma2"), torch.Generator().manual_seed(0)
    model.config._attn_implementation = "sdpa"
    install(model)
    rows = [torch.randint(131, (1, n), generator=g) for n in (9, 5)]
    packed, positions = torch.cat(rows, 1), torch.cat([torch.arange(9), torch.arange(5)])[None]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(
            input_ids=packed, attention_mask=None, position_ids=positions, temperature=0.7,
            shift_labels=torch.roll(packed, -1, dims=-1), return_dict=True, use_cache=False,
        )  # fmt: skip
        for ids, found in zip(rows, out.log_probs.split([9, 5], dim=1), strict=True):
            logp = (model(input_ids=ids).logits.float() / 0.7).log_softmax(-1)[:, :-1]
            expected = logp.gather(-1, ids[:, 1:, None])[..., 0]
            assert out.log_probs.dtype == torch.float32
            assert torch.allclose(found[:, :-1], expected, atol=0.05)


def test_labels_of_padded_rows_are_the_next_tokens() -> None:
    model = model_of("llama")
    install(model)
    ids = torch.randint(131, (2, 9), generator=torch.Generator().manual_seed(0))
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), temperature=1.0, return_dict=True)
    logp = model(input_ids=ids).logits.log_softmax(-1)[:, :-1]
    assert torch.allclose(out.log_probs[:, :-1], logp.gather(-1, ids[:, 1:, None])[..., 0], atol=1e-5)


# ---- counts of constraints ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def queue() -> Iterator[Any]:
    import transfer_queue as tq

    ray.shutdown()  # a look into the queue starts it
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    yield tq
    tq.close()
    ray.shutdown()


def put(queue: Any, uid: str, session: int, extra: dict[str, Any]) -> None:
    """A completion as AgentLoopWorkerTQ keeps it."""
    row = {"responses": torch.arange(3), "uid": uid, "extra_fields": extra}
    queue.kv_batch_put(
        keys=[f"{uid}_{session}_0"], fields=list_of_dict_to_tensordict([row]), tags=[{"status": "success"}],
        partition_id="train",
    )  # fmt: skip


def test_the_counts_come_from_what_the_reward_function_returned(queue: Any) -> None:
    for uid, count in (("b-1", 3), ("a-2", 5)):
        for session in (1, 2):  # the first of the group failed
            extra = {"reward_extra_info": {"score": 0.5, "constraints": count}, "sampling_temperature": 0.1}
            put(queue, uid, session, extra)
    assert constraint_counts(["a-2", "b-1"], {}, multi_temperature=True) == [5, 3]
    assert constraint_counts(["a-2", "b-1"], {"num_constraints": 7}) == [7, 7]
    put(queue, "c-3", 0, {"reward_extra_info": {"acc": 0.5}})
    with pytest.raises(ConfigError, match="it told no constraints of the prompt c-3"):
        constraint_counts(["c-3"], {})
    with pytest.raises(ConfigError, match="another agent loop drew the completions"):
        constraint_counts(["c-3"], {}, multi_temperature=True)
    with pytest.raises(ConfigError, match="cannot find the constraints"):
        constraint_counts(["d-4"], {})
