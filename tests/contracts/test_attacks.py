"""What every attack promises; a new attack in ``gl.attacks.__all__`` is checked at once."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import pytest
import torch

import gradleak as gl
from gradleak.attacks.base import Attack
from gradleak.errors import InvalidInput, MissingKnowledge, NotApplicable
from gradleak.integrations.huggingface import TokenCrossEntropy
from gradleak.spaces import Category, Number, TokenSpace

SHAPE = (1, 8, 8)
TABLE = gl.TableSpace((Number("age"), Category("job", ("clerk", "nurse", "cook"))))
VICTIMS = ("images", "rows", "rectified", "codes", "table", "patches", "sentences", "noised")
LIGHT = {"iterations": 6, "members": 2}


def build(name: str) -> Attack:
    factory = getattr(gl.attacks, name)
    options = {k: v for k, v in LIGHT.items() if k in inspect.signature(factory).parameters}
    attack = factory(**options)
    assert isinstance(attack, Attack)
    return attack


class Encoder(torch.nn.Module):
    """A masked language model in miniature: word and position embeddings, two layers, a decoder tied to the words."""

    def __init__(self, vocabulary: int = 40, length: int = 6, width: int = 24) -> None:
        super().__init__()
        linear = torch.nn.Linear
        self.words = torch.nn.Parameter(torch.empty(vocabulary, width), requires_grad=False)
        self.places = torch.nn.Parameter(torch.empty(length, width))
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({k: linear(width, width) for k in ("query", "key", "value", "out", "feed")})
            for _ in range(2)
        )
        self.transform, self.decoder = linear(width, width), linear(width, vocabulary)
        self.decoder.weight = self.words
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            torch.nn.init.normal_(p, 0, 0.3, generator=generator)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        embedded = inputs if inputs.is_floating_point() else self.words[inputs]
        x = torch.nn.functional.layer_norm(embedded + self.places, embedded.shape[-1:])
        for layer in self.layers:
            scores = layer["query"](x) @ layer["key"](x).transpose(-1, -2) / x.shape[-1] ** 0.5
            x = torch.nn.functional.layer_norm(x + layer["out"](scores.softmax(-1) @ layer["value"](x)), x.shape[-1:])
            x = torch.nn.functional.layer_norm(x + layer["feed"](x).tanh(), x.shape[-1:])
        return self.decoder(self.transform(x).tanh())


class Coded(torch.nn.Module):
    """A tabular model in miniature: two numbers beside a category that is looked up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(5, 3)
        self.body = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.body(torch.cat([rows[:, :2], self.table(rows[:, 2].long())], 1))


def client(victim: str = "images", n: int = 1, dtype: torch.dtype = torch.float64) -> gl.Client:
    generator = torch.Generator().manual_seed(0)
    if victim == "sentences":
        ids = torch.tensor([[1, 17, 5, 3, 23, 2]]).expand(n, -1)  # 3 stands where a token is masked
        labels = torch.full_like(ids, -100)
        labels[:, 3] = 11
        return gl.Client(Encoder().to(dtype), gl.Batch(ids, labels), gl.FedSGD(TokenCrossEntropy()))
    if victim == "codes":
        rows = torch.tensor([[0.5, -1.0, 3.0]], dtype=dtype).expand(n, -1)
        with torch.random.fork_rng():
            return gl.Client(Coded().to(dtype), gl.Batch(rows, torch.arange(n) % 3))
    if victim == "table":
        rows = TABLE.encode(torch.tensor([[1.0, 2.0]], dtype=dtype)).expand(n, -1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return gl.Client(torch.nn.Linear(4, 3).to(dtype), gl.Batch(rows, torch.arange(n) % 3))
    if victim in ("rows", "rectified"):
        hidden = () if victim == "rows" else (torch.nn.Linear(64, 64), torch.nn.ReLU())
        model: torch.nn.Module = torch.nn.Sequential(torch.nn.Flatten(), *hidden, torch.nn.Linear(64, 5))
        for p in model.parameters():
            torch.nn.init.uniform_(p, -0.5, 0.5, generator=generator)
    elif victim == "patches":
        model = gl.models.vision_transformer(patch=4, width=24, depth=1, classes=5, in_channels=1, image_size=8, seed=0)
    else:
        model = gl.models.lenet(width=6, classes=5, in_channels=1, image_size=8, seed=0)
    images = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=dtype)
    training = gl.defenses.gaussian_noise(1e-2).wrap(gl.FedSGD()) if victim == "noised" else gl.FedSGD()
    return gl.Client(model.to(dtype), gl.Batch(images, torch.arange(n) % 5), training)


