"""Chains read off models, whatever these are written with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.errors import NotApplicable
from gradleak.exact.one_example import invert_layers
from gradleak.structure.chain import Affine
from gradleak.structure.reader import trace_chain

SHAPE = (2, 6, 6)


class Around(nn.Module):
    """Puts ``before`` in front of a convolution and ``behind`` between it and the head."""

    def __init__(self, before: Callable[..., Tensor], behind: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.before, self.behind = before, behind
        self.register_buffer("mean", torch.tensor([0.4, 0.5]).view(2, 1, 1))
        self.register_buffer("basis", torch.linalg.qr(torch.rand(6, 6, generator=torch.Generator().manual_seed(3)))[0])
        for name, module in modules.items():
            setattr(self, name, module)
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        with torch.no_grad():
            width = self.body(torch.zeros(2, *SHAPE)).shape[1]
        self.head = nn.Linear(width, 5)

    def body(self, x: Tensor) -> Tensor:
        return self.behind(self, self.conv(self.before(self, x))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def same(_: nn.Module, x: Tensor) -> Tensor:
    return x


def checked(m: nn.Module, x: Tensor) -> Tensor:
    assert len(x) > 0, "no examples"
    assert x.shape[1:] == (2, 6, 6)
    assert float(x.min()) >= 0
    x = x.float() if x.dtype == torch.float16 else x
    return x.view(x.shape[0], *x.size()[1:])


def in_place(m: nn.Module, x: Tensor) -> Tensor:
    x = x * 2
    x -= m.mean
    return x.div_(0.25)


def with_constant(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([x, m.mean.expand(len(x), 2, 6, 1) if m.mean.ndim == 4 else m.mean.expand(len(x), 2, 1, 6)], 2)


def norm() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(8).eval()
    layer.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
    layer.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return layer


MODELS: dict[str, Callable[[], nn.Module]] = {
    "assertions and lengths": lambda: Around(checked, lambda m, x: torch.tanh(x)),
    "normalization by a buffer": lambda: Around(lambda m, x: (x - m.mean) / 0.25, lambda m, x: x.sigmoid()),
    "normalization in place": lambda: Around(in_place, lambda m, x: F.softplus(x)),
    "constants between layers": lambda: Around(same, lambda m, x: 3 - torch.tanh(2 - x / 4)),
    "permutations": lambda: Around(
        lambda m, x: x.transpose(2, 3).flip(-1), lambda m, x: torch.tanh(x).permute(0, 2, 3, 1).contiguous()
    ),
    "squeeze, view, chunks of patches": lambda: Around(
        lambda m, x: x.unsqueeze(1).squeeze(1).roll(1, 2),
        lambda m, x: F.pixel_unshuffle(x.sigmoid(), 2).view(len(x), -1, 3).mT,
    ),
    "a fixed basis": lambda: Around(lambda m, x: x @ m.basis, lambda m, x: torch.tanh(x)),
    "a constant beside the data": lambda: Around(with_constant, lambda m, x: torch.tanh(x)),
    "circular padding": lambda: Around(lambda m, x: F.pad(x, (1, 1, 1, 1), "circular"), lambda m, x: torch.tanh(x)),
    "padding by ones": lambda: Around(lambda m, x: F.pad(x, (1, 1, 1, 1), value=1.0), lambda m, x: torch.tanh(x)),
    "upsampling": lambda: Around(lambda m, x: F.interpolate(x, scale_factor=2), lambda m, x: torch.tanh(x)),
    "PReLU": lambda: Around(same, lambda m, x: m.act(x), act=nn.PReLU(8, init=0.3)),
    "a linear layer of every row": lambda: Around(
        lambda m, x: torch.tanh(m.row(x)),
        lambda m, x: torch.tanh(m.late(x)),
        row=nn.Linear(6, 9),
        late=nn.Linear(9, 10),
    ),
    "CELU": lambda: Around(same, lambda m, x: F.celu(x, 0.7)),
    "a logarithm": lambda: Around(lambda m, x: torch.log1p(x), lambda m, x: torch.tanh(x)),
    "idle dropout, identity": lambda: Around(
        same, lambda m, x: F.dropout(m.id(torch.tanh(x)), training=False), id=nn.Identity()
    ),
    "BatchNorm in evaluation mode": lambda: Around(same, lambda m, x: torch.tanh(m.norm(x)), norm=norm()),
    "a frozen layer whose weight is computed": lambda: Around(
        lambda m, x: F.conv2d(x, torch.eye(2)[:, :, None, None].to(x) * 2), lambda m, x: torch.tanh(x)
    ),
}


def gradient(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(F.cross_entropy(model(x), torch.tensor([3])), list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), grads, strict=True))


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_what_leads_to_the_features_is_read_and_undone(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().double()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = drawn(3, *SHAPE)
    chain = trace_chain(model, SHAPE)
    assert chain.stop is None
    assert chain.head
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    params = {k: p.detach() for k, p in model.named_parameters()}
    torch.testing.assert_close(chain.forward(x, params), model.body(x).detach())  # type: ignore[operator]
    found = invert_layers(model, params, gradient(model, x[:1]), SHAPE, chain=chain)
    assert found.input is not None, found.stopped_at
    assert float((found.input - x[0]).square().mean()) < 1e-16


class Odd(nn.Module):
    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.own = forward
        for name, module in modules.items():
            setattr(self, name, module)
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.own(self, torch.tanh(self.a(x))))


def switching(m: nn.Module, x: Tensor) -> Tensor:
    return torch.tanh(x) if len(x) < 3 else x


def overwritten(m: nn.Module, x: Tensor) -> Tensor:
    x = x * 1
    x[:, 3] = 0
    return x


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two paths": (lambda: Odd(lambda m, x: x + torch.tanh(x)), "joins 2 paths"),
    "a gate": (lambda: Odd(lambda m, x: x * m.gate(x).sigmoid(), gate=nn.Linear(12, 12)), "joins 2 paths"),
    "recurrence": (lambda: Odd(lambda m, x: m.r(x[:, None])[0][:, -1], r=nn.LSTM(12, 12, batch_first=True)), "LSTM"),
    "attention": (lambda: Odd(lambda m, x: m.r(*[x[None]] * 3)[0][0], r=nn.MultiheadAttention(12, 2)), "multi_head"),
    "active dropout": (lambda: Odd(lambda m, x: F.dropout(x, 0.5)), "active dropout"),
    "batch statistics": (lambda: Odd(lambda m, x: m.norm(x), norm=nn.BatchNorm1d(12)), "batch statistics"),
    "LayerNorm": (lambda: Odd(lambda m, x: m.norm(x), norm=nn.LayerNorm(12)), "LayerNorm"),
    "clamping": (lambda: Odd(lambda m, x: x.clamp(-0.1, 0.1)), "clamp"),
    "examples mixed": (lambda: Odd(lambda m, x: x - x.flip(0) / 2), "joins"),
    "examples turned around": (lambda: Odd(lambda m, x: x.flip(0)), "mixes the examples"),
    "a value overwritten": (lambda: Odd(overwritten), "setitem"),
    "noise": (lambda: Odd(lambda m, x: x + torch.randn_like(x)), "treats them differently"),
    "multiplication by zero": (lambda: Odd(lambda m, x: x * torch.arange(12).to(x)), "multiplies by zero"),
    "a weight used twice": (lambda: Odd(lambda m, x: torch.tanh(m.c(torch.tanh(m.c(x)))), c=nn.Linear(12, 12)), "used"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_undone_is_said(name: str) -> None:
    make, word = REFUSED[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chain = trace_chain(make(), (12,), anchor="b.weight")
        assert word in str(chain.stop)


def test_models_that_do_not_treat_all_inputs_alike_are_refused() -> None:
    with pytest.raises(NotApplicable, match="does not treat all inputs alike"):
        trace_chain(Odd(switching), (12,), anchor="b.weight")


def test_names_of_layers_are_paths() -> None:
    chain = trace_chain(nn.Sequential(nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh()), nn.Linear(6, 3)), (4,))
    assert [s.name for s in chain.steps] == ["0.0", "0.1"]
    assert isinstance(chain.steps[0], Affine)
    assert chain.anchor.name == "1"
