"""Training by a recipe, to weights and a record. Float starts and teachers are given as files: no network is needed."""

from cnvzoo.recipe_folder import RecipeError
from cnvzoo.training.device import resolve_device
from cnvzoo.training.evaluation import count_correct, preprocessing_of
from cnvzoo.training.numerics import NUMERICS
from cnvzoo.training.recipe import (
    PUBLISHED_SEED,
    Distillation,
    EarlyCrops,
    Optimizer,
    Recipe,
    Schedule,
)
from cnvzoo.training.recipe_file import load_recipe, recipe_from_dict
from cnvzoo.training.record import RecordError, RunRecord
from cnvzoo.training.run import run_recipe
from cnvzoo.training.state import RunError, RunInterrupted, RunUnderWay
from cnvzoo.training.trainer import Trainer, TrainingDiverged

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
