#!/usr/bin/env python3
"""Fails if crates or modules depend on each other in another way than layers do.

    layers.py       in the repository's folder; needs cargo

It first checks itself: it plants circles, each of which it must find.

Crates: roles know the contracts and never each other, contracts know no role, and without the feature `trainer` there is no libtorch.

Modules: those that stand beside each other make no circle. A module and those within it count as one to the outside; between a module
and those within it arrows may go both ways. A path stands for the module in which its item is, through any re-export. Tests do not count.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROLES = ("coordinator", "worker", "trainer")
# Comments, strings and characters: what looks like code in them is none.
NO_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|b?r(#*)".*?"\1|b?"(?:\\.|[^"\\])*"|b?\'(?:\\.[^\']*|[^\\\'])\'', re.DOTALL)
TEST = re.compile(r"#\[cfg\(test\)\]\s*(?:#\[[^\]]*\]\s*)*")
MODULE = re.compile(r'(?:#\[path = "(?P<path>[^"]*)"\]\s*)?(?:pub(?:\([^)]*\))?\s+)?\bmod\s+(?P<name>\w+)\s*(?P<end>[;{])')
USE = re.compile(r"(?P<public>pub(?:\([^)]*\))?\s+)?\buse\s+(?P<tree>[^;]+);")
PATH = re.compile(r"(?<![:\w])(?:crate|self|super)(?:::\w+)+")


def blank(match):
    return re.sub(r"[^\n]", " ", match[0])


def block_end(text, start):
    """Behind the brace that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    return len(text)


def without_tests(text):
    while match := TEST.search(text):
        brace, semicolon = (at if (at := text.find(mark, match.end())) >= 0 else len(text) for mark in "{;")
        end = block_end(text, brace) if brace < semicolon and not text[match.end():].startswith("use") else semicolon + 1
        text = text[:match.start()] + re.sub(r"[^\n]", " ", text[match.start():end]) + text[end:]
    return text


def uses(tree):
    """The paths of a `use`, each with the name that it brings in: `a::{b, c as d}` has a::b for b and a::c for d."""
    tree = tree.strip()
    head, brace, rest = tree.partition("{")
    prefix = [part.strip() for part in head.split("::") if part.strip()]
    if not brace:
        *prefix, last = prefix
        path, _, name = last.partition(" as ")
        if path.strip() == "self":
            return [(prefix, name.strip() or prefix[-1])]
        return [([*prefix, path.strip()], name.strip() or path.strip())]
    found, depth, begin = [], 0, 0
    inner = rest[:rest.rindex("}")] + ","
    for at, mark in enumerate(inner):
        depth += {"{": 1, "}": -1}.get(mark, 0)
        if mark == "," and depth == 0:
            if inner[begin:at].strip():
                found += [(prefix + path, prefix[-1] if name == "self" else name) for path, name in nested(inner[begin:at])]
            begin = at + 1
    return found


def nested(tree):
    """As `uses`, where `self` stands for what is before the braces."""
    if re.fullmatch(r"self(\s+as\s+\w+)?", tree.strip()):
        return [([], tree.split()[-1])]
    return uses(tree)


class Module:
    """One module of a crate, with those within it."""

    def __init__(self, name, parent, file, text, first_line, folder):
        self.name, self.parent, self.file, self.children = name, parent, file, {}
        self.paths, self.exports = [], defaultdict(list)
        at = 0
        while match := MODULE.search(text, at):
            self.child(match, text, first_line, folder)
            end = block_end(text, match.end() - 1) if match["end"] == "{" else match.end()
            text = text[:match.start()] + re.sub(r"[^\n]", " ", text[match.start():end]) + text[end:]
            at = end
        line = lambda position: first_line + text.count("\n", 0, position)
        for match in USE.finditer(text):
            for path, name in uses(match["tree"]):
                self.paths.append((path, line(match.start())))
                if match["public"]:
                    self.exports[name].append(path)
        self.paths += [(match[0].split("::"), line(match.start())) for match in PATH.finditer(USE.sub(blank, text))]

    def child(self, match, text, first_line, folder):
        name = match["name"]
        if match["end"] == "{":
            line = first_line + text.count("\n", 0, match.end())
            body = text[match.end():block_end(text, match.end() - 1) - 1]
            self.children[name] = Module(name, self, self.file, body, line, folder / name)
            return
        # A string that was blanked out is read from the file.
        attribute = re.search(rf'#\[path = "([^"]*)"\]\s*(?:pub\S*\s+)?mod {name};', self.file.read_text())
        files = [self.file.parent / attribute[1]] if attribute else [folder / f"{name}.rs", folder / name / "mod.rs"]
        file = next(file for file in files if file.exists())
        self.children[name] = parse(name, self, file, file.parent if file.name == "mod.rs" else file.with_suffix(""))

    def all(self):
        yield self
        for child in self.children.values():
            yield from child.all()

    def line_of_descent(self):
        return [*(self.parent.line_of_descent() if self.parent else ()), self]

    def find(self, path, seen=()):
        """The module in which the path's item is; None if that is in another crate."""
        module, (first, *rest) = self, path
        if first == "crate":
            module = self.line_of_descent()[0]
        elif first == "super":
            module = self.parent
        elif first != "self":
            if first not in self.children:
                return None
            rest = path
        for at, part in enumerate(rest):
            if part == "super":
                module = module.parent
            elif part in module.children:
                module = module.children[part]
            else:
                for name in (part, "*"):
                    for export in module.exports.get(name, ()):
                        if (id(module), name) in seen:
                            continue
                        behind = [*export[:-1], *rest[at:]] if name == "*" else [*export, *rest[at + 1:]]
                        if (found := module.find(behind, (*seen, (id(module), name)))) and (name != "*" or found.has(rest[-1])):
                            return found
                return module
        return module

    def has(self, name):
        """Whether a public item of that name is in it, as far as can be seen without a compiler."""
        return bool(re.search(rf"\bpub\b[^\n;{{=]*\b{name}\b", self.file.read_text()))


