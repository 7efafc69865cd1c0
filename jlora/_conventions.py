"""What libraries call their weights and how they lay them out: one row a library, each with its source.

Nothing here decides. `_layouts` holds the rows against a whole tree, and takes a row only where all sizes agree.
"""

import dataclasses
from typing import TypeAlias

Members: TypeAlias = tuple[tuple[str, str, str], ...]


@dataclasses.dataclass(frozen=True)
class Library:
    """One library, or one family of models in it.

    Attributes:
      name: what it is called.
      source: where it is read: the file and the class or einsum.
      layouts: groups of weights that stand in one module. A member is `(path, sizes, roles)`: a regular expression that
        fits all steps of a path below that module, one word a size (equal words are equal sizes in all members, a
        number is that size), and one letter an axis as in `_axes`.
      stacks: where scanned layers may put their axis, counted from the front; none for a library that does not scan.
    """

    name: str
    source: str
    layouts: tuple[Members, ...] = ()
    stacks: tuple[int, ...] = ()


def _attention(q: str, k: str, v: str, out: str, leaf: str) -> Members:
    """Heads as an axis: (D, N, H) into them, (N, H, D) out of them; biases on what each makes."""
    return (
        (f"{q}/{leaf}", "D N H", "ioo"),
        (f"{k}/{leaf}", "C K H", "ioo"),
        (f"{v}/{leaf}", "C K V", "ioo"),
        (f"{out}/{leaf}", "N V E", "iio"),
        (f"{q}/bias", "N H", "oo"),
        (f"{k}/bias", "K H", "oo"),
        (f"{v}/bias", "K V", "oo"),
        (f"{out}/bias", "E", "o"),
    )


def _joined(q: str, k: str, v: str, out: str, leaf: str) -> Members:
    """Heads joined in one axis."""
    return (
        (f"{q}/{leaf}", "D Q", "io"),
        (f"{k}/{leaf}", "C K", "io"),
        (f"{v}/{leaf}", "C V", "io"),
        (f"{out}/{leaf}", "O E", "io"),
        (f"{q}/bias", "Q", "o"),
        (f"{k}/bias", "K", "o"),
        (f"{v}/bias", "V", "o"),
        (f"{out}/bias", "E", "o"),
    )


LIBRARIES = (
    Library(
        "Flax",
        "flax/linen/attention.py MultiHeadDotProductAttention: DenseGeneral((heads, head_dim)), out: axis=(-2, -1)",
        (_attention("query", "key", "value", "out", "kernel"), _joined("query", "key", "value", "out", "kernel")),
        stacks=(0, 1, 2),
    ),
)
