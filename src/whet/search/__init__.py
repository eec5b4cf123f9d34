"""The search: goals in, the recipe that meets them out, with every figure measured."""
