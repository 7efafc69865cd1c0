"""Who gets which rank."""

from jlora.rank.orthogonality import orthogonality as orthogonality
