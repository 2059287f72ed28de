from __future__ import annotations

import json
import sys
import types
import zipfile
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from gradleak.data import demo_image, load_images
from gradleak.errors import InvalidFile, InvalidInput, UnknownName


def random_bytes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def one_sentence(caught):
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))


class TestNpz:
    @pytest.fixture
    def path(self, tmp_path):
        np.savez(
            tmp_path / "set.npz",
            x_train=random_bytes(10, 8, 6, 3), y_train=np.arange(10) % 4,
            x_test=random_bytes(6, 8, 6, 3, seed=1), y_test=np.arange(6).astype(np.uint8) % 4,
        )  # fmt: skip
        (tmp_path / "set.json").write_text(json.dumps({"classes": ["a", "b", "c", "d"]}))
        return tmp_path / "set.npz"

    def test_reads_the_test_part_by_default(self, path):
        images = load_images(path)
        assert images.inputs.shape == (6, 3, 8, 6)
        assert images.inputs.dtype == torch.float32
        expected = random_bytes(6, 8, 6, 3, seed=1).transpose(0, 3, 1, 2) / 255
        np.testing.assert_allclose(images.inputs.numpy(), expected, rtol=1e-7)
        assert images.labels.tolist() == [0, 1, 2, 3, 0, 1]
        assert images.classes == ("a", "b", "c", "d")
        assert images.indices == tuple(range(6))

    def test_split_count_and_type(self, path):
        images = load_images(str(path), split="train", count=3, dtype=torch.float64)
        assert (len(images), images.inputs.dtype) == (3, torch.float64)
        assert images.indices == (0, 1, 2)
        assert torch.equal(images.inputs * 255, (images.inputs * 255).round())

    def test_random_selection_is_seeded_and_told(self, path):
        whole = load_images(path, split="train")
        first, again = (load_images(path, split="train", count=5, seed=3) for _ in range(2))
        other = load_images(path, split="train", count=5, seed=4)
        assert first.indices == again.indices != other.indices
        assert len(set(first.indices)) == 5
        assert torch.equal(first.inputs, whole.inputs[list(first.indices)])
        assert torch.equal(first.labels, whole.labels[list(first.indices)])

    def test_resizes_only_on_demand(self, path):
        assert load_images(path, shape=(3, 8, 6)).inputs.shape == (6, 3, 8, 6)
        small = load_images(path, shape=(1, 4, 4))
        assert small.inputs.shape == (6, 1, 4, 4)
        assert small.inputs.min() >= 0
        assert small.inputs.max() <= 1

    @pytest.mark.parametrize("shape", [(4, 8, 6), (4, 3, 8, 6), (4, 1, 8, 6), (4, 8, 6, 1)])
    def test_layouts(self, tmp_path, shape):
        np.savez(tmp_path / "a.npz", x=random_bytes(*shape))
        images = load_images(tmp_path / "a.npz")
        assert images.inputs.shape == (4, 3 if 3 in shape else 1, 8, 6)
        assert images.labels is None
        assert images.classes is None

    def test_floats_in_range(self, tmp_path):
        x = np.random.default_rng(0).random((2, 4, 4)).astype(np.float32)
        np.savez(tmp_path / "a.npz", x=x)
        assert torch.equal(load_images(tmp_path / "a.npz").inputs, torch.from_numpy(x)[:, None])

    @pytest.mark.parametrize("factor", [-1, 255, np.nan])
    def test_out_of_range(self, tmp_path, factor):
        np.savez(tmp_path / "a.npz", x=np.full((2, 4, 4), 0.9) * factor)
        with pytest.raises(InvalidInput, match=r"outside \[0, 1\]; undo its normalization") as caught:
            load_images(tmp_path / "a.npz")
        one_sentence(caught)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"images": random_bytes(2, 4, 4)}, "arrays images; name the images x"),
            ({"x": random_bytes(2, 4)}, "have shape"),
            ({"x": random_bytes(2, 4, 4, 5)}, "have shape"),
            ({"x": np.zeros((2, 4, 4), np.int64)}, "int64"),
            ({"x": random_bytes(2, 4, 4), "y": np.zeros(3, int)}, "labels"),
            ({"x": random_bytes(2, 4, 4), "y": np.zeros(2)}, "labels"),
            ({"x": random_bytes(0, 4, 4)}, "no image"),
        ],
    )
    def test_unusable_arrays(self, tmp_path, arrays, message):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(InvalidInput, match=message) as caught:
            load_images(tmp_path / "a.npz")
        one_sentence(caught)

    def test_splits_are_checked(self, path, tmp_path):
        with pytest.raises(InvalidInput, match="choose one of test, train"):
            load_images(path, split="valid")
        np.savez(tmp_path / "whole.npz", x=random_bytes(2, 4, 4))
        with pytest.raises(InvalidInput, match="leave the split out"):
            load_images(tmp_path / "whole.npz", split="test")

    @pytest.mark.parametrize("options", [{"count": 7}, {"count": 0}, {"shape": (2, 4, 4)}, {"shape": (3, 4)}])
    def test_unusable_options(self, path, options):
        with pytest.raises(InvalidInput) as caught:
            load_images(path, **options)
        one_sentence(caught)

    def test_pickled_arrays_are_refused(self, tmp_path):
        ran = tmp_path / "ran"

        class Hostile:
            def __reduce__(self):
                return (open, (str(ran), "w"))

        np.savez(tmp_path / "a.npz", x=np.array([Hostile()], dtype=object))
        with pytest.raises(InvalidFile, match="pickled") as caught:
            load_images(tmp_path / "a.npz")
        one_sentence(caught)
        (tmp_path / "b.npz").write_bytes(b"\x80\x04" + b"junk" * 10)
        with pytest.raises(InvalidFile):
            load_images(tmp_path / "b.npz")
        assert not ran.exists()

    def test_damaged_files(self, path, tmp_path):
        data = path.read_bytes()
        with zipfile.ZipFile(tmp_path / "raw.npz", "w") as file:
            file.writestr("x", b"no array")
        np.save(tmp_path / "single.npy", random_bytes(2, 4, 4))
        flipped = bytearray(data)
        flipped[len(data) // 2 : len(data) * 3 // 4] = b"\xff" * (len(data) * 3 // 4 - len(data) // 2)
        contents = {
            "empty": b"", "half": data[: len(data) // 2], "text": b"hello", "raw": (tmp_path / "raw.npz").read_bytes(),
            "single": (tmp_path / "single.npy").read_bytes(), "flipped": bytes(flipped),
        }  # fmt: skip
        for name, content in contents.items():
            (tmp_path / f"{name}.npz").write_bytes(content)
            with pytest.raises(InvalidFile) as caught:
                load_images(tmp_path / f"{name}.npz")
            one_sentence(caught)

    def test_an_array_that_claims_more_than_the_file_holds(self, tmp_path):
        header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (4000000000, 1000, 1000), }"
        header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
        npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\x00" * 100
        with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as file:
            file.writestr("x.npy", npy)
        with pytest.raises(InvalidFile):
            load_images(tmp_path / "bomb.npz")

    def test_class_names_by_index(self, tmp_path):
        np.savez(tmp_path / "a.npz", x=random_bytes(2, 4, 4), y=np.array([0, 2]))
        (tmp_path / "a.json").write_text(json.dumps({"class_of_index": {"0": "cat", "2": "dog"}}))
        assert load_images(tmp_path / "a.npz").classes == ("cat", "1", "dog")
        (tmp_path / "a.json").write_text("{")
        with pytest.raises(InvalidFile, match="JSON"):
            load_images(tmp_path / "a.npz")
        (tmp_path / "a.json").write_text('{"people": []}')
        assert load_images(tmp_path / "a.npz").classes is None


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("dog", "cat"):
            (tmp_path / "set" / name).mkdir(parents=True)
            for index in range(2):
                array = random_bytes(12, 10, 3, seed=index + len(name) * ord(name[0]))
                Image.fromarray(array).save(tmp_path / "set" / name / f"{index}.png")
        (tmp_path / "set" / "cat" / "notes.txt").write_text("no image")
        (tmp_path / "set" / "empty").mkdir()
        return tmp_path / "set"

    def test_subfolders_are_classes(self, folder):
        images = load_images(folder)
        assert images.inputs.shape == (4, 3, 12, 10)
        assert images.labels.tolist() == [0, 0, 1, 1]
        assert images.classes == ("cat", "dog")
        array = np.asarray(Image.open(folder / "dog" / "1.png")).transpose(2, 0, 1) / 255
        np.testing.assert_allclose(images.inputs[3].numpy(), array, rtol=1e-6)

    def test_loose_images_have_no_labels(self, folder):
        images = load_images(folder / "dog")
        assert images.labels is None
        assert images.classes is None

    def test_a_split_is_a_subfolder(self, folder):
        assert len(load_images(folder.parent, split="set")) == 4
        with pytest.raises(InvalidInput, match="no split 'train'"):
            load_images(folder, split="train")

    def test_mixed_folders_are_refused(self, folder):
        Image.fromarray(random_bytes(4, 4, 3)).save(folder / "loose.png")
        with pytest.raises(InvalidInput, match="subfolders for classes"):
            load_images(folder)

    def test_sizes_must_agree_or_be_asked_for(self, folder):
        Image.fromarray(random_bytes(20, 30, 3)).save(folder / "dog" / "2.jpg")
        with pytest.raises(InvalidInput, match="pass the shape"):
            load_images(folder)
        assert load_images(folder, shape=(3, 8, 8)).inputs.shape == (5, 3, 8, 8)

    @pytest.mark.parametrize("mode", ["L", "1", "LA", "RGB", "RGBA", "P", "CMYK"])
    def test_color_modes(self, tmp_path, mode):
        Image.fromarray(random_bytes(6, 6, 3)).convert(mode).save(tmp_path / "a.tif")
        assert load_images(tmp_path).inputs.shape == (1, 1 if mode in ("L", "LA", "1") else 3, 6, 6)
        assert load_images(tmp_path, shape=(3, 6, 6)).inputs.shape == (1, 3, 6, 6)

    def test_deep_images_are_refused(self, tmp_path):
        Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "a.png")
        with pytest.raises(InvalidInput, match="8-bit") as caught:
            load_images(tmp_path)
        one_sentence(caught)

    def test_camera_orientation_is_applied(self, tmp_path):
        image = Image.fromarray(random_bytes(4, 8, 3))
        exif = image.getexif()
        exif[0x0112] = 6  # rotated by a quarter
        image.save(tmp_path / "a.png", exif=exif)
        assert load_images(tmp_path).inputs.shape == (1, 3, 8, 4)

    def test_unreadable_files(self, folder):
        data = (folder / "cat" / "0.png").read_bytes()
        for content in (b"", b"text", data[:60], data[:200]):
            (folder / "cat" / "0.png").write_bytes(content)
            with pytest.raises(InvalidFile, match=r"0\.png") as caught:
                load_images(folder)
            one_sentence(caught)

    def test_pictures_without_end(self, tmp_path):
        Image.new("1", (6000, 6000)).save(tmp_path / "a.png")
        with pytest.raises(InvalidFile, match="has 6000 × 6000 pixels; resize it to at most 25 million") as caught:
            load_images(tmp_path / "a.png", shape=(3, 8, 8))
        one_sentence(caught)

    def test_large_pictures_are_averaged_before_they_are_resized(self, tmp_path, monkeypatch):
        y, x = np.mgrid[0:1200, 0:1000] / 1000
        smooth = (127 * (1 + np.sin(9 * x) * np.cos(7 * y))).round().astype(np.uint8)
        Image.fromarray(smooth).save(tmp_path / "a.png")
        large = load_images(tmp_path / "a.png", shape=(1, 12, 10)).inputs
        monkeypatch.setattr("gradleak.data.images._LARGE", 10**9)
        exact = load_images(tmp_path / "a.png", shape=(1, 12, 10)).inputs
        assert 0 < (large - exact).abs().max() < 5e-3

    def test_only_what_is_asked_for_is_read(self, folder):
        (folder / "dog" / "1.png").write_bytes(b"broken")
        assert len(load_images(folder, count=3)) == 3

    def test_empty_folder(self, tmp_path):
        with pytest.raises(InvalidInput, match="no image"):
            load_images(tmp_path)


