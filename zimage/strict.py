"""Files checked against a model of what they may hold: whatever does not fit is one line with file and line number."""

from typing import Any, TypeVar, get_args

from zimage.errors import ZImageError, unknown
from zimage.yaml_lines import Document, Place

from pydantic import BaseModel, ConfigDict, ValidationError

_WORDS = {  # what pydantic calls an error, in ours
    "list_type": "takes a list",
    "dict_type": "takes names with their values",
    "model_type": "takes names with their values",
    "string_type": "takes text",
    "float_type": "takes a number",
    "finite_number": "takes a finite number",
    "int_type": "takes a whole number",
    "too_long": "must have at most {max_length}",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "greater_than": "must be greater than {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
}


class Strict(BaseModel):
    """Accepts exactly its fields, of exactly their types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_M = TypeVar("_M", bound=Strict)


def validate(document: Document, model: type[_M], name: str, kind: str | None = None) -> _M:
    """What `document` holds, as a `model`, in words `name` ("an experiment file"); it must be of `kind`, if given.

    Raises the document's kind of error for the fault on the lowest line, and counts the others.
    """
    if not isinstance(document.value, dict):
        start = f"that starts with 'kind: {kind}'" if kind else f"with {' and '.join(map(repr, model.model_fields))}"
        raise document.error((), f"{name} is a mapping {start}, found {short(document.value)}")
    found = document.value.get("kind")
    if kind is not None and found != kind:
        said = f"kind {short(found)} is not {name}" if "kind" in document.value else "key 'kind' is missing"
        raise document.error(("kind",), f"{said}; it needs 'kind: {kind}'")
    try:
        return model.model_validate(document.value)
    except ValidationError as error:
        raise _first_error(document, model, error) from None


def short(value: Any) -> str:
    """A value from a file, cut to fit into a line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _first_error(document: Document, model: type[Strict], error: ValidationError) -> ZImageError:
    """The error on the lowest line in our words, and how many more there are."""
    found = sorted(error.errors(include_url=False), key=lambda one: document.line(tuple(one["loc"])))
    first, place = found[0], tuple(found[0]["loc"])
    name = ".".join(map(str, place))
    match first["type"]:
        case "extra_forbidden":
            message = unknown("unknown key", str(place[-1]), _fields(model, place[:-1]))
        case "missing":
            message = f"key {name!r} is missing"
        case kind:
            reason = _WORDS.get(kind, "does not fit").format(**first.get("ctx", {}))
            message = f"{name!r} {reason}, found {type(first['input']).__name__} {short(first['input'])}"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return document.error(place, message + more)


def _fields(model: type[Strict], place: Place) -> list[str]:
    """The names that the model at `place` below `model` knows."""
    for part in place:
        if isinstance(part, str):
            inner = _models(model.model_fields[part].annotation)
            model = inner[0]
    return list(model.model_fields)


def _models(annotation: Any) -> list[type[Strict]]:
    """The models in an annotation such as `list[Model]` or `Model | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
