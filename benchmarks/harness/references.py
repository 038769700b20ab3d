"""The figures that ours are compared with: `references.yaml`, typed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cnvzoo.errors import nearest

from .entries import Entry
from .errors import HarnessError


class Reference(BaseModel):
    """Test accuracies in percent, and who measured them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float = Field(gt=0, le=100)
    runs: tuple[float, ...] | None = None
    std: float | None = Field(default=None, ge=0)
    source: str = Field(min_length=1)


_FILE = TypeAdapter(dict[str, Reference | None])


def load_references(path: Path, entries: Mapping[str, Entry]) -> dict[str, Reference]:
    """The reference of each entry that has one; raises HarnessError where the file or a name in it is wrong."""
    try:
        references = _FILE.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except OSError as error:
        raise HarnessError(f"{path}: cannot be read ({error.strerror}); restore it from version control") from error
    except yaml.YAMLError as error:
        raise HarnessError(f"{path}: not valid YAML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise HarnessError(f"{path}: {problems}; an entry has mean, runs, std and source") from error
    for name in references:
        if name not in entries:
            raise HarnessError(f"{path}: no recipe is named {name!r}: {nearest(name, entries)}")
    return {name: reference for name, reference in references.items() if reference is not None}
