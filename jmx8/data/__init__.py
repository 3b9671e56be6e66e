"""Files that ship with the package: a small Qwen3-MoE checkpoint and a text for it.

Trained by `benchmarks/train_tiny.py` on the sources of Python's standard library;
`training.json` in the folder tells how, and NOTICE under which licence.
"""

from pathlib import Path


# A checkpoint folder in Hugging Face's format.
TINY_QWEN3_MOE = Path(__file__).parent / "tiny-qwen3-moe"

# Text of the same kind that the checkpoint was not trained on.
HELDOUT_TEXT = TINY_QWEN3_MOE / "heldout.txt"
