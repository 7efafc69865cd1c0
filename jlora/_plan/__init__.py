"""Which weight has which recipe, how that is found, and what is read off it."""
