"""Attacks: each name in ``__all__`` is a factory with keyword-only options that returns an :class:`Attack`."""

from gradleak.attacks.auto import auto
from gradleak.attacks.disaggregation import disaggregate
from gradleak.attacks.entity_embeddings import entity_embeddings
from gradleak.attacks.feature_matching import feature_matching
from gradleak.attacks.gauss_newton import gauss_newton
from gradleak.attacks.linear_inversion import linear_inversion
from gradleak.attacks.matching import dlg, idlg, inverting_gradients, prior_matching, tableak
from gradleak.attacks.noise_aware import noise_aware
from gradleak.attacks.patch_embedding import patch_embedding
from gradleak.attacks.recursion import recursion
from gradleak.attacks.sentences import read_sentences
from gradleak.attacks.spear import spear

__all__ = [
    "auto",
    "disaggregate",
    "dlg",
    "entity_embeddings",
    "feature_matching",
    "gauss_newton",
    "idlg",
    "inverting_gradients",
    "linear_inversion",
    "noise_aware",
    "patch_embedding",
    "prior_matching",
    "read_sentences",
    "recursion",
    "spear",
    "tableak",
]
