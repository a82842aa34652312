"""A real vLLM server of the embedded policy, and what answers are compared with."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import torch
from helpers.inputs import ROOT
from torch import Tensor

from mdpgrpo_fast.demo import SEED_POLICY
from mdpgrpo_fast.rollout.generate import Rollout

MAX_LENGTH = 320  # of prompt and completion


class Server:
    """`mdpgrpo vllm-serve` in float32 on a free port of this machine, which starts meanwhile; its key is that of the
    environment. log: file of what it says."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-m", "mdpgrpo_fast", "vllm-serve", str(SEED_POLICY), "--port", str(port)]
        command += ["--dtype", "float32", "--max-model-len", str(MAX_LENGTH), "--enforce-eager"]
        # No prompt in two parts: vLLM's CPU worker dies of one that has a seed ("CPU Generator does not use offset").
        command += ["--max-num-batched-tokens", "16384"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with log.open("w") as out:
            # Its own group: it has a process for the engine and one for the worker.
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=ROOT, start_new_session=True)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float = 500.0) -> None:
        """Until it answers. Raises: RuntimeError with the end of its log where it does not."""
        end = time.monotonic() + seconds
        while self.alive and time.monotonic() < end:
            try:
                if httpx2.get(f"{self.url}/health", timeout=5.0).is_success:
                    return
            except httpx2.RequestError:
                time.sleep(0.2)
        self.kill()
        raise RuntimeError("the server did not start:\n" + "\n".join(self.log.read_text().splitlines()[-30:]))

    def kill(self) -> None:
        """At once, with its workers, as a machine that is lost."""
        if self.alive:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def stop(self) -> None:
        """As its operator does."""
        if self.alive:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()


def answers(rollout: Rollout) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(rollout.tokens, rollout.lengths, strict=True)]


@torch.no_grad()
def reference_logprobs(
    model: Any, r: Rollout, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(B, L) each: the log-probs of the drawn tokens in float64 from one forward pass of the model, at each row's
    temperature and of what min-p, top-k and top-p keep in this order; the number of tokens kept."""
    mask = torch.cat([r.prompt_mask, r.mask], 1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids = torch.cat([r.prompt_ids, r.tokens], 1)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, r.prompt_ids.shape[1] - 1 : -1]
    logits = logits.double() / r.temperature.double()[:, None, None]
    logits[logits.softmax(-1) < min_p * logits.softmax(-1).amax(-1, keepdim=True)] = -torch.inf
    if top_k:
        logits[logits < logits.topk(top_k).values[..., -1:]] = -torch.inf
    values, order = logits.sort(-1, descending=True)
    above = values.softmax(-1).cumsum(-1) - values.softmax(-1)  # of the tokens that are likelier
    logits[torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, above >= top_p)] = -torch.inf
    chosen = logits.log_softmax(-1).gather(-1, r.tokens[..., None])[..., 0]
    return chosen, logits.isfinite().sum(-1)
