"""An option: one field of a dataclass, with the default, choices, help text and flag that belong to
it.

    @dataclass(frozen=True)
    class Spec(Options):
        dtype: str = option("keep", "Dtype of the result.", choices=("keep", "bf16"))

`options_of(Spec)` lists the options. Values are checked when a `Spec` is made, so one that exists
is valid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Self

from merge_cli.errors import UsageError


@dataclass(frozen=True)
class Option:
    """The description of one option.

    `name` is the keyword of Python calls, `field` the attribute that holds the value; `flag` and
    both names default to the name of the field. `read` turns a value, which may be text as typed,
    into the one that is kept, and raises UsageError (called with the value and the flag).
    `synonyms` maps likely mistakes to choices. `shown` is the default in help texts where it is not
    the default itself.
    """

    help: str
    default: Any = None
    name: str = ""
    flag: str = ""
    metavar: str = ""
    choices: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    read: Callable[[Any, str], Any] | None = None
    shown: str = ""
    field: str = ""

    @property
    def is_switch(self) -> bool:
        """True for an option without a value on the command line."""
        return isinstance(self.default, bool)

    @property
    def is_list(self) -> bool:
        """True for an option that may be given several times."""
        return isinstance(self.default, tuple)

    def named(self, field: str) -> Self:
        """The same option as that of the attribute or parameter `field`, with its name and flag
        filled in.
        """
        name = self.name or field
        return replace(self, field=field, name=name, flag=self.flag or "--" + name.replace("_", "-"))

    def check(self, value: Any) -> Any:
        """The value as it is kept. Raises UsageError unless it is one that the option takes."""
        if value is None and self.default is None:
            return None
        if self.is_switch and not isinstance(value, bool):
            raise UsageError(f"{self.flag} cannot be {value!r}", details=["expected  True or False"])
        if self.choices and value not in self.choices:
            raise not_a_choice(self.flag, value, self.choices, self.synonyms)
        return value if self.read is None else self.read(value, self.flag)


class Options:
    """Base of the dataclasses whose fields are options. Raises UsageError for a value that is not
    allowed.
    """

    def __post_init__(self) -> None:
        for each in options_of(type(self)):
            object.__setattr__(self, each.field, each.check(getattr(self, each.field)))


def option(default: Any, help: str, **description: Any) -> Any:
    """A dataclass field that is an option; `description` holds more fields of `Option`."""
    return field(default=default, metadata={"option": Option(help, default, **description)})


def options_of(spec: type[Options]) -> tuple[Option, ...]:
    """The options that are fields of the dataclass `spec`, in order."""
    fields = dataclasses.fields(spec)  # type: ignore[arg-type]  # its subclasses are dataclasses
    return tuple(each.metadata["option"].named(each.name) for each in fields if "option" in each.metadata)


def nearest(typed: object, choices: Collection[str], synonyms: Mapping[str, str] | None = None) -> str | None:
    """The choice that was probably meant: a synonym, or one that is spelled alike."""
    word = str(typed).strip().lower()
    return (synonyms or {}).get(word) or next(iter(get_close_matches(word, choices, 1)), None)


def not_a_choice(flag: str, value: object, choices: Sequence[str], synonyms: Mapping[str, str] | None = None) -> UsageError:
    """The error for a value that is none of `choices`, with the nearest one as the hint."""
    meant = nearest(value, choices, synonyms)
    instead = "pmerge methods  lists them" if flag == "--method" else f"{flag} {choices[0]}"
    return UsageError(
        f"{flag} cannot be {value!r}",
        details=[f"expected  {', '.join(choices)}"],
        hint=f"did you mean  {flag} {meant}" if meant else instead,
    )
