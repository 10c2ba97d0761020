"""From the command line to typed settings: Hydra composes `conf/`, `decode` checks, code sees frozen blocks.

Each block of YAML names the class it fills with `_target_`; there is no registry to keep in step.
No setting has a default in Python: `conf/` is the one place a value is written.
A mistake never comes alone: `decode` lists all of them, each with the dotted key to fix.
"""

import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Any, get_args

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from megachat.stages import CONF, SETTINGS_OF, did_you_mean, stages

ROOT = "megachat."
"""A config may only name classes of this package, so a YAML cannot run anything else."""

HYDRA_SETTINGS = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)
"""A run folder is ours to lay out: Hydra neither changes directory nor writes log files of its own."""


class Config(BaseModel):
    """A frozen, typed block of settings. A docstring under a field is its documentation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class ConfigError(Exception):
    """Every mistake in a config, one line each, beginning with the dotted key to fix."""


class _Invalid:
    """Stands in for a block whose own mistakes are already listed."""


class _Consequence(str):
    """A mistake that need not be told where there are others: it may follow from them."""


DERIVING = "megachat.train.scaling"
"""Whose functions a YAML may name in `${derived:function,arguments...}`."""
UNDERIVED = "(not derived) "
"""What such a value begins with where its arguments are wrong; the reason follows."""


def _derive(name: str, *given: Any) -> Any:
    """What the function makes of other settings: a block of them arrives as the object it describes."""
    functions = {
        name: value
        for name, value in vars(importlib.import_module(DERIVING)).items()
        if getattr(value, "__module__", "") == DERIVING
    }
    if name not in functions:
        hint = did_you_mean(name, functions, f"it has {', '.join(functions)}")
        return f"{UNDERIVED}{DERIVING} has no function {name!r}; {hint}"
    mistakes: list[str] = []
    trees = [OmegaConf.to_container(one, resolve=True) if OmegaConf.is_config(one) else one for one in given]
    values = [_decode(tree, "", mistakes) for tree in trees]
    try:
        return functions[name](*values)
    except ValidationError as error:
        names = [*inspect.signature(functions[name]).parameters]
        wrong = {names[int(detail["loc"][0])]: detail["input"] for detail in error.errors()}
        shown = " and ".join(
            key if isinstance(value, _Invalid) else f"{key}={value}" for key, value in wrong.items()
        )
        return f"{UNDERIVED}it follows from {shown}, which does not do; give it a value"


OmegaConf.register_new_resolver("derived", _derive, replace=True)


def compose(stage: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What Hydra makes of `conf/<stage>.yaml` and the overrides: plain dicts and lists, with `_target_`s."""
    try:
        GlobalHydra.instance().clear()
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            config = hydra_compose(stage, overrides=list(HYDRA_SETTINGS) + rewrite(stage, overrides))
        return plain(config)
    except (HydraException, ValueError) as error:  # ValueError: Hydra's for `log=3`, a group
        raise ConfigError(_readable(error)) from None


def plain(config: Any) -> dict[str, Any]:
    """A `DictConfig` as plain dicts and lists, interpolations resolved; the `hydra` block is left behind."""
    try:
        tree = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_readable(error)) from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items() if key != "hydra"}


