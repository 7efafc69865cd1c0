"""What stands beside a block: a module that sees the block's input x, and adds to its output h."""

import dataclasses

import jax

from jlora import targets
from jlora._trees._blocks import Blocks
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods.base import Method


def check_widths(h: jax.Array, x: jax.Array | None = None) -> None:
    """Raises unless input and output of a block have one width."""
    if x is not None and x.shape[-1] != h.shape[-1]:
        raise ValueError(
            f"a module beside a block whose input has {x.shape[-1]} features and whose output has {h.shape[-1]}: it is "
            "for blocks of one width; name others with target=... and input=..."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside(Method):
    """A method of a block: `target` names the last layer of each, `input` the first, whose input is the block's.

    Attributes:
      input: the first layer's path from the nearest place above the last that has it, such as
        `intermediate/dense/kernel`. Left out, it is known by its name: beside attention the query's, beside a
        feed-forward block the first layer's.
    """

    target: Target = targets.feed_forward_outputs
    input: str = ""

    @property
    def on_outputs(self) -> bool:
        return True

    @property
    def of(self) -> str:
        """The weight whose input the module sees."""
        if not self.input:
            raise ValueError(f"the block's first layer is not said: {type(self).__name__}(input='up/kernel', ...)")
        return self.input

    def placed(self, leaf: Leaf, blocks: Blocks) -> Method:
        first = self.input or blocks.first(leaf.path)
        if first is None:
            raise ValueError(
                "names do not tell the first layer of its block; write its path from the nearest place above both: "
                f"{type(self).__name__}(input='up/kernel', ...)"
            )
        return dataclasses.replace(self, input=first)
