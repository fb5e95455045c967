"""The architecture as tests: dependencies point one way, imports stay cheap, files stay small."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import engine
from tests.engine.text.checkpoints import byte_level
from tests.tiny import write_tiny_mixtral

ROOT = Path(__file__).parent.parent
MAX_LINES = 350

MAY_IMPORT = {"server": {"engine", "weights"}, "engine": {"weights"}, "weights": set[str]()}

# What an import of a module may load beside the standard library: a GPU box that only runs the engine has no more.
BASICS = {"torch", "numpy", "safetensors", "tokenizers", "jinja2"}
EXCEPTIONS = {
    "engine/wire.py": {"msgspec"},
    "engine/client.py": {"msgspec"},
    "engine/process.py": {"msgspec"},
    "engine/grammar/check_process.py": {"msgspec"},
    "engine/grammar/checker.py": {"msgspec"},
}

GPU_KERNELS = ("engine/backends/cuda/", "engine/kernels/triton/")
"""Triton is loaded by these alone, and they are loaded when a GPU's backend is chosen."""

FILES = [path.relative_to(ROOT) for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]
MODULES = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in FILES]


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    deferred: bool
    """Inside a function or `if TYPE_CHECKING`: not run when the module is imported."""

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def imports_of(source: str) -> list[Import]:
    return list(_walk(ast.parse(source), deferred=False))


def _walk(node: ast.AST, *, deferred: bool) -> Iterator[Import]:
    match node:
        case ast.Import(names=names):
            yield from (Import(alias.name, node.lineno, deferred) for alias in names)
        case ast.ImportFrom(module=module, level=level):
            assert level == 0, f"line {node.lineno}: relative import"
            assert module is not None
            yield Import(module, node.lineno, deferred)
        case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body, orelse=orelse):
            for statement in body:
                yield from _walk(statement, deferred=True)
            for statement in orelse:
                yield from _walk(statement, deferred=deferred)
        case _:
            inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from _walk(child, deferred=inside)


def test_the_walk_sees_every_import() -> None:
    source = """
import a.b, c
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import d
else:
    import e
try:
    from f.g import h
except ImportError:
    pass
class C:
    import i
    def method(self):
        import j
        if True:
            from k import l
"""
    found = {(item.package, item.deferred) for item in imports_of(source)}
    eager, deferred = {"a", "c", "typing", "e", "f", "i"}, {"d", "j", "k"}
    assert found == {(name, False) for name in eager} | {(name, True) for name in deferred}


def violations(packages: Iterable[str], wrong: Callable[[Path, Import], bool]) -> list[str]:
    return [
        f"{path}:{item.line} imports {item.module}"
        for path in FILES
        if path.parts[0] in packages
        for item in imports_of((ROOT / path).read_text())
        if wrong(path, item)
    ]


def test_dependencies_point_one_way() -> None:
    def wrong(path: Path, item: Import) -> bool:
        own = path.parts[0]
        return item.package in MAY_IMPORT.keys() - MAY_IMPORT[own] - {own} | {"tests"}

    assert violations(MAY_IMPORT, wrong) == []


def test_engine_and_weights_import_only_basics() -> None:
    """Anything else is imported inside the function that needs it."""

    def wrong(path: Path, item: Import) -> bool:
        allowed = sys.stdlib_module_names | MAY_IMPORT.keys() | BASICS | EXCEPTIONS.get(path.as_posix(), set())
        if path.as_posix().startswith(GPU_KERNELS):
            allowed |= {"triton"}
        return not item.deferred and item.package not in allowed

    assert violations(("engine", "weights"), wrong) == []


def test_only_gpu_code_imports_gpu_code() -> None:
    """Other modules do it inside a function, so that nobody needs Triton who has no GPU."""

    def wrong(path: Path, item: Import) -> bool:
        gpu = item.package == "triton" or item.module.startswith(("engine.backends.cuda", "engine.kernels.triton"))
        return gpu and not path.as_posix().startswith(GPU_KERNELS) and not item.deferred

    assert violations(MAY_IMPORT, wrong) == []


def test_serving_on_the_cpu_needs_no_triton(tmp_path: Path) -> None:
    """Every other module, and a model that answers, where Triton cannot be imported."""
    write_tiny_mixtral(byte_level(tmp_path), vocab_size=300)
    names = [name for name in MODULES if not f"{name.replace('.', '/')}/".startswith(GPU_KERNELS)]
    code = """if True:
        import importlib, sys
        sys.modules["triton"] = None
        for name in sys.argv[2:]:
            importlib.import_module(name)
        from engine import LLM, SamplingParams
        for backend in ("auto", "torch"):
            llm = LLM(sys.argv[1], device="cpu", backend=backend, kv_cache_memory_bytes=1 << 20)
            (completion,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))
            assert len(completion.token_ids) == 3
        loaded = [name for name in sys.modules if name.startswith("triton")]
        assert loaded == ["triton"], loaded
    """
    arguments = [name for name in names if not name.endswith("__main__")]
    subprocess.run([sys.executable, "-c", code, tmp_path, *arguments], check=True, cwd=ROOT)


def test_kernel_files_hold_jit_functions_only() -> None:
    """And constants. What prepares a launch is in engine/backends/cuda."""

    def allowed(node: ast.stmt) -> bool:
        match node:
            case ast.ImportFrom(module="__future__"):
                return True
            case ast.Import(names=names):
                return all(alias.name in ("triton", "triton.language") for alias in names)
            case ast.ImportFrom(module=str(module)):
                return module.startswith("engine.kernels.triton")
            case ast.Expr(value=ast.Constant(value=str())):  # a docstring
                return True
            case ast.Assign(value=ast.Call(func=function)):
                return ast.unparse(function) == "tl.constexpr"
            case ast.FunctionDef(decorator_list=[decorator]):
                return ast.unparse(decorator).partition("(")[0] == "triton.jit"
        return False

    files = sorted((ROOT / "engine" / "kernels" / "triton").glob("*.py"))
    wrong = [
        (path.name, node.lineno) for path in files for node in ast.parse(path.read_text()).body if not allowed(node)
    ]
    assert len(files) > 4
    assert wrong == []


def test_server_imports_no_torch() -> None:
    assert violations(("server",), lambda _, item: item.package == "torch" and not item.deferred) == []


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__main__")])
def test_every_module_can_be_imported(module: str) -> None:
    if module.replace(".", "/").startswith(GPU_KERNELS):
        pytest.importorskip("triton", reason="there are wheels for Linux only")
    importlib.import_module(module)


@pytest.mark.parametrize("module", ["engine", "engine.config", "engine.types", "weights.config", "server.cli"])
def test_importing_costs_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_public_name_of_the_engine_resolves() -> None:
    assert engine.__all__ == sorted(engine.__all__, key=lambda name: (not name.isupper(), name))
    for name in engine.__all__:
        assert getattr(engine, name).__name__ == name


def test_a_name_the_engine_has_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'engine' has no attribute 'Nothing'"):
        engine.Nothing  # noqa: B018


def test_files_stay_small() -> None:
    lengths = {path.as_posix(): len((ROOT / path).read_text().splitlines()) for path in FILES}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_architecture_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:server|engine|weights|tests|docs)/[\w/.]*)`", text))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
