"""The package as a graph of files: no file imports itself through others, whether at run time or for type checking."""

import ast
from collections.abc import Iterator
from pathlib import Path

import cogvideo

ROOT = Path(cogvideo.__file__).parent


def imports_of(tree: ast.AST, modules: set[str]) -> set[str]:
    """Modules that a file imports: at its top, inside functions and under TYPE_CHECKING alike."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (members & modules) or {node.module}
    return found & modules


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Strongly connected components of more than one module, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> Iterator[list[str]]:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for imported in graph[module]:
            if imported not in index:
                yield from visit(imported)
                lowest[module] = min(lowest[module], lowest[imported])
            elif imported in stack:
                lowest[module] = min(lowest[module], index[imported])
        if lowest[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[-len(component) :]
            if len(component) > 1:
                yield sorted(component)

    for module in graph:
        if module not in index:
            yield from visit(module)


def package_graph() -> dict[str, set[str]]:
    paths = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in paths.items()}
    return {module: imports_of(tree, set(paths)) - {module} for module, tree in trees.items()}


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert list(circles(graph)) == [["b", "c"]]


def test_imports_for_type_checking_and_inside_functions_count() -> None:
    source = "if TYPE_CHECKING:\n    from p.a import A\ndef f():\n    from p import b\n"
    assert imports_of(ast.parse(source), {"p", "p.a", "p.b"}) == {"p.a", "p.b"}


def test_no_file_imports_itself_through_others() -> None:
    graph = package_graph()
    assert "cogvideo.model.transformer" in graph["cogvideo.inference.engine"], "the graph is the package's"
    assert list(circles(graph)) == []
