"""Text in batches of bytes, alike for all examples."""

from __future__ import annotations

import hashlib
import pathlib
from pydoc_data.topics import topics

import jax
import numpy as np

NUM_BYTES = 256
NUM_PARTS = 100


class Text:
    """A text in batches of bytes; a tenth of it, here and there, is kept for validation.

    Which bytes a batch holds depends on the text, the seed and the step alone, so a reader has no state to save.

    Args:
      sharding: of batches.
      batch: sequences per batch, over all devices.
      seq_len: bytes per sequence that something is predicted for; a batch holds one more.
      seed: of the places that training batches are cut from.
      file: default Python's language reference, as `help()` shows it.
    """

    def __init__(self, sharding: jax.sharding.Sharding, *, batch: int, seq_len: int, seed: int, file=None):
        content = "\n\n".join(topics.values()).encode() if file is None else pathlib.Path(file).read_bytes()
        text = np.frombuffer(content, np.uint8)
        if text.size < NUM_PARTS * (seq_len + 1):
            raise ValueError(f"text: expected at least {NUM_PARTS * (seq_len + 1):,} bytes, got {text.size:,}")
        frequency = np.bincount(text, minlength=NUM_BYTES) / text.size
        self.name = "Python's language reference" if file is None else pathlib.Path(file).name
        self.num_bytes, self.sha256 = text.size, hashlib.sha256(content).hexdigest()
        self.entropy = float(-np.sum(frequency * np.log(frequency, where=frequency > 0, out=np.zeros(NUM_BYTES))))
        parts = np.array_split(text, NUM_PARTS)
        self._validation = np.concatenate(parts[::10])
        self._train = np.concatenate([part for i, part in enumerate(parts) if i % 10])
        self._sharding, self._batch, self._window, self._seed = sharding, batch, seq_len + 1, seed

    def training_batch(self, step: int) -> jax.Array:
        """`[batch, seq_len + 1]` from random places."""
        random = np.random.default_rng((self._seed, step))
        return self._cut(self._train, random.integers(0, self._train.size - self._window, self._batch))

    def validation_batches(self, count: int) -> list[jax.Array]:
        """Always the same, from evenly spread places."""
        starts = np.linspace(0, self._validation.size - self._window, count * self._batch, dtype=int)
        return [self._cut(self._validation, some) for some in np.split(starts, count)]

    def _cut(self, text: np.ndarray, starts: np.ndarray) -> jax.Array:
        return self.put(np.stack([text[start : start + self._window] for start in starts]))

    def put(self, batch: np.ndarray) -> jax.Array:
        """Every process draws the whole batch, and gives each of its devices that one's part."""
        return jax.make_array_from_callback(batch.shape, self._sharding, lambda part: batch[part])


def printable(text: np.ndarray) -> str:
    """Hardly trained, a model may write what a terminal obeys."""
    return "".join(chr(byte) if chr(byte).isprintable() or byte == ord("\n") else "·" for byte in text)
