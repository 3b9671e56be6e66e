"""Reading and writing of Hugging Face checkpoint folders."""

from .errors import CheckpointError as CheckpointError
from .export import (
    FormatName as FormatName,
    quantize_checkpoint as quantize_checkpoint,
    SHARD_BYTES as SHARD_BYTES,
)
from .folder import (
    CheckpointFolder as CheckpointFolder,
    open_folder as open_folder,
    Source as Source,
)
from .load import Framework as Framework, load as load, LoadDtype as LoadDtype
from .reader import SafetensorsFile as SafetensorsFile, TensorInfo as TensorInfo
from .refit import update_weights as update_weights
from .save import save as save
