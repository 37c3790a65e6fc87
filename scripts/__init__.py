"""Commands around training: recipes, tables, averaging."""
