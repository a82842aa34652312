"""Mutants: copies of a source with one small thing wrong, of Python by its syntax tree, of C++ by its text.

Python: a comparison, an arithmetic, bit or boolean operator becomes its neighbour; a term of an operator, `not`, a sign
or, where `calls` are asked for, a method call goes; a condition turns round; a number, a boolean or a text changes; a
statement that only calls goes, `return x` returns None, `break` and `continue` change places. Left alone: docstrings,
annotations, imports, assert (for type checkers here), and the text of messages: of `raise`, and of what MESSAGES names.
C++: the same operators, dropped terms, numbers, `!`, std::max and std::min, and the branches of `?:`; left alone:
comments, the preprocessor, heads of `for`, constants of types.
"""

from __future__ import annotations

import ast
import re
from typing import NamedTuple

MESSAGES = {
    "refuse", "ConfigError", "needs_package", "warn", "print", "as_tensor", "check_device", "check_shape",
    "check_scalar", "check_pair", "check_floating", "check_flags",
}  # fmt: skip
COMPARE = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}  # fmt: skip
BINARY = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "//"), ast.Pow: ("**", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
}  # fmt: skip


class Mutant(NamedTuple):
    path: str
    line: int
    lines: tuple[int, int]  # first and last of the statement, or of its head
    scope: str | None  # qualified name of the outermost function around it, None outside of any
    start: int  # in bytes of the source
    end: int
    old: str
    new: str
    text: str  # its line

    def apply(self, source: bytes) -> bytes:
        """The source with it; as many lines as before."""
        new = self.new.encode()
        lost = source[self.start : self.end].count(b"\n") - new.count(b"\n")
        if lost > 0:  # inside brackets, where a line break says nothing
            new = (
                b"(" + new + b"\n" * lost + b")" if not self.new.startswith(("pass", "return")) else new + b"\n" * lost
            )
        return source[: self.start] + new + source[self.end :]

    @property
    def name(self) -> str:
        return f"{self.path}:{self.line}: {self.old} -> {self.new}"


