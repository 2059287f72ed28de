"""The model that the clients of this federation train, their data, and how a recorder describes them."""

import torch
from torch import nn

import gradleak as gl
from gradleak.adapters import Recorder

RATE = 0.05


class Net(nn.Module):
    """A perceptron over pictures of 8 × 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, 10) of pictures (N, 1, 8, 8)."""
        return self.layers(x)


def data_of(client: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return four private pictures (4, 1, 8, 8) in [0, 1] and their labels."""
    draw = torch.Generator().manual_seed(sum(client.encode()))
    inputs = torch.rand(4, 1, 8, 8, generator=draw)
    return inputs, torch.randint(10, (4,), generator=draw)


recorder = Recorder(folder="captured", model="net:Net", space=gl.ImageSpace((1, 8, 8)), training=gl.FedAvg(lr=RATE))
