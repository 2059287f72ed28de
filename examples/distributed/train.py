"""Two processes average their gradients; what each hands to the other is captured.

From this folder::

    python train.py
    gradleak attack captured --round 0 --client rank-1 --out result
"""

import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradleak as gl
from gradleak.adapters import Recorder
from gradleak.adapters.distributed import capture_hook


def make_net() -> nn.Module:
    """Return the model that everybody trains."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))


def work(rank: int, store: str) -> None:
    """Train for two steps on the process's own pictures."""
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=2)
    torch.random.default_generator.manual_seed(rank)
    inputs, labels = torch.rand(4, 1, 8, 8), torch.tensor([3, 1, 4, 1])
    net = DistributedDataParallel(make_net())
    recorder = Recorder(folder="captured", model="train.py:make_net", space=gl.ImageSpace((1, 8, 8)))
    net.register_comm_hook(None, capture_hook(net.module, recorder, examples=len(inputs)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder,), nprocs=2)
