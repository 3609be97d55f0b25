"""Walk the additions at the root of a loss, and take or scale the gradient of one addend.

`loss = (ce + aux_weight * router) / K + penalty` has three addends: the walk goes down through
additions and subtractions, and through scaling by a number, until something else made the value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

SUMS = ("AddBackward0", "SubBackward0", "RsubBackward1")
SCALES = (
    "DivBackward0",
    "MulBackward0",
    "NegBackward0",
    "ToCopyBackward0",
    "ViewBackward0",
    "SqueezeBackward0",
    "UnsqueezeBackward0",
    "CloneBackward0",
    "AliasBackward0",
)

Path = tuple[int, ...]
# A penalty is often a sum over all parameters: its terms need not be told apart, and each costs a
# backward.
MOST = 8


def addends(root: torch.Tensor) -> list[Path]:
    """Return the paths of the addends of a scalar loss, the outermost `MOST`; one empty path if it is no sum."""
    found: list[Path] = []
    open_: list[tuple[Path, Any]] = [((), root.grad_fn)] if root.grad_fn is not None else []
    while open_:
        path, node = open_.pop(0)
        kind = type(node).__name__
        edges = [
            (i, edge)
            for i, (edge, _) in enumerate(getattr(node, "next_functions", ()))
            if edge is not None
        ]
        if kind in SUMS and len(edges) > 1 and len(found) + len(open_) + len(edges) <= MOST:
            open_ += [((*path, i), edge) for i, edge in edges]
        elif kind in (*SUMS, *SCALES) and len(edges) == 1 and _below(edges[0][1]):
            open_.insert(0, ((*path, edges[0][0]), edges[0][1]))
        else:
            found.append(path)
    return found or [()]


def count(root: torch.Tensor) -> int:
    """Return how many addends a loss has: 1 if it is no sum."""
    return len(addends(root))


def _below(node: Any) -> bool:
    """Return whether a sum stands under this node, reached by scalings only."""
    while node is not None:
        kind = type(node).__name__
        edges = [edge for edge, _ in getattr(node, "next_functions", ()) if edge is not None]
        if kind in SUMS and len(edges) > 1:
            return True
        if kind not in (*SUMS, *SCALES) or len(edges) != 1:
            return False
        node = edges[0]
    return False


def scale_addend(root: torch.Tensor, path: Path, factor: float) -> Any:
    """Multiply the gradient that flows into one addend; return the handle of the hook, or None if it is not there."""
    if not path:
        return None
    node: Any = root.grad_fn
    for index in path[:-1]:
        edges = getattr(node, "next_functions", ())
        if index >= len(edges) or edges[index][0] is None:
            return None
        node = edges[index][0]

    last = path[-1]

    def hook(inputs: tuple[Any, ...], _outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(g * factor if i == last and g is not None else g for i, g in enumerate(inputs))

    return node.register_hook(hook)


def addend_gradients(
    root: torch.Tensor, parameters: list[torch.Tensor]
) -> dict[Path, list[torch.Tensor | None]]:
    """Return the gradient of each addend alone, w.r.t. the parameters; the graph is kept.

    A loss that is no sum has one addend, of the empty path. An addend that is not finite leaves the others as they are.
    """
    found: dict[Path, list[torch.Tensor | None]] = {}
    for path in addends(root):
        edge = _edge(root, path)
        arriving = torch.autograd.grad(root, [edge], retain_graph=True)
        found[path] = list(
            torch.autograd.grad([edge], parameters, arriving, retain_graph=True, allow_unused=True)
        )
    return found


def _edge(root: torch.Tensor, path: Path) -> GradientEdge:
    """Return where an addend enters the sum."""
    edge = get_gradient_edge(root)
    for index in path:
        node, output = edge.node.next_functions[index]
        assert node is not None, "the path was walked before"
        edge = GradientEdge(node, output)
    return edge
