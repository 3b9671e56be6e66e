"""How well a model predicts a text."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..models import LanguageModel


def perplexity(
    model: LanguageModel,
    tokens: Sequence[int],
    *,
    window: int = 256,
    batch_size: int = 8,
) -> float:
    """Returns `exp` of the mean negative log-likelihood of the tokens of a text.

    The text is cut into windows that do not overlap; the first token of each is given
    and the others are predicted. What is left over at the end is not counted.

    Args:
        model: The model.
        tokens: Token ids of the text, at least one window of them.
        window: Tokens of a window, at least 2.
        batch_size: Windows computed at a time.

    Returns:
        The perplexity.

    Raises:
        ValueError: If the text is shorter than a window, or a number too small.
    """
    if window < 2 or batch_size < 1:
        raise ValueError(
            "perplexity: window must be at least 2 and batch_size at least 1, got "
            f"{window=}, {batch_size=}."
        )
    num_windows = len(tokens) // window
    if num_windows == 0:
        raise ValueError(
            f"perplexity: the text must have at least {window} tokens, got "
            f"{len(tokens)}. Pass a longer text or a smaller window."
        )
    windows = np.asarray(tokens[: num_windows * window], np.int32)
    windows = windows.reshape(num_windows, window)
    # The last batch is filled up, so that there is one compilation; its filling is cut.
    filling = np.zeros((-num_windows % batch_size, window), np.int32)
    batches = np.concatenate([windows, filling]).reshape(-1, batch_size, window)
    losses = [np.asarray(_token_losses(model, jnp.asarray(batch))) for batch in batches]
    losses = np.concatenate(losses)[:num_windows]
    return math.exp(losses.mean(dtype=np.float64))


@eqx.filter_jit
def _token_losses(
    model: LanguageModel, tokens: Int[Array, "b t"]
) -> Float[Array, "b t-1"]:
    logits, _ = model(tokens)
    log_probs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