def test_neither_file_nor_folder(tmp_path):
    with pytest.raises(InvalidFile, match="no file or folder"):
        load_images(tmp_path / "absent")
    with pytest.raises(InvalidFile, match="no file"):
        load_images(tmp_path / "absent.npz")
    (tmp_path / "a.csv").write_text("1")
    with pytest.raises(InvalidInput, match="neither"):
        load_images(tmp_path / "a.csv")


def test_resizing_keeps_the_middle_and_averages():
    from gradleak.data.images import _fit

    wide = torch.zeros(3, 8, 16)
    wide[:, :, 4:12] = 1
    assert torch.equal(_fit(wide, (3, 8, 8)), torch.ones(3, 8, 8))
    checkers = torch.zeros(1, 16, 16)
    checkers[:, ::2, ::2] = checkers[:, 1::2, 1::2] = 1
    assert (_fit(checkers, (1, 2, 2)) - 0.5).abs().max() < 0.1  # without anti-aliasing: 0 or 1
    gray = _fit(torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 4, 4), (1, 4, 4))
    torch.testing.assert_close(gray, torch.full((1, 4, 4), 0.299))


class TestTorchvision:
    @pytest.fixture
    def stub(self, monkeypatch):
        calls = []

        class CIFAR100:
            classes = ("a", "b")

            def __init__(self, root, train=True, transform=None, download=False):
                calls.append((root, train, download))

            def __len__(self):
                return 5

            def __getitem__(self, index):
                return Image.fromarray(random_bytes(8, 8, 3, seed=index)), index % 2

        class SVHN:
            def __init__(self, root, split="train", download=False):
                if split not in ("train", "test"):
                    raise ValueError("Unknown value for split")
                calls.append((root, split, download))

            def __len__(self):
                return 2

            def __getitem__(self, index):
                return torch.full((1, 4, 4), 0.5), torch.tensor(index)

        class Down:
            def __init__(self, root, train=True, download=False):
                raise OSError("no route to host\ndetails")

        parent, module = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
        module.CIFAR100, module.SVHN, module.Down = CIFAR100, SVHN, Down
        module.__all__ = ["CIFAR100", "Down", "SVHN"]
        parent.datasets = module
        monkeypatch.setitem(sys.modules, "torchvision", parent)
        monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
        return calls

    def test_loads(self, stub, tmp_path):
        images = load_images("torchvision:CIFAR100", split="train", count=3, root=tmp_path)
        assert stub == [(str(tmp_path), True, True)]
        assert images.inputs.shape == (3, 3, 8, 8)
        assert images.labels.tolist() == [0, 1, 0]
        assert images.classes == ("a", "b")

    def test_split_by_name(self, stub, tmp_path):
        images = load_images("torchvision:SVHN", root=tmp_path)
        assert stub == [(str(tmp_path), "test", True)]
        assert images.inputs.unique().tolist() == [0.5]
        assert images.labels.tolist() == [0, 1]

    def test_errors(self, stub, tmp_path):
        with pytest.raises(UnknownName, match="did you mean 'CIFAR100'"):
            load_images("torchvision:CIFAR10O")
        with pytest.raises(InvalidInput, match="no split 'extra'"):
            load_images("torchvision:CIFAR100", split="extra")
        with pytest.raises(InvalidInput, match="no route to host") as caught:
            load_images("torchvision:Down", root=tmp_path)
        one_sentence(caught)
        with pytest.raises(InvalidInput, match="Unknown value for split"):
            load_images("torchvision:SVHN", split="valid", root=tmp_path)

    def test_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchvision", None)
        monkeypatch.delitem(sys.modules, "torchvision.datasets", raising=False)
        with pytest.raises(InvalidInput, match=r"pip install 'gradleak\[vision\]'") as caught:
            load_images("torchvision:CIFAR100")
        one_sentence(caught)

    def test_installed_but_broken(self, tmp_path, monkeypatch):
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(
            "raise RuntimeError('operator torchvision::nms does not exist')\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
        monkeypatch.delitem(sys.modules, "torchvision.datasets", raising=False)
        with pytest.raises(InvalidInput, match=r"cannot be imported .*nms"):
            load_images("torchvision:CIFAR100")


class TestHuggingFace:
    @pytest.fixture
    def stub(self, monkeypatch):
        class Feature:
            def __init__(self, names=()):
                self.names = list(names)

        picture, label = type("Image", (Feature,), {}), type("ClassLabel", (Feature,), {})

        class Dataset(list):
            features: ClassVar = {"img": picture(), "coarse": label("xy"), "fine": label("abc"), "id": Feature()}

        rows = [{"img": Image.fromarray(random_bytes(6, 6, 3, seed=i)), "coarse": 0, "fine": i % 3, "id": i}
                for i in range(4)]  # fmt: skip
        calls = []

        def load_dataset(name, *, split):
            calls.append((name, split))
            if name == "text":
                data = Dataset([{"text": "a"}])
                data.features = {"text": Feature()}
                return data
            if name != "cifar100":
                raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
            return Dataset(rows)

        module = types.ModuleType("datasets")
        module.load_dataset = load_dataset
        module.get_dataset_split_names = lambda name: ["train", "test"]
        monkeypatch.setitem(sys.modules, "datasets", module)
        return calls

    def test_loads_the_finest_labels(self, stub):
        images = load_images("hf:cifar100", count=4)
        assert stub == [("cifar100", "test")]
        assert images.inputs.shape == (4, 3, 6, 6)
        assert images.labels.tolist() == [0, 1, 2, 0]
        assert images.classes == ("a", "b", "c")

    def test_errors(self, stub):
        with pytest.raises(InvalidInput, match=r"doesn't exist on the Hub\); check the name") as caught:
            load_images("hf:absent", split="train")
        one_sentence(caught)
        with pytest.raises(InvalidInput, match="no image column"):
            load_images("hf:text")

    def test_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(InvalidInput, match=r"pip install 'gradleak\[datasets\]'"):
            load_images("hf:cifar100")


class TestDemoImage:
    @pytest.mark.parametrize("size", [1, 28, 32, 64, 224])
    def test_is_a_photograph_in_range(self, size):
        image = demo_image(size)
        assert image.shape == (1, 3, size, size)
        assert image.dtype == torch.float32
        assert image.min() >= 0
        assert image.max() <= 1
        assert size == 1 or image.std() > 0.1

    def test_is_scikit_images_chelsea(self):
        from skimage.data import chelsea

        middle = torch.from_numpy(chelsea()).permute(2, 0, 1)[:, :, 75:376][:, :, :300] / 255
        torch.testing.assert_close(demo_image(300)[0], middle, atol=1e-6, rtol=0)

    def test_refuses_no_size(self):
        with pytest.raises(InvalidInput):
            demo_image(0)


@pytest.mark.data
class TestSamples:
    @pytest.mark.parametrize(
        ("name", "shape", "classes"),
        [("cifar100", (3, 32, 32), 100), ("cifar10", (3, 32, 32), 10), ("mnist", (1, 28, 28), 10),
         ("svhn_mini", (3, 32, 32), 10)],
    )  # fmt: skip
    def test_labeled(self, data_dir, name, shape, classes):
        images = load_images(data_dir / f"{name}.npz", split="test", count=20, seed=0)
        assert images.inputs.shape == (20, *shape)
        assert len(images.classes) == classes
        assert images.labels.max() < classes

    def test_faces_and_imagenet(self, data_dir):
        assert load_images(data_dir / "lfw64.npz", count=2).inputs.shape == (2, 3, 64, 64)
        images = load_images(data_dir / "imagenet_samples.npz", count=2, shape=(3, 64, 64))
        assert images.inputs.shape == (2, 3, 64, 64)
        assert all(not images.classes[label].isdecimal() for label in images.labels.tolist())

    def test_a_table_is_no_set_of_images(self, data_dir):
        with pytest.raises(InvalidInput, match="name the images x"):
            load_images(data_dir / "adult.npz")
