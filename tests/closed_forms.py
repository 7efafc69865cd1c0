"""The weight W of every method as its paper says it, in float64 NumPy: the oracle of `test_closed_forms.py`.

Written from the papers. Nothing here reads an equation of jlora or shares code with what reads it; the random signs,
order and numbers of Fastfood alone are drawn by jlora, and multiplied here.

    form(W0, f) -> W

W0 is one weight (one layer, one expert) as a matrix (in, out); the window of a convolution is part of the input, and a
bias is one row. `f.a`, `f.b`, ... are its factors in the shapes in which they are stored: the rank first, then the
weight's own axes. `f.fixed` has the same ones where the paper's gradient takes them as constants.
"""

import functools
import math
import types
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from jlora.methods._projections import draws

Form: TypeAlias = Callable[[np.ndarray, Any], np.ndarray]


def rows(x: np.ndarray) -> np.ndarray:
    """(r, ...) as a matrix of r rows."""
    return x.reshape(len(x), -1)


# Low rank ---------------------------------------------------------------------------------


def lora(W0: np.ndarray, f: Any, s: float) -> np.ndarray:
    """W0 + s A B. Hu et al, 2021, 4.1; A frozen: LoRA-FA, Zhang et al, 2023; s: rsLoRA, Kalajdzievski, 2023."""
    return W0 + s * rows(f.a).T @ rows(f.b)


def lora_slices(W0: np.ndarray, f: Any, s: float, slices: tuple[tuple[int, int], ...]) -> np.ndarray:
    """W0 + s A_n B_n in columns start to stop, W0 elsewhere. loralib's MergedLinear, with unlike widths."""
    W = W0.copy()
    for n, (start, stop) in enumerate(slices):
        A, B = rows(getattr(f, f"a{n}")), getattr(f, f"b{n}")
        W[:, start:stop] += s * A.T @ B
    return W


def lora_xs(W0: np.ndarray, f: Any, s: float) -> np.ndarray:
    """W0 + s A R B, A = U_r S_r, B = V_r of W0 = U S V, with the signs that are stored. Bałazy et al, 2024, eq. 2."""
    U, S, Vt = np.linalg.svd(W0, full_matrices=False)
    r = len(f.r)
    A, B = U[:, :r] * S[:r], Vt[:r]
    sign = np.sign(np.sum(A.T * rows(f.a), 1))
    return W0 + s * (A * sign) @ f.r @ (sign[:, None] * B)


def mica(W0: np.ndarray, f: Any, s: float) -> np.ndarray:
    """W0 + s A B, B the r least of V of W0 = U S V, with the signs that are stored. Rüdiger and Raschka, 2026."""
    B = np.linalg.svd(W0, full_matrices=False)[2][-len(f.a) :]
    sign = np.sign(np.sum(B * rows(f.b), 1))
    return W0 + s * rows(f.a).T @ (sign[:, None] * B)


def kasa(W0: np.ndarray, f: Any, s: float, lost: int) -> np.ndarray:
    """W_world + s dV diag(dSigma) dU, W_world = W0 without its r least singular values. Wang et al, 2024."""
    U, S, Vt = np.linalg.svd(W0, full_matrices=False)
    kept = len(S) - lost
    return (U[:, :kept] * S[:kept]) @ Vt[:kept] + s * rows(f.v).T @ np.diag(f.sigma) @ rows(f.u)


def pissa(W0: np.ndarray, f: Any, s: float) -> np.ndarray:
    """W_res + s A B, W_res what the r leading singular values leave of W0. Meng et al, 2024."""
    U, S, Vt = np.linalg.svd(W0, full_matrices=False)
    r = len(f.a)
    return lora(W0 - (U[:, :r] * S[:r]) @ Vt[:r], f, s)


def olora(W0: np.ndarray, f: Any, s: float) -> np.ndarray:
    """W_res + s A B, W_res = W0 - s (Q_r R_r)^T where W0^T = Q R. Büyükakyüz, 2024."""
    Q, R = np.linalg.qr(W0.T)
    r = len(f.a)
    return lora(W0 - s * (Q[:, :r] @ R[:r]).T, f, s)


