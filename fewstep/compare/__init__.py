"""Recipes x seeds on the embedded world at equal network evaluations, as one table."""
