"""Keras 3 with `gradient_accumulation_steps`, torch, float64: the weights after one epoch against the full batch's.

Prints one JSON object of relative errors (L2 of the movement of all weights).
"""

from __future__ import annotations

import json
import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np

keras.config.set_floatx("float64")
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(48, 8))
Y = RANDOM.integers(0, 4, 48)
WEIGHTS = RANDOM.integers(1, 9, 48).astype("float64")


def trained(k, optimizer, *, rows=48, weighted=False):
    """Return how far one epoch of full batches of 16, cut into K, moves the weights."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(12, "tanh"), keras.layers.Dense(4)]
    )
    before = [np.copy(w) for w in model.get_weights()]
    made = getattr(keras.optimizers, optimizer)(
        1e-2, gradient_accumulation_steps=k if k > 1 else None
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(made, loss)
    weights = WEIGHTS[:rows] if weighted else None
    model.fit(
        X[:rows],
        Y[:rows],
        sample_weight=weights,
        batch_size=16 // k,
        epochs=1,
        shuffle=False,
        verbose=0,
    )
    return np.concatenate(
        [np.ravel(a - b) for a, b in zip(model.get_weights(), before, strict=True)]
    )


def error(found, truth):
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def main():
    found = {}
    for optimizer in ("SGD", "Adam"):
        for k in (2, 4):
            found[f"{optimizer} K={k}"] = error(trained(k, optimizer), trained(1, optimizer))
    found["SGD K=4, incomplete last cycle (40 rows)"] = error(
        trained(4, "SGD", rows=40), trained(1, "SGD", rows=40)
    )
    found["SGD K=4, the same against 32 rows: the tail is not applied"] = error(
        trained(4, "SGD", rows=40), trained(1, "SGD", rows=32)
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