def rewrite(stage: str, overrides: Sequence[str], sweep: bool = False) -> list[str]:
    """Makes overrides digestible for Hydra without the user having to know its grammar.

    `experiment=quickstart` becomes the group choice `experiment/quickstart/<stage>.yaml` and the run folder
    `runs/quickstart`; an unknown key is passed on (`++key`) so that `decode` reports it with the others;
    a value that Hydra cannot lex (Chinese, apostrophes, a comma outside a sweep) is quoted; where one
    corpus is chosen, `corpus=files corpus.path=DIR` need not say `corpus.files.path`.

    Example: rewrite("chat", ["prompt=What's new?"]) -> ["++prompt='What\\'s new?'"]
    """
    only = dict(filter(None, map(_only_block, overrides)))
    out: list[str] = []
    mistakes: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        bare = key.lstrip("+~")
        if not bare or not (equals or override.startswith("~")):
            raise ConfigError(f"{override}: not a setting; write key=value")
        if bare == "experiment" and equals:
            out[:0] = _experiment(stage, value)
        elif not equals or key != bare or bare.startswith("hydra") or _is_group(bare):
            out.append(override)
            mistakes += _no_options(bare, value)
        else:
            group, _, rest = key.partition(".")
            if group in only and rest.partition(".")[0] != only[group]:
                key = f"{group}.{only[group]}.{rest}"
            out.append(f"++{key}={quoted(value, sweep)}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return out


def _only_block(override: str) -> tuple[str, str] | None:
    """("corpus", "files") of `corpus=files`, where the YAML holds one block of its own name."""
    group, _, value = override.partition("=")
    name = value.strip("[]")
    path = CONF / group / f"{name}.yaml"
    return (group, name) if path.is_file() and list(OmegaConf.load(path)) == [name] else None


def _is_group(key: str) -> bool:
    return (CONF / key.partition("@")[0]).is_dir()


def _no_options(group: str, value: str) -> list[str]:
    """What there is to say of names that no YAML of the group has. Hydra would stop at the first one."""
    group = group.partition("@")[0]
    options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    names = [name.strip() for name in value.strip("[]").split(",")]
    if "(" in value or not options:  # choice(...), glob(...); no group of ours
        return []
    mistakes = []
    for name in names:
        if name and name != "null" and name not in options:
            hint = did_you_mean(name, options, f"conf/{group}/ has {', '.join(options)}")
            mistakes.append(f"{group}: there is no {name!r}; {hint}")
    return mistakes


def _experiment(stage: str, name: str) -> list[str]:
    folder = CONF / "experiment" / name
    if not name or not folder.is_dir():
        names = sorted(path.name for path in (CONF / "experiment").iterdir() if path.is_dir())
        hint = did_you_mean(name, names, f"conf/experiment/ has {', '.join(names)}")
        raise ConfigError(f"experiment: there is no {name!r}; {hint}")
    wanted = dict.fromkeys([SETTINGS_OF.get(stage, stage), stage])
    files = [f"{name}/{file}" for file in wanted if (folder / f"{file}.yaml").is_file()]
    chosen = [f"+experiment={files[0] if len(files) == 1 else '[' + ','.join(files) + ']'}"] if files else []
    if stage == "pipeline":  # its stages take the experiment's settings, each its own
        chosen.append(f"++recipe={name}")
    return [*chosen, f"++run=runs/{name}"]


def quoted(value: str, sweep: bool = False) -> str:
    """A value as Hydra's grammar wants it: as it is, or in quotes where Hydra would misread it."""
    try:
        parsed = OverridesParser.create().parse_override(f"key={value}")
        if sweep or not parsed.is_sweep_override():
            return value
    except HydraException:
        if value.startswith("[") and value.endswith("]"):  # paths=[语料/*.txt]: its items need the quotes
            return "[" + ",".join(quoted(item.strip(), sweep) for item in value[1:-1].split(",")) + "]"
    # Hydra takes a backslash for an escape only before a quote, and the closing one is a quote, too.
    inside = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{inside}'"


def _readable(error: Exception) -> str:
    """Hydra's message and its list of options, without its search path and its advice to use `+`."""
    text = str(error).partition("Config search path:")[0]
    if unknown := re.search(r"Could not override '(.+)'\. No match in the defaults list", text):
        return f"{unknown[1]}: this stage has no such block to choose"
    return "\n  ".join(line.strip() for line in text.splitlines() if line.strip())


def decode(tree: dict[str, Any]) -> Any:
    """Builds the object that `tree` describes, or raises one `ConfigError` naming every mistake in it."""
    mistakes: list[str] = []
    built = _decode(tree, "", mistakes)
    mistakes = [mistake for mistake in mistakes if not isinstance(mistake, _Consequence)] or mistakes
    if mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise ConfigError(f"{count} in the config\n  " + "\n  ".join(mistakes))
    return built


def _decode(node: Any, path: str, mistakes: list[str]) -> Any:
    if isinstance(node, list):
        return [_decode(item, _join(path, i), mistakes) for i, item in enumerate(node)]
    if isinstance(node, str) and node.startswith(UNDERIVED):
        mistakes.append(_Consequence(f"{path}: {node.removeprefix(UNDERIVED)}"))
        return _Invalid()
    if not isinstance(node, dict):
        return node
    settings = {key: value for key, value in node.items() if key != "_target_"}
    values = {key: _decode(value, _join(path, key), mistakes) for key, value in settings.items()}
    if "_target_" not in node:
        return values
    values = {key: value for key, value in values.items() if not _left_open(value)}
    cls = _locate(node["_target_"], _join(path, "_target_"), mistakes)
    if cls is None:
        return _Invalid()
    try:
        return cls(**values)
    except ValidationError as error:
        for detail in error.errors():
            if not isinstance(detail["input"], _Invalid):
                mistakes.append(_explain(detail, path, cls))
        return _Invalid()


def _left_open(value: Any) -> bool:
    """Whether a YAML leaves this value to the user (`path: ???`), who has not given it."""
    return isinstance(value, str) and value == "???"


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _explain(detail: Any, path: str, cls: type[Config]) -> str:
    if not detail["loc"]:  # raised by a @model_validator: it concerns the whole block
        return f"{path or cls.__name__}: {detail['ctx']['error']}"
    name = ".".join(str(part) for part in detail["loc"])
    key = _join(path, name)
    if detail["type"] == "missing":
        return f"{key}: missing"
    if detail["type"] == "extra_forbidden":
        *above, last = detail["loc"]
        for part in above:
            cls = _block(cls, part)
        names = [*_settings(cls)]
        hint = did_you_mean(str(last), names, f"it has {', '.join(names)}")
        return f"{key}: {cls.__name__} has no such setting; {hint}"
    if detail["type"] in ("is_instance_of", "model_type"):
        expected = detail["ctx"].get("class") or detail["ctx"].get("class_name")
        return f"{key}: expected a block of settings ({expected}), got {detail['input']!r}"
    message = re.sub(r"^Value error, ", "", detail["msg"])
    got = detail["input"]
    if isinstance(got, Config):  # the message says which of its settings
        return f"{key}: {message}"
    # Hydra reads 42 and true as YAML does.
    is_text = detail["type"] == "string_type" and got is not None
    hint = f"; as text it is {name}=\"'{got}'\"" if is_text else ""
    return f"{key}: {message[0].lower()}{message[1:]}, got {got!r}{hint}"


def _settings(cls: type[Config]) -> dict[str, FieldInfo]:
    """What a block can be given, by the name in YAML: where a method is called so, the field is not."""
    return {field.alias or name: field for name, field in cls.model_fields.items()}


def _block(cls: type[Config], part: str | int) -> type[Config]:
    """What a setting of a block consists of; the block itself for a place in a list or what is no block."""
    known = _settings(cls)
    kinds = [known[str(part)].annotation] if part in known else []
    while kinds:
        kind = kinds.pop()
        if isinstance(kind, type) and issubclass(kind, Config):
            return kind
        kinds += get_args(kind)
    return cls


def _locate(target: str, path: str, mistakes: list[str]) -> type[Config] | None:
    module, _, name = str(target).rpartition(".")
    try:
        if not str(target).startswith(ROOT):
            raise ImportError(f"only classes under {ROOT!r} may be named")
        cls = getattr(importlib.import_module(module), name)
        if not (isinstance(cls, type) and issubclass(cls, Config)):
            raise ImportError("it is not a block of settings")
        if inspect.isabstract(cls):
            raise ImportError("it is abstract; name one of its subclasses")
        return cls
    except (ImportError, AttributeError) as why:
        mistakes.append(f"{path}: cannot use {target!r}: {why}")
        return None


SECRET = re.compile(r"(^|_)(api_?key|key|secret|password|passwd|access_token|auth_token)$", re.IGNORECASE)
"""Names of settings whose values are not written anywhere."""


def redact(node: Any) -> Any:
    """A config without its secrets."""
    if isinstance(node, dict):
        return {
            key: "(redacted)" if SECRET.search(str(key)) else redact(value) for key, value in node.items()
        }
    return [redact(item) for item in node] if isinstance(node, list) else node


def describe(stage: str) -> str:
    """The settings of a stage with their defaults and documentation, for `megachat <stage> --help`."""
    tree = compose(stage)
    lines = [f"megachat {stage}: {stages()[stage]}", ""]
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name in tree)
    lines += _describe_block(tree, "")
    for group in groups:
        options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        lines.append(f"{group}=...  one of {', '.join(options)}")
    return "\n".join([*lines, "experiment=...", *_describe_experiments(SETTINGS_OF.get(stage, stage))])


def _describe_experiments(stage: str) -> list[str]:
    """Each by name, with the comment of its settings for this stage where it has any."""
    lines = []
    for folder in sorted(path for path in (CONF / "experiment").iterdir() if path.is_dir()):
        path = folder / f"{stage}.yaml"
        text = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        comment = next((line[1:].strip() for line in text[1:] if line.startswith("#")), "")
        lines.append(f"    {folder.name}: {comment}" if comment else f"    {folder.name}")
    return lines


def _describe_block(tree: dict[str, Any], path: str) -> list[str]:
    cls = _locate(tree["_target_"], path, [])
    assert cls is not None, "a stage of ours names a class that is not there; tests/test_conf.py finds it"
    lines = []
    for name, field in _settings(cls).items():
        value, key = tree.get(name), _join(path, name)
        documentation = " ".join((field.description or "").split())
        if isinstance(value, dict) and "_target_" in value:
            lines += [f"{key}", f"    {documentation}", *_describe_block(value, key)]
        else:
            lines += [f"{key}={'null' if value is None else value}", f"    {documentation}"]
    return lines
