"""Parameter-efficient fine-tuning for JAX and Flax, as pure functions over pytrees."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from jlora import analysis as analysis
from jlora import combine as combine
from jlora import init as init
from jlora import io as io
from jlora import methods as methods
from jlora import network as network
from jlora import optim as optim
from jlora import plot as plot
from jlora import prompts as prompts
from jlora import quant as quant
from jlora import rank as rank
from jlora import shard as shard
from jlora import targets as targets
from jlora._gates import invoked as invoked
from jlora._gates import with_gates as with_gates
from jlora._merge import merge as merge
from jlora._merge import merge_report as merge_report
from jlora._merge import scale as scale
from jlora._merge import unmerge as unmerge
from jlora._stack import stack as stack
from jlora._stack import unstack as unstack
from jlora._trees._axes import RolesWarning as RolesWarning
from jlora._version import __version__ as __version__
from jlora.adapted import Adapted as Adapted
from jlora.adapted import Frozen as Frozen
from jlora.adapted import adapt as adapt
from jlora.adapted import count as count
from jlora.adapted import join as join
from jlora.adapted import split as split
from jlora.adapted import table as table
from jlora.adapted import trainable_mask as trainable_mask
from jlora.adapted import with_dropout as with_dropout
from jlora.explain import explain as explain
from jlora.explain import infer_axes as infer_axes
from jlora.io._untrained import UntrainedWarning as UntrainedWarning
from jlora.io.orbax import export as export
from jlora.io.orbax import load as load
from jlora.io.orbax import save as save
from jlora.lift import lift as lift
from jlora.methods import *  # noqa: F403 (every method, and nothing else)
from jlora.optim import masked as masked
from jlora.quant._quantize import quantize as quantize

if not _TYPE_CHECKING:  # checkers export `X as X`
    __all__ = ["__version__", *(name for name in globals() if not name.startswith("_") and name != "adapted")]
