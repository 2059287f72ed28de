"""What one example looks like to the attacker and to a person; a new space is one file and one import line."""

from gradleak.spaces.base import InputSpace
from gradleak.spaces.images import ImageSpace
from gradleak.spaces.tables import Category, Number, TableSpace
from gradleak.spaces.tokens import TokenSpace
from gradleak.spaces.vectors import TensorSpace

__all__ = ["Category", "ImageSpace", "InputSpace", "Number", "TableSpace", "TensorSpace", "TokenSpace"]

from gradleak.spaces.base import NullGuess as NullGuess
