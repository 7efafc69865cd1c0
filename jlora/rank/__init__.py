"""Who gets which rank: allocated, sparse, nested or grown ranks, and adapters made as small as they became."""

from jlora.rank.adalora import AdaLoRAState as AdaLoRAState
from jlora.rank.adalora import adalora as adalora
from jlora.rank.budget import Budget as Budget
from jlora.rank.compact import compact as compact
from jlora.rank.dylora import DyLoRAState as DyLoRAState
from jlora.rank.dylora import Search as Search
from jlora.rank.dylora import at_rank as at_rank
from jlora.rank.dylora import dylora as dylora
from jlora.rank.dylora import sample_rank as sample_rank
from jlora.rank.dylora import search as search
from jlora.rank.orthogonality import orthogonality as orthogonality
from jlora.rank.prune import magnitude as magnitude
from jlora.rank.prune import prune as prune
from jlora.rank.resize import Resized as Resized
from jlora.rank.resize import resize as resize
from jlora.rank.selora import SeLoRAState as SeLoRAState
from jlora.rank.selora import selora as selora
from jlora.rank.sora import SoRAState as SoRAState
from jlora.rank.sora import geometric as geometric
from jlora.rank.sora import linear as linear
from jlora.rank.sora import log_linear as log_linear
from jlora.rank.sora import soft_threshold as soft_threshold
from jlora.rank.sora import sora as sora
from jlora.rank.table import rank_table as rank_table
from jlora.rank.table import ranks as ranks
from jlora.rank.unstack import unstack as unstack
