"""A client, and one exchange between it and a curious server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from gradleak.errors import InvalidInput
from gradleak.spaces import ImageSpace, InputSpace
from gradleak.threat import Observation, ThreatModel
from gradleak.training import FedSGD, LocalTraining
from gradleak.types import Batch, Reconstruction, Update

__all__ = ["Client", "Exchange", "simulate"]


class Reconstructs(Protocol):
    """Anything that turns an observation into a reconstruction; every attack does."""

    def reconstruct(self, observation: Observation, *, seed: int = 0) -> Reconstruction:
        """Reconstruct one batch."""
        ...


@dataclass(frozen=True, eq=False)
class Client:
    """A client: a model it received, a private batch, and the local training (defended or not) it runs."""

    model: nn.Module
    batch: Batch
    training: LocalTraining = field(default_factory=FedSGD)

    def send(self) -> Update:
        """Run local training and return the update that leaves the client."""
        return self.training(self.model, self.batch)


@dataclass(frozen=True, eq=False)
class Exchange:
    """One simulated exchange: what was private, what was seen, what came back.

    ``truth`` holds the decoded private inputs (images in [0, 1]) for metrics; no attack has seen it.
    """

    truth: Batch
    observation: Observation
    reconstruction: Reconstruction


def simulate(
    client: Client,
    attack: Reconstructs,
    *,
    threat: ThreatModel | None = None,
    space: InputSpace | None = None,
    public: Tensor | None = None,
    seed: int = 0,
) -> Exchange:
    """Let ``client`` send its update and let ``attack`` reconstruct the batch from what ``threat`` shows.

    Args:
        client: model, private batch, local training.
        attack: sees only the observation.
        threat: defaults to an honest-but-curious server who knows batch size and training.
        space: shape and range of one input; defaults to images in [0, 1] of the batch's shape.
        public: public model inputs (M, *shape), shown where ``threat`` grants PUBLIC_DATA.
        seed: of the attack.

    Raises:
        InvalidInput: the batch lies outside the space, or does not fit the model.
        GradleakError: whatever the attack raises.
    """
    inputs = client.batch.inputs
    if space is None:
        shape = tuple(inputs.shape[1:])
        if len(shape) != 3:
            raise InvalidInput(f"Inputs of shape {shape} are no images; pass space=TensorSpace({shape}).")
        space = ImageSpace(shape)
    # Decoding clamps images: outside the space, the truth would be scored against something that no client had.
    space.check(inputs)
    observation = (ThreatModel() if threat is None else threat).observe(
        client.model,
        client.send(),
        space=space,
        training=client.training,
        batch_size=len(client.batch),
        labels=client.batch.labels,
        public=public,
    )
    reconstruction = attack.reconstruct(observation, seed=seed)
    truth = Batch(space.decode(inputs), client.batch.labels)
    return Exchange(truth, observation, reconstruction)
