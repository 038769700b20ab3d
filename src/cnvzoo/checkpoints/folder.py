"""A checkpoint folder: which files it has, and reading and writing them.

Size and sha256 of a file are compared before anything in it is parsed. Publishing, the index and the lookup by name
agree on what a checkpoint is, because all use this module.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from cnvzoo.checkpoints.format import (
    CARD,
    CONFIG,
    FORMAT_VERSION,
    LARGEST_FILE,
    WEIGHTS,
    CheckpointConfig,
    CheckpointError,
    CheckpointFacts,
    FileFacts,
    StoreError,
    checked_name,
)
from cnvzoo.checkpoints.weights import (
    build_empty,
    build_skeleton,
    fill,
    is_quantized,
    packed_file,
    read_plain,
    read_published,
)
from cnvzoo.data.preprocessing import Preprocessing
from cnvzoo.errors import explain
from cnvzoo.files import file_in_the_way, is_temporary_of, replacing, update_text, write_text
from cnvzoo.models.classifier import Classifier

_NOT_PUBLISHED = "the file is damaged or another than the published one: fetch it again"
_NOT_DESCRIBED = f"not the file that {CONFIG} describes: it is damaged or was replaced"


def read_verified(path: Path, facts: FileFacts, remedy: str = _NOT_PUBLISHED) -> bytes:
    """The content of a file after comparison with `facts`. The file is read once: what was hashed is returned.

    Raises:
        CheckpointError: it cannot be read, or has another size or sha256; the message ends with `remedy`.
    """
    content = read_limited(path, facts.size, f"expected {facts.size:,} bytes, found more: {remedy}")
    if len(content) != facts.size:
        raise CheckpointError(f"{path}: expected {facts.size:,} bytes, found {len(content):,}: {remedy}")
    found = hashlib.sha256(content).hexdigest()
    if found != facts.sha256:
        raise CheckpointError(f"{path}: expected sha256 {facts.sha256[:16]}..., found {found[:16]}...: {remedy}")
    return content


def read_limited(path: Path, limit: int, too_large: str) -> bytes:
    """The content of a regular file of at most `limit` bytes, which bounds the memory too.

    Raises:
        CheckpointError: it cannot be read, is not a regular file, or is larger; then `too_large` is the message.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if found.st_size > limit:
            raise CheckpointError(f"{path}: {too_large}")
        with path.open("rb") as file:
            content = file.read(found.st_size + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read ({reason}): is {path.parent} a checkpoint folder?") from None
    if len(content) != found.st_size:
        raise CheckpointError(f"{path}: changed while it was read: try again")
    return content


FILES = (WEIGHTS, CARD, CONFIG)  # in the order of writing: a folder without a config is not a checkpoint
_OF_TOOLS = {".DS_Store", ".cache", ".git", ".gitattributes"}  # macOS, downloads and clones from the Hub leave these
_OWN_CARD = b"\nlibrary_name: cnvzoo\n"  # in the metadata of every card


def plain_name(name: str, kind: str) -> str:
    """Return `name` if it cannot lead out of a folder, else raise StoreError. `kind` says what it names."""
    try:
        return checked_name(name)
    except ValueError as error:
        raise StoreError(f"{kind}: {error}; refused, because it could lead out of the folder") from None


def read_plain_file(path: Path) -> bytes:
    """The bytes of a regular file. Raises CheckpointError, also for a symbolic link."""
    if path.is_symlink():
        raise StoreError(f"{path}: a symbolic link, which could lead out of the folder; put the file itself there")
    return read_limited(path, LARGEST_FILE, f"more than {LARGEST_FILE:,} bytes: not a file of a checkpoint")


def checkpoint_folders(root: Path) -> dict[str, Path]:
    """The folders in `root` with a config, valid or not, by name in alphabetical order; hidden ones are left out."""
    folders = sorted(config.parent for config in root.glob(f"*/{CONFIG}"))
    return {folder.name: folder for folder in folders if not folder.name.startswith(".")}


def checkpoint_files(folder: Path, *, needed: Sequence[str] = FILES) -> dict[str, bytes]:
    """The files of a whole checkpoint by name, after comparison with its config.

    Temporary files of a process that is writing one of them, or was killed while it was, are skipped, and so is what
    file managers and downloads from the Hub leave.

    Args:
        folder: the checkpoint's folder.
        needed: the files that must exist: all that are published, or those needed for loading.

    Raises:
        StoreError: a file is missing, there is a file that does not belong to a checkpoint, the folder and the
            checkpoint have different names, or the weights are not those that the config describes.
        CheckpointError: the config is not valid.
    """
    name = plain_name(folder.resolve().name, "checkpoint")
    if folder.is_symlink() or not folder.is_dir():
        raise StoreError(f"{folder}: not a folder: give the folder of a checkpoint")
    present = {
        path.name for path in folder.iterdir() if not any(is_temporary_of(path.name, file) for file in FILES)
    }  # fmt: skip
    if missing := [file for file in needed if file not in present]:
        remedy = f"; write the card with cnvzoo.write_card({str(folder)!r})" if missing == [CARD] else ""
        raise StoreError(f"{folder}: {', '.join(missing)} missing; published are {', '.join(FILES)}{remedy}")
    if extra := sorted(present.difference(FILES, _OF_TOOLS)):
        raise StoreError(f"{folder}: {', '.join(extra)} does not belong to a checkpoint: move it elsewhere")
    files = {file: read_plain_file(folder / file) for file in FILES if file in present}
    config = read_config(folder, FileFacts.of(files[CONFIG]))
    if config.name != name:
        raise StoreError(f"{folder / CONFIG}: name is {config.name!r}, and the folder is {name!r}: rename one of them")
    if FileFacts.of(files[WEIGHTS]) != config.file:
        raise StoreError(f"{folder / WEIGHTS}: not the file that {CONFIG} describes: it is damaged or was replaced")
    return files


_LARGEST_CONFIG = 1 << 18  # bytes


def write_checkpoint(folder: str | Path, facts: CheckpointFacts, weights: str | Path) -> CheckpointConfig:
    """Write weights and config of a checkpoint from the weights file of a run; returns the config.

    Raises:
        CheckpointError: the file is not the one that `facts` describes, or its tensors are not exactly the model's.
    """
    weights = Path(weights)
    content = read_limited(weights, LARGEST_FILE, f"more than {LARGEST_FILE:,} bytes: too large for a checkpoint")
    if (found := FileFacts.of(content).sha256) != facts.weights_sha256:
        raise CheckpointError(f"{weights}: expected sha256 {str(facts.weights_sha256)[:16]}..., found {found[:16]}...")
    config, content = encoded(facts, content, str(weights))
    write_encoded(folder, config, content)
    return config


def encoded(facts: CheckpointFacts, content: bytes, source: str) -> tuple[CheckpointConfig, bytes]:
    """The config and the content of model.safetensors for the safetensors file of a model's whole state.

    Raises:
        CheckpointError: the tensors are not exactly the model's, or too large; the message names `source`.
    """
    try:
        model = build_empty(facts.model)
        model.load_state_dict(read_plain(content, model), strict=True)
        if is_quantized(model):
            content = packed_file(model.eval())
    except CheckpointError as error:
        raise CheckpointError(f"{source}: not the weights of {facts.name}: {error}") from None
    if len(content) > LARGEST_FILE:
        raise CheckpointError(f"{source}: weights of {len(content):,} bytes, where a checkpoint has {LARGEST_FILE:,}")
    return CheckpointConfig(**dict(facts), format_version=FORMAT_VERSION, file=FileFacts.of(content)), content


def write_encoded(folder: str | Path, config: CheckpointConfig, content: bytes, card: str | None = None) -> None:
    """Write the files of a checkpoint in the order of `FILES`; without `card`, an existing card is left as it is.

    If this is interrupted, the old config is not that of the new weights, so that nothing loads or publishes a mixture.

    Raises:
        CheckpointError: the config is too large; nothing was written.
    """
    text = _config_text(config)
    with replacing(Path(folder) / WEIGHTS) as temporary:
        temporary.write_bytes(content)
    if card is not None:
        update_text(Path(folder) / CARD, card)
    write_text(Path(folder) / CONFIG, text)


def check_replaceable(folder: Path) -> None:
    """Raise CheckpointError where writing a checkpoint would replace a file of something else, such as a project.

    A checkpoint may be replaced, and so may what an interrupted first writing of one left: weights, perhaps a card, no
    config, and nothing else.
    """
    if there := file_in_the_way(folder):
        raise CheckpointError(f"{folder}: {there} is a file, not a folder: choose another folder")
    present = [file for file in FILES if os.path.lexists(folder / file)]
    if not present:
        return
    try:
        if CONFIG in present:
            read_config(folder)
            return
        others = [path.name for path in folder.iterdir() if path.name not in present]
        temporary = all(any(is_temporary_of(name, file) for file in FILES) for name in others)
        if WEIGHTS in present and temporary and (CARD not in present or _OWN_CARD in (folder / CARD).read_bytes()):
            return
    except (CheckpointError, OSError):
        pass
    raise CheckpointError(
        f"{folder}: {' and '.join(present)} would be replaced, and this is not the folder of a checkpoint that this "
        "cnvzoo reads: choose another folder"
    )


def write_config(folder: str | Path, config: CheckpointConfig) -> None:
    """Write config.json of a checkpoint, after its weights. Raises CheckpointError for one that is too large."""
    write_text(Path(folder) / CONFIG, _config_text(config))


def _config_text(config: CheckpointConfig) -> str:
    values = config.model_dump(mode="json")
    if config.trial is None:
        del values["trial"]  # published configs, whose sha256 the index has, were written before there was this key
    text = json.dumps(values, indent=1) + "\n"
    if len(text) > _LARGEST_CONFIG:  # JSON is ASCII
        raise CheckpointError(f"{config.name}: a config of {len(text):,} bytes, where {_LARGEST_CONFIG:,} are read")
    return text


def read_config(folder: str | Path, facts: FileFacts | None = None) -> CheckpointConfig:
    """Read and validate the config of a checkpoint, after comparison with `facts` where they are given.

    Raises:
        CheckpointError: the file is missing, another, or not valid.
    """
    path = Path(folder) / CONFIG
    if facts is None:
        content = read_limited(path, _LARGEST_CONFIG, f"more than {_LARGEST_CONFIG:,} bytes: not a checkpoint config")
    else:
        content = read_verified(path, facts)
    try:
        return CheckpointConfig.model_validate_json(content)
    except ValidationError as error:
        raise CheckpointError(f"{path}: not a valid checkpoint config: {explain(error)}") from None


def check_weights(folder: str | Path, config: CheckpointConfig) -> None:
    """Raise CheckpointError where model.safetensors is not the file that the config describes."""
    read_verified(Path(folder) / WEIGHTS, config.file, _NOT_DESCRIBED)


def read_model(folder: str | Path, files: Mapping[str, FileFacts] | None = None) -> tuple[Classifier, CheckpointConfig]:
    """Build the model of a checkpoint, in eval mode on the CPU, with its weights.

    Args:
        folder: the checkpoint's folder.
        files: size and sha256 of config.json and model.safetensors. By default any valid config.json is accepted, and
            it has those of model.safetensors.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not exactly the model's.
    """
    folder = Path(folder)
    config = read_config(folder, files[CONFIG] if files else None)
    content = read_verified(folder / WEIGHTS, config.file, _NOT_PUBLISHED if files else _NOT_DESCRIBED)
    try:
        skeleton = build_skeleton(config.model)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    try:
        state = read_published(content, skeleton)
        model = build_empty(config.model)
        fill(model, state)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: not the weights of {config.name}: {error}") from None
    return model.eval(), config


def preprocessing_from(config: CheckpointConfig) -> Preprocessing:
    """The preprocessing of the checkpoint's model."""
    return Preprocessing.from_dict(config.preprocessing)
