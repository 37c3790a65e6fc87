"""Reference twins: the papers' formulas line by line in numpy float64, written apart from the engine.

A model is a flat vector `w`; `gradient(v)` is the gradient of the loss at `v`; `groups` gives each number the name
of its group. Equation numbers are GA-SAM's.
"""

from collections.abc import Callable

import numpy as np

Vector = np.ndarray


def group_norm(x: Vector, groups: Vector) -> Vector:
    """||x_(i)||_2 of the group i of each number."""
    out = np.empty_like(x)
    for name in np.unique(groups):
        out[groups == name] = np.sqrt(np.sum(x[groups == name] ** 2))
    return out


def group_size(groups: Vector) -> Vector:
    """n_(i) of the group of each number."""
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return counts[inverse].astype(float)


def scale_vector(name: str, w: Vector, g: Vector, groups: Vector, asam_eta: float = 0.0) -> Vector:
    """T as one number per weight (Table 2; eq. 13)."""
    n, n_i = float(len(w)), group_size(groups)
    w_i, g_i = group_norm(w, groups), group_norm(g, groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        T = {
            "one": np.ones_like(w),
            "weight_abs": np.abs(w) + asam_eta,
            "weight_norm": w_i,
            "weight_over_gradient": w_i / g_i,
            "inverse_gradient": 1.0 / g_i,
            "weight_over_sqrt_n": w_i / np.sqrt(n_i),
            "gradient_strength": np.sqrt(n_i) / (g_i * np.sqrt(n)),
        }[name]
    return np.where(np.isfinite(T), T, 0.0)


GRADIENT_BASED = ("weight_over_gradient", "inverse_gradient", "gradient_strength")


def capped_scale_vector(
    name: str, w: Vector, g: Vector, groups: Vector, asam_eta: float = 0.0, max_scale: float = 1000.0
) -> Vector:
    """T, at most `max_scale` times its model-wise value where it depends on the gradient."""
    T = scale_vector(name, w, g, groups, asam_eta)
    if name in GRADIENT_BASED:
        model_wise = scale_vector(name, w, g, np.zeros(len(w)), asam_eta)
        T = np.minimum(T, max_scale * model_wise)
    return T


def p_norm(x: Vector, p: float) -> float:
    return float(np.max(np.abs(x))) if p == np.inf else float(np.sum(np.abs(x) ** p) ** (1.0 / p))


def ascent_step(g: Vector, T: Vector, p: float, eta: float) -> Vector:
    """u_k of eq. 15."""
    if p == np.inf:
        return eta * T * np.sign(g)
    numerator = T * np.sign(g) * np.abs(T * g) ** (1.0 / (p - 1.0))
    return eta * numerator / p_norm(np.abs(T * g) ** (1.0 / (p - 1.0)), p)


def project(v: Vector, T: Vector, p: float, epsilon: float) -> Vector:
    """Eq. 17 and 18; other norms radially like L2."""
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.where(T > 0, v / T, 0.0)
    if p == np.inf:
        return T * np.clip(x, -epsilon, epsilon)
    norm = p_norm(x, p)
    return v if norm <= epsilon else epsilon * v / norm


def method_gradient(
    w: Vector,
    gradient: Callable[[Vector], Vector],
    groups: Vector,
    *,
    scale: str,
    p: float,
    epsilon: float,
    steps: int,
    descent: str,
    step_size: float | None = None,
    unit: float = 1.0,
    asam_eta: float = 0.0,
    max_scale: float = 1000.0,
) -> tuple[Vector, list[Vector]]:
    """Algorithm 1: descent gradient of one batch, and a_0 .. a_K."""
    eta = 1.5 * epsilon / steps if step_size is None else step_size
    a = [np.zeros_like(w)]
    g = [gradient(w)]
    T = capped_scale_vector(scale, w, unit * g[0], groups, asam_eta, max_scale)
    for k in range(1, steps + 1):
        u = ascent_step(g[k - 1], T, p, eta)
        a.append(project(a[k - 1] + u, T, p, epsilon))
        g.append(gradient(w + a[k]))
    return (g[-1] if descent == "last" else sum(g) / (steps + 1)), a


class SGD:
    """Plain gradient descent."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def step(self, w: Vector, g: Vector) -> Vector:
        return w - self.lr * g


class Adam:
    """Kingma and Ba 2015, Algorithm 1."""

    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.lr, self.betas, self.eps = lr, betas, eps
        self.m: Vector | float = 0.0
        self.v: Vector | float = 0.0
        self.t = 0

    def step(self, w: Vector, g: Vector) -> Vector:
        self.t += 1
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * g
        self.v = self.betas[1] * self.v + (1 - self.betas[1]) * g**2
        m_hat = self.m / (1 - self.betas[0] ** self.t)
        v_hat = self.v / (1 - self.betas[1] ** self.t)
        return w - self.lr * m_hat / (np.sqrt(v_hat) + self.eps)
