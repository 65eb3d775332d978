"""One rename engine for every source of weights, and the law of coverage that it enforces.

A source is described by an ordered table; the first row whose pattern fits a name decides. The law: every source
tensor is used or dropped with a written reason, every target is filled or listed as new with a reason, and shapes
agree. Whatever breaks the law raises `CoverageError`, which shows the whole table.

Patterns are names with placeholders. `{leaf}` stands for one part between dots, `{rest}` for one or more parts, and
any other placeholder for an integer, to which either side may add a constant: `norm{i}.{leaf}` ↔ `norms.{i-1}.{leaf}`.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Rename:
    """One tensor under another name; `transform(tensor, expected_shape)` where the layout differs as well."""

    source: str
    target: str
    transform: Callable[[torch.Tensor, Shape], torch.Tensor] | None = None


@dataclass(frozen=True)
class Split:
    """One tensor whose rows (dimension 0) are shared equally, in this order, among several."""

    source: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Drop:
    """A source tensor that the model has no use for, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Fill:
    """A target that the source leaves out because it is this constant, and why."""

    target: str
    value: float
    reason: str


@dataclass(frozen=True)
class New:
    """A target that no tensor of the source is meant for: it is initialised when the model is loaded."""

    target: str
    reason: str


Row = Rename | Split | Drop | Fill | New
AnyRow = TypeVar("AnyRow", bound=Row)
Table = tuple[Row, ...]
Placeholders = Mapping[str, str | int]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    tensors: by target name; views of the source wherever no value changes, so a memory-mapped source stays on disk.
    used: source name → the target names it became. resized: target name → from which shape to which. dropped, filled,
    new: name → reason.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    used: dict[str, tuple[str, ...]] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The whole table, one line a tensor."""
        rows = [f"used     {source} -> {', '.join(targets)}" for source, targets in self.used.items()]
        rows += [f"resized  {target}: {change}" for target, change in self.resized.items()]
        rows += [f"dropped  {source}: {reason}" for source, reason in self.dropped.items()]
        rows += [f"filled   {target}: {reason}" for target, reason in self.filled.items()]
        return rows + [f"new      {target}: {reason}" for target, reason in self.new.items()]


class CoverageError(ValueError):
    """The law of coverage is broken. `problems` holds one sentence for each tensor concerned."""

    def __init__(self, problems: list[str], table: Iterable[str] = ()):
        self.problems = problems
        shown = "".join(f"\nPROBLEM  {problem}" for problem in problems)
        super().__init__(
            f"{len(problems)} tensor(s) break the law of coverage, nothing was converted; the whole table follows."
            + "".join(f"\n{line}" for line in table)
            + shown
        )


_PLACEHOLDER = re.compile(r"\{(\w+)([+-]\d+)?\}")
_TEXT = {"leaf": r"[^.]+", "rest": r".+"}


@functools.cache
def _compiled(pattern: str) -> tuple[re.Pattern[str], tuple[tuple[str, int], ...]]:
    """The pattern as a regular expression, and name and offset of each of its placeholders."""
    expression, end, placeholders = "", 0, []
    for found in _PLACEHOLDER.finditer(pattern):
        name, offset = found.group(1), int(found.group(2) or 0)
        expression += re.escape(pattern[end : found.start()]) + f"({_TEXT.get(name, '[0-9]+')})"
        placeholders.append((name, offset))
        end = found.end()
    return re.compile(expression + re.escape(pattern[end:])), tuple(placeholders)


def match(pattern: str, name: str) -> Placeholders | None:
    """Values of the placeholders if the whole name fits the pattern, else None."""
    expression, placeholders = _compiled(pattern)
    found = expression.fullmatch(name)
    if found is None:
        return None
    return {
        key: text if key in _TEXT else int(text) - offset
        for (key, offset), text in zip(placeholders, found.groups(), strict=True)
    }


def expand(pattern: str, values: Placeholders) -> str:
    """The name that `match` would give these values for."""

    def text(found: re.Match[str]) -> str:
        value = values[found.group(1)]
        return value if isinstance(value, str) else str(value + int(found.group(2) or 0))

    return _PLACEHOLDER.sub(text, pattern)


def prefixed(table: Table, source: str, target: str) -> Table:
    """The same table for names that carry a prefix on either side."""
    rows: list[Row] = []
    for row in table:
        if isinstance(row, Split):
            rows.append(Split(source + row.source, tuple(target + name for name in row.targets)))
        elif isinstance(row, Rename):
            rows.append(replace(row, source=source + row.source, target=target + row.target))
        elif isinstance(row, Drop):
            rows.append(replace(row, source=source + row.source))
        else:
            rows.append(replace(row, target=target + row.target))
    return tuple(rows)


def convert(state: State, table: Table, expected: Shapes) -> Conversion:
    """Applies the table to a source.

    state: the source's tensors. expected: name and shape of everything that the model holds.

    Raises: CoverageError: a source tensor has no row or a name the model lacks, a target is filled twice or not at
    all, or a shape disagrees.
    """
    done, problems = Conversion(), []
    meant: set[str] = set()
    sources = [row for row in table if isinstance(row, Rename | Split | Drop)]
    absences = [row for row in table if isinstance(row, Fill | New)]
    for source, tensor in state.items():
        found = first_match(sources, source, lambda row: (row.source,))
        if found is None:
            problems.append(f"{source} {list(tensor.shape)}: no row of the table names it")
            continue
        row, values = found
        if isinstance(row, Drop):
            done.dropped[source] = row.reason
        else:
            targets = tuple(expand(pattern, values) for pattern in target_patterns(row))
            meant.update(targets)
            try:
                parts = _parts(tensor, row, targets, expected, done.tensors)
            except ValueError as problem:
                problems.append(f"{source} {list(tensor.shape)}: {problem}")
            else:
                done.tensors.update(parts)
                done.used[source] = targets
                for target, part in parts.items():
                    if len(parts) == 1 and part.numel() != tensor.numel():
                        done.resized[target] = f"{list(tensor.shape)} became {list(part.shape)}"
    dtype = next((tensor.dtype for tensor in done.tensors.values() if tensor.is_floating_point()), None)
    for target in (name for name in expected if name not in meant):
        absence = first_match(absences, target, lambda row: (row.target,))
        if absence is None:
            problems.append(f"{target} {list(expected[target])}: the source holds nothing for it")
        elif isinstance(absence[0], Fill):
            done.tensors[target] = torch.full(expected[target], absence[0].value, dtype=dtype)
            done.filled[target] = absence[0].reason
        else:
            done.new[target] = absence[0].reason
    if problems:
        raise CoverageError(problems, done.lines())
    return done


def revert(state: State, table: Table, expected: Shapes) -> dict[str, torch.Tensor]:
    """Applies the table backwards: `revert(convert(s).tensors)` is s, bit for bit, without what was dropped.

    state: tensors by the model's names. expected: name and shape of everything that the model holds; all of it has to
    be there. Rows with a transform have no way back.

    Raises: CoverageError: a name is missing, unexpected or without a row, or a shape disagrees.
    """
    problems = [f"{name} {list(shape)}: missing" for name, shape in expected.items() if name not in state]
    for name, tensor in state.items():
        if name not in expected:
            problems.append(f"{name} {list(tensor.shape)}: the model has no such tensor")
        elif tuple(tensor.shape) != tuple(expected[name]):
            problems.append(f"{name} {list(tensor.shape)}: the model holds {list(expected[name])}")
    if problems:
        raise CoverageError(problems)
    reverted: dict[str, torch.Tensor] = {}
    ways_back = [row for row in table if isinstance(row, Split) or (isinstance(row, Rename) and row.transform is None)]
    for name in state:
        found = first_match(ways_back, name, target_patterns)
        if found is None:
            problems.append(f"{name} {list(state[name].shape)}: no row of the table leads back")
            continue
        row, values = found
        source = expand(row.source, values)
        parts = [expand(pattern, values) for pattern in target_patterns(row)]
        missing = [part for part in parts if part not in state]
        if missing:
            problems.append(f"{name} {list(state[name].shape)}: {source} needs {', '.join(missing)} as well")
        elif source not in reverted:
            reverted[source] = torch.cat([state[part] for part in parts]) if len(parts) > 1 else state[name]
    if problems:
        raise CoverageError(problems)
    return reverted


def target_patterns(row: Rename | Split) -> tuple[str, ...]:
    """Patterns of the model's names that a row fills."""
    return row.targets if isinstance(row, Split) else (row.target,)


