"""Weights held in a few bits: `jlora.quantize(params, "nf4+double")`, and what it is made of."""

from jlora.quant._leaf import Quantized as Quantized
from jlora.quant._mended import loftq as loftq
from jlora.quant._mended import qpissa as qpissa
from jlora.quant._quantize import dequantize as dequantize
from jlora.quant._report import table as table
from jlora.quant._requantize import requantize as requantize
from jlora.quant._schemes import NF as NF
from jlora.quant._schemes import Int as Int
from jlora.quant._schemes import Scheme as Scheme
