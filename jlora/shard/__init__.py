"""More than one device: where base, factors and optimizer state live, derived from the equations.

JAX distributes: `jax.sharding` says where an array lives, and `jit` makes the program for all devices. This room only
says the shardings, and has a step to copy.
"""

from jlora.shard._estimate import Estimate as Estimate
from jlora.shard._estimate import Traffic as Traffic
from jlora.shard._estimate import estimate as estimate
from jlora.shard._gather import gathered as gathered
from jlora.shard._specs import abstract as abstract
from jlora.shard._specs import partition_specs as partition_specs
from jlora.shard._specs import shardings as shardings
from jlora.shard._specs import state_shardings as state_shardings
from jlora.shard._start import init as init
from jlora.shard._step import train_step as train_step
