from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.filter import FilterChainType, FilterContextKey
from nvflare.apis.fl_context import FLContextManager
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy

from gradleak.adapters.nvflare import CaptureFilter
from gradleak.capture import read_capture
from gradleak.data import read_tensors
from gradleak.errors import InvalidInput

MODULE = """
import torch
from torch import nn
import gradleak as gl
from gradleak.adapters import Recorder
def make():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
recorder = Recorder(folder="elsewhere", model=make, training=gl.FedAvg(lr=0.1), defense=("clip:norm=1",))
"""
NAMES = ("0.weight", "0.bias", "1.weight", "1.bias")


@pytest.fixture
def passed(tmp_path, monkeypatch):
    """Return how to send weights in and a result out through two filters, as a client's runner does."""
    (tmp_path / "nv_net.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("nv_net", None)
    manager = FLContextManager(identity_name="site-1", job_id="job")

    def run(sent: DXO | None, left: DXO, *privacy: object) -> DXO:
        def through(dxo: DXO, kind: str, *filters: object) -> DXO:
            with manager.new_context() as context:
                shareable = dxo.to_shareable()
                shareable.set_header(AppConstants.CURRENT_ROUND, 5)
                for one in filters:
                    one.set_prop(FilterContextKey.CHAIN_TYPE, kind)
                    shareable = one.process(shareable, context)
                from nvflare.apis.dxo import from_shareable

                return from_shareable(shareable)

        capture = [CaptureFilter(str(tmp_path / "c"), "nv_net:recorder", 8) for _ in range(2)]
        if sent is not None:
            through(sent, FilterChainType.TASK_DATA_CHAIN, capture[0])
        return through(left, FilterChainType.TASK_RESULT_CHAIN, *privacy, capture[1])

    return run


def state(scale: float) -> dict[str, np.ndarray]:
    shapes = {"0.weight": (3, 4), "0.bias": (3,), "1.weight": (3,), "1.bias": (3,), "1.running_mean": (3,)}
    return {k: scale * np.arange(1, 1 + np.prod(s), dtype=np.float32).reshape(s) for k, s in shapes.items()}


@pytest.mark.parametrize("kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
def test_what_leaves_is_recorded_and_passes_unchanged(passed, kind: str) -> None:
    left = state(3.0 if kind == DataKind.WEIGHTS else 2.0)
    reply = passed(DXO(DataKind.WEIGHTS, data=state(1.0)), DXO(kind, data={k: v.copy() for k, v in left.items()}))
    assert all(np.array_equal(reply.data[k], v) for k, v in left.items())
    entry = read_capture("c").entry(5, "site-1")
    assert entry.manifest.batch_size == 8
    assert entry.manifest.defense == ("clip:norm=1",)
    assert entry.manifest.framework.startswith("NVFlare 2.")
    found = read_tensors(entry.options()["update"])
    assert set(found) == set(NAMES)
    assert all(torch.equal(found[k], torch.from_numpy(state(2.0)[k])) for k in NAMES)
    assert set(read_tensors(entry.options()["weights"])) == set(state(1.0))


def test_it_sees_what_the_filters_before_it_made(passed) -> None:
    sent, left = DXO(DataKind.WEIGHTS, data=state(1.0)), DXO(DataKind.WEIGHT_DIFF, data=state(0.01))
    reply = passed(sent, left, PercentilePrivacy(percentile=50, gamma=0.05))
    found = read_tensors(read_capture("c").entry().options()["update"])
    assert all(torch.equal(found[k], torch.as_tensor(reply.data[k])) for k in NAMES)
    assert float(found["0.weight"].abs().max()) == pytest.approx(0.05)


def test_weights_must_have_arrived(passed) -> None:
    with pytest.raises(InvalidInput, match="input filters"):
        passed(None, DXO(DataKind.WEIGHT_DIFF, data=state(1.0)))
