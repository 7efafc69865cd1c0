"""Files: adapters and merged parameters through Orbax; adapters of Hugging Face peft."""

from jlora.io import peft as peft
from jlora.io.orbax import export as export
from jlora.io.orbax import load as load
from jlora.io.orbax import save as save
