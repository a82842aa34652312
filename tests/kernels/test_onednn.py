"""Linear layers through oneDNN: what PyTorch's own give, in every pass, and nowhere that they are not for."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from helpers.inputs import unavailable
from torch import nn

from mdpgrpo_fast.kernels import onednn
from mdpgrpo_fast.kernels.onednn import install, mm, packed, prefers_onednn

if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    unavailable("this build of PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that it is for."""
    monkeypatch.setattr(onednn, "prefers_onednn", lambda: True)


def pair(bias: bool = True, shape: tuple[int, int] = (24, 17)) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(shape[1], shape[0], bias=bias)
    ours = copy.deepcopy(plain)
    install(ours)
    return plain, ours


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(5,), (2, 3), (1, 1, 7), ()], ids=str)
def test_forward_and_gradients(bias: bool, leading: tuple[int, ...]) -> None:
    plain, ours = pair(bias)
    x = torch.randn(*leading, 17, dtype=torch.float64)
    exact = copy.deepcopy(plain).double()
    grad = torch.randn(*leading, 24, dtype=torch.float64)
    results = []
    for layer, dtype in ((exact, torch.float64), (ours, torch.float32)):
        leaf = x.to(dtype).requires_grad_()
        out = layer(leaf)
        results.append([out, *torch.autograd.grad(out, [leaf, *layer.parameters()], grad.to(dtype))])
    assert "_LinearBackward" in type(results[1][0].grad_fn).__name__, "it is ours that ran"
    for expected, found in zip(*results, strict=True):
        assert found.shape == expected.shape and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_model_may_write_into_what_a_layer_gives() -> None:
    """As Llama 4's router does."""
    plain, ours = pair()
    x = torch.randn(2, 3, 17)
    found = [torch.autograd.grad(layer(x).mul_(2).sum(), layer.weight)[0] for layer in (plain, ours)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_strided_inputs_and_gradients() -> None:
    plain, ours = pair()
    x = torch.randn(17, 6).t().requires_grad_()
    grad = torch.randn(24, 6).t()
    for a, b in zip(
        torch.autograd.grad(ours(x), [x, *ours.parameters()], grad),
        torch.autograd.grad(plain(x), [x, *plain.parameters()], grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_frozen_parts_get_no_gradient() -> None:
    _, ours = pair()
    ours.requires_grad_(False)
    x = torch.randn(3, 17, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad is not None and ours.weight.grad is None and ours.bias.grad is None
    ours.weight.requires_grad_(True)
    ours(x.detach()).sum().backward()
    assert ours.weight.grad is not None and ours.bias.grad is None


def test_packed_weights_are_those_of_now_and_leave_nothing(everywhere: None) -> None:
    plain, ours = pair()
    x = torch.randn(5, 17)
    for _ in range(2):
        with torch.no_grad(), packed(ours):
            assert "_packed_weight" in ours.__dict__
            torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
        assert "_packed_weight" not in ours.__dict__
        with torch.no_grad():
            for layer in (plain, ours):
                layer.weight += 1  # an update between two rollouts
    with pytest.raises(RuntimeError, match="stop"), packed(ours):
        raise RuntimeError("stop")
    assert "_packed_weight" not in ours.__dict__


def test_other_tensors_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = pair()

    def never(*args: object) -> None:
        raise AssertionError("oneDNN was asked")

    monkeypatch.setattr(onednn, "_op", never)
    x = torch.randn(3, 17)
    assert torch.equal(copy.deepcopy(ours).double()(x.double()), copy.deepcopy(plain).double()(x.double()))
    assert ours(torch.randn(0, 17)).shape == (0, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    assert torch.equal(mm(x.double(), x.t().double()), x.double() @ x.t().double())


def test_copies_are_their_own_and_can_be_pickled() -> None:
    _, ours = pair()
    other = copy.deepcopy(ours)
    with torch.no_grad():
        other.weight.zero_()
        x = torch.randn(2, 17)
        torch.testing.assert_close(other(x), other.bias.expand(2, -1))
        assert ours(x).abs().max() > 0.1
        assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))
    assert ours.state_dict().keys() == {"weight", "bias"}


def test_only_plain_linear_layers_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4), nn.ReLU())
    install(model)
    assert ["forward" in m.__dict__ for m in model] == [False, True, False]
    monkeypatch.setattr(onednn, "prefers_onednn", lambda: False)
    untouched = nn.Linear(4, 4)
    install(untouched)
    assert "forward" not in untouched.__dict__


def test_compiled_models_do_not_see_it() -> None:
    plain, ours = pair()
    x = torch.randn(4, 17)
    found = torch.compile(ours, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, plain(x), rtol=1e-6, atol=1e-6)


def test_the_choice_is_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    read = {"text": "vendor_id\t: AuthenticAMD\n"}
    monkeypatch.setattr(onednn.Path, "read_text", lambda self, **_: read["text"])
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    assert prefers_onednn.__wrapped__()
    read["text"] = "vendor_id\t: GenuineIntel\n"
    assert not prefers_onednn.__wrapped__()
    read["text"] = "vendor_id\t: AuthenticAMD\n"
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert not prefers_onednn.__wrapped__()


def test_the_caches_of_kernels_are_bounded_but_for_bounds_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel for each number of tokens took 1.2 GB of a run of 520 steps that takes 0.6."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(onednn.Path, "read_text", lambda *args, **kwargs: "vendor_id : AuthenticAMD")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    assert prefers_onednn.__wrapped__()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128" and os.environ["LRU_CACHE_CAPACITY"] == "7"
