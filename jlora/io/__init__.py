"""Files: adapters, merged parameters and quantised bases through Orbax; adapters of Hugging Face peft."""

from jlora.io import _flax, _interchange
from jlora.io import peft as peft
from jlora.io import quantised as quantised
from jlora.io.orbax import export as export
from jlora.io.orbax import load as load
from jlora.io.orbax import save as save

_interchange.register()
_flax.register()
