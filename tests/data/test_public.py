from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from gradleak.data import public
from gradleak.errors import InvalidInput


def test_reads_npz_channels_last(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar100.npz", x_test=x, y_test=np.arange(5, dtype=np.uint8))
    np.savez(tmp_path / "mnist.npz", x_train=x[..., 0], y_train=np.arange(5, dtype=np.uint8))
    np.savez(tmp_path / "lfw64.npz", x=x, person=np.arange(5, dtype=np.int16))
    images, labels = public.images("cifar100", "test", tmp_path, tmp_path)
    assert images.shape == (5, 3, 4, 6)
    assert images.dtype == torch.float64
    assert images[2, 1, 3, 0] == x[2, 3, 0, 1] / 255
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert public.images("mnist", "train", tmp_path, tmp_path)[0].shape == (5, 1, 4, 6)
    assert public.images("lfw64", "test", tmp_path, tmp_path)[1].tolist() == [0, 1, 2, 3, 4]


def test_falls_back_on_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SVHN:
        def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
            assert (root, split, download) == (str(tmp_path / "d"), "test", True)

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return np.full((2, 2, 3), 255, np.uint8), 7

    stub = types.ModuleType("torchvision.datasets")
    stub.SVHN, stub.__all__ = SVHN, ["SVHN"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    public.require("svhn_mini.npz", None, tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", stub)
    images, labels = public.images("svhn_mini", "test", None, tmp_path / "d")
    assert images.tolist() == torch.ones(1, 3, 2, 2).tolist()
    assert labels.tolist() == [7]


def test_missing_names_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("torchvision", "torchvision.datasets", "datasets", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("cifar100", "lfw"):
        with pytest.raises(InvalidInput, match=r"--data DIR .* docs/data\.md .*, or (install|create)"):
            public.images(name, "test", tmp_path, tmp_path)
        with pytest.raises(InvalidInput, match=r"--data DIR .* docs/data\.md .*, or (install|create)"):
            public.require(f"{name}.npz", tmp_path, tmp_path)
    for name in ("wikitext2_test.txt", "bert_base_uncased_vocab.txt", "cifar100.npz"):
        with pytest.raises(InvalidInput, match=r"--data DIR .* docs/data\.md .*, or "):
            public.file(name, None, tmp_path)


def test_fetched_text_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = types.ModuleType("datasets")
    stub.load_dataset = lambda *_, split: [{"text": f" {split} \n"}, {"text": "b\n"}]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    path = public.file("wikitext2_test.txt", None, tmp_path / "d")
    assert path.read_text() == " test \nb\n"
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert public.file("wikitext2_test.txt", None, tmp_path / "d") == path
