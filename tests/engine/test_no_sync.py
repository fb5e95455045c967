"""Nothing in a step waits for the device: a wait in each of 32 layers costs more than the layer, and no CUDA graph can
be captured with one.

This reads the source of what runs from a plan to its sampled tokens. Whether a tensor is on a device cannot be seen
there, so every expression that would wait is found, and those on host data are listed with the reason. The same step is
run on tensors without contents in tests/engine/backends/test_cuda_step.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEP = [
    *sorted((ROOT / "engine/backends/cuda").glob("*.py")),
    *sorted((ROOT / "engine/layers").glob("*.py")),
    *sorted((ROOT / "engine/routing").glob("*.py")),
    ROOT / "engine/models/decoder.py",
    *(
        ROOT / "engine" / name
        for name in ("batch.py", "decode_graphs.py", "masks.py", "runner.py", "sampler.py", "trace.py", "transfers.py")
    ),
]

# Reading a tensor's contents on the host, or asking for a shape that depends on them.
WAITS = {
    *("item", "tolist", "cpu", "numpy", "is_nonzero", "nonzero", "nonzero_static", "argwhere", "masked_select"),
    *("bincount", "unique", "unique_consecutive", "equal", "allclose", "synchronize", "wait_stream"),
}
# Host values to a tensor: on a device that is a copy out of memory that is not pinned, which waits.
COPIES = {"torch.tensor", "torch.as_tensor", "torch.asarray", "torch.from_numpy"}
CASTS = {"int", "float", "bool"}

ALLOWED = {
    "engine/routing/record.py": {
        "self._factors = capacity_factors().to(device)": "at start",
        "end = int(self._cursor)": "a snapshot, which somebody asked for",
        "return Sums(*(tensor.clone().cpu() for tensor in self._total.tensors()))": "a snapshot",
        "return Sums(*(tensor.cpu() for tensor in self._ring.over_steps().tensors()))": "a snapshot",
        "window=Sums(*(tensor.cpu()[order] for tensor in self._ring.tensors()))": "a snapshot",
        "overflow=self._overflow.clone().cpu()": "a snapshot",
    },
    "engine/transfers.py": {
        "tensor = torch.as_tensor(values, dtype=dtype)": "on the host",
        'return tensor.to("cpu", non_blocking=True)': "asked not to wait",
        "self._event.synchronize()": "the result, which is waited for",
    },
    "engine/decode_graphs.py": {
        "self._stream.wait_stream(torch.cuda.current_stream())": "at start",
        "torch.cuda.current_stream().wait_stream(self._stream)": "at start",
    },
    "engine/trace.py": {
        "columns = (self.expert_ids.tolist(), self.weights.tolist(), self.entropy.tolist())": "when it has arrived",
        "index: int(part.sum())": "when it has arrived",
    },
    "engine/sampler.py": {
        "ids, counts = np.unique(np.asarray(row.output_ids, dtype=np.int64), return_counts=True)": "on the host",
    },
    "engine/masks.py": {
        "if left.any():": "on the host",
    },
    "engine/layers/rotary.py": {"return (1.0 / theta**exponents).to(device)": "at start"},
}
# On the CPU, from a snapshot, or at start: not in a step.
LEFT_OUT = {"engine/routing/stats.py", "engine/routing/select.py", "engine/backends/cuda/tiles.py"}


def waits(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of every expression that waits, or might."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield from _masked_subscripts(node)
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr=name)) if name in WAITS:
                yield node.lineno, f".{name}()"
            case ast.Call(func=ast.Attribute() as called) if ast.unparse(called) in COPIES:
                yield node.lineno, ast.unparse(called)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="where"), args=[_]):
                yield node.lineno, "torch.where with nothing to choose from"
            case ast.Call(func=ast.Attribute(attr="repeat_interleave"), keywords=keywords) if not any(
                keyword.arg == "output_size" for keyword in keywords
            ):
                yield node.lineno, "repeat_interleave without output_size"
            case ast.Call(func=ast.Name(id=name), args=[argument]) if name in CASTS and not isinstance(
                argument, ast.Constant
            ):
                yield node.lineno, f"{name}()"
            case ast.Call(func=ast.Attribute(attr="to"), args=[ast.Constant(value="cpu"), *_]):
                yield node.lineno, '.to("cpu")'
            case ast.Call(func=ast.Attribute(attr="to"), args=[place, *_], keywords=keywords) if ast.unparse(
                place
            ).endswith("device") and not any(keyword.arg == "non_blocking" for keyword in keywords):
                yield node.lineno, "a copy that waits"
            case ast.If(test=test) | ast.While(test=test) | ast.Assert(test=test) if _calls(test, {"any", "all"}):
                yield test.lineno, "a branch on what a tensor holds"
            case _:
                pass


def _masked_subscripts(function: ast.AST) -> Iterator[tuple[int, str]]:
    """x[mask]: a comparison as an index, or a name that one was assigned to."""
    masks = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and _is_mask(node.value, set())
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Subscript):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            if any(_is_mask(part, masks) for part in parts):
                yield node.lineno, "a mask as index"


def _is_mask(node: ast.expr, masks: set[str]) -> bool:
    match node:
        case ast.Compare(ops=[ast.Lt() | ast.LtE() | ast.Gt() | ast.GtE() | ast.Eq() | ast.NotEq()]):
            return True
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return _is_mask(operand, masks)
        case ast.BinOp(left=left, op=ast.BitAnd() | ast.BitOr(), right=right):
            return _is_mask(left, masks) or _is_mask(right, masks)
        case ast.Name(id=name):
            return name in masks
        case ast.Call(func=ast.Attribute(attr="bool" | "isfinite" | "isnan" | "logical_and" | "logical_not")):
            return True
        case _:
            return False


def _calls(test: ast.expr, names: set[str]) -> bool:
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names
        for node in ast.walk(test)
    )


@pytest.mark.parametrize(
    "line",
    [
        "n = counts.item()",
        "n = counts.max().tolist()[0]",
        "rows = (ids >= 0).nonzero()",
        "rows = torch.nonzero(ids)",
        "counts = torch.bincount(ids)",
        "index = torch.tensor([1, 2], device=x.device)",
        "y = x[ids >= 0]",
        "mask = (ids >= 0) & (ids < 3); y = x[mask]",
        "mask = ids >= 0; y = x[:, ~mask]",
        "n = int(offsets[-1])",
        "x.to('cpu')",
        "x.to(ids.device)",
        "if (ids < 0).any(): pass",
        "torch.where(ids < 0)",
        "torch.repeat_interleave(counts)",
        "torch.cuda.synchronize()",
    ],
)
def test_a_wait_is_found(line: str) -> None:
    indented = "\n".join(f"    {part.strip()}" for part in line.split("; "))
    assert list(waits(f"def f(x, ids, counts, offsets):\n{indented}\n"))


@pytest.mark.parametrize(
    "line",
    [
        "y = torch.where(ids < 0, 0, x)",
        "y = x[ids]",
        "used = ids >= 0; y = x * used",
        "y = x[1:, None]",
        "n = x.shape[0]",
        "y = ids.to(torch.int32)",
        "n = float('inf')",
    ],
)
def test_what_does_not_wait_is_not(line: str) -> None:
    indented = "\n".join(f"    {part.strip()}" for part in line.split("; "))
    assert not list(waits(f"def f(x, ids):\n{indented}\n"))


def test_nothing_in_a_step_waits() -> None:
    found, unused = [], {(path, line) for path, lines in ALLOWED.items() for line in lines}
    for file in STEP:
        path, source = file.relative_to(ROOT).as_posix(), file.read_text()
        if path in LEFT_OUT:
            continue
        for number, what in waits(source):
            line = source.splitlines()[number - 1].strip().rstrip(",")
            unused.discard((path, line))
            if line not in ALLOWED.get(path, {}):
                found.append(f"{path}:{number}: {what} in `{line}`")
    assert found == []
    assert unused == set(), "no such line any more"


def test_the_step_is_there() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in STEP}
    assert {"engine/backends/cuda/backend.py", "engine/layers/fused.py", "engine/routing/record.py"} <= names
    assert names >= LEFT_OUT | ALLOWED.keys()
