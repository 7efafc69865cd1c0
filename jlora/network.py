"""The words that a method writes its equation with, and the types of what it is handed."""

from jlora._algebra._recipe import Recipe as Recipe
from jlora._algebra._rows import Rows as Rows
from jlora._algebra._words import Array as Array
from jlora._algebra._words import Base as Base
from jlora._algebra._words import Delta as Delta
from jlora._algebra._words import Difference as Difference
from jlora._algebra._words import Function as Function
from jlora._algebra._words import Gate as Gate
from jlora._algebra._words import Step as Step
from jlora._trees._axes import Leaf as Leaf
from jlora._types import W0 as W0
from jlora._types import Keys as Keys
from jlora._types import Place as Place
