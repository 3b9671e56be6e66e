"""Models in Equinox, and what their `config.json` says."""

from ._fields import ConfigError as ConfigError
from .qwen3 import Qwen3 as Qwen3
from .qwen3_config import Qwen3Config as Qwen3Config
