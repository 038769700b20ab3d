"""Recipes: everything that decides the weights of a table entry, as validated types."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cnvzoo.data.augmentation import Augmentation
from cnvzoo.data.datasets import dataset_path_name, is_dataset_path
from cnvzoo.data.published import DatasetInfo, dataset_info
from cnvzoo.errors import CnvzooError, ModelError
from cnvzoo.models.classifier import check_layer_bits
from cnvzoo.models.registry import model_spec
from cnvzoo.recipe_folder import RecipeError
from cnvzoo.strict_yaml import error_at

PUBLISHED_SEED = 0  # the run of this seed is published, and its weights are the float start or teacher of other runs
LARGEST_SEED = 2**63 - 1  # the largest that torch's generators take
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)  # as in a checkpoint's config


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _as_tuple(value: Any) -> Any:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


# a text, a list of texts or null in YAML and JSON; a single text is not written as a list
_OneOrMore = Annotated[
    tuple[str, ...],
    BeforeValidator(_as_tuple),
    PlainSerializer(lambda texts: texts[0] if len(texts) == 1 else list(texts), return_type=str | list[str]),
]


class Optimizer(_Section):
    """The optimizer and its rates.

    Attributes:
        name: `sgd` (with Nesterov momentum), or `muon` (Jordan et al. 2024): Muon for hidden convolution and linear
            weights, SGD for all other parameters.
        lr: peak learning rate, above 0.
        momentum: momentum of SGD and Muon, 0 to below 1.
        weight_decay: weight decay of convolution and linear weights; BatchNorm, biases and quantizer scales have none.
            With `muon` it is decoupled: a step shrinks weights by lr * weight_decay, where SGD ends up shrinking them
            by 1 / (1 - momentum) times that.
        sgd_lr: with `muon`, peak learning rate of the parameters that SGD updates.
        sgd_weight_decay: with `muon`, weight decay of the first, the last and depthwise weights, which SGD updates;
            None for `weight_decay`.
    """

    name: Literal["sgd", "muon"] = "sgd"
    lr: float = Field(gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    sgd_lr: float | None = Field(default=None, gt=0)
    sgd_weight_decay: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check_muon(self) -> Optimizer:
        if (self.name == "muon") != (self.sgd_lr is not None):
            key = "name" if self.sgd_lr is None else "sgd_lr"
            raise error_at(key, "name: muon needs sgd_lr, and no other optimizer takes it")
        if self.sgd_weight_decay is not None and self.name != "muon":
            raise error_at("sgd_weight_decay", "only name: muon takes sgd_weight_decay: leave it out")
        return self


class Schedule(_Section):
    """The learning rate of each step: linear warm-up, then linear decay to 0.

    Attributes:
        warmup_epochs: length of the warm-up in epochs, which may be a fraction.
    """

    warmup_epochs: float = Field(default=1.0, ge=0)


class EarlyCrops(_Section):
    """Training on random crops, smaller than the images, in the first epochs, which costs less per step.

    For networks that end in global average pooling, which take images of any size, as their teachers have to do.
    Progressive learning (Tan & Le 2021, arXiv:2104.00298) resizes images instead.

    Attributes:
        side: side of the square crops in pixels.
        epochs: number of epochs on crops; the later ones take whole images.
    """

    side: int = Field(ge=1)
    epochs: int = Field(ge=1)


class Distillation(_Section):
    """How a student learns from its teachers' logits as well as from labels.

    Attributes:
        temperature: divisor of both networks' logits before they are compared, above 0.
        standardize: before that, bring each image's logits to mean 0 and standard deviation 1 over the classes, so that
            a student learns how its teacher ranks classes, and not how large its logits are (Sun et al. 2024,
            arXiv:2403.01693).
        weight: weight of that comparison in the loss, above 0, up to 1; the labels have the rest.
        views: number of augmented versions of each image, which epochs use in turn; epochs on crops have as many of
            their own. The teachers' logits are computed once for each (Shen & Xing 2022, arXiv:2112.01528). None: a new
            version in every epoch, with the teachers' logits computed in every step.
    """

    temperature: float = Field(default=4.0, gt=0)
    standardize: bool = False
    weight: float = Field(default=0.9, gt=0, le=1)
    views: int | None = Field(default=None, ge=1)


class Recipe(_Section):
    """Everything that decides the weights of a run beside the machine.

    Training is in bfloat16 autocast, or in float32 on CPUs without kernels for bfloat16; scoring is in float32.

    Attributes:
        name: table entry, `<dataset>_<model>[_w<W>a<A>]`.
        model, w_bits, a_bits: as for `cnvzoo.create_model`; quantized models need both bit widths, others take none.
        bits: other bit widths of single layers, as for `cnvzoo.create_model`.
        dataset: one of `cnvzoo.list_datasets()`; or the path of own images, as for `cnvzoo.load_dataset`. In a file, a
            relative path is relative to the file's folder.
        epochs: passes over the training set.
        batch_size: images per step, 2 to the size of the training set.
        optimizer: optimizer and its rates.
        schedule: learning rate over the run.
        label_smoothing: 0 to below 1.
        augmentation: random changes of the images.
        early_crops: training on crops in the first epochs; None for whole images in all epochs.
        float_start: the entry of a float model whose published weights training starts from, whatever the run's own
            seed: the name of a recipe in the same folder. For a quantized model it is the float twin; for a CIFAR
            ResNet one with fewer blocks, `<dataset>_<model>`, whose blocks it takes over
            (`cnvzoo.models.resnet.start_from_shallower`).
        float_start_sha256: fingerprint of that recipe; filled in by load_recipe.
        start: the checkpoint that training starts from, for fine-tuning: its name, or the path of its folder. It has to
            be of the same model and bit widths; or, for a quantized model, of its float twin or of other bit widths. A
            last layer for another number of classes is initialised from the seed.
        quantize_bias: for quantized models, round BatchNorm's shifts to whole accumulator units after training, before
            the model is scored, so that they are exact int32 biases.
        teacher: entries of the float models, of the same dataset, that the model learns from: names of recipes in the
            same folder, whose published weights are used. In YAML a name or a list.
        distillation: how the model learns from its teachers.
        teacher_sha256: fingerprints of the teachers' recipes; filled in by load_recipe.
        seed: seed of initialisation, shuffling and augmentation; 0 to 2**63 - 1.
    """

    name: str
    model: str
    dataset: str
    w_bits: int | None = Field(default=None, ge=1, le=8)
    a_bits: int | None = Field(default=None, ge=1, le=8)
    bits: dict[str, tuple[int | None, int | None]] = {}
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=2)
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    augmentation: Augmentation = Augmentation()
    early_crops: EarlyCrops | None = None
    float_start: str | None = None
    float_start_sha256: str | None = None
    start: str | None = Field(default=None, min_length=1)
    quantize_bias: bool = False
    teacher: _OneOrMore = ()
    distillation: Distillation = Distillation()
    teacher_sha256: _OneOrMore = ()
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)

    @field_validator("name")
    @classmethod
    def _is_a_word(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a name: up to 128 letters, digits, _, - and .; rename the recipe")
        return name

    @field_validator("model")
    @classmethod
    def _known_model(cls, name: str) -> str:
        return model_spec(name).name

    @field_validator("bits", mode="before")
    @classmethod
    def _pairs_of_bits(cls, bits: Any) -> dict[str, tuple[int | None, ...]]:
        given = {} if bits is None else bits
        try:
            return {layer: tuple(pair) for layer, pair in check_layer_bits(given, "a quantized model").items()}
        except ModelError as error:
            raise ValueError(str(error).removeprefix("bits: ")) from None

    @field_validator("dataset")
    @classmethod
    def _known_dataset(cls, name: str) -> str:
        return name if is_dataset_path(name) else dataset_info(name).name

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        bits = {"w_bits": self.w_bits, "a_bits": self.a_bits}
        if model_spec(self.model).quantized:
            if None in bits.values():
                raise error_at("model", f"{self.model} needs w_bits and a_bits")
        else:
            unusable = bits | {
                "bits": self.bits or None,
                "float_start": None if model_spec(self.model).shallower else self.float_start,
                "quantize_bias": self.quantize_bias or None,
            }
            for key, value in unusable.items():
                if value is not None:
                    raise error_at(key, f"{self.model} is a float model: leave {key} out")
            if self.float_start and self.float_start_model not in model_spec(self.model).shallower:
                entries = ", ".join(f"{self.dataset_name}_{name}" for name in model_spec(self.model).shallower)
                raise error_at("float_start", f"{self.float_start!r}: {self.model} can start from {entries}")
        for teacher in self.teacher:
            self._check_teacher(teacher)
        if not self.teacher and self.distillation != Distillation():
            raise error_at("distillation", "needs a teacher: name one, or leave distillation out")
        if (views := self.distillation.views) is not None:
            if views >= self.epochs:
                raise error_at(
                    "distillation.views",
                    f"{views}: must be below epochs, {self.epochs}: each is for several epochs",
                )
            if self.augmentation.mixup:
                raise error_at("distillation.views", f"{views}: views cannot have mixup: leave one out")
        if self.start and self.float_start:
            raise error_at("start", "a run starts from start or from float_start: leave one out")
        if not is_dataset_path(self.dataset):
            self._check_fits(dataset_info(self.dataset))
        if self.early_crops and self.early_crops.epochs >= self.epochs:
            raise error_at(
                "early_crops.epochs",
                f"{self.early_crops.epochs}: must be below epochs, {self.epochs}: the last ones have whole images",
            )
        if self.schedule.warmup_epochs >= self.epochs:
            raise error_at(
                "epochs", f"{self.epochs}: must be above schedule.warmup_epochs, {self.schedule.warmup_epochs}"
            )
        return self

    def check_fits(self, info: DatasetInfo) -> None:
        """Raise RecipeError where the recipe is impossible with images like these."""
        try:
            self._check_fits(info)
        except PydanticCustomError as error:
            key = (error.context or {})["key"]
            raise RecipeError(f"{self.name}: {key}: {error.message()}") from None

    def _check_fits(self, info: DatasetInfo) -> None:
        side = model_spec(self.model).input_size or info.image_size
        padding, cutout = self.augmentation.crop_padding, self.augmentation.cutout
        if self.batch_size > info.train_size:
            most = f"must be at most {info.train_size}, the training images of {info.name}"
            raise error_at("batch_size", f"{self.batch_size}: {most}")
        if padding >= side:
            raise error_at("augmentation.crop_padding", f"{padding}: must be below {side}, the side of the images")
        if cutout > side:
            raise error_at("augmentation.cutout", f"{cutout}: must be at most {side}, the side of the images")
        for teacher in self.teacher_models:
            if (model_spec(teacher).input_size or info.image_size) != side:
                raise error_at("teacher", f"{teacher} takes images of another size than {self.model}")
        if self.early_crops:
            self._check_crops(self.early_crops, info.image_size)

    def _check_crops(self, crops: EarlyCrops, own: int) -> None:
        spec = model_spec(self.model)
        if spec.input_size:
            raise error_at("early_crops", f"{self.model} takes images of {spec.input_size} pixels only: leave it out")
        if not spec.min_size <= crops.side < own:
            raise error_at("early_crops.side", f"{crops.side}: must be {spec.min_size} to {own - 1} for {self.model}")
        if self.augmentation.cutout > crops.side:
            most = f"must be at most {crops.side}, the side of early_crops"
            raise error_at("augmentation.cutout", f"{self.augmentation.cutout}: {most}")
        for teacher in self.teacher_models:
            teacher_spec = model_spec(teacher)
            if teacher_spec.input_size:
                raise error_at("early_crops", f"the teacher {teacher} takes whole images only: leave one out")
            if crops.side < (least := teacher_spec.min_size):
                raise error_at("early_crops.side", f"{crops.side}: must be at least {least} for the teacher {teacher}")

    def _check_teacher(self, teacher: str) -> None:
        model = teacher.removeprefix(f"{self.dataset_name}_")
        if model == teacher:
            raise error_at(
                "teacher", f"{teacher!r}: a teacher is an entry of the same dataset, {self.dataset_name}_<model>"
            )
        if self.teacher.count(teacher) > 1:
            raise error_at("teacher", f"{teacher} is named twice: name each teacher once")
        try:
            spec = model_spec(model)
        except CnvzooError as error:
            raise error_at("teacher", str(error)) from None
        if spec.quantized:
            raise error_at("teacher", f"{model} is quantized: a teacher is a float model")

    @property
    def dataset_name(self) -> str:
        """Name of the dataset; for own images, that of the folder or file, whatever `DatasetInfo.name` a file holds."""
        return dataset_path_name(self.dataset) if is_dataset_path(self.dataset) else self.dataset

    @property
    def teacher_models(self) -> tuple[str, ...]:
        """The models of the teachers, as for `cnvzoo.create_model`."""
        return tuple(teacher.removeprefix(f"{self.dataset_name}_") for teacher in self.teacher)

    @property
    def float_start_model(self) -> str | None:
        """The model of the float start, as for `cnvzoo.create_model`; None for a recipe without one."""
        if self.float_start is None:
            return None
        return model_spec(self.model).float_twin or self.float_start.removeprefix(f"{self.dataset_name}_")

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """Entries whose weights, those of PUBLISHED_SEED, a run needs: by purpose, `float_start` or `teacher`."""
        needs = {"float_start": (self.float_start,) if self.float_start else (), "teacher": self.teacher}
        return {purpose: entries for purpose, entries in needs.items() if entries}

    @property
    def bit_widths(self) -> dict[str, Any]:
        """The bit widths, as arguments of `cnvzoo.create_model`; none for a float model."""
        if self.w_bits is None:
            return {}
        layers = {"bits": {layer: list(pair) for layer, pair in self.bits.items()}} if self.bits else {}
        return {"w_bits": self.w_bits, "a_bits": self.a_bits, **layers}

    @property
    def run_name(self) -> str:
        """How messages name a run: entry and seed."""
        return f"{self.name}, seed {self.seed}"

    @property
    def tag(self) -> str:
        """The model with its bit widths, as in checkpoint names: `quant_cnv_w4a4`."""
        return self.model if self.w_bits is None else f"{self.model}_w{self.w_bits}a{self.a_bits}"

    def fingerprint(self, data_sha256: str | None = None) -> str:
        """sha256 of everything in the recipe that decides the weights, the seed excluded.

        Of own images, the contents count and not their path.

        Args:
            data_sha256: `Dataset.sha256` of own images; ignored for a dataset of the benchmark.

        Keys that have their default are left out, so that a new key changes no fingerprint of recipes without it. For
        the same reason a default may never change: recipes that rely on it would train otherwise under the same
        fingerprint.
        """
        values = self.model_dump(mode="json", exclude={"seed", "name"}, exclude_defaults=True)
        if is_dataset_path(self.dataset):
            values["dataset"] = f"sha256:{data_sha256}"
        if self.bits:  # later ones override earlier ones, so their order counts
            values["bits"] = [[layer, *pair] for layer, pair in self.bits.items()]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