def first_match(
    rows: Iterable[AnyRow], name: str, patterns: Callable[[AnyRow], tuple[str, ...]]
) -> tuple[AnyRow, Placeholders] | None:
    """The first row one of whose `patterns` fits the name, and the values of its placeholders."""
    for row in rows:
        for pattern in patterns(row):
            values = match(pattern, name)
            if values is not None:
                return row, values
    return None


def _parts(
    tensor: torch.Tensor, row: Rename | Split, targets: tuple[str, ...], expected: Shapes, filled: State
) -> dict[str, torch.Tensor]:
    """The source tensor as the targets, by name.

    Raises: ValueError: a target does not exist or is filled already, or the shape does not fit.
    """
    for target in targets:
        if target not in expected:
            raise ValueError(f"the model has no {target}")
        if target in filled:
            raise ValueError(f"{target} is already filled by another tensor")
    if isinstance(row, Split):
        rows = [expected[target][0] for target in targets]
        if tensor.dim() == 0 or tensor.shape[0] != sum(rows):
            raise ValueError(f"the rows of {', '.join(targets)} together are {sum(rows)}")
        parts = tensor.split(rows)
    else:
        parts = (tensor if row.transform is None else row.transform(tensor, expected[targets[0]]),)
    for target, part in zip(targets, parts, strict=True):
        if tuple(part.shape) != tuple(expected[target]):
            raise ValueError(f"{target} would get the shape {list(part.shape)} instead of {list(expected[target])}")
    return dict(zip(targets, parts, strict=True))
