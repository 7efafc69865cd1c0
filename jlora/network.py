"""The words that a method writes its equation with."""

from jlora._algebra._words import Array as Array
from jlora._algebra._words import Base as Base
from jlora._algebra._words import Delta as Delta
from jlora._algebra._words import Difference as Difference
from jlora._algebra._words import Function as Function
from jlora._algebra._words import Recipe as Recipe
from jlora._trees._axes import Leaf as Leaf
