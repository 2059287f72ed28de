"""Hugging Face's vision transformers, built from their configuration without a download."""

from __future__ import annotations

import pytest

from gradleak.attacks import patch_embedding
from tests.attacks.test_patch_embedding import error, images, observe, proof, psnr
from tests.attacks.vision_transformers import build, hugging_face

pytest.importorskip("transformers")


@pytest.mark.parametrize("drop", [0.0, 0.1])
@pytest.mark.parametrize("trained", [False, True], ids=["at initialization", "moved"])
@pytest.mark.parametrize("name", ["ViT", "DeiT"])
def test_one_image_is_exact_and_proved(name: str, trained: bool, drop: float) -> None:
    model = build(lambda: hugging_face(name, drop), trained=trained).train()
    found = patch_embedding().reconstruct(observe(model, images()))
    assert psnr(found, images()) >= 90
    assert (found.status, proof(found).verdict) == ("exact", "proved")
    assert error(found, images()) <= (proof(found).bound or 0) < 1e-2


def test_where_tokens_are_normalized_a_clipped_weight_is_not_proved() -> None:
    # At initialization positions and biases of DeiT are zero, so the first norm takes the tokens' scale away.
    model = build(lambda: hugging_face("DeiT", 0.1), trained=False).train()
    for limit in (1e-2, 0.1, 1.0):
        seen = observe(
            model, images(), change=lambda u, c=limit: {k: v * min(1.0, c / float(v.norm())) for k, v in u.items()}
        )
        found = patch_embedding().reconstruct(seen)
        assert proof(found).verdict != "proved" or error(found, images()) <= (proof(found).bound or 0)
