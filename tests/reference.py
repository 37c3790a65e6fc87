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
    ascent: Callable[[Vector], Vector] | None = None,
    mask: Vector | float = 1.0,
) -> tuple[Vector, list[Vector]]:
    """Algorithm 1: descent gradient of one batch, and a_0 .. a_K.

    `ascent` gives the gradients of the ascent passes where they are not the batch's; `mask` multiplies what is applied.
    """
    ascent = ascent or gradient
    eta = 1.5 * epsilon / steps if step_size is None else step_size
    a = [np.zeros_like(w)]
    g = [ascent(w)]
    T = capped_scale_vector(scale, w, unit * g[0], groups, asam_eta, max_scale)
    for k in range(1, steps + 1):
        u = ascent_step(g[k - 1], T, p, eta)
        a.append(project(a[k - 1] + u, T, p, epsilon))
        g.append((gradient if k == steps else ascent)(w + mask * a[k]))
    return (g[-1] if descent == "last" else sum(g) / (steps + 1)), a


# The other presets, each from its own paper. `problem.gradient(v, rows)` is the gradient of the mean loss over the
# given instances, `problem.losses(v)` the loss of every instance, `problem.instance_gradients(v)` their gradients.


def sam_perturbation(g: Vector, rho: float) -> Vector:
    """Foret et al. 2021, eq. 2."""
    return rho * g / np.linalg.norm(g)


def efficient_sam(w, problem, *, rho: float, ascent_rows) -> Vector:
    """Bahri et al. 2022, Algorithm 1: lines 5 to 7."""
    return problem.gradient(w + sam_perturbation(problem.gradient(w, ascent_rows), rho))


def m_sam(w, problem, *, rho: float, parts) -> Vector:
    """1/m sum over parts of grad L_i(w + rho grad L_i(w) / ||grad L_i(w)||), parts weighted by their size."""
    total = sum(len(part) for part in parts)
    out = np.zeros_like(w)
    for part in parts:
        out += len(part) / total * problem.gradient(w + sam_perturbation(problem.gradient(w, part), rho), part)
    return out


def fisher_mask(gradients: list[Vector], sparsity: float) -> Vector:
    """FSAM eq. 9 and 10: mean of squares, largest (1 - s) of all."""
    fisher = np.mean(np.square(gradients), axis=0)
    mask = np.zeros_like(fisher)
    mask[np.argsort(-fisher, kind="stable")[: round((1 - sparsity) * len(fisher))]] = 1.0
    return mask


def fisher_sam(w, problem, *, rho: float, mask: Vector) -> Vector:
    """FSAM eq. 6."""
    return problem.gradient(w + sam_perturbation(problem.gradient(w), rho) * mask)


def esam(w, problem, *, rho: float, keep: Vector, beta: float, gamma: float) -> Vector:
    """Du et al. 2022: a = rho g / ||g|| . keep / beta; then the gamma share of instances whose loss rose most."""
    a = sam_perturbation(problem.gradient(w), rho) * keep / beta
    rise = problem.losses(w + a) - problem.losses(w)
    chosen = np.argsort(-rise, kind="stable")[: max(1, round(gamma * len(rise)))]
    return problem.gradient(w + a, chosen)


def gsam(
    w, problem, *, rho_max: float, rho_min: float, lr: float, lr_max: float, lr_min: float, alpha: float
) -> Vector:
    """Zhuang et al. 2022, Algorithm 1."""
    rho_t = rho_min + (rho_max - rho_min) * (lr - lr_min) / (lr_max - lr_min)
    g_0 = problem.gradient(w)
    g_s = problem.gradient(w + sam_perturbation(g_0, rho_t))
    parallel = (g_0 @ g_s) / (g_s @ g_s) * g_s
    return g_s - alpha * (g_0 - parallel)


def delta_sam(w, problem, *, rho: float, r: Vector, eta: float) -> Vector:
    """delta-SAM eq. 5 to 7."""
    l_0, l_up, l_down = problem.losses(w), problem.losses(w + r), problem.losses(w - r)
    weight = np.abs(l_up + l_down - 2 * l_0) / np.maximum(np.abs(l_up - l_down), eta)
    weighted = weight @ problem.instance_gradients(w)
    return problem.gradient(w + sam_perturbation(weighted, rho))


def instance_sam(w, problem, *, rho: float) -> Vector:
    """delta-SAM eq. 2."""
    gradients = problem.instance_gradients(w)
    moved = [problem.gradient(w + sam_perturbation(g_i, rho), [i]) for i, g_i in enumerate(gradients)]
    return np.mean(moved, axis=0)


def model_perturbation(w, problem, *, epsilon: float, rate: float, steps: int) -> Vector:
    """Zheng et al. 2021, Algorithm 1: inner gradient ascent at a fixed rate, projected on the ball."""
    delta = np.zeros_like(w)
    for _ in range(steps):
        delta = delta + rate * problem.gradient(w + delta)
        length = np.linalg.norm(delta)
        if length > epsilon:
            delta = epsilon * delta / length
    return problem.gradient(w + delta)


def awp(w, problem, *, gamma: float, groups: Vector) -> Vector:
    """Wu et al. 2020: a_i = gamma ||w_i|| g_i / ||g_i||."""
    g = problem.gradient(w)
    return problem.gradient(w + gamma * group_norm(w, groups) * g / group_norm(g, groups))


class LookSam:
    """Liu et al. 2022, Algorithm 1."""

    def __init__(self, rho: float, k: int, alpha: float) -> None:
        self.rho, self.k, self.alpha = rho, k, alpha
        self.g_v: Vector | None = None

    def gradient(self, t: int, w, problem) -> Vector:
        g = problem.gradient(w)
        if t % self.k == 0:
            g_s = problem.gradient(w + sam_perturbation(g, self.rho))
            cosine = (g @ g_s) / (np.linalg.norm(g) * np.linalg.norm(g_s))
            self.g_v = g_s - np.linalg.norm(g_s) * cosine * g / np.linalg.norm(g)
            return g_s
        return g + self.alpha * np.linalg.norm(g) / np.linalg.norm(self.g_v) * self.g_v


def freelb(gradients, delta: Vector, *, p: float, epsilon: float, step_size: float, steps: int) -> Vector:
    """Zhu et al. 2020, Algorithm 1, mean over the K + 1 points; `gradients(delta)` gives those of w and of delta."""
    collected = []
    for k in range(steps + 1):
        g_w, g_delta = gradients(delta)
        collected.append(g_w)
        if k == steps:
            break
        for b in range(len(delta)):  # one ball for each sentence
            ones = np.ones(delta[b].size)
            step = ascent_step(g_delta[b].ravel(), ones, p, step_size)
            delta[b] = project(delta[b].ravel() + step, ones, p, epsilon).reshape(delta[b].shape)
    return np.mean(collected, axis=0)


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
