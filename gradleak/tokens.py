"""Where scripts of earlier versions look for :class:`TokenSpace`."""

from gradleak.spaces.tokens import TokenSpace

__all__ = ["TokenSpace"]
