"""Heads over several processes, with gloo on the CPU: FSDP2 shards, a vocabulary split over ranks, bad splits."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.inputs import unavailable
from helpers.linear import BACKENDS, Head, call, gradients, make_linear
from helpers.losses import EACH, config_for
from helpers.ranks import spawn, spawn_fleet

from mdpgrpo_fast import linear_token_logprobs, linear_token_loss
from mdpgrpo_fast.models.heads import effective_weight
from mdpgrpo_fast.ops.linear import select, sharded

DEEPSPEED = Path(sys.prefix) / "deepspeed"
VOCAB, LENGTHS = 42, (3, 2, 0, 3)
MORE = {"temperature": EACH, "softcap": 5.0}
LEVEL_OF = {2: "token", 3: "sequence"}  # by ranks


@pytest.fixture(scope="module")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[Any]]]:
    """What the functions below return on each rank: ranks -> name -> results."""
    found = {}
    for ranks, level in LEVEL_OF.items():
        # The refusal first: it is about a group whose ranks have not compared their splits yet.
        tasks: dict[str, tuple[Any, ...]] = {"uneven": (uneven,)} if ranks == 2 else {}
        tasks |= {f"split {b}": (split, level, b, MORE) for b in BACKENDS} | {"fsdp": (fsdp, level)}
        tasks |= {f"masked {b}": (masked, b) for b in BACKENDS} if ranks == 2 else {}
        found[ranks] = spawn_fleet(tasks, ranks, tmp_path_factory.mktemp("fleet"))
    return found


def alone(level: str, more: dict[str, Any], backend: str = "torch") -> tuple[dict[str, Any], dict[str, Any]]:
    batch, head = make_linear(1, LENGTHS, vocab=VOCAB, bias=True)
    hidden, leaves = batch.logits.requires_grad_(), head.leaves()
    found = gradients(call(backend, hidden, leaves, batch, config_for(importance_level=level), **more), hidden, leaves)
    out = {n: getattr(found.out, n).detach() for n in ("loss", "logprobs", "entropy", "kl", "ratio", "totals")}
    return out, found.grads


# ---- a vocabulary split over ranks ----------------------------------------------------------------------------------


def split(rank: int, ranks: int, level: str, backend: str, more: dict[str, Any]) -> Any:
    batch, head = make_linear(1, LENGTHS, vocab=VOCAB, bias=True)
    mine = slice(rank * VOCAB // ranks, (rank + 1) * VOCAB // ranks)
    assert head.bias is not None
    part = Head(head.weight[mine], head.bias[mine]).leaves()
    hidden, group = batch.logits.requires_grad_(), dist.group.WORLD
    out = call(backend, hidden, part, batch, config_for(importance_level=level), vocab_group=group,
               workspace_bytes=3 * 4 * (VOCAB // ranks), **more)  # fmt: skip
    found = gradients(out, hidden, part)
    values = {n: getattr(out, n).detach() for n in ("loss", "logprobs", "entropy", "kl", "ratio", "totals")}
    scores = {}
    for frozen in (True, False):
        again = part.leaves(frozen)
        ell, entropy = linear_token_logprobs(hidden, again.weight, batch.tokens, batch.mask, bias=again.bias,
                                             vocab_group=group, backend=backend, softcap=5.0)  # fmt: skip
        inputs = [hidden] if frozen else [hidden, again.weight]
        scores[frozen] = (ell.detach(), entropy, torch.autograd.grad(ell.square().sum(), inputs))
    nobodys = torch.full_like(batch.tokens, VOCAB)  # a token that no rank has
    unknown, _ = linear_token_logprobs(hidden, part.weight, nobodys, batch.mask, vocab_group=group, backend=backend,
                                       check_values=False)  # fmt: skip
    return values, found.grads, scores, unknown.detach()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_split_vocabulary_gives_what_the_whole_one_does(ranks: int, backend: str, fleets: Any) -> None:
    found = fleets[ranks][f"split {backend}"]
    values, grads = alone(LEVEL_OF[ranks], MORE)
    batch, head = make_linear(1, LENGTHS, vocab=VOCAB, bias=True)
    leaves, hidden = head.leaves(), batch.logits.requires_grad_()
    whole = linear_token_logprobs(hidden, leaves.weight, batch.tokens, batch.mask, bias=leaves.bias, softcap=5.0)
    expected = torch.autograd.grad(whole[0].square().sum(), (hidden, leaves.weight))
    for rank, (ours, own, scores, unknown) in enumerate(found):
        assert torch.equal(unknown.isnan(), batch.mask)
        for name, value in ours.items():
            torch.testing.assert_close(value, values[name], rtol=1e-5, atol=2e-6)
            assert torch.equal(value, found[0][0][name]), f"{name} differs between ranks"
        mine = slice(rank * VOCAB // ranks, (rank + 1) * VOCAB // ranks)
        torch.testing.assert_close(own["hidden"], grads["hidden"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own["weight"], grads["weight"][mine], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own["bias"], grads["bias"][mine], rtol=1e-4, atol=1e-6)
        for ell, entropy, (d_hidden, *d_weight) in scores.values():
            torch.testing.assert_close(ell, whole[0].detach(), rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(entropy, whole[1], rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(d_hidden, expected[0], rtol=1e-4, atol=1e-5)
            for g in d_weight:
                torch.testing.assert_close(g, expected[1][mine], rtol=1e-4, atol=1e-5)


def masked(rank: int, ranks: int, backend: str) -> Any:
    """As on a GPU without lengths: rows that do not count stay, under a mask."""
    batch, head = make_linear(1, LENGTHS, vocab=VOCAB)
    mine = slice(rank * VOCAB // ranks, (rank + 1) * VOCAB // ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "may_look", lambda device: False)
        more = {"vocab_group": dist.group.WORLD, "backend": backend}
        scored = linear_token_logprobs(batch.logits, head.weight[mine], batch.tokens, batch.mask, **more)
        out = call(backend, batch.logits, Head(head.weight[mine]), batch, config_for(), vocab_group=dist.group.WORLD)
    return *scored, out.entropy, out.totals


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_of_a_split_vocabulary_are_nothing(backend: str, fleets: Any) -> None:
    batch, head = make_linear(1, LENGTHS, vocab=VOCAB)
    expected = call("torch", batch.logits, head, batch, config_for())
    for logprobs, entropy, inside, totals in fleets[2][f"masked {backend}"]:
        for found in (logprobs, entropy, inside):
            assert (found[~batch.mask] == 0).all()
        torch.testing.assert_close(entropy, expected.entropy, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(totals, expected.totals, rtol=1e-5, atol=2e-6)


def uneven(rank: int, ranks: int) -> list[str]:
    batch, head = make_linear(1, LENGTHS, vocab=VOCAB)
    said = []
    batch.tokens[0, 0] = VOCAB - 1  # which a rank that counted by its own part alone would refuse by itself
    for rows in (slice(0, 20) if rank == 0 else slice(20, 42), slice(0, 21) if rank == 0 else slice(21, 42)):
        try:
            call("torch", batch.logits, Head(head.weight[rows]), batch, config_for(), vocab_group=dist.group.WORLD)
            said.append("")
        except ValueError as e:
            said.append(str(e))
    try:
        # The group has been compared: a later difference still shows, and nobody waits for ever.
        rows = slice(0, 20) if rank == 0 else slice(20, 42)
        call("torch", batch.logits, Head(head.weight[rows]), batch, config_for(), vocab_group=dist.group.WORLD,
             check_values=False)  # fmt: skip
    except ValueError as e:
        said.append(str(e))
    try:
        tokens = torch.full_like(batch.tokens, VOCAB)
        linear_token_logprobs(batch.logits, head.weight[:21], tokens, vocab_group=dist.group.WORLD)
    except ValueError as e:
        said.append(str(e))
    return said


def test_an_uneven_split_is_refused_on_every_rank(fleets: Any) -> None:
    for bad, good, later, tokens in fleets[2]["uneven"]:
        assert bad == later == "weight must be split evenly over them; got [20, 22] rows on the ranks of vocab_group"
        assert good == "" and tokens == "tokens must be in [0, 42); got range 42 to 42"


# ---- shards that are gathered ---------------------------------------------------------------------------------------


def fsdp(rank: int, ranks: int, level: str) -> Any:
    """A small model under FSDP2 whose head is used outside of its module's forward: each rank has its own tokens."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    body, head = torch.nn.Linear(8, 8), torch.nn.Linear(8, VOCAB)
    for module in (body, head):
        fully_shard(module, mesh=mesh)
    batch, _ = make_linear(1 + rank, LENGTHS, vocab=VOCAB)
    states = torch.tanh(body(batch.logits))
    before = [type(p).__name__ for p in head.parameters()]
    config = config_for(importance_level=level)
    weight, bias = effective_weight(head)  # of a module whose class FSDP2 has changed
    out = linear_token_loss(states, weight, batch.tokens, batch.mask, config, bias=bias, **batch.given())
    out.loss.backward()
    whole = [p.grad.full_tensor() for p in (*body.parameters(), *head.parameters())]
    with torch.no_grad():
        scored = linear_token_logprobs(states, head.weight, batch.tokens, batch.mask, bias=head.bias)[0]
    return out.loss.detach(), whole, before, scored, out.logprobs


