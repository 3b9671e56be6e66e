"""Turns a model's logits into texts, and measures how well they fit one."""

from ._evaluation import perplexity as perplexity
from ._generate import generate as generate
from ._sampling import sample as sample
