"""A zoo of tiny models, one for each way in which a model uses its weights.

Every law is a test parametrised over it:

    @pytest.mark.parametrize("case", [case.param for case in zoo.CASES])
    def test_law(case):
        fn, params, args = case.build()
        out = fn(params, *args, **case.kwargs)
"""

from zoo import clients, linen, nnx, plain
from zoo._case import Case, arrays, loss

CASES: tuple[Case, ...] = (*linen.CASES, *nnx.CASES, *plain.CASES, *clients.CASES)

__all__ = ["CASES", "Case", "arrays", "loss"]
