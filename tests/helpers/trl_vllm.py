"""Stand-ins for the vLLM of TRL's trainers: vllm.LLM in the process, and what answers TRL's own client of a server."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.trl import ours  # noqa: F401  all that imports this is skipped without TRL
from trl.generation import vllm_client, vllm_generation

# A prompt's ids, a temperature and the most tokens to (tokens, log-probs).
Sample = Callable[[list[int], float, int], tuple[list[int], list[float]]]
IMAGE = 3  # id of an image's token


class Telling:
    """What it samples tells the prompt, the temperature and how many completions the prompt has had at it."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[Any, ...]] = Counter()

    def __call__(self, prompt: list[int], temperature: float, most: int) -> tuple[list[int], list[float]]:
        key = (*prompt, temperature)
        self.seen[key] += 1
        tokens = [20 + sum(prompt) % 200, int(20 * temperature), 20 + self.seen[key]]
        return tokens, [-temperature, -sum(prompt) / 8, -self.seen[key] / 8]

    def load_weights(self, named: Any) -> None: ...


class Sampler:
    """Samples exactly, with a model of its own that is loaded from where vLLM loads it and given weights as vLLM is."""

    def __init__(self, path: str, end: int = 1) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.end, self.loads = end, 0
        self.random = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def __call__(self, prompt: list[int], temperature: float, most: int) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < most and tokens[-1:] != [self.end]:
            logits = self.model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
            each = (logits / temperature).log_softmax(-1)
            tokens.append(int(torch.multinomial(each.exp(), 1, generator=self.random)))
            logprobs.append(each[tokens[-1]].item())
        return tokens, logprobs

    def load_weights(self, named: Any) -> None:
        own = dict(self.model.named_parameters())
        for name, tensor in named:
            own[name].data.copy_(tensor)
            self.loads += 1


class FakeLLM:
    """The part of vllm.LLM that TRL uses. sample: as `Sample`; requests: (prompt, settings) of each so far."""

    def __init__(self, sample: Any, **settings: Any) -> None:
        self.sample, self.settings = sample, settings
        self.requests: list[tuple[dict[str, Any], Any]] = []
        space = types.SimpleNamespace
        worker = space(model_runner=space(model=sample))
        self.llm_engine = space(
            model_executor=space(driver_worker=worker), model_config=space(max_model_len=settings.get("max_model_len"))
        )

    def generate(self, prompts: list[Any], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        each = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        assert len(each) == len(prompts)
        self.requests += list(zip(prompts, each, strict=True))
        return [self._answer(prompt["prompt_token_ids"], params) for prompt, params in zip(prompts, each, strict=True)]

    def _answer(self, ids: list[int], params: Any) -> Any:
        tokens, logprobs = self.sample(ids, params.temperature, params.max_tokens)
        steps = [{t: types.SimpleNamespace(rank=1, logprob=v)} for t, v in zip(tokens, logprobs, strict=True)]
        one = types.SimpleNamespace(token_ids=tokens, logprobs=steps)
        return types.SimpleNamespace(prompt_token_ids=ids, outputs=[one])

    def reset_prefix_cache(self) -> bool:
        return True


class FakeClient(vllm_client.VLLMClient):  # type: ignore[misc]
    """TRL's client as it is, but for the server's answers. sample: as `Sample`; bodies: what was posted."""

    def __init__(self, sample: Any) -> None:
        self.sample, self.base_url, self.model = sample, "http://server", "served"
        self.bodies: list[dict[str, Any]] = []

    def init_communicator(self, device: Any = 0) -> None: ...

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata: Any, named_params: Any) -> None:
        self.sample.load_weights(named_params)

    def reset_prefix_cache(self) -> None: ...

    def image_features(self, images: Any, max_concurrent_requests: int = 1) -> list[Any]:
        return [found and {"of": found, "mm_placeholders": {"image": [{}] * len(found)}} for found in images]

    def _post(self, url: str, json: Any) -> Any:  # type: ignore[override]
        self.bodies.append(json)
        if url.endswith("/v1/completions"):
            return {"choices": [c for ids in json["prompt"] for c in self._choices(ids, json)]}
        assert url.endswith("/inference/v1/generate"), url
        return {"choices": self._choices(json["token_ids"], json["sampling_params"])}

    def _choices(self, ids: list[int], settings: dict[str, Any]) -> list[dict[str, Any]]:
        found = [self.sample(ids, settings["temperature"], settings["max_tokens"]) for _ in range(settings["n"])]
        return [
            {
                "prompt_token_ids": ids,
                "token_ids": tokens,
                "logprobs": {
                    "tokens": [f"token_id:{t}" for t in tokens],
                    "token_logprobs": logprobs,
                    "top_logprobs": [None] * len(tokens),
                },
            }
            for tokens, logprobs in found
        ]


def stand_in(monkeypatch: pytest.MonkeyPatch, sample: Callable[[], Any]) -> None:
    """TRL's VLLMGeneration finds these in place of vLLM. sample: makes what samples."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        # TRL sets them, and they would reach the processes that later tests start.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda *_: True)
    monkeypatch.setattr(vllm_generation, "LLM", lambda **kw: FakeLLM(sample(), **kw), raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", types.SimpleNamespace, raising=False)
    monkeypatch.setattr(vllm_generation, "VLLMClient", lambda **_: FakeClient(sample()))


def generation(mode: str, rank: int = 0, ranks: int = 1, tensor_parallel: int = 1, **settings: Any) -> Any:
    """TRL's VLLMGeneration for a rank, as far as generating goes. To be called after `stand_in`."""
    space = types.SimpleNamespace
    state = space(deepspeed_plugin=None)
    accelerator = space(
        state=state, is_main_process=rank == 0, process_index=rank, local_process_index=rank, num_processes=ranks,
        device=torch.device("cpu"), wait_for_everyone=lambda: None,
    )  # fmt: skip
    model: Any = torch.nn.Identity()
    model.name_or_path = "some/model"
    return vllm_generation.VLLMGeneration(
        model, accelerator, space(image_token_id=IMAGE), mode=mode, tensor_parallel_size=tensor_parallel, **settings
    )