def adalora(W0: np.ndarray, f: Any, s: float) -> np.ndarray:
    """W0 + s P diag(lam) Q. Zhang et al, 2023; s = alpha / r as in the authors' code."""
    return W0 + s * rows(f.p).T @ np.diag(f.lam) @ rows(f.q)


def sora(W0: np.ndarray, f: Any, s: float) -> np.ndarray:
    """W0 + s A diag(g) B. Ding et al, 2023."""
    return W0 + s * rows(f.a).T @ np.diag(f.g) @ rows(f.b)


def tied(W0: np.ndarray, f: Any) -> np.ndarray:
    """W0 + A diag(u) B diag(v). Renduchintala et al, 2023."""
    return W0 + rows(f.a).T @ np.diag(f.u) @ rows(f.b) @ np.diag(f.v.ravel())


def vera(W0: np.ndarray, f: Any) -> np.ndarray:
    """W0 + A diag(d) B diag(b), A and B random. Kopiczko et al, 2023."""
    return W0 + rows(f.A).T @ np.diag(f.d) @ rows(f.B) @ np.diag(f.b.ravel())


def vblora(W0: np.ndarray, f: Any, k: int) -> np.ndarray:
    """W0 + A B, each row of A and B sub-vectors one after the other, each a mixture of k of the bank. Li et al, 2024.

    A width that is no multiple of a vector's length leaves out the end of the last.
    """

    def mixed(sigma: np.ndarray) -> np.ndarray:
        top = np.argsort(-sigma)[:k]
        weights = np.exp(sigma[top])
        return weights / np.sum(weights) @ f.bank[top]

    row = lambda logits, width: np.concatenate([mixed(sigma) for sigma in logits])[:width]
    A, B = (np.array([row(x, n) for x in s]) for s, n in zip((f.sigma_a, f.sigma_b), W0.shape, strict=True))
    return W0 + A.T @ B


def lora_and_lora_fa(W0: np.ndarray, f: Any, s: float, s_2: float) -> np.ndarray:
    """W0 + s A B + s_2 A_2 B_2: updates that add up."""
    return W0 + s * rows(f.a).T @ rows(f.b) + s_2 * rows(f.a_2).T @ rows(f.b_2)


def gralora(W0: np.ndarray, f: Any, alpha: float) -> np.ndarray:
    """W0 + s A_pq B_pq in k x k blocks, at each place of the window, and s A B over all of it where it is hybrid.

    s = alpha / (r + the hybrid's). Jung et al, 2025.
    """
    r, k, _, i = f.a.shape[:4]
    A, B = f.a.reshape(r, k, k, i, -1), f.b.reshape(r, k, k, -1)
    window, o = A.shape[-1], B.shape[-1]
    dW = np.zeros((window, k * i, k * o))
    for w, p, q in np.ndindex(window, k, k):
        dW[w, p * i : (p + 1) * i, q * o : (q + 1) * o] = A[:, p, q, :, w].T @ B[:, p, q]
    dW = dW.reshape(W0.shape)
    if not hasattr(f, "a_hybrid"):
        return W0 + alpha / (r * k) * dW
    whole = rows(f.a_hybrid).T @ rows(f.b_hybrid)
    return W0 + alpha / (r * k + len(f.a_hybrid)) * (dW + whole)


