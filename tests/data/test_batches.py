from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gradleak.data import read_batch, write_tensors
from gradleak.errors import InvalidFile, InvalidInput


def test_inputs_and_labels(tmp_path: Path) -> None:
    inputs = torch.rand(2, 1, 3, 4)
    write_tensors(tmp_path / "t.safetensors", {"inputs": inputs, "labels": torch.tensor([3, 1], dtype=torch.int16)})
    read, labels = read_batch(tmp_path / "t.safetensors", (1, 3, 4), count=2)
    assert read.dtype == torch.float64
    assert torch.equal(read, inputs.double())
    assert labels is not None
    assert (labels.dtype, labels.tolist()) == (torch.int64, [3, 1])
    np.savez(tmp_path / "t.npz", inputs=inputs.numpy(), labels=np.array([[0.5], [1.0]]))
    read, labels = read_batch(tmp_path / "t.npz", (1, 3, 4))
    assert labels is not None
    assert labels.tolist() == [[0.5], [1.0]]


def test_bytes_are_pixels_of_images_only(tmp_path: Path) -> None:
    for shape, factor in (((1, 2, 2), 1 / 255), ((4,), 1.0)):
        values = torch.full((1, *shape), 51, dtype=torch.uint8)
        write_tensors(tmp_path / "t.safetensors", {"inputs": values})
        read, labels = read_batch(tmp_path / "t.safetensors", shape)
        assert labels is None
        assert torch.allclose(read, torch.full((1, *shape), 51 * factor, dtype=torch.float64))


def test_images_by_their_own_names_and_pictures(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "t.npz", x=pixels, y=np.array([1, 2]))
    read, labels = read_batch(tmp_path / "t.npz", (3, 6, 6))
    np.testing.assert_allclose(read.numpy(), pixels.transpose(0, 3, 1, 2) / 255)
    assert labels is not None
    assert labels.tolist() == [1, 2]
    Image.fromarray(pixels[0]).save(tmp_path / "p.png")
    assert read_batch(tmp_path / "p.png", (1, 3, 3))[0].shape == (1, 1, 3, 3)
    with pytest.raises(InvalidInput, match="is a picture, but the inputs have shape"):
        read_batch(tmp_path / "p.png", (108,))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"images": torch.zeros(2, 4)}, "no tensor named 'inputs'"),
        ({"inputs": torch.zeros(2, 5)}, r"\(2, 5\), but \(examples, 4\)"),
        ({"inputs": torch.zeros(4)}, "examples, 4"),
        ({"inputs": torch.tensor(1.0)}, "examples, 4"),
        ({"inputs": torch.zeros(0, 4)}, "examples, 4"),
        ({"inputs": torch.zeros(3, 4)}, "has 3 examples, but the batch has 2"),
        ({"inputs": torch.tensor([[0, 1, 2, float("nan")]] * 2)}, "NaN or infinite"),
        ({"inputs": torch.zeros(2, 4, dtype=torch.complex64)}, "unsupported type"),
        ({"inputs": torch.zeros(2, 4, dtype=torch.uint64)}, "unsupported type"),
        ({"inputs": torch.zeros(2, 4), "labels": torch.zeros(3)}, "one for each example"),
        ({"inputs": torch.zeros(2, 4), "labels": torch.tensor(3)}, "one for each example"),
    ],
)
def test_what_is_no_such_batch(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    write_tensors(tmp_path / "t.safetensors", tensors)
    with pytest.raises(InvalidInput, match=message):
        read_batch(tmp_path / "t.safetensors", (4,), count=2)


def test_files_far_larger_than_the_batch_are_not_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "t.npz", inputs=np.zeros((2, 4)), more=np.zeros(10**6))
    with pytest.raises(InvalidFile, match="unpacks to 8,000"):
        read_batch(tmp_path / "t.npz", (4,), count=2)
    with pytest.raises(InvalidFile, match="There is no file"):
        read_batch(tmp_path / "absent.npz", (4,))
