"""The wall: what the attacker sees and knows, and the only way to make it."""

from __future__ import annotations

import copy
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.errors import InvalidInput, NotApplicable
from gradleak.spaces import InputSpace
from gradleak.structure.probe import run_quietly
from gradleak.training import Gradient, LocalTraining, Simulator, Tensors, parameters
from gradleak.types import Update, as_update

__all__ = ["Knowledge", "Observation", "ThreatModel"]


class Knowledge(enum.Flag):
    """What a threat model grants the attacker besides the model and the update."""

    NOTHING = 0
    LABELS = enum.auto()
    """The labels of the batch."""
    BATCH_SIZE = enum.auto()
    """The number of examples behind the update."""
    TRAINING = enum.auto()
    """Loss, local steps, learning rate: the forward map, without the client's private seeds."""
    DEFENSE = enum.auto()
    """Which defense the client applies, with its parameters."""
    BUFFERS = enum.auto()
    """The client's buffers after training (running statistics)."""
    PUBLIC_DATA = enum.auto()
    """Public examples from the same distribution."""
    MALICIOUS = enum.auto()
    """The server may send a model of its choosing."""
    ORDER = enum.auto()
    """The order in which the client's examples enter its local steps (the shuffling seed)."""


_KEY = object()


@dataclass(frozen=True, eq=False)
class Observation:
    """All that an attack sees; made by :meth:`ThreatModel.observe` and by nothing else.

    Attributes:
        model: a private copy of the model that was sent out, in the client's mode.
        update: what the client shared.
        space: what one input looks like (public by nature: the model's input layer shows it).
        knows: what was granted; the fields below are None unless it says so.
        batch_size: number of examples (BATCH_SIZE).
        training: the forward map as the attacker believes it to be (TRAINING), defended if DEFENSE is granted.
        labels: (N,) or (N, C) labels (LABELS).
        public: (M, *shape) public model inputs (PUBLIC_DATA).
        batch_size_stated: whether the number of examples was stated, not assumed.
    """

    model: nn.Module
    update: Update
    space: InputSpace
    knows: Knowledge
    batch_size: int | None = None
    training: LocalTraining | None = None
    labels: Tensor | None = None
    public: Tensor | None = None
    batch_size_stated: bool = True
    key: object = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.key is not _KEY:
            raise InvalidInput("An Observation is made by ThreatModel.observe(...) only; call that instead.")

    @cached_property
    def params(self) -> Tensors:
        """The trainable parameters that were sent out, by name."""
        return parameters(self.model)

    @cached_property
    def simulator(self) -> Simulator:
        """The client as the attacker simulates it."""
        return Simulator(self.model, self.training)

    @cached_property
    def misfit(self) -> NotApplicable | None:
        """Why the model does not run on inputs of the space, as many as were stated; None if it does."""
        probe = self.space.neutral().to(self.simulator.device, self.simulator.dtype)
        try:
            with torch.no_grad():
                run_quietly(self.model, self.params, probe.expand(self.batch_size or 1, *probe.shape))
        except NotApplicable as error:
            return error
        return None

    @cached_property
    def gradient(self) -> Gradient:
        """The update as a gradient, as far as the client's step size and weight decay are known."""
        return self.simulator.as_gradient(self.update, self.batch_size)


@dataclass(frozen=True)
class ThreatModel:
    """What the attacker knows; the default is the honest-but-curious server of Zhu et al. 2019, Section 3."""

    knows: Knowledge = Knowledge.BATCH_SIZE | Knowledge.TRAINING

    def observe(
        self,
        model: nn.Module,
        update: Update | Mapping[str, Any] | Sequence[Any],
        *,
        space: InputSpace,
        training: LocalTraining | None = None,
        batch_size: int | None = None,
        labels: Tensor | None = None,
        public: Tensor | None = None,
        batch_size_stated: bool = True,
    ) -> Observation:
        """Return what the attacker sees; everything that ``knows`` does not grant is withheld.

        Args:
            model: the model that was sent out, in the mode the client used; it is copied.
            update: an ``Update``, or gradients by parameter name or in the parameters' order; it is checked.
            space: shape and value range of one input.
            training: the client's forward map, with its defenses and seeds; they are withheld here.
            batch_size: number of examples in the batch.
            labels: the batch's labels.
            public: public model inputs, (M, *shape).
            batch_size_stated: False where ``batch_size`` is an assumption, on which no proof may rest.

        Raises:
            InvalidUpdate: the update does not fit the model.
            InvalidInput: ``knows`` grants something that was not handed over.
        """
        update = as_update(update, model)
        update.check(model)
        if training is not None:
            training = training if Knowledge.DEFENSE in self.knows else training.undefended
            training = training.known(order=Knowledge.ORDER in self.knows)
        shown: dict[str, Any] = {"training": training, "batch_size": batch_size, "labels": labels, "public": public}
        for name, value in shown.items():
            flag = Knowledge.PUBLIC_DATA if name == "public" else Knowledge[name.upper()]
            if flag not in self.knows:
                shown[name] = None
            elif value is None:
                raise InvalidInput(
                    f"The threat model grants {flag.name}, but observe() was not given it; pass {name}= or remove it "
                    "from knows."
                )
        if Knowledge.BUFFERS not in self.knows:
            update = Update(update.tensors, update.kind)
        return Observation(
            copy.deepcopy(model),
            update.detach(),
            space,
            self.knows,
            **shown,
            batch_size_stated=batch_size_stated,
            key=_KEY,
        )
