"""A client of your own trains for three steps; what it would share is captured.

From this folder::

    python train.py
    gradleak attack captured --out result
"""

import torch
from torch import nn

import gradleak as gl
from gradleak.adapters import Recorder
from gradleak.adapters.pytorch import watch


def make_net() -> nn.Module:
    """Return the model that everybody trains."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))


def main() -> None:
    """Train on four private pictures."""
    torch.random.default_generator.manual_seed(0)
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    inputs, labels = torch.rand(4, 1, 8, 8), torch.tensor([3, 1, 4, 1])
    recorder = Recorder(folder="captured", model=make_net, space=gl.ImageSpace((1, 8, 8)))
    with watch(net, recorder, optimizer=optimizer, examples=len(inputs)):
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), labels).backward()
            optimizer.step()


if __name__ == "__main__":
    main()
