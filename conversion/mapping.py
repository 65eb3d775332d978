"""One rename engine for every source of weights, and the law of coverage that it enforces.

A source is described by an ordered table; the first row whose pattern fits a name decides. The law: every source tensor
is used or dropped with a written reason, every target is filled or listed as new with a reason, and shapes agree.
Whatever breaks the law raises `CoverageError`, which shows the whole table.

Patterns are names with placeholders. `{leaf}` stands for one part between dots, `{rest}` for one or more parts, and any
other placeholder for an integer, to which either side may add a constant: `norm{i}.{leaf}` ↔ `norms.{i-1}.{leaf}`.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

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
Table = tuple[Row, ...]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    tensors: by target name; views of the source wherever no value changes, so that a memory-mapped source stays on disk.
    used: source name → the target names it became. dropped, filled, new: name → reason.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    used: dict[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The whole table, one line a tensor."""
        rows = [f"used     {source} -> {', '.join(targets)}" for source, targets in self.used.items()]
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


def match(pattern: str, name: str) -> dict[str, str | int] | None:
    """Values of the placeholders if the whole name fits the pattern, else None."""
    expression, placeholders = _compiled(pattern)
    found = expression.fullmatch(name)
    if found is None:
        return None
    return {
        key: text if key in _TEXT else int(text) - offset
        for (key, offset), text in zip(placeholders, found.groups(), strict=True)
    }


def expand(pattern: str, values: Mapping[str, str | int]) -> str:
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

    Raises: CoverageError: a source tensor has no row or a name the model lacks, a target is filled twice or not at all,
    or a shape disagrees.
    """
    done, problems = Conversion(), []
    sources = [row for row in table if isinstance(row, Rename | Split | Drop)]
    for source, tensor in state.items():
        row, values = _first_match(sources, source)
        if row is None:
            problems.append(f"{source} {list(tensor.shape)}: no row of the table names it")
        elif isinstance(row, Drop):
            done.dropped[source] = row.reason
        else:
            patterns = row.targets if isinstance(row, Split) else (row.target,)
            targets = tuple(expand(pattern, values) for pattern in patterns)
            problem = _fill(done.tensors, source, tensor, row, targets, expected)
            if problem is None:
                done.used[source] = targets
            else:
                problems.append(f"{source} {list(tensor.shape)}: {problem}")
    claimed = done.tensors.keys() | {name for problem in problems for name in expected if f" {name} " in problem}
    for target in expected:
        if target in claimed:
            continue
        absent, _ = _first_match([row for row in table if isinstance(row, Fill | New)], target)
        if isinstance(absent, Fill):
            done.tensors[target] = torch.full(expected[target], absent.value)
            done.filled[target] = absent.reason
        elif isinstance(absent, New):
            done.new[target] = absent.reason
        else:
            problems.append(f"{target} {list(expected[target])}: the source holds nothing for it")
    if problems:
        raise CoverageError(problems, done.lines())
    return done


def revert(state: State, table: Table, expected: Shapes) -> dict[str, torch.Tensor]:
    """Applies the table backwards: `revert(convert(s).tensors) == s`, bit for bit, but for dropped tensors.

    state: tensors by the model's names. expected: name and shape of everything that the model holds; all of it has to be
    there. Rows with a transform have no way back.

    Raises: CoverageError: a name is missing, unexpected or without a row, or a shape disagrees.
    """
    problems = [f"{name} {list(expected[name])}: missing" for name in expected if name not in state]
    problems += [f"{name} {list(state[name].shape)}: the model has no such tensor" for name in state.keys() - expected]
    problems += [
        f"{name} {list(state[name].shape)}: the model holds {list(shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
    ]
    reverted: dict[str, torch.Tensor] = {}
    ways_back = [row for row in table if isinstance(row, Split) or (isinstance(row, Rename) and row.transform is None)]
    for name in state.keys() & expected.keys() if problems else state:
        for row in ways_back:
            patterns = row.targets if isinstance(row, Split) else (row.target,)
            values = match(patterns[0], name)
            if values is not None:
                parts = [expand(pattern, values) for pattern in patterns]
                if all(part in state for part in parts):
                    source = expand(row.source, values)
                    reverted[source] = state[name] if len(parts) == 1 else torch.cat([state[part] for part in parts])
                break
            if any(match(pattern, name) is not None for pattern in patterns[1:]):
                break  # comes along with the first part
        else:
            problems.append(f"{name} {list(state[name].shape)}: no row of the table leads back")
    if problems:
        raise CoverageError(problems)
    return reverted


def _first_match(rows: list[Row], name: str) -> tuple[Row | None, dict[str, str | int]]:
    for row in rows:
        values = match(row.target if isinstance(row, Fill | New) else row.source, name)
        if values is not None:
            return row, values
    return None, {}


def _fill(
    tensors: dict[str, torch.Tensor],
    source: str,
    tensor: torch.Tensor,
    row: Rename | Split,
    targets: tuple[str, ...],
    expected: Shapes,
) -> str | None:
    """Puts the source's parts into `tensors`; the sentence that says why not, otherwise."""
    for target in targets:
        if target not in expected:
            return f"the model has no {target}"
        if target in tensors:
            return f"{target} is already filled by another tensor"
    if isinstance(row, Split):
        wanted = sum(expected[target][0] for target in targets)
        if tensor.dim() == 0 or tensor.shape[0] != wanted:
            return f"its rows should be the {wanted} of {' , '.join(targets)} together"
        parts: tuple[torch.Tensor, ...] = tensor.split([expected[target][0] for target in targets])
    elif row.transform is not None:
        try:
            parts = (row.transform(tensor, expected[targets[0]]),)
        except ValueError as error:
            return f"cannot become {targets[0]} : {error}"
    else:
        parts = (tensor,)
    for target, part in zip(targets, parts, strict=True):
        if tuple(part.shape) != tuple(expected[target]):
            return f"becomes {target} of shape {list(part.shape)}, but the model holds {list(expected[target])}"
    tensors.update(zip(targets, parts, strict=True))
    return None