def parse(name, parent, file, folder):
    text = NO_CODE.sub(blank, file.read_text())
    return Module(name, parent, file, without_tests(text), 1, folder)


def circles(root):
    """Each circle as its arrows: (from, to, where)."""
    arrows = defaultdict(dict)
    for module in root.all():
        for path, line in module.paths:
            target = module.find(path)
            if not target:
                continue
            own, other = module.line_of_descent(), target.line_of_descent()
            shared = sum(1 for one, two in zip(own, other) if one is two)
            if shared < min(len(own), len(other)):
                arrows[own[shared]].setdefault(other[shared], f"{module.file}:{line}")
    left = set(arrows)

    def reached(start):
        found, todo = set(), [start]
        while todo:
            for target in arrows.get(todo.pop(), ()):
                if target not in found:
                    found.add(target)
                    todo.append(target)
        return found

    reach = {module: reached(module) for module in arrows}
    for module in arrows:
        circle = {other for other in reach[module] if module in reach.get(other, ())}
        if module in left and circle:
            left -= circle
            yield [(one, two, where) for one in circle for two, where in arrows[one].items() if two in circle]


def module_faults(metadata):
    for package in metadata["packages"]:
        for target in package["targets"]:
            if set(target["kind"]) & {"lib", "bin"}:
                file = Path(target["src_path"]).resolve().relative_to(Path.cwd())
                root = parse(target["name"], None, file, file.parent)
                for circle in circles(root):
                    arrows = sorted(f"{one.name} -> {two.name} ({where})" for one, two, where in circle)
                    fault = f"{root.name}: modules in a circle: {', '.join(arrows)}"
                    yield fault


def self_test():
    """Plants circles, each of which must be found, and what looks like one and is none."""
    crates = (
        (True, {"lib.rs": "mod a; mod b;", "a.rs": "use crate::b::B;", "b.rs": "fn b() { super::a::a() }"}),
        (True, {"lib.rs": "mod a; mod b; pub use b::B;", "a.rs": "mod c; use crate::{self as root, B};", "b.rs": "use crate::a::{c::{self, D}};",
                "a/c.rs": ""}),
        (True, {"lib.rs": "mod a { mod b; mod c; }", "a/b.rs": "use super::c::*;", "a/c.rs": "fn c() { crate::a::b::b() }"}),
        (False, {"lib.rs": "mod a; mod b;", "a.rs": "mod c; use crate::b::B; pub struct A;", "a/c.rs": "use super::A;",
                 "b.rs": "// use crate::a::A;\n#[cfg(test)]\nmod tests { use crate::a::A; }\nconst TEXT: &str = \"crate::a::A\";"}),
    )
    for expected, files in crates:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in files.items():
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
            found = [*circles(parse("crate", None, Path(folder, "lib.rs"), Path(folder)))]
            if bool(found) != expected:
                raise SystemExit(f"layers.py is broken: it finds {len(found)} circles in {files}")


def crates(package, *flags):
    """The crates that a package's normal build depends on."""
    command = ["cargo", "tree", "--locked", "--quiet", "--edges", "normal,build", "--prefix", "none", "--format", "{p}", "-p", package, *flags]
    # For this package alone, whatever else is built together with it.
    alone = {**os.environ, "CARGO_RESOLVER_FEATURE_UNIFICATION": "selected"}
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=alone).stdout.splitlines()
    return {line.split()[0] for line in lines if line} - {package}


def crate_faults():
    roles = {f"gleaner-{role}" for role in ROLES}
    rules = [(f"gleaner-{role}", ["--all-features"], roles | {"gleaner"}, "roles know the contracts and never each other") for role in ROLES]
    rules.append(("gleaner-proto", ["--all-features"], roles | {"gleaner"}, "contracts know no role"))
    rules.append(("gleaner", ["--no-default-features"], {"tch", "torch-sys", "gleaner-trainer"}, "without the feature trainer there is no libtorch"))
    for package, flags, forbidden, why in rules:
        if found := crates(package, *flags) & forbidden:
            yield f"{' '.join([package, *flags])} depends on {', '.join(sorted(found))}: {why}"


def main():
    self_test()
    metadata = json.loads(subprocess.run(["cargo", "metadata", "--locked", "--no-deps", "--format-version", "1"], stdout=subprocess.PIPE, check=True).stdout)
    faults = [*crate_faults(), *module_faults(metadata)]
    print(*faults or ["no arrow between roles, no circle of modules"], sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
