"""What is done with hostile files: everything that reads a checkpoint's description.

Used by test_fuzz.py for a while and by benchmarks/fuzz_checkpoint.py for as long as one
likes.
"""

import copy
import io
import json
import os
import sys
import tempfile
import zlib
from pathlib import Path
from random import Random
from typing import Any

import equinox as eqx
import jax
import numpy as np

from jmx8._mx_array import MXArray
from jmx8.checkpoint import CheckpointError
from jmx8.checkpoint._load import _leaves
from jmx8.checkpoint.describe import describe_open
from jmx8.checkpoint.errors import parse_json_object, read_json_object
from jmx8.checkpoint.folder import open_folder
from jmx8.checkpoint.formats import MODELOPT, MODELOPT_FILE, MXFP8
from jmx8.checkpoint.ignore import ignored_modules
from jmx8.checkpoint.names import QWEN3
from jmx8.checkpoint.plan import make_plan
from jmx8.checkpoint.reader import parse
from jmx8.checkpoint.stored import find_weights, settle_scales
from jmx8.convert import quantize_model
from jmx8.models import ConfigError, Qwen3, Qwen3Config

from .mx_checkpoints import DENSE, random_weights, stored, write_folder


CONFIG = DENSE | {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 40}
CONFIG |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIG |= {"head_dim": 16}
CONFIG |= {"quantization_config": MXFP8.quantization_config(["lm_head"])}
INDEX = "model.safetensors.index.json"
FILE = "model.safetensors"

_watched: list[str] = []  # the folder that may be read, while something is executed


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if event != "open" or not _watched or not isinstance(args[0], str | bytes):
        return
    path = os.path.realpath(os.fsdecode(args[0]))
    if not path.startswith(_watched[0]):
        raise AssertionError(f"{path} was opened, outside of {_watched[0]}")


def _checked(error: ValueError) -> str:
    """Returns the text of an error, which cannot write to a terminal what it likes."""
    assert all(line.isprintable() for line in str(error).split("\n"))
    return str(error)


class Target:
    """A folder of small checkpoints of which one file after the other is replaced.

    Attributes:
        num_folders: How many inputs have been tried as a file of a folder.
    """

    def __init__(self, root: Path):
        tensors = stored(random_weights(CONFIG), MXFP8)
        self.single = write_folder(root / "single", CONFIG, tensors)
        self.sharded = write_folder(root / "sharded", CONFIG, tensors, num_shards=2)
        content = MODELOPT.side_file_contents(["lm_head"])[MODELOPT_FILE]
        (self.sharded / MODELOPT_FILE).write_text(json.dumps(content))
        (root / "outside.safetensors").write_bytes((self.single / FILE).read_bytes())
        shard = sorted(self.sharded.glob("*.safetensors"))[0].name
        # Every kind of input: the file that it replaces.
        self.files = (
            self.single / FILE,
            self.single / FILE,  # without the length of the header, which is put before
            self.sharded / "config.json",
            self.sharded / INDEX,
            self.sharded / MODELOPT_FILE,
            self.sharded / shard,
        )
        self.num_folders = 0
        self.originals = [file.read_bytes() for file in self.files]
        model = eqx.filter_eval_shape(
            Qwen3, Qwen3Config.from_hf(CONFIG), key=jax.eval_shape(jax.random.key, 0)
        )
        self.leaves = _leaves(quantize_model(model))
        self.modules = {
            path.rpartition("/")[0]: QWEN3.names(path, leaf.shape)
            for path, leaf in self.leaves.items()
        }
        assert isinstance(self.leaves["layers/0/mlp/up_proj/weight"], MXArray)

    def seeds(self) -> list[bytes]:
        """Returns inputs that are valid checkpoints."""
        result = [bytes([i]) + original for i, original in enumerate(self.originals)]
        file = self.originals[1]
        length = int.from_bytes(file[:8], "little")
        result[1] = b"\1" + file[8 : 8 + length] + b"\0" + file[8 + length :]
        return result

    def execute(self, data: bytes) -> str:
        """Reads a checkpoint of which the first byte of `data` names the file, and the
        rest is its content.

        Returns:
            "read", or what was refused and why.

        Raises:
            Exception: If anything else happens than that.
        """
        kind = data[0] % len(self.files) if data else 0
        content = data[1:]
        if kind == 1:
            text, _, tail = content.partition(b"\0")
            content = len(text).to_bytes(8, "little") + text + tail
        file = self.files[kind]
        try:
            # In memory: what is not even a header or JSON is refused by the same code
            # as in a folder, and far sooner. Some of it is tried in the folder, too.
            if kind in (0, 1, 5):
                parse(io.BytesIO(content), file, len(content))
            else:
                parse_json_object(content, file)
        except CheckpointError as error:
            if zlib.crc32(content) % 16:
                return _checked(error)
        file.write_bytes(content)
        self.num_folders += 1
        _watched[:] = [os.path.realpath(file.parent)]
        try:
            self._read(file.parent)
            return "read"
        except (CheckpointError, ConfigError) as error:
            return _checked(error)
        finally:
            _watched.clear()
            file.write_bytes(self.originals[kind])

    def _read(self, folder: Path) -> None:
        error = None
        try:
            checkpoint = open_folder(folder)
            describe_open(checkpoint)
            weights = find_weights(checkpoint)
            settled = settle_scales(weights.values(), requantize=True)
            count = 0
            for weight in settled.values():
                for _, rows in weight.iter_rows(4096):
                    # Scales of blocks are repeated, floats widened: 4 bytes and a half.
                    arrays = [rows] if isinstance(rows, np.ndarray) else rows
                    count += sum(array.nbytes for array in arrays)
            on_disk = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            assert count <= 5 * on_disk, (count, on_disk)
            make_plan(checkpoint, weights, self.leaves, QWEN3, requantize=True)
        except CheckpointError as caught:
            error = caught
        # What a config says is looked at even if the weights were refused.
        config = _json(folder / "config.json")
        if config is not None:
            ignored_modules(config, folder / "config.json", self.modules)
            Qwen3Config.from_hf(config)
        if error is not None:
            raise error


