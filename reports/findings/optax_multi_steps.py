"""Three faults of optax.MultiSteps, each against the same optimizer without it on the mean of the micro-batches' gradients.

    pip install optax && python optax_multi_steps.py

One parameter vector, SGD or Adam, K = 2, no data, no model, no randomness: the gradients are written down.
"""

import jax
import jax.numpy as jnp
import optax

jax.config.update("jax_enable_x64", True)

START = {"w": jnp.array([1.0, 2.0, 3.0])}
ONE = {"w": jnp.array([1 / 3, 0.2, 0.7])}
TWO = {"w": jnp.array([0.1, -1 / 7, 0.3])}
BAD = {"w": jnp.array([jnp.inf, 1.0, 1.0])}
ZERO = {"w": jnp.zeros(3)}


def run(optimizer, gradients):
    parameters, state = START, optimizer.init(START)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    return parameters["w"]


def mean(*gradients):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *gradients)


def unit():
    """Scale gradients to norm 1, as normalised SGD does; of a zero gradient it makes 0 / 0."""
    return optax.chain(
        optax.stateless(lambda g, _: jax.tree.map(lambda leaf: leaf / optax.global_norm(g), g)),
        optax.sgd(0.1),
    )


print("1. accumulator_dtype is float32 by default, also for float64 parameters")
full = run(optax.sgd(0.1), [mean(ONE, TWO)])
accumulated = run(optax.MultiSteps(optax.sgd(0.1), 2), [ONE, TWO])
wide = run(optax.MultiSteps(optax.sgd(0.1), 2, accumulator_dtype=jnp.float64), [ONE, TWO])
moved = float(jnp.linalg.norm(full - START["w"]))
print(f"   relative error of the update: {float(jnp.linalg.norm(accumulated - full)) / moved:.1e}")
print(f"   with accumulator_dtype=float64: {float(jnp.linalg.norm(wide - full)) / moved:.1e}")

print("2. one gradient that is not finite stays in the accumulator: (1 - emit) * inf is nan, not 0")
safe = optax.apply_if_finite(optax.sgd(0.1), max_consecutive_errors=100)
full = run(safe, [mean(BAD, ONE), mean(ONE, TWO), mean(ONE, TWO)])
accumulated = run(optax.MultiSteps(safe, 2), [BAD, ONE, ONE, TWO, ONE, TWO])
print(f"   full batches, the first of them skipped: {full}")
print(f"   MultiSteps, every later one skipped too: {accumulated}")

print(
    "3. the inner optimizer runs at every micro-batch, and emit * nan is nan: parameters are lost within a cycle"
)
full = run(unit(), [mean(ZERO, ONE)])
accumulated = run(optax.MultiSteps(unit(), 2), [ZERO, ONE])
print(f"   full batch, a finite gradient: {full}")
print(f"   MultiSteps, first micro-batch 0: {accumulated}")
