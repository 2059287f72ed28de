"""Attacks, defenses and training on a device that is not the CPU, without owning one.

``Elsewhere`` is CPU memory that says it is on another device. As on a GPU, an operation on tensors of two devices is an
error (numbers and indices may come from the CPU), and reading a value waits for the device, which is counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import gradleak as gl
from gradleak.attacks.base import Attack
from gradleak.attacks.matching import LBFGS, trace
from gradleak.defenses import UpdateDefense
from gradleak.defenses.base import Defended

THERE = torch.device("meta")  # Autograd knows it in every build of PyTorch; nothing else here depends on which it is.
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)


class MixedDevices(RuntimeError):
    """One operation got tensors of two devices."""


class Elsewhere(Tensor):
    """A tensor on the other device; ``here`` is its memory."""

    here: Tensor
    is_cuda = True  # Where the product asks for a GPU, it is one.

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        found = Tensor._make_wrapper_subclass(
            cls, here.size(), here.stride(), here.storage_offset(), dtype=here.dtype, layout=here.layout, device=THERE
        )
        found.here = here
        return found

    def __repr__(self) -> str:
        return f"Elsewhere({self.here})"

    def tolist(self) -> Any:
        Device.waits += 1
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run one operation where its tensors are."""
    given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    there = [a for a in given if isinstance(a, Elsewhere)]
    here = [a for a in given if not isinstance(a, Elsewhere)]
    if func in INDEXING:
        values = args[2:3]
        mixed = isinstance(args[0], Elsewhere) != bool(there)
        mixed |= any(isinstance(v, Elsewhere) != isinstance(args[0], Elsewhere) and v.dim() > 0 for v in values)
    else:
        mixed = func not in COPIES and bool(there) and any(t.dim() > 0 for t in here)
    if mixed:
        raise MixedDevices(f"{func} got tensors of two devices: {[(type(t).__name__, tuple(t.shape)) for t in given]}")
    asked = kwargs.get("device")
    goes = bool(there) if asked is None else torch.device(asked).type == THERE.type
    if func is aten.copy_.default:
        goes = isinstance(args[0], Elsewhere)
    if func is aten._local_scalar_dense.default or (there and not goes):
        Device.waits += bool(there)
    own, options = tree_map(lambda a: a.here if isinstance(a, Elsewhere) else a, (args, dict(kwargs)))
    if asked is not None:
        options["device"] = torch.device("cpu")
    if options.get("pin_memory"):
        options["pin_memory"] = False
    found = func(*own, **options)
    same = {id(t.here): t for t in there}

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if goes:
            return same[id(value)] if id(value) in same else Elsewhere(value)
        return value.clone() if id(value) in same else value

    return tree_map(place, found)