def miss(W0: np.ndarray, f: Any) -> np.ndarray:
    """W0 + D over and over: below itself for each shard of r inputs, the last one cut off, and beside itself where it
    is narrower (mini). Kang and Yin, 2024.
    """
    D = rows(f.d)
    dW = np.vstack([D] * -(-len(W0) // len(D)))[: len(W0)]
    return W0 + np.hstack([dW] * (W0.shape[1] // D.shape[1]))


def miss_bat(W0: np.ndarray, f: Any) -> np.ndarray:
    """Each block W_ij (r, r) of W0^T becomes W_ij + W_ij D_i + D_i. Kang and Yin, 2024: Bat."""
    W = W0.T.copy()
    r = f.d.shape[-1]
    for i, D in enumerate(f.d):
        for j in range(len(W0) // r):
            block = W[i * r : (i + 1) * r, j * r : (j + 1) * r]
            block += block @ D + D
    return W.T


# Products of other kinds ------------------------------------------------------------------


def tucker(t: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(window, in, out): a core t (out's rank, in's rank, window) between a and b. Yeh et al, 2023."""
    return np.einsum("urw,ri,uo->wio", t.reshape(*t.shape[:2], -1), a, b)


def loha(W0: np.ndarray, f: Any, s: float) -> np.ndarray:
    """W0 + s (A1 B1) * (A2 B2). Hyeon-Woo et al, 2021; Yeh et al, 2023."""
    return W0 + s * (rows(f.a1).T @ rows(f.b1)) * (rows(f.a2).T @ rows(f.b2))


def loha_tucker(W0: np.ndarray, f: Any, s: float) -> np.ndarray:
    """The same, each product with a core on a convolution."""
    if not hasattr(f, "t1"):
        return loha(W0, f, s)
    one, two = (tucker(t, rows(a), rows(b)) for t, a, b in ((f.t1, f.a1, f.b1), (f.t2, f.a2, f.b2)))
    return W0 + s * (one * two).reshape(W0.shape)


def krona(W0: np.ndarray, f: Any, s: float) -> np.ndarray:
    """W0 + s A x B. Edalati et al, 2022."""
    return W0 + s * np.kron(f.a, f.b)


def c3a(W0: np.ndarray, f: Any) -> np.ndarray:
    """W0 + C / in, C in blocks of circulant matrices: row i + 1 is row i moved by one. Chen et al, 2024, 3.2."""
    outs, ins, b = f.w.shape
    circulant = lambda w: np.array([[w[(i - j) % b] for j in range(b)] for i in range(b)])
    return W0 + np.block([[circulant(f.w[p, q]) for p in range(outs)] for q in range(ins)]) / len(W0)


def krona_residual(W0: np.ndarray, f: Any, s: float) -> np.ndarray:
    """W0 + s A x B + s_res I. Edalati et al, 2022."""
    return krona(W0, f, s) + f.s_res * np.eye(len(W0))


def lokr(W0: np.ndarray, f: Any, alpha: float) -> np.ndarray:
    """W0 + s C x W2 at each place of the window. Yeh et al, 2023.

    C may be a product of low rank; W2 is A B, A with the window, or A, a core and B, or whole. s = alpha / r, but 1
    where nothing is of low rank.
    """
    if hasattr(f, "t"):
        W2 = tucker(f.t, f.a, f.b)
    elif hasattr(f, "a"):
        W2 = np.einsum("rjw,rp->wjp", f.a.reshape(*f.a.shape[:2], -1), f.b)
    else:
        j, p = f.b.shape[0], f.b.shape[-1]
        W2 = f.b.reshape(j, -1, p).transpose(1, 0, 2)
    C = f.c1.T @ f.c2 if hasattr(f, "c1") else f.c
    low = [getattr(f, name) for name in ("a", "c1") if hasattr(f, name)]
    s = alpha / len(low[0]) if low else 1.0
    return W0 + s * np.concatenate([np.kron(C, at) for at in W2])


def randlora(W0: np.ndarray, f: Any, s: float) -> np.ndarray:
    """W0 + s sum_n B_n diag(lam_n) A diag(gam_n), (wide side, narrow side). Albert et al, 2025."""
    r, N = f.lam.shape
    A, B = rows(f.A), f.B.reshape(N, r, -1)
    gam = rows(f.gam)
    made = sum(B[n].T @ np.diag(f.lam[:, n]) @ A @ np.diag(gam[n]) for n in range(N))
    d_in, d_out = W0.shape
    return W0 + s * (made.T if d_in <= d_out else made)


def entries(digits: np.ndarray) -> np.ndarray:
    """Elements of a matrix, row by row, numbered in four digits of 256."""
    return (digits.astype(int) * 256 ** np.arange(4)).sum(-1)


def fourierft(W0: np.ndarray, f: Any, s: float) -> np.ndarray:
    """W0 + s Re F^-1(S), a wave of each entry (j, k) of S that is not zero. Gao et al, 2024, eq. 2 to 4."""
    d_in, d_out = W0.shape
    p, q = np.arange(d_in)[:, None], np.arange(d_out)
    places = zip(f.c, *np.unravel_index(entries(f.entries), W0.shape), strict=True)
    return W0 + s * sum(c * np.cos(2 * np.pi * (j * p / d_in + k * q / d_out)) for c, j, k in places) / W0.size


def shira(W0: np.ndarray, f: Any) -> np.ndarray:
    """W0 + S, S sparse: v at its entries. Bhardwaj et al, 2024, 3.1."""
    W = W0.copy()
    for v, at in zip(f.v, entries(f.entries), strict=True):
        W[divmod(at, W0.shape[1])] += v
    return W


def trained_tokens(W0: np.ndarray, f: Any, ids: tuple[int, ...]) -> np.ndarray:
    """W0 with the rows of some ids changed. peft's trainable tokens: those rows alone."""
    W = W0.copy()
    W[list(ids)] += rows(f.rows)
    return W


# Of W0 itself -----------------------------------------------------------------------------


def hira(W0: np.ndarray, f: Any, s: float) -> np.ndarray:
    """W0 + W0 * (s A B). Huang et al, 2025."""
    return W0 + W0 * (s * rows(f.a).T @ rows(f.b))


def glora(W0: np.ndarray, f: Any) -> np.ndarray:
    """W0 + W0 * A + B, and b0 + D * b0 + E. Chavan et al, 2023, without their C."""

    def support(name: str) -> Any:
        if hasattr(f, f"{name}u"):
            return rows(getattr(f, f"{name}u")).T @ rows(getattr(f, f"{name}d"))
        return np.ravel(getattr(f, name, 0.0))  # one for each output, or one number

    return W0 + W0 * (support("a") + support("d")) + support("b") + support("e")


def dora(W0: np.ndarray, f: Any, inner: Form) -> np.ndarray:
    """m V / ||V||, V = W0 + dW, a norm for each output, constant in the gradient. Liu et al, 2024, 4.3."""
    norm = np.linalg.norm(inner(W0, inside(f.fixed)), axis=0)
    return f.m.ravel() * inner(W0, inside(f)) / norm


def inside(f: Any) -> Any:
    """The inner method's factors: without DoRA's own, next to which its own m or t is named m_2 or t_2."""
    own = ("m", "n0", "t")
    held = {name: x for name, x in vars(f).items() if name not in own}
    return types.SimpleNamespace(**held | {name: held[f"{name}_2"] for name in own if f"{name}_2" in held})


def delora(W0: np.ndarray, f: Any) -> np.ndarray:
    """W0 + lam / r ||W0|| A Xi B, Xi = diag(1 / (||a_n|| ||b_n||)), a norm of W0 for each input. Bini et al, 2025.

    Norms are at least 1e-4, as in the authors' code.
    """
    A, B = rows(f.a), rows(f.b)
    length = lambda x: np.maximum(np.linalg.norm(x, axis=1), 1e-4)
    Xi = np.diag(1 / (length(A) * length(B)))
    return W0 + f.lam / len(A) * np.linalg.norm(W0, axis=1)[:, None] * (A.T @ Xi @ B)


def oft(W0: np.ndarray, f: Any) -> np.ndarray:
    """R W0, R = (I + Q) (I - Q)^-1 in blocks, Q skew, q what stands above its diagonal. Qiu et al, 2023."""
    blocks = len(f.q)
    n = len(W0) // blocks
    R, I = np.zeros((len(W0), len(W0))), np.eye(n)
    for block in range(blocks):
        Q = np.zeros((n, n))
        Q[np.triu_indices(n, 1)] = f.q[block]
        Q -= Q.T
        at = slice(block * n, (block + 1) * n)
        R[at, at] = (I + Q) @ np.linalg.inv(I - Q)
    return R @ W0


def psoft(W0: np.ndarray, f: Any) -> np.ndarray:
    """A R'^T B + W_res, A = U_r, B = S_r V_r, R' = diag(beta) R diag(alpha), with the stored signs. Wu et al, 2025."""
    U, S, Vt = np.linalg.svd(W0, full_matrices=False)
    r = len(f.a)
    sign = np.sign(np.sum(U[:, :r].T * rows(f.a), 1))
    A, B = U[:, :r] * sign, (sign * S[:r])[:, None] * Vt[:r]
    Q = np.zeros((r, r))
    Q[np.triu_indices(r, 1)] = f.q
    Q -= Q.T
    R = (np.eye(r) + Q) @ np.linalg.inv(np.eye(r) - Q)
    if hasattr(f, "beta"):
        R = np.diag(f.beta) @ R @ np.diag(f.alpha)
    return W0 - A @ B + A @ R.T @ B


def boft(W0: np.ndarray, f: Any) -> np.ndarray:
    """B_m ... B_1 W0 diag(g), B_k a permutation of R W0 above: of halves of blocks. Liu et al, 2023, 4.

    After n halves in order come n halves that are as far apart: (0, 2), (1, 3), (4, 6), (5, 7) for the second factor.
    """
    m, blocks, _ = f.q.shape
    halves = np.arange(len(W0)).reshape(2 * blocks, -1)
    W = W0
    for k in range(m):
        order = halves.reshape(-1, 2, 2**k, halves.shape[1]).swapaxes(1, 2).ravel()
        made = np.empty_like(W)
        made[order] = oft(W[order], types.SimpleNamespace(q=f.q[k]))
        W = made
    return W * f.g.ravel() if hasattr(f, "g") else W


def hra(W0: np.ndarray, f: Any) -> np.ndarray:
    """H^T W0, H = H_1 ... H_r, H_k = I - 2 u_k u_k^T / |u_k|^2; x W = (H x) W0 for x a column. Yuan et al, 2024."""
    I = np.eye(len(W0))
    chain = [I - 2 * np.outer(u, u) / (u @ u) for u in rows(f.u)]
    return functools.reduce(np.matmul, chain).T @ W0


def road(W0: np.ndarray, f: Any) -> np.ndarray:
    """z = x W0 + b0 turned in pairs: y_1 = c_1 z_1 - s_1 z_2, y_2 = s_2 z_1 + c_2 z_2. Liao and Monz, 2024, eq. 4.

    In each group of outputs the first half is paired with the second. c = alpha cos(theta) and s = alpha sin(theta)
    share theta and alpha in both rows (RoAd 1), have one a row (RoAd 2), or one each (RoAd 4).
    """
    groups, pairs = f.theta.shape[0], f.theta.shape[-1]
    cos, sin = ((alpha * g(theta)) for g, (theta, alpha) in zip((np.cos, np.sin), road_angles(f), strict=True))
    z = W0.reshape(len(W0), groups, 2, pairs)
    y = np.zeros_like(z)
    y[:, :, 0] = cos[:, 0] * z[:, :, 0] - sin[:, 0] * z[:, :, 1]
    y[:, :, 1] = sin[:, 1] * z[:, :, 0] + cos[:, 1] * z[:, :, 1]
    return y.reshape(W0.shape)


def road_angles(f: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """(theta, alpha) of the cosines and of the sines, (groups, 2, pairs) each."""
    if f.theta.ndim == 4:
        return [(f.theta[:, n], f.alpha[:, n]) for n in range(2)]
    both = [x if x.ndim == 3 else np.stack([x, x], 1) for x in (f.theta, f.alpha)]
    return [(both[0], both[1])] * 2


def ia3(W0: np.ndarray, f: Any) -> np.ndarray:
    """W0 diag(l), and l * b0: the activation x W0 + b0 times l. Liu et al, 2022."""
    return W0 * f.l.ravel()


def ia3_in(W0: np.ndarray, f: Any) -> np.ndarray:
    """diag(l) W0: the activation x times l."""
    return f.l.reshape(-1, 1) * W0


def ssf(W0: np.ndarray, f: Any) -> np.ndarray:
    """W0 diag(gamma), and gamma * b0 + beta. Lian et al, 2022."""
    beta = f.beta.ravel() if hasattr(f, "beta") else 0
    return W0 * f.gamma.ravel() + beta


# The whole of it --------------------------------------------------------------------------


def full(W0: np.ndarray, f: Any) -> np.ndarray:
    """W0 + delta; of biases alone BitFit, Ben Zaken et al, 2021; of norms LN tuning, Zhao et al, 2023."""
    return W0 + f.delta.reshape(W0.shape)


def intrinsic(W0: np.ndarray, f: Any) -> np.ndarray:
    """W0 + lam P theta. Li et al, 2018; lam: Aghajanyan et al, 2020."""
    P = fastfood(place(f.place), W0.size, len(f.theta))
    return W0 + f.lam * (P @ f.theta).reshape(W0.shape)


@functools.cache
def fastfood(place: tuple[int, ...], D: int, d: int) -> np.ndarray:
    """P = H G Pi H B / sqrt(D sum G^2), of which D rows and d columns are used. Le et al, 2013."""
    log = math.ceil(math.log2(max(D, d)))
    B, order, G = (np.asarray(x) for x in draws(np.array(place, np.uint32), log, np.dtype("float32")))
    H = functools.reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * log)
    Pi = np.eye(2**log)[order]
    G = np.float64(G)
    return (H @ np.diag(G) @ Pi @ H @ np.diag(B) / math.sqrt(D * np.sum(G**2)))[:D, :d]


def place(signs: np.ndarray) -> tuple[int, ...]:
    """Which P: three whole numbers of 16, 16 and 32 bits, the lowest first, +1 for a one."""
    bits = (signs > 0).astype(np.int64)
    return tuple(int(np.sum(part << np.arange(len(part)))) for part in np.split(bits, (16, 32)))


# What adds computation or tokens: h is a layer's output, x its input ------------------------


def gelu(x: np.ndarray) -> np.ndarray:
    """As tanh has it, which is what `jax.nn.gelu` does by default."""
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def bottleneck(h: np.ndarray, x: np.ndarray, f: Any, s: float, act: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """h + s (U f(D h + d) + u). Houlsby et al, 2019; Pfeiffer et al, 2020."""
    return h + s * within(h, f, act)


def parallel(h: np.ndarray, x: np.ndarray, f: Any, s: float) -> np.ndarray:
    """h + s (U f(D x + d) + u). He et al, 2021, table 1 and 4.5."""
    return h + s * within(x, f, relu)


def within(x: np.ndarray, f: Any, act: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return act(x @ f.down.T + getattr(f, "down_bias", 0)) @ f.up + getattr(f, "up_bias", 0)


def krona_parallel(h: np.ndarray, x: np.ndarray, f: Any, s: float) -> np.ndarray:
    """h + s (A x B) x + s_res x. Edalati et al, 2022: KronA^B_res."""
    return h + s * x @ np.kron(f.a, f.b) + f.s_res * x


def nearest(n: int) -> tuple[int, int]:
    """The two divisors whose product is n that are nearest to each other."""
    half = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    return half, n // half


def deep_prompts(h: np.ndarray, x: np.ndarray, f: Any, first: int) -> np.ndarray:
    """P at positions `first` on, h elsewhere. Jia et al, 2022, eq. 5."""
    y = h.copy()
    y[..., first : first + len(f.prompts), :] = f.prompts
    return y


def prefix(h: np.ndarray, ids: np.ndarray, f: Any, first: int) -> np.ndarray:
    """P = tanh(E w1 + b1) w2 + b2 where the ids are `first` on. Li and Liang, 2021, eq. 3 and 4.3."""
    P = np.tanh(f.embedding @ f.w1 + f.b1) @ f.w2 + f.b2
    return np.where((ids >= first)[..., None], P[np.clip(ids - first, 0, len(P) - 1)], h)


def taller(h: np.ndarray, ids: np.ndarray, f: Any, size: int = 11) -> np.ndarray:
    """A row of its own for each id behind the table. Gal et al, 2022; Lester et al, 2021."""
    return np.where((ids >= size)[..., None], f.rows[np.clip(ids - size, 0, len(f.rows) - 1)], h)


def p_tuning(h: np.ndarray, ids: np.ndarray, f: Any) -> np.ndarray:
    """Those rows made by an MLP. Liu et al, 2021, 2.2, and peft's three layers."""
    P = relu(relu(f.embedding @ f.w1 + f.b1) @ f.w2 + f.b2) @ f.w3 + f.b3
    return taller(h, ids, type("rows", (), {"rows": P}))
