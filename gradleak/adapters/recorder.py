"""What all adapters share: an update is written down, and inspected where the policy asks for that."""

from __future__ import annotations

import copy
import enum
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gradleak.audit.factories import build_defense
from gradleak.capture import Manifest, describe_training, write_capture
from gradleak.errors import GradleakError, InvalidInput, UpdateBlocked, reason
from gradleak.inspection import Inspection, Prediction, inspect
from gradleak.models.loading import Option, load
from gradleak.spaces import InputSpace
from gradleak.threat import Knowledge, ThreatModel
from gradleak.training import FedSGD, LocalTraining, batch_statistics
from gradleak.types import Update

__all__ = ["LeakWarning", "Policy", "Recorder"]

_LEAKS = (Prediction.EXACT, Prediction.PARTIAL)


class Policy(enum.StrEnum):
    """What happens to an update besides being written down."""

    OBSERVE = "observe"
    """Nothing: it is not even looked at."""
    WARN = "warn"
    """A :class:`LeakWarning` says what gives inputs away, or why that cannot be told."""
    BLOCK = "block"
    """:class:`~gradleak.errors.UpdateBlocked` is raised in its place, so that it does not leave."""


class LeakWarning(UserWarning):
    """An update gives private inputs away, or cannot be inspected."""


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Writes the updates of clients into a capture; changes nothing that it looks at, and stores no private data.

    Attributes:
        folder: of the capture; one for each run, since updates of the same round and client replace each other.
        model: how to build the model: a name of gradleak's, ``module:factory``, or the factory itself.
        model_arg: arguments of the factory.
        space: what one input is; needed by every policy but "observe".
        training: the client's training without its filters, as far as an adapter does not see it by itself.
        defense: what the client does to its update before it is recorded, as ``--defense`` has it, in order.
        unknown_filters: the same, as far as gradleak has no such defense.
        mode: of the model during training: "as-is", "eval", "train" or "batch".
        policy: what happens to an update that gives inputs away.
        seconds: that an inspection may take.
    """

    folder: str | Path
    model: str | Callable[..., nn.Module]
    model_arg: Mapping[str, Option] = field(default_factory=dict)
    space: InputSpace | None = None
    training: LocalTraining = field(default_factory=FedSGD)
    defense: tuple[str, ...] = ()
    unknown_filters: tuple[str, ...] = ()
    mode: str = "as-is"
    policy: Policy | str = Policy.OBSERVE
    seconds: float = 5.0

    def __post_init__(self) -> None:
        if Policy(self.policy) is not Policy.OBSERVE and self.space is None:
            raise InvalidInput(f"The policy {self.policy!r} inspects updates; say what an input is with space=….")
        build_defense(self.defense)  # A name that does not exist is refused before the first round.

    @cached_property
    def spec(self) -> str:
        """How the manifest names the model."""
        return self.model if isinstance(self.model, str) else _spec(self.model)

    @cached_property
    def architecture(self) -> nn.Module:
        """The model as its factory makes it; nobody trains it."""
        if isinstance(self.model, str):
            return load(self.model, self.model_arg)
        return self.model(**self.model_arg)

    @cached_property
    def trained(self) -> tuple[str, ...]:
        """Names of the parameters that clients train."""
        return tuple(k for k, p in self.architecture.named_parameters() if p.requires_grad)

    def record(
        self,
        weights: Mapping[str, Tensor],
        update: Update,
        *,
        framework: str,
        round: int | None = None,
        client: str | None = None,
        examples: int | None = None,
        training: LocalTraining | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> Inspection | None:
        """Write one update down, and return what an inspection found where the policy asks for one.

        Args:
            weights: W, the state dict that was sent out.
            update: U, as it leaves, of the trained parameters.
            framework: name and version.
            round: number of the round or step.
            client: name of the client.
            examples: number of examples behind the update.
            training: as the adapter saw it, in place of what was stated.
            more: what else it saw, which gradleak does not simulate; a note names it.

        Raises:
            UpdateBlocked: the policy is "block", and the update gives inputs away or cannot be inspected.
            InvalidFile: the capture cannot be written.
        """
        training = training or self.training
        told = describe_training(training)
        told["more"] = {**told.get("more", {}), **(more or {})}
        manifest = Manifest(
            framework=framework, round=round, client=client, batch_size=examples, model=self.spec,
            model_arg=self.model_arg, defense=self.defense, unknown_filters=self.unknown_filters,
            mode=None if self.mode == "as-is" else self.mode, **told,
        )  # fmt: skip
        write_capture(self.folder, manifest, weights, update, space=self.space)
        if self.policy == Policy.OBSERVE:
            return None
        who = f"The update of {client or 'this client'}" + ("" if round is None else f" in round {round}")
        try:
            found = self._inspect(weights, update, training, examples)
            said = f"{who} gives inputs away: {found.reason.rstrip('.')}" if found.prediction in _LEAKS else ""
        except GradleakError as error:
            found, said = None, f"{who} could not be inspected ({reason(error)})"
        if said:
            if self.policy == Policy.BLOCK:
                raise UpdateBlocked(f"{said}; it was not sent, train on more examples or protect it.")
            warnings.warn(f"{said}.", LeakWarning, stacklevel=2)
        return found

    def _inspect(
        self, weights: Mapping[str, Tensor], update: Update, training: LocalTraining, examples: int | None
    ) -> Inspection:
        assert self.space is not None  # checked in the beginning
        model = copy.deepcopy(self.architecture)
        model.load_state_dict({**model.state_dict(), **weights})
        if self.mode == "batch":
            model = batch_statistics(model)
        elif self.mode != "as-is":
            model.train(self.mode == "train")
        defense, knows = build_defense(self.defense), Knowledge.TRAINING
        if defense is not None:
            training, knows = defense.wrap(training), knows | Knowledge.DEFENSE
        if examples is not None:
            knows |= Knowledge.BATCH_SIZE
        observed = ThreatModel(knows).observe(
            model, update, space=self.space, training=training, batch_size=examples
        )  # fmt: skip
        if observed.misfit is not None:
            raise observed.misfit
        return inspect(observed, seconds=self.seconds)


def _spec(factory: Callable[..., nn.Module]) -> str:
    """Return ``module:factory`` for a factory of the user's own.

    Raises:
        InvalidInput: it has no name that another process finds.
    """
    name, module = getattr(factory, "__qualname__", ""), getattr(factory, "__module__", None) or ""
    if module == "__main__":
        path = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
        module = str(path.resolve().relative_to(Path.cwd())) if path.resolve().is_relative_to(Path.cwd()) else str(path)
    if not name or not module or "<" in name or "<" in module:
        raise InvalidInput(
            "The model's factory has no name by which commands find it later; define it at the top of a module, or "
            "name it as 'module:factory'."
        )
    return f"{module}:{name}"
