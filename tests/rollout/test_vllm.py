"""vLLM as the rollout engine, against stand-ins for its package and server; the calls against its real sources."""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import inspect
import json
import math
import os
import socket
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdpgrpo_fast.config import ConfigError
from mdpgrpo_fast.models.load import load
from mdpgrpo_fast.models.policy import Policy
from mdpgrpo_fast.rollout.generate import generate
from mdpgrpo_fast.rollout.vllm import sampler as sampler_module
from mdpgrpo_fast.rollout.vllm import worker
from mdpgrpo_fast.rollout.vllm.local import VLLMEngine
from mdpgrpo_fast.rollout.vllm.sampler import Completion, RolloutError, with_policy_logprobs
from mdpgrpo_fast.rollout.vllm.server import VLLMServer
from mdpgrpo_fast.rollout.vllm.worker import WeightSync, bit_sum

PROMPTS = [[5, 6, 7], [8], [9, 10]]
TAUS = [0.5, 1.0] * 3  # two completions of each
EOS = [1, 2]
ARGS: dict[str, Any] = {"num_generations": 2, "temperature": TAUS, "eos": EOS, "max_new_tokens": 4}


# ---- stand-ins ------------------------------------------------------------------------------------------------------


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Parameters of a trainer's model in float32, under the names that transformers gives them."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"q_proj": (6, 4), "k_proj": (2, 4), "v_proj": (2, 4)}
    named = {f"model.layers.0.self_attn.{n}.weight": torch.randn(*s, generator=g) for n, s in sizes.items()}
    named["model.embed_tokens.weight"] = torch.randn(5, 4, generator=g)
    named["model.norm.weight"] = torch.randn(4, generator=g)
    return named


class FusedModel(nn.Module):
    """Holds q, k and v in one parameter and a vocabulary padded with zeros, in bfloat16, as vLLM does."""

    packed_modules_mapping = types.MappingProxyType({"qkv_proj": ["q_proj", "k_proj", "v_proj"]})
    rows = types.MappingProxyType({"q_proj": (0, 6), "k_proj": (6, 8), "v_proj": (8, 10)})

    def __init__(self, skip: str = "") -> None:
        super().__init__()
        self.skip, self.loads = skip, 0
        sizes = {"model.layers.0.self_attn.qkv_proj.weight": (10, 4), "model.embed_tokens.weight": (8, 4)}
        self.held = {
            name: nn.Parameter(torch.zeros(*size, dtype=torch.bfloat16), requires_grad=False)
            for name, size in {**sizes, "model.norm.weight": (4,)}.items()
        }

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.held.items()

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        self.loads += 1
        for name, tensor in weights:
            part = name.split(".")[-2]
            if part == self.skip:
                continue
            if part in self.rows:
                first, last = self.rows[part]
                self.held["model.layers.0.self_attn.qkv_proj.weight"][first:last].copy_(tensor)
            else:
                self.held[name][: len(tensor)].copy_(tensor)


class Worker(WeightSync):
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def get_model(self) -> nn.Module:
        return self.model


def answer(prompt: list[int], settings: dict[str, Any]) -> tuple[list[int], list[float], str]:
    """What the stand-ins sample: tokens that tell the prompt, log-probs that tell the temperature and the position."""
    n = min(sum(prompt) % 5 + 1, settings["max_tokens"])
    tokens = [20 + (sum(prompt) + j) % 30 for j in range(n)]
    ends = n < settings["max_tokens"]
    if ends:
        tokens[-1] = settings["stop_token_ids"][-1]
    return tokens, [-settings["temperature"] - j / 8 for j in range(n)], "stop" if ends else "length"


