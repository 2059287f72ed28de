from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradleak.adapters import Recorder
from gradleak.adapters.distributed import capture_hook
from gradleak.capture import read_capture
from gradleak.data import read_tensors


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def steps(model: nn.Module, count: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    draw = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.rand(2, 5, generator=draw)), torch.tensor([0, 1])).backward()
        optimizer.step()


def work(rank: int, folder: str, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    plain, watched = DistributedDataParallel(net()), DistributedDataParallel(net(), bucket_cap_mb=1e-5)
    recorder = Recorder(folder=f"{folder}/c", model="nets:net")
    watched.register_comm_hook(None, capture_hook(watched.module, recorder, examples=2, every=2))
    steps(plain, 3)
    steps(watched, 3)
    same = all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    own = net()
    draw = torch.Generator().manual_seed(rank)
    nn.functional.cross_entropy(own(torch.rand(2, 5, generator=draw)), torch.tensor([0, 1])).backward()
    entry = read_capture(f"{folder}/c").entry(0, f"rank-{rank}")
    found = read_tensors(entry.path(entry.manifest.update))
    assert same
    assert all(torch.equal(found[k], p.grad) for k, p in own.named_parameters())
    dist.destroy_process_group()


def test_each_rank_records_its_own_gradient_alone(tmp_path) -> None:
    work(0, str(tmp_path), 1)
    entries = read_capture(tmp_path / "c").entries
    assert [(e.manifest.round, e.manifest.client, e.manifest.batch_size) for e in entries] == [
        (0, "rank-0", 2),
        (2, "rank-0", 2),
    ]


@pytest.mark.slow
def test_two_processes(tmp_path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path), 2), nprocs=2)
    assert len(read_capture(tmp_path / "c").entries) == 4
