"""Turns a model's logits into texts."""

from ._generate import generate as generate
from ._sampling import sample as sample
