"""Recipes of the papers' tables: settings, runs, scores, tables."""