# What a structure-aware mutation puts in the place of anything.
VALUES: list[Any] = [
    *(None, True, 0, 1, -1, 1.5, 2**31, 2**48, 2**63, 2**64, 10**400, "", "x", [], {}),
    *("F8_E4M3", "F8_E8M0", "F8_E5M2", "U8", "BF16", "F32", "I64", "BOOL"),
    *([0, 0], [1, 32], [128, 128], [0, 2**47], [2**24, 2**24], [0] * 80, [[[]]]),
    *("../outside.safetensors", "/etc/passwd", "..", "a\0b", "\ud800", "\x1b[2J", "é"),
    *(
        "model.safetensors",
        "config.json",
        "mxfp8",
        "fp8",
        "modelopt",
        "torchao",
        "MXFP8",
    ),
    *("re:.*", "re:(", "re:(a+)+$", "*", "lm_head", ["re:(.*)*x"], ["lm_head", 1]),
    *("modules_to_not_convert", "quant_method", "quantization_config", "weight_map"),
    *("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight_scale"),
    *("model.layers.0.mlp.up_proj._weight_qdata", "__metadata__", "data_offsets"),
]


def mutate(data: bytes, random: Random) -> bytes:
    """Changes the JSON of an input here and there, if it is JSON; keeps the rest."""
    kind = data[0] % 6 if data else 0
    text, tail = data[1:], b""
    if kind in (0, 5):
        length = int.from_bytes(text[:8], "little")
        text, tail = text[8 : 8 + length], text[8 + length :]
    elif kind == 1:
        text, _, tail = text.partition(b"\0")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return data
    for _ in range(random.randint(1, 4)):
        document = _mutate_node(document, random)
    result = json.dumps(document, ensure_ascii=random.random() < 0.9)
    if random.random() < 0.05:  # a key that appears twice
        key = (
            random.choice(list(document) or ["x"])
            if isinstance(document, dict)
            else "x"
        )
        result = result.replace("{", f"{{{json.dumps(key)}: 1, ", 1)
    text = result.encode(errors="surrogatepass")
    if random.random() < 0.1:
        tail = tail[: random.randint(0, len(tail))] + bytes(random.randint(0, 9))
    start = bytes([kind])
    if kind in (0, 5):
        return start + len(text).to_bytes(8, "little") + text + tail
    return start + text + (b"\0" + tail if kind == 1 else b"")


def _mutate_node(node: Any, random: Random) -> Any:
    """Returns a document with one change, at a place as deep as chance has it."""
    keys: list[Any] = []
    if isinstance(node, dict | list):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys or random.random() < 0.15:
        return copy.deepcopy(random.choice(VALUES))
    key = random.choice(keys)
    choice = random.random()
    if choice < 0.6:
        node[key] = _mutate_node(node[key], random)
    elif choice < 0.7:
        del node[key]
    elif choice < 0.8:
        node[key] = copy.deepcopy(node[random.choice(keys)])
    elif choice < 0.9 and isinstance(node[key], int):
        node[key] += random.choice([-32, -1, 1, 32])
    elif isinstance(node, dict):
        node[str(random.choice([*keys, *map(str, VALUES)]))] = node.pop(key)
    return node


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path)
    except CheckpointError:
        return None


def make_target() -> Target:
    """Returns a target in a folder of its own, in memory where there is such a place.

    From now on this process notices if a checkpoint makes it open another file.
    """
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    target = Target(Path(tempfile.mkdtemp(prefix="jmx8-fuzz-", dir=place)))
    for seed in target.seeds():
        assert target.execute(seed) == "read", target.execute(seed)
    sys.addaudithook(_watch)
    return target
