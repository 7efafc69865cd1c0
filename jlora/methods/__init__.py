"""Methods: one small file each, its paper's equation first."""

from jlora.methods.base import Method as Method
from jlora.methods.bitfit import BitFit as BitFit
from jlora.methods.full import Full as Full
from jlora.methods.lora import LoRA as LoRA
