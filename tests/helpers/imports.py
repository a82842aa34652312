"""The import graph of the package, from its sources: `python tests/helpers/imports.py` prints it level by level."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "mdpgrpo_fast"


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@dataclass(frozen=True)
class Graph:
    """Modules of a package by dotted name inside it ("" is the package itself), and what each imports, lazily too."""

    root: Path

    @cached_property
    def files(self) -> dict[str, Path]:
        found = {}
        for path in sorted(self.root.rglob("*.py")):
            parts = path.relative_to(self.root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return found

    def imports(self, name: str, top_level: bool = False) -> set[str]:
        """Absolute names that a module imports; with top_level, only those that its own import runs.

        Names under `if TYPE_CHECKING:` are not imports.
        """
        path, found = self.files[name], set()
        queue: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
        here = [self.root.name, *(name.split(".") if name else [])]
        package = here if path.name == "__init__.py" else here[:-1]
        while queue:
            node = queue.pop()
            if is_type_checking(node) or (top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
                continue
            queue += ast.iter_child_nodes(node)
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                base += node.module.split(".") if node.module else []
                members = {".".join([*base, alias.name]) for alias in node.names}
                # `from package import module` imports the module; another name comes from the package itself.
                modules = {m for m in members if m.removeprefix(f"{self.root.name}.") in self.files}
                found |= modules
                if modules != members:
                    found.add(".".join(base))
        return found

    @cached_property
    def edges(self) -> dict[str, set[str]]:
        """Module -> modules of the package that it imports. Importing the package root counts too."""
        found = {}
        for name in self.files:
            ours = {x for x in self.imports(name) if x.split(".")[0] == self.root.name}
            ours = {x.removeprefix(self.root.name).lstrip(".") for x in ours}
            found[name] = {x for x in ours if x in self.files} - {name}
        return found

    def outside(self, name: str, top_level: bool = False) -> set[str]:
        """Other packages that a module imports."""
        return {x.split(".")[0] for x in self.imports(name, top_level)} - {self.root.name}

    def reach(self, name: str) -> set[str]:
        """Everything of the package that a module leads to."""
        seen: set[str] = set()
        queue = [name]
        while queue:
            for other in self.edges[queue.pop()] - seen:
                seen.add(other)
                queue.append(other)
        return seen

    def circles(self) -> list[set[str]]:
        """Modules that lead to themselves, with those on the way."""
        reached = {name: self.reach(name) for name in self.files}
        closed = [name for name in self.files if name in reached[name]]
        found = [{name} | {m for m in reached[name] if name in reached[m]} for name in closed]
        return [c for i, c in enumerate(found) if c not in found[:i]]

    def folder_edges(self) -> dict[str, set[str]]:
        """The same between the files and folders of the first level."""
        found: dict[str, set[str]] = {}
        for name, others in self.edges.items():
            found.setdefault(first(name), set()).update(first(m) for m in others if first(m) != first(name))
        return found

    def levels(self) -> dict[str, int]:
        """File or folder of the first level -> 1 + the highest level that it imports."""
        edges, found = self.folder_edges(), {}

        def level(name: str, path: tuple[str, ...] = ()) -> int:
            if name in path:
                raise ValueError(f"circle between {' -> '.join([*path, name])}")
            if name not in found:
                found[name] = 1 + max((level(m, (*path, name)) for m in edges[name]), default=0)
            return found[name]

        for name in edges:
            level(name)
        return found

    def upward(self, layers: list[set[str]]) -> list[tuple[str, str]]:
        """Imports from a lower layer to a higher one; a name in no layer, and the package root, are higher than all."""
        rank = {name: i for i, layer in enumerate(layers) for name in layer}
        top = len(layers)
        return sorted(
            (name, other)
            for name, others in self.edges.items()
            for other in others
            if name and rank.get(first(other), top) > rank.get(first(name), top)
        )


def first(name: str) -> str:
    return name.split(".")[0]


def main() -> None:
    graph = Graph(PACKAGE)
    levels = graph.levels()
    for level in range(1, max(levels.values()) + 1):
        print(f"{level}: {', '.join(sorted(n or 'mdpgrpo_fast itself' for n in levels if levels[n] == level))}")
    edges = sum(map(len, graph.edges.values()))
    print(f"{len(graph.files)} modules, {edges} imports, {max(levels.values())} levels, {len(graph.circles())} circles")


if __name__ == "__main__":
    main()
