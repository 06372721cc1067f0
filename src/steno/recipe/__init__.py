"""Recipes: a chain of stages and one budget, and their text form."""

from .budget import WHOLE, Budget
from .chain import FULL, Recipe
from .text import as_recipe, parse_recipe

__all__ = ["FULL", "WHOLE", "Budget", "Recipe", "as_recipe", "parse_recipe"]