def observe(sender: gl.Client, knows: gl.Knowledge | None = None) -> gl.Observation:
    threat = gl.ThreatModel(~gl.Knowledge.NOTHING if knows is None else knows)
    model = sender.model
    space: gl.InputSpace = gl.ImageSpace(SHAPE)
    if isinstance(model, Encoder):
        space = TokenSpace(model.words.detach(), len(model.places))
    elif isinstance(model, torch.nn.Linear):
        space = TABLE
    elif isinstance(model, Coded):
        space = gl.TensorSpace((3,))
    dtype = next(model.parameters()).dtype
    return threat.observe(
        model,
        sender.send(),
        space=space,
        training=sender.training,
        batch_size=len(sender.batch),
        labels=sender.batch.labels,
        public=torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=dtype),
    )


def applicable(name: str, dtype: torch.dtype = torch.float64) -> tuple[gl.Client, gl.Reconstruction]:
    """Reconstruct from the first victim to which the attack applies."""
    reasons = []
    for victim in VICTIMS:
        sender = client(victim, dtype=dtype)
        try:
            return sender, build(name).reconstruct(observe(sender))
        except NotApplicable as reason:
            reasons.append(str(reason))
    raise AssertionError(f"{name} applies to no victim: {reasons}")


pytestmark = pytest.mark.parametrize("name", gl.attacks.__all__)


def test_factory_is_documented_and_keyword_only(name: str) -> None:
    factory = getattr(gl.attacks, name)
    assert inspect.getdoc(factory)
    assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(factory).parameters.values())
    assert dataclasses.is_dataclass(build(name))


def test_result_is_well_formed(name: str) -> None:
    sender, found = applicable(name)
    assert len(found) == len(sender.batch)
    assert bool(torch.isfinite(found.inputs).all())
    assert found.status in ("converged", "budget", "stalled", "interrupted", "exact")


@pytest.mark.slow
def test_same_seed_same_result_and_nothing_touched(name: str) -> None:
    sender, _ = applicable(name)
    seen = observe(sender)
    state = copy.deepcopy(seen.model.state_dict())
    before = {k: v.clone() for k, v in seen.update.tensors.items()}
    generator = torch.get_rng_state()
    first, second = (build(name).reconstruct(seen, seed=3) for _ in range(2))
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(v, state[k]) for k, v in seen.model.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in seen.update.tensors.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in seen.model.modules())
    assert all(p.grad is None for p in seen.model.parameters())


def test_missing_knowledge_raises_before_any_work(name: str) -> None:
    attack = build(name)
    if not attack.requires:  # Then it must not ask for any.
        sender, _ = applicable(name)
        assert attack.reconstruct(observe(sender, gl.Knowledge.NOTHING)).certificate is not None
        return
    called = []
    with pytest.raises(MissingKnowledge, match="grant"):
        attack.reconstruct(observe(client(), gl.Knowledge.NOTHING), callback=called.append)
    assert not called


def test_float32_updates_are_accepted(name: str) -> None:
    _, found = applicable(name, torch.float32)
    assert bool(torch.isfinite(found.inputs).all())


def test_no_observation_is_an_error(name: str) -> None:
    with pytest.raises(InvalidInput, match="at least one"):
        build(name).reconstruct_all([])


@pytest.mark.gpu
def test_runs_on_cuda(name: str) -> None:
    sender, _ = applicable(name)
    there = gl.Client(sender.model.cuda(), sender.batch.to("cuda"))
    assert build(name).reconstruct(observe(there)).inputs.is_cuda
