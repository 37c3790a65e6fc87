"""Recipes: preparation, runs, scores, tables."""