class _Python(ast.NodeVisitor):
    def __init__(self, path: str, source: bytes, calls: bool) -> None:
        self.path, self.source, self.calls = path, source, calls
        self.starts = [0]
        for line in source.split(b"\n"):
            self.starts.append(self.starts[-1] + len(line) + 1)
        self.text = source.decode().split("\n")
        self.scopes: list[str] = []
        self.functions = 0
        self.scope: str | None = None
        self.lines = (1, 1)
        self.quiet = 0  # inside a message: its text is left alone
        self.found: list[Mutant] = []
        self.modules = {"torch", "math", "dataclasses", "re", "functools", "itertools", "json"}

    # ---- places ----

    def start(self, node: ast.AST) -> int:
        return self.starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def end(self, node: ast.AST) -> int:
        return self.starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def of(self, node: ast.AST) -> str:
        return self.source[self.start(node) : self.end(node)].decode()

    def add(self, start: int, end: int, new: str) -> None:
        line = self.source.count(b"\n", 0, start) + 1
        old = self.source[start:end].decode()
        if old != new:
            text = self.text[line - 1].strip()
            self.found.append(Mutant(self.path, line, self.lines, self.scope, start, end, old, new, text))

    def operator(self, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        """Between two operands, which may stand in brackets and on lines of their own."""
        begin, gap = self.end(left), self.source[self.end(left) : self.start(right)].decode()
        words = r"\s+".join(map(re.escape, old.split()))
        found = re.search(
            rf"\b{words}\b" if old[0].isalpha() else words, re.sub(r"#[^\n]*", lambda m: " " * len(m[0]), gap)
        )
        if found:
            head = len(gap[: found.start()].encode())
            self.add(begin + head, begin + head + len(found[0].encode()), new)

    # ---- statements ----

    def visit(self, node: ast.AST) -> None:
        before = self.lines
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = max(node.lineno, body[0].lineno - 1) if body and isinstance(body[0], ast.stmt) else node.end_lineno
            self.lines = (node.lineno, last or node.lineno)
        super().visit(node)
        self.lines = before

    def function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for x in (*node.decorator_list, *node.args.defaults, *node.args.kw_defaults):
            if x is not None:
                self.visit(x)
        self.scopes.append(node.name)
        outer, self.scope = self.scope, self.scope or ".".join(self.scopes)
        for x in node.body:
            self.visit(x)
        self.scopes.pop()
        self.scope = outer

    visit_FunctionDef = visit_AsyncFunctionDef = function

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scopes.append(node.name)
        for x in (*node.decorator_list, *node.body):
            self.visit(x)
        self.scopes.pop()

    def nothing(self, node: ast.AST) -> None:
        pass

    visit_Import = visit_ImportFrom = visit_Assert = visit_JoinedStr = nothing

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in self.of(node.test):
            self.turned(node.test)
            self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if self.of(node.targets[0]) != "__all__":
            self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node.value, ast.Call):
            self.add(self.start(node), self.end(node), "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        old = BINARY.get(type(node.op))
        if old:
            self.operator(node.target, node.value, f"{old[0]}=", f"{old[1]}=")
        self.add(self.start(node), self.end(node), "pass")
        self.visit(node.value)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and self.of(node.value) != "None":
            self.add(self.start(node), self.end(node), "return None")
            self.visit(node.value)

    def visit_Break(self, node: ast.Break) -> None:
        self.add(self.start(node), self.end(node), "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self.add(self.start(node), self.end(node), "break")

    def visit_Raise(self, node: ast.Raise) -> None:
        self.quiet += 1
        self.generic_visit(node)
        self.quiet -= 1

    # ---- expressions ----

    def turned(self, test: ast.expr) -> None:
        if not isinstance(test, ast.UnaryOp) and not (isinstance(test, ast.Compare) and len(test.ops) == 1):
            self.add(self.start(test), self.end(test), f"(not ({self.of(test)}))")

    def visit_While(self, node: ast.While) -> None:
        self.turned(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.turned(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.turned(test)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            if type(op) in COMPARE:
                self.operator(left, right, *COMPARE[type(op)])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in BINARY:
            self.operator(node.left, node.right, *BINARY[type(node.op)])
            self.add(self.start(node), self.end(node), f"({self.of(node.left)})")
            if isinstance(node.op, ast.Add | ast.Mult):
                self.add(self.start(node), self.end(node), f"({self.of(node.right)})")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.operator(left, right, old, new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self.add(self.start(node), self.end(node), f"({self.of(node.operand)})")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        f = node.func
        name = f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "")
        if self.calls and isinstance(f, ast.Attribute) and self.of(f.value).split(".")[0] not in self.modules:
            self.add(self.start(node), self.end(node), f"({self.of(f.value)})")
        self.quiet += name in MESSAGES
        self.generic_visit(node)
        self.quiet -= name in MESSAGES

    def visit_Constant(self, node: ast.Constant) -> None:
        x, old = node.value, self.of(node)
        if isinstance(x, bool):
            self.add(self.start(node), self.end(node), str(not x))
        elif isinstance(x, int):
            self.add(self.start(node), self.end(node), f"{x + 1}" if len(old) < 12 else f"({old} + 1)")
        elif isinstance(x, float):
            self.add(self.start(node), self.end(node), f"(2 * {old})" if x else "1.0")
        elif isinstance(x, str) and not self.quiet and "\n" not in old:
            self.add(self.start(node), self.end(node), f'("XX" + {old})')


def of_python(path: str, source: bytes, calls: bool = False) -> list[Mutant]:
    """Every mutant of a module."""
    visitor = _Python(path, source, calls)
    visitor.visit(ast.parse(source))
    return visitor.found


# ---- C++ ------------------------------------------------------------------------------------------------------------

CPP = [  # pattern, what becomes of its first group
    (r" (\+) ", "-"), (r" (-) ", "+"), (r" (\*) ", "/"), (r" (/) ", "*"), (r" ?(<) ?(?=[\w(-])", "<="),
    (r" ?(>) ?(?=[\w(-])", ">="), (r" (<=) ", "<"), (r" (>=) ", ">"), (r" (==) ", "!="), (r" (!=) ", "=="),
    (r" (&&) ", "||"), (r" (\|\|) ", "&&"), (r" (\+=) ", "-="), (r" (-=) ", "+="), (r" (\*=) ", "/="),
    (r" (/=) ", "*="), (r"(std::max)\b", "std::min"), (r"(std::min)\b", "std::max"), (r"[ (](!)[\w(]", ""),
    (r"[ ({](-)(?=[\w(])", ""), (r"\bR\((0)\)", "1"), (r"\bR\((1)\)", "2"), (r"\bR\((2)\)", "3"), (r"\bR\((4)\)", "5"),
    (r"(?<![\w.>\[(])(\d+)(?![\w.])", "{0} + 1"), (r"(?<!\w)(\d+\.\d*(?:e-?\d+)?f?)", "(2 * {0} + 1)"),
    (r"\b(true)\b", "false"), (r"\b(false)\b", "true"),
]  # fmt: skip
TERM = re.compile(r" ([-+*/]|&&|\|\|) ")
CHOICE = re.compile(r" \? ((?:[^?:;{}]|::)+?) : ([^?:;{},]+)(?=[;,})])")


def _code(source: str) -> str:
    """The source with blanks where nothing is changed."""
    blank = lambda m: re.sub(r"[^\n]", " ", m[0])  # noqa: E731
    for pattern in (
        r"//[^\n]*", r'"[^"\n]*"', r"^#[^\n]*(?:\\\n[^\n]*)*", r"^constexpr int [^\n]*", r"\bfor \([^\n]*?\) ",
        r"\btemplate <[^\n]*", r"^enum [^\n]*", r"^struct [^\n]*", r"<[\w: ]+>", r"\boperator\b[^\n]*",
    ):  # fmt: skip
        source = re.sub(pattern, blank, source, flags=re.M)
    return source


def _end_of_term(code: str, start: int) -> int:
    """Where the operand that begins here ends: at a bracket that closes, or an operator that binds less."""
    depth = 0
    for i in range(start, len(code)):
        c = code[i]
        if depth == 0 and (c in ";,)}]?:" or re.match(r" ([-+<>?:]|[<>=!]=|&&|\|\|) ", code[i : i + 4])):
            return i
        depth += (c in "([{") - (c in ")]}")
    return len(code)


def of_cpp(path: str, source: bytes) -> list[Mutant]:
    """Every mutant of a header, whatever its lines mean: those that do not compile are no mutants."""
    text = source.decode()
    code, lines, found = _code(text), text.split("\n"), {}

    def add(start: int, end: int, new: str) -> None:
        line = text.count("\n", 0, start) + 1
        a, b = (len(text[:n].encode()) for n in (start, end))
        found[start, end, new] = Mutant(
            path, line, (line, line), None, a, b, text[start:end], new, lines[line - 1].strip()
        )

    for pattern, new in CPP:
        for m in re.finditer(pattern, code, re.M):
            add(m.start(1), m.end(1), new.format(m[1]))
    for m in TERM.finditer(code):
        add(m.start(), _end_of_term(code, m.end()), "")
    for m in CHOICE.finditer(code):
        add(m.start(), m.end(), f" ? {text[m.start(2) : m.end(2)]} : {text[m.start(1) : m.end(1)]}")
    return [found[key] for key in sorted(found)]
