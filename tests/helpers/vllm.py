"""Stand-ins for vLLM's package and server, and signatures read from its real sources."""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import inspect
import json
import os
import ssl
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from helpers.inputs import unavailable
from torch import Tensor, nn

from mdpgrpo_fast.rollout.vllm.server import VLLMServer
from mdpgrpo_fast.rollout.vllm.worker import EXTENSION, WeightSync

PROMPTS = [[5, 6, 7], [8], [9, 10]]
TAUS = [0.5, 1.0] * 3  # two completions of each
EOS = [1, 2]
GENERATE = "/inference/v1/generate"
ARGS: dict[str, Any] = {"num_generations": 2, "temperature": TAUS, "eos": EOS, "max_new_tokens": 4}


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
    """A worker without vLLM's own reload around the weights that it loads."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.reloads = model, 0

    def get_model(self) -> nn.Module:
        return self.model

    def _mdpgrpo_context(self) -> Any:
        return contextlib.nullcontext()

    def _mdpgrpo_begin_reload(self) -> None:
        self.reloads += 1

    def _mdpgrpo_end_reload(self) -> None:
        self.reloads -= 1
        self._mdpgrpo_update = ""


def answer(prompt: list[int], settings: dict[str, Any]) -> tuple[list[int], list[float], str]:
    """What the stand-ins sample: tokens that tell the prompt, log-probs that tell the temperature and the position."""
    n = min(sum(prompt) % 5 + 1, settings["max_tokens"])
    tokens = [20 + (sum(prompt) + j) % 30 for j in range(n)]
    ends = n < settings["max_tokens"]
    if ends:
        tokens[-1] = settings["stop_token_ids"][-1]
    return tokens, [-settings["temperature"] - j / 8 for j in range(n)], "stop" if ends else "length"


def adapter_files(directory: str) -> dict[str, int]:
    """What lies in the directory of an adapter, with the modes of files, as vLLM finds it."""
    return {path.name: path.stat().st_mode & 0o777 for path in Path(directory).iterdir()}


class FakeLLM:
    """The part of vllm.LLM that is called, with a record of the calls."""

    def __init__(self, log: list[tuple[str, tuple[Any, ...], dict[str, Any]]], *args: Any, **kwargs: Any) -> None:
        self.log, self.workers, self.reset, self.label = log, [Worker(FusedModel())], True, "default"
        self.multiprocessing = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
        self.lose: Callable[[int], bool] = lambda _: False
        self.adapters: list[tuple[str, int, dict[str, int]]] = []
        self.llm_engine = types.SimpleNamespace(add_lora=self.add_lora)
        log.append(("__init__", args, kwargs))

    def add_lora(self, request: Any) -> bool:
        self.adapters.append((request.lora_name, request.lora_int_id, adapter_files(request.lora_path)))
        return True

    def generate(self, *args: Any, **kwargs: Any) -> list[Any]:
        self.log.append(("generate", args, kwargs))
        out = []
        for i, (prompt, params) in enumerate(zip(*args, strict=True)):
            tokens, logprobs, reason = answer(prompt["prompt_token_ids"], vars(params))
            steps = [{t: types.SimpleNamespace(logprob=v)} for t, v in zip(tokens, logprobs, strict=True)]
            spans = [types.SimpleNamespace(version=self.label)]
            one = types.SimpleNamespace(token_ids=tokens, logprobs=steps, finish_reason=reason, weight_versions=spans)
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

    def update_weight_version(self, *args: Any, **kwargs: Any) -> None:
        self.log.append(("update_weight_version", args, kwargs))
        (self.label,) = args

    def sleep(self, *args: Any, **kwargs: Any) -> None:
        self.log.append(("sleep", args, kwargs))

    def wake_up(self, *args: Any, **kwargs: Any) -> None:
        self.log.append(("wake_up", args, kwargs))


def choice(tokens: list[int], logprobs: list[float], reason: str, label: str = "default") -> dict[str, Any]:
    """A completion as the server answers it."""
    content = [{"token_id": t, "logprob": v} for t, v in zip(tokens, logprobs, strict=False)]
    spans = [{"version": label, "start": 0, "end": len(tokens)}]
    return {"token_ids": tokens, "logprobs": {"content": content}, "finish_reason": reason, "weight_versions": spans}


class FakeServer(ThreadingHTTPServer):
    """The routes of a vLLM server that are called; `fault` may answer in their place, by returning True."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        self.log: list[tuple[str, str, Any]] = []
        self.restart()
        self.mode, self.extension, self.dev, self.reset = "processed_logprobs", EXTENSION, True, True
        self.scale_out, self.lora, self.engines = True, None, 1
        self.fault: Callable[[Any, str, Any], bool] = lambda handler, path, body: False
        self.connections = 0
        self.key = ""  # that every request has to bring
        self.scheme = "http"
        super().__init__(("127.0.0.1", 0), FakeHandler)

    def restart(self) -> None:
        self.workers, self.label = [Worker(FusedModel())], "default"
        self.adapters: dict[str, dict[str, int]] = {}

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def encrypt(self, certificate: str) -> None:
        """Speak TLS from here on. certificate: a file of the server's certificate and its key."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.scheme = "https"

    def handle_error(self, *_: Any) -> None: ...  # of a client that does not trust the certificate

    def count(self, path: str) -> int:
        return sum(p == path for _, p, _ in self.log)


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = True

    def setup(self) -> None:
        self.server.connections += 1
        super().setup()

    def log_message(self, *_: Any) -> None: ...

    def send(self, value: Any, status: int = 200, length: int = 0, content_type: str = "application/json") -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data) + length))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection |= length > 0

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
            if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
                return self.send({"detail": "Unauthorized"}, 401)
            if path == "/v1/models":
                self.send({"data": [{"id": "served"}]})
            elif path.startswith("/inference/") and not server.scale_out:
                self.send({"detail": "disabled"}, 403)
            elif path == "/v1/unload_lora_adapter":
                known = server.adapters.pop(body["lora_name"], None) is not None
                self.send(b"Success" if known else b"not found", 200 if known else 404, content_type="text/plain")
            elif path == "/v1/load_lora_adapter":
                if body["lora_name"] in server.adapters:
                    self.send({"error": {"message": "The lora adapter has already been loaded."}}, 400)
                else:
                    server.adapters[body["lora_name"]] = adapter_files(body["lora_path"])
                    self.send(b"Success", content_type="text/plain")
            elif path == GENERATE and body["model"] not in ("served", *server.adapters):
                self.send({"error": {"message": f"no model {body['model']}"}}, 404)
            elif path == "/inference/v1/abort_requests":
                self.send(b"", content_type="text/plain")
            elif path == GENERATE:
                tokens, logprobs, reason = answer(body["token_ids"], body["sampling_params"])
                self.send({"choices": [choice(tokens, logprobs, reason, server.label)]})
            elif not server.dev:
                self.send({"detail": "Not Found"}, 404)
            elif path == "/server_info":
                parallel = {"worker_extension_cls": server.extension, "data_parallel_size": server.engines}
                config = {"model_config": {"logprobs_mode": server.mode}, "parallel_config": parallel}
                self.send({"vllm_config": {**config, "lora_config": server.lora}})
            elif path == "/collective_rpc":
                self.send({"results": [getattr(w, body["method"])(*body["args"]) for w in server.workers]})
            elif path == "/update_weight_version":
                server.label = body["new_version"]
                self.send({"success": True, "new_version": server.label})
            else:
                self.send({"success": server.reset})


def client(server: FakeServer, **knobs: Any) -> VLLMServer:
    return VLLMServer(server.url, device="cpu", **{"backoff": 0.001, "retries": 2, "timeout": 20.0, **knobs})


def vllm_sources() -> Path:
    """vLLM's directory, MDPGRPO_VLLM_SOURCES or the installed one. Read, not imported, as a build may need a GPU."""
    if unpacked := os.environ.get("MDPGRPO_VLLM_SOURCES"):
        return Path(unpacked)
    spec = importlib.machinery.PathFinder.find_spec("vllm")
    if spec is None or spec.origin is None:
        unavailable("vLLM's sources are not here: `make vllm-sources` brings them, and says where")
    assert spec is not None and spec.origin is not None
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
