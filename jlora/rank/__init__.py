"""Who gets which rank: allocated, sparse, nested or grown ranks, and adapters made as small as they became."""

from jlora.rank.adalora import AdaLoRAState as AdaLoRAState
from jlora.rank.adalora import adalora as adalora
from jlora.rank.budget import Budget as Budget
from jlora.rank.compact import compact as compact
from jlora.rank.orthogonality import orthogonality as orthogonality
from jlora.rank.prune import magnitude as magnitude
from jlora.rank.prune import prune as prune
from jlora.rank.resize import Resized as Resized
from jlora.rank.resize import resize as resize
from jlora.rank.sora import SoRAState as SoRAState
from jlora.rank.sora import geometric as geometric
from jlora.rank.sora import linear as linear
from jlora.rank.sora import log_linear as log_linear
from jlora.rank.sora import soft_threshold as soft_threshold
from jlora.rank.sora import sora as sora
from jlora.rank.table import rank_table as rank_table
