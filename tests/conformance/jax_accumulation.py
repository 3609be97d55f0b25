"""JAX accumulates in the loop: optax.MultiSteps, a scan and flax nnx against the full batch, in float64.

Prints one JSON object of relative errors (L2 over all parameters), K micro-batches of one full batch of 16 rows.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

jax.config.update("jax_enable_x64", True)

ROWS, FEATURES, WIDTH, CLASSES = 16, 8, 12, 4
RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(ROWS, FEATURES)))
Y = jnp.asarray(RANDOM.integers(0, CLASSES, ROWS))
COUNTS = jnp.asarray(RANDOM.integers(1, 9, ROWS))  # tokens of each row, as ragged text has them
PARAMETERS = {
    "inner": jnp.asarray(RANDOM.normal(size=(FEATURES, WIDTH))),
    "outer": jnp.asarray(RANDOM.normal(size=(WIDTH, CLASSES))),
}


def losses(parameters, x, y):
    logits = jnp.tanh(x @ parameters["inner"]) @ parameters["outer"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def mean(parameters, x, y, _counts):
    return losses(parameters, x, y).mean()


def token_mean(parameters, x, y, counts):
    return (losses(parameters, x, y) * counts).sum() / counts.sum()


def cut(k):
    return [a.reshape(k, ROWS // k, *a.shape[1:]) for a in (X, Y, COUNTS)]


def error(found, truth):
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(t)]) for t in (found, truth))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def moved(optimizer, gradients):
    """Return the parameters after these micro-steps, less those before."""
    state, parameters = optimizer.init(PARAMETERS), PARAMETERS
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    return jax.tree.map(lambda a, b: a - b, parameters, PARAMETERS)


def scanned(loss, k):
    """Return the gradient summed over K micro-batches in a scan, each loss divided by K."""

    def body(total, micro):
        gradient = jax.grad(loss)(PARAMETERS, *micro)
        return jax.tree.map(lambda a, b: a + b / k, total, gradient), None

    return jax.lax.scan(body, jax.tree.map(jnp.zeros_like, PARAMETERS), tuple(cut(k)))[0]


class Net(nnx.Module):
    """The same perceptron as a flax module."""

    def __init__(self, rngs):
        self.inner = nnx.Linear(FEATURES, WIDTH, param_dtype=jnp.float64, rngs=rngs)
        self.outer = nnx.Linear(WIDTH, CLASSES, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return self.outer(jnp.tanh(self.inner(x)))


def flax_moved(k):
    """Return the flax module's parameters after one update of nnx.Optimizer around MultiSteps."""
    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.MultiSteps(optax.adamw(1e-2), k), wrt=nnx.Param)

    @nnx.jit
    def micro_step(net, optimizer, x, y):
        def loss(net):
            return optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()

        optimizer.update(net, nnx.grad(loss)(net))

    for x, y, _ in zip(*cut(k), strict=True):
        micro_step(net, optimizer, x, y)
    return nnx.state(net, nnx.Param)


def main():
    found = {}
    for k in (2, 4, 16):
        for name, make in {
            "sgd": lambda: optax.sgd(0.1),
            "adamw": lambda: optax.adamw(1e-2),
        }.items():
            micro = [jax.grad(mean)(PARAMETERS, *each) for each in zip(*cut(k), strict=True)]
            whole = moved(make(), [jax.grad(mean)(PARAMETERS, X, Y, COUNTS)])
            found[f"optax.MultiSteps {name} K={k}"] = error(
                moved(optax.MultiSteps(make(), k), micro), whole
            )
        found[f"scan, mean loss K={k}"] = error(
            scanned(mean, k), jax.grad(mean)(PARAMETERS, X, Y, COUNTS)
        )
        found[f"scan, mean over ragged tokens K={k}"] = error(
            scanned(token_mean, k), jax.grad(token_mean)(PARAMETERS, X, Y, COUNTS)
        )
        found[f"flax nnx.Optimizer over MultiSteps K={k}"] = error(flax_moved(k), flax_moved(1))
    tail = [jax.grad(mean)(PARAMETERS, *each) for each in zip(*cut(4), strict=True)][:3]
    found["optax.MultiSteps, 3 of 4 micro-batches: |update|"] = float(
        sum(
            jnp.abs(leaf).sum()
            for leaf in jax.tree.leaves(moved(optax.MultiSteps(optax.sgd(0.1), 4), tail))
        )
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
