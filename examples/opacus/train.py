"""A client trains with Opacus; every step is captured after clipping and noise.

From this folder, with ``pip install 'gradleak[dp]'``::

    python train.py
    gradleak inspect captured --round 0
"""

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradleak as gl
from gradleak.adapters import Recorder
from gradleak.adapters.opacus import watch_steps


def make_net() -> nn.Module:
    """Return the model that everybody trains."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))


def main() -> None:
    """Train for one epoch on sixteen private pictures."""
    torch.random.default_generator.manual_seed(0)
    net, data = make_net(), TensorDataset(torch.rand(16, 1, 8, 8), torch.randint(10, (16,)))
    net, optimizer, loader = PrivacyEngine().make_private(
        module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), data_loader=DataLoader(data, 4),
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    recorder = Recorder(folder="captured", model=make_net, space=gl.ImageSpace((1, 8, 8)))
    with watch_steps(net, optimizer, recorder):
        for inputs, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), labels).backward()
            optimizer.step()


if __name__ == "__main__":
    main()
