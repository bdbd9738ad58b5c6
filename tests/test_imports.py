"""Who may import whom (design.md, section 3), and which commands start without torch."""

from __future__ import annotations

import ast
import json
import pathlib
import subprocess
import sys

import pytest

from mia import cli

PACKAGE = pathlib.Path(cli.__file__).parent.parent
SUPPORT = {
    "tables", "config", "rng", "models", "settings", "metrics", "resampling", "scored", "formats", "classifiers",
    "search", "sources", "languages", "matching", "pixels", "errors", "compat", "rows", "lbfgs", "ssim", "blind",
    "schedules", "networks", "captions", "families", "adapters", "walks", "reader", "attacks",
}  # fmt: skip
STAGES = {
    "selection": {"selection"}, "metadata": {"metadata"}, "images": {"images", "fetching"}, "attrition": {"attrition"},
    "embeddings": {"embeddings"}, "dedup": {"dedup"}, "sanitize": {"sanitize", "paper_sanitizer"},
    "card": {"card"}, "distance": {"distance"}, "audit": {"audit"}, "infer": {"infer"}, "train": {"train"},
    "latents": {"latents"}, "features": {"features"}, "gradients": {"gradients", "noise_optimisation"},
    "blackbox": {"blackbox", "services"}, "scores": {"scores"}, "evaluation": {"evaluation"},
    "plan": {"plan"},
    "report": {"report", "figures", "summary", "lineup", "verdict"},  # one stage in five modules
}  # fmt: skip
OTHERS = {"toy", "cli", "__init__", "__main__"}
TORCH_FREE = (
    "select", "metadata", "probe", "images", "attrition", "neighbours", "matches", "links", "dedup", "card", "distance",
    "audit", "infer", "scores", "evaluate", "report",
)  # fmt: skip


def text(module: str) -> str:
    """The source of a module, of a package's modules one after the other."""
    files = sorted((PACKAGE / module).glob("*.py")) or [PACKAGE / f"{module}.py"]
    return "\n".join(file.read_text().replace("from __future__ import annotations\n", "") for file in files)


def imported(source: str) -> set[str]:
    """Modules of `mia` that a text imports, at any depth: `tables` for `from mia import tables`, `mia.tables`, ..."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "mia" if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "mia" else [module]
        found |= {name.split(".")[1] for name in names if name.startswith("mia.")}
        if "mia" in names:
            found.add("the whole package")
    return found - {"__version__"}


def test_the_reader_of_imports_sees_every_form():
    source = """
import mia.one, numpy
from mia import two as alias, __version__
from mia.three import name
from . import four
from .five import name
def inside():
    if TYPE_CHECKING:
        from mia.cli.six import name
    import importlib, miasma
"""
    assert imported(source) == {"one", "two", "three", "four", "five", "cli"}


def test_every_module_is_a_stage_or_support():
    here = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert here == set().union(*STAGES.values()) | SUPPORT | OTHERS


@pytest.mark.parametrize(("stage", "module"), [(s, m) for s, modules in STAGES.items() for m in sorted(modules)])
def test_a_stage_imports_support_only(stage, module):
    found = imported(text(module))
    assert found <= SUPPORT | STAGES[stage] - ({module} if (PACKAGE / f"{module}.py").exists() else set()), (
        f"{module} imports {sorted(found - SUPPORT)}"
    )


@pytest.mark.parametrize("module", sorted(SUPPORT))
def test_support_imports_no_stage_and_no_command(module):
    own = set() if (PACKAGE / f"{module}.py").exists() else {module}  # a package may import its own modules
    assert imported(text(module)) <= SUPPORT - {module} | own


def test_only_the_target_phase_imports_the_toy_model():
    users = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if "toy" in imported(path.read_text())}
    assert users == {"cli/target.py"}


def test_stages_read_no_environment_and_no_snakemake():
    for module in sorted(set().union(*STAGES.values())):
        tree = ast.parse(text(module))
        named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        modules = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        assert not named & {"environ", "getenv"} and not any(m.startswith("snakemake") for m in modules), module
        called = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert "print" not in called, module


def loaded(code: str) -> dict[str, list[str]]:
    """Top-level names in sys.modules after each label that `code` passes to `mark`."""
    head = (
        "import json, sys\nseen = {}\ndef mark(label): seen[label] = sorted({m.split('.')[0] for m in sys.modules})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{head}{code}\nprint(json.dumps(seen))"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


HEAVY = {"torch", "torchvision", "diffusers", "transformers", "open_clip"}


def test_commands_without_a_model_load_no_torch():
    code = "import mia\nmark('mia')\nfrom mia import cli\nmark('mia.cli')\n"
    code += "import importlib\n"
    for name in TORCH_FREE:
        code += f"assert cli.commands.get_command(None, {name!r}) is not None\nmark({name!r})\n"
    modules = set().union(*STAGES.values()) - {"embeddings", "train", "latents", "features"}
    for module in sorted(modules | {"classifiers", "search", "matching"}):
        code += f"importlib.import_module('mia.{module}')\nmark('stage {module}')\n"
    code += (
        "import scipy.stats, sklearn.ensemble, sklearn.feature_extraction.text, sklearn.neighbors\nmark('libraries')\n"
    )
    for label, modules in loaded(code).items():
        assert not HEAVY & set(modules), label


def test_the_bare_package_and_the_list_of_commands_load_next_to_nothing():
    seen = loaded("import mia\nmark('mia')\nfrom mia import cli\ncli.commands.list_commands(None)\nmark('list')\n")
    assert not {"numpy", "pyarrow", "polars", "sklearn", "yaml"} & set(seen["list"])
    assert "mia" in seen["mia"] and "click" not in seen["mia"]


@pytest.mark.parametrize("name", [name for names in cli.PHASES.values() for name in names])
def test_every_listed_command_exists_under_its_name(name):
    command = cli.commands.get_command(None, name)
    assert command.name == name and command.help
