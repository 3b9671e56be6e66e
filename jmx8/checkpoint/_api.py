"""What `jmx8.checkpoint` offers; imported when something is first asked for."""

from ._load import load as load
from ._save import save as save
from .errors import CheckpointError as CheckpointError
from .export import quantize_checkpoint as quantize_checkpoint
from .folder import (
    CheckpointFolder as CheckpointFolder,
    open_folder as open_folder,
    Source as Source,
)
from .reader import SafetensorsFile as SafetensorsFile, TensorInfo as TensorInfo
from .refit import update_weights as update_weights
