"""Recipes: several verbs one after the other, written down in a few lines, which go on where they stopped."""

from __future__ import annotations

from .recipe import Recipe
from .run import RecipeReport, run_recipe

__all__ = ["Recipe", "RecipeReport", "run_recipe"]
