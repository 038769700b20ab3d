"""From a recipe to weights and a record. Needs neither hub nor network: a float start or teacher is handed in."""

from .device import resolve_device
from .errors import RunError, RunInterrupted, RunUnderWay
from .evaluation import count_correct
from .numerics import NUMERICS
from .recipe import PUBLISHED_SEED, Distillation, EarlyCrops, Optimizer, Recipe, Schedule
from .recipe_file import RecipeError, load_recipe, recipe_from_dict
from .record import RecordError, RunRecord
from .run import preprocessing_of, run_recipe
from .trainer import Trainer, TrainingDiverged

__all__ = [
    "NUMERICS",
    "PUBLISHED_SEED",
    "Distillation",
    "EarlyCrops",
    "Optimizer",
    "Recipe",
    "RecipeError",
    "RecordError",
    "RunError",
    "RunInterrupted",
    "RunRecord",
    "RunUnderWay",
    "Schedule",
    "Trainer",
    "TrainingDiverged",
    "count_correct",
    "load_recipe",
    "preprocessing_of",
    "recipe_from_dict",
    "resolve_device",
    "run_recipe",
]
