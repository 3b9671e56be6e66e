"""What a language model must have to be evaluated and to generate texts."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float32, Int

from ..nn._attention import KVCache
from .qwen3_config import Qwen3Config


@runtime_checkable
class LanguageModel(Protocol):
    """A model in any framework, which is a pytree; see `Qwen3` for the methods."""

    @property
    def config(self) -> Qwen3Config: ...

    def init_cache(self, batch_size: int, capacity: int) -> KVCache: ...

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        cache: KVCache | None = None,
        *,
        lengths: Int[Array, "b"] | None = None,
        last_only: bool = False,
    ) -> tuple[Float32[Array, "b *t v"], KVCache | None]: ...
