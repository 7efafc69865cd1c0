"""The words that a method writes its equation with."""

from jlora._axes import Leaf as Leaf
from jlora._network import Array as Array
from jlora._network import Base as Base
from jlora._network import Delta as Delta
from jlora._network import Difference as Difference
from jlora._network import Function as Function
from jlora._network import Recipe as Recipe
