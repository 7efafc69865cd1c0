"""The methods under test, one row each, and what every law needs to put one on a model of the zoo.

A new method joins all laws with one row of METHODS; one that adds computation or tokens, of ADDED.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import closed_forms
import jlora
import zoo


def anything(leaf: Any) -> bool:
    """Of a formula that makes sense for every shape."""
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One method, and what the laws may expect of it.

    Attributes:
      name: in the test's id.
      spec: target -> the method. Hyperparameters are small and odd: rank 2, a scale that is not 1.
      closed_form: (W0, its stored factors) -> W as the paper says it, in float64 NumPy: see `closed_forms.py`.
      count: leaf -> trainable parameters, by the formula of the paper.
      shared: leaf -> (a name, parameters), counted once for each name.
      on: which weights it is for, "matrices", "vectors" or "all".
      starts_at_base: its equation gives exact zeros at the start, so that the model is the base, bit for bit.
      merges_to_base: merging the start gives the base; false where the paper's start is another weight.
      merges: whether a weight of the base's shape says what it does. Else its closed form is (output, input, factors)
        -> output, and `lift` in forward mode, where autodiff and no rule of ours goes through it, stands for `dense`.
      fits: leaf -> whether its formula makes sense for this shape.
      in_parts: a factor may see a part of the weight alone, such as columns that the model never uses.
      dense_on: models on which its formula has no cheap contraction, by the design.
      everywhere: whether it goes over the whole zoo; one that differs from another in numbers alone need not.
      models: what it goes over where not everywhere; FEW by default.
    """

    name: str
    spec: Callable[[Any], Any]
    closed_form: Callable[..., Any]
    count: Callable[[Any], int]
    shared: Callable[[Any], tuple[str, int]] = lambda leaf: ("", 0)
    on: str = "matrices"
    starts_at_base: bool = True
    merges_to_base: bool = True
    merges: bool = True
    fits: Callable[[Any], bool] = anything
    in_parts: bool = False
    dense_on: tuple[str, ...] = ()
    everywhere: bool = True
    models: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Row({self.name})"

    @property
    def home(self) -> zoo.Case:
        """One small model that it is for."""
        return next(case for case in map(CASES.__getitem__, self.models or FAST) if self.takes(case))

    @property
    def oracle(self) -> dict[str, bool]:
        """How `lift` computes the same by other means."""
        return {"dense": True} if self.merges else {"forward_mode": True}

    def takes(self, case: zoo.Case) -> bool:
        return self.on == "all" or case.vectors == (self.on == "vectors")


def low_rank(leaf: Any, rank: int = 2) -> int:
    return math.prod(leaf.stack) * rank * (leaf.size("ik") + leaf.size("o"))


def gated(leaf: Any, rank: int = 2) -> int:
    return low_rank(leaf, rank) + math.prod(leaf.stack) * rank


