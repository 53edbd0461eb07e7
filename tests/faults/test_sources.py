"""Test that no source of the package reads a file in a way that can execute its content."""

import ast
from pathlib import Path

import pytest
import yaml

import trl_emguard
from trl_emguard.io.strict import _Loader


SOURCES = sorted(Path(trl_emguard.__file__).parent.rglob("*.py"))
UNSAFE_IMPORTS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_YAML = {
    "unsafe_load",
    "unsafe_load_all",
    "full_load",
    "full_load_all",
    "load_all",
    "Loader",
    "UnsafeLoader",
    "FullLoader",
}


def unsafe(tree: ast.AST) -> list[str]:
    """Return the calls and imports in a source that could execute something in a file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {module}" for module in modules if module.split(".")[0] in UNSAFE_IMPORTS]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "yaml":
            found += [f"yaml.{node.attr}"] * (node.attr in UNSAFE_YAML)
        if isinstance(node, ast.Dict):
            named = {
                key.value: ast.unparse(value)
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
            }
            found += ["trust_remote_code: True"] * (named.get("trust_remote_code") == "True")
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            loader = options.get("Loader", ast.unparse(node.args[1]) if len(node.args) > 1 else None)
            found += [name] * (name in ("eval", "exec", "__import__", "compile", "os.system", "pd.read_pickle"))
            found += [name] * (name == "torch.load" and options.get("weights_only") != "True")
            found += [name] * (name == "yaml.load" and loader not in ("yaml.SafeLoader", "_Loader"))
            for option in ("trust_remote_code", "allow_pickle", "shell"):
                found += [f"{name}({option}=True)"] * (options.get(option) == "True")
    return found


def test_no_source_reads_what_can_execute():
    found = {str(path): unsafe(ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)", "torch.load(f, weights_only=False)", "import pickle", "from pickle import load",
        "yaml.load(f, yaml.Loader)", "yaml.unsafe_load(f)", "yaml.load(f)", "eval(x)", "exec(x)",
        "f(trust_remote_code=True)",
        "np.load(f, allow_pickle=True)",
        "{'trust_remote_code': True}", "run(x, shell=True)",
    ],
)  # fmt: skip
def test_the_look_at_the_sources_finds(source):
    assert unsafe(ast.parse(source))


def test_the_yaml_loader_is_a_safe_one():
    assert issubclass(_Loader, yaml.SafeLoader)
    assert set(_Loader.yaml_constructors) == set(yaml.SafeLoader.yaml_constructors)
