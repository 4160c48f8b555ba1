"""How do alpha, beta1 and beta2 damp a step that is too long? The linear theory, and its picture.

.. code-block:: bash

    python examples/study/damping.py examples/study/results/damping.png

On a quadratic loss of curvature λ the gradient is λ θ, and a step η of ALTO without its divisions
(by √v and by the norms, which change slowly) is linear in (θ, m, s), with c = -alpha (1 - beta1):

    h = (1 - c) λ θ + c s        s' = beta1 s + (1 - beta1) λ θ
    m' = beta2 m + (1 - beta2) h        θ' = θ - η m'

What is left of an error after a step is at most the spectral radius of that map, which depends on
η λ alone. Above 1 training diverges along that direction; near 1 it swings for long.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

SETTINGS = [  # alpha, beta1, beta2
    (0.0, 0.0, 0.9),
    (0.0, 0.0, 0.5),
    (-5.0, 0.99, 0.9),
    (-50.0, 0.99, 0.9),
    (-0.5, 0.0, 0.9),
    (0.5, 0.01, 0.9),
    (0.9, 0.0, 0.9),
]
STEPS = np.geomspace(1e-2, 1e2, 801)  # η λ


def spectral_radius(step: float, alpha: float, beta1: float, beta2: float) -> float:
    """Of the map from (θ, m, s) to the next, for a step η λ."""
    c = -alpha * (1 - beta1)
    # m and s are in units of the curvature.
    m = (1 - beta2) * np.array([1 - c, 0.0, c]) + beta2 * np.array([0.0, 1.0, 0.0])
    s = np.array([1 - beta1, 0.0, beta1])
    theta = np.array([1.0, 0.0, 0.0]) - step * m
    return float(np.abs(np.linalg.eigvals(np.stack([theta, m, s]))).max())


def main(path: Path) -> None:
    """Print where each setting stops to be stable, and draw all of them."""
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for alpha, beta1, beta2 in SETTINGS:
        found = np.array([spectral_radius(step, alpha, beta1, beta2) for step in STEPS])
        unstable = STEPS[np.argmax(found > 1)] if found.max() > 1 else np.inf
        name = f"alpha {alpha:g}, beta1 {beta1:g}" if alpha else "LAMB"
        name = f"{name}, beta2 {beta2:g}"
        print(f"{name}: unstable from {unstable:.1f}; at 3 {found[np.searchsorted(STEPS, 3)]:.3f}")
        axes.plot(STEPS, found, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", ylim=(0.5, 1.15), xlabel="step times curvature")
    axes.set(ylabel="largest error left after a step")
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
