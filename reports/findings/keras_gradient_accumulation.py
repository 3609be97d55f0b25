"""Three faults of Keras' gradient_accumulation_steps: the schedule, the average, and a weight that is not always used.

    pip install keras torch && KERAS_BACKEND=torch python keras_gradient_accumulation.py

Every gradient is written down and given to the optimizer by hand (`optimizer.apply`), so that neither data, dropout nor
the order of samples plays a part; float64. Full batch: one mean gradient per update. Accumulated: K = 4 of them.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np

keras.config.set_floatx("float64")
K, UPDATES = 4, 5
GRADIENTS = np.random.default_rng(0).normal(size=(UPDATES, K, 3))


def trained(make, accumulate, *, unused_last=False):
    """Return the weight after every update, and what optimizer.finalize_variable_values would leave."""
    variable = keras.Variable(np.array([1.0, 2.0, 3.0]), name="w")
    other = keras.Variable(np.array([1.0]), name="other")
    optimizer = make(K if accumulate else None)
    optimizer.build([variable, other])
    path = []
    for micro in GRADIENTS:
        if unused_last:
            # In the last micro-batch the weight is not used, so that it has no gradient there.
            micro = micro.copy()
            micro[-1] = 0.0
        rows = micro if accumulate else [micro.mean(0)]
        for index, row in enumerate(rows):
            absent = unused_last and accumulate and index == K - 1
            one = keras.ops.convert_to_tensor(np.ones(1))
            optimizer.apply(
                [None if absent else keras.ops.convert_to_tensor(row), one], [variable, other]
            )
        path.append(keras.ops.convert_to_numpy(variable).copy())
    return np.array(path), optimizer, variable


def distance(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b - [1.0, 2.0, 3.0]))


def compare(name, make, **options):
    full, accumulated = trained(make, False, **options)[0], trained(make, True, **options)[0]
    print(f"{name:58} {distance(accumulated, full):.1e}")
    return full, accumulated


print(
    f"keras {keras.__version__}, {keras.backend.backend()}; relative difference of what {UPDATES} updates move\n"
)
compare("SGD, constant rate", lambda k: keras.optimizers.SGD(0.1, gradient_accumulation_steps=k))
compare("Adam, constant rate", lambda k: keras.optimizers.Adam(0.1, gradient_accumulation_steps=k))

decay = keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.1, 0.001])
full, accumulated = compare(
    "1. SGD, rate 0.1 for the first updates, then 0.001",
    lambda k: keras.optimizers.SGD(decay, gradient_accumulation_steps=k),
)
start = np.array([[1.0, 2.0, 3.0]])
for label, path in (("full batch", full), ("accumulated", accumulated)):
    rates = np.linalg.norm(np.diff(path, axis=0, prepend=start), axis=1)
    print(
        f"     {label:11} rate of each update: "
        + " ".join(f"{r / np.linalg.norm(g.mean(0)):.4f}" for r, g in zip(rates, GRADIENTS))
    )

averages = {}
for accumulate in (False, True):
    path, optimizer, variable = trained(
        lambda k: keras.optimizers.SGD(
            0.1, use_ema=True, ema_momentum=0.5, gradient_accumulation_steps=k
        ),
        accumulate,
    )
    average = keras.ops.convert_to_numpy(optimizer._model_variables_moving_average[0])
    averages[accumulate] = (path[-1], average)
(full, mean), (accumulated, other) = averages[False], averages[True]
print(
    f"2. use_ema: weights {distance(accumulated, full):.1e}, averages {distance(other, mean):.1e}"
)

compare(
    "3. SGD, no gradient for a weight in each last micro-batch",
    lambda k: keras.optimizers.SGD(0.1, gradient_accumulation_steps=k),
    unused_last=True,
)
