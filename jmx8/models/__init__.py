"""Models, and what their `config.json` says. Those in Flax are not imported here."""

from ._fields import ConfigError as ConfigError
from ._interface import LanguageModel as LanguageModel
from .qwen3 import Qwen3 as Qwen3
from .qwen3_config import Qwen3Config as Qwen3Config