def kronecker(leaf: Any) -> int:
    """(i, o) and (j, p), as near to square as divisors allow."""
    half = lambda n: max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    d_in, d_out = leaf.size("ik"), leaf.size("o")
    i, o = half(d_in), half(d_out)
    return math.prod(leaf.stack) * (i * o + d_in // i * (d_out // o))


def rotated(leaf: Any) -> int:
    """n (n - 1) / 2 for each of in / n blocks, n the largest divisor up to 24."""
    n = max(n for n in range(1, 25) if leaf.size("ik") % n == 0)
    return math.prod(leaf.stack) * leaf.size("ik") * (n - 1) // 2


def circulant(leaf: Any) -> int:
    """One kernel for each block, of the largest common divisor up to 12."""
    b = max(n for n in range(1, 13) if leaf.size("ik") % n == leaf.size("o") % n == 0)
    return math.prod(leaf.stack) * leaf.size("ik") * leaf.size("o") // b


def butterfly(leaf: Any) -> int:
    """Two factors of in / n blocks of n (n - 1) / 2, n 4 or 2, and a gain of the outputs."""
    n = 4 if leaf.size("ik") % 8 == 0 else 2
    return math.prod(leaf.stack) * (leaf.size("ik") * (n - 1) + leaf.size("o"))


def tucker(leaf: Any) -> int:
    """What a core (2, 2, window) adds, or a window that belongs to the input side."""
    k = math.prod(leaf.sizes("k"))
    return 4 * k if leaf.axes("k") else 0


def lokr(leaf: Any) -> int:
    """c (i, o), and a (j, 2), b (2, p) with a core on a convolution; whole where 2 is no low rank."""
    half = lambda n: max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    d_in, d_out, k = leaf.size("i"), leaf.size("o"), math.prod(leaf.sizes("k"))
    i, o = half(d_in), half(d_out)
    j, p = d_in // i, d_out // o
    second = tucker(leaf) + 2 * (j + p) if max(j, p) > 4 else j * k * p
    return math.prod(leaf.stack) * (i * o + second)


def narrow(leaf: Any) -> int:
    return min(leaf.size("ik"), leaf.size("o"))


def in_slices(leaf: Any) -> int:
    """Two slices of 1 and 2 columns, rank 1, each with factors of its own."""
    return math.prod(leaf.stack) * (2 * leaf.size("ik") + 3)


SLICES = ((0, 1), (1, 3))

# Models with a weight of which four divide the inputs.
BY_FOURS = ("linen/raw_split_thrice", "linen/raw_einsum_batched_axis_1", "linen/raw_einsum_batched",
            "linen/conv_1d_causal", "linen/conv_grouped")  # fmt: skip

METHODS = (
    Row(
        "lora", lambda target: jlora.LoRA(rank=2, alpha=3, target=target), partial(closed_forms.lora, s=3 / 2), low_rank
    ),
    Row(
        "rslora",
        lambda target: jlora.LoRA(rank=2, alpha=3, scaling="sqrt", init="gaussian", target=target),
        partial(closed_forms.lora, s=3 / math.sqrt(2)),
        low_rank,
        everywhere=False,
    ),
    Row(
        "lora_slices",
        lambda target: jlora.LoRA(rank=1, alpha=2, slices=SLICES, target=target),
        partial(closed_forms.lora_slices, s=2, slices=SLICES),
        in_slices,
        fits=lambda leaf: leaf.size("o") >= 3,
        in_parts=True,
        everywhere=False,
    ),
    Row(
        "lora_fa",
        lambda target: jlora.LoRAFA(rank=2, alpha=3, target=target),
        partial(closed_forms.lora, s=3 / 2),
        lambda leaf: math.prod(leaf.stack) * 2 * leaf.size("o"),
        everywhere=False,
    ),
    Row(
        "pissa",
        lambda target: jlora.LoRA(rank=2, alpha=3, init="pissa", target=target),
        partial(closed_forms.pissa, s=3 / 2),
        low_rank,
        everywhere=False,
    ),
    Row(
        "olora",
        lambda target: jlora.LoRA(rank=2, alpha=3, init="olora", target=target),
        partial(closed_forms.olora, s=3 / 2),
        low_rank,
        everywhere=False,
    ),
    Row(
        "adalora",
        lambda target: jlora.AdaLoRA(rank=2, alpha=3, target=target),
        partial(closed_forms.adalora, s=3 / 2),
        gated,
        everywhere=False,
    ),
    Row(
        "sora",
        lambda target: jlora.SoRA(rank=2, alpha=3, target=target),
        partial(closed_forms.sora, s=3 / 2),
        gated,
        everywhere=False,
    ),
    Row(
        "loha",
        lambda target: jlora.LoHa(rank=2, alpha=3, target=target),
        partial(closed_forms.loha, s=3 / 2),
        lambda leaf: 2 * low_rank(leaf),
        dense_on=("linen/convolutions", "linen/ragged_experts"),
        everywhere=False,
    ),
    Row(
        "krona",
        lambda target: jlora.KronA(scale=0.5, target=target),
        partial(closed_forms.krona, s=0.5),
        kronecker,
        dense_on=("linen/convolutions", "linen/ragged_experts"),
        everywhere=False,
    ),
    Row(
        "krona_residual",
        lambda target: jlora.KronA(scale=0.5, residual=True, target=target),
        partial(closed_forms.krona_residual, s=0.5),
        lambda leaf: kronecker(leaf) + math.prod(leaf.stack),
        fits=lambda leaf: leaf.size("ik") == leaf.size("o"),  # s_res I is for square weights
        everywhere=False,
        models=("plain/square",),
    ),
    Row(
        "vera",
        lambda target: jlora.VeRA(rank=3, target=target),
        closed_forms.vera,
        lambda leaf: math.prod(leaf.stack) * (3 + leaf.size("o")),
        dense_on=("linen/ragged_experts",),
        everywhere=False,
    ),
    Row(
        "vblora",
        lambda target: jlora.VBLoRA(rank=2, vectors=5, length=2, k=3, target=target),
        partial(closed_forms.vblora, k=3),
        lambda leaf: math.prod(leaf.stack) * 2 * 5 * (-(-leaf.size("ik") // 2) - (-leaf.size("o") // 2)),
        shared=lambda leaf: ("bank", 5 * 2),
        starts_at_base=False,  # a mixture of random vectors is never zero: the paper's start is noise
        merges_to_base=False,
        everywhere=False,
    ),
    Row(
        "lora_xs",
        lambda target: jlora.LoRAXS(rank=2, alpha=3, target=target),
        partial(closed_forms.lora_xs, s=3 / 2),
        lambda leaf: math.prod(leaf.stack) * 4,
        fits=lambda leaf: narrow(leaf) >= 2,
        everywhere=False,
    ),
    Row(
        "gralora",
        lambda target: jlora.GraLoRA(rank=2, alpha=3, target=target),
        partial(closed_forms.gralora, alpha=3),
        low_rank,
        fits=lambda leaf: leaf.size("i") % 2 == leaf.size("o") % 2 == 0,
        dense_on=("linen/unet",),
        everywhere=False,
        models=("plain/square", "linen/unet"),  # elsewhere widths are odd
    ),
    Row(
        "miss",
        lambda target: jlora.MiSS(rank=2, target=target),
        closed_forms.miss,
        lambda leaf: math.prod(leaf.stack) * 2 * leaf.size("o"),
        fits=lambda leaf: leaf.size("ik") >= 2,
        dense_on=("linen/ragged_experts",),  # where 2 divides the inputs, a flat side
        everywhere=False,
    ),
    Row(
        "mica",
        lambda target: jlora.MiCA(rank=2, alpha=3, target=target),
        partial(closed_forms.mica, s=3 / 2),
        lambda leaf: math.prod(leaf.stack) * 2 * leaf.size("ik"),
        fits=lambda leaf: narrow(leaf) >= 2,
        everywhere=False,
    ),
    Row(
        "kasa",
        lambda target: jlora.KaSA(rank=2, alpha=3, target=target),
        partial(closed_forms.kasa, s=3 / 2, lost=2),
        gated,
        starts_at_base=False,  # the paper's start is W0 without its least singular values
        merges_to_base=False,
        fits=lambda leaf: narrow(leaf) > 2,
        everywhere=False,
    ),
    Row(
        "hira",
        lambda target: jlora.HiRA(rank=2, alpha=3, target=target),
        partial(closed_forms.hira, s=3 / 2),
        low_rank,
        dense_on=("linen/convolutions", "linen/ragged_experts"),
        everywhere=False,
    ),
    Row(
        "glora",
        lambda target: jlora.GLoRA(rank=2, d="vector", e="constant", target=target),
        closed_forms.glora,
        lambda leaf: 2 * low_rank(leaf) if leaf.axes("ik") else math.prod(leaf.stack) * (leaf.size("o") + 1),
        dense_on=("linen/convolutions", "linen/ragged_experts"),
        everywhere=False,
        models=("linen/mlp", "linen/convolutions", "linen/scan_axis_1_remat", "linen/ragged_experts"),
    ),
    Row(
        "delora",
        lambda target: jlora.DeLoRA(rank=2, strength=3, target=target),
        closed_forms.delora,
        lambda leaf: low_rank(leaf) + math.prod(leaf.stack),
        everywhere=False,
        models=("linen/mlp", "linen/tied_attend", "linen/convolutions", "linen/scan_axis_1_remat"),
    ),
    Row(
        "oft",
        lambda target: jlora.OFT(block=24, target=target),
        closed_forms.oft,
        rotated,
        starts_at_base=False,  # the identity as a matrix: a product with it may round
        dense_on=("linen/convolutions", "linen/ragged_experts", "linen/tied_attend"),
        everywhere=False,
    ),
    Row(
        "fourierft",
        lambda target: jlora.FourierFT(n=7, scale=30, target=target),
        partial(closed_forms.fourierft, s=30),
        lambda leaf: math.prod(leaf.stack) * 7,
        fits=lambda leaf: bool(leaf.axes("ik")) and bool(leaf.axes("o")),
        dense_on=("linen/ragged_experts",),  # c of each expert between waves that all share
        everywhere=False,
    ),
    Row(
        "shira",
        lambda target: jlora.SHiRA(rank=1, target=target),
        closed_forms.shira,
        lambda leaf: low_rank(leaf, 1),
        fits=lambda leaf: low_rank(leaf, 1) <= math.prod(leaf.shape),
        in_parts=True,
        everywhere=False,
    ),
    Row(
        "trained_tokens",  # `NewTokens`, which knows ids that the models here have not, is in `test_table_rows.py`
        lambda target: jlora.TrainedTokens(ids=(2, 0), target=target),
        partial(closed_forms.trained_tokens, ids=(0, 2)),
        lambda leaf: math.prod(leaf.stack) * 2 * leaf.size("o"),
        fits=lambda leaf: leaf.roles.count("i") == 1 and "k" not in leaf.roles and leaf.size("i") > 2,
        in_parts=True,
        dense_on=("linen/ragged_experts",),
        everywhere=False,
        models=(
            "linen/mlp",
            "linen/tied_attend",
            "linen/scan_axis_1_remat",
            "linen/vmap_experts",
            "linen/ragged_experts",
        ),
    ),
    Row(
        "c3a",
        lambda target: jlora.C3A(block=12, target=target),
        closed_forms.c3a,
        circulant,
        fits=lambda leaf: math.gcd(leaf.size("ik"), leaf.size("o")) > 1,
        dense_on=("linen/convolutions", "linen/conv_grouped"),
        everywhere=False,
        models=(
            "linen/convolutions",
            "linen/conv_grouped",
            "linen/raw_split_thrice",
            "linen/raw_stack",
            "plain/square",
        ),
    ),
    Row(
        "psoft",
        lambda target: jlora.PSOFT(rank=2, target=target),
        closed_forms.psoft,
        lambda leaf: math.prod(leaf.stack) * 5,
        fits=lambda leaf: narrow(leaf) >= 2,
        everywhere=False,
    ),
    Row(
        "boft",
        lambda target: jlora.BOFT(block=4, target=target),
        closed_forms.boft,
        butterfly,
        starts_at_base=False,
        fits=lambda leaf: leaf.size("ik") % 4 == 0,
        dense_on=("linen/conv_1d_causal", "linen/conv_grouped"),
        everywhere=False,
        models=BY_FOURS,
    ),
    Row(
        "hra",
        lambda target: jlora.HRA(rank=4, target=target),
        closed_forms.hra,
        lambda leaf: math.prod(leaf.stack) * 4 * leaf.size("ik"),
        everywhere=False,
    ),
    Row(
        "sum",
        lambda target: jlora.Sum(jlora.LoRA(rank=1), jlora.LoRAFA(rank=2, alpha=3), target=target),
        partial(closed_forms.lora_and_lora_fa, s=1, s_2=3 / 2),
        lambda leaf: low_rank(leaf, 1) + math.prod(leaf.stack) * 2 * leaf.size("o"),
        everywhere=False,
    ),
    Row(
        "lokr_tucker",
        lambda target: jlora.LoKr(rank=2, alpha=3, tucker=True, target=target),
        partial(closed_forms.lokr, alpha=3),
        lokr,
        dense_on=("linen/convolutions", "linen/ragged_experts"),
        everywhere=False,
    ),
    Row(
        "loha_tucker",
        lambda target: jlora.LoHa(rank=2, alpha=3, tucker=True, target=target),
        partial(closed_forms.loha_tucker, s=3 / 2),
        lambda leaf: 2 * math.prod(leaf.stack) * (tucker(leaf) + 2 * (leaf.size("i") + leaf.size("o"))),
        dense_on=("linen/convolutions", "linen/ragged_experts"),
        everywhere=False,
    ),
    Row(
        "randlora",
        lambda target: jlora.RandLoRA(rank=2, alpha=3, target=target),
        partial(closed_forms.randlora, s=3 / 2),
        lambda leaf: math.prod(leaf.stack) * -(-narrow(leaf) // 2) * (2 + narrow(leaf)),
        dense_on=("linen/ragged_experts", "linen/convolutions"),
        everywhere=False,
    ),
    Row(
        "road",
        lambda target: jlora.RoAd(variant=4, group=4, target=target),
        closed_forms.road,
        lambda leaf: math.prod(leaf.stack) * 4 * leaf.size("o") * bool(leaf.axes("ik")),  # a bias has its kernel's
        fits=lambda leaf: leaf.size("o") % 2 == 0,
        starts_at_base=False,  # the identity as a matrix: a product with it may round
        dense_on=("linen/convolutions",),
        everywhere=False,
        models=("plain/square", "linen/dense_general_axes", "linen/convolutions"),  # elsewhere outputs are odd
    ),
    Row(
        "ia3",
        lambda target: jlora.IA3(target=target),
        closed_forms.ia3,
        lambda leaf: math.prod(leaf.stack) * leaf.size("o") * bool(leaf.axes("ik")),  # a bias has its kernel's l
        starts_at_base=False,  # a gain of one is no delta of zero: the last bit may differ
        dense_on=("linen/ragged_experts",),
        everywhere=False,
    ),
    Row(
        "dora",
        lambda target: jlora.DoRA(jlora.LoRA(rank=2, alpha=3, target=target)),
        partial(closed_forms.dora, inner=partial(closed_forms.lora, s=3 / 2)),
        lambda leaf: low_rank(leaf) + math.prod(leaf.stack) * leaf.size("o"),
        starts_at_base=False,
        dense_on=("linen/ragged_experts",),
        everywhere=False,
    ),
    Row(
        "ssf",
        lambda target: jlora.SSF(target=target),
        closed_forms.ssf,
        lambda leaf: math.prod(leaf.stack) * leaf.size("o"),
        starts_at_base=False,
        dense_on=("linen/ragged_experts",),
        everywhere=False,
    ),
    Row(
        "tied",
        lambda target: jlora.TiedLoRA(rank=2, target=target),
        closed_forms.tied,
        lambda leaf: math.prod(leaf.stack) * (2 + leaf.size("o")),
        shared=lambda leaf: (re.sub(r"\d+", "#", leaf.path), 2 * (leaf.size("ik") + leaf.size("o"))),
        dense_on=("linen/ragged_experts",),
        everywhere=False,
    ),
    Row(
        "intrinsic",
        lambda target: jlora.IntrinsicDimension(7, target=target),
        closed_forms.intrinsic,
        lambda leaf: math.prod(leaf.stack),
        shared=lambda leaf: ("theta", 7),
        on="all",
        everywhere=False,
        models=("linen/mlp", "linen/conv_2d", "linen/scan_axis_1_remat", "linen/ragged_experts", "plain/biases"),
    ),
    Row(
        "bitfit",
        lambda target: jlora.BitFit(target=target),
        closed_forms.full,
        lambda leaf: math.prod(leaf.shape),
        on="vectors",
    ),
    Row(
        "ln_tuning",
        lambda target: jlora.LNTuning(target=target),
        closed_forms.full,
        lambda leaf: math.prod(leaf.shape),
        on="vectors",
        everywhere=False,
    ),
    Row(
        "full",
        lambda target: jlora.Full(target=target),
        closed_forms.full,
        lambda leaf: math.prod(leaf.shape),
        on="all",
        everywhere=False,
    ),
)
LORA = METHODS[0]


# What adds computation or tokens -------------------------------------------------------------


def bottleneck(leaf: Any, m: int = 2) -> int:
    """D and U of (m, d), and their biases."""
    return math.prod(leaf.stack) * (2 * m * leaf.size("o") + m + leaf.size("o"))


def behind_the_table(leaf: Any) -> int:
    return 2 * leaf.size("o")


def only(target: str, **options: Any) -> Callable[[Any], Any]:
    """A target of its own: the case's also has weights that the method is not for."""
    return lambda _: jlora.DeepPrompts(count=2, target=target, **options)


ADAPTED = ("linen/mlp", "linen/convolutions", "linen/scan_axis_1_remat", "linen/vmap_experts", "nnx/scan")
BLOCKS, VIRTUAL = ("plain/scanned_blocks",), ("plain/virtual_tokens",)
ADDED = (
    Row(
        "houlsby",
        lambda target: jlora.Houlsby(2, scale=1.5, target=target),
        partial(closed_forms.bottleneck, s=1.5, act=closed_forms.gelu),
        bottleneck,
        merges=False,
        everywhere=False,
        models=(*ADAPTED, *BLOCKS),
    ),
    Row(
        "pfeiffer",
        lambda target: jlora.Pfeiffer(2, bias=False, target=target),
        partial(closed_forms.bottleneck, s=1, act=closed_forms.relu),
        lambda leaf: math.prod(leaf.stack) * 4 * leaf.size("o"),
        merges=False,
        everywhere=False,
        models=BLOCKS,
    ),
    Row(
        "parallel",
        lambda target: jlora.Parallel(2, target=target),
        partial(closed_forms.parallel, s=4),
        bottleneck,
        merges=False,
        everywhere=False,
        models=BLOCKS,
    ),
    Row(
        "krona_parallel",
        lambda target: jlora.ParallelKronA(scale=0.5, residual=True, target=target),
        partial(closed_forms.krona_parallel, s=0.5),
        lambda leaf: math.prod(leaf.stack) * (sum(n * n for n in closed_forms.nearest(leaf.size("o"))) + 1),
        merges=False,
        everywhere=False,
        models=BLOCKS,
    ),
    Row(
        "deep_prompts",
        only("norm/bias$"),
        partial(closed_forms.deep_prompts, first=0),
        behind_the_table,
        merges=False,
        starts_at_base=False,  # the model sees its prompts
        everywhere=False,
        models=VIRTUAL,
    ),
    Row(
        "prefix_tuning",
        lambda target: jlora.PrefixTuning(count=2, encoder=(3, 5)),
        partial(closed_forms.prefix, first=11),
        lambda leaf: 0 if leaf.path == "embedding" else 5 * leaf.size("o") + leaf.size("o"),
        shared=lambda leaf: ("", 0) if leaf.path == "embedding" else ("prefix", 2 * 3 + 3 * 5 + 5),
        merges=False,
        starts_at_base=False,
        everywhere=False,
        models=VIRTUAL,
    ),
    Row(
        "new_tokens",
        lambda target: jlora.NewTokens(count=2, target="embedding"),
        closed_forms.taller,
        behind_the_table,
        merges=False,
        starts_at_base=False,  # the base knows no such ids
        everywhere=False,
        models=VIRTUAL,
    ),
    Row(
        "prompt_tuning",
        lambda target: jlora.PromptTuning(count=2, init="uniform", target="embedding"),
        closed_forms.taller,
        behind_the_table,
        merges=False,
        starts_at_base=False,
        everywhere=False,
        models=VIRTUAL,
    ),
    Row(
        "p_tuning",
        lambda target: jlora.PTuning(count=2, encoder="mlp", hidden=5, target="embedding"),
        closed_forms.p_tuning,
        lambda leaf: 2 * leaf.size("o") + (leaf.size("o") * 5 + 5) + (5 * 5 + 5) + 6 * leaf.size("o"),
        merges=False,
        starts_at_base=False,
        everywhere=False,
        models=VIRTUAL,
    ),
)  # fmt: skip
EVERY = (*METHODS, *ADDED)
# One row for each word of the algebra: the laws of composition take these in the fast part, all in the slow one.
CHOSEN = ("lora", "sora", "krona", "vera", "dora", "oft", "bitfit", "full")

# One model for each kind of use. The fast part runs LoRA on these and other methods on FAST, the slow part LoRA on the
# whole zoo; FEW is what a method that need not go everywhere is held to.
SMALL = (
    "linen/mlp", "linen/bfloat16_params", "linen/dense_general", "linen/einsum", "linen/tied_attend", "linen/conv_2d",
    "linen/conv_grouped", "linen/scan_axis_1_remat", "linen/vmap_experts", "linen/ragged_experts", "linen/jit_blocks",
    "nnx/scan", "plain/cond_of_weights", "plain/biases", "plain/scanned_vectors",
)  # fmt: skip
FEW = ("linen/mlp", "linen/tied_attend", "linen/convolutions", "linen/scan_axis_1_remat", "linen/vmap_experts",
       "linen/ragged_experts", "plain/biases", "plain/scanned_vectors")  # fmt: skip
FAST = ("linen/mlp", "plain/biases")
CASES = {case.name: case for case in zoo.CASES}


# Of the clients, those that stand for all on the newest JAX.
NEWEST = ("clients/bert", "clients/llama")


def marks(case: zoo.Case, fast: bool) -> tuple[Any, ...]:
    """A case's own, and what keeps it out of the fast part."""
    return (*case.marks, *(() if fast else (pytest.mark.slow,)))


def marks_of_newest(row: Row, case: zoo.Case) -> tuple[Any, ...]:
    """On the newest JAX, LoRA meets every model but most clients, what is ADDED all of its models, and one row for each
    word of the algebra FAST.
    """
    if row is LORA:
        return (pytest.mark.newest,) if case.name in NEWEST or not case.name.startswith("clients/") else ()
    if row in ADDED:
        return (pytest.mark.newest,)
    return () if row.name in CHOSEN else (pytest.mark.settled,)


def each_row(rows: Any = METHODS) -> list[Any]:
    """Rows of `parametrize("row", ...)`."""
    slow = lambda row: () if row.name in CHOSEN else (pytest.mark.slow,)
    return [pytest.param(row, id=row.name, marks=slow(row)) for row in rows]


def pairs(rows: Any = METHODS, names: Any = None, fast: Any = None, newest: bool = False) -> list[Any]:
    """Rows of `parametrize("row,case", ...)`: LoRA is fast on SMALL, others on `fast`; `newest`: see `marks_of_newest`.

    Without `fast`, those of CHOSEN are on FAST.
    """
    made = []
    for row in rows:
        for case in zoo.CASES if names is None else map(CASES.__getitem__, names):
            if row.takes(case) and (row.everywhere or case.name in (row.models or FEW)):
                others = (FAST if row.name in CHOSEN else ()) if fast is None else fast
                kept = case.name in (SMALL if row is LORA else others)
                marked = (*marks(case, kept), *(marks_of_newest(row, case) if newest else ()))
                made.append(pytest.param(row, case, id=f"{row.name}-{case.name}", marks=marked))
    return made


def in_turn(made: list[Any], each: int = 1) -> list[Any]:
    """Of `pairs` all of LoRA's, and of any other row `each`, another choice for each row, besides the fast ones.

    For laws that come on top of the first ones, which hold every pair: the interpreter knows no method, and no method
    knows an operation, so what a row adds to a model shows on any.
    """
    kept, rows = [], list(EVERY)
    for n, row in enumerate(rows):
        mine = [p for p in made if p.values[0] is row]
        late = [p for p in mine if any(mark.name == "slow" for mark in p.marks)]
        start = n * each % max(len(late), 1)
        chosen = late if row is LORA else [*late[start:], *late[:start]][:each]
        kept += [p for p in mine if p not in late or p in chosen]
    return kept


def adapted(row: Row, case: zoo.Case, params: Any) -> jlora.Adapted:
    """The model of a case under a method, which leaves out what its formula cannot take; gates are one half."""
    made = _adapted(row, case, params)
    return jlora.with_gates(made, **dict.fromkeys(made.frozen.plan.gates, 0.5))


def _adapted(row: Row, case: zoo.Case, params: Any) -> jlora.Adapted:
    axes, spec = dict(case.axes or {}), row.spec(case.target)
    if row.fits is anything:
        return jlora.adapt(params, spec, axes=axes)
    chosen = jlora.adapt(params, jlora.Full(target=case.target), axes=axes).frozen.plan.sites
    unfit = [s.leaf.path for s in chosen if not row.fits(s.leaf)]
    if len(unfit) == len(chosen):
        pytest.skip(f"{row.name} fits no weight of this model")
    if unfit:
        spec = dataclasses.replace(spec, exclude=lambda path, leaf: path in unfit)
    return jlora.adapt(params, spec, axes=axes)


def away_from_start(trainable: Any, scale: float = 0.3) -> Any:
    """Factors away from their start, where half of them are zero. NumPy's numbers, and others than the zoo's."""
    leaves, treedef = jax.tree.flatten(trainable)
    draw = lambda n, a: jnp.asarray(scale * np.random.default_rng(1000 + n).standard_normal(a.shape), a.dtype)
    return treedef.unflatten([draw(n, a) for n, a in enumerate(leaves)])


def as_function_of_arrays(fn: Callable[..., Any], args: tuple, kwargs: Any) -> tuple[Callable[..., Any], tuple]:
    """`fn(params, arrays)` and the arrays: flags and strings among the arguments are closed over, as under `jit`."""
    is_array = lambda a: all(isinstance(x, jax.Array) for x in jax.tree.leaves(a))
    arrays = tuple(a for a in args if is_array(a))

    def call(params: Any, arrays: tuple) -> Any:
        rest = iter(arrays)
        return fn(params, *(next(rest) if is_array(a) else a for a in args), **kwargs)

    return call, arrays


def floats(outputs: Any) -> list[jax.Array]:
    """The floating-point outputs."""
    return [x for x in zoo.arrays(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]


def cotangents(outputs: list[Any]) -> list[jax.Array]:
    """One fixed weight for each element of the outputs: a gradient in which no two play the same part."""
    draw = lambda n, x: jnp.asarray(np.random.default_rng(n).standard_normal(x.shape), x.dtype)
    return [draw(n, x) for n, x in enumerate(outputs)]


def outputs_and_pullback(f: Callable[[Any], list[jax.Array]], at: Any, differentiable: bool = True) -> tuple[Any, Any]:
    """Outputs, and their pullback of `cotangents` (nothing where JAX itself cannot)."""
    if not differentiable:
        return f(at), ()
    outputs, pull = jax.vjp(f, at)
    return outputs, pull(cotangents(outputs))[0]


def as_bytes(tree: Any) -> list[bytes]:
    """Arrays as bytes, so that -0.0 and NaN count as what they are."""
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(raw(x)).tobytes() for x in jax.tree.leaves(tree)]


def errors(got: Any, want: Any) -> list[tuple[float, float]]:
    """(largest error, largest reference) of each leaf, in float64."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    found = []
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all() and np.isfinite(b).all()
        found.append((float(np.abs(a - b).max(initial=0)), float(np.abs(b).max(initial=0))))
    return found


def assert_close(got: Any, want: Any, relative: float = 1e-5) -> None:
    """Every leaf within `relative` of its own largest element (or of the largest of all, a tenth as much).

    The second part is for a leaf that cancels to almost nothing out of terms of the others' size.
    """
    found = errors(got, want)
    largest = max((size for _, size in found), default=0.0)
    for n, (error, size) in enumerate(found):
        bound = relative * max(size, 0.1 * largest)
        assert error <= bound, f"leaf {n}: off by {error:.2e} where {bound:.2e} is allowed (largest {size:.2e})"
