"""The models that the papers attack, with their initializations, and models by name.

``__all__`` lists the factories; a new model is one file and one import line here.
"""

from gradleak.models.lenets import lenet
from gradleak.models.perceptrons import perceptron
from gradleak.models.resnets import dlg_resnet, resnet18, resnet20, resnet32
from gradleak.models.transformers import vision_transformer

__all__ = ["dlg_resnet", "lenet", "perceptron", "resnet18", "resnet20", "resnet32", "vision_transformer"]

from gradleak.models.loading import load as load
from gradleak.models.loading import locate as locate
from gradleak.models.loading import parse_options as parse_options
