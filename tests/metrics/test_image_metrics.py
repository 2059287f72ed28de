from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

import gradleak.metrics as metrics
from gradleak.errors import InvalidInput
from gradleak.metrics import Metric, label_accuracy, mse, psnr, ssim


def pair(n=3, channels=3, height=32, width=32, noise=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(n, channels, height, width, generator=generator, dtype=torch.float64)
    truth = torch.nn.functional.avg_pool2d(truth, 3, 1, 1)
    guess = truth + noise * torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    return guess.clamp(0, 1), truth


def reference_ssim(guess, truth):
    return [
        structural_similarity(g.numpy(), t.numpy(), gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                              data_range=1.0, channel_axis=0)
        for g, t in zip(guess, truth, strict=True)
    ]  # fmt: skip


def test_catalog():
    assert metrics.__all__ == sorted(metrics.__all__)
    for name in metrics.__all__:
        metric = getattr(metrics, name)
        assert isinstance(metric, Metric)
        assert metric.name == name


@pytest.mark.parametrize("shape", [(1, 11, 11), (3, 32, 32), (3, 11, 40), (1, 28, 28), (2, 64, 17)])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.1, 1.0])
def test_ssim_is_scikit_images(shape, noise):
    guess, truth = pair(2, *shape, noise=noise)
    np.testing.assert_allclose(ssim(guess, truth).numpy(), reference_ssim(guess, truth), rtol=1e-6)


@pytest.mark.parametrize("levels", [(0.0, 0.0), (0.0, 1.0), (0.3, 0.7), (1.0, 1.0)])
def test_ssim_of_flat_images_is_scikit_images(levels):
    guess, truth = (torch.full((1, 3, 16, 16), level, dtype=torch.float64) for level in levels)
    np.testing.assert_allclose(ssim(guess, truth).numpy(), reference_ssim(guess, truth), rtol=1e-6)


def test_ssim_on_a_real_photograph_and_float32():
    from gradleak.data import demo_image

    truth = demo_image(64)
    guess = (truth + 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    np.testing.assert_allclose(ssim(guess, truth).numpy(), reference_ssim(guess.double(), truth.double()), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 10])
def test_ssim_of_small_images_uses_the_window_that_fits(size):
    guess, truth = pair(4, 3, size, size + 3)
    values = ssim(guess, truth)
    assert torch.isfinite(values).all()
    assert (values < 1).all()
    torch.testing.assert_close(ssim(truth, truth), torch.ones(4, dtype=torch.float64))


def test_ssim_of_a_small_image_by_hand():
    # 2×2 pixels leave a window of one pixel: no variance, so the luminance term alone.
    guess, truth = pair(1, 1, 2, 2)
    by_hand = ((2 * guess * truth + 1e-4) / (guess**2 + truth**2 + 1e-4)).mean()
    assert float(ssim(guess, truth)) == pytest.approx(float(by_hand), rel=1e-12)


@given(seed=st.integers(0, 2**31), noise=st.floats(0, 1), side=st.integers(1, 24))
@settings(max_examples=40, deadline=None)
def test_ssim_is_symmetric_and_at_most_one(seed, noise, side):
    guess, truth = pair(2, 1, side, side, noise=noise, seed=seed)
    values = ssim(guess, truth)
    torch.testing.assert_close(values, ssim(truth, guess))
    assert (values <= 1 + 1e-12).all()
    assert (values >= -1 - 1e-12).all()


def test_mse_and_psnr_are_scikit_images():
    guess, truth = pair()
    expected = [mean_squared_error(t.numpy(), g.numpy()) for g, t in zip(guess, truth, strict=True)]
    np.testing.assert_allclose(mse(guess, truth).numpy(), expected, rtol=1e-12)
    expected = [peak_signal_noise_ratio(t.numpy(), g.numpy(), data_range=1) for g, t in zip(guess, truth, strict=True)]
    np.testing.assert_allclose(psnr(guess, truth).numpy(), expected, rtol=1e-12)


def test_mse_reads_any_shape():
    assert mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).tolist() == [0, 4]
    assert mse(torch.ones(2, 5), torch.zeros(2, 5)).tolist() == [1, 1]


def test_psnr_of_identical_images_is_finite():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert psnr(torch.rand(1, 1, 4, 4) * 0, torch.zeros(1, 1, 4, 4)).tolist() == [200.0]


def test_psnr_is_per_image():
    truth = torch.zeros(2, 1, 8, 8)
    guess = torch.stack([torch.full((1, 8, 8), 1e-3), torch.full((1, 8, 8), 0.1**0.5)])
    values = psnr(guess, truth)
    assert values.tolist() == pytest.approx([60, 10], abs=1e-5)
    assert float(values.mean()) == pytest.approx(35, abs=1e-5)


@pytest.mark.parametrize("metric", [mse, psnr, ssim])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_unusable_example_is_nan_and_spoils_no_other(metric, bad):
    guess, truth = pair()
    expected = metric(guess, truth)
    guess[1, 0, 3, 3] = bad
    values = metric(guess, truth)
    assert torch.isnan(values[1])
    assert torch.equal(values[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("metric", [mse, psnr, ssim])
def test_examples_do_not_influence_one_another(metric):
    guess, truth = pair(5)
    torch.testing.assert_close(metric(guess, truth)[3:4], metric(guess[3:4], truth[3:4]), rtol=1e-12, atol=0)


def test_label_accuracy():
    assert label_accuracy(torch.tensor([1, 2, 3]), torch.tensor([1, 0, 3])).tolist() == [1, 0, 1]


def test_shapes_are_checked():
    with pytest.raises(InvalidInput, match="equal shapes"):
        mse(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(InvalidInput, match="images"):
        psnr(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(InvalidInput, match="class indices"):
        label_accuracy(torch.zeros(2, 3), torch.zeros(2, 3))


def test_the_direction_is_right():
    near, truth = pair(noise=0.01)
    far, _ = pair(noise=0.5)
    for metric in (mse, psnr, ssim):
        assert ((metric(near, truth) > metric(far, truth)) == metric.higher_is_better).all()
