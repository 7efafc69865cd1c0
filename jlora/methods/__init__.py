"""Methods: one small file each, its paper's equation first. A line here makes one part of `jlora` itself."""

from typing import TYPE_CHECKING

from jlora.methods.adalora import AdaLoRA as AdaLoRA
from jlora.methods.base import Method as Method
from jlora.methods.bitfit import BitFit as BitFit
from jlora.methods.boft import BOFT as BOFT
from jlora.methods.bottleneck import Houlsby as Houlsby
from jlora.methods.bottleneck import Parallel as Parallel
from jlora.methods.bottleneck import Pfeiffer as Pfeiffer
from jlora.methods.c3a import C3A as C3A
from jlora.methods.deep_prompts import DeepPrompts as DeepPrompts
from jlora.methods.delora import DeLoRA as DeLoRA
from jlora.methods.dora import DoRA as DoRA
from jlora.methods.fourierft import FourierFT as FourierFT
from jlora.methods.full import Full as Full
from jlora.methods.gated import Gated as Gated
from jlora.methods.glora import GLoRA as GLoRA
from jlora.methods.gralora import GraLoRA as GraLoRA
from jlora.methods.hira import HiRA as HiRA
from jlora.methods.hra import HRA as HRA
from jlora.methods.ia3 import IA3 as IA3
from jlora.methods.intrinsic import IntrinsicDimension as IntrinsicDimension
from jlora.methods.kasa import KaSA as KaSA
from jlora.methods.krona import KronA as KronA
from jlora.methods.krona_parallel import ParallelKronA as ParallelKronA
from jlora.methods.ln_tuning import LNTuning as LNTuning
from jlora.methods.loha import LoHa as LoHa
from jlora.methods.lokr import LoKr as LoKr
from jlora.methods.lora import LoRA as LoRA
from jlora.methods.lora_fa import LoRAFA as LoRAFA
from jlora.methods.lora_xs import LoRAXS as LoRAXS
from jlora.methods.mica import MiCA as MiCA
from jlora.methods.miss import MiSS as MiSS
from jlora.methods.new_tokens import NewTokens as NewTokens
from jlora.methods.oft import OFT as OFT
from jlora.methods.prefix import PrefixTuning as PrefixTuning
from jlora.methods.prefix import VirtualTokens as VirtualTokens
from jlora.methods.prompt_tuning import PromptTuning as PromptTuning
from jlora.methods.prompt_tuning import PTuning as PTuning
from jlora.methods.psoft import PSOFT as PSOFT
from jlora.methods.randlora import RandLoRA as RandLoRA
from jlora.methods.road import RoAd as RoAd
from jlora.methods.shira import SHiRA as SHiRA
from jlora.methods.sora import SoRA as SoRA
from jlora.methods.ssf import SSF as SSF
from jlora.methods.sum import Sum as Sum
from jlora.methods.tied import TiedLoRA as TiedLoRA
from jlora.methods.trained_tokens import TrainedTokens as TrainedTokens
from jlora.methods.vblora import VBLoRA as VBLoRA
from jlora.methods.vera import VeRA as VeRA

if not TYPE_CHECKING:  # checkers export `X as X`; at run time the modules would be exported too
    __all__ = [name for name, value in globals().items() if isinstance(value, type)]
