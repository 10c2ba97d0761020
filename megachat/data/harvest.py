"""The embedded corpus: the source, the documentation and an API reference of Python's own standard library.

Every machine with Python has it, so a run needs no download and no licence but Python's. Nothing is copied
into this repository; it is harvested when asked for, from the interpreter that runs. Another version of
Python has slightly other text; one interpreter always gives the same text in the same order.

Docstrings can only be read by importing their modules. Those that open windows, print, change the terminal or
need what may be missing are left out by name; one that cannot be imported here is left out silently.
"""

import functools
import importlib
import inspect
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from megachat.data.document import Document

LIBRARY = Path(sysconfig.get_path("stdlib"))

NOT_TEXT = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "idle_test",
    "lib2to3",
    "_bundled",
}
"""Folders whose files are test data, someone else's, or generated."""

NOT_IMPORTED = {
    *("antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "lib2to3", "test", "pydoc_data"),
    *("distutils", "ensurepip", "readline", "rlcompleter", "encodings", "msilib", "venv", "site", "imp"),
    # Other names for what os and os.path document.
    *("nt", "posix", "ntpath", "posixpath", "genericpath", "nturl2path"),
    # Removed from the library between Python 3.11 and 3.13.
    *("aifc", "asynchat", "asyncore", "audioop", "cgi", "cgitb", "chunk", "crypt", "imghdr", "mailcap"),
    *("nis", "nntplib", "ossaudiodev", "pipes", "smtpd", "sndhdr", "spwd", "sunau", "telnetlib", "uu"),
    "xdrlib",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A public function, class or method, and the first sentence of its documentation."""

    name: str
    """With its module: "math.gcd", "collections.OrderedDict.move_to_end"."""
    kind: str
    """One of function, class, method."""
    sentence: str
    """One line of 15 to 120 ASCII characters that ends with a full stop; no two entries share one."""


@dataclass(frozen=True, slots=True)
class Member:
    """A documented thing of a module: what one paragraph of its reference page is made from."""

    name: str
    kind: str
    signature: str
    """Like "(*integers)", or nothing where Python does not tell."""
    doc: str


def library_documents() -> Iterator[Document]:
    """Every source file, every help topic, and one reference page per public module."""
    documents = (library_document(kind, name) for kind, name in library_outline())
    return (document for document in documents if document is not None)


def library_outline() -> list[tuple[str, str]]:
    """What `library_document` takes, in the order of the corpus. Nothing is read or imported for it yet."""
    return [
        *(("library", name) for name in _python_files()),
        *(("topics", name) for name in sorted(_topics())),
        *(("reference", name) for name in public_modules()),
    ]


def library_document(kind: str, name: str) -> Document | None:
    """One of the outline, or None where it has no text on this machine."""
    if kind == "library":  # a module's source; `lib/json/decoder.py` is the id of one
        text = (LIBRARY / name).read_text(encoding="utf-8", errors="replace")
        return Document(f"lib/{name}", text, kind, "code") if text.strip() else None
    if kind == "topics":  # a chapter of the language reference that `help("topics")` lists
        return Document(f"topic/{name}", _topics()[name].strip() + "\n", kind, "en")
    found = _module(name)  # what a reference manual says of a public module, made from its docstrings
    return Document(f"api/{name}", _page(*found), kind, "en") if found and found[2] else None


@functools.cache
def _python_files() -> list[str]:
    """The library's files, like "json/decoder.py", sorted."""
    found = []
    for folder, folders, files in os.walk(LIBRARY):
        # Cut short here, so that os.walk does not go through everything that pip has installed.
        folders[:] = [name for name in folders if name not in NOT_TEXT and not name.startswith("config-")]
        inside = Path(folder).relative_to(LIBRARY).as_posix()
        for name in files:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                found.append(name if inside == "." else f"{inside}/{name}")
    return sorted(found)


def _topics() -> dict[str, str]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return topics


def _page(module: str, doc: str, members: tuple[Member, ...]) -> str:
    parts = (
        [f"The module {module}", "=" * (11 + len(module)), "", doc, ""]
        if doc
        else [f"The module {module}", ""]
    )
    told: set[str] = set()
    for member in members:
        # What another member's documentation said (random.random, random.Random.random) is not said again.
        if member.doc not in told:
            told.add(member.doc)
            parts += [member.name + member.signature]
            parts += ["    " + line if line else "" for line in member.doc.splitlines()]
            parts += [""]
    summary = [(m, sentence) for m in members if (sentence := first_sentence(m.doc))]
    if summary:
        parts += [f"In short, the module {module} has:", ""]
        parts += [f"The {m.kind} {m.name}: {sentence}" for m, sentence in summary]
    return "\n".join(parts).rstrip() + "\n"


@functools.cache
def entries() -> list[Entry]:
    """Every function, class and method that one plain sentence describes, sorted by name.

    A sentence that several share stays with the shortest name.
    """
    candidates = [
        Entry(member.name, member.kind, sentence)
        for _, _, members in _modules()
        for member in members
        if (sentence := first_sentence(member.doc))
    ]
    names: set[str] = set()
    sentences: set[str] = set()
    kept = []
    for entry in sorted(candidates, key=lambda entry: (len(entry.name), entry.name)):
        if entry.name not in names and entry.sentence not in sentences:
            names.add(entry.name)
            sentences.add(entry.sentence)
            kept.append(entry)
    return sorted(kept, key=lambda entry: entry.name)


def first_sentence(doc: str) -> str:
    """The first sentence of a docstring if it is plain prose of 15 to 120 ASCII characters, else "".

    Example: "Greatest Common Divisor.\\n\\nMore." -> "Greatest Common Divisor."
    """
    paragraph = " ".join(doc.partition("\n\n")[0].split())
    # A full stop ends the sentence if a space and a capital follow, which "e.g. this" and "3.11" lack.
    sentence = re.split(r"(?<=[^.]\.)\s+(?=[A-Z`'\"(*])", paragraph, maxsplit=1)[0]
    plain = (
        15 <= len(sentence) <= 120
        and sentence.isascii()
        and sentence.isprintable()
        and sentence.endswith(".")
        and not sentence.endswith("..")
        and sentence[0].isupper()
        and sentence.count(" ") >= 2
        and not re.search(r"->|>>>|::|\bDEPRECATED\b|^\S*\(", sentence)
    )
    return sentence if plain else ""


def _modules() -> Iterator[tuple[str, str, tuple[Member, ...]]]:
    """(name, docstring, members) of every public module that can be imported, sorted by name."""
    return (found for name in public_modules() if (found := _module(name)))


@functools.cache
def _module(name: str) -> tuple[str, str, tuple[Member, ...]] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
            return name, _doc(module), tuple(_members(name, module))
    except Exception:  # for another system, or built without an optional library
        return None


def public_modules() -> list[str]:
    """The dotted names of the library's modules that are public and safe to import."""
    names = {name for name in sys.builtin_module_names if name in sys.stdlib_module_names}
    names |= {path.name.partition(".")[0] for path in (LIBRARY / "lib-dynload").glob("*.so")}
    names |= {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in _python_files()
    }
    names.add("os.path")
    return sorted(
        name
        for name in names
        if name.split(".")[0] in sys.stdlib_module_names - NOT_IMPORTED
        and not any(part.startswith("_") for part in name.split("."))
    )


def _members(name: str, module: ModuleType) -> Iterator[Member]:
    """What the module itself defines and documents: what it imports from another public one is told there."""
    listed = getattr(module, "__all__", None) or [key for key in vars(module) if not key.startswith("_")]
    for key in sorted(set(listed)):
        value = getattr(module, key, None)
        if key.startswith("_") or not _belongs(value, name):
            continue
        if inspect.isclass(value):
            yield from _member(f"{name}.{key}", "class", value)
            for method, function in sorted(vars(value).items()):
                if not method.startswith("_"):
                    function = getattr(function, "__func__", function)  # of a classmethod or staticmethod
                    if inspect.isroutine(function):
                        yield from _member(f"{name}.{key}.{method}", "method", function)
        elif inspect.isroutine(value):
            yield from _member(f"{name}.{key}", "function", value)


def _belongs(value: Any, module: str) -> bool:
    """Whether `module` is the place where the library documents `value`: its own, or a private module's."""
    home = getattr(value, "__module__", None)
    if not isinstance(home, str):
        return inspect.isbuiltin(value)
    aliases = {"os": ("posix", "nt"), "os.path": ("posixpath", "ntpath", "genericpath")}.get(module, ())
    if home.split(".")[0] not in sys.stdlib_module_names:
        return False
    return home == module or home in aliases or any(part.startswith("_") for part in home.split("."))


def _member(name: str, kind: str, value: Any) -> Iterator[Member]:
    doc = _doc(value)
    if doc and not doc.startswith(
        name.rpartition(".")[2] + "("
    ):  # a dataclass's or named tuple's made-up one
        yield Member(name, kind, _signature(value), doc)


def _doc(value: Any) -> str:
    doc = vars(value).get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None)
    return inspect.cleandoc(doc) if isinstance(doc, str) else ""


def _signature(value: Any) -> str:
    """A signature whose text never depends on an address, a hash seed or a path: odd defaults become
    "..."."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    plain = (bool, int, float, str, bytes, type(None))
    parameters = []
    for parameter in signature.parameters.values():
        default = parameter.default
        odd = default is not parameter.empty and type(default) not in plain
        if odd or default == sys.executable:  # platform.architecture's
            parameter = parameter.replace(default=_ELLIPSIS)
        parameters.append(parameter.replace(annotation=parameter.empty))
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


class _Ellipsis:
    def __repr__(self) -> str:
        return "..."


_ELLIPSIS = _Ellipsis()