class FakeLLM:
    """The part of vllm.LLM that is called, with a record of the calls."""

    def __init__(self, log: list[tuple[str, tuple[Any, ...], dict[str, Any]]], *args: Any, **kwargs: Any) -> None:
        self.log, self.workers, self.reset = log, [Worker(FusedModel())], True
        self.multiprocessing = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
        self.lose: Callable[[int], bool] = lambda _: False
        log.append(("__init__", args, kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> list[Any]:
        self.log.append(("generate", args, kwargs))
        out = []
        for i, (prompt, params) in enumerate(zip(*args, strict=True)):
            tokens, logprobs, reason = answer(prompt["prompt_token_ids"], vars(params))
            steps = [{t: types.SimpleNamespace(logprob=v)} for t, v in zip(tokens, logprobs, strict=True)]
            one = types.SimpleNamespace(token_ids=tokens, logprobs=steps, finish_reason=reason)
            if self.lose(i):
                one.finish_reason = "abort"
            out.append(types.SimpleNamespace(outputs=[one]))
        return out

    def collective_rpc(self, *args: Any, **kwargs: Any) -> list[Any]:
        self.log.append(("collective_rpc", args, kwargs))
        return [getattr(w, args[0])(*kwargs.get("args", ())) for w in self.workers]

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        self.log.append(("reset_prefix_cache", args, kwargs))
        return self.reset

    def sleep(self, *args: Any, **kwargs: Any) -> None:
        self.log.append(("sleep", args, kwargs))

    def wake_up(self, *args: Any, **kwargs: Any) -> None:
        self.log.append(("wake_up", args, kwargs))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The calls that a stand-in vllm package receives."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    fake: Any = types.ModuleType("vllm")
    fake.LLM = lambda *args, **kwargs: FakeLLM(calls, *args, **kwargs)
    fake.SamplingParams = lambda **kwargs: types.SimpleNamespace(**kwargs)
    fake.TokensPrompt = dict
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return calls


@pytest.fixture
def engine(log: list[Any]) -> Any:
    return VLLMEngine("some/model", device="cpu")


class FakeServer(ThreadingHTTPServer):
    """The routes of a vLLM server that are called; `fault` may answer in their place, by returning True."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        self.log: list[tuple[str, str, Any]] = []
        self.workers = [Worker(FusedModel())]
        self.mode, self.extension, self.dev, self.reset = "processed_logprobs", worker.EXTENSION, True, True
        self.fault: Callable[[Any, str, Any], bool] = lambda handler, path, body: False
        super().__init__(("127.0.0.1", 0), FakeHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, path: str) -> int:
        return sum(p == path for _, p, _ in self.log)


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *_: Any) -> None: ...

    def send(self, value: Any, status: int = 200, length: int = 0) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) + length))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.serve(None)

    def do_POST(self) -> None:
        self.serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def serve(self, body: Any) -> None:
        server, path = self.server, self.path.split("?")[0]
        server.log.append((self.command, path, body))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if server.fault(self, path, body):
                return
            if path == "/v1/models":
                self.send({"data": [{"id": "served"}]})
            elif path == "/v1/completions":
                tokens, logprobs, reason = answer(body["prompt"], body)
                choice = {"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}
                self.send({"choices": [choice]})
            elif not server.dev:
                self.send({"detail": "Not Found"}, 404)
            elif path == "/server_info":
                config = {"worker_extension_cls": server.extension}
                self.send({"vllm_config": {"model_config": {"logprobs_mode": server.mode}, "parallel_config": config}})
            elif path == "/collective_rpc":
                self.send({"results": [getattr(w, body["method"])(*body["args"]) for w in server.workers]})
            else:
                self.send({"success": server.reset})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    fake = FakeServer()
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()


def client(server: FakeServer, **knobs: Any) -> VLLMServer:
    return VLLMServer(server.url, device="cpu", **{"backoff": 0.001, "retries": 2, "timeout": 20.0, **knobs})


@pytest.fixture(params=["engine", "server"])
def sampler(request: pytest.FixtureRequest) -> Any:
    """Either mode, with its stand-in as `.fake`."""
    if request.param == "engine":
        made = request.getfixturevalue("engine")
        made.fake = made._llm
    else:
        fake = request.getfixturevalue("server")
        made = client(fake)
        made.fake = fake
    return made


# ---- the checksum ---------------------------------------------------------------------------------------------------


def bit_sum_by_hand(bits: list[int]) -> int:
    """bit_sum of sign-extended bit patterns, in Python's integers."""
    total = 0
    for x in bits:
        for odd, shift in ((0x9E3779B97F4A7C15, 32), (0xC4CEB9FE1A85EC53, 29)):
            x = x * odd % 2**64
            x ^= x >> shift
        total += x
    return (total + 2**63) % 2**64 - 2**63


def test_bit_sum_is_the_sum_of_the_mixed_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_STEP", 7)
    g = torch.Generator().manual_seed(0)
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float64, torch.int64)):
        x = torch.randn(5, 9, generator=g).to(dtype)
        assert bit_sum(x) == bit_sum_by_hand(x.view(bits).flatten().tolist())
    assert bit_sum(torch.zeros(0)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_bit_sum_survives_fusing_sharding_padding_and_transposing(dtype: torch.dtype) -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = bit_sum(x[:10]) + bit_sum(x[10:])
    assert (parts - bit_sum(x)) % 2**64 == 0
    assert bit_sum(x.t()) == bit_sum(x)
    assert bit_sum(torch.cat([x, torch.zeros(8, 16).to(dtype)])) == bit_sum(x)


def test_bit_sum_sees_one_bit_and_changes_that_cancel() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    sums = {bit_sum(x)}
    for i in range(16):
        y = x.clone()
        y.view(torch.int16)[500] ^= -(2**15) if i == 15 else 2**i
        sums.add(bit_sum(y))
    y = x.clone()
    y.view(torch.int16)[3] += 1
    y.view(torch.int16)[4] -= 1
    sums.add(bit_sum(y))
    assert len(sums) == 18


# ---- generate, in both modes ----------------------------------------------------------------------------------------


def test_a_rollout_has_the_rows_in_order_with_what_was_drawn(sampler: Any) -> None:
    r = sampler.generate(PROMPTS, **ARGS)
    assert r.prompt_ids.tolist() == [[5, 6, 7]] * 2 + [[1, 1, 8]] * 2 + [[1, 9, 10]] * 2
    assert r.prompt_mask.sum(1).tolist() == [3, 3, 1, 1, 2, 2]
    # The sums of the prompts are 18, 8 and 19: 4 tokens each at most, the last prompt's being cut at the limit too.
    assert r.lengths.tolist() == [4] * 6 and not r.finished.any()
    r = sampler.generate(PROMPTS, **{**ARGS, "max_new_tokens": 5})
    assert r.lengths.tolist() == [4, 4, 4, 4, 5, 5] and r.finished.tolist() == [True] * 4 + [False] * 2
    assert r.tokens.shape == (6, 5) and r.tokens.dtype == torch.int64
    assert r.tokens[2].tolist() == [28, 29, 30, EOS[-1], EOS[0]]
    assert torch.equal(r.temperature, torch.tensor(TAUS))
    expected = -torch.tensor(TAUS)[:, None] - torch.arange(5) / 8
    assert torch.equal(r.sampling_logprobs, expected.masked_fill(~r.mask, 0))
    assert r.policy_logprobs.shape == (6, 5) and r.policy_logprobs.isnan().all()
    assert sampler.logprobs_mode == "processed_logprobs"


def sent_settings(sampler: Any) -> list[dict[str, Any]]:
    """The settings of each row of the last generate()."""
    if isinstance(sampler, VLLMEngine):
        return [vars(p) for p in next(args[1] for name, args, _ in reversed(sampler.fake.log) if name == "generate")]
    return [body for _, path, body in sampler.fake.log if path == "/v1/completions"]


def test_sampling_settings_of_a_row(sampler: Any) -> None:
    sampler.generate(PROMPTS[:1], temperature=[0.7], eos=EOS, max_new_tokens=3, top_k=5, top_p=0.9, min_p=0.1)
    (row,) = sent_settings(sampler)
    want = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "max_tokens": 3, "logprobs": 0, "seed": None}
    # What the model's own files ask for must not come in.
    want |= {"stop_token_ids": EOS, "ignore_eos": True, "repetition_penalty": 1.0}
    want |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert {k: row[k] for k in want} == want