class Device(TorchDispatchMode):
    """Makes THERE a device."""

    waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Made(TorchFunctionMode):
    """Some constructors, and indices that are lists, do not pass the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(options.get("device") or "cpu") == THERE:
            if args and isinstance(args[0], Elsewhere):
                return func(*args, **options)
            return func(*args, **(options | {"device": "cpu"})).to(THERE)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1], dtype=None if args[1] else torch.long), *args[2:])
        return func(*args, **options)


@contextlib.contextmanager
def reachable() -> Iterator[None]:
    """THERE can be computed on; every operation takes many times as long."""
    true = torch.Generator

    class Generator:
        def __new__(cls, device: object = "cpu") -> Any:
            return true("cpu")

    with pytest.MonkeyPatch.context() as patch, Device(), Made():
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        yield


@pytest.fixture
def device() -> Iterator[None]:
    with reachable():
        yield


def test_notices_two_devices(device: None) -> None:
    far = torch.ones(3, 4, device=THERE)
    assert isinstance(far @ far.T, Elsewhere)
    assert float((far * 2).sum()) == 24
    assert torch.equal(far[[0, 2]].cpu(), torch.ones(2, 4))
    with pytest.raises(MixedDevices):
        far + torch.ones(4)
    with pytest.raises(MixedDevices):
        far[torch.ones(3, 4, dtype=torch.bool)] = torch.ones(12)
    with pytest.raises(MixedDevices):
        torch.ones(3)[torch.zeros(1, dtype=torch.long, device=THERE)]


def images(count: int, side: int) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def client(
    model: torch.nn.Module,
    count: int,
    side: int,
    where: torch.device,
    training: gl.LocalTraining | None = None,
    dtype: torch.dtype = torch.float32,
) -> gl.Client:
    batch = gl.Batch(images(count, side).to(where, dtype), torch.arange(3, 3 + count).to(where))
    return gl.Client(model.to(where, dtype), batch, training or gl.FedSGD())


def perceptron(activation: str = "tanh") -> torch.nn.Module:
    return gl.models.perceptron(width=48, image_size=4, activation=activation, classes=20, seed=0)


def lenet() -> torch.nn.Module:
    return gl.models.lenet(image_size=8, classes=20, seed=0)


def resnet() -> torch.nn.Module:
    return gl.models.resnet18(width=4, classes=20, seed=0).eval()


ATTACKS = {
    "auto, one image": (gl.attacks.auto(), lenet, 1, 8, None),
    "auto, a batch": (gl.attacks.auto(), lambda: perceptron("relu"), 3, 4, None),
    "auto, local steps": (gl.attacks.auto(budget=60.0), perceptron, 1, 4, gl.FedAvg(epochs=2, lr=0.1)),
    "recursion with matrices": (gl.attacks.recursion(quick=False), lenet, 1, 8, None),
    "recursion of a batch": (gl.attacks.recursion(), perceptron, 3, 4, None),
    "disaggregate": (gl.attacks.disaggregate(), resnet, 3, 32, None),
    "feature_matching": (gl.attacks.feature_matching(iterations=20), lenet, 2, 8, None),
    "gauss_newton by layers": (gl.attacks.gauss_newton(), lenet, 1, 8, None),
    "gauss_newton": (gl.attacks.gauss_newton(iterations=2), perceptron, 2, 4, None),
    "linear_inversion": (gl.attacks.linear_inversion(), lambda: perceptron("relu"), 1, 4, None),
    "spear": (gl.attacks.spear(), lambda: perceptron("relu"), 3, 4, None),
    "dlg": (gl.attacks.dlg(iterations=8), lenet, 1, 8, None),
    "dlg with restarts": (gl.attacks.dlg(iterations=8, restarts=3), lenet, 1, 8, None),
    "idlg": (gl.attacks.idlg(iterations=8), lenet, 1, 8, None),
    "inverting_gradients": (gl.attacks.inverting_gradients(iterations=2), resnet, 2, 32, None),
    "prior_matching": (gl.attacks.prior_matching(iterations=2), resnet, 2, 32, None),
    "dlg through local steps": (
        gl.attacks.dlg(iterations=6),
        perceptron,
        2,
        4,
        gl.FedAvg(epochs=2, batch_size=1, lr=0.1, checkpoint=True),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_stays_on_its_device(name: str) -> None:
    attack, make, count, side, training = ATTACKS[name]
    assert isinstance(attack, Attack)
    here = gl.simulate(client(make(), count, side, torch.device("cpu"), training), attack).reconstruction
    with reachable():
        there = gl.simulate(client(make(), count, side, THERE, training), attack).reconstruction
        inputs = there.inputs.cpu()
    assert isinstance(there.inputs, Elsewhere)
    assert there.status == here.status
    assert (there.certificate is None) == (here.certificate is None)
    if there.certificate is not None and here.certificate is not None:
        assert there.certificate.verdict == here.certificate.verdict
    # A search takes another path through other roundings, and is compared after few steps only.
    torch.testing.assert_close(inputs, here.inputs, rtol=0, atol=2e-3)


DEFENSES = [
    gl.defenses.clamp(1e-3),
    gl.defenses.clip(1.0),
    gl.defenses.gaussian_noise(1e-3),
    gl.defenses.laplacian_noise(1e-3),
    gl.defenses.prune(0.5),
    gl.defenses.top_k(0.1),
    gl.defenses.int8(),
    gl.defenses.half_precision(),
    gl.defenses.bfloat16(),
    gl.defenses.sign(),
    gl.defenses.compose(gl.defenses.clip(1.0), gl.defenses.gaussian_noise(1e-3)),
]


@pytest.mark.parametrize("defense", DEFENSES, ids=lambda d: type(d).__name__)
def test_defense_stays_on_its_device(defense: UpdateDefense, device: None) -> None:
    training = Defended(gl.FedSGD(), defense, seed=1)
    sent = [client(perceptron(), 1, 4, where, training).send() for where in (torch.device("cpu"), THERE)]
    for name, tensor in sent[1].tensors.items():
        torch.testing.assert_close(tensor.cpu(), sent[0].tensors[name])
    exchange = gl.simulate(client(perceptron(), 1, 4, THERE, training), gl.attacks.dlg(iterations=3))
    assert isinstance(exchange.reconstruction.inputs, Elsewhere)


def test_lockstep_does_not_wait_for_the_device(device: None) -> None:
    waits = []
    for rounds in (10, 20):
        solver = LBFGS(iterations=rounds, check_every=1000)
        scale = torch.logspace(0, 6, 20, dtype=torch.float64).to(THERE)

        def evaluate(x: Tensor, rows: Tensor, scale: Tensor = scale) -> tuple[Tensor, Tensor]:
            return (scale * x.square()).sum(1) + (x**4).sum(1), 2 * scale * x + 4 * x**3

        Device.waits = 0
        start = torch.ones(4, 20, dtype=torch.float64).to(THERE)
        found = solver.minimize(evaluate, start, tolerance=0.0)
        assert int(found.evaluations.max()) == rounds
        waits.append(Device.waits)
    assert waits[0] == waits[1]


def test_evaluations_do_not_wait_for_the_device(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_REPORTED", 1e9)  # Reports of progress read the objective, ten times a second.
    waits = []
    for rounds in (5, 10):
        matching = gl.attacks.dlg(iterations=rounds, restarts=3, trace=False)
        attack = dataclasses.replace(
            matching, race=False, warm_dtype=None, solver=dataclasses.replace(matching.solver, check_every=1000)
        )
        sender = client(lenet(), 1, 8, THERE)
        space = gl.ImageSpace(tuple(sender.batch.inputs.shape[1:]))
        seen = gl.ThreatModel().observe(
            sender.model, sender.send(), space=space, training=sender.training, batch_size=1
        )
        Device.waits = 0
        attack._reconstruct([seen], 0, lambda progress: None)  # A certificate waits, as often as its result needs.
        waits.append(Device.waits)
    assert waits[0] == waits[1]
