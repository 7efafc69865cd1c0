"""Files: adapters and merged parameters through Orbax."""

from jlora.io.orbax import export as export
from jlora.io.orbax import load as load
from jlora.io.orbax import save as save