def test_greedy_has_temperature_zero_and_no_truncation(sampler: Any) -> None:
    r = sampler.generate(
        PROMPTS[:1], temperature=None, eos=EOS, max_new_tokens=3, top_k=5, top_p=0.9, min_p=0.1, seed=3
    )
    (row,) = sent_settings(sampler)
    assert [row[k] for k in ("temperature", "top_k", "top_p", "min_p", "seed")] == [0.0, 0, 1.0, 0.0, None]
    assert r.temperature.tolist() == [0.0]


def test_a_seed_gives_each_row_its_own_and_the_same_again(sampler: Any) -> None:
    seen = []
    for seed in (3, 3, 4):
        sampler.generate(PROMPTS, **ARGS, seed=seed)
        seen.append(sorted(row["seed"] for row in sent_settings(sampler)[-6:]))
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
def test_bad_arguments_of_generate(sampler: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as e:
        sampler.generate(**{"prompts": PROMPTS, **ARGS, **change})
    assert "\n" not in str(e.value)


# ---- sync, in both modes --------------------------------------------------------------------------------------------


def test_after_a_sync_the_sampler_holds_the_weights(sampler: Any) -> None:
    for version in (0, 1):
        named = weights(version)
        sampler.sync(named.items(), version)
        held = sampler.fake.workers[0].model.held
        qkv = torch.cat([named[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"])
        assert torch.equal(held["model.layers.0.self_attn.qkv_proj.weight"], qkv.bfloat16())
        assert torch.equal(held["model.embed_tokens.weight"][:5], named["model.embed_tokens.weight"].bfloat16())
        assert sampler.version == version and sampler.fake.workers[0].mdpgrpo_version() == [str(version)]
    assert sampler.generate(PROMPTS, **ARGS).tokens.shape == (6, 4)


@pytest.mark.parametrize("part", ["k_proj", "norm", "embed_tokens"])
def test_a_weight_that_did_not_arrive_is_named(sampler: Any, part: str) -> None:
    sampler.sync(weights(0).items(), 0)
    sampler.fake.workers[0].model.skip = part
    held = "qkv_proj" if part == "k_proj" else part
    with pytest.raises(RolloutError, match=rf"version 1: checksum of 'model\.[\w.]*{held}\.weight' must be") as e:
        sampler.sync(weights(1).items(), 1)
    assert "\n" not in str(e.value)
    # The old version's name must not stand for a mixture.
    assert sampler.version is None and sampler.fake.workers[0].mdpgrpo_version() == [""]


def test_weights_left_out_or_unknown_are_named(sampler: Any) -> None:
    named = weights()
    without = {k: v for k, v in named.items() if "norm" not in k}
    with pytest.raises(RolloutError, match=r"holds 'model.norm.weight', and 1 in all, that no weights were sent for"):
        sampler.sync(without.items(), 0)
    without = {k: v for k, v in named.items() if "k_proj" not in k}
    with pytest.raises(RolloutError, match="qkv_proj"):
        sampler.sync(without.items(), 0)
    with pytest.raises(RolloutError, match=r"holds no parameter for 'visual\.weight'"):
        sampler.sync([*named.items(), ("visual.weight", torch.ones(1))], 0)
    assert sampler.version is None


def test_a_second_name_of_tied_weights_is_passed_over(sampler: Any) -> None:
    named = weights()
    sampler.sync([*named.items(), ("lm_head.weight", named["model.embed_tokens.weight"])], 0)
    assert sampler.version == 0
    with pytest.raises(RolloutError, match=r"holds no parameter for 'lm_head\.weight'"):
        sampler.sync([*named.items(), ("lm_head.weight", named["model.embed_tokens.weight"] + 1)], 0)


def test_merged_weights_may_be_taken_back_when_the_iterator_ends(sampler: Any) -> None:
    """What a LoRA merge in place does."""

    def merged() -> Iterator[tuple[str, Tensor]]:
        named = {k: v.bfloat16() for k, v in weights().items()}
        yield from named.items()
        for tensor in named.values():
            tensor.zero_()

    sampler.sync(merged(), 0)
    assert sampler.fake.workers[0].model.held["model.norm.weight"].abs().sum() > 0


def test_weights_go_in_batches_of_bounded_size(sampler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "SYNC_BYTES", 40)
    sampler.sync(weights().items(), 0)
    # 48 bytes of q; 16 of k, 16 of v and 40 of the embedding; the norm's 8.
    assert sampler.fake.workers[0].model.loads == 3


def test_shards_and_replicas_of_several_workers_are_checked(sampler: Any) -> None:
    class Shard(FusedModel):
        """Half of the embedding's columns; all of the others."""

        def __init__(self, rank: int) -> None:
            super().__init__()
            self.columns = slice(2 * rank, 2 * rank + 2)
            self.held["model.embed_tokens.weight"] = nn.Parameter(torch.zeros(8, 2).bfloat16(), requires_grad=False)

        def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
            super().load_weights([(n, t[:, self.columns] if "embed" in n else t) for n, t in weights])

    sampler.fake.workers = [Worker(Shard(0)), Worker(Shard(1))]
    sampler.sync(weights(0).items(), 0)
    assert sampler.version == 0
    sampler.fake.workers[1].model.skip = "norm"
    with pytest.raises(RolloutError, match=r"'model\.norm\.weight'"):
        sampler.sync(weights(1).items(), 1)


def test_a_prefix_cache_of_old_weights_is_an_error(sampler: Any) -> None:
    sampler.fake.reset = False
    with pytest.raises(RolloutError, match="prefix cache"):
        sampler.sync(weights().items(), 0)
    assert sampler.version is None


def test_policy_logprobs_come_from_the_trainers_model(model_dirs: dict[str, str]) -> None:
    model, _ = load(model_dirs["llama"], "float32")
    torch.manual_seed(0)
    taus = [0.5, 1.0, 1.5]
    r = generate(model, [[40, 41, 42], [50], [60, 61]], temperature=taus, eos=[1], max_new_tokens=6)
    blank = replace(r, policy_logprobs=torch.full_like(r.policy_logprobs, torch.nan))
    filled = with_policy_logprobs(blank, Policy(model), micro_batch_size=2, backend="torch")
    assert torch.allclose(filled.policy_logprobs[r.mask], r.policy_logprobs[r.mask], atol=2e-5)
    assert filled.sampling_logprobs is r.sampling_logprobs


# ---- colocated ------------------------------------------------------------------------------------------------------


def test_one_generate_call_with_a_list_of_sampling_parameters(engine: Any, log: list[Any]) -> None:
    engine.generate(PROMPTS, **ARGS)
    ((_, (prompts, params), kwargs),) = [call for call in log if call[0] == "generate"]
    assert [p["prompt_token_ids"] for p in prompts] == [p for p in PROMPTS for _ in range(2)]
    assert [p.temperature for p in params] == TAUS
    assert not any(p.detokenize for p in params) and kwargs == {"use_tqdm": False}


def test_the_engine_runs_in_this_process_and_leaves_the_environment(
    engine: Any, log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dict(log[0][2])
    assert engine._llm.multiprocessing == "0" and "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
    assert made["logprobs_mode"] == "processed_logprobs" and made["generation_config"] == "vllm"
    assert made["worker_extension_cls"] == f"{WeightSync.__module__}.{WeightSync.__qualname__}"
    assert "distributed_executor_backend" not in made
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    VLLMEngine("some/model", device="cpu", max_num_seqs=8)
    assert log[-1][2]["distributed_executor_backend"] == "external_launcher" and log[-1][2]["max_num_seqs"] == 8
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"


def test_sleep_sync_and_generate_follow_each_other(engine: Any, log: list[Any]) -> None:
    engine.sync(weights(0).items(), 0)
    engine.generate(PROMPTS, **ARGS)
    del log[:]
    engine.sleep()
    engine.sleep()
    with pytest.raises(RolloutError, match=r"sync\(\) must come before generate\(\)"):
        engine.generate(PROMPTS, **ARGS)
    engine.sync(weights(1).items(), 1)
    engine.generate(PROMPTS, **ARGS)
    steps = [
        (kw.get("level") or kw.get("tags") or (args[:1] if name == "collective_rpc" else name))
        for name, args, kw in log
    ]
    assert steps == [
        2,
        ["weights"],
        ("mdpgrpo_version",),
        ("mdpgrpo_load",),
        ("mdpgrpo_sums",),
        "reset_prefix_cache",
        ("mdpgrpo_version",),
        ["kv_cache"],
        "generate",
    ]


def test_without_sleep_mode_nothing_is_freed(log: list[Any]) -> None:
    engine = VLLMEngine("some/model", device="cpu", sleep_mode=False)
    engine.sleep()
    engine.generate(PROMPTS, **ARGS)
    assert log[0][2]["enable_sleep_mode"] is False
    assert [name for name, *_ in log] == ["__init__", "generate"]


def test_completions_that_came_are_kept_when_vllm_aborts_some(engine: Any) -> None:
    engine._llm.lose = lambda i: i in (1, 4)
    with pytest.raises(RolloutError, match="returned 4 of 6 completions: finish_reason must be stop or length") as e:
        engine.generate(PROMPTS, **ARGS)
    assert [c is None for c in e.value.partial] == [False, True, False, False, True, False]
    assert e.value.partial[2] == Completion([28, 29, 30, 31], [-0.5, -0.625, -0.75, -0.875], False)


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="needs the package vllm"):
        VLLMEngine("some/model", device="cpu")


# ---- server ---------------------------------------------------------------------------------------------------------


def test_the_files_of_a_sync_are_gone_after_it(server: FakeServer, tmp_path: Path) -> None:
    sampler = client(server, sync_dir=str(tmp_path))
    sampler.sync(weights().items(), 0)
    (path,) = [
        body["args"][0] for _, p, body in server.log if p == "/collective_rpc" and body["method"] == "mdpgrpo_load"
    ]
    assert Path(path).is_relative_to(tmp_path) and not any(tmp_path.iterdir())


def failing(times: int, path: str, fault: Callable[[Any], None]) -> Callable[[Any, str, Any], bool]:
    """The first `times` requests of a path are answered by fault()."""
    left, lock = [times], threading.Lock()

    def answers(handler: Any, at: str, body: Any) -> bool:
        with lock:
            mine = at == path and left[0] > 0
            left[0] -= mine
        if mine:
            fault(handler)
        return mine

    return answers


FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "unavailable": (lambda h: h.send({"error": {"message": "no room\nmore"}}, 503), "HTTP 503 no room$"),
    "busy": (lambda h: h.send(b"wait", 429), "HTTP 429 wait"),
    "not json": (lambda h: h.send(b"<html>"), "cannot be used .JSONDecodeError"),
    "half": (lambda h: h.send(b'{"choices": [', length=50), "IncompleteRead"),
    "closed": (lambda h: h.connection.shutdown(socket.SHUT_RDWR), "closed connection|reset by peer"),
    "no choice": (lambda h: h.send({"choices": []}), "cannot be used .ValueError"),
    "null": (lambda h: h.send(b"null"), "cannot be used .TypeError"),
    "no log-probs": (
        lambda h: h.send({"choices": [{"token_ids": [3], "logprobs": None, "finish_reason": "stop"}]}),
        "cannot be used .TypeError",
    ),
    "a log-prob short": (
        lambda h: h.send(
            {"choices": [{"token_ids": [3, 4], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"}]}
        ),
        "a finite log-prob per token; got 1 for 2",
    ),
    "cut off": (
        lambda h: h.send(
            {"choices": [{"token_ids": [3], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "abort"}]}
        ),
        "finish_reason must be stop or length; got 'abort'",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_passing_fault_is_tried_again_and_a_lasting_one_is_an_error(server: FakeServer, name: str) -> None:
    fault, reason = FAULTS[name]
    sampler, row = client(server), {"temperature": None, "eos": EOS, "max_new_tokens": 4}
    server.fault = failing(2, "/v1/completions", fault)
    assert sampler.generate(PROMPTS[:1], **row).lengths.tolist() == [4]
    assert server.count("/v1/completions") == 3
    server.fault = failing(99, "/v1/completions", fault)
    with pytest.raises(RolloutError, match=reason.removesuffix("$")) as e:
        sampler.generate(PROMPTS[:1], **row)
    assert server.count("/v1/completions") == 6  # once and two retries
    message = str(e.value)
    assert message.startswith(f"vLLM server {server.url} failed 3 times at /v1/completions, the last because ")
    assert message.endswith("; 0 of 1 completions kept") and "\n" not in message and e.value.partial == [None]


def test_an_answer_that_does_not_come_in_time(server: FakeServer) -> None:
    sampler = client(server, timeout=0.2, retries=1)
    held = threading.Event()
    server.fault = failing(99, "/v1/completions", lambda h: held.wait(20) and None)
    with pytest.raises(
        RolloutError, match=r"failed 2 times at /v1/completions, the last because no answer within 0.2 s"
    ):
        sampler.generate(PROMPTS[:1], temperature=None, eos=EOS, max_new_tokens=4)
    held.set()


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as s:  # a port that nothing listens on
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
        with pytest.raises(RolloutError, match=rf"{url} failed 4 times at /v1/models, the last because .*refused"):
            VLLMServer(url, device="cpu", retries=3, backoff=0.001)


def test_the_back_off_doubles_up_to_a_bound(server: FakeServer) -> None:
    waits: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            return False

    sampler = client(server, retries=8, backoff=1.0)
    with pytest.raises(RolloutError, match="failed 9 times"):
        sampler._call("/v1/models", None, lambda answer: answer["nothing"], Stop())
    for got, most in zip(waits, [1, 2, 4, 8, 16, 30, 30, 30], strict=True):
        assert most / 2 <= got <= most


def test_a_refusal_is_not_tried_again_and_says_why(server: FakeServer) -> None:
    sampler = client(server)
    server.fault = failing(9, "/v1/completions", lambda h: h.send({"error": {"message": "too long a prompt"}}, 400))
    with pytest.raises(RolloutError, match="refuses /v1/completions: HTTP 400 too long a prompt; 0 of 1"):
        sampler.generate(PROMPTS[:1], temperature=None, eos=EOS, max_new_tokens=4)
    assert server.count("/v1/completions") == 1


def test_completions_that_came_are_kept_when_the_server_goes(server: FakeServer) -> None:
    sampler = client(server, concurrency=1)

    def gone_after_the_third(handler: Any, path: str, body: Any) -> bool:
        if path != "/v1/completions" or body["prompt"] != PROMPTS[1] or body["temperature"] < 1:
            return False
        handler.send(b"", 500)
        return True

    server.fault = gone_after_the_third
    with pytest.raises(RolloutError, match=r"HTTP 500 Internal Server Error; [3-5] of 6 completions kept") as e:
        sampler.generate(PROMPTS, **ARGS)
    assert [c is not None for c in e.value.partial[:4]] == [True, True, True, False]
    assert e.value.partial[0] == Completion([38, 39, 40, 41], [-0.5, -0.625, -0.75, -0.875], False)


def test_a_restarted_server_does_not_pass_for_the_synced_one(server: FakeServer) -> None:
    sampler = client(server)
    sampler.sync(weights().items(), 3)
    sampler.generate(PROMPTS, **ARGS)
    server.workers = [Worker(FusedModel())]
    with pytest.raises(RolloutError, match=r"must hold version 3 of the weights; got \[''\]: was it restarted"):
        sampler.generate(PROMPTS, **ARGS)


def test_a_rank_that_follows_holds_the_server_to_the_same_version(server: FakeServer) -> None:
    sampler, other = client(server), client(server)
    gone_through = iter(weights().items())
    other.follow(gone_through, 1)
    assert next(gone_through, None) is None
    with pytest.raises(RolloutError, match="must hold version 1"):
        other.generate(PROMPTS, **ARGS)
    sampler.sync(weights().items(), 1)
    assert other.generate(PROMPTS, **ARGS).tokens.shape == (6, 4)


def test_a_server_started_without_what_is_needed(server: FakeServer) -> None:
    server.mode = "raw_logprobs"
    with pytest.raises(ConfigError, match="--logprobs-mode must be processed_logprobs; got 'raw_logprobs'"):
        client(server)
    server.mode, server.extension = "processed_logprobs", ""
    with pytest.raises(
        ConfigError, match=r"--worker-extension-cls must be mdpgrpo_fast\.rollout\.vllm\.worker\.WeightSync"
    ):
        client(server)
    server.dev = False
    with pytest.raises(RolloutError, match=r"HTTP 404 Not Found: was it started with VLLM_SERVER_DEV_MODE=1\?"):
        client(server)


@pytest.mark.parametrize(
    ("knobs", "name"),
    [({"url": "localhost:8000"}, "vllm_url"), ({"timeout": 0}, "vllm_timeout"), ({"retries": -1}, "vllm_retries")],
)
def test_bad_settings_of_the_client(knobs: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        VLLMServer(**{"url": "http://127.0.0.1:1", "device": "cpu", **knobs})


# ---- against the real package ---------------------------------------------------------------------------------------


def vllm_sources() -> Path:
    """The installed vLLM's directory. It is read and not imported, which would need its GPU build."""
    spec = importlib.machinery.PathFinder.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vllm is not installed: there are no signatures to compare with")
    return Path(spec.origin).parent


def class_body(path: Path, name: str) -> list[ast.stmt]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next(n.body for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name)


def class_fields(path: Path, name: str) -> set[str]:
    body = class_body(path, name)
    return {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def method_signature(body: list[ast.stmt], name: str) -> inspect.Signature:
    """A method's signature without self, every default being None."""
    node = next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == name).args
    P = inspect.Parameter
    plain = [*node.posonlyargs, *node.args][1:]
    first_default = len(plain) - len(node.defaults)
    found = [
        P(a.arg, P.POSITIONAL_OR_KEYWORD, default=None if i >= first_default else P.empty) for i, a in enumerate(plain)
    ]
    for a, default in zip(node.kwonlyargs, node.kw_defaults, strict=True):
        found.append(P(a.arg, P.KEYWORD_ONLY, default=P.empty if default is None else None))
    if node.kwarg:
        found.append(P(node.kwarg.arg, P.VAR_KEYWORD))
    return inspect.Signature(found)


def test_colocated_calls_fit_the_installed_vllm(engine: Any, log: list[Any]) -> None:
    root = vllm_sources()
    engine.sync(weights(0).items(), 0)
    engine.generate(PROMPTS, **ARGS, seed=1)
    engine.sleep()
    engine.sync(weights(1).items(), 1)
    llm = class_body(root / "entrypoints/llm.py", "LLM")
    for name, args, kwargs in log:
        method_signature(llm, name).bind(*args, **kwargs)
    assert {name for name, *_ in log} >= {"generate", "collective_rpc", "reset_prefix_cache", "sleep", "wake_up"}
    named = set(method_signature(llm, "__init__").parameters)
    assert set(log[0][2]) <= named | class_fields(root / "engine/arg_utils.py", "EngineArgs")
    params = next(args[1][0] for name, args, _ in log if name == "generate")
    assert set(vars(params)) <= class_fields(root / "sampling_params.py", "SamplingParams")
    assert "prompt_token_ids" in class_fields(root / "inputs/llm.py", "TokensPrompt")
    assert {"token_ids", "logprobs", "finish_reason"} <= class_fields(root / "outputs.py", "CompletionOutput")
    assert "logprob" in class_fields(root / "logprobs.py", "Logprob")
    assert "processed_logprobs" in (root / "config/model.py").read_text(encoding="utf-8")


def test_worker_methods_clash_with_none_of_the_installed_vllm() -> None:
    root = vllm_sources()
    for path, name in (("v1/worker/worker_base.py", "WorkerBase"), ("v1/worker/gpu_worker.py", "Worker")):
        methods = {n.name for n in class_body(root / path, name) if isinstance(n, ast.FunctionDef)}
        assert "get_model" in methods and not methods & set(vars(WeightSync)) - {"__init__"}
    llama = class_body(root / "model_executor/models/llama.py", "LlamaForCausalLM")
    assigned = {ast.unparse(n.targets[0]): n.value for n in llama if isinstance(n, ast.Assign)}
    packed = ast.literal_eval(assigned["packed_modules_mapping"])
    assert packed["qkv_proj"] == FusedModel.packed_modules_mapping["qkv_proj"]


def test_requests_fit_the_installed_vllm(server: FakeServer) -> None:
    root = vllm_sources()
    sampler = client(server)
    sampler.sync(weights().items(), 0)
    sampler.generate(PROMPTS, **ARGS, seed=1)
    protocol = root / "entrypoints/openai/completion/protocol.py"
    fields = class_fields(protocol, "CompletionRequest")
    assert all(set(body) <= fields for _, path, body in server.log if path == "/v1/completions")
    assert {"token_ids", "logprobs", "finish_reason"} <= class_fields(protocol, "CompletionResponseChoice")
    assert "token_logprobs" in class_fields(protocol, "CompletionLogProbs")
    routes = set()
    for path in (root / "entrypoints").rglob("api_router.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                route = node.args[0]
                if isinstance(route, ast.Constant) and isinstance(route.value, str):
                    routes.add((node.func.attr.upper(), route.value))
    assert {(method, path) for method, path, _ in server.log} <= routes
