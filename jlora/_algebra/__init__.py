"""The algebra: the words of an equation, how they meet the axes of a weight, and the expression that stands for it."""
