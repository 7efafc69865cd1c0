"""Who gets which rank."""

from jlora.rank.adalora import AdaLoRAState as AdaLoRAState
from jlora.rank.adalora import adalora as adalora
from jlora.rank.budget import Budget as Budget
from jlora.rank.orthogonality import orthogonality as orthogonality
from jlora.rank.prune import magnitude as magnitude
from jlora.rank.prune import prune as prune
