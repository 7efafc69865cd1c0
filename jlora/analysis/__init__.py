"""Seeing inside: what low-rank updates do, and what they cost.

    spectrum = jlora.analysis.updates(adapted)["layer_0/query/kernel"]     # SVD of dW, out of its factors
    grid = jlora.analysis.similarity(spectrum, other)                      # phi(i, j), every i and j
    found = jlora.analysis.amplification(spectrum, weight)                 # ||dW|| / ||U^T W V||
    print(jlora.analysis.cost(params, jlora.LoRA(rank=8)))                 # parameters, bytes, FLOPs, from shapes

Everything is a pure function of arrays; stacks of layers are batched.
"""

from jlora.analysis.adapters import Factors as Factors
from jlora.analysis.adapters import factors as factors
from jlora.analysis.adapters import updates as updates
from jlora.analysis.adapters import weights as weights
from jlora.analysis.budget import Cost as Cost
from jlora.analysis.budget import Row as Row
from jlora.analysis.budget import cost as cost
from jlora.analysis.decompositions import SVD as SVD
from jlora.analysis.decompositions import Truncation as Truncation
from jlora.analysis.decompositions import effective_rank as effective_rank
from jlora.analysis.decompositions import factored_svd as factored_svd
from jlora.analysis.decompositions import stable_rank as stable_rank
from jlora.analysis.decompositions import svd as svd
from jlora.analysis.decompositions import truncate as truncate
from jlora.analysis.dimension import Found as Found
from jlora.analysis.dimension import intrinsic_dimension as intrinsic_dimension
from jlora.analysis.emphasis import Amplification as Amplification
from jlora.analysis.emphasis import Inside as Inside
from jlora.analysis.emphasis import amplification as amplification
from jlora.analysis.emphasis import inside as inside
from jlora.analysis.emphasis import intruders as intruders
from jlora.analysis.subspaces import Distances as Distances
from jlora.analysis.subspaces import distances as distances
from jlora.analysis.subspaces import principal_angles as principal_angles
from jlora.analysis.subspaces import random_similarity as random_similarity
from jlora.analysis.subspaces import similarity as similarity