def together(ranks: int, level: Any, logprobs: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The loss of every rank's tokens (or Σ ℓ²), and the gradients of their mean, in one process."""
    torch.manual_seed(0)
    body, head = torch.nn.Linear(8, 8), torch.nn.Linear(8, VOCAB)
    losses = []
    for rank in range(ranks):
        batch, _ = make_linear(1 + rank, LENGTHS, vocab=VOCAB)
        states, config = torch.tanh(body(batch.logits)), config_for(importance_level=level)
        args = (states, head.weight, batch.tokens, batch.mask)
        if logprobs:
            losses.append(linear_token_logprobs(*args, bias=head.bias)[0].square().sum())
        else:
            losses.append(linear_token_loss(*args, config, bias=head.bias, **batch.given()).loss)
    parameters = [*body.parameters(), *head.parameters()]
    gradients = torch.autograd.grad(torch.stack(losses).mean(), parameters)
    return [x.detach() for x in losses], list(gradients)


@pytest.mark.parametrize("ranks", [2, 3])
def test_fsdp2_shards_are_gathered_and_gradients_averaged(ranks: int, fleets: Any) -> None:
    losses, expected = together(ranks, LEVEL_OF[ranks])
    for rank, (loss, grads, kinds, scored, logprobs) in enumerate(fleets[ranks]["fsdp"]):
        assert kinds == ["DTensor", "DTensor"]
        torch.testing.assert_close(loss, losses[rank])
        torch.testing.assert_close(scored, logprobs)
        for got, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def zero3(rank: int, ranks: int) -> dict[bool, Any]:
    """The same under DeepSpeed's ZeRO-3, by whether it is log-probs that are trained."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "DS_ACCELERATOR": "cpu"}
    sys.path.append(str(DEEPSPEED))
    import deepspeed
    from deepspeed.ops.op_builder import ShareMemCommBuilder  # compiled at first use, and waits by spinning

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False  # gloo, as over two machines
    return {logprobs: zero3_step(rank, logprobs) for logprobs in (False, True)}


def zero3_step(rank: int, logprobs: bool) -> Any:
    """One step of plain SGD with the gradients that DeepSpeed reduced."""
    import deepspeed

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, VOCAB)

        def forward(self, batch: Any) -> torch.Tensor:
            states, head = torch.tanh(self.body(batch.logits)), (self.head.weight, batch.tokens, batch.mask)
            if logprobs:  # whose backward pass needs the weight again
                return linear_token_logprobs(states, *head, bias=self.head.bias)[0].square().sum()
            return linear_token_loss(states, *head, config_for(), bias=self.head.bias, **batch.given()).loss

    torch.manual_seed(0)
    model = Model()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1e9,
    }
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    empty = model.head.weight.numel()
    loss = engine(make_linear(1 + rank, LENGTHS, vocab=VOCAB)[0])
    engine.backward(loss)
    engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        moved = [(a - p.detach()).clone() for a, p in zip(before, model.parameters(), strict=True)]
    return loss.detach(), moved, empty


@pytest.mark.long
def test_zero3_under_the_real_deepspeed(tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None and not (DEEPSPEED / "deepspeed").exists():
        unavailable(f"peer deepspeed is neither installed nor in {DEEPSPEED} (see constraints-test-deepspeed.txt)")
    found = spawn(zero3, 2, tmp_path)
    for logprobs in (False, True):
        losses, expected = together(2, "token", logprobs)
        for rank, one in enumerate(found):
            loss, moved, empty = one[logprobs]
            assert empty == 0, "the head is partitioned outside of the call"
            torch.testing.assert_close(loss, losses[rank])
            for got, want in zip(moved, expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * max(1.0, want.abs().max().item()))


def test_zero3_parameters_are_gathered_around_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed keeps an empty tensor outside of its gathering; shape checks go by what it was."""
    batch, head = make_linear(1, LENGTHS, vocab=VOCAB)
    full, gathered = head.weight.clone(), []
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id, weight.ds_shape = 3, full.shape  # type: ignore[attr-defined]

    @contextmanager
    def gather(parameters: list[Any]) -> Any:
        gathered.append(list(parameters))
        weight.data = full
        yield
        weight.data = torch.empty(0)

    fake = types.ModuleType("deepspeed")
    fake.zero = types.SimpleNamespace(GatheredParameters=gather)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    with torch.no_grad():
        out = linear_token_loss(batch.logits, weight, batch.tokens, batch.mask, config_for(), backend="torch",
                                **batch.given())  # fmt: skip
        expected = call("torch", batch.logits, head, batch, config_for())
    assert torch.equal(out.loss, expected.loss) and gathered == [[weight]] and weight.numel() == 0
    with pytest.raises(ValueError, match="this rank's plain tensor where vocab_group is given"):
        monkeypatch.setattr(dist, "get_world_size", lambda group: 1)
        linear_token_loss(batch.logits, weight, batch.tokens, batch.mask, config_for(), vocab_group=object(),  # type: ignore[arg-type]
                          **batch.given())  # fmt: skip


def test_a_plain_tensor_needs_no_gathering() -> None:
    x = torch.zeros(2, requires_grad=True)
    assert sharded.whole(x) is x
